#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""LoRA on the experts of a model, with transformers' `Trainer`.

    python examples/trainer.py --output-dir out                          a small model, on a CPU
    python examples/trainer.py --output-dir out --model Qwen/Qwen3-30B-A3B-Base --data text.txt \
        --seq-len 2048                                                   on a GPU
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from common import parse
from datasets import Dataset
from kernels import get_kernel
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(__doc__, argv)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    lora = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = get_peft_model(model, lora)
    kernel = get_kernel("org/scattermoe-lora", version=1, trust_remote_code=True)
    report = kernel.kernelize(model)  # an error if no experts were found
    print(report)
    if not all(entry.lora for entry in report.switched):
        raise SystemExit("target_parameters does not name the experts' weights: see docs/supported-models.md")

    ids = tokenizer(args.text, verbose=False)["input_ids"]
    rows = [ids[i : i + args.seq_len] for i in range(0, len(ids) - args.seq_len + 1, args.seq_len)]
    arguments = TrainingArguments(
        output_dir=str(args.output_dir),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to="none",
    )
    data = Dataset.from_dict({"input_ids": rows, "labels": rows})
    Trainer(model=model, args=arguments, train_dataset=data).train()

    model.save_pretrained(args.output_dir / "adapter")  # a stock PEFT adapter
    print(f"Adapter: {args.output_dir / 'adapter'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
