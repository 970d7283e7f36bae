#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Times this kernel beside what a user can install instead, in one run, and writes JSON for `benchmarks/plot.py`.

    python benchmarks/run.py [--cases NAME ...] [--systems NAME ...] [--out benchmarks/results]     after build

One experts layer, bfloat16, LoRA on both projections, base and routing as in training: the base is frozen, dX and the
gradients of the routing weights and of the adapter are computed. A step is a forward and a backward. Times are medians
of `triton.testing.do_bench`: calls follow one another, as a model's layers do, and L2 is flushed between them. *alone*
is a step that finds the GPU idle and waits for its end, so with all that the host does before the first launch.
Needs a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cases import MODELS, Model
from timing import median_ms
from torch import Tensor
from triton.testing import do_bench

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
# What cuBLAS reaches in a large dense product on an H200, and its memory's speed in a copy: see docs/performance.md.
DENSE_FLOPS, BYTES_PER_SECOND = 740e12, 4.3e12

# (model, tokens, rank, share of the slots that one expert gets, or 0 for uniform routing)
CASES: dict[str, tuple[str, int, int, float]] = {
    "first": ("Qwen3-30B-A3B", 8192, 16, 0.0),
    "T=32768": ("Qwen3-30B-A3B", 32768, 16, 0.0),
    "T=2048": ("Qwen3-30B-A3B", 2048, 16, 0.0),
    "T=512": ("Qwen3-30B-A3B", 512, 16, 0.0),
    "T=128": ("Qwen3-30B-A3B", 128, 16, 0.0),
    "T=16": ("Qwen3-30B-A3B", 16, 16, 0.0),
    "r=64": ("Qwen3-30B-A3B", 8192, 64, 0.0),
    "skewed": ("Qwen3-30B-A3B", 8192, 16, 0.3),
    "Qwen3.5": ("Qwen3.5-35B-A3B", 8192, 16, 0.0),
    "OLMoE": ("OLMoE-1B-7B", 8192, 16, 0.0),
    "GLM": ("GLM-4.5-Air", 8192, 16, 0.0),
    "Mixtral": ("Mixtral-8x7B", 8192, 16, 0.0),
}


def our_kernel() -> Any:
    """This clone's build, if LOCAL_KERNELS names no other."""
    from kernels import get_kernel

    os.environ.setdefault("LOCAL_KERNELS", f"org/scattermoe-lora={ROOT}")
    return get_kernel("org/scattermoe-lora", version=1)


