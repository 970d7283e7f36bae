#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Tokens per second and peak memory of fine-tuning a whole model: PEFT alone, and PEFT with `kernelize`.

    LOCAL_KERNELS=org/scattermoe-lora=$PWD python scripts/throughput.py [--layers 16] [--gradient-checkpointing]

A model of Qwen3-30B-A3B's layer sizes with random weights, made on the device in bfloat16; LoRA on experts, attention
and router, AdamW on the adapters. Both run in one process, from the same weights and adapters, on the same tokens; the
losses of their first steps are compared. Prints one table and writes JSON. ``--tiny`` is for a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from kernels import get_kernel
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
SYSTEMS = {"PEFT": "PEFT alone", "kernelize": "PEFT + kernelize"}
# How far the losses may lie apart before training, relatively: bfloat16 sends tokens near a routing tie elsewhere.
LOSS_BOUND = 2e-2

QWEN3_30B_A3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
}
TINY = QWEN3_30B_A3B | {
    "vocab_size": 256,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def make_model(args: argparse.Namespace) -> Any:
    """The model with its adapters, in train mode."""
    torch.manual_seed(0)
    sizes = TINY if args.tiny else QWEN3_30B_A3B
    config = Qwen3MoeConfig(**sizes, num_hidden_layers=args.layers, use_cache=False)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        init_lora_weights=False,  # B is not zero: the losses depend on it
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
    )
    model = get_peft_model(model, lora).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def batches(model: Any, args: argparse.Namespace) -> list[Tensor]:
    generator = torch.Generator(args.device).manual_seed(1)
    shape = (args.batch_size, args.seq_len)
    vocabulary = model.config.vocab_size
    count = args.warmup + args.steps
    return [torch.randint(vocabulary, shape, generator=generator, device=args.device) for _ in range(count)]


def measure(model: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Trains: the loss before the first step, seconds of a step, tokens per second, and memory in GiB."""
    on_gpu = args.device.type == "cuda"
    data = batches(model, args)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=on_gpu)
    losses: list[Tensor] = []

    def step(ids: Tensor) -> None:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    for ids in data[: args.warmup]:
        step(ids)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / GIB
    start = time.perf_counter()
    for ids in data[args.warmup :]:
        step(ids)
    if on_gpu:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / args.steps
    figures = {
        "loss": float(losses[0]),
        "seconds_per_step": seconds,
        "tokens_per_second": args.batch_size * args.seq_len / seconds,
    }
    if on_gpu:
        figures |= {"peak_gib": torch.cuda.max_memory_allocated() / GIB, "weights_and_optimizer_gib": held}
    return figures


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of each system; of one that ran out of memory, that it did."""
    kernel = get_kernel("org/scattermoe-lora", version=1, trust_remote_code=True)
    model = make_model(args)
    adapters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    results: dict[str, dict[str, Any]] = {}
    for system in SYSTEMS:
        if system == "kernelize":
            print(str(kernel.kernelize(model)).splitlines()[0])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in adapters:
                    parameter.copy_(adapters[name])
        try:
            results[system] = measure(model, args)
        except torch.OutOfMemoryError:
            results[system] = {"out_of_memory": True}
        model.zero_grad(set_to_none=True)
        free()
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    row = "{:<18} {:>12} {:>12} {:>12} {:>10}".format
    lines = [row("", "tokens/s", "s a step", "peak GiB", "loss")]
    for system, figures in results.items():
        if "out_of_memory" in figures:
            lines.append(row(SYSTEMS[system], "out of memory", "", "", "").rstrip())
            continue
        peak = f"{figures['peak_gib']:.1f}" if "peak_gib" in figures else "-"
        speed, seconds = f"{figures['tokens_per_second']:,.0f}", f"{figures['seconds_per_step']:.3f}"
        lines.append(row(SYSTEMS[system], speed, seconds, peak, f"{figures['loss']:.4f}"))
    return "\n".join(lines)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layers", type=positive, default=16, help="decoder layers, 1.2 GiB each (default: %(default)s)")
    add("--batch-size", type=positive, default=2, help="rows in a step (default: %(default)s)")
    add("--seq-len", type=positive, default=4096, help="tokens in a row (default: %(default)s)")
    add("--rank", type=positive, default=16, help="LoRA rank (default: %(default)s)")
    add("--steps", type=positive, default=10, help="steps that are timed (default: %(default)s)")
    add("--warmup", type=positive, default=3, help="steps before those (default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--tiny", action="store_true", help="a tiny model, to see that it runs")
    add("--device", choices=("cpu", "cuda"), default="cuda", help="(default: %(default)s)")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny runs without")
    args.device = torch.device(args.device)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    gpu = torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu"
    results = compare(args)
    print(table(results))
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "device")}
    packages = ("torch", "transformers", "peft", "kernels")
    report = {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "model": "tiny" if args.tiny else "Qwen3-30B-A3B's layers",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "settings": settings,
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{report['date']}-{gpu.lower().replace(' ', '-')}-throughput.json"
    file.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Written: {file}")
    losses = [figures["loss"] for figures in results.values() if "loss" in figures]
    if len(losses) == 2 and not abs(losses[1] - losses[0]) <= LOSS_BOUND * abs(losses[0]):  # "not <=": a NaN fails too
        print(f"throughput.py: error: the losses differ by more than {LOSS_BOUND:.0%}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
