#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Build the Hub variants of this kernel, or check an existing build.

    python scripts/build.py [--out DIR] [--backend cpu ...]    write build/torch-<backend>/ for each backend
    python scripts/build.py --check [DIR]                      compare a build with its digests and with this tree

The Hub's own tool, kernel-builder, needs nix. For a kernel without compiled code it copies the package, writes
`_ops.py` and `metadata.json` beside it, and renders the card. This script does the same, with the parser of
`build.toml`, the digest and the metadata types that ship inside `kernels`.

Same tree, same bytes: files are sorted, modes fixed, nothing carries a date. A build is made in a temporary folder and
swapped in whole, so an interrupted one leaves the previous build as it was.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import jinja2
    from kernels._rust import Build, Digest, DigestAlgorithm, DigestValidationError, Metadata
    from kernels.compat import tomllib
except ImportError as error:
    sys.exit(f"error: {error}; run `make venv` and use .venv/bin/python")

ROOT = Path(__file__).resolve().parents[1]
TOOL = "scattermoe-lora scripts/build.py"
OPS_PY = '''\
import torch

ops = torch.ops.{namespace}


def add_op_namespace_prefix(op_name: str) -> str:
    """Return the full name of an op of this kernel: the build's own namespace, then the op's name."""
    return f"{namespace}::{{op_name}}"
'''


class BuildError(Exception):
    """What stops a build or a check: one line a problem."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = [" ".join(problem.split()) for problem in problems]


@dataclass(frozen=True)
class Kernel:
    """A kernel's source tree, with the sections of its `build.toml`."""

    root: Path
    general: dict[str, Any]
    noarch: dict[str, Any]

    @property
    def module(self) -> str:
        return str(self.general["name"]).replace("-", "_")

    @property
    def package(self) -> Path:
        return self.root / "torch-ext" / self.module

    @property
    def backends(self) -> list[str]:
        return sorted(self.general["backends"])

    def files(self) -> list[Path]:
        """The package's files that go into a variant, relative to the package, sorted."""
        extensions = tuple(f".{extension}" for extension in self.noarch.get("pyext", ["py", "pyi"]))
        files = (file for file in list_files(self.package) if file.name.endswith(extensions))
        return [file for file in files if not any(part.startswith(".") for part in file.parts)]


def read_kernel(root: Path) -> Kernel:
    """Read `build.toml`, after the real parser has accepted it."""
    path = root / "build.toml"
    try:
        Build.open(root)
    except ValueError as error:
        raise BuildError(f"{path}: {error}") from error
    toml = tomllib.loads(path.read_text(encoding="utf-8"))
    if toml["general"].get("edition") != 5 or "torch-noarch" not in toml:
        raise BuildError(f"{path}: this script builds edition 5 with a [torch-noarch] section, nothing else")
    if "repo-id" not in toml["general"].get("hub", {}):
        raise BuildError(f"{path}: no repo-id in [general.hub]; the card needs it")
    return Kernel(root, toml["general"], toml["torch-noarch"])


# What a build holds


def ops_py(namespace: str) -> str:
    return OPS_PY.format(namespace=namespace)


def metadata(
    kernel: Kernel, backend: str, uid: str, git: dict[str, Any] | None, files: dict[str, str]
) -> dict[str, Any]:
    """The content of a variant's `metadata.json`. Keys without a value are left out, as kernel-builder does."""
    general = kernel.general
    archs = kernel.noarch.get({"cuda": "cuda_capabilities", "rocm": "rocm_archs"}.get(backend, ""))
    content = {
        "name": general["name"],
        "id": f"_{kernel.module}_{backend}_{uid}",
        "version": general["version"],
        "license": general["license"],
        "upstream": general.get("upstream"),
        "source": general.get("source"),
        "python-depends": [
            *general.get("python-depends", []),
            *general.get(backend, {}).get("python-depends", []),
        ],
        "backend": {"type": backend} | ({"archs": archs} if archs else {}),
        "digest": {"algorithm": "sha256", "files": dict(sorted(files.items()))},
        "provenance": {"kernel-builder": {"version": TOOL}} | ({"kernel": git} if git else {}),
    }
    return {key: value for key, value in content.items() if value is not None}


