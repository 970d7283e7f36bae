#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Publish build/ to the Hub, then download what is there and verify every digest.

    python scripts/publish.py [--repo-id ORG/NAME] [--dry-run] [--create-pr] [--out DIR]

The end is that of `kernel-builder upload`: a repository of the type kernel; on the branch `vN` the variants and
`benchmarks/benchmark*.py`, nothing stale beside them; on `main` the card, as `README.md`. The way there differs.
kernel-builder makes the branch first and fills it after: stopped between, it leaves a version that is announced and
does not load, or one that is half of each. Here a version is on the Hub whole, or not at all:

- A new version goes to the branch `publish-vN`, which no version number finds, and is verified there. Then one request
  makes `vN` point at it. A stopped run leaves `publish-vN`, and the next one goes on with what it holds.
- A version that is there already is replaced by one commit, on top of the commit that was compared with: who publishes
  at the same time gets an error. One commit takes 1000 operations; what needs more goes through `--create-pr`, as a
  pull request takes any number of commits and is merged at once.
- The card comes last, and only with the newest version.

So after any error: run the same command again. Files that are there already are not sent again, and a run with nothing
left to do only verifies.

A pull request is the exception: it is not looked for again, so close one that a stopped run left behind.

The token is that of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import griffe
import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import tqdm
from huggingface_hub.utils.sha import git_hash

from build import (
    ROOT,
    BuildError,
    Kernel,
    build,
    check,
    check_variant,
    list_files,
    read_kernel,
    render_card,
    source_id,
)
from version import release, version_problems

MAX_OPERATIONS = 1000  # what the Hub takes in one commit, as kernel-builder has it
KERNEL = "kernel"  # the repository's type


@dataclass(frozen=True)
class Change:
    """One file that the Hub lacks, has otherwise, or has too much; `data` is None where it is to be deleted."""

    path: str
    data: bytes | None
    replaces: bool

    def __str__(self) -> str:
        what = "delete" if self.data is None else "update" if self.replaces else "add"
        return f"{what:6} {self.path}"

    def operation(self) -> CommitOperationAdd | CommitOperationDelete:
        if self.data is None:
            return CommitOperationDelete(self.path)
        return CommitOperationAdd(self.path, self.data)


@dataclass(frozen=True)
class Plan:
    """What is to be done: `files` is what the branch will hold, `steps` and `card_steps` lead there and to the card.

    `heads` are the repository's branches and their commits that this was compared with; there are none where there is
    no repository yet.
    """

    kernel: Kernel
    repo_id: str
    branch: str
    staging: str
    heads: Mapping[str, str]
    files: Mapping[str, bytes]
    steps: Sequence[Change]
    card_steps: Sequence[Change]
    message: str

    @property
    def is_new(self) -> bool:
        return self.branch not in self.heads


# What is published, and whether it may be


def release_files(kernel: Kernel, out: Path) -> dict[str, bytes]:
    """The files of the branch `vN`, by their path there: as kernel-builder takes them from a build."""
    files = {}
    for backend in kernel.backends:
        for file in list_files(out / f"torch-{backend}"):
            files[f"build/torch-{backend}/{file.as_posix()}"] = (out / f"torch-{backend}" / file).read_bytes()
    for path in sorted((out / "benchmarks").glob("benchmark*.py")):
        files[f"benchmarks/{path.name}"] = path.read_bytes()
    return files


def local_problems(kernel: Kernel, out: Path) -> list[str]:
    """Why `out` may not be published, whatever the Hub holds; one line a problem, with what to do."""
    uid, git = source_id(kernel)
    if git is None:
        return [f"{kernel.root}: no git checkout; publish from a clone, so that the build names its commit"]
    if git["dirty"]:
        return ["the tree has changes that no commit holds; commit or stash them, then run `make build`"]
    problems = version_problems(kernel) + check(out, kernel.root)
    if problems:
        return problems
    # The digests say that the build is what it was when it was made; only building again says that it is this commit.
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch, "build")
        build(kernel.root, fresh)
        wanted, found = release_files(kernel, fresh), release_files(kernel, out)
    changed = [path for path in sorted(wanted.keys() | found.keys()) if wanted.get(path) != found.get(path)]
    return [f"{out}: {path} is not what HEAD gives; run `make build`" for path in changed]


