"""The publishing script and its result, end to end: the real clients, against a Hub of our own (tests/hub.py).

Most tests publish the small kernel of test_build.py in this process. The last ones publish the real one as a
maintainer does and use it as strangers do, each in a process of its own with HF_ENDPOINT set.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub import Hub
from test_build import MODULE, PACKAGE, git, write
from test_version import set_version

ROOT = Path(__file__).resolve().parents[1]
REPO = "org/scattermoe-lora"

pytest.importorskip("griffe", reason="the publishing script needs what requirements-dev.txt has")
import huggingface_hub  # noqa: E402
from huggingface_hub import HfApi  # noqa: E402

import build as build_script  # noqa: E402
import publish as publish_script  # noqa: E402

BuildError = publish_script.BuildError
CHANGELOG = "# Changelog\n\n## Unreleased\n"


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def source(tmp_path):
    """A small kernel's checkout, built."""
    root = tmp_path / "kernel"
    for name in ("build.toml", "CARD.md"):
        root.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    edit(root, "build.toml", '"cpu", "cuda", "rocm", "xpu"', '"cpu", "cuda"')
    release(root, 1, CHANGELOG)
    for name, text in PACKAGE.items():
        write(root, name, text)
    for name in ("benchmark.py", "benchmark_more.py", "helper.py"):
        (root / "benchmarks").mkdir(exist_ok=True)
        (root / "benchmarks" / name).write_text(f"# {name}\n")
    (root / ".gitignore").write_text("/build/\n__pycache__/\n")
    git(root, "init")
    commit_and_build(root)
    return root


def edit(root, name, old, new):
    text = (root / name).read_text()
    assert old in text
    (root / name).write_text(text.replace(old, new))


def commit_and_build(root):
    git(root, "add", "-A")
    git(root, "commit", "-m", "change")
    build_script.build(root, root / "build")


def release(root, version, changelog):
    """The tests publish versions 1 and 2."""
    set_version(root, version)
    (root / "CHANGELOG.md").write_text(changelog)


def next_version(root):
    release(root, 2, f"{CHANGELOG}\n## 1.0.0 - 2026-01-01\n")
    write(root, "tables/factor.json", "3\n")
    commit_and_build(root)


def publish(root, hub, token=Hub.token, repo_id=REPO, **options):
    api = HfApi(endpoint=hub.url, token=token)
    kernel = build_script.read_kernel(root)
    return publish_script.publish(kernel, root / "build", repo_id, api, **options)


def refused(root, hub, **options):
    """The problems that publishing is refused for, after which the Hub is as it was."""
    before = len(hub.writes)
    with pytest.raises(BuildError) as error:
        publish(root, hub, **options)
    assert len(hub.writes) == before
    return error.value.problems


def wanted(root):
    """What kernel-builder would put on the version's branch."""
    paths = [path for path in (root / "build").glob("torch-*/**/*") if path.is_file() and path.suffix != ".pyc"]
    files = {f"build/{path.relative_to(root / 'build').as_posix()}": path.read_bytes() for path in paths}
    benchmarks = ("benchmark.py", "benchmark_more.py")
    return files | {f"benchmarks/{name}": f"# {name}\n".encode() for name in benchmarks}


def versions(hub):
    """What `kernels` finds: the number of every version and its files, without those that `main` has too."""
    repository = hub.repositories[REPO]
    return {
        int(name[1:]): {path: data for path, data in repository.files(name).items() if "/" in path}
        for name in repository.branches
        if re.fullmatch(r"v\d+", name)
    }


def card(hub):
    return hub.repositories[REPO].files("main")["README.md"].decode()


# What is published


def test_a_first_version(source, hub):
    done = publish(source, hub)
    assert versions(hub) == {1: wanted(source)}
    assert card(hub) == (source / "build" / "CARD.md").read_text()
    assert set(hub.repositories[REPO].branches) == {"main", "v1"}
    head = hub.repositories[REPO].heads["v1"]
    assert done == [f"{REPO} v1 at {head}: 14 changes; 14 files downloaded again, every digest verified"]
    commit = git(source, "rev-parse", "HEAD")
    assert hub.repositories[REPO].commits[head].message == f"scattermoe-lora Unreleased, from commit {commit[:12]}"


