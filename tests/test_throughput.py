"""The throughput script, tiny, on a CPU: what it runs, prints and writes, and that a wrong loss is an error."""

from __future__ import annotations

import importlib
import json
from types import ModuleType

import pytest
from tiny import Ran

TINY = [
    "--tiny",
    "--device",
    "cpu",
    "--layers",
    "2",
    "--seq-len",
    "32",
    "--steps",
    "2",
    "--warmup",
    "1",
    "--rank",
    "4",
]


@pytest.fixture
def throughput() -> ModuleType:
    return importlib.import_module("throughput")


@pytest.mark.parametrize("options", [[], ["--gradient-checkpointing"]], ids=["", "checkpointing"])
def test_tiny(kernel, throughput, tmp_path, capsys, monkeypatch, options):
    ran: list[tuple[int, bool]] = []
    measure = throughput.measure

    def counted(model, args):
        with Ran(monkeypatch) as seen:
            figures = measure(model, args)
        ran.append((seen.ops["moe_mlp_backward"], bool(seen.merges)))
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(throughput, "measure", counted)
        assert throughput.main([*TINY, *options, "--out", str(tmp_path)]) == 0
    assert ran == [(0, True), (6, False)], "PEFT alone, then the kernel: 3 steps of 2 layers"
    printed = capsys.readouterr().out
    assert "2 experts modules switched, 2 of them with LoRA" in printed
    assert "PEFT alone" in printed and "PEFT + kernelize" in printed
    (file,) = tmp_path.iterdir()
    assert file.name.endswith("-cpu-throughput.json")
    written = json.loads(file.read_text())
    results = written["results"]
    assert set(results) == {"PEFT", "kernelize"} and written["settings"]["layers"] == 2
    assert all(figures["tokens_per_second"] > 0 for figures in results.values())
    assert results["PEFT"]["loss"] == pytest.approx(results["kernelize"]["loss"], rel=1e-2)


def test_losses_that_differ_are_an_error(kernel, throughput, tmp_path, capsys, monkeypatch):
    figures = {"seconds_per_step": 1.0, "tokens_per_second": 1.0}
    results = {"PEFT": figures | {"loss": 5.0}, "kernelize": figures | {"loss": float("nan")}}
    monkeypatch.setattr(throughput, "compare", lambda args: results)
    assert throughput.main([*TINY, "--out", str(tmp_path)]) == 1
    assert "the losses differ" in capsys.readouterr().err
    results["PEFT"] = {"out_of_memory": True}
    assert throughput.main([*TINY, "--out", str(tmp_path)]) == 0
    assert "PEFT alone         out of memory" in capsys.readouterr().out
