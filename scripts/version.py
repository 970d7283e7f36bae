#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""The version rules, and the check that build.toml, CHANGELOG.md, the card and the tag keep them.

    python scripts/version.py    print the release and the kernel version, or what does not agree (exit code 1)

A release is `X.Y.Z`, tagged `vX.Y.Z`. X is the kernel version: `version` of `build.toml`, the branch `vX` on the Hub,
`version=X` of `get_kernel`. It goes up where the public API loses something or changes; Y where it gains something; Z
otherwise. Version 0 promises nothing.

CHANGELOG.md has a section a release, `## X.Y.Z - YYYY-MM-DD`, newest first. What is not released yet stands above them
in `## Unreleased`, which a tagged commit does not have.
"""

from __future__ import annotations

import re
import sys

from build import ROOT, BuildError, Kernel, git_output, read_kernel, render_card

UNRELEASED = "Unreleased"


def sections(kernel: Kernel) -> list[str]:
    """The titles of the changelog's sections, as they stand there."""
    changelog = kernel.root / "CHANGELOG.md"
    if not changelog.is_file():
        raise BuildError(f"{changelog}: missing; see scripts/version.py for what it holds")
    return re.findall(r"^## (.+?)\s*$", changelog.read_text(encoding="utf-8"), re.MULTILINE)


def release(kernel: Kernel) -> str:
    """The newest section of the changelog: `1.3.0`, or `Unreleased`."""
    return next(iter(sections(kernel)), UNRELEASED).partition(" - ")[0]


def tags(kernel: Kernel) -> list[str]:
    """The tags of HEAD that look like a release's."""
    names = git_output(kernel, "tag", "--points-at", "HEAD") or ""
    return [name for name in names.split() if re.match(r"v\d", name)]


def version_problems(kernel: Kernel) -> list[str]:
    """What breaks the rules, one line a problem, with what to do."""
    version = int(kernel.general["version"])
    titles = sections(kernel)
    unreleased = bool(titles) and titles[0] == UNRELEASED
    dated = titles[unreleased:]
    problems, releases = [], []
    for title in dated:
        if match := re.fullmatch(r"(\d+)\.(\d+)\.(\d+) - \d{4}-\d{2}-\d{2}", title):
            releases.append(tuple(map(int, match.groups())))
        else:
            problems.append(f"CHANGELOG.md: '## {title}' is no '## X.Y.Z - YYYY-MM-DD', nor '## {UNRELEASED}' on top")
    if not titles:
        problems.append(f"CHANGELOG.md: no section; write one, '## {UNRELEASED}'")
    if releases != sorted(set(releases), reverse=True):
        problems.append("CHANGELOG.md: the releases are not in order; write the newest first, each once")

    newest = releases[0][0] if releases else 0
    allowed = [newest, newest + 1] if unreleased else [newest]
    if (releases or unreleased) and version not in allowed:
        expected = " or ".join(map(str, allowed))
        problems.append(f"build.toml: version is {version}, and after CHANGELOG.md it is {expected}; change one")

    for tag in tags(kernel):
        match = re.fullmatch(r"v(\d+)\.\d+\.\d+", tag)
        if not match:
            problems.append(f"tag {tag}: no vX.Y.Z; delete it, and tag again")
        elif int(match[1]) != version:
            problems.append(f"tag {tag}: means kernel version {match[1]}, and build.toml has {version}; change one")
        elif tag != f"v{release(kernel)}":
            wanted = f"## {tag[1:]} - YYYY-MM-DD"
            problems.append(f"tag {tag}: CHANGELOG.md begins with '## {titles[0]}'; begin it with '{wanted}'")

    if (kernel.root / "CARD.md").is_file():
        told = set(re.findall(r"(?:version=|revision v)(\d+)", render_card(kernel)))
        # kernel-builder gives its card no version: there the default is what a reader sees.
        written = set(re.findall(r"{{ *(version\b.*?) *}}", (kernel.root / "CARD.md").read_text(encoding="utf-8")))
        wanted = f"version | default({version})"
        if told != {str(version)}:
            told_of = ", ".join(sorted(told)) or "nothing"
            problems.append(f"CARD.md: tells of version {told_of}; write {{{{ {wanted} }}}}")
        elif written != {wanted}:
            problems.append(f"CARD.md: has {', '.join(sorted(written))}; write {{{{ {wanted} }}}}")
    return problems


def main() -> int:
    try:
        kernel = read_kernel(ROOT)
        if not (problems := version_problems(kernel)):
            print(f"release {release(kernel)}, kernel version {kernel.general['version']}")
            return 0
    except BuildError as error:
        problems = error.problems
    print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
