#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Draws what `benchmarks/run.py` measured: time against tokens, and every case under the roofline.

    python benchmarks/plot.py benchmarks/results/DATE-GPU-speed.json docs/speed.svg

Needs matplotlib.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from cases import MODELS
from run import BYTES_PER_SECOND, DENSE_FLOPS

COLOURS = {"ours": "#d1495b", "PEFT + grouped_mm": "#30638e", "grouped_mm + LoRA": "#66a182"}
LABELS = {"ours": "scattermoe-lora"}


def time_against_tokens(axes: Any, cases: dict[str, Any]) -> None:
    rows = [
        case for case in cases.values() if case["model"] == "Qwen3-30B-A3B" and case["r"] == 16 and not case["skew"]
    ]
    rows.sort(key=lambda case: case["T"])
    for system, colour in COLOURS.items():
        points = [(case["T"], case["systems"][system]["step"]) for case in rows if system in case["systems"]]
        axes.plot(*zip(*points, strict=True), "o-", color=colour, label=LABELS.get(system, system))
    floor = [(case["T"], case["floor"]["step"]) for case in rows]
    axes.plot(*zip(*floor, strict=True), "--", color="0.5", label="floor")
    axes.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="forward and backward, ms", title="Qwen3-30B-A3B, r = 16"
    )
    axes.legend(frameon=False)


def roofline(axes: Any, cases: dict[str, Any]) -> None:
    lines = []
    for name, case in cases.items():
        flops = 2 * MODELS[case["model"]].forward_flops(case["T"])
        read = case["step reads"]
        lines.append((flops / read, case["systems"]["ours"]["TFLOP/s"], name))
    intensities = sorted(intensity for intensity, _, _ in lines)
    grid = [intensities[0] / 2, DENSE_FLOPS / BYTES_PER_SECOND, intensities[-1] * 2]
    axes.plot(grid, [min(DENSE_FLOPS, BYTES_PER_SECOND * x) / 1e12 for x in grid], "--", color="0.5")
    for intensity, rate, name in lines:
        axes.plot(intensity, rate, "o", color=COLOURS["ours"])
        axes.annotate(name, (intensity, rate), textcoords="offset points", xytext=(5, -9), fontsize=7)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="FLOP per byte of expert weights",
        ylabel="TFLOP/s of a step",
        title="Roofline",
    )


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    result = json.loads(Path(sys.argv[1]).read_text())
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    time_against_tokens(left, result["cases"])
    roofline(right, result["cases"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.suptitle(
        f"One experts layer, bfloat16, LoRA on both projections, {result['gpu']}, {result['date']}", fontsize=10
    )
    plt.rcParams["svg.hashsalt"] = "speed"
    figure.savefig(sys.argv[2], metadata={"Date": None})
    return 0


if __name__ == "__main__":
    sys.exit(main())