class Layer:
    """One experts layer's tensors, and the systems that compute it."""

    def __init__(self, model: Model, T: int, r: int, skew: float) -> None:
        E, H, I = model.num_experts, model.hidden_size, model.intermediate_size  # noqa: E741
        self.model, self.T, self.r = model, T, r
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        torch.manual_seed(0)

        def trained(*shape: int, scale: float) -> Tensor:
            return (torch.randn(*shape, **options) * scale).requires_grad_()

        self.x = trained(T, H, scale=1.0)
        self.up = torch.randn(E, 2 * I, H, **options) * H**-0.5
        self.down = torch.randn(E, H, I, **options) * I**-0.5
        self.A_up, self.B_up = trained(E, r, H, scale=H**-0.5), trained(E, 2 * I, r, scale=0.1)
        self.A_down, self.B_down = trained(E, r, I, scale=I**-0.5), trained(E, H, r, scale=0.1)
        self.index = torch.rand(T, E, device="cuda").topk(model.top_k, dim=1).indices
        if skew:
            self.index[torch.rand(self.index.shape, device="cuda") < skew] = 0
        self.weights = torch.rand(T, model.top_k, **options).requires_grad_()
        self.dout = torch.randn(T, H, **options)
        self.leaves = [self.x, self.weights, self.A_up, self.B_up, self.A_down, self.B_down]

    def ours(self) -> Callable[[], Tensor]:
        kernel = our_kernel()
        up, down = kernel.ExpertLoRA(self.A_up, self.B_up, 2.0), kernel.ExpertLoRA(self.A_down, self.B_down, 2.0)
        return lambda: kernel.moe_mlp(
            self.x, self.up, self.down, self.index, self.weights, gate_up_lora=up, down_lora=down
        )

    def composed(self) -> Callable[[], Tensor]:
        """The same by two `parallel_linear_lora` and an `activate`, as code written for ScatterMoE may have it."""
        kernel = our_kernel()
        E = self.model.num_experts
        A_up, A_down = (A.detach().flatten(0, 1).requires_grad_() for A in (self.A_up, self.A_down))
        B_up, B_down = (B.detach().permute(1, 0, 2).flatten(1).requires_grad_() for B in (self.B_up, self.B_down))
        self.leaves = [self.x, self.weights, A_up, B_up, A_down, B_down]

        def forward() -> Tensor:
            order = kernel.flatten_sort_count(self.index, E)
            up = {"lora_A": A_up, "lora_B": B_up, "scaling": 2.0, "grouped_out": True}
            h = kernel.parallel_linear_lora(self.x, self.up.mT, self.model.top_k, *order, **up)
            down = {"lora_A": A_down, "lora_B": B_down, "scaling": 2.0, "grouped_in": True, "gates": self.weights}
            return kernel.parallel_linear_lora(kernel.activate(h), self.down.mT, 1, *order, **down)

        return forward

    def base_trains(self) -> Callable[[], Tensor]:
        """Ours, with gradients of the base weights too."""
        self.leaves += [self.up.requires_grad_(), self.down.requires_grad_()]
        return self.ours()

    def peft(self) -> Callable[[], Tensor]:
        """transformers' experts with its fastest implementation, and PEFT's LoRA for expert parameters."""
        holder = self._peft_model()
        return lambda: holder.experts(self.x, self.index, self.weights)

    def kernelized(self) -> Callable[[], Tensor]:
        """The same module after `kernelize`: ours, with the adapters as PEFT has them."""
        holder = self._peft_model()
        our_kernel().kernelize(holder)
        return lambda: holder.experts(self.x, self.index, self.weights)

    def _peft_model(self) -> Any:
        """A module with the layer's experts, in transformers' class and PEFT's wrappers; its adapters train."""
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        model = self.model
        config = Qwen3MoeConfig(
            hidden_size=model.hidden_size,
            moe_intermediate_size=model.intermediate_size,
            num_experts=model.num_experts,
            num_experts_per_tok=model.top_k,
        )
        config._experts_implementation = "grouped_mm"
        holder: Any = torch.nn.Module()
        with torch.device("meta"):
            holder.experts = Qwen3MoeExperts(config)
        holder.experts.gate_up_proj = torch.nn.Parameter(self.up, requires_grad=False)
        holder.experts.down_proj = torch.nn.Parameter(self.down, requires_grad=False)
        lora = LoraConfig(
            r=self.r,
            lora_alpha=2 * self.r,
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        )
        inject_adapter_in_model(lora, holder)
        holder.to("cuda", torch.bfloat16)
        self.leaves = [self.x, self.weights, *(p for p in holder.parameters() if p.requires_grad)]
        return holder

    def grouped_mm(self) -> Callable[[], Tensor]:
        """torch's grouped product of sorted rows, LoRA as two more of them a projection."""
        k, E = self.model.top_k, self.model.num_experts

        def linear(rows: Tensor, weight: Tensor, A: Tensor, B: Tensor, ends: Tensor) -> Tensor:
            product = torch._grouped_mm
            update = product(product(rows, A.mT, offs=ends), B.mT, offs=ends)
            return product(rows, weight.mT, offs=ends) + 2.0 * update

        def forward() -> Tensor:
            experts = self.index.flatten()
            order = experts.argsort(stable=True)
            ends = experts.bincount(minlength=E).cumsum(0, dtype=torch.int32)
            token = order // k
            gate, up = linear(self.x[token], self.up, self.A_up, self.B_up, ends).chunk(2, dim=-1)
            y = linear(F.silu(gate) * up, self.down, self.A_down, self.B_down, ends)
            y = y * self.weights.flatten()[order, None]
            return torch.zeros_like(self.x).index_add(0, token, y)

        return forward

    def dense(self) -> Callable[[], Tensor]:
        """cuBLAS products of the same FLOPs by one expert, base only and forward only: what no routing can beat."""
        rows = self.x.detach().repeat(self.model.top_k, 1)
        h = rows.new_empty(rows.shape[0], self.up.shape[1])
        y = torch.empty_like(rows)
        a = h[:, : self.down.shape[2]].contiguous()

        def forward() -> Tensor:
            torch.mm(rows, self.up[0].T, out=h)
            return torch.mm(a, self.down[0].T, out=y)

        return forward


SYSTEMS = {
    "ours": Layer.ours,
    "ours, composed": Layer.composed,
    "ours, base trains": Layer.base_trains,
    "PEFT, kernelized": Layer.kernelized,
    "PEFT + grouped_mm": Layer.peft,
    "grouped_mm + LoRA": Layer.grouped_mm,
}


def weight_bytes(layer: Layer) -> float:
    """Bytes of the experts that are hit: what a forward must read, and a backward again."""
    hit = layer.index.unique().numel() / layer.model.num_experts
    return hit * (layer.up.nbytes + layer.down.nbytes)


def floor_ms(layer: Layer, passes: int) -> float:
    """The least time of a forward (1) or a step (2): of the base products, or of reading the experts that are hit."""
    flops = layer.model.forward_flops(layer.T) / DENSE_FLOPS
    return 1e3 * passes * max(flops, weight_bytes(layer) / BYTES_PER_SECOND)


