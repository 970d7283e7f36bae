#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What a layer's options cost: its rank, dtypes, layout, activation, routing, and which of its tensors train.

    python benchmarks/options.py [--tokens 8192] [--only NAME ...] [--out DIR]     after build

GPU time of a step and of a forward of Qwen3-30B-A3B's sizes, as CUDA graphs that are replayed, as in `sweep.py`, also
printed as multiples of the first row's, which is rank 16 on both projections, frozen base, bfloat16. Each row has
kernels of its own to compile: some three seconds. Needs a GPU.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cases import MODELS
from run import ROOT, has_gpu, new_result, our_kernel, write
from timing import graph, median_cold_ms
from torch import Tensor

CLAMPED = "clamped_glu(1.702, 7.0, 1.0)"


@dataclass(frozen=True)
class Options:
    """What differs from the first row."""

    r: int = 16
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None
    of_peft: bool = False
    on: tuple[str, ...] = ("up", "down")
    trains: tuple[str, ...] = ("x", "weights")  # beside the adapters, and biases; "up", "down" are the base
    is_transposed: bool = False
    is_concatenated: bool = True
    has_gate: bool = True
    has_bias: bool = False
    activation: str = "silu"
    dropout: float = 0.0
    routing: str = "uniform"


BASE = ("x", "weights", "up", "down")
ROWS = {
    "rank 16": Options(),
    **{f"rank {r}": Options(r=r) for r in (1, 8, 24, 32, 48, 64, 72, 96, 128, 256)},
    "no adapters": Options(on=()),
    "on the up projection alone": Options(on=("up",)),
    "on the down projection alone": Options(on=("down",)),
    "float16": Options(dtype=torch.float16),
    "float32 adapters": Options(adapter_dtype=torch.float32),
    "PEFT's float32 adapters": Options(of_peft=True, adapter_dtype=torch.float32),
    "PEFT's float32 adapters, rank 64": Options(of_peft=True, adapter_dtype=torch.float32, r=64),
    "dropout": Options(dropout=0.1),
    "dropout, rank 64": Options(dropout=0.1, r=64),
    "no gradient of x": Options(trains=("weights",)),
    "no gradient of the routing weights": Options(trains=("x",)),
    "base trains": Options(trains=BASE),
    "base trains, no adapters": Options(trains=BASE, on=()),
    "base trains, transposed": Options(trains=BASE, is_transposed=True),
    "transposed": Options(is_transposed=True),
    "interleaved, gpt-oss's activation": Options(is_concatenated=False, activation=CLAMPED),
    "interleaved, gpt-oss's activation, biases": Options(is_concatenated=False, activation=CLAMPED, has_bias=True),
    "no gate, relu2": Options(has_gate=False, activation="relu2"),
    "gelu": Options(activation="gelu"),
    "one expert has an eighth of the slots": Options(routing="one"),
    "24 experts have three fifths of the slots": Options(routing="skewed"),
    "half of the experts have none": Options(routing="half"),
    "expert parallel: half of the slots are another's": Options(routing="another's"),
}


def route(routing: str, T: int, E: int, k: int) -> Tensor:
    """Experts of each token; E is another rank's."""
    logits = torch.randn(T, E, device="cuda")
    if routing == "one":
        logits[:, 0] += 100
    elif routing == "half":
        logits[:, E // 2 :] -= 100
    elif routing == "skewed":
        logits -= 0.5 * torch.arange(1, E + 1, device="cuda").log()
    index = logits.topk(k).indices
    return index if routing != "another's" else torch.where(index < E // 2, index, E)


def calls(options: Options, T: int) -> tuple[Callable[[], Tensor], Callable[[], Any]]:
    """A forward and a step."""
    kernel, model = our_kernel(), MODELS["Qwen3-30B-A3B"]
    E, H, I = model.num_experts, model.hidden_size, model.intermediate_size  # noqa: E741
    r = options.r
    N = 2 * I if options.has_gate else I
    torch.manual_seed(0)

    def tensor(*shape: int, scale: float, dtype: torch.dtype = options.dtype) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype) * scale

    up, down = tensor(E, N, H, scale=H**-0.5), tensor(E, H, I, scale=I**-0.5)
    if options.is_transposed:
        up, down = up.mT.contiguous(), down.mT.contiguous()
    weights = torch.rand(T, model.top_k, device="cuda", dtype=options.dtype)
    tensors = {"x": tensor(T, H, scale=1.0), "weights": weights, "up": up, "down": down}
    leaves = [tensors[name].requires_grad_() for name in options.trains]
    names = "is_transposed", "is_concatenated", "has_gate", "activation"
    arguments: dict[str, Any] = {name: getattr(options, name) for name in names}
    for name, rows, columns in (("up", N, H), ("down", H, I)):
        projection = "gate_up" if name == "up" else name
        if name in options.on:
            dtype = options.adapter_dtype or options.dtype
            of_A, of_B = ((E * r, columns), (rows, E * r)) if options.of_peft else ((E, r, columns), (E, rows, r))
            A = tensor(*of_A, scale=columns**-0.5, dtype=dtype).requires_grad_()
            B = tensor(*of_B, scale=0.1, dtype=dtype).requires_grad_()
            lora = kernel.ExpertLoRA
            arguments[f"{projection}_lora"] = lora.from_peft(A, B, E, 2.0) if options.of_peft else lora(A, B, 2.0)
            leaves += [A, B]
        if options.has_bias:
            leaves.append(tensor(E, rows, scale=0.1).requires_grad_())
            arguments[f"{projection}_proj_bias"] = leaves[-1]
    if options.dropout:
        arguments |= {"lora_dropout": options.dropout, "dropout_seed": torch.tensor([1], device="cuda")}
    index, dout = route(options.routing, T, E, model.top_k), torch.randn_like(tensors["x"])

    def forward() -> Tensor:
        given = tensors["x"], up, down, index, weights
        return kernel.moe_mlp(*given, expert_parallel=options.routing == "another's", **arguments)

    return forward, lambda: torch.autograd.grad(forward(), leaves, dout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    arguments = parser.parse_args()
    if not has_gpu():
        return 0
    result = new_result("torch", "triton", "kernels") | {"T": arguments.tokens, "rows": {}}
    print(f"{'':<50}{'step':>9}{'':>7}{'forward':>9}")
    for name in dict.fromkeys(["rank 16", *arguments.only]):
        forward, step = calls(ROWS[name], arguments.tokens)
        row = {"step": median_cold_ms(graph(step), 10)}
        with torch.no_grad():
            row["forward"] = median_cold_ms(graph(forward), 10)
        result["rows"][name] = row
        first = result["rows"]["rank 16"]
        print(
            f"{name:<50}{row['step']:>9.3f}{row['step'] / first['step']:>7.2f}"
            f"{row['forward']:>9.3f}{row['forward'] / first['forward']:>7.2f}",
            flush=True,
        )
        del forward, step
        gc.collect()
        torch.cuda.empty_cache()
    write(result, arguments.out, "options")
    return 0


if __name__ == "__main__":
    sys.exit(main())
