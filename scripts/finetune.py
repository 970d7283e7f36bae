#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a mixture-of-experts language model with LoRA on its experts, through the scattermoe-lora kernel.

    python scripts/finetune.py                      a small model, on one CPU core in under a minute and a half
    python scripts/finetune.py --model Qwen/Qwen3-30B-A3B-Base --data text.txt --seq-len 2048      on a GPU

Without ``--model`` the script first trains a small Qwen3-MoE on the reference pages that ship with Python, and then
fine-tunes it on the licences of the installed packages: English both, and plainly different. Nothing is downloaded.

The adapter is saved by PEFT and loaded again by PEFT *without* the kernel; the run fails if the logits then differ.
``OUTPUT_DIR`` receives ``adapter/``, ``loss.png``, ``metrics.json`` and, without ``--model``, the small model in
``base/``.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import pydoc_data.topics
import re
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import kernels
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

# How far the logits with the kernel may lie from stock PEFT's, as ||a - b|| / ||b||. In 16 bits most of it is tokens
# near a routing tie, which rounding sends to another expert: 24 random layers gave 4e-7, 2.4e-2 and 7e-3.
LOGITS_BOUND = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}

# Of the small model. 2048 reached the same bits per character on the 360 kB of text, with more parameters.
VOCABULARY = 1024


class UserError(Exception):
    """What the user can put right; shown as one line."""


# ---------------------------------------------------------------------------------------------------------------- text


def distinct_paragraphs(documents: Iterable[str], width: int = 8, most_seen: float = 0.3) -> str:
    """The documents without the paragraphs that repeat an earlier one, or nearly: licences quote each other at length.

    A paragraph is dropped when more than ``most_seen`` of its runs of ``width`` words have occurred before. Without
    this the held-out text would stand in the training text.
    """
    seen: set[tuple[str, ...]] = set()
    kept = []
    for document in documents:
        for paragraph in re.split(r"\n\s*\n", document):
            words = re.findall(r"\w+", paragraph.lower())
            runs = {tuple(words[i : i + width]) for i in range(max(1, len(words) - width + 1))}
            if words and len(runs & seen) <= most_seen * len(runs):
                kept.append(paragraph)
            seen |= runs
    return "\n\n".join(kept)


def python_reference() -> str:
    """The language reference behind Python's ``help("topics")``."""
    return distinct_paragraphs(text for _, text in sorted(pydoc_data.topics.topics.items()))


def installed_licences() -> str:
    """The licence texts of the installed distributions, in the order of their names."""
    texts = []
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: (d.metadata["Name"] or "").lower()):
        for file in sorted(distribution.files or [], key=str):
            if re.match(r"(licen[cs]e|copying|notice)", file.name.lower()) and file.suffix not in (".py", ".pyc"):
                path = Path(str(file.locate()))
                if path.is_file():
                    texts.append(path.read_text(encoding="utf-8", errors="replace"))
    return distinct_paragraphs(texts)


def split(text: str, period: int = 20_000) -> tuple[list[str], list[str]]:
    """Pieces of text to train on and to hold out: of every 20,000 characters the last 2,000 are held out."""
    period = max(1, min(period, len(text)))
    cut = period * 9 // 10
    starts = range(0, len(text), period)
    return [text[s : s + cut] for s in starts], [text[s + cut : s + period] for s in starts]


def to_blocks(tokenizer: Any, pieces: Sequence[str], length: int) -> Tensor:
    """The pieces as token ids, one after another, cut into rows of ``length``."""
    ids = [i for row in tokenizer(list(pieces), add_special_tokens=False)["input_ids"] for i in row]
    rows = len(ids) // length
    if rows == 0:
        raise UserError(f"the text is too short: {len(ids)} tokens do not fill one row of --seq-len {length}")
    return torch.tensor(ids[: rows * length]).view(rows, length)


# --------------------------------------------------------------------------------------------------------------- model


