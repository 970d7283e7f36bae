# SPDX-License-Identifier: Apache-2.0
"""What the examples share: their options, and a small model with a text, so that they run without a download."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
import finetune  # noqa: E402


def parse(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of an example. Without ``--model`` and ``--data`` they become `small_model` and `small_text`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="Hub id or folder of a mixture-of-experts model (default: a small one, made here)")
    add("--data", type=Path, help="text file to fine-tune on (default: the licences of the installed packages)")
    add("--rank", type=int, default=16, help="LoRA rank (default: %(default)s)")
    add("--learning-rate", type=float, help="(default: 2e-4 with --model, else 5e-3)")
    add("--steps", type=int, default=40, help="(default: %(default)s)")
    add("--batch-size", type=int, default=8, help="rows in a step (default: %(default)s)")
    add("--seq-len", type=int, default=64, help="tokens in a row (default: %(default)s)")
    add("--output-dir", type=Path, required=True, help="receives adapter/ and, without --model, base/")
    args = parser.parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    args.learning_rate = args.learning_rate or (2e-4 if args.model else 5e-3)
    args.model = args.model or small_model(args.output_dir)
    args.text = small_text() if args.data is None else args.data.read_text(encoding="utf-8")
    return args


def small_model(folder: Path | str) -> str:
    """Trains a Qwen3-MoE of 2 layers, 8 experts and 1024 tokens on Python's reference pages: 10 s of one CPU core.

    Returns:
        The folder it is saved in with its tokenizer, ``base`` in ``folder``.
    """
    torch.set_num_threads(1)  # its products are tiny: see scripts/finetune.py
    budget = ["--pretrain-steps", "120", "--seq-len", "64"]
    args = finetune.parse(["--device", "cpu", "--output-dir", str(folder), *budget])
    set_seed(args.seed)
    return finetune.make_base_model(args)[0]


def small_text() -> str:
    """English that the small model has not seen: the licences of the installed packages."""
    return finetune.installed_licences()
