"""Training as users do it: TRL's trainers, offloaded activations, autocast, adapters beside the experts'."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from numerics import assert_close, relative_error
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from tiny import BOUND, SMALL, check_same, loss_and_grads, targets, tiny_model, tokens, wrap
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


def everywhere(**changes) -> LoraConfig:
    """LoRA on attention, shared expert, router and experts together, as a user would write it."""
    return LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "shared_expert.gate_proj", "shared_expert.up_proj"],
        target_parameters=[*targets("qwen2_moe"), "mlp.gate.weight"],
        **changes,
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, SMALL["vocab_size"])}}
    model = Tokenizer(WordLevel(words, unk_token="<pad>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>")


def sentences(count: int) -> list[str]:
    return [" ".join(f"w{2 + (3 * i + 5 * j) % 60}" for j in range(8 + i % 5)) for i in range(count)]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "gradient checkpointing"])
def test_sft_trainer(kernel, ran, tmp_path, tokenizer, checkpointing):
    """TRL's `SFTTrainer`, with the kernel and without: the same losses, and an adapter that stock PEFT loads."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": sentences(16)})
    losses, adapters = {}, {}
    for name in ("stock", "fused"):
        torch.manual_seed(7)
        model = get_peft_model(tiny_model("qwen2_moe"), everywhere())
        if name == "fused":
            report = kernel.kernelize(model)
            assert len(report.switched) == 2 and not report.left
        arguments = SFTConfig(
            output_dir=str(tmp_path / name),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=checkpointing,
            max_length=16,
            seed=1,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer)
        with ran:
            trainer.train()
        forwards = 2 * 6 * (2 if checkpointing else 1)
        expected = {"moe_mlp_forward": forwards, "moe_mlp_backward": 12} if name == "fused" else {}
        assert ran.ops == expected and (ran.merges == 0) == (name == "fused")
        losses[name] = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        trainer.save_model(str(tmp_path / name))
        adapters[name] = get_peft_model_state_dict(trainer.model)
        trained = trainer.model.eval()
    assert len(losses["fused"]) == 6 and losses["fused"][-1] < losses["fused"][0] - 0.1
    assert (losses["fused"] - losses["stock"]).abs().max() < 2e-3
    assert adapters["fused"].keys() == adapters["stock"].keys()
    kinds = ("experts.lora_A", "experts.base_layer.lora_B", "q_proj.lora_A", "gate.lora_B", "up_proj.lora_A")
    assert all(any(kind in name for name in adapters["fused"]) for kind in kinds), list(adapters["fused"])
    loaded = PeftModel.from_pretrained(tiny_model("qwen2_moe"), tmp_path / "fused").eval()
    ids = tokens()
    with ran, torch.no_grad():
        want = loaded(input_ids=ids).logits
    assert ran.merges and not ran.ops
    with torch.no_grad():
        assert_close({"logits": (trained(input_ids=ids).logits, want)}, BOUND)
        with loaded.disable_adapter():
            assert relative_error(want, loaded(input_ids=ids).logits) > 1e-2


def test_dpo_with_a_reference_adapter(kernel, ran):
    """DPO's two adapters of one model: the policy's gradients through a loss that needs the reference's log-probs."""
    chosen, rejected = tokens(2, 9), tokens(4, 9)[2:]

    def loss_and_gradients(model):
        def margin() -> torch.Tensor:
            first, second = (model(input_ids=ids).logits.log_softmax(-1) for ids in (chosen, rejected))
            scores = [
                logits[:, :-1].gather(-1, ids[:, 1:, None]).sum((1, 2))
                for logits, ids in ((first, chosen), (second, rejected))
            ]
            return scores[0] - scores[1]

        model.set_adapter("reference")
        with torch.no_grad():
            reference = margin()
        model.set_adapter("default")
        model.zero_grad(set_to_none=True)
        policy = margin()
        torch.nn.functional.logsigmoid(0.1 * (policy - reference)).sum().neg().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return torch.stack((policy.detach(), reference)), grads

    def build():
        model = wrap(tiny_model("qwen3_moe"), "qwen3_moe")
        torch.manual_seed(6)
        model.add_adapter("reference", copy.deepcopy(model.peft_config["default"]))
        return model

    want = loss_and_gradients(build())
    model = build()
    kernel.kernelize(model)
    with ran:
        got = loss_and_gradients(model)
    check_same(got, want)
    assert ran.ops == {"moe_mlp_forward": 8, "moe_mlp_backward": 4} and not ran.merges
    assert got[1] and all("default" in name for name in got[1]), "the reference learns nothing"