def measure(layer: Layer, forward: Callable[[], Tensor]) -> dict[str, float]:
    def step() -> None:
        forward().backward(layer.dout)
        for leaf in layer.leaves:
            leaf.grad = None

    for _ in range(2):
        step()
    row = {name: do_bench(call, return_mode="median") for name, call in (("step", step), ("forward", forward))}
    row["alone"] = median_ms(step, repeats=25)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        step()
    row["host"] = (time.perf_counter() - start) / 20 * 1e3
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    row["held"] = (torch.cuda.memory_allocated() - before - out.nbytes) / MIB
    out.backward(layer.dout)
    row["peak"] = (torch.cuda.max_memory_allocated() - before) / MIB
    row["TFLOP/s"] = 2 * layer.model.forward_flops(layer.T) / row["step"] / 1e9
    row["of the floor"] = floor_ms(layer, 2) / row["step"]
    return row


def launches(step: Callable[[], Any]) -> int:
    """GPU kernels of one call. Last, as the profiler slows every launch that comes after it in the process."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def first_call() -> dict[str, float]:
    """Seconds of a first forward and backward, every kernel compiled, in a process with an empty Triton cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--first-call"]
        process = subprocess.run(
            command, env=os.environ | {"TRITON_CACHE_DIR": cache}, check=True, capture_output=True, text=True
        )
    return json.loads(process.stdout.splitlines()[-1])


def time_first_call() -> None:
    """Prints them, as JSON; torch's own first backward, which imports a second's worth of Python, comes before."""
    leaf = torch.ones(1, device="cuda", requires_grad=True)
    (leaf * 1).backward(torch.ones(1, device="cuda"))
    layer = Layer(MODELS["Qwen3-30B-A3B"], 8192, 16, 0.0)
    forward = layer.ours()
    torch.cuda.synchronize()
    times = [time.perf_counter()]
    out = forward()
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    out.backward(layer.dout)
    torch.cuda.synchronize()
    times.append(time.perf_counter())
    print(json.dumps({"forward": times[1] - times[0], "backward": times[2] - times[1]}))


def has_gpu() -> bool:
    """Whether there is something to measure; says so if not."""
    if not torch.cuda.is_available():
        print("SKIPPED: this machine has no GPU. Nothing was measured.", file=sys.stderr)
    return torch.cuda.is_available()


def new_result(*packages: str) -> dict[str, Any]:
    """What every result begins with: the day, the GPU, the packages' versions."""
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "versions": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # ROCm's Triton has another name
        return "not installed"


def write(result: dict[str, Any], folder: Path, kind: str) -> None:
    """Writes a result, which has a date and a GPU, as JSON of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['date']}-{result['gpu'].lower().replace(' ', '-')}-{kind}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON file")
    parser.add_argument("--first-call", action="store_true", help="time only that, in this process: see first_call")
    options = parser.parse_args()
    if not has_gpu():
        return 0
    if options.first_call:
        time_first_call()
        return 0
    result = new_result("torch", "triton", "transformers", "peft", "kernels") | {"cases": {}}
    header = f"{'case':<10}{'system':<20}{'step':>9}{'forward':>9}{'alone':>9}"
    print(f"{header}{'host':>8}{'held':>8}{'peak':>8}{'TFLOP/s':>9}{'floor':>8}")
    for name in options.cases:
        model_name, T, r, skew = CASES[name]
        entry: dict[str, Any] = {"model": model_name, "T": T, "r": r, "skew": skew, "systems": {}}
        result["cases"][name] = entry
        dense = []  # before each system, as a card that has just worked is slower than a cool one, up to a fifth
        for system in options.systems:
            layer = Layer(MODELS[model_name], T, r, skew)
            try:
                dense.append(do_bench(layer.dense(), return_mode="median"))
                row = measure(layer, SYSTEMS[system](layer))
            except torch.OutOfMemoryError:
                print(f"{name:<10}{system:<20} out of memory")
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            entry["systems"][system] = row
            times = f"{row['step']:>9.3f}{row['forward']:>9.3f}{row['alone']:>9.3f}{row['host']:>8.2f}"
            print(
                f"{name:<10}{system:<20}{times}{row['held']:>8.0f}{row['peak']:>8.0f}{row['TFLOP/s']:>9.0f}"
                f"{row['of the floor']:>8.0%}",
                flush=True,
            )
        entry["floor"] = {"step": floor_ms(layer, 2), "forward": floor_ms(layer, 1)}
        entry["step reads"] = 2 * weight_bytes(layer)
        if dense:
            entry["dense forward"] = statistics.median(dense)
            print(f"{name:<10}{'dense forward':<20}{'':>9}{entry['dense forward']:>9.3f}")
    result["first call"] = first_call()
    print("first call, empty Triton cache, seconds: " + json.dumps(result["first call"]))
    layer = Layer(MODELS["Qwen3-30B-A3B"], 2048, 16, 0.0)
    forward = layer.ours()
    step = lambda: forward().backward(layer.dout)  # noqa: E731
    step()
    result["launches of a step"] = launches(step)
    print(f"GPU kernels of a step (ours, T = 2048): {result['launches of a step']}")
    write(result, options.out, "speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
