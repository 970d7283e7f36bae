"""The workflows of .github/: they do what `make` does here, and only the step that publishes sees the Hub's token.

zizmor (`make lint`) sees to the rest: actions pinned by commit, no permission too many, no injection.
"""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
yaml = pytest.importorskip("yaml", reason="requirements-dev.txt has it")


def steps(path):
    """(job, step) of every step of a workflow."""
    jobs = yaml.safe_load(path.read_text())["jobs"]
    return [(name, step) for name, job in jobs.items() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_command_is_a_make_target(path):
    commands = [step["run"] for _, step in steps(path) if "run" in step]
    assert commands
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for command in commands:
        make, target = command.split()
        assert make == "make" and target in phony
        subprocess.run(["make", "-n", target, "PYTHON_RUN=python3"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_every_action_is_named_by_a_commit_and_its_release(path):
    uses = re.findall(r"uses: (.*)", path.read_text())
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_the_token_is_for_the_last_step_of_a_job_that_tests_passed_for():
    text = (ROOT / ".github/workflows/publish.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    *before, last = jobs["publish"]["steps"]
    assert last["run"] == "make publish" and last["env"]["HF_TOKEN"] == "${{ secrets.HF_TOKEN }}"
    assert text.count("secrets.") == 1
    assert jobs["publish"]["needs"] == "test" and jobs["test"]["steps"][-1]["run"] == "make test"
    assert [step["run"] for step in before if "run" in step] == ["make build", "make check"]
