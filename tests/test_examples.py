"""The examples run as they stand, on a small model: notebooks in a Jupyter kernel, scripts by their `main`."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import sys

import nbformat
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from peft import PeftModel
from tiny import Ran
from transformers import AutoModelForCausalLM

EXAMPLES = ROOT / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("needs the source tree, not only a built kernel", allow_module_level=True)
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
EXPECTED = {
    "quickstart.ipynb": ["1 of them with LoRA", r"error \d.\de-0[78]\n", r"\d.\de-0[67]  output\n"],
    "finetune_qwen3_moe.ipynb": ["2 of them with LoRA", "Held-out perplexity", r"Logits within \d.\de-0[67] of stock"],
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_stored_clean(path):
    """As written, without what a run leaves: outputs, counts, the machine's own Python."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        assert cell.metadata in ({}, {"tags": ["parameters"]})
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


def test_every_notebook_has_expectations():
    assert EXPECTED.keys() == {path.name for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_run(path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if "tags" in cell.metadata:
            cell.source += f"\nOUTPUT = {str(tmp_path)!r}"
    for name, value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "IPYTHONDIR": str(tmp_path)}.items():
        monkeypatch.setitem(os.environ, name, value)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    for expected in EXPECTED[path.name]:
        assert re.search(expected, printed), printed
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1


@pytest.fixture(scope="module")
def common():
    """The examples' own folder is where they find each other."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("common")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def base(common, tmp_path_factory) -> str:
    return common.small_model(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize(("name", "forwards"), [("trainer", 2), ("sft", 4)])  # TRL checkpoints: forward again
def test_scripts_run(kernel, common, base, tmp_path, monkeypatch, capfd, name, forwards):
    """The loss falls, in the kernel and without a merge, and stock PEFT loads an adapter that does something."""
    monkeypatch.setattr(common, "small_model", lambda folder: base)  # made once for both
    example = importlib.import_module(name)
    ran = Ran(monkeypatch)
    with ran:
        assert example.main(["--output-dir", str(tmp_path), "--steps", "20"]) == 0
    assert ran.ops == {"moe_mlp_forward": forwards * 20, "moe_mlp_backward": 40} and not ran.merges
    printed = capfd.readouterr().out
    report = printed.partition("scattermoe-lora: ")[2]
    assert report.startswith("2 experts modules switched, 2 of them with LoRA\n")
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", report)]
    assert len(losses) == 10 and sum(losses[-3:]) < sum(losses[:3]) - 0.3
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        tuned = stock(input_ids=ids).logits
        with stock.disable_adapter():
            untuned = stock(input_ids=ids).logits
    assert (tuned - untuned).norm() > 0.05 * untuned.norm()


def test_sft_keeps_the_dtype_of_the_model(kernel, common, base, tmp_path, monkeypatch):
    """TRL loads a model that it is given by name in float32, which no tensor core multiplies, unless it is told."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    shutil.copytree(base, model)
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(model)
    text.write_text("A text.\n\n" * 20)
    example = importlib.import_module("sft")
    trained = []
    monkeypatch.setattr(example.SFTTrainer, "train", lambda trainer: trained.append(trainer.model))
    example.main(["--model", str(model), "--data", str(text), "--output-dir", str(tmp_path)])
    (trained,) = trained
    assert {p.dtype for name, p in trained.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_options_for_a_real_model(common, tmp_path):
    (tmp_path / "text.txt").write_text("A text.")
    options = ["--model", "org/model", "--data", str(tmp_path / "text.txt"), "--output-dir", str(tmp_path / "new")]
    args = common.parse("", options)
    assert (args.model, args.text, args.learning_rate) == ("org/model", "A text.", 2e-4)
    assert args.output_dir.is_dir()
