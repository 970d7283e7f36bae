"""Two processes, gloo, the CPU: DDP, FSDP2, tensor and expert parallelism, ZeRO-3 give one process's numbers.

The processes run `distributed_worker`, once for all the scenarios of a launch: starting them is most of the time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from filelock import FileLock

ENGINES = ["ddp", "accelerate", "fsdp loaded"]
SHARDED = ["fsdp layers", "fsdp layers bf16", "fsdp layers checkpointed", "fsdp wrapper", "fsdp experts"]
SPLIT = ["tp", "ep masks", "ep masks lora", "ep dispatch", "ep dispatch lora"]
BOUND = 1e-5
# Engines that ask torch for a device take a GPU where there is one.
CPU_ALONE = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


def launch(folder: Path, names: list[str], **environment: str) -> dict[str, dict[str, Any]]:
    """What two processes wrote of some scenarios; launched once, though every xdist worker asks."""
    out = folder / "results.json"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            folder.mkdir()
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            worker = ROOT / "tests" / "distributed_worker.py"
            done = subprocess.run(
                [*torchrun, str(worker), str(out), *names],
                env=os.environ | CPU_ALONE | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
                capture_output=True,
                text=True,
                check=False,
                timeout=300,
            )
            (folder / "log").write_text(done.stdout + done.stderr)
    assert out.is_file(), (folder / "log").read_text()[-8000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that xdist's workers share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def results(shared: Path) -> dict[str, dict[str, Any]]:
    return launch(shared / "engines", [*ENGINES, *SHARDED, *SPLIT])


def check_errors(result: dict[str, Any], losses: int, grads: int) -> None:
    """As many losses and gradients as there must be, all of them those of one process."""
    errors = {name: value for name, value in result.items() if name.startswith(("loss ", "d "))}
    assert sum(name.startswith("loss") for name in errors) == losses
    assert sum(name.startswith("d ") for name in errors) == grads
    bad = {name: error for name, error in errors.items() if not error <= BOUND}
    assert not bad, bad
    assert result["fused products"] > 0 and result["merges"] == 0


@pytest.mark.parametrize("name", [*ENGINES, *SHARDED])
def test_same_as_one_process(results, name):
    """Two steps: both losses and every adapter's gradients, of two layers with two factors of two projections."""
    check_errors(results[name], losses=2, grads=2 * 2 * 4)
    assert results[name].get("is DDP", True)


@pytest.mark.parametrize("name", SHARDED)
def test_whole_weights_are_not_kept(results, name):
    """What FSDP2 gathered for a layer is freed when the layer has run, forward and backward: nobody holds a copy."""
    result = results[name]
    assert result["weights saved"] == (0 if "checkpointed" in name else 4), "both stacks of both layers, by reference"
    assert result["bytes after forward"] == result["bytes after backward"] == 0


def test_tensor_parallel(results):
    """Every parameter trains, the experts' 24 units on two ranks; LoRA on them is what PEFT itself can't."""
    check_errors(results["tp"], losses=2, grads=2 * 25)
    assert results["tp"]["units of a rank"] == 12
    assert "ParamWrapper" in results["tp"]["PEFT refuses"]


def test_expert_parallel(results):
    """Every parameter trains: 25 of them, each layer's experts on two ranks, the other rank's ids sentinels."""
    check_errors(results["ep masks"], losses=2, grads=2 * 25)
    assert results["ep masks"]["experts of a rank"] == 4 and results["ep masks"]["sentinels seen"]


def test_expert_parallel_with_lora(results):
    """Every rank has all adapters, uses those of its own experts, and gets the gradients of all."""
    check_errors(results["ep masks lora"], losses=2, grads=2 * 2 * 4)
    assert results["ep masks lora"]["experts of a rank"] == 4 and results["ep masks lora"]["sentinels seen"]


def test_token_dispatch(results):
    """Tokens sent to their experts' ranks: transformers' own gradients; LoRA on the experts is refused in words."""
    check_errors(results["ep dispatch"], losses=3, grads=2 * 25)
    refused = results["ep dispatch"]["refused"]
    assert "LoRA on" in refused and "fsdp_size=1 and ep_size=tp_size" in refused, refused


def test_token_dispatch_with_lora(results):
    """Where all ranks have the same tokens: as one process, every adapter's gradient on every rank."""
    check_errors(results["ep dispatch lora"], losses=2, grads=2 * 2 * 4)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: no wheel, see docs/scaling.md"
)
def test_zero3(shared):
    """DeepSpeed ZeRO-3, the weights sharded between steps."""
    result = launch(shared / "zero3", ["zero3"], DS_ACCELERATOR="cpu")["zero3"]
    check_errors(result, losses=1, grads=2 * 4)
    assert result["elements here between steps"] == 0


def test_scaling_script(tmp_path):
    """`scripts/scaling.py` launches its processes and writes a row for each engine."""
    script = [sys.executable, str(ROOT / "scripts" / "scaling.py")]
    size = ["--size", "tiny", "--batch", "2", "--length", "16", "--steps", "2", "--processes", "2"]
    out = tmp_path / "rows.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*script, "--device", "cpu", *size, "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(out.read_text())
    assert [(row["engine"], row["processes"], row["tokens of a process"]) for row in rows] == [
        ("ddp", 2, 32),
        ("fsdp2", 2, 32),
    ]
    assert all(row["step ms"] > 0 and row["wire MB"] > 0 for row in rows)
    assert all(0 <= row["loss error"] < 1e-3 and 0 <= row["gradient error"] < 2e-2 for row in rows), rows
    assert rows[1]["wire MB"] > rows[0]["wire MB"], "FSDP2 sends weights, DDP the adapters' gradients alone"
    assert "| fsdp2 | 2 |" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_scaling_script_skips_loudly():
    script = [sys.executable, str(ROOT / "scripts" / "scaling.py")]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0 and "SKIPPED: this machine has no GPU" in done.stdout
