#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Measures candidate tiles on the GPU at hand and rewrites its table, torch-ext/scattermoe_lora/tile_tables/.

    python scripts/tune.py [--only gemm] [--rows 128] [--out DIR] [--workers 12]

For every kernel and row-tile size, the rule's tile, the table's and other candidates are timed at the sizes of real
models; the one with the least geometric mean of times is written. Candidates are compiled in parallel first. Build
before and after (`make build`): the kernel that is tuned, and the tables that it reads, are the build's.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from cases import MODELS, Model  # noqa: E402
from timing import median_ms  # noqa: E402

DTYPE, RANK = torch.bfloat16, 16
# Registers that a candidate may spill: what ptxas spills at one rank or dtype it doubles at another.
SPILL_LIMIT = 16
# Models and tokens whose mean rows per expert select a row tile.
CASES = {
    128: [("Qwen3-30B-A3B", 8192), ("GLM-4.5-Air", 8192), ("Mixtral-8x7B", 4096)],
    64: [("Qwen3-30B-A3B", 1024), ("GLM-4.5-Air", 1024)],
    32: [("Qwen3-30B-A3B", 512), ("GLM-4.5-Air", 512)],
    16: [("Qwen3-30B-A3B", 16), ("Qwen3-30B-A3B", 256)],
}
GEMM = ("block_n", "block_k", "num_warps", "num_stages", "programs_per_processor")
ACT = ("block_m", "block_n", "num_warps", "num_stages")
WIDE = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
OTHER = ("block_m", "block_k", "num_warps", "num_stages")


def candidates(kind: str, rows: int) -> list[dict[str, int]]:
    """Tiles worth trying beside the rule's and the table's, as what they change in the rule's."""
    values: list[tuple[int, ...]]
    if kind == "gemm" and rows == 128:
        values = [
            (256, 64, 8, 3, 1),
            (256, 64, 8, 4, 1),
            (128, 64, 4, 3, 2),
        ]
    elif kind == "gemm" and rows == 64:
        values = [
            (256, 64, 4, 4, 1),
            (256, 64, 8, 4, 1),
            (128, 64, 4, 4, 2),
            (128, 64, 4, 3, 3),
            (128, 128, 4, 2, 2),
        ]
    elif kind == "gemm":
        values = [
            (128, 64, 4, 4, 2),
            (128, 64, 4, 3, 3),
            (128, 128, 4, 3, 2),
            (128, 128, 4, 5, 1),
            (64, 128, 4, 4, 2),
            (64, 128, 4, 3, 4),
            (64, 256, 4, 3, 2),
        ]
    elif kind == "act":
        values = [(m, n, 4, 1) for m, n in ((16, 128), (8, 128), (8, 64), (16, 64), (32, 64)) if m <= rows]
    elif kind == "shrink":
        values = [
            (m, k, w, s) for m in (32, 64, 128) if m <= rows for k, w, s in ((128, 4, 3), (64, 4, 4), (256, 4, 2))
        ]
        values = values or [(rows, 128, 4, 3), (rows, 256, 4, 3), (rows, 128, 2, 4)]
    elif kind == "wide":
        values = [
            *((128, 256, m, 8, s) for m, s in ((64, 3), (32, 4), (64, 2), (32, 3))),
            *((256, 128, m, 8, s) for m, s in ((64, 3), (32, 4))),
            *((128, 128, m, w, s) for m, w, s in ((64, 4, 3), (64, 8, 4), (32, 8, 4), (32, 4, 4), (128, 8, 2))),
        ]
    else:
        values = [
            (p, m, w, s) for p in (64, 128, 256) for m, w, s in ((64, 4, 3), (64, 8, 3), (128, 4, 2), (32, 4, 4))
        ]
    names = {"gemm": GEMM, "act": ACT, "wide": WIDE}.get(kind, OTHER)
    return [dict(zip(names, value, strict=True)) for value in values]


