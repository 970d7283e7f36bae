#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What `make test-gpu` runs after the tests: errors, times and memory at real sizes, and the fine-tuning example.

    python scripts/gpu_check.py [--out benchmarks/results] [--no-finetune]

Prints a table and writes a JSON file named by date and GPU. Without a GPU it says so loudly and does nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from cases import MODELS, Model  # noqa: E402
from numerics import Case, relative_error  # noqa: E402
from run import MIB, has_gpu, new_result, our_kernel, write  # noqa: E402
from timing import median_ms  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument("--no-finetune", action="store_true", help="leave the fine-tuning example out")
    options = parser.parse_args()
    if not has_gpu():
        return 0

    kernel = our_kernel()
    result = new_result("torch", "triton", "transformers", "peft", "kernels")
    result |= {"kernel": kernel.__name__, "errors": [], "times": []}
    print(f"{result['gpu']}, {result['versions']}\n")
    print("Relative error against float64, T = 2048, r = 16, base frozen")
    for model in MODELS.values():
        for dtype in (torch.bfloat16, torch.float16):
            row = {"model": model.name, "dtype": str(dtype), "T": 2048, **_errors(kernel, model, 2048, dtype)}
            result["errors"].append(row)
            print("  ", "  ".join(f"{k} {v:.1e}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    print("\nTime (median ms) and memory (MiB), bfloat16, r = 16, base frozen")
    for model in MODELS.values():
        row = {"model": model.name, "T": 8192, **_times(kernel, model, 8192)}
        result["times"].append(row)
        print("  ", "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{v}" for k, v in row.items()))
    if not options.no_finetune:
        result["finetune"] = _finetune()
        print(f"\nscripts/finetune.py on the GPU: {json.dumps(result['finetune'])}")
    write(result, options.out, "check")
    return 0


def _errors(kernel: ModuleType, model: Model, T: int, dtype: torch.dtype) -> dict[str, float]:
    case = Case.of_model(model, T, dtype)
    got = case.run(kernel, kernel.moe_mlp, case.home, reference=False)
    want = case.run(kernel, kernel.reference.moe_mlp, case.home, reference=True)
    return {name: relative_error(got[name], want[name]) for name in want}


def _times(kernel: ModuleType, model: Model, T: int) -> dict[str, float]:
    case = Case.of_model(model, T, torch.bfloat16)
    arguments, leaves = case.layer(kernel)
    case.tensors = {}  # the float64 originals are not part of what is measured
    grad = case.grad.to(torch.bfloat16)

    def forward() -> torch.Tensor:
        return kernel.moe_mlp(**arguments)

    def step() -> None:
        forward().backward(grad)
        for leaf in leaves.values():
            leaf.grad = None

    row = {"forward": median_ms(forward), "step": median_ms(step)}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    row["held"] = (torch.cuda.memory_allocated() - before) / MIB
    out.backward(grad)
    row["peak"] = (torch.cuda.max_memory_allocated() - before) / MIB
    row["TFLOP/s"] = 2 * model.forward_flops(T) / row["step"] / 1e9
    return row


def _finetune() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--device", "cuda", "--dtype", "bfloat16", "--output-dir", folder]
        subprocess.run([sys.executable, str(ROOT / "scripts" / "finetune.py"), *arguments], check=True)
        return json.loads((Path(folder) / "metrics.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