def test_a_version_appears_when_it_is_whole_and_verified(source, hub):
    publish(source, hub)
    api = f"/api/kernels/{REPO}"
    assert hub.writes == [
        "POST /api/repos/create",
        f"POST {api}/branch/publish-v1",
        f"POST {api}/commit/publish-v1",
        f"POST {api}/branch/v1",
        f"DELETE {api}/branch/publish-v1",
        f"POST {api}/commit/main",
    ]
    downloads = [number for number, request in enumerate(hub.requests) if re.match("GET .*/resolve/", request)]
    assert len(downloads) == len(wanted(source))
    assert max(downloads) < hub.requests.index(f"POST {api}/branch/v1")


def test_publishing_again_changes_nothing(source, hub):
    publish(source, hub)
    writes = list(hub.writes)
    assert "nothing to change; 14 files downloaded again" in publish(source, hub)[-1]
    assert hub.writes == writes


def test_a_version_is_replaced_in_one_commit_without_stale_files(source, hub):
    publish(source, hub)
    before = len(hub.writes)
    write(source, "tables/other.json", "1\n")
    (source / "torch-ext" / MODULE / "tables" / "factor.json").rename(
        source / "torch-ext" / MODULE / "tables" / "renamed.json"
    )
    edit(source, f"torch-ext/{MODULE}/ops.py", "factor.json", "renamed.json")
    (source / "benchmarks" / "benchmark_more.py").rename(source / "benchmarks" / "moved.py")
    commit_and_build(source)
    publish(source, hub)
    files = wanted(source)
    del files["benchmarks/benchmark_more.py"]
    assert versions(hub) == {1: files}
    assert "build/torch-cpu/tables/renamed.json" in files and "build/torch-cpu/tables/factor.json" not in files
    assert hub.writes[before:] == [f"POST /api/kernels/{REPO}/commit/v1"]


def test_what_else_stands_in_benchmarks_stays_but_nothing_of_main(source, hub):
    publish(source, hub)
    repository = hub.repositories[REPO]
    repository.commit("v1", repository.files("v1") | {"benchmarks/results.json": b"{}"}, "theirs")
    publish(source, hub)
    assert versions(hub)[1].keys() - wanted(source).keys() == {"benchmarks/results.json"}

    old = {"build/torch-cpu/old.py": b"", "benchmarks/old.json": b"", "LICENSE": b""}
    repository.commit("main", repository.files("main") | old, "from before branches were versions")
    next_version(source)
    publish(source, hub)
    assert versions(hub)[2] == wanted(source)
    assert "LICENSE" in repository.files("v2")


def test_the_card_is_of_the_newest_version_and_of_the_repository(source, hub):
    publish(source, hub, repo_id="someone/else")
    told = hub.repositories["someone/else"].files("main")["README.md"].decode()
    assert 'get_kernel("someone/else", version=1' in told and "hf download someone/else " in told

    publish(source, hub)
    old = git(source, "rev-parse", "HEAD")
    next_version(source)
    publish(source, hub)
    assert 'get_kernel("org/scattermoe-lora", version=2' in card(hub)
    git(source, "checkout", old)
    write(source, "tables/factor.json", "5\n")
    commit_and_build(source)
    publish(source, hub)
    assert versions(hub)[1] == wanted(source)
    assert "version=2" in card(hub)