@dataclass
class Layer:
    """The tensors of one experts layer of a model, grouped as the kernels see them."""

    kernel: Any
    model: Model
    tokens: int

    def __post_init__(self) -> None:
        m, E, r = self.model, self.model.num_experts, RANK
        options: dict[str, Any] = {"device": "cuda", "dtype": DTYPE}
        self.run = inner(self.kernel, "triton_kernels")
        H, I, S = m.hidden_size, m.intermediate_size, self.tokens * m.top_k  # noqa: E741
        index = torch.rand(self.tokens, E, device="cuda").topk(m.top_k, dim=1).indices
        _, scattered, offsets = self.run.route(index.reshape(-1), E)
        self.routing = inner(self.kernel, "backend").routing(scattered, offsets)
        self.x = torch.randn(self.tokens, H, **options)
        self.up = torch.randn(E, 2 * I, H, **options) * H**-0.5
        self.down = torch.randn(E, H, I, **options) * I**-0.5
        self.A_up, self.B_up = torch.randn(E, r, H, **options), torch.randn(E, 2 * I, r, **options)
        self.A_down, self.B_down = torch.randn(E, r, I, **options), torch.randn(E, H, r, **options)
        self.h, self.a = torch.randn(S, 2 * I, **options), torch.randn(S, I, **options)
        self.z = torch.randn(S, r, **options)
        self.weights = torch.rand(S, device="cuda")

    def calls(self, key: str) -> list[Callable[[], Any]]:
        """The launches of a step, of any rank, that use the table's row ``key``."""
        run, k, routing, z = self.run, self.model.top_k, self.routing, self.z
        act = {"activation": "silu", "has_gate": True, "is_concatenated": True}
        kind = key if "gram" in key else key.rpartition(" ")[0]
        return {
            "gemm gathered": [
                lambda: run.grouped_gemm(self.x, self.up.mT, routing, x_fan_out=k, z=z, expand=self.B_up.mT),
                lambda: run.grouped_gemm(self.x, self.down, routing, x_fan_out=k, z=z, expand=self.A_down),
            ],
            "gemm grouped": [
                lambda: run.grouped_gemm(
                    self.a, self.down.mT, routing, x_fan_out=0, out_scattered=True, z=z, expand=self.B_down.mT
                ),
                lambda: run.grouped_gemm(
                    self.h, self.up, routing, x_fan_out=0, out_scattered=True, z=z, expand=self.A_up
                ),
            ],
            "act": [
                lambda: inner(self.kernel, "triton_kernels.act").act(self.h, self.a, routing, **act),
                lambda: run.act_grad(
                    self.a,
                    self.h,
                    routing,
                    h_fan_out=0,
                    row_weights=self.weights,
                    **act,
                    save_a=True,
                    dot_dtype=torch.float32,
                ),
            ],
            "shrink": [
                lambda: run.shrink(self.x, self.A_up.mT, routing, x_fan_out=k, scale=1.0),
                lambda: run.shrink(self.a, self.A_down.mT, routing, x_fan_out=0, scale=1.0),
                lambda: run.shrink(self.h, self.B_up, routing, x_fan_out=0, scale=1.0),
                lambda: run.shrink(self.x, self.B_down, routing, x_fan_out=k, scale=1.0),
            ],
            "gram narrow": [
                lambda: run.gram(self.x, z, routing, torch.empty_like(self.A_up).mT, left_fan_out=k),
                lambda: run.gram(self.h, z, routing, torch.empty_like(self.B_up), left_fan_out=0),
                lambda: run.gram(self.a, z, routing, torch.empty_like(self.A_down).mT, left_fan_out=0),
            ],
            "shrink gram": [
                lambda: run.shrink_gram(
                    self.h, self.B_up, z, routing, torch.empty_like(self.B_up), x_fan_out=0, scale=1.0
                ),
                lambda: run.shrink_gram(
                    self.x, self.B_down, z, routing, torch.empty_like(self.B_down), x_fan_out=k, scale=1.0
                ),
            ],
            "gram wide": [
                lambda: run.gram(self.x, self.h, routing, torch.empty_like(self.up).mT, left_fan_out=k),
                lambda: run.gram(
                    self.a,
                    self.x,
                    routing,
                    torch.empty_like(self.down).mT,
                    left_fan_out=0,
                    right_fan_out=k,
                ),
            ],
        }[kind]


def _distinct(tiles: list[dict[str, int]]) -> list[dict[str, int]]:
    return [tile for i, tile in enumerate(tiles) if tile not in tiles[:i]]


def keys(rows: list[int]) -> Iterator[tuple[str, str, int]]:
    """(table key, kind, rows) of everything to tune."""
    for r in rows:
        yield f"gemm gathered {r}", "gemm", r
        yield f"gemm grouped {r}", "gemm", r
        yield f"act {r}", "act", r
        yield f"shrink {r}", "shrink", r
    yield "gram narrow", "gram", 128
    yield "gram wide", "wide", 128
    yield "shrink gram", "gram", 128