def load_model(name: str, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        # device_map lets the weights of a large model go straight to the GPU.
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, device_map=device if device.type == "cuda" else None
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load the model {name}: {error}") from error


def load_tokenizer(name: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the tokenizer of {name}: {error}") from error


def load_kernel(repo: str, version: int) -> ModuleType:
    try:
        return kernels.get_kernel(repo, version=version, trust_remote_code=True)
    except Exception as error:  # the Hub client raises a dozen unrelated types
        raise UserError(f"cannot load the kernel {repo}, version {version}: {error}") from error


def expert_parameters(model: nn.Module) -> list[str]:
    """The names by which PEFT finds the expert weights, for example ``mlp.experts.down_proj``.

    The experts are the modules that transformers marked with ``use_experts_implementation``: they say how their
    weights lie (``is_transposed``, ``has_gate``). The layer number and what precedes it are left out of the names.
    """
    names = set()
    for name, module in model.named_modules():
        if all(hasattr(module, attribute) for attribute in ("is_transposed", "has_gate", "down_proj")):
            up = "gate_up_proj" if module.has_gate else "up_proj"
            within_layer = re.sub(r"^.*\.\d+\.", "", name)
            names |= {f"{within_layer}.{up}", f"{within_layer}.down_proj"}
    return sorted(names)


def add_lora(model: Any, targets: list[str], args: argparse.Namespace) -> Any:
    for name in args.target_modules:  # PEFT is silent about a name that finds nothing as long as another does
        found = [module for path, module in model.named_modules() if name and f".{path}".endswith(f".{name}")]
        if not found:
            raise UserError(f"--target-modules {name}: the model has no module of that name")
        if other := [type(module).__name__ for module in found if not isinstance(module, nn.Linear)]:
            raise UserError(f"--target-modules {name}: {other[0]} is no linear layer")
    lora = LoraConfig(
        r=args.rank, lora_alpha=args.alpha, target_parameters=targets, target_modules=args.target_modules
    )
    # PEFT makes the adapters in the base model's dtype; by default it then turns 16-bit ones into float32.
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(args.adapter_dtype)
    return model


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Tensor, batch_size: int) -> float:
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for batch in blocks.to(device).split(batch_size):
        logits = model(input_ids=batch).logits[:, :-1].float()
        total += nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
    loss = total / blocks[:, 1:].numel()
    return math.inf if loss > 700 else math.exp(loss)


def sample(model: Any, tokenizer: Any, text: str, length: int = 60) -> str:
    """What the model writes after the first words of a paragraph of ``text``, as ``words | continuation``."""
    prompt = " ".join((text.partition("\n\n")[2] or text).split()[:5])
    inputs = tokenizer(prompt, add_special_tokens=False, return_token_type_ids=False, return_tensors="pt")
    model.eval()
    torch.manual_seed(0)
    ids = model.generate(
        **inputs.to(model.device),
        max_new_tokens=length,
        do_sample=True,
        top_k=20,
        temperature=0.7,
        pad_token_id=tokenizer.eos_token_id,
    )[0]
    return f"{prompt} |{tokenizer.decode(ids[inputs['input_ids'].shape[1] :])}"


# ------------------------------------------------------------------------------------------------------------ training


def train(model: Any, blocks: Tensor, args: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """Train with transformers' Trainer. Returns the loss curve, as (step, loss), and what it cost."""
    arguments = TrainingArguments(
        output_dir=str(args.output_dir),
        per_device_train_batch_size=args.batch_size,
        seed=args.seed,
        use_cpu=args.device.type == "cpu",
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        logging_strategy="steps",
        logging_steps=0.04,
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        label_names=["labels"],
        **settings,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # Trainer would split a step over all GPUs that it sees
    rows: Any = [{"input_ids": row, "labels": row} for row in blocks]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes the autocast of fp16 off again
    tokens = trainer.state.global_step * min(args.batch_size, len(blocks)) * blocks.shape[1]
    figures = {
        "loss": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "seconds": result.metrics["train_runtime"],
        "tokens_per_second": tokens / result.metrics["train_runtime"],
    }
    if args.device.type == "cuda":
        figures["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


def cost(figures: dict[str, Any]) -> str:
    memory = f", {figures['peak_gpu_gib']:.1f} GiB of GPU memory" if "peak_gpu_gib" in figures else ""
    return f"{figures['seconds']:.0f} s, {figures['tokens_per_second']:,.0f} tokens/s{memory}"


def make_base_model(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Train a small Qwen3-MoE from nothing. Returns the folder it is saved in, and its figures."""
    train_text, held_out_text = split(python_reference())
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(train_text, vocab_size=VOCABULARY, special_tokens=["<|end|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>")
    blocks, held_out = (to_blocks(tokenizer, pieces, args.seq_len) for pieces in (train_text, held_out_text))

    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        max_position_embeddings=max(512, args.seq_len),
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3MoeForCausalLM(config).to(args.device)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"Base model: {size / 1e6:.1f}M parameters, {blocks.numel():,} tokens of Python's reference pages")

    figures = train(
        model,
        blocks,
        args,
        max_steps=args.pretrain_steps,
        learning_rate=6e-3,
        weight_decay=0.1,
        adam_beta2=0.95,
    )
    figures["uniform_perplexity"] = float(VOCABULARY)
    figures["perplexity"] = perplexity(model, held_out, args.batch_size)
    print(f"Held-out perplexity {figures['perplexity']:.1f}; guessing uniformly {VOCABULARY} ({cost(figures)})")
    print(f"Sample: {sample(model, tokenizer, held_out_text[0])!r}\n")

    folder = str(args.output_dir / "base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, figures


def fine_tune(base: str, text: str, kernel: Any | None, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune an adapter on the model in ``base``, save it, and compare it with stock PEFT. Returns its figures."""
    tokenizer = load_tokenizer(base)
    model = load_model(base, args.dtype, args.device)
    targets = expert_parameters(model)
    if not targets:
        raise UserError(f"{base} has no experts for LoRA: transformers marks none in {type(model).__name__}")
    model.config.use_cache = False
    train_text, held_out_text = split(text)
    blocks, held_out = (to_blocks(tokenizer, pieces, args.seq_len) for pieces in (train_text, held_out_text))
    held_out = held_out[: args.eval_blocks]
    print(f"Fine-tuning on {blocks.numel():,} tokens, {held_out.numel():,} held out")

    model = add_lora(model, targets, args)
    print(f"LoRA rank {args.rank} on {', '.join([*targets, *args.target_modules])}: ", end="")
    model.print_trainable_parameters()
    if kernel is not None:
        try:
            print(kernel.kernelize(model))
        except ValueError as error:
            raise UserError(f"the kernel finds nothing to do in {base}: {error}") from error

    before = perplexity(model, held_out, args.batch_size)
    figures = train(
        model,
        blocks,
        args,
        max_steps=args.max_steps or -1,
        num_train_epochs=args.epochs,
        learning_rate=args.lr,
        # The float32 gradients of float16 products need a scaled loss; Trainer only has one with its autocast.
        fp16=args.dtype == torch.float16 and args.device.type == "cuda",
        gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    after = perplexity(model, held_out, args.batch_size)
    print(f"Held-out perplexity {before:.1f} -> {after:.1f} ({cost(figures)})")

    probe = held_out[:2].to(args.device)
    with torch.no_grad():
        tuned = model(input_ids=probe).logits.float()
    folder = str(args.output_dir / "adapter")
    model.save_pretrained(folder)
    del model  # a large model fits only once
    gc.collect()
    torch.cuda.empty_cache()

    stock = PeftModel.from_pretrained(
        load_model(base, args.dtype, args.device), folder, autocast_adapter_dtype=args.adapter_dtype != args.dtype
    ).eval()
    with torch.no_grad():
        expected = stock(input_ids=probe).logits.float()
        with stock.disable_adapter():
            untuned = stock(input_ids=probe).logits.float()
    if not 0 < expected.norm() < math.inf:  # of stock PEFT, whoever trained
        raise UserError(f"the training diverged, held-out perplexity {after:g}: take a lower --lr than {args.lr:g}")
    difference, effect = (((logits - expected).norm() / expected.norm()).item() for logits in (tuned, untuned))
    print(f"Stock PEFT with the saved adapter: logits within {difference:.1e}; the adapter moves them by {effect:.1e}")
    print(f"Sample: {sample(stock, tokenizer, held_out_text[0])!r}")
    return {
        "kernel": kernel is not None,
        "perplexity_before": before,
        "perplexity_after": after,
        "logits_difference": difference,
        "adapter_effect": effect,
        **figures,
    }


def draw(figures: dict[str, Any], file: Path) -> None:
    """The loss curve of each phase, side by side, with the held-out loss before and after the fine-tuning."""
    figure = Figure(figsize=(5 * len(figures), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (phase, values) in enumerate(figures.items(), 1):
        axes = figure.add_subplot(1, len(figures), number)
        axes.plot(*zip(*values["loss"], strict=True), label="training")
        for key, style in (("perplexity_before", ":"), ("perplexity_after", "--"), ("perplexity", "--")):
            if key in values:
                label = f"held out{key.removeprefix('perplexity').replace('_', ', ')}"
                axes.axhline(math.log(values[key]), color="black", linestyle=style, label=label)
        axes.set(title=phase, xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
    figure.savefig(file, dpi=120)


# -------------------------------------------------------------------------------------------------------- command line


def positive(text: str, least: int = 1) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is less than {least}")
    return number


def rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{number:g} is not positive and finite")
    return number


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is not in [0, 2**32)")
    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="Hub id or folder of a causal language model with experts (default: make a small one)")
    add("--data", type=Path, help="text file to fine-tune on (default: the licences of the installed packages)")
    add("--rank", type=positive, default=16, help="LoRA rank (default: %(default)s)")
    add("--alpha", type=rate, default=32, help="LoRA alpha (default: %(default)s)")
    add("--target-modules", nargs="+", default=[], metavar="NAME", help="linear layers too, such as q_proj")
    add("--lr", type=rate, help="peak learning rate (default: 2e-4 with --model, else 5e-3)")
    add("--epochs", type=positive, default=3, help="passes over the text (default: %(default)s)")
    add("--max-steps", type=positive, help="stop after so many steps, whatever --epochs says")
    add("--batch-size", type=positive, default=8, help="rows in a step (default: %(default)s)")
    add("--seq-len", type=partial(positive, least=2), default=128, help="tokens in a row (default: %(default)s)")
    add("--eval-blocks", type=positive, default=256, help="held-out rows to measure, at most (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on cuda, else float32")
    add("--adapter-dtype", choices=("float32", "bfloat16"), default="float32", help="(default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--output-dir", type=Path, default=Path("finetune-output"), help="(default: %(default)s)")
    add("--seed", type=seed, default=0, help="(default: %(default)s)")
    add("--pretrain-steps", type=positive, default=700, help="steps that make the small model (default: %(default)s)")
    add("--kernel-repo", default="org/scattermoe-lora", help="(default: %(default)s)")
    add("--kernel-version", type=int, default=1, help="(default: %(default)s)")
    add("--no-kernel", action="store_true", help="plain PEFT, for comparison")
    args = parser.parse_args(argv)

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    args.device = torch.device("cuda:0" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    args.dtype = getattr(torch, args.dtype or ("bfloat16" if args.device.type == "cuda" else "float32"))
    args.adapter_dtype = getattr(torch, args.adapter_dtype)
    if args.lr is None:
        args.lr = 2e-4 if args.model else 5e-3
    return args


def read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parse(argv)
        text = installed_licences() if args.data is None else read(args.data)
        if len(text) < 10 * args.seq_len:  # seen here, not after the small model has been trained
            raise UserError(f"the text is too short: {len(text)} characters, and a tenth of it must fill --seq-len")
        make_folder(args.output_dir)
        set_seed(args.seed)
        figures: dict[str, Any] = {}
        kernel = None if args.no_kernel else load_kernel(args.kernel_repo, args.kernel_version)
        base = args.model
        if base is None:
            # The small model's products are tiny: a second thread made it 1.6 times as fast on an idle machine, and 13
            # times as slow where another process wanted that core.
            torch.set_num_threads(1)
            base, figures["pre-training"] = make_base_model(args)
        figures["fine-tuning"] = fine_tune(base, text, kernel, args)
    except UserError as error:
        print(f"finetune.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    draw(figures, args.output_dir / "loss.png")
    (args.output_dir / "metrics.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(f"Adapter, loss curve and figures: {args.output_dir}")
    bound = LOGITS_BOUND[args.dtype]
    if not figures["fine-tuning"]["logits_difference"] <= bound:  # "not <=": a NaN fails too
        print(f"finetune.py: error: the logits differ from stock PEFT's by more than {bound}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
