#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""What a second GPU is worth: time of a LoRA step of a random Qwen3-MoE under DDP and FSDP2, for 1, 2, ... processes.

    python scripts/scaling.py [--processes 1 2] [--out FILE]         all of them, one after the other; a table
    torchrun --nproc-per-node 2 scripts/scaling.py [--out FILE]      these processes alone
    python scripts/scaling.py --device cpu --size tiny               the same with gloo: that it runs, not how fast

Every process has its own tokens, so twice the processes do twice the work: efficiency is the time of one process by
that of several. The first step's loss and gradients are compared with those of one process that has all the tokens,
which every process computes first, unsharded: the relative errors of the loss, and of all gradients together. Layers
are those of Qwen3-30B-A3B in bfloat16, frozen, with fp32 adapters of rank 16 on both projections of the experts.
Without a GPU it says so loudly and does nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SIZES: dict[str, dict[str, Any]] = {
    "mid": {
        "vocab_size": 32768,
        "hidden_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}
ENGINES = ("ddp", "fsdp2")
WARMUP = 3  # compilation, the engines' buffers, and the recording of the launches


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="mid", choices=SIZES)
    parser.add_argument("--engines", nargs="+", default=ENGINES, choices=ENGINES)
    parser.add_argument("--processes", nargs="+", type=int, help="default: 1, 2, 4, ... as many as there are GPUs")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a process and step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    options = parser.parse_args()
    devices = torch.cuda.device_count() if options.device == "cuda" else os.cpu_count() or 1
    if devices == 0:
        print("SKIPPED: this machine has no GPU. Nothing was measured. (--device cpu shows that it runs.)")
        return 0
    rows = measure(options) if "RANK" in os.environ else launch(options, devices)
    if rows and options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def launch(options: argparse.Namespace, devices: int) -> list[dict[str, Any]]:
    """Runs this script under torchrun for each number of processes, and prints what came of them."""
    processes = options.processes or [n for n in (1, 2, 4, 8) if n <= (devices if options.device == "cuda" else 2)]
    if options.device == "cuda" and max(processes) > devices:
        raise SystemExit(f"--processes {max(processes)}: this machine has {devices} GPUs")
    if max(processes) == 1:
        print("ONE PROCESS ONLY: nothing will be said of scaling.")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in processes:
            out = Path(folder) / f"{number}.json"
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(number)]
            given = {name: value for name, value in vars(options).items() if name not in ("processes", "out")}
            arguments = [f"--{name}={value}" for name, value in given.items() if name != "engines"]
            engines = ["--engines", *options.engines]
            subprocess.run([*torchrun, __file__, f"--out={out}", *arguments, *engines], check=True)
            rows += json.loads(out.read_text())
    alone = {row["engine"]: row["step ms"] for row in rows if row["processes"] == 1}
    print(
        "\n| engine | processes | step, ms | tokens/s | efficiency | peak memory, GiB | over the wire, MB a process "
        "| error of the loss | of the gradients |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        efficiency = f"{alone[row['engine']] / row['step ms']:.2f}" if row["engine"] in alone else ""
        print(
            f"| {row['engine']} | {row['processes']} | {row['step ms']:.1f} | {row['tokens/s']:.0f} | {efficiency} "
            f"| {row['peak GiB']:.1f} | {row['wire MB']:.0f} | {row['loss error']:.1e} | {row['gradient error']:.1e} |"
        )
    return rows


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """This process's part of a measurement; the rows, on the first process alone."""
    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    rows = [time_engine(engine, options, device) for engine in options.engines]
    first = dist.get_rank() == 0
    dist.destroy_process_group()
    return rows if first else []


def build(options: argparse.Namespace, device: torch.device) -> nn.Module:
    """The kernelized PEFT model, the same on every process: bfloat16 and frozen, adapters in float32."""
    from kernels import get_kernel
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    kernel = get_kernel("org/scattermoe-lora", version=1)
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", **SIZES[options.size], tie_word_embeddings=False)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=options.rank, target_parameters=targets, init_lora_weights=False))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    kernel.kernelize(model)
    return model.train()


def tokens_of(process: int, options: argparse.Namespace, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(process)
    shape = (options.batch, options.length)
    return torch.randint(0, SIZES[options.size]["vocab_size"], shape, generator=generator).to(device)


def adapter_grads(model: nn.Module) -> Tensor:
    """Every adapter's gradient in one vector, whole where FSDP2 has sharded it."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([(g.full_tensor() if isinstance(g, DTensor) else g).flatten() for g in grads])


def in_one_process(model: nn.Module, options: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor]:
    """Loss and gradients of all processes' tokens, by this one alone."""
    processes = dist.get_world_size()
    total = torch.zeros((), device=device)
    for process in range(processes):
        ids = tokens_of(process, options, device)
        loss = model(input_ids=ids, labels=ids).loss / processes
        loss.backward()
        total += loss.detach()
    grads = adapter_grads(model)
    model.zero_grad()
    return total, grads


def time_engine(engine: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Median time of a step, forward, backward and optimizer, on the slowest process."""
    gc.collect()  # the engine before this one
    model = build(options, device)
    want_loss, want_grads = in_one_process(model, options, device)
    wire = bytes_over_the_wire(engine, model, dist.get_world_size())
    if engine == "ddp":
        devices = [device.index] if device.type == "cuda" else None
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model, device_ids=devices)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in model.base_model.model.model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh)
        wrapped = model
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
    ids = tokens_of(dist.get_rank(), options, device)
    errors: dict[str, float] = {}
    times = []
    for step in range(WARMUP + options.steps):
        if step == WARMUP and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        synchronize(device)
        start = time.perf_counter()
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward()
        if step == 0:
            dist.all_reduce(mean := loss.detach() / dist.get_world_size())
            errors["loss error"] = float((mean - want_loss).abs() / want_loss.abs())
            errors["gradient error"] = float((adapter_grads(wrapped) - want_grads).norm() / want_grads.norm())
            del want_grads
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        times.append(time.perf_counter() - start)
    slowest = torch.tensor(times[WARMUP:], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    seconds = statistics.median(slowest.tolist())
    tokens = options.batch * options.length * dist.get_world_size()
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "engine": engine,
        "size": options.size,
        "processes": dist.get_world_size(),
        "tokens of a process": options.batch * options.length,
        "step ms": 1e3 * seconds,
        "tokens/s": tokens / seconds,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0,
        "wire MB": wire / 1e6,
        **errors,
    }


def synchronize(device: torch.device) -> None:
    """Until every process is here and its device idle."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def bytes_over_the_wire(engine: str, model: nn.Module, processes: int) -> float:
    """What a process sends in a step, by rings (docs/scaling.md): before anything is sharded."""
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    everything = sum(p.nbytes for p in model.parameters())
    share = (processes - 1) / processes
    # DDP all-reduces the gradients; FSDP2 gathers all weights twice and scatters the gradients' sums.
    return share * (2 * trained if engine == "ddp" else 2 * everything + trained)


if __name__ == "__main__":
    sys.exit(main())
