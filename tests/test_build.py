"""The build script: what it writes, that a check finds every change to it, and that `kernels` loads the result.

Most tests build a small kernel made in a temporary folder; the last ones build and load the real one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "build.py"
MODULE = "scattermoe_lora"
BACKENDS = ["cpu", "cuda", "rocm", "xpu"]

if not SCRIPT.is_file():
    pytest.skip("needs the source tree, not only a built kernel", allow_module_level=True)
import build as build_script  # noqa: E402

BuildError = build_script.BuildError

PACKAGE = {
    "__init__.py": 'from . import layers\nfrom .ops import double\n\n__all__ = ["double", "layers"]\n',
    "layers/__init__.py": "from torch import nn\n\n\nclass Double(nn.Module):\n    pass\n",
    "ops.py": """\
import json
from pathlib import Path

import torch

from ._ops import add_op_namespace_prefix, ops

FACTOR = json.loads((Path(__file__).parent / "tables" / "factor.json").read_text())


@torch.library.custom_op(add_op_namespace_prefix("double"), mutates_args=())
def _double(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR


@_double.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def double(x: torch.Tensor) -> torch.Tensor:
    return ops.double(x)
""",
    "tables/factor.json": "2\n",
    "tables/notes.txt": "not for the Hub\n",
}


@pytest.fixture
def kernel(tmp_path):
    """A small kernel's source tree, outside any git checkout."""
    return small_kernel(tmp_path / "kernel", "build")


def small_kernel(root, *scripts):
    """Writes the source tree of a small kernel, with some of our scripts."""
    for name in ("build.toml", "CARD.md", *(f"scripts/{script}.py" for script in scripts)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for name, text in PACKAGE.items():
        write(root, name, text)
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "benchmark.py").write_text("# a benchmark\n")
    return root


def write(root, name, text):
    path = root / "torch-ext" / MODULE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def run_build(root, **kwargs):
    return build_script.build(root, root / "build", **kwargs)


def run_check(root):
    return build_script.check(root / "build", root)


def read_metadata(root, backend="cpu"):
    return json.loads((root / "build" / f"torch-{backend}" / "metadata.json").read_text())


def snapshot(folder):
    """Every file and folder with its mode and bytes."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mode, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def git(root, *arguments):
    who = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}  # who signs commits has no key of t's
    command = ["git", *who, *arguments]
    return subprocess.run(
        command, cwd=root, env=environment, check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(root):
    git(root, "init")
    (root / ".gitignore").write_text("/build/\n__pycache__/\n")
    git(root, "add", ".")
    git(root, "commit", "-m", "all")


# What a build holds


def test_a_variant_holds_the_package_its_namespace_and_its_metadata(kernel):
    write(kernel, "__pycache__/ops.cpython-311.pyc", "bytecode")
    write(kernel, ".ipynb_checkpoints/ops.py", "what an editor left")
    variants = run_build(kernel)

    assert variants == [kernel / "build" / f"torch-{backend}" for backend in BACKENDS]
    for backend, variant in zip(BACKENDS, variants, strict=True):
        content = read_metadata(kernel, backend)
        namespace = content["id"]
        assert re.fullmatch(f"_{MODULE}_{backend}_[0-9a-f]{{7}}", namespace)
        assert f"ops = torch.ops.{namespace}\n" in (variant / "_ops.py").read_text()
        files = sorted(path.relative_to(variant).as_posix() for path in variant.rglob("*") if path.is_file())
        assert set(files) == {*PACKAGE, "_ops.py", "metadata.json"} - {"tables/notes.txt"}
        assert set(content["digest"]["files"]) == set(files) - {"metadata.json"}
        assert {key: content[key] for key in content if key not in ("id", "digest")} == {
            "name": "scattermoe-lora",
            "version": 1,
            "license": "apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "provenance": {"kernel-builder": {"version": build_script.TOOL}},
        }
    assert run_check(kernel) == []


def test_metadata_names_dependencies_and_architectures(kernel):
    toml = kernel / "build.toml"
    general = '[general]\npython-depends = ["einops"]\ncuda.python-depends = ["nvidia-cutlass-dsl"]\n'
    text = toml.read_text().replace("[general]\n", general)
    toml.write_text(text + 'cuda_capabilities = ["9.0"]\nrocm_archs = ["gfx942"]\n')
    run_build(kernel)
    found = [read_metadata(kernel, backend) for backend in BACKENDS]
    depends = {"cuda": ["einops", "nvidia-cutlass-dsl"]}
    archs = {"cuda": ["9.0"], "rocm": ["gfx942"]}
    assert [content["python-depends"] for content in found] == [depends.get(b, ["einops"]) for b in BACKENDS]
    assert [content["backend"].get("archs") for content in found] == [archs.get(backend) for backend in BACKENDS]


def test_the_card_and_the_benchmarks_stand_beside_the_variants(kernel):
    run_build(kernel)
    card = (kernel / "build" / "CARD.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    assert 'get_kernel("org/scattermoe-lora", version=1, trust_remote_code=True)' in card
    assert "## API\n\n- `double`\n\n" in card
    assert "## Layers\n\n- `Double`\n\n" in card
    assert "hf download org/scattermoe-lora --repo-type kernel --revision v1 " in card
    assert "{" not in card and "\n\n\n" not in card
    assert (kernel / "build" / "benchmarks" / "benchmark.py").read_text() == "# a benchmark\n"


def test_same_tree_same_bytes(kernel, tmp_path):
    first = run_build(kernel)[0].parent
    other = tmp_path / "elsewhere" / "copy"
    shutil.copytree(kernel, other, ignore=shutil.ignore_patterns("build"))
    for path in other.rglob("*"):
        path.chmod(0o700)
        os.utime(path, (0, 0))
    umask = os.umask(0o077)
    try:
        second = run_build(other)[0].parent
    finally:
        os.umask(umask)
    assert snapshot(first) == snapshot(second)
    before = snapshot(first)
    run_build(kernel)
    assert snapshot(first) == before


def test_one_backend_alone(kernel):
    run_build(kernel)
    assert [path.name for path in run_build(kernel, backends=["cpu"])] == ["torch-cpu"]
    assert sorted(path.name for path in (kernel / "build").iterdir()) == ["CARD.md", "benchmarks", "torch-cpu"]
    with pytest.raises(BuildError, match="metal: not a backend"):
        run_build(kernel, backends=["metal"])


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_interrupted_build_leaves_the_previous_one(kernel, monkeypatch, failure):
    run_build(kernel)
    before = snapshot(kernel)

    def stop(*_):
        raise failure

    monkeypatch.setattr(build_script, "shared_files", stop)
    with pytest.raises(failure):
        run_build(kernel)
    assert snapshot(kernel) == before


def test_a_failed_swap_puts_the_previous_build_back(kernel, monkeypatch):
    run_build(kernel)
    before = snapshot(kernel)
    rename = Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError("no rename")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no rename"):
        run_build(kernel)
    assert snapshot(kernel) == before


def test_a_folder_that_is_no_build_is_not_replaced(kernel):
    with pytest.raises(BuildError, match="is no build and is not replaced"):
        build_script.build(kernel, kernel)
    assert (kernel / "build.toml").is_file()


# The id and the provenance


def test_the_id_of_a_checkout_is_its_tree(kernel):
    commit(kernel)
    run_build(kernel)
    head = git(kernel, "rev-parse", "HEAD")
    assert read_metadata(kernel)["id"] == f"_{MODULE}_cpu_{git(kernel, 'rev-parse', 'HEAD^{tree}')[:7]}"
    assert read_metadata(kernel)["provenance"]["kernel"] == {"commit": head, "dirty": False}
    assert run_check(kernel) == []

    (kernel / "notes.txt").write_text("an untracked file outside the package changes nothing\n")
    run_build(kernel)
    assert read_metadata(kernel)["provenance"]["kernel"]["dirty"] is False


@pytest.mark.parametrize("change", ["tables/factor.json", "untracked.py"])
def test_a_changed_checkout_is_dirty(kernel, change):
    commit(kernel)
    write(kernel, change, "3\n")
    run_build(kernel)
    assert read_metadata(kernel)["id"].endswith("_dirty")
    assert read_metadata(kernel)["provenance"]["kernel"]["dirty"] is True
    assert run_check(kernel) == []


def test_without_a_commit_the_id_is_the_content(kernel):
    git(kernel, "init")
    git(kernel, "add", ".")
    run_build(kernel)
    before = read_metadata(kernel)
    write(kernel, "tables/factor.json", "3\n")
    run_build(kernel)
    assert read_metadata(kernel)["id"] != before["id"]
    assert "kernel" not in before["provenance"]


def test_a_tarball_inside_another_checkout_does_not_take_its_commit(kernel, tmp_path, monkeypatch):
    outer = tmp_path / "outer"
    outer.mkdir()
    (outer / "file").write_text("")
    (outer / "build.toml").write_text("")
    commit(outer)
    with tarfile.open(tmp_path / "kernel.tar", "w") as tar:
        tar.add(kernel, "kernel")
    with tarfile.open(tmp_path / "kernel.tar") as tar:
        tar.extractall(outer, filter="data")
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))  # as in a hook of the other checkout
    run_build(outer / "kernel")
    assert "kernel" not in read_metadata(outer / "kernel")["provenance"]
    run_build(kernel)
    assert read_metadata(outer / "kernel") == read_metadata(kernel)


# A check finds every change


def edit_metadata(**changes):
    def edit(variant):
        content = json.loads((variant / "metadata.json").read_text())
        (variant / "metadata.json").write_text(json.dumps(content | changes))

    return edit


def forget_a_digest(variant):
    content = json.loads((variant / "metadata.json").read_text())
    del content["digest"]["files"]["ops.py"]
    (variant / "metadata.json").write_text(json.dumps(content))


def other_id(variant):
    content = json.loads((variant / "metadata.json").read_text())
    (variant / "metadata.json").write_text(json.dumps(content | {"id": f"_{MODULE}_cuda_0000000"}))


TAMPERINGS = {
    "changed byte": (
        lambda v: (v / "tables" / "factor.json").write_text("3\n"),
        "hash mismatch for tables/factor.json",
    ),
    "changed namespace": (lambda v: (v / "_ops.py").write_text("ops = None\n"), "hash mismatch for _ops.py"),
    "missing file": (lambda v: (v / "ops.py").unlink(), "Missing file: ops.py"),
    "extra file": (lambda v: (v / "extra.py").write_text(""), "Unknown file: extra.py"),
    "extra file, hidden": (lambda v: (v / "layers" / ".extra").write_text(""), "Unknown file: layers/.extra"),
    "bytecode in the open": (lambda v: (v / "extra.pyc").write_text(""), "extra.pyc: not part of the build"),
    "source in __pycache__": (
        lambda v: (v / "__pycache__").mkdir() or (v / "__pycache__" / "extra.py").write_text(""),
        "__pycache__/extra.py: not part of the build",
    ),
    "linked folder": (lambda v: (v / "link").symlink_to("/"), "link: a link to a folder"),
    "missing variant": (shutil.rmtree, "torch-cuda: missing variant"),
    "extra variant": (lambda v: shutil.copytree(v, v.parent / "torch-metal"), "torch-metal: not part of the build"),
    "extra file beside": (lambda v: (v.parent / "x.py").write_text(""), "x.py: not part of the build"),
    "missing card": (lambda v: (v.parent / "CARD.md").unlink(), "CARD.md: missing"),
    "changed card": (lambda v: (v.parent / "CARD.md").write_text(""), "CARD.md: differs"),
    "changed benchmark": (lambda v: (v.parent / "benchmarks/benchmark.py").write_text(""), "benchmark.py: differs"),
    "extra benchmark": (lambda v: (v.parent / "benchmarks/x.py").write_text(""), "x.py: not part of the build"),
    "no metadata": (lambda v: (v / "metadata.json").unlink(), "metadata.json: "),
    "metadata not JSON": (lambda v: (v / "metadata.json").write_text("{"), "metadata.json: Cannot parse metadata"),
    "metadata incomplete": (lambda v: (v / "metadata.json").write_text("{}"), "missing field"),
    "no digest": (edit_metadata(digest=None), "metadata.json: no digest"),
    "digest forgets a file": (forget_a_digest, "Unknown file: ops.py"),
    "digest of another kind": (edit_metadata(digest={"algorithm": "sha512", "files": {}}), "Algorithm mismatch"),
    "other version": (edit_metadata(version=2), "version is 2, but this tree gives 1"),
    "other name": (edit_metadata(name="other"), "name is 'other'"),
    "other license": (edit_metadata(license="mit"), "license is 'mit'"),
    "other backend": (edit_metadata(backend={"type": "cpu"}), "backend is {'type': 'cpu'}"),
    "other dependency": (edit_metadata(**{"python-depends": ["einops"]}), "python-depends is ['einops']"),
    "added key": (edit_metadata(**{"kernel-depends": [{"repo-id": "a/b", "version": 1}]}), "kernel-depends is [{"),
    "other id": (other_id, "is not the op namespace of _ops.py"),
    "id of no build": (edit_metadata(id="whatever"), "does not fit the backend"),
    "other dirtiness": (
        edit_metadata(provenance={"kernel-builder": {"version": "1"}, "kernel": {"commit": "a" * 40, "dirty": True}}),
        "does not fit the backend or the provenance",
    ),
    "other provenance": (
        edit_metadata(provenance={"kernel-builder": {"version": "1"}, "kernel": {"commit": "a" * 40, "dirty": False}}),
        "the variants come from different sources",
    ),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_a_check_finds(kernel, tampering):
    change, expected = TAMPERINGS[tampering]
    run_build(kernel)
    change(kernel / "build" / "torch-cuda")
    problems = run_check(kernel)
    assert any(expected in problem for problem in problems), problems
    assert not any("\n" in problem for problem in problems)


@pytest.mark.parametrize("change", ["changed", "removed", "added"])
def test_a_check_compares_with_the_tree(kernel, change):
    run_build(kernel)
    package = kernel / "torch-ext" / "scattermoe_lora"
    if change == "changed":
        (package / "ops.py").write_text((package / "ops.py").read_text() + "# changed\n")
    elif change == "removed":
        (package / "tables" / "factor.json").unlink()
    else:
        (package / "more.py").write_text("")
    name = {"changed": "ops.py", "removed": "tables/factor.json", "added": "more.py"}[change]
    problems = run_check(kernel)
    assert problems and all(
        problem.endswith(f"{name} differs from this tree; run `make build`") for problem in problems
    )


def test_a_check_needs_a_build(kernel):
    assert run_check(kernel) == [f"{kernel / 'build'}: no such folder; run `make build`"]


# A build refuses what would break on the Hub

BAD = {
    "import scattermoe_lora": "absolute import of scattermoe_lora",
    "import scattermoe_lora.ops": "absolute import of scattermoe_lora",
    "def f():\n    from scattermoe_lora.ops import double": "write `from . import ...`",
    "import importlib\n\n\ndef f():\n    importlib.import_module('scattermoe_lora.ops')": "absolute import",
    "from .. import other": "leaves the package",
    "import transformers": "transformers is no dependency of a kernel; import it inside",
    "try:\n    from peft.tuners import lora\nexcept ImportError:\n    lora = None": "peft is no dependency",
    "class A:\n    import einops": "einops is no dependency",
    "@torch.library.custom_op('ns::f', mutates_args=())\ndef f(): ...": "custom_op: name the op by a literal",
    "@torch.library.custom_op(name='ns::f', mutates_args=())\ndef f(): ...": "custom_op: name the op",
    "@torch.library.triton_op(NAME, mutates_args=())\ndef f(): ...": "triton_op: name the op",
    "@torch.library.triton_op(f'{ns}::f', mutates_args=())\ndef f(): ...": "triton_op: name the op",
    "@torch.library.custom_op(add_op_namespace_prefix(NAME), mutates_args=())\ndef f(): ...": "custom_op: name",
    "from torch.library import custom_op as op\nop('ns::f', g, mutates_args=())": "torch.library by another name",
    "import torch.library as tl\ntl.register_fake('ns::f', g)": "torch.library by another name",
    "from torch import library as tl\n@tl.register_kernel('ns::f', 'cuda')\ndef f(): ...": "by another name",
    "torch.library.register_autograd('ns::f', g)": "register_autograd: name the op",
    "torch.library.register_vmap(NAME, g)": "register_vmap: name the op",
    "def f():\n    torch.library.register_torch_dispatch('ns::f', T, g)": "register_torch_dispatch: name the op",
    "torch.library.define('ns::f', '(Tensor x) -> Tensor')": "define: name the op",
    "torch.library.impl('ns::f', 'CUDA', g)": "impl: name the op",
    "lib = torch.library.Library('ns', 'DEF')": "Library: name the op",
    "def f(:": "not Python 3.10: ",
    "def f[T](x: T): ...": "not Python 3.10: ",
}

GOOD = [
    "import os.path\nimport torch.nn as nn\nimport triton.language as tl\nfrom .ops import double",
    "def f():\n    from transformers import PreTrainedModel\n    import peft",
    "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import PreTrainedModel",
    "import typing\nif typing.TYPE_CHECKING:\n    import peft",
    "@torch.library.custom_op(add_op_namespace_prefix('f'), mutates_args=())\ndef f(): ...",
    "@torch.library.triton_op(_ops.add_op_namespace_prefix('f'), mutates_args={'x'})\ndef f(): ...",
    "torch.library.register_autograd(add_op_namespace_prefix('f'), g, setup_context=h)",
    "torch.library.define(add_op_namespace_prefix('f'), torch.library.infer_schema(f, mutates_args=()))",
    "re.compile('x').impl('ns::f')\nfunctools.define('ns::f')",
]


@pytest.mark.parametrize("code", BAD)
def test_bad_source_is_refused(kernel, code):
    write(kernel, "bad.py", f"{code}\n")
    with pytest.raises(BuildError) as error:
        run_build(kernel)
    (problem,) = error.value.problems
    assert re.match(rf"torch-ext/{MODULE}/bad\.py:[1-9]\d*: ", problem)
    assert BAD[code] in problem
    assert not (kernel / "build").exists()


@pytest.mark.parametrize("code", GOOD)
def test_good_source_is_not(kernel, code):
    write(kernel, "good.py", f"{code}\n")
    assert build_script.source_problems(build_script.read_kernel(kernel)) == []


def test_a_problem_names_its_line_and_all_are_told(kernel):
    write(kernel, "layers/a.py", "\n\nimport scattermoe_lora\nimport numpy\n")
    write(kernel, "b.py", "import numpy\n")
    with pytest.raises(BuildError) as error:
        run_build(kernel)
    assert [problem.partition(": ")[0] for problem in error.value.problems] == [
        f"torch-ext/{MODULE}/b.py:1",
        f"torch-ext/{MODULE}/layers/a.py:3",
        f"torch-ext/{MODULE}/layers/a.py:4",
    ]
    assert "write `from .. import ...`" in error.value.problems[1]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (f"{MODULE}/__init__.py", "", "the loader takes this for the kernel itself"),
        ("_ops.py", "ops = None\n", "_ops.py:1: the build writes this file; delete it"),
        ("metadata.json", "{}", "metadata.json:1: the build writes this file; delete it"),
        ("__init__.py", "", "__init__.py:1: __all__ must be one literal list"),
        ("__init__.py", "\n__all__ = ('layers',)\n", "__init__.py:2: __all__ must be one literal list"),
        ("__init__.py", "__all__ = ['layers', *names]\n", "__init__.py:1: __all__ must be one literal list"),
        ("__init__.py", "__all__ = ['double']\n", '__init__.py:1: __all__ has no "layers"'),
    ],
)
def test_bad_layout_is_refused(kernel, name, text, expected):
    write(kernel, name, text)
    with pytest.raises(BuildError) as error:
        run_build(kernel)
    (problem,) = error.value.problems
    assert expected in problem


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("edition = 5", "edition = 5\nunknown = 1", "build.toml: Cannot parse"),
        ("[torch-noarch]\n", "[torch]\n", "edition 5 with a [torch-noarch] section"),
        ('[general.hub]\nrepo-id = "org/scattermoe-lora"\n', "", "no repo-id in [general.hub]"),
    ],
)
def test_a_bad_build_toml_is_refused(kernel, old, new, expected):
    text = (kernel / "build.toml").read_text()
    assert old in text
    (kernel / "build.toml").write_text(text.replace(old, new))
    with pytest.raises(BuildError) as error:
        run_build(kernel)
    (problem,) = error.value.problems
    assert expected in problem and "\n" not in problem


def test_a_bad_card_is_refused(kernel):
    (kernel / "CARD.md").write_text("{{ no_such_variable }}\n")
    with pytest.raises(BuildError, match="no_such_variable"):
        run_build(kernel)


# The command line


def command(root, *arguments, python=(sys.executable,)):
    return subprocess.run([*python, root / "scripts" / "build.py", *arguments], capture_output=True, text=True)


def test_the_command_line(kernel):
    built = command(kernel)
    assert (built.returncode, built.stderr) == (0, "")
    assert [Path(line).name for line in built.stdout.splitlines()] == [f"torch-{backend}" for backend in BACKENDS]
    assert command(kernel, "--check").returncode == 0
    (kernel / "build" / "torch-xpu" / "ops.py").unlink()
    checked = command(kernel, "--check", str(kernel / "build"))
    assert (checked.returncode, checked.stderr) == (1, "")
    assert checked.stdout == f"{kernel / 'build' / 'torch-xpu'}: Missing file: ops.py\n"

    assert command(kernel, "--backend", "cpu", "--out", str(kernel / "other")).returncode == 0
    assert not (kernel / "other" / "torch-xpu").exists()
    for failed in (
        command(kernel, "--backend", "metal"),
        command(kernel, "--out", str(kernel / "build.toml")),
        command(kernel, "--out", "/dev/null/build"),
        command(kernel, python=(sys.executable, "-S")),  # no site-packages: no kernels
    ):
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: ") and len(failed.stderr.splitlines()) == 1


# The build loads

LOAD = f"""
import importlib.abc, sys
blocked = sys.argv[1:]

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
import torch
from kernels import get_kernel, get_loaded_kernels

kernel = get_kernel("org/scattermoe-lora", version=1)
(loaded,) = get_loaded_kernels()
assert loaded.metadata.name.python_name == "{MODULE}" and str(loaded.metadata.backend.backend_type) == "cpu"
assert not [name for name in blocked if name in sys.modules]
for name in kernel.__all__:
    getattr(kernel, name)
"""


def load(root, code="", blocked=()):
    """Load the CPU variant with `kernels` in a process of its own, then run more code there; what it printed."""
    environment = os.environ | {"LOCAL_KERNELS": f"org/scattermoe-lora={root}", "HF_HUB_OFFLINE": "1"}
    for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-c", LOAD + code, *blocked], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_small_kernel_loads_and_its_bytecode_is_no_change(kernel):
    run_build(kernel)
    load(
        kernel,
        "assert kernel.double(torch.ones(2)).tolist() == [2, 2]\n"
        "assert hasattr(getattr(torch.ops, loaded.metadata.id), 'double')\n"
        "assert kernel._ops.add_op_namespace_prefix('f') == f'{loaded.metadata.id}::f'\n",
        blocked=["triton"],
    )
    assert list((kernel / "build").rglob("*.pyc"))
    assert run_check(kernel) == []


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A build of this repository."""
    if not (ROOT / "torch-ext" / MODULE / "__init__.py").is_file():
        pytest.skip("the package is not there yet")
    root = tmp_path_factory.mktemp("real")
    build_script.build(ROOT, root / "build")
    return root


def test_the_real_kernel_builds_and_checks(real):
    assert build_script.check(real / "build", ROOT) == []
    card = (real / "build" / "CARD.md").read_text()
    version = build_script.read_kernel(ROOT).general["version"]
    assert "- `kernelize`" in card and "- `ScatterMoEExperts`" in card
    assert f"version={version}," in card


@pytest.mark.kernels_ci
@pytest.mark.parametrize("blocked", [[], ["triton", "transformers", "peft"]], ids=["all there", "torch alone"])
def test_the_real_kernel_loads(real, blocked):
    load(real, blocked=blocked)


TRAIN = """
import importlib
from types import SimpleNamespace

torch.manual_seed(0)
x, index, weights = torch.randn(5, 8, requires_grad=True), torch.rand(5, 4).topk(2).indices, torch.rand(5, 2)
up, down = torch.randn(4, 12, 8), torch.randn(4, 8, 6)
lora = kernel.ExpertLoRA(torch.randn(4, 2, 8, requires_grad=True), torch.randn(4, 12, 2), 0.5)
options = {"gate_up_lora": lora, "lora_dropout": 0.5, "dropout_seed": torch.tensor([7])}
out = kernel.moe_mlp(x, up, down, index, weights, **options)
assert torch.allclose(out, kernel.reference.moe_mlp(x, up, down, index, weights, **options), atol=1e-5)
out.sum().backward()
assert x.grad.abs().sum() > 0 and lora.A.grad.abs().sum() > 0
experts = kernel.ParallelExperts(4, 8, 6)
experts(torch.randn(5, 8), 2, *kernel.flatten_sort_count(index, 4), gates=weights).sum().backward()
assert experts.weight.grad.abs().sum() > 0

backend = importlib.import_module(f"{kernel.__name__}.backend")
try:
    backend.of(SimpleNamespace(device=torch.device("cuda"), is_cpu=False))
except RuntimeError as error:
    print(error)
try:
    kernel.register()
except ImportError as error:
    print(error)
"""


def test_without_triton_it_trains_and_says_what_a_gpu_needs(real):
    assert load(real, TRAIN, blocked=["triton", "transformers", "peft"]).splitlines() == [
        "scattermoe-lora needs the package triton for tensors on cuda; install triton or use the CPU",
        "scattermoe-lora: register needs transformers with experts implementations (5.0)",
    ]


OLD_TRITON = """
import importlib
from types import SimpleNamespace

import triton

triton.__version__ = "3.5.1"
backend = importlib.import_module(f"{kernel.__name__}.backend")
try:
    backend.of(SimpleNamespace(device=torch.device("cuda"), is_cpu=False))
except RuntimeError as error:
    print(error)
"""


def test_an_old_triton_is_named(real):
    assert load(real, OLD_TRITON) == (
        "scattermoe-lora needs triton 3.6 or newer for tensors on cuda, and this is 3.5.1; "
        "install a newer torch, which brings its own, or use the CPU\n"
    )


KERNELIZE = """
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 32}
model = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=1, num_local_experts=4))
model = get_peft_model(model, LoraConfig(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]))
print(len(kernel.kernelize(model).switched))
ids = torch.arange(8)[None]
model(input_ids=ids, labels=ids).loss.backward()
assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
"""


def test_without_triton_a_model_trains(real):
    assert load(real, KERNELIZE, blocked=["triton"]) == "1\n"


def test_without_a_variant_for_this_torch_the_loader_says_so(tmp_path):
    build_script.build(ROOT, tmp_path / "build", ["cuda"])
    with pytest.raises(AssertionError, match="Cannot find a build variant for this system in .*"):
        load(tmp_path)


# The tools of `kernels` on a built tree


def kernels(*arguments):
    command = [str(Path(sys.executable).with_name("kernels")), *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_kernels_benchmark_runs_and_verifies(real, tmp_path):
    """On a CPU in seconds: its result is the definition's, by the benchmark's own check."""
    branch = tmp_path / "branch"  # as publishing lays it out
    shutil.copytree(real / "build", branch / "build", ignore=shutil.ignore_patterns("benchmarks"))
    shutil.copytree(real / "build" / "benchmarks", branch / "benchmarks")
    told = kernels("benchmark", branch, "--iterations", "3", "--warmup", "1", "--output", tmp_path / "out.json")
    (row,) = [line for line in told.stderr.splitlines() if "MoeMlpBenchmark" in line and "│" in line]
    assert "moe_mlp" in row and "✓" in row
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["verified"] is True, result


def test_kernels_info_of_a_built_tree(real, tmp_path):
    shutil.copytree(real / "build", tmp_path / "build")
    told = json.loads(kernels("info", tmp_path, "--json").stdout)
    assert (told["name"], told["license"], told["backends"]) == ("scattermoe-lora", "apache-2.0", BACKENDS)
    assert told["version"] == build_script.read_kernel(ROOT).general["version"]
