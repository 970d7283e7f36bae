"""The kernel over many models, tokens and ranks: GPU time alone, as CUDA graphs of forward and step that are replayed.

    python benchmarks/sweep.py [--tokens 512 2048 8192] [--ranks 8 16] [--models NAME ...] [--out DIR]     after build

To find sizes that are slower than their floor explains. Sizes are real models', routing is random, the activation SiLU
for all of them. ``of the floor`` is `run.floor_ms` over the time; ``grouped_mm`` is `run.Layer.grouped_mm`, launched.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cases import MODELS, Model
from run import ROOT, Layer, floor_ms, has_gpu, new_result, write
from timing import graph, median_cold_ms

MORE_MODELS = (
    Model("DeepSeek-V2-Lite", 64, 6, 2048, 1408),
    Model("DeepSeek-V3", 256, 8, 7168, 2048),
    Model("ERNIE-4.5-21B-A3B", 64, 6, 2560, 1536),
    Model("Granite-3.0-1B-A400M", 32, 8, 1024, 512),
    Model("Granite-3.0-3B-A800M", 40, 8, 1536, 512),
    Model("Hunyuan-A13B", 64, 8, 4096, 3072),
    Model("LFM2-8B-A1B", 32, 4, 2048, 1792),
    Model("Llama-4-Scout", 16, 1, 5120, 8192),
    Model("MiniMax-M2", 256, 8, 3072, 1536),
    Model("Mixtral-8x22B", 8, 2, 6144, 16384),
    Model("Phi-3.5-MoE", 16, 2, 4096, 6400),
    Model("Qwen1.5-MoE-A2.7B", 60, 4, 2048, 1408),
    Model("Qwen3-235B-A22B", 128, 8, 4096, 1536),
    Model("Qwen3-Next-80B-A3B", 512, 10, 2048, 512),
    Model("gpt-oss-120b", 128, 4, 2880, 2880),
)
ALL = MODELS | {model.name: model for model in MORE_MODELS}


def measure(model: Model, tokens: int, rank: int) -> dict[str, float]:
    layer = Layer(model, tokens, rank, 0.0)
    repeats = 10 if model.forward_flops(tokens) < 4e12 else 4

    def step(forward: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), layer.leaves, layer.dout)

    row: dict[str, float] = {"rows an expert": tokens * model.top_k / model.num_experts}
    ours = layer.ours()
    row["step"] = median_cold_ms(graph(step(ours)), repeats)
    with torch.no_grad():
        row["forward"] = median_cold_ms(graph(ours), repeats)
    row["step of the floor"] = floor_ms(layer, 2) / row["step"]
    row["forward of the floor"] = floor_ms(layer, 1) / row["forward"]
    if rank % 8 == 0:  # others it does not take
        row["grouped_mm step"] = median_cold_ms(step(layer.grouped_mm()), repeats)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--models", nargs="+", choices=ALL, default=list(ALL), metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    options = parser.parse_args()
    if not has_gpu():
        return 0
    result = new_result("torch", "triton", "kernels") | {"models": {}}
    print(
        f"{'model':<22}{'T':>6}{'r':>4}{'rows':>7}{'step':>9}{'floor':>7}{'forward':>9}{'floor':>7}{'grouped_mm':>12}"
    )
    for name in options.models:
        result["models"][name] = []
        for tokens in options.tokens:
            for rank in options.ranks:
                row = measure(ALL[name], tokens, rank)
                gc.collect()
                torch.cuda.empty_cache()
                result["models"][name].append({"T": tokens, "r": rank, **row})
                print(
                    f"{name:<22}{tokens:>6}{rank:>4}{row['rows an expert']:>7.0f}{row['step']:>9.3f}"
                    f"{row['step of the floor']:>7.0%}{row['forward']:>9.3f}{row['forward of the floor']:>7.0%}"
                    f"{row.get('grouped_mm step', float('nan')):>12.3f}",
                    flush=True,
                )
    write(result, options.out, "sweep")
    return 0


if __name__ == "__main__":
    sys.exit(main())