def published_problems(kernel: Kernel, out: Path, api: HfApi, repo_id: str, commit: str) -> list[str]:
    """Why the version that the Hub has at `commit` may not be replaced; one line a problem."""
    version = kernel.general["version"]
    bump = f"raise `version` in build.toml to {version + 1}"
    there = {path.split("/")[1] for path in remote_files(api, repo_id, commit) if path.startswith("build/torch-")}
    ours = {f"torch-{backend}" for backend in kernel.backends}
    problems = [
        f"version {version} on the Hub has {variant}, and build.toml has not: add its backend again, or {bump}"
        for variant in sorted(there - ours)
    ]
    if version > 0 and (variant := next(iter(sorted(there & ours)), None)):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch, "published")
            download(api, repo_id, commit, folder, [f"build/{variant}/*"])
            breakages = api_changes(folder / "build" / variant, out / variant, kernel.module)
        problems += [
            f"version {version} on the Hub has another public API: {breakage}; undo it, or {bump}"
            for breakage in breakages
        ]
    return problems


def api_changes(old: Path, new: Path, module: str) -> list[str]:
    """What code written for the variant `old` no longer finds in `new`: names of `__all__`, arguments, attributes.

    Additions are none: whoever loads the version gets them all, as every variant is replaced.
    """
    before, after = public_api(old, module), public_api(new, module)
    told = set()
    for breakage in griffe.find_breaking_changes(before, after):
        explanation = breakage.explain(griffe.ExplanationStyle.MARKDOWN).strip("- \n").replace("*", "")
        told.add(f"{explanation} (in {breakage.obj.module.path})")
    return sorted(told)


def public_api(variant: Path, module: str) -> griffe.Module:
    """The names of the package's `__all__` and what they stand for, read without running the package."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(variant, Path(scratch, module), ignore=shutil.ignore_patterns("__pycache__"))
        package = griffe.load(module, search_paths=[scratch], allow_inspection=False)
        public = griffe.Module(module)
        for name in map(str, package.exports or ()):
            # By what is imported: a submodule may have the name too.
            member = package.modules_collection[package.imports.get(name, f"{package.path}.{name}")]
            # By an alias, as moving a function is no change; griffe looks for none in a module's.
            public.set_member(name, member if member.is_module else griffe.Alias(name, member))
    return public


# What the Hub has


def branches(api: HfApi, repo_id: str) -> dict[str, str]:
    """The repository's branches and their commits: `main` at least, or nothing where there is no such repository."""
    try:
        return {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id, repo_type=KERNEL).branches}
    except RepositoryNotFoundError:
        return {}


def remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, str]:
    """The files of a revision and what identifies their content: a git hash, or a SHA-256 for a large file."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=KERNEL)
    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}


def download(api: HfApi, repo_id: str, revision: str, folder: Path, patterns: list[str]) -> None:
    """Download a revision's files into `folder`, which is not there yet: every file, and none from a cache."""
    api.snapshot_download(repo_id, repo_type=KERNEL, revision=revision, allow_patterns=patterns, local_dir=folder)


def changes(files: Mapping[str, bytes], present: Mapping[str, str], replaced: Sequence[str]) -> list[Change]:
    """What turns the files `present` into `files`: first what goes of those below the prefixes `replaced`."""
    stale = [path for path in sorted(present) if path.startswith(tuple(replaced)) and path not in files]
    wanted = [
        Change(path, data, path in present)
        for path, data in sorted(files.items())
        if present.get(path) not in (git_hash(data), hashlib.sha256(data).hexdigest())
    ]
    return [Change(path, None, True) for path in stale] + wanted