def shared_files(kernel: Kernel) -> dict[str, bytes]:
    """What stands beside the variants: the rendered card and the benchmarks."""
    shared = {f"benchmarks/{file}": (kernel.root / "benchmarks" / file).read_bytes() for file in _benchmarks(kernel)}
    if (kernel.root / "CARD.md").is_file():
        shared["CARD.md"] = render_card(kernel).encode()
    return shared


def render_card(kernel: Kernel, repo_id: str | None = None) -> str:
    """Fill the template `CARD.md`, for the repository `repo_id` (default: that of `build.toml`).

    Its variables are those that kernel-builder gives, and `version`, for which the template has a default.
    """
    _, names = _public_names(_parse(kernel, kernel.package / "__init__.py"))
    public, layers = names or [], None
    if "layers" in public:
        tree = _parse(kernel, kernel.package / "layers" / "__init__.py")  # as kernel-builder: classes defined there
        layers = [node.name for node in tree.body if isinstance(node, ast.ClassDef)] or None
    template = (kernel.root / "CARD.md").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    try:
        return environment.from_string(template).render(
            repo_id=repo_id or kernel.general["hub"]["repo-id"],
            version=kernel.general["version"],
            functions=[name for name in public if name != "layers"] or None,
            layers=layers,
            has_benchmark=Path("benchmark.py") in _benchmarks(kernel),
            upstream=kernel.general.get("upstream"),
            license=kernel.general["license"].lower(),
        )
    except jinja2.TemplateError as error:
        raise BuildError(f"{kernel.root / 'CARD.md'}: {error}") from error


def source_id(kernel: Kernel) -> tuple[str, dict[str, Any] | None]:
    """Return the id that makes the op namespace unique, and the git state the build came from.

    In a git checkout the id is the start of the tree of HEAD, with `_dirty` where what is built is not what HEAD
    holds. Elsewhere (a tarball, even one unpacked inside another checkout) it is a hash of the package.
    """
    tree = git_output(kernel, "rev-parse", "HEAD^{tree}")
    commit = git_output(kernel, "rev-parse", "HEAD")
    tracked = (git_output(kernel, "ls-files", "-z") or "").split("\0")
    if tree is None or commit is None or "build.toml" not in tracked:
        content = hashlib.sha256((kernel.root / "build.toml").read_bytes())
        for file in kernel.files():
            data = (kernel.package / file).read_bytes()
            content.update(f"{file.as_posix()} {len(data)}\n".encode() + data)
        return content.hexdigest()[:7], None
    changed = git_output(kernel, "status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all")
    untracked = [file for file in kernel.files() if f"torch-ext/{kernel.module}/{file.as_posix()}" not in tracked]
    dirty = bool(changed or untracked)
    return tree.strip()[:7] + ("_dirty" if dirty else ""), {"commit": commit.strip(), "dirty": dirty}


def build(root: Path, out: Path, backends: Sequence[str] | None = None) -> list[Path]:
    """Build the variants for `backends` (default: all of `build.toml`) into `out`, which then holds nothing else.

    Returns the variants' folders. Raises BuildError with every problem found in the source.
    """
    kernel = read_kernel(root)
    wanted = sorted(set(backends or kernel.backends))
    for backend in wanted:
        if backend not in kernel.backends:
            raise BuildError(f"{backend}: not a backend of build.toml, which has {', '.join(kernel.backends)}")
    if problems := source_problems(kernel):
        raise BuildError(*problems)
    _refuse_foreign_folder(out)
    uid, git = source_id(kernel)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=out.parent) as scratch:
        new = Path(scratch, "new")
        for backend in wanted:
            variant = new / f"torch-{backend}"
            for file in kernel.files():
                _write(variant / file, (kernel.package / file).read_bytes())
            _write(variant / "_ops.py", ops_py(f"_{kernel.module}_{backend}_{uid}").encode())
            # The digest covers every file but metadata.json, which holds it.
            files = Digest.hash_variant(DigestAlgorithm.SHA256, variant).files
            content = metadata(kernel, backend, uid, git, files)
            _write(variant / "metadata.json", json.dumps(content, indent=2).encode() + b"\n")
        for name, data in shared_files(kernel).items():
            _write(new / name, data)
        for folder in [new, *(path for path in new.rglob("*") if path.is_dir())]:
            folder.chmod(0o755)
        _swap_in(new, out, old=Path(scratch, "old"))
    return [out / f"torch-{backend}" for backend in wanted]