def load() -> Any:
    """The kernel without Hopper's own products and grams, which have no tiles to choose and would be timed instead."""
    from kernels import get_kernel

    kernel = get_kernel("org/scattermoe-lora", version=1)
    for module in ("device", "gram"):
        inner(kernel, f"triton_kernels.{module}").has_hopper_kernels = lambda architecture: False
    return kernel


def inner(kernel: Any, name: str) -> Any:
    """A module inside the kernel, whose package has a generated name."""
    return importlib.import_module(f"{kernel.__name__}.{name}")


def compile_only(key: str, rows: int, tile: dict[str, int]) -> str:
    """In a worker: launches a candidate once on a small layer, so that Triton's cache has it."""
    try:
        kernel = load()
        for top_k in {MODELS[name].top_k for name, _ in CASES[rows]}:
            layer = Layer(kernel, Model("small", 2 * top_k, top_k, 2048, 768), 2 * rows)
            choose(kernel, key, tile)
            for call in layer.calls(key):
                call()
        torch.cuda.synchronize()
        launch = inner(kernel, "triton_kernels.launch")
        spills = max(compiled.n_spills for compiled in launch.compiled_kernels.values())
        launch.compiled_kernels.clear()
        return f"spills {spills} registers" if spills > SPILL_LIMIT else ""
    except Exception as error:  # a candidate that does not fit or compile is left out, and said so
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"


def choose(kernel: Any, key: str, tile: dict[str, int] | None) -> None:
    """Puts a tile into the table in memory, or takes it out."""
    tiles = inner(kernel, "tiles")
    table = tiles.table(architecture(kernel))
    if tile is None:
        table.pop(key, None)
    else:
        table[key] = tile
    for name in ("gemm_tile", "act_tile", "shrink_tile", "gram_tile", "shrink_gram_tile"):
        getattr(tiles, name).cache_clear()


def architecture(kernel: Any) -> str:
    """The GPU at hand, as the tables are named."""
    return inner(kernel, "triton_kernels.device").gpu(torch.empty(1, device="cuda")).architecture


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="tune the keys that start with one of these")
    parser.add_argument("--rows", type=int, nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--out", type=Path, default=ROOT / "torch-ext" / "scattermoe_lora" / "tile_tables")
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: tuning needs a GPU", file=sys.stderr)
        return 2
    kernel = load()
    table = inner(kernel, "tiles").table(architecture(kernel))
    jobs = [
        (key, rows, tile)
        for key, kind, rows in keys(options.rows)
        if key.startswith(tuple(options.only))
        for tile in _distinct([{}, table.get(key, {}), *candidates(kind, rows)])
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        failures = list(pool.map(compile_only, *zip(*jobs, strict=True)))
    layers: dict[tuple[str, int], Layer] = {}
    times: dict[str, list[tuple[dict[str, int], list[float]]]] = {}
    for (key, rows, tile), failure in sorted(zip(jobs, failures, strict=True), key=lambda job: -job[0][1]):
        if failure:
            print(f"{key} {tile}: left out, {failure}")
            continue
        before = table.get(key)
        row = []
        for name, tokens in CASES[rows]:
            if (name, tokens) not in layers:
                if any(other not in CASES[rows] for other in layers):
                    layers.clear()
                layers[name, tokens] = Layer(kernel, MODELS[name], tokens)
            for call in layers[name, tokens].calls(key):
                choose(kernel, key, tile)
                row.append(median_ms(call, repeats=5, calls=5))
        choose(kernel, key, before)
        times.setdefault(key, []).append((tile, row))
        print(f"{key:<18} {' '.join(map(str, tile.values())):<16} {' '.join(f'{t:.3f}' for t in row)}", flush=True)
    for key, measured in times.items():
        least = [min(column) for column in zip(*(row for _, row in measured), strict=True)]
        best, row = min(measured, key=lambda entry: sum(map(math.log, entry[1])))
        table[key] = best
        print(
            f"best {key:<18} {best}: {' '.join(f'{t:.3f}' for t in row)}, least {' '.join(f'{t:.3f}' for t in least)}"
        )
    options.out.mkdir(parents=True, exist_ok=True)
    content = {
        "how": "measured by scripts/tune.py",
        "gpu": torch.cuda.get_device_name(),
        "tiles": dict(sorted(table.items())),
    }
    (options.out / f"{architecture(kernel)}.json").write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