def test_offloaded_activations(kernel, ran):
    """What is kept for the backward may be packed away and come back."""
    ids = tokens()
    model = wrap(tiny_model("qwen3_moe"), "qwen3_moe")
    kernel.kernelize(model)
    want_logits, want = loss_and_grads(model, ids)
    packed = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor.numel())
        return tensor.clone()  # somewhere else, as save_on_cpu's

    with ran, torch.autograd.graph.saved_tensors_hooks(pack, torch.clone):
        logits, grads = loss_and_grads(model, ids)
    assert packed and ran.ops["moe_mlp_backward"] == 2
    with torch.autograd.graph.save_on_cpu():
        offloaded, offloaded_grads = loss_and_grads(model, ids)
    for other_logits, other in ((logits, grads), (offloaded, offloaded_grads)):
        assert torch.equal(other_logits, want_logits)
        assert other.keys() == want.keys() and all(torch.equal(other[name], want[name]) for name in want)


def test_everything_adapted_under_autocast(kernel, ran):
    """float32 adapters on a bfloat16 base, everywhere at once: float32 gradients, as close as PEFT's own."""
    ids = tokens()

    def build(dtype):
        torch.manual_seed(4)
        return get_peft_model(tiny_model("qwen2_moe").to(dtype), everywhere(init_lora_weights=False))

    stock = build(torch.bfloat16)  # PEFT makes the adapters float32
    fused = copy.deepcopy(stock)
    exact = build(torch.float32)
    exact.load_state_dict({name: tensor.float() for name, tensor in stock.state_dict().items()})
    kernel.kernelize(fused)
    _, want = loss_and_grads(exact, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, theirs = loss_and_grads(stock, ids)
        with ran:
            _, ours = loss_and_grads(fused, ids)
    assert ran.ops["moe_mlp_backward"] == 2 and not ran.merges
    assert ours.keys() == want.keys() == theirs.keys()
    for name, grad in ours.items():
        assert grad.dtype == torch.float32, name
        errors = [relative_error(value, want[name]) for value in (grad, theirs[name])]
        # bfloat16 moves tokens across routing ties, for PEFT as for us: no worse than half as much again.
        assert errors[0] <= max(1.5 * errors[1], 0.05), (name, errors)


def test_modules_to_save(kernel, ran, tmp_path):
    """A fully trained copy of a module beside the adapters is trained and saved as ever."""
    ids = tokens()

    def build():
        return wrap(tiny_model("qwen3_moe"), "qwen3_moe", modules_to_save=["lm_head"])

    stock, fused = build(), build()
    want = loss_and_grads(stock, ids)
    kernel.kernelize(fused)
    with ran:
        got = loss_and_grads(fused, ids)
    check_same(got, want)
    assert ran.ops["moe_mlp_backward"] == 2 and any("modules_to_save" in name for name in got[1])
    state, stock_state = get_peft_model_state_dict(fused), get_peft_model_state_dict(stock)
    assert state.keys() == stock_state.keys() and any("lm_head" in name for name in state)
    assert all(torch.equal(state[name], stock_state[name]) for name in state)
    fused.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("qwen3_moe"), tmp_path)
    with torch.no_grad():
        assert_close({"logits": (fused(input_ids=ids).logits, loaded(input_ids=ids).logits)}, BOUND)


@pytest.mark.parametrize("stopped", ["in the adapter", "after it"])
def test_an_interrupted_save(kernel, ran, tmp_path, monkeypatch, stopped):
    """A run that dies while it saves: stock PEFT takes no half adapter, and the run goes on from the save before."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    data = Dataset.from_dict({"input_ids": tokens(12, 8).tolist()}).map(lambda row: {"labels": row["input_ids"]})

    def train(out, **options) -> Trainer:
        torch.manual_seed(3)
        model = get_peft_model(tiny_model("qwen2_moe"), everywhere())
        kernel.kernelize(model)
        arguments = TrainingArguments(
            output_dir=str(out),
            max_steps=4,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            seed=1,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        with ran:
            trainer.train(**options)
        assert ran.ops and not ran.merges
        return trainer

    whole = get_peft_model_state_dict(train(tmp_path / "whole").model)

    save = PeftModel.save_pretrained

    def dies(model, folder, *arguments, **options):
        save(model, folder, *arguments, **options)
        if "checkpoint-4" in str(folder):
            file = next(Path(folder).glob("*.safetensors"))
            if stopped == "in the adapter":
                file.write_bytes(file.read_bytes()[:1000])
            raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(PeftModel, "save_pretrained", dies)
        train(tmp_path / "stopped")
    half, before = (next((tmp_path / "stopped").rglob(f"checkpoint-{step}")) for step in (4, 2))
    if stopped == "in the adapter":
        with pytest.raises(SafetensorError):
            PeftModel.from_pretrained(tiny_model("qwen2_moe"), half)
    PeftModel.from_pretrained(tiny_model("qwen2_moe"), before)
    resumed = get_peft_model_state_dict(train(tmp_path / "stopped", resume_from_checkpoint=str(before)).model)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
