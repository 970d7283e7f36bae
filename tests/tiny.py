"""Tiny random models of real transformers classes, their wrapping by PEFT, and what runs in them, for the tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

import peft.tuners.lora.layer as peft_layer
import torch
from numerics import assert_close
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

BOUND = 1e-5

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}

# What each family needs beside SMALL: its experts, and whatever its defaults make too large.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20,
    },
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "granitemoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
        "sliding_window": 8,
    },
}

# The experts' module path below a decoder layer, and the parameters that PEFT targets.
BLOCK = {"granitemoe": "block_sparse_moe"}


def targets(family: str) -> list[str]:
    block = BLOCK.get(family, "mlp")
    return [f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj"]


def tiny_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model, the same at every call, in float32 and train mode."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def wrap(model: PreTrainedModel, family: str, parameters: list[str] | None = None, **changes: Any) -> PeftModel:
    """PEFT around the experts, with factors that are not zero; the same factors at every call."""
    torch.manual_seed(4)
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **changes}
    return get_peft_model(model, LoraConfig(target_parameters=parameters or targets(family), **options))


def tokens(batch: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(0, SMALL["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(5))


def loss_and_grads(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradients of the language-model loss by parameter name."""
    model.zero_grad(set_to_none=True)
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), grads


def check_same(got, want, bound: float = BOUND) -> None:
    (logits, grads), (want_logits, want_grads) = got, want
    assert grads.keys() == want_grads.keys()
    assert_close({"logits": (logits, want_logits), **{n: (grads[n], want_grads[n]) for n in want_grads}}, bound)


class Ran(TorchDispatchMode):
    """Counts the kernel's ops and PEFT's merges that run inside it: the proof of which forward it was."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.merges = 0
        for proxy in (peft_layer._LoraFactorsProxy, peft_layer._LoraParameterProxy):
            monkeypatch.setattr(proxy, "forward", self._counted(proxy.forward))

    def _counted(self, forward):
        def counting(proxy, weight):
            self.merges += weight.dim() == 3  # an expert stack, not a router's matrix
            return forward(proxy, weight)

        return counting

    def __enter__(self) -> Ran:
        self.ops.clear()
        self.merges = 0
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scattermoe_lora" in func.namespace:
            self.ops[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))
