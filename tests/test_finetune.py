"""The fine-tuning script, end to end on a very small budget, and how it refuses what it cannot do."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "finetune.py"


@pytest.fixture(scope="module")
def finetune() -> ModuleType:
    return importlib.import_module("finetune")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", *arguments], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """One run of the whole script: its output folder, what it printed, and its figures."""
    folder = tmp_path_factory.mktemp("finetune")
    budget = ("--pretrain-steps", "150", "--max-steps", "60", "--seq-len", "64", "--eval-blocks", "32")
    result = run("--output-dir", str(folder), *budget)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout, json.loads((folder / "metrics.json").read_text())


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a refused run leaves on stderr, but for the progress bars and warnings of the libraries."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("finetune.py: error: ")]
    assert len(lines) == 1 and error.endswith(lines[0] + "\n")
    return lines[0]


def test_perplexity_falls(finished: tuple[Path, str, dict[str, Any]]) -> None:
    _, printed, figures = finished
    base, tuned = figures["pre-training"], figures["fine-tuning"]
    assert base["perplexity"] < base["uniform_perplexity"] / 3
    assert tuned["perplexity_after"] < tuned["perplexity_before"] * 0.8
    assert tuned["tokens_per_second"] > 0
    assert f"{tuned['perplexity_before']:.1f} -> {tuned['perplexity_after']:.1f}" in printed


def test_kernel_took_every_layer(finished: tuple[Path, str, dict[str, Any]]) -> None:
    _, printed, figures = finished
    assert figures["fine-tuning"]["kernel"]
    assert "2 experts modules switched, 2 of them with LoRA" in printed


def test_adapter_is_stock_peft(finished: tuple[Path, str, dict[str, Any]], finetune: ModuleType) -> None:
    folder, _, figures = finished
    assert figures["fine-tuning"]["logits_difference"] < finetune.LOGITS_BOUND[torch.float32]
    assert figures["fine-tuning"]["adapter_effect"] > 0.05  # so the agreement means something
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 8  # two layers, two parameters, A and B
    for name, weight in weights.items():
        assert re.search(r"layers\.\d\.mlp\.experts\.(base_layer\.)?lora_[AB]\.weight$", name)
        assert weight.dtype == torch.float32 and weight.abs().max() > 0


def test_loss_curve_is_drawn(finished: tuple[Path, str, dict[str, Any]]) -> None:
    image = (finished[0] / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG\r\n") and len(image) > 10_000


def test_same_losses_as_plain_peft(
    finished: tuple[Path, str, dict[str, Any]], finetune: ModuleType, tmp_path: Path
) -> None:
    """With gradient checkpointing, and with adapters on the attention too."""
    runs: list[dict[str, Any]] = []
    for options in ([], ["--no-kernel"]):
        folder = tmp_path / f"run{len(runs)}"
        budget = ["--max-steps", "6", "--seq-len", "32", "--eval-blocks", "4", "--gradient-checkpointing"]
        model = ["--model", str(finished[0] / "base"), "--target-modules", "q_proj", "v_proj", "--device", "cpu"]
        assert finetune.main([*model, *budget, *options, "--lr", "5e-3", "--output-dir", str(folder)]) == 0
        runs.append(json.loads((folder / "metrics.json").read_text())["fine-tuning"])
    assert dict(runs[0]["loss"]) == pytest.approx(dict(runs[1]["loss"]), rel=1e-4)
    assert runs[0]["perplexity_after"] == pytest.approx(runs[1]["perplexity_after"], rel=1e-3)


def test_held_out_text_is_not_in_the_training_text(finetune: ModuleType) -> None:
    def runs_of_words(pieces: list[str]) -> set[str]:
        words = [re.findall(r"\w+", piece.lower()) for piece in pieces]
        return {" ".join(row[i : i + 8]) for row in words for i in range(len(row) - 7)}

    for text in (finetune.python_reference(), finetune.installed_licences()):
        train, held_out = finetune.split(text)
        assert "".join(a + b for a, b in zip(train, held_out, strict=True)) == text
        train_runs, held_out_runs = runs_of_words(train), runs_of_words(held_out)
        assert len(held_out_runs) > 1000
        assert len(held_out_runs & train_runs) < 0.1 * len(held_out_runs)


def test_missing_file_is_one_line() -> None:
    result = run("--data", "no-such-file.txt")
    assert result.returncode == 2
    assert re.fullmatch(r"finetune\.py: error: cannot read no-such-file\.txt: .*\n", result.stderr)


def test_unknown_model(finetune: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unknown = str(tmp_path / "no-such-model")
    assert finetune.main(["--no-kernel", "--model", unknown, "--output-dir", str(tmp_path / "out")]) == 2
    assert unknown in refusal(capsys)


def test_unknown_kernel(finetune: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repo = "org/no-such-kernel"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_KERNELS", f"{repo}={tmp_path}")
        assert finetune.main(["--kernel-repo", repo, "--output-dir", str(tmp_path / "out")]) == 2
    assert f"cannot load the kernel {repo}" in refusal(capsys)


def test_model_without_experts(
    finished: tuple[Path, str, dict[str, Any]],
    finetune: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    dense = str(tmp_path / "dense")
    LlamaForCausalLM(
        LlamaConfig(vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(dense)
    AutoTokenizer.from_pretrained(finished[0] / "base").save_pretrained(dense)
    assert finetune.main(["--model", dense, "--output-dir", str(tmp_path / "out")]) == 2
    assert "has no experts" in refusal(capsys)


def test_kernel_that_takes_nothing(
    finished: tuple[Path, str, dict[str, Any]],
    finetune: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kernelize(model: object) -> NoReturn:
        raise ValueError("no experts module\n  that can be switched")

    monkeypatch.setattr(finetune, "load_kernel", lambda *_: SimpleNamespace(kernelize=kernelize))
    base = str(finished[0] / "base")
    assert finetune.main(["--model", base, "--device", "cpu", "--output-dir", str(tmp_path)]) == 2
    assert refusal(capsys).endswith("no experts module that can be switched")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there(finetune: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune.main(["--device", "cuda"]) == 2
    assert "no GPU" in refusal(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output-dir", "{file}"], "cannot make the folder"),
        (["--data", "{file}"], "too short"),
        (["--model", "{base}", "--target-modules", "q_proj", "q_prj"], "--target-modules q_prj"),
        (["--model", "{base}", "--target-modules", ""], "--target-modules : the model has no module"),
        (["--model", "{base}", "--target-modules", "mlp"], "Qwen3MoeSparseMoeBlock is no linear layer"),
        (["--model", "{broken}"], "cannot load the model"),
        (["--model", "{base}", "--lr", "1e9", "--max-steps", "3"], "diverged"),
    ],
)
def test_other_refusals(
    finished: tuple[Path, str, dict[str, Any]],
    finetune: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Too little to learn from.")
    names = {"file": str(file), "base": str(finished[0] / "base"), "broken": str(tmp_path / "broken")}
    shutil.copytree(names["base"], names["broken"])
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    output = [] if "--output-dir" in options else ["--output-dir", str(tmp_path / "out")]
    assert finetune.main(["--no-kernel", *(option.format(**names) for option in options), *output]) == 2
    assert message in refusal(capsys)


@pytest.mark.parametrize(
    "options",
    [
        ["--device", "tpu"],
        ["--rank", "0"],
        ["--seq-len", "1"],
        ["--max-steps", "0"],
        ["--lr", "nan"],
        ["--lr", "-1"],
        ["--alpha", "inf"],
        ["--seed", "-1"],
    ],
    ids=" ".join,
)
def test_bad_options_stop_in_argparse(finetune: ModuleType, options: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        finetune.main(options)
    assert stop.value.code == 2