def test_a_dry_run_tells_every_operation_and_does_none(source, hub):
    told = publish(source, hub, dry_run=True)
    assert hub.writes == []
    assert told[:2] == [f"create {REPO}, a repository of the type kernel", "create branch publish-v1, from main"]
    assert told[2:-4] == [f"add    {path}  (publish-v1)" for path in sorted(wanted(source))]
    assert told[-4:-2] == ["create branch v1, from publish-v1", "delete branch publish-v1"]
    assert told[-2:] == ["add    README.md  (main)", "dry run: nothing was changed"]

    publish(source, hub)
    writes = list(hub.writes)
    (source / "torch-ext" / MODULE / "tables" / "factor.json").unlink()
    commit_and_build(source)
    told = publish(source, hub, dry_run=True)
    deleted = [f"delete build/torch-{backend}/tables/factor.json  (v1)" for backend in ("cpu", "cuda")]
    changed = [f"build/torch-{backend}/{name}" for backend in ("cpu", "cuda") for name in ("_ops.py", "metadata.json")]
    assert told == [*deleted, *(f"update {path}  (v1)" for path in changed), "dry run: nothing was changed"]
    assert hub.writes == writes


def test_a_pull_request_waits_for_its_merge(source, hub, monkeypatch):
    assert "no pull request can make one" in refused(source, hub, create_pr=True)[0]
    publish(source, hub)
    repository = hub.repositories[REPO]
    before = dict(repository.branches)
    write(source, "tables/factor.json", "3\n")
    edit(source, "CARD.md", "LoRA fine-tuning", "Fine-tuning with LoRA")
    commit_and_build(source)
    monkeypatch.setattr(publish_script, "MAX_OPERATIONS", 4)
    done = publish(source, hub, token="hf_reader", create_pr=True)
    assert done[:2] == [
        f"pull request for v1: {hub.url}/kernels/{REPO}/discussions/1",
        f"pull request for the card: {hub.url}/kernels/{REPO}/discussions/2",
    ]
    assert repository.branches == before
    assert {path: data for path, data in repository.files("refs/pr/1").items() if "/" in path} == wanted(source)
    assert b"Fine-tuning with LoRA" in repository.files("refs/pr/2")["README.md"]
    assert repository.operations[-3:] == [4, 2, 1]


# What is refused


