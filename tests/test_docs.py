"""The documents keep up: code blocks run, links and quoted messages are there, docs/api.md is what the docstrings say.

Python blocks of a document run one after another in one namespace, with `stand_ins` for what a reader has already: a
model, a dataset. Models by name become tiny random ones. Of bash blocks every command is looked up, and none is run.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import transformers
import trl
from conftest import ROOT, inner
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import targets, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers.distributed import DistributedConfig

if not (ROOT / "README.md").is_file():
    pytest.skip("needs the source tree, not only a built kernel", allow_module_level=True)
import api_docs  # noqa: E402
import build as build_script  # noqa: E402

DOCUMENTS = [ROOT / name for name in ("README.md", "CARD.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
# What stands in a block to be read, not run.
READ = {"bibtex", "text"}


class Block(NamedTuple):
    language: str
    code: str
    line: int


@functools.cache
def text(path: Path) -> str:
    if path.name == "CARD.md":  # as it is on the Hub
        return build_script.render_card(build_script.read_kernel(ROOT))
    return path.read_text(encoding="utf-8")


@functools.cache
def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a document, those inside lists too; an odd fence is an error."""
    found, start = [], None
    for number, line in enumerate(text(path).splitlines(), 1):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start, language = number, line.strip().removeprefix("```")
        else:
            code = "\n".join(text(path).splitlines()[start : number - 1])
            found.append(Block(language, textwrap.dedent(code), start))
            start = None
    assert start is None, f"{path.name}:{start}: this block has no end"
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_every_block_is_of_a_kind_that_is_checked(path):
    for block in blocks(path):
        assert block.language in {"python", "bash"} | READ, f"{path.name}:{block.line}: {block.language!r}"


# Python


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    model.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def stand_ins(kernel, tokenizer, tmp_path, monkeypatch) -> dict[str, Any]:
    """What a reader of a document has before its first block; and no Hub, no GPU, one step of training."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: tiny_model("qwen3_moe"))
    config = functools.partial(
        trl.SFTConfig, max_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, max_length=16
    )
    monkeypatch.setattr(trl, "SFTConfig", config)
    model = tiny_model("qwen3_moe")
    return {
        "__name__": "__main__",
        "model": model,
        "dataset": Dataset.from_dict({"text": ["a b a b a b", "b a b a"] * 4}),
        "tokenizer": tokenizer,
    }


def scaling(stand_ins: dict[str, Any], kernel: Any) -> None:
    """Its reader has a model with adapters, and two processes; how they work together is test_distributed's."""
    stand_ins["kernel"] = kernel
    stand_ins["model"] = get_peft_model(stand_ins["model"], LoraConfig(target_parameters=targets("qwen3_moe")))
    stand_ins |= {"fully_shard": lambda module: None, "DistributedConfig": DistributedConfig, "n": 2}


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if any(b.language == "python" for b in blocks(p))], ids=name)
def test_python_blocks_run(path, kernel, stand_ins):
    if path.name == "scaling.md":
        scaling(stand_ins, kernel)
    for block in blocks(path):
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(path), "exec"), stand_ins)
    report = stand_ins.get("report")
    assert report is None or len(report.switched) == 2


def test_the_ways_of_the_readme_do_what_they_say(kernel, stand_ins, tmp_path):
    """Not only without an error: the layer's output, LoRA in the kernel, an adapter on disk."""
    layer, with_peft, trainer = (block.code for block in blocks(ROOT / "README.md") if block.language == "python")
    exec(layer, stand_ins)
    assert stand_ins["out"].shape == (32, 64) and stand_ins["out"].isfinite().all()
    assert len(with_peft.splitlines()) <= 8, "five lines and the imports"
    exec(with_peft, stand_ins)
    report = kernel.kernelize(stand_ins["model"])
    assert [entry.lora for entry in report.switched] == [("gate_up_proj", "down_proj")] * 2
    exec(trainer, stand_ins)
    assert (tmp_path / "out/adapter/adapter_model.safetensors").is_file()


# Bash

TOOLS = {"cd", "diff", "gh", "git", "hf", "kernels", "pip"}  # of others: their arguments are not ours to check


