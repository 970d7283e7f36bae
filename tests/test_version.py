"""The version rules (scripts/version.py): what agrees passes, what does not is told with what to do."""

import re
import subprocess
import sys
from pathlib import Path

import minijinja
import pytest
from test_build import build_script, git, small_kernel

import version as version_script

ROOT = Path(__file__).resolve().parents[1]

UNRELEASED = "## Unreleased\n"
FIRST = "## 1.0.0 - 2026-01-01\n"
LATER = "## 1.3.0 - 2026-02-01\n"
SECOND = "## 2.0.0 - 2026-03-01\n"


@pytest.fixture
def source(tmp_path):
    """A small kernel's source tree."""
    return small_kernel(tmp_path, "build", "version")


def set_version(root, version):
    """Whatever version this repository is at, in both places that name one."""
    for name, pattern, text in (
        ("build.toml", r"(?m)^version = \d+$", f"version = {version}"),
        ("CARD.md", r"version \| default\(\d+\)", f"version | default({version})"),
    ):
        (root / name).write_text(re.sub(pattern, text, (root / name).read_text()))


def problems(root, version=1, changelog=UNRELEASED, tags=()):
    set_version(root, version)
    (root / "CHANGELOG.md").write_text(f"# Changelog\n\n{changelog}")
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "all")
    for tag in tags:
        git(root, "tag", tag)
    return version_script.version_problems(build_script.read_kernel(root))


AGREE = {
    "before the first release": (0, UNRELEASED, ()),
    "for the first release": (1, UNRELEASED, ()),
    "released": (1, FIRST, ()),
    "tagged": (1, FIRST, ("v1.0.0",)),
    "tagged, later": (1, LATER + FIRST, ("v1.3.0", "not-a-release")),
    "in the same version": (1, UNRELEASED + LATER + FIRST, ()),
    "in the next version": (2, UNRELEASED + LATER + FIRST, ()),
    "the next version": (2, SECOND + LATER + FIRST, ("v2.0.0",)),
}
DISAGREE = {
    "a version without its release": (2, LATER + FIRST, (), "version is 2, and after CHANGELOG.md it is 1"),
    "a version too far": (3, UNRELEASED + LATER, (), "version is 3, and after CHANGELOG.md it is 1 or 2;"),
    "a release without its version": (1, SECOND + LATER, (), "version is 1, and after CHANGELOG.md it is 2"),
    "the tag of another version": (1, LATER, ("v2.0.0",), "tag v2.0.0: means kernel version 2, and build.toml has 1"),
    "the tag of another release": (1, LATER, ("v1.2.0",), "'## 1.3.0 - 2026-02-01'; begin it with '## 1.2.0"),
    "a tag of what is unreleased": (1, UNRELEASED + LATER, ("v1.3.0",), "CHANGELOG.md begins with '## Unreleased'"),
    "a tag of another form": (1, FIRST, ("v1.0",), "tag v1.0: no vX.Y.Z; delete it"),
    "no section": (1, "", (), "CHANGELOG.md: no section; write one"),
    "no date": (1, "## 1.0.0\n", (), "'## 1.0.0' is no '## X.Y.Z - YYYY-MM-DD'"),
    "releases in disorder": (1, FIRST + LATER, (), "the releases are not in order; write the newest first"),
    "a release twice": (1, FIRST + FIRST, (), "the releases are not in order; write the newest first"),
    "unreleased below": (1, FIRST + UNRELEASED, (), "'## Unreleased' is no '## X.Y.Z"),
}


@pytest.mark.parametrize("case", AGREE)
def test_agree(source, case):
    assert problems(source, *AGREE[case]) == []


@pytest.mark.parametrize("case", DISAGREE)
def test_disagree(source, case):
    *arguments, expected = DISAGREE[case]
    found = problems(source, *arguments)
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("version=1", "CARD.md: tells of version 1, 2; write {{ version | default(2) }}"),
        ("version={{ version }}", "CARD.md: has version, version | default(2); write"),
        ("version={{ version | default(1) }}", "CARD.md: has version | default(1), version | default(2); write"),
    ],
)
def test_the_card_takes_its_version_from_build_toml(source, change, expected):
    assert problems(source, 2, SECOND) == []
    kernel = build_script.read_kernel(source)
    card = build_script.render_card(kernel)
    assert 'get_kernel("org/scattermoe-lora", version=2,' in card and "--revision v2 " in card
    template = (source / "CARD.md").read_text()
    assert "version={{version | default(2)}}" in template
    (source / "CARD.md").write_text(template.replace("version={{version | default(2)}}", change))
    (found,) = version_script.version_problems(kernel)
    assert found.startswith(expected)


def test_kernel_builder_makes_the_same_card():
    """Its engine (minijinja, lenient) with its variables, of which the version is none."""
    kernel = build_script.read_kernel(ROOT)
    card = build_script.render_card(kernel)
    engine = minijinja.Environment(trim_blocks=True, keep_trailing_newline=True)
    given = {
        "repo_id": kernel.general["hub"]["repo-id"],
        "functions": re.findall(r"(?m)^- `(\w+)`$", card.partition("## API")[2].partition("## Layers")[0]),
        "layers": re.findall(r"(?m)^- `(\w+)`$", card.partition("## Layers")[2]),
        "has_benchmark": True,
        "upstream": None,
        "license": "apache-2.0",
    }
    assert "kernelize" in given["functions"] and "ScatterMoEExperts" in given["layers"]
    assert engine.render_str((ROOT / "CARD.md").read_text(), **given) == card


def test_the_command_line(source):
    problems(source, 1, FIRST)
    script = source / "scripts" / "version.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "release 1.0.0, kernel version 1\n", "")
    (source / "CHANGELOG.md").unlink()
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and "CHANGELOG.md: missing" in done.stderr


def test_this_repository_keeps_the_rules():
    assert version_script.version_problems(build_script.read_kernel(ROOT)) == []