REFUSALS = {
    "changed": (lambda root: write(root, "ops.py", "X = 1\n"), "commit or stash them"),
    "untracked": (lambda root: write(root, "new.py", "X = 1\n"), "commit or stash them"),
    "no checkout": (lambda root: shutil.rmtree(root / ".git"), "no git checkout; publish from a clone"),
    "missing variant": (lambda root: shutil.rmtree(root / "build" / "torch-cuda"), "torch-cuda: missing variant; run"),
    "no build": (lambda root: shutil.rmtree(root / "build"), "no such folder; run `make build`"),
    "other digest": (
        lambda root: (root / "build" / "torch-cpu" / "ops.py").write_text("X = 1\n"),
        "hash mismatch for ops.py",
    ),
    "other commit": (
        lambda root: (write(root, "tables/factor.json", "9\n"), git(root, "commit", "-am", "later")),
        "torch-cpu: tables/factor.json differs from this tree; run `make build`",
    ),
    "other commit of the same tree": (
        lambda root: git(root, "commit", "--allow-empty", "-m", "later"),
        "build/torch-cpu/metadata.json is not what HEAD gives; run `make build`",
    ),
    "other tag": (lambda root: git(root, "tag", "v2.0.0"), "tag v2.0.0: means kernel version 2"),
    "other changelog": (
        lambda root: (
            (root / "CHANGELOG.md").write_text("## 3.0.0 - 2026-01-01\n"),
            commit_and_build(root),
        ),
        "build.toml: version is 1, and after CHANGELOG.md it is 3",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused(source, hub, case):
    change, expected = REFUSALS[case]
    change(source)
    problems = refused(source, hub)
    assert any(expected in problem for problem in problems), problems


def test_a_forged_build_is_refused(source, hub):
    """A build whose digests are right, but of a source that the commit does not hold."""
    committed = git(source, "rev-parse", "HEAD")
    write(source, "ops.py", PACKAGE["ops.py"].replace("x * FACTOR", "x + FACTOR"))
    build_script.build(source, source / "build")
    for backend in ("cpu", "cuda"):
        for name in ("_ops.py", "metadata.json"):
            path = source / "build" / f"torch-{backend}" / name
            path.write_text(path.read_text().replace("_dirty", "").replace('"dirty": true', '"dirty": false'))
        digest = build_script.Digest.hash_variant(build_script.DigestAlgorithm.SHA256, path.parent).files
        content = json.loads(path.read_text())
        content["digest"]["files"] = dict(sorted(digest.items()))
        path.write_text(json.dumps(content, indent=2) + "\n")
    git(source, "checkout", ".")
    assert git(source, "rev-parse", "HEAD") == committed
    problems = refused(source, hub)
    assert problems and all("ops.py differs from this tree" in problem for problem in problems)


MORE = "\n\ndef more(x, y=1):\n    return x\n"
BREAKS = {
    "a name is gone": [("__init__.py", '"double", ', "")],
    "an argument is renamed": [
        ("ops.py", "def double(x:", "def double(y:"),
        ("ops.py", "ops.double(x)", "ops.double(y)"),
    ],
    "an argument is added": [("ops.py", "def double(x: torch.Tensor)", "def double(x: torch.Tensor, times: int)")],
    "a layer is gone": [("layers/__init__.py", "class Double", "class Twice")],
}
FITS = {
    "a name is new": [
        ("ops.py", "    return ops.double(x)\n", f"    return ops.double(x)\n{MORE}"),
        ("__init__.py", "import double\n", "import double, more\n"),
        ("__init__.py", '"layers"]', '"layers", "more"]'),
    ],
    "an argument is added with a default": [
        ("ops.py", "def double(x: torch.Tensor)", "def double(x, times: int = 2)")
    ],
    "an inner function is gone": [("ops.py", "def _double", "def _twice"), ("ops.py", "@_double.", "@_twice.")],
    "a function is elsewhere": [
        ("layers/__init__.py", "class Double", "from ..ops import double\n\n\nclass Double"),
        ("__init__.py", "from .ops import double", "from .layers import double"),
    ],
}


def test_the_api_of_a_name_that_is_a_submodule_too(source):
    """`from .double import double`: what code finds there is the function."""
    edit(source, f"torch-ext/{MODULE}/__init__.py", "from .ops import double", "from .double import double")
    write(source, "double.py", "def double(x, _inner=1):\n    return x\n\n\ndef inner():\n    pass\n")
    commit_and_build(source)
    old, new = source / "build" / "torch-cpu", source / "new"
    shutil.copytree(old, new)
    assert publish_script.api_changes(old, new, MODULE) == []
    edit(new, "double.py", "def inner", "def other")
    assert publish_script.api_changes(old, new, MODULE) == []
    edit(new, "double.py", "def double(x,", "def double(y,")
    assert any("double(x)" in change for change in publish_script.api_changes(old, new, MODULE))


def change_source(root, edits):
    for name, old, new in edits:
        edit(root, f"torch-ext/{MODULE}/{name}", old, new)
    commit_and_build(root)


@pytest.mark.parametrize("case", BREAKS)
def test_another_public_api_needs_another_version(source, hub, case):
    publish(source, hub)
    before = versions(hub)
    change_source(source, BREAKS[case])
    problems = refused(source, hub)
    assert all(
        problem.startswith("version 1 on the Hub has another public API: `")
        and problem.endswith("undo it, or raise `version` in build.toml to 2")
        for problem in problems
    ), problems
    next_version(source)
    publish(source, hub)
    assert versions(hub) == before | {2: wanted(source)}


@pytest.mark.parametrize("case", FITS)
def test_what_takes_nothing_away_needs_no_version(source, hub, case):
    publish(source, hub)
    change_source(source, FITS[case])
    publish(source, hub)
    assert versions(hub) == {1: wanted(source)}


def test_version_0_promises_nothing(source, hub):
    release(source, 0, CHANGELOG)
    commit_and_build(source)
    publish(source, hub)
    change_source(source, BREAKS["a name is gone"])
    publish(source, hub)
    assert versions(hub) == {0: wanted(source)}


def test_a_published_variant_is_not_dropped(source, hub):
    publish(source, hub)
    edit(source, "build.toml", ', "cuda"', "")
    commit_and_build(source)
    assert refused(source, hub) == [
        "version 1 on the Hub has torch-cuda, and build.toml has not: add its backend again, or raise `version` in "
        "build.toml to 2"
    ]


def test_more_than_one_commit_takes(source, hub, monkeypatch):
    """A new version is whole whatever its size; an old one is not replaced by halves."""
    assert publish_script.MAX_OPERATIONS == 1000
    monkeypatch.setattr(publish_script, "MAX_OPERATIONS", 6)
    hub.fail("commit/publish-v1", 500, after=2)
    with pytest.raises(publish_script.HfHubHTTPError):
        publish(source, hub)
    assert versions(hub) == {}
    assert hub.repositories[REPO].operations == [6, 6]
    publish(source, hub)
    assert versions(hub) == {1: wanted(source)}
    assert hub.repositories[REPO].operations == [6, 6, 2, 1]  # the rest, then the card

    for name in ("a", "b", "c", "d"):
        write(source, f"tables/{name}.json", "1\n")
    commit_and_build(source)
    assert refused(source, hub) == [
        "replacing version 1 takes 12 operations, and one commit 6; run this with --create-pr, and merge the pull "
        "request"
    ]


# What goes wrong on the way


FIRST = ["repos/create", "branch/publish-v1", "commit/publish-v1", "POST .*branch/v1", "DELETE", "commit/main"]
SECOND = ["commit/publish-v2", "POST .*branch/v2", "commit/main"]


def stopped_and_finished(root, hub, request, how, before):
    """Publish with one request failing; then again. `before` is what the Hub had, and what it may have still."""
    hub.fail(request, how)
    with pytest.raises(publish_script.httpx2.HTTPError) as error:
        publish(root, hub)
    assert not hub.faults
    after = before | {build_script.read_kernel(root).general["version"]: wanted(root)}
    assert (versions(hub) if REPO in hub.repositories else {}) in (before, after)
    assert "run this again" in " ".join(publish_script.advice(error.value, REPO))
    publish(root, hub)
    assert versions(hub) == after
    assert set(hub.repositories[REPO].branches) == {"main", *(f"v{version}" for version in after)}
    assert card(hub) == (root / "build" / "CARD.md").read_text()


@pytest.mark.parametrize("how", [500, "dropped", "lost"])
@pytest.mark.parametrize("request_", FIRST)
def test_a_stopped_first_version_is_whole_or_not_there(source, hub, request_, how):
    stopped_and_finished(source, hub, request_, how, {})


@pytest.mark.parametrize("how", [500, "dropped", "lost"])
@pytest.mark.parametrize("request_", SECOND)
def test_a_stopped_second_version_leaves_the_first(source, hub, request_, how):
    publish(source, hub)
    before = versions(hub)
    next_version(source)
    stopped_and_finished(source, hub, request_, how, before)


@pytest.mark.parametrize("how", [500, "dropped", "lost"])
def test_a_stopped_replacement_is_the_old_or_the_new(source, hub, how):
    publish(source, hub)
    before = versions(hub)
    write(source, "tables/factor.json", "3\n")
    commit_and_build(source)
    stopped_and_finished(source, hub, "commit/v1", how, before)


def test_what_a_stopped_run_left_of_another_commit_is_cleared(source, hub):
    hub.fail("POST .*branch/v1", 500)
    with pytest.raises(publish_script.HfHubHTTPError):
        publish(source, hub)
    write(source, "more.py", "X = 1\n")
    (source / "torch-ext" / MODULE / "tables" / "factor.json").rename(source / "torch-ext" / MODULE / "f.json")
    commit_and_build(source)
    publish(source, hub)
    assert versions(hub) == {1: wanted(source)}


def test_a_download_that_breaks_off_is_taken_up(source, hub):
    hub.fail("GET .*resolve.*ops.py", "dropped")
    publish(source, hub)
    assert not hub.faults and versions(hub) == {1: wanted(source)}


def test_what_does_not_arrive_as_it_was_is_no_version(source, hub):
    hub.corrupted.add("build/torch-cuda/ops.py")
    with pytest.raises(BuildError) as error:
        publish(source, hub)
    differs, digest = error.value.problems
    assert re.fullmatch(f"{REPO} at [0-9a-f]{{40}}: build/torch-cuda/ops.py differs; run this again", differs)
    assert "build/torch-cuda: File hash mismatch for ops.py: expected: " in digest
    assert versions(hub) == {}


def test_a_replacement_that_does_not_arrive_as_it_was_is_told(source, hub):
    publish(source, hub)
    write(source, "tables/factor.json", "3\n")
    commit_and_build(source)
    hub.corrupted.add("build/torch-cuda/tables/factor.json")
    with pytest.raises(BuildError, match="build/torch-cuda/tables/factor.json differs; run this again"):
        publish(source, hub)


def test_two_who_publish_at_once(source, hub):
    publish(source, hub)
    repository = hub.repositories[REPO]
    theirs = repository.files("v1") | {"build/torch-cpu/theirs.py": b""}
    write(source, "tables/factor.json", "3\n")
    commit_and_build(source)
    hub.fail("commit/v1", lambda: repository.commit("v1", theirs, "theirs"))
    with pytest.raises(publish_script.HfHubHTTPError) as error:
        publish(source, hub)
    assert "was changed meanwhile" in publish_script.advice(error.value, REPO)[0]
    assert repository.files("v1") == theirs


# The command, and what a stranger does with the result


def run(hub, home, *command, **environment):
    """Run a command that takes our Hub for the Hub, with an empty cache at first."""
    inherited = {name: value for name, value in os.environ.items() if not re.match("HF_|LOCAL_KERNELS|KERNELS_", name)}
    environment = inherited | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def python(hub, home, code, **environment):
    done = run(hub, home, sys.executable, "-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def command(root, hub, home, *arguments, token=Hub.token):
    login = {"HF_TOKEN": token} if token else {}
    return run(hub, home, sys.executable, str(root / "scripts" / "publish.py"), *arguments, **login)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The real kernel's checkout, with what is not committed yet, built."""
    root = tmp_path_factory.mktemp("real")
    for name in ("build.toml", "CARD.md", ".gitignore"):
        shutil.copy(ROOT / name, root / name)
    release(root, 1, CHANGELOG)
    for name in ("torch-ext", "scripts", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    git(root, "init")
    commit_and_build(root)
    return root


@pytest.fixture(scope="module")
def published(real, tmp_path_factory):
    """A Hub with two versions of the real kernel, published by the command; the first after a broken connection."""
    home = tmp_path_factory.mktemp("maintainer")
    with Hub() as hub:
        told = command(real, hub, home, "--dry-run", token=None)
        assert (told.returncode, hub.writes) == (0, [])
        assert "add    build/torch-cuda/triton_kernels/grouped_gemm.py  (publish-v1)\n" in told.stdout
        hub.fail("commit/", "dropped")
        broken = command(real, hub, home)
        assert (broken.returncode, broken.stdout, versions(hub)) == (1, "", {})
        assert broken.stderr.splitlines()[-1].startswith("error: run this again: it goes on where it stopped")
        assert "Traceback" not in broken.stderr
        done = command(real, hub, home)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("files downloaded again, every digest verified\n")
        assert "Uploading to publish-v1: 100%" in done.stderr and "Fetching" in done.stderr

        release(real, 2, "## 2.0.0 - 2026-02-01\n\n## 1.0.0 - 2026-01-01\n")
        commit_and_build(real)
        git(real, "tag", "v2.0.0")
        publish(real, hub)
        yield hub


USE = """
import torch
from kernels import get_kernel, get_loaded_kernels

def use(version, **options):
    torch.manual_seed(0)
    kernel = get_kernel("org/scattermoe-lora", version=version, trust_remote_code=True, **options)
    x, up, down = torch.randn(5, 8, requires_grad=True), torch.randn(4, 12, 8), torch.randn(4, 8, 6)
    index, weights = torch.rand(5, 4).topk(2).indices, torch.rand(5, 2)
    lora = kernel.ExpertLoRA(torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 12, 2), 0.5)
    out = kernel.moe_mlp(x, up, down, index, weights, gate_up_lora=lora)
    want = kernel.reference.moe_mlp(x, up, down, index, weights, gate_up_lora=lora)
    assert torch.allclose(out, want, atol=1e-5), (out - want).abs().max()
    out.sum().backward()
    assert x.grad.abs().sum() > 0 and lora.A.grad.abs().sum() > 0
    return kernel, out
"""


def test_two_versions_in_one_process(published, tmp_path):
    """From an empty cache: what is there then is this variant, of these commits."""
    told = python(
        published,
        tmp_path,
        f"""{USE}
(first, out), (second, other) = use(1), use(2)
assert first is not second and torch.equal(out, other)
ids = {{loaded.metadata.version: loaded.metadata.id for loaded in get_loaded_kernels()}}
assert ids.keys() == {{1, 2}} and ids[1] != ids[2]
names = torch._C._dispatch_get_all_op_names()
ops = [{{name.partition("::")[2] for name in names if name.startswith(f"{{id}}::")}} for id in ids.values()]
assert ops[0] == ops[1] and ops[0], ops
assert torch.equal(use(1)[1], out)
print(first.__file__, second.__file__, sep="\\n")
""",
    )
    heads = published.repositories[REPO].heads
    for version, path in zip(("v1", "v2"), map(Path, told.splitlines()), strict=True):
        snapshot = tmp_path / "hub/kernels--org--scattermoe-lora/snapshots" / heads[version]
        assert path.parent == snapshot / "build" / "torch-cpu"
        assert not (snapshot / "build" / "torch-cuda").exists()


def test_the_layers_are_found_by_a_mapping(published, tmp_path):
    python(
        published,
        tmp_path,
        """
import torch
from torch import nn
from kernels import LayerRepository, Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.top_k = nn.Linear(8, 4, bias=False), 2

class Linear(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))

calls = 0

@use_kernel_forward_from_hub("GatedMLP")
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.activation = Router(), nn.SiLU()
        self.input_linear, self.output_linear = Linear(4, 12, 8), Linear(4, 8, 6)

    def forward(self, layer_input):
        global calls
        calls += 1
        x = layer_input.reshape(-1, 8)
        logits, index = self.router.layer(x).topk(2, dim=-1)
        weights, out = logits.softmax(-1), torch.zeros_like(x)
        for token in range(len(x)):
            for weight, expert in zip(weights[token], index[token]):
                gate, up = (self.input_linear.weight[expert] @ x[token]).chunk(2)
                out[token] += weight * (self.output_linear.weight[expert] @ (self.activation(gate) * up))
        return out.reshape(layer_input.shape)

torch.manual_seed(0)
block, x = Block(), torch.randn(1, 5, 8)
want = block(x)
layer = LayerRepository("org/scattermoe-lora", layer_name="ScatterMoEGatedMLP", version=1, trust_remote_code=True)
with use_kernel_mapping({"GatedMLP": {"cpu": layer}}):
    block = kernelize(block.train(), mode=Mode.TRAINING, device="cpu")
out = block(x)
assert calls == 1 and torch.allclose(out, want, atol=1e-5)
out.sum().backward()
assert block.input_linear.weight.grad.abs().sum() > 0
""",
    )


def test_kernels_versions_and_info(published, tmp_path):
    code = "from kernels.cli import main\n"
    for arguments in (["versions", REPO], ["info", REPO, "--json"]):
        code += f"sys.argv = ['kernels', *{arguments}]\nmain()\nprint('=')\n"
    versions, info, _ = python(published, tmp_path, f"import sys\n{code}").split("=\n")
    first, second = re.split("Version 2:", versions)
    for text in (first.partition("Version 1:")[2], second):
        assert "torch-cpu compatible, preferred" in text and "torch-cuda: " in text
    assert json.loads(info) == {
        "repo_id": REPO,
        "revision": "v2",
        "name": "scattermoe-lora",
        "version": 2,
        "kernels_minver": None,
        "license": "apache-2.0",
        "upstream": None,
        "source": None,
        "python_depends": [],
        "backends": ["cpu", "cuda", "rocm", "xpu"],
    }


def test_the_card_works_as_pasted(published, tmp_path):
    (code,) = re.findall("```python\n(.*?)```", card(published), re.DOTALL)
    assert 'get_kernel("org/scattermoe-lora", version=2, trust_remote_code=True)' in code
    stub = "kernelize = lambda model: 'kernelized ' + model"
    code = code.replace("report =", f"kernel.{stub}\nmodel = 'it'\nreport =")
    assert python(published, tmp_path, code) == "kernelized it\n"


def test_the_benchmark_on_the_card_works_as_pasted(published, tmp_path):
    """By a download: `kernels benchmark REPOSITORY` asks for a model, and passes no trust_remote_code."""
    (code,) = re.findall("```bash\n(.*?)```", card(published), re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    there = f"set -e; cd {tmp_path}\n{code.rstrip()} --iterations 2 --warmup 1"
    told = run(published, tmp_path / "home", "bash", "-c", there, PATH=path)
    assert told.returncode == 0, told.stderr
    (row,) = [line for line in told.stderr.splitlines() if "MoeMlpBenchmark" in line and "│" in line]
    assert "✓" in row
    direct = run(published, tmp_path / "home", "kernels", "benchmark", REPO, "--version", "2", PATH=path)
    assert "/api/models/" in direct.stderr, "kernels can do it now: the card may say so"


def test_an_untrusted_publisher_needs_the_flag(published, tmp_path):
    code = 'from kernels import get_kernel\nget_kernel("org/scattermoe-lora", version=1)'
    done = run(published, tmp_path, sys.executable, "-c", code)
    assert done.returncode == 1
    assert "'org/scattermoe-lora' is not from a trusted publisher. Set trust_remote_code=True" in done.stderr
    assert not (tmp_path / "hub").exists()
    published.trusted.add("org")
    try:
        python(published, tmp_path, code)
    finally:
        published.trusted.clear()


def test_offline_after_a_snapshot(published, tmp_path):
    offline = {"HF_HUB_OFFLINE": "1"}
    done = run(published, tmp_path, sys.executable, "-c", f"{USE}\nuse(1)", **offline)
    assert done.returncode == 1 and "not available in the local cache" in done.stderr
    api = HfApi(endpoint=published.url, token=False)
    api.snapshot_download(REPO, repo_type="kernel", revision="v1", cache_dir=tmp_path / "hub")
    requests = len(published.requests)
    python(published, tmp_path, f"{USE}\nuse(1)", **offline)
    assert len(published.requests) == requests


@pytest.fixture
def main(source, hub, monkeypatch, capsys):
    """The command in this process, with a token or none: its exit code, and what it wrote."""

    def call(*arguments, token=Hub.token):
        api = functools.partial(HfApi, endpoint=hub.url, token=token or False)
        monkeypatch.setattr(publish_script, "HfApi", api)
        monkeypatch.setattr(publish_script, "ROOT", source)
        return publish_script.main(arguments), *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("repo_id", "offline", "expected"), [("bad id", False, "bad id"), ("org/other", True, "offline mode is enabled")]
)
def test_a_name_that_is_none_and_no_network_are_told(main, monkeypatch, repo_id, offline, expected):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    code, printed, told = main("--dry-run", "--repo-id", repo_id)
    assert (code, printed) == (1, "")
    last = told.splitlines()[-1]
    assert last.startswith("error: ") and expected in last


@pytest.mark.parametrize(
    ("token", "expected"),
    [
        (None, ["the Hub does not know you", "log in with `hf auth login`, or set HF_TOKEN"]),
        ("hf_reader", ["does not let you write to org/other", "use a token that may write there, or --create-pr"]),
    ],
)
def test_who_may_not_publish_is_told(main, hub, token, expected):
    code, printed, told = main("--repo-id", "org/other", token=token)
    assert (code, printed) == (1, "")
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and all(text in error for text, error in zip(expected, errors, strict=True))
    assert "org/other" not in hub.repositories
