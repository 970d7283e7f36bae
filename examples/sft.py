#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""LoRA on the experts of a model, with TRL's `SFTTrainer`.

    python examples/sft.py --output-dir out                              a small model, on a CPU
    python examples/sft.py --output-dir out --model Qwen/Qwen3-30B-A3B --data text.txt \
        --seq-len 2048                                                   on a GPU
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from common import parse
from datasets import Dataset
from kernels import get_kernel
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(__doc__, argv)
    gpu = torch.accelerator.is_available()
    trainer = SFTTrainer(
        model=args.model,
        args=SFTConfig(
            output_dir=str(args.output_dir),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            max_length=args.seq_len,
            learning_rate=args.learning_rate,
            logging_steps=max(1, args.steps // 10),
            save_strategy="no",
            report_to="none",
            bf16=gpu,  # TRL's default, which a CPU refuses
            model_init_kwargs={"dtype": "auto"},  # the checkpoint's own: TRL's default is float32, twice the memory
            use_cpu=not gpu,
        ),
        # Paragraphs here; conversations ("messages") or prompts with completions go the same way.
        train_dataset=Dataset.from_dict({"text": [p for p in args.text.split("\n\n") if p.strip()]}),
        peft_config=LoraConfig(
            r=args.rank,
            lora_alpha=2 * args.rank,
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    )
    kernel = get_kernel("org/scattermoe-lora", version=1, trust_remote_code=True)
    print(kernel.kernelize(trainer.model))  # once TRL has put the adapters on: the report then names them
    trainer.train()
    trainer.save_model(str(args.output_dir / "adapter"))
    print(f"Adapter: {args.output_dir / 'adapter'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