def verify(api: HfApi, plan: Plan, revision: str) -> None:
    """Download a revision and compare it with the plan's files, byte by byte, and with its own digests."""
    files = plan.files
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "published")
        download(api, plan.repo_id, revision, folder, ["build/*", "benchmarks/benchmark*"])
        found = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for name in ("build", "benchmarks")
            for path in sorted((folder / name).rglob("*"))
            if path.is_file()
        }
        problems = [f"{path} is not there" for path in sorted(files.keys() - found.keys())]
        problems += [f"{path} should not be there" for path in sorted(found.keys() - files.keys())]
        problems += [f"{path} differs" for path in sorted(files.keys() & found.keys()) if files[path] != found[path]]
        for backend in plan.kernel.backends:
            wrong, _ = check_variant(plan.kernel, folder / "build" / f"torch-{backend}", backend)
            problems += [problem.replace(f"{folder}/", "") for problem in wrong]
    if problems:
        raise BuildError(*(f"{plan.repo_id} at {revision}: {problem}; run this again" for problem in problems))


# Publishing


def upload(
    api: HfApi, plan: Plan, branch: str, head: str, steps: Sequence[Change], create_pr: bool = False
) -> tuple[str, str | None]:
    """Commit the changes on top of `head`, at most 1000 at a time.

    Returns the commit, and the pull request's address if one was made.
    """
    pull_request = None
    with tqdm(total=len(steps), desc=f"Uploading to {branch}", unit="file", disable=not steps) as bar:
        for start in range(0, len(steps), MAX_OPERATIONS):
            batch = steps[start : start + MAX_OPERATIONS]
            info = api.create_commit(
                plan.repo_id,
                operations=[step.operation() for step in batch],
                commit_message=plan.message,
                repo_type=KERNEL,
                revision=branch,
                parent_commit=head,
                create_pr=create_pr and pull_request is None,
            )
            head = info.oid
            if create_pr and pull_request is None:
                pull_request, branch = info.pr_url, info.pr_revision
            bar.update(len(batch))
    return head, pull_request


def plan(kernel: Kernel, out: Path, repo_id: str, api: HfApi, create_pr: bool) -> Plan:
    """Compare the build in `out` with the Hub. Raises BuildError for what may not be published."""
    if problems := local_problems(kernel, out):
        raise BuildError(*problems)
    version = int(kernel.general["version"])
    branch, staging = f"v{version}", f"publish-v{version}"
    heads = branches(api, repo_id)
    is_new = branch not in heads
    if is_new and create_pr:
        raise BuildError(
            f"{repo_id} has no branch {branch}, and no pull request can make one; publish without --create-pr"
        )
    if not is_new and (problems := published_problems(kernel, out, api, repo_id, heads[branch])):
        raise BuildError(*problems)

    files = release_files(kernel, out)
    base = branch if not is_new else staging if staging in heads else "main"
    present = remote_files(api, repo_id, heads[base]) if heads else {}
    # What else a branch of someone's holds in benchmarks/ is left alone, as kernel-builder does.
    steps = changes(files, present, ["build/", "benchmarks/" if is_new else "benchmarks/benchmark"])
    if not is_new and not create_pr and len(steps) > MAX_OPERATIONS:
        raise BuildError(
            f"replacing version {version} takes {len(steps)} operations, and one commit {MAX_OPERATIONS}; "
            "run this with --create-pr, and merge the pull request"
        )
    newest = max([version, *(int(name[1:]) for name in heads if name[:1] == "v" and name[1:].isdecimal())])
    card = {"README.md": render_card(kernel, repo_id).encode()} if version == newest else {}
    card_steps = changes(card, remote_files(api, repo_id, heads["main"]) if heads else {}, [])
    message = f"{kernel.general['name']} {release(kernel)}, from commit {read_commit(files)[:12]}"
    return Plan(kernel, repo_id, branch, staging, heads, files, steps, card_steps, message)


def tell(plan: Plan) -> list[str]:
    """Every operation of a plan, one line each."""
    told = [] if plan.heads else [f"create {plan.repo_id}, a repository of the type {KERNEL}"]
    if plan.is_new and plan.staging not in plan.heads:
        told.append(f"create branch {plan.staging}, from main")
    told += [f"{step}  ({plan.staging if plan.is_new else plan.branch})" for step in plan.steps]
    if plan.is_new:
        told += [f"create branch {plan.branch}, from {plan.staging}", f"delete branch {plan.staging}"]
    return told + [f"{step}  (main)" for step in plan.card_steps]


