#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Writes docs/api.md, the reference of the public API, from the package's docstrings.

    python scripts/api_docs.py    or `make docs`

The sources are read, not run. `tests/test_docs.py` fails where the file is not what this gives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[1]
API = ROOT / "docs" / "api.md"
HEAD = """\
# API reference

Written by `scripts/api_docs.py` (`make docs`) from the docstrings: change them, not this file.

All of it is in the module that `get_kernel` returns:

```python
from kernels import get_kernel

kernel = get_kernel("org/scattermoe-lora", version=1, trust_remote_code=True)
```

`T` tokens choose `k` of `E` experts each, which makes `S = T * k` *slots*; `H` is the hidden size, `I` the
intermediate size, `r` the LoRA rank. *Grouped* order is the slots sorted by expert, *scattered* order that of the
tokens.
"""


# The public names of `reference`: what else is in it is the CPU backend.
DEFINITION = ("moe_mlp", "parallel_linear", "merge_lora", "clamped_glu")
# What a public class holds, shown after it.
PARTS = {"Report": "scattermoe_lora.integrations.kernelize.Switched"}


def render() -> str:
    """The text of docs/api.md."""
    package = griffe.load("scattermoe_lora", search_paths=[ROOT / "torch-ext"], allow_inspection=False)
    parts = [HEAD]
    for name in sorted(map(str, package.exports or []), key=str.lower):
        # By what is imported: `moe_mlp` is a submodule's name too.
        member = package.modules_collection[package.imports.get(name, f"{package.path}.{name}")]
        parts += _entry("kernel", member, level=2)
        if member.is_module:
            for inner in _of_module(member):
                parts += _entry(f"kernel.{name}", inner, level=3)
        if name in PARTS:
            parts += _entry("", package.modules_collection[PARTS[name]], level=3)
    return "\n".join(parts)


def _of_module(module: griffe.Module) -> Iterator[griffe.Object | griffe.Alias]:
    """What a public module defines itself: what its ``__all__`` names, or its functions without an underscore."""
    for name, member in module.members.items():
        if module.name == "reference":
            listed = name in DEFINITION
        else:
            listed = name in module.exports if module.exports else not name.startswith("_")
        if listed and not member.is_alias and (member.is_function or member.is_class):
            yield member


def _entry(owner: str, member: griffe.Object | griffe.Alias, level: int) -> Iterator[str]:
    """A heading, the call, and the docstring; of a class its methods too."""
    name = f"{owner}.{member.name}".lstrip(".")
    yield f"{'#' * level} `{name}`\n"
    if member.is_function or "__init__" in member.members or "dataclass" in member.labels:
        yield _call(name, member)
    if member.docstring is None:
        raise SystemExit(f"error: {member.path} is public and has no docstring")
    yield _text(member.docstring.value)
    if member.is_class:
        for method in member.members.values():
            if method.is_function and not method.name.startswith("_") and method.docstring is not None:
                yield from _entry(name, method, level + 1)


def _call(name: str, member: Any) -> str:
    """The call with its arguments, as an indented block: one line if it fits, else an argument a line."""
    arguments: list[str] = []
    keyword_only = False
    for parameter in member.parameters:
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(kind, "")
        if kind is griffe.ParameterKind.keyword_only and not keyword_only:
            keyword_only = True
            arguments.append("*")
        value = parameter.default
        if str(value) in member.module.members:  # a constant of the module
            value = member.module.members[str(value)].value
        default = "" if stars or value is None else f" = {value}"
        annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
        arguments.append(f"{stars}{parameter.name}{annotation}{default}")
    returns = f" -> {member.returns}" if member.is_function and member.returns is not None else ""
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) > 110:
        line = "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])
    return "".join(f"    {row}\n" for row in line.splitlines())


def _text(docstring: str) -> str:
    """A docstring of ours as Markdown: single backticks, and sections as lists."""
    lines: list[str] = []
    section = ""
    for line in docstring.replace("``", "`").splitlines():
        if line in ("Args:", "Returns:", "Raises:", "Attributes:"):
            section = line[:-1]
            lines += [f"**{section}**", ""]
        elif section == "Returns" and line:
            lines.append(line.strip())
        elif section and line.startswith("        "):
            lines.append(f"  {line.strip()}")  # an item goes on
        elif section and line.startswith("    "):
            lines.append(f"- {line.strip()}")
        else:
            section = section if not line else ""
            lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> int:
    API.write_text(render(), encoding="utf-8")
    print(API.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