def _refuse_foreign_folder(out: Path) -> None:
    """A build replaces the whole folder: never one that holds anything else."""
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out}: not a folder")
    for entry in sorted(out.iterdir()) if out.is_dir() else []:
        if entry.name not in ("CARD.md", "benchmarks") and not entry.name.startswith("torch-"):
            raise BuildError(f"{out}: holds {entry.name}, so it is no build and is not replaced; choose another --out")


def _swap_in(new: Path, out: Path, old: Path) -> None:
    replaced = out.exists()
    if replaced:
        out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        if replaced:
            old.rename(out)
        raise


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o644)


def list_files(folder: Path) -> list[Path]:
    """The files of `folder`, relative to it and sorted, without Python's bytecode."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if path.suffix != ".pyc" and "__pycache__" not in path.parts)


def _benchmarks(kernel: Kernel) -> list[Path]:
    return list_files(kernel.root / "benchmarks")


def git_output(kernel: Kernel, *arguments: str) -> str | None:
    """The output of a git command on the kernel's checkout, or None where there is no git or no checkout."""
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # set in a hook of some other repository
    environment = {name: value for name, value in os.environ.items() if name not in elsewhere}
    command = ["git", "--no-optional-locks", *arguments]
    try:
        return subprocess.run(
            command, cwd=kernel.root, env=environment, capture_output=True, text=True, check=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


# Check a build


def check(out: Path, root: Path = ROOT) -> list[str]:
    """Compare the build in `out` with its digests and with the tree at `root`; return one line a problem.

    Bytecode that Python wrote into `__pycache__` by importing the build is no problem: the digest leaves it out, and
    it is never published. A `.pyc` anywhere else is one, since Python would import it.
    """
    kernel = read_kernel(root)
    if not out.is_dir():
        return [f"{out}: no such folder; run `make build`"]
    shared = shared_files(kernel)
    expected = {f"torch-{backend}" for backend in kernel.backends} | {Path(name).parts[0] for name in shared}
    problems = [f"{entry}: not part of the build" for entry in sorted(out.iterdir()) if entry.name not in expected]
    origins = set()
    for backend in kernel.backends:
        variant = out / f"torch-{backend}"
        variant_problems, origin = check_variant(kernel, variant, backend)
        problems += variant_problems or _other_source(kernel, variant)
        origins |= {origin} if origin else set()
    if len(origins) > 1:
        problems.append(f"{out}: the variants come from different sources; run `make build`")
    for name, data in sorted(shared.items()):
        if not (out / name).is_file():
            problems.append(f"{out / name}: missing")
        elif (out / name).read_bytes() != data:
            problems.append(f"{out / name}: differs from what this tree gives; run `make build`")
    for file in list_files(out / "benchmarks"):
        if f"benchmarks/{file.as_posix()}" not in shared:
            problems.append(f"{out / 'benchmarks' / file}: not part of the build")
    return problems


def check_variant(kernel: Kernel, variant: Path, backend: str) -> tuple[list[str], str | None]:
    """Return a variant's problems, and the source it says it comes from."""
    if not variant.is_dir():
        return [f"{variant}: missing variant; run `make build`"], None
    path = variant / "metadata.json"
    try:
        stored = Metadata.read_from_file(path)
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return [" ".join(f"{path}: {error}".split())], None
    if stored.digest is None:
        return [f"{path}: no digest"], None

    problems = []
    try:
        stored.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
    except DigestValidationError as error:
        problems += [f"{variant}: {violation}" for violation in error.violations]
    for entry in sorted(variant.rglob("*")):
        if entry.is_symlink() and entry.is_dir():
            problems.append(f"{entry}: a link to a folder, which no digest covers")
        elif entry.is_file() and _outside_digest(entry.relative_to(variant)):
            problems.append(f"{entry}: not part of the build, and no digest covers it")

    # The digest does not cover metadata.json itself, but all that it may say follows from build.toml and the id.
    uid = content["id"].rpartition(f"_{kernel.module}_{backend}_")[2]
    kernel_git = stored.provenance.kernel if stored.provenance else None
    git = {"commit": kernel_git.commit, "dirty": kernel_git.dirty} if kernel_git else None
    if not re.fullmatch("[0-9a-f]{7}(_dirty)?", uid) or (git and git["dirty"] != uid.endswith("_dirty")):
        problems.append(f"{path}: the id {content['id']} does not fit the backend or the provenance")
    elif (variant / "_ops.py").is_file() and (variant / "_ops.py").read_text() != ops_py(content["id"]):
        problems.append(f"{path}: the id {content['id']} is not the op namespace of _ops.py")
    wanted = metadata(kernel, backend, uid, git, stored.digest.files)
    for key in sorted(wanted.keys() | content.keys()):
        if content.get(key) != wanted.get(key):
            problems.append(f"{path}: {key} is {content.get(key)!r}, but this tree gives {wanted.get(key)!r}")
    return problems, json.dumps([uid, git])


def _other_source(kernel: Kernel, variant: Path) -> list[str]:
    """What an intact variant has otherwise than the tree, in one line if it has."""

    def content(file: Path) -> bytes | None:
        return file.read_bytes() if file.is_file() else None

    names = {*kernel.files(), *list_files(variant)} - {Path("_ops.py"), Path("metadata.json")}
    other = [name for name in sorted(names) if content(variant / name) != content(kernel.package / name)]
    more = f" and {len(other) - 1} more" if other[1:] else ""
    return [f"{variant}: {other[0]}{more} differs from this tree; run `make build`"] if other else []


def _outside_digest(file: Path) -> bool:
    """Whether the digest ignores a file that Python did not write itself."""
    if "__pycache__" in file.parts:
        return file.parent.name != "__pycache__" or file.suffix != ".pyc"
    return file.suffix == ".pyc"


# Check the source

ALLOWED_IMPORTS = sys.stdlib_module_names | {"torch", "triton"}
PREFIX_ADVICE = 'name the op by a literal add_op_namespace_prefix("...") from ._ops'


def source_problems(kernel: Kernel) -> list[str]:
    """What would break the package once it is on the Hub, one line a problem, with file, line and what to do."""
    package = kernel.package.relative_to(kernel.root)
    if not (kernel.package / "__init__.py").is_file():
        return [f"{package / '__init__.py'}:1: missing; the package needs it"]
    problems = []
    for name in (kernel.module, f"{kernel.module}.py"):
        if (kernel.package / name).exists():
            problems.append(f"{package / name}:1: the loader takes this for the kernel itself; give it another name")
    for name in ("_ops.py", "metadata.json"):
        if (kernel.package / name).exists():
            problems.append(f"{package / name}:1: the build writes this file; delete it from the source")
    for file in kernel.files():
        if file.suffix == ".py":
            try:
                tree = _parse(kernel, kernel.package / file)
            except BuildError as error:
                problems += error.problems
                continue
            found = [*_import_problems(tree, kernel, file), *_registration_problems(tree)]
            if file == Path("__init__.py"):
                found += _public_problems(tree)
            problems += [f"{package / file}:{line}: {problem}" for line, problem in sorted(found)]
    return problems


def _parse(kernel: Kernel, path: Path) -> ast.Module:
    shown = path.relative_to(kernel.root)
    try:
        return ast.parse(path.read_bytes(), feature_version=(3, 10))
    except FileNotFoundError as error:
        raise BuildError(f"{shown}:1: missing") from error
    except SyntaxError as error:
        raise BuildError(f"{shown}:{error.lineno or 1}: not Python 3.10: {error.msg}") from error
    except ValueError as error:
        raise BuildError(f"{shown}:1: not Python: {error}") from error


def _import_problems(tree: ast.Module, kernel: Kernel, file: Path) -> Iterator[tuple[int, str]]:
    at_import = set(_run_at_import(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > len(file.parts):
                yield node.lineno, "this relative import leaves the package; use fewer dots"
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and _last_name(node.func) in ("import_module", "__import__"):
            names = [str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant)]
        else:
            continue
        for name in (name.partition(".")[0] for name in names):
            if name == kernel.module:
                dots = "." * len(file.parts)
                yield node.lineno, f"absolute import of {name}, which the Hub renames; write `from {dots} import ...`"
            elif node in at_import and name and name not in ALLOWED_IMPORTS:
                yield node.lineno, f"{name} is no dependency of a kernel; import it inside the function that needs it"


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when the module is imported: not those inside functions or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and _last_name(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from _run_at_import(child)


def _registration_problems(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Op registrations whose name is not the build's own namespace: two versions of a kernel would collide.

    They are found as `torch.library.f(...)`, so its functions have no other name, and only `infer_schema` names no op.
    """
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            if any(f"{module}{alias.name}.".startswith("torch.library.") for alias in node.names):
                yield node.lineno, "torch.library by another name; `import torch` and write `torch.library.f(...)`"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if _last_name(node.func.value) == "library" and node.func.attr != "infer_schema":
                if not (node.args and _is_prefixed(node.args[0])):
                    yield node.lineno, f"{node.func.attr}: {PREFIX_ADVICE}"


def _is_prefixed(node: ast.expr) -> bool:
    """Whether the expression is `add_op_namespace_prefix("name")`."""
    return (
        isinstance(node, ast.Call)
        and _last_name(node.func) == "add_op_namespace_prefix"
        and len(node.args) == 1
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    )


def _last_name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _public_names(tree: ast.Module) -> tuple[int, list[str] | None]:
    """The line of the package's `__all__`, and its names, or None where it is no literal list of names."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and "__all__" in map(_last_name, node.targets):
            try:
                names = ast.literal_eval(node.value)
            except (TypeError, ValueError):
                names = None
            literal = isinstance(names, list) and all(isinstance(name, str) for name in names)
            return node.lineno, names if literal else None
    return 1, None


def _public_problems(tree: ast.Module) -> Iterator[tuple[int, str]]:
    line, names = _public_names(tree)
    if names is None:
        yield line, '__all__ must be one literal list of names, such as __all__ = ["layers", "f"]'
    elif "layers" not in names:
        yield line, '__all__ has no "layers"; import the submodule and list it, or the Hub finds no layer'


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build", help="the folder to build into (default: build)")
    parser.add_argument("--backend", nargs="+", help="only these backends (default: all of build.toml)")
    parser.add_argument("--check", nargs="?", const="", metavar="DIR", help="check the build in DIR (default: --out)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.check is not None:
            problems = check(Path(arguments.check or arguments.out))
            print("\n".join(problems) or f"{arguments.check or arguments.out}: the build is as it should be")
            return 1 if problems else 0
        for variant in build(ROOT, arguments.out, arguments.backend):
            print(variant)
        return 0
    except BuildError as error:
        problems = error.problems
    except OSError as error:
        problems = [str(error)]
    except KeyboardInterrupt:
        problems = ["interrupted; the previous build is as it was"]
    print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