def carry_out(plan: Plan, api: HfApi, create_pr: bool) -> list[str]:
    """Do what a plan says, verify it, and return what was done, one line a thing.

    Raises BuildError where the Hub then has something else.
    """
    repo_id, branch, staging, heads = plan.repo_id, plan.branch, plan.staging, plan.heads
    done = []
    if not heads:
        api.create_repo(repo_id, repo_type=KERNEL, exist_ok=True)
        heads = branches(api, repo_id)
    if plan.is_new:
        if staging not in heads:
            api.create_branch(repo_id, branch=staging, revision=heads["main"], repo_type=KERNEL)
        head, _ = upload(api, plan, staging, heads.get(staging, heads["main"]), plan.steps)
        verify(api, plan, head)
        api.create_branch(repo_id, branch=branch, revision=head, repo_type=KERNEL)
    else:
        head, pull_request = upload(api, plan, branch, heads[branch], plan.steps, create_pr)
        verify(api, plan, head)
        done += [f"pull request for {branch}: {pull_request}"] if pull_request else []
    if plan.is_new or (staging in heads and not create_pr):
        api.delete_branch(repo_id, branch=staging, repo_type=KERNEL)
    if plan.card_steps:
        _, pull_request = upload(api, plan, "main", heads["main"], plan.card_steps, create_pr)
        done += [f"pull request for the card: {pull_request}"] if pull_request else []
    what = f"{len(plan.steps)} changes" if plan.steps else "nothing to change"
    files = f"{len(plan.files)} files downloaded again, every digest verified"
    return [*done, f"{repo_id} {branch} at {head}: {what}; {files}"]


def publish(
    kernel: Kernel, out: Path, repo_id: str, api: HfApi, *, dry_run: bool = False, create_pr: bool = False
) -> list[str]:
    """Publish the build in `out`; returns what was done, or with `dry_run` what would be, one line a thing.

    Raises BuildError for what may not be published, and where the Hub has something else afterwards.
    """
    planned = plan(kernel, out, repo_id, api, create_pr)
    return [*tell(planned), "dry run: nothing was changed"] if dry_run else carry_out(planned, api, create_pr)


def read_commit(files: Mapping[str, bytes]) -> str:
    """The commit that the build says it comes from."""
    metadata = next(data for path, data in files.items() if path.endswith("/metadata.json"))
    return str(json.loads(metadata)["provenance"]["kernel"]["commit"])


def advice(error: Exception, repo_id: str) -> list[str]:
    """What an error of the Hub or of the way to it means, and what to do."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    told = " ".join(str(error).split())
    if status == 401:
        return [f"the Hub does not know you: {told}", "log in with `hf auth login`, or set HF_TOKEN"]
    if status == 403:
        return [
            f"the Hub does not let you write to {repo_id}: {told}",
            "use a token that may write there, or --create-pr; to create a repository of the type kernel, an account "
            "or organisation must first be approved for it, see docs/releasing.md",
        ]
    if status in (409, 412):
        return [f"{repo_id} was changed meanwhile: {told}", "run this again: it compares anew"]
    return [
        f"{told or type(error).__name__}",
        "run this again: it goes on where it stopped, and nothing is half there",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo-id", help="the repository (default: that of build.toml)")
    parser.add_argument("--dry-run", action="store_true", help="print every operation, and change nothing")
    parser.add_argument("--create-pr", action="store_true", help="open pull requests instead of writing to branches")
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="the build to publish (default: build)")
    arguments = parser.parse_args(argv)
    repo_id = arguments.repo_id
    try:
        kernel = read_kernel(ROOT)
        repo_id = repo_id or kernel.general["hub"]["repo-id"]
        options = {"dry_run": arguments.dry_run, "create_pr": arguments.create_pr}
        print("\n".join(publish(kernel, arguments.out, repo_id, HfApi(), **options)))
        return 0
    except BuildError as error:
        problems = error.problems
    except (HFValidationError, OfflineModeIsEnabled) as error:
        problems = [str(error)]
    except (httpx2.HTTPError, LocalEntryNotFoundError) as error:
        problems = advice(error, repo_id)
    except KeyboardInterrupt:
        problems = ["interrupted; run this again: it goes on where it stopped, and nothing is half there"]
    print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