def wrong(command: str) -> str | None:
    """What of a command line is not in this tree, or None."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    if not words or words[0] in TOOLS:
        return None
    if words[0] == "make":
        phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
        makefile = (ROOT / "Makefile").read_text()
        for word in words[1:]:
            variable, equals, _ = word.partition("=")
            if equals and f"$({variable})" not in makefile:
                return f"{variable}: no variable of the Makefile"
            if not equals and word not in phony:
                return f"{word}: no target of the Makefile"
        return None
    if words[0] not in ("python", ".venv/bin/python"):
        return f"{words[0]}: not a command that this test knows"
    script, arguments = words[1], words[2:]
    if words[1:3] == ["-m", "pytest"]:
        script, arguments = words[3], words[4:]
        source = (ROOT / "tests/conftest.py").read_text()
    elif (ROOT / script).is_file():
        source = (ROOT / script).read_text() + (ROOT / "examples/common.py").read_text()
    if not (ROOT / script.partition("::")[0]).is_file():
        return f"{script}: no such file"
    for option in arguments:
        if option.startswith("--") and f'"{option.partition("=")[0]}"' not in source:
            return f"{option}: no option of {script}"
    return None


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if any(b.language == "bash" for b in blocks(p))], ids=name)
def test_bash_blocks_name_what_exists(path):
    for block in blocks(path):
        if block.language == "bash":
            for command in block.code.replace("\\\n", " ").splitlines():
                assert wrong(command) is None, f"{path.name}:{block.line}: {wrong(command)}"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("make tset", "tset: no target"),
        ("make finetune ARGS=1", "ARGS: no variable"),
        ("X=1 python scripts/tuna.py", "scripts/tuna.py: no such file"),
        ("python scripts/tune.py --olny gemm", "--olny: no option"),
        (".venv/bin/python -m pytest tests/test_none.py", "tests/test_none.py: no such file"),
        ("rm -rf build", "rm: not a command"),
    ],
)
def test_a_wrong_command_is_found(command, expected):
    assert expected in wrong(command)


# Links, tables, messages


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    without_blocks = re.sub(r"(?s)```.*?```", "", text(path))
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks):
        if not link.startswith("https://"):
            assert (path.parent / link).exists(), f"{path.name}: {link}"


def test_the_readme_leads_to_every_document():
    readme = text(ROOT / "README.md")
    for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.*"), ROOT / "CONTRIBUTING.md"]:
        assert f"]({name(path)})" in readme or path.name == "common.py", name(path)


def test_the_lora_table_names_tests_that_exist():
    rows = re.findall(r"(?m)^\| .* \| `(test_\w+\.py)::(test_\w+)` \|$", text(ROOT / "README.md"))
    table = text(ROOT / "README.md").partition("| LoRA on experts |")[2].partition("\n\n")[0]
    assert len(rows) == table.count("\n") - 1 > 10, "a row without a test"
    for file, test in rows:
        assert re.search(rf"(?m)^def {test}\(", (ROOT / "tests" / file).read_text()), f"{file}::{test}"


def test_the_gpu_table_is_what_is_compiled():
    table = text(ROOT / "README.md").partition("| GPU |")[2].partition("\n\n")[0]
    families = re.findall(r'Family\("(\w+)"', (ROOT / "tests/aot.py").read_text())
    compiled = [row for row in table.splitlines() if "| yes |" in row]
    assert sorted(re.findall(r"\b(?:sm_|gfx)\w+", "".join(compiled))) == sorted(families)
    assert len(compiled) < table.count("\n") - 1, "XPU and the CPU are not compiled"


def test_the_data_types_are_those_that_are_checked(kernel):
    (told,) = re.findall(r"\*\*Data types\*\*: ([^.]*)\.", text(ROOT / "README.md"))
    assert set(re.findall(r"\w*float\d+", told)) == {str(dtype)[6:] for dtype in inner(kernel, "checks").FLOATS}


@pytest.mark.parametrize(("option", "value"), [("use_dora", True), ("lora_bias", True), ("lora_dropout", 0.1)])
def test_peft_refuses(option, value):
    with pytest.raises(ValueError, match=rf"lora.ParamWrapper does not work with {option}"):
        get_peft_model(tiny_model("qwen3_moe"), LoraConfig(target_parameters=targets("qwen3_moe"), **{option: value}))


SOURCES = {
    "scattermoe-lora": [ROOT / "torch-ext"],
    "the scripts": [ROOT / "scripts"],
    "kernels": [Path(importlib.util.find_spec("kernels").origin).parent],
    "PEFT": [Path(peft.__file__).parent / "tuners" / "lora"],
}


@functools.cache
def messages(section: str) -> list[str]:
    """The strings of the sources, with `…` for what is filled in."""
    found = []
    for folder in SOURCES[section]:
        for file in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def quoted() -> list[tuple[str, str]]:
    section, found = "", []
    for line in text(ROOT / "docs/troubleshooting.md").splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("### "):
            assert line.startswith("### `") and line.endswith("`"), line
            found.append((section, line[5:-1]))
        elif italic := re.match(r"- \*([^*]+)\*", line):
            found.append((section, italic[1].rstrip(".")))
    return found


@pytest.mark.parametrize(("section", "message"), quoted())
def test_quoted_messages_exist(section, message):
    assert any(message in source for source in messages(section)), message


def test_api_reference_is_up_to_date():
    assert api_docs.API.read_text(encoding="utf-8") == api_docs.render(), "run `make docs`"


def test_the_api_reference_has_every_public_name(kernel):
    for public in kernel.__all__:
        assert f"\n## `kernel.{public}`\n" in text(api_docs.API)
    for function in (kernel.moe_mlp, kernel.kernelize, kernel.parallel_linear):
        assert f"    kernel.{function.__name__}(" in text(api_docs.API), "the function, not the module of its name"
    assert "\n### `kernel.ParallelExperts.set_lora`\n" in text(api_docs.API)
