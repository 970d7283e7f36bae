"""The layers that `kernels` swaps in, one class a mapping name: pure, stateless forwards, as `kernels` requires.

All are defined in this file: kernel-builder lists on the Hub card only the classes that it finds here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.experts import (
    dispatches,
    experts_forward,
    has_another_forward,
    has_hooks,
    is_experts,
    put_forward,
)
from ..integrations.peft import active_lora, is_param_wrapper, param_wrapper_forward, unwrap
from ..moe_mlp import moe_mlp
from ..types import ExpertLoRA

__all__ = [
    "HFScatterMoEGatedMLP",
    "MegaBlocksMoeMLP",
    "ScatterMoEExperts",
    "ScatterMoEGatedMLP",
    "ScatterMoEParamWrapper",
]


class ScatterMoEExperts(nn.Module):
    """Replaces the forward of any transformers experts class (``@use_experts_implementation``)."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states [T, H]``, ``top_k_index [T, k]``, ``top_k_weights [T, k]``; returns ``[T, H]``."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


class ScatterMoEParamWrapper(nn.Module):
    """Replaces the forward of PEFT's ``ParamWrapper`` around experts: same result, no merged weight."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x [T, H]``, then the experts' ``top_k_index`` and ``top_k_weights``; returns ``[T, H]``."""
        return param_wrapper_forward(self, x, *args, **kwargs)


class HFScatterMoEGatedMLP(nn.Module):
    """Replaces a transformers block of a router, ``experts`` and, if it has them, shared experts and their gate.

    For blocks that return one tensor: Qwen2-MoE, Qwen3-MoE, OLMoE, Mixtral, DeepSeek-V3, GLM-4, GraniteMoe and their
    kin. The router is the block's own, ``gate`` or ``router``.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        """``hidden_states [B, L, H]``; returns ``[B, L, H]``."""
        return _block(self, hidden_states)[0]


class MegaBlocksMoeMLP(nn.Module):
    """Replaces gpt-oss's block, under the name that transformers gives it: it returns its router's scores too."""

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """``hidden_states [B, L, H]``; returns ``[B, L, H]`` and the routing weights ``[B * L, k]``."""
        return _block(self, hidden_states)


class ScatterMoEGatedMLP(nn.Module):
    """Replaces a GraniteMoe block: one of ``experts`` as transformers 5 has it, or one of stacked linears as before.

    The stacked linears are ``input_linear`` and ``output_linear``; then ``router`` has ``layer`` (a linear to ``E``
    logits) and ``top_k``; the weights of ``input_linear`` are ``[E, 2I, H]``, of ``output_linear`` ``[E, H, I]``, with
    biases and LoRA if they have them (`ParallelExperts`, or PEFT's wrapper of ``weight``); ``activation`` works on the
    gate half.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self: Any, layer_input: Tensor) -> Tensor:
        """``layer_input [B, L, H]``; returns ``[B, L, H]``. Routing weights are the softmax of the top-k logits."""
        if hasattr(self, "experts"):
            return _block(self, layer_input)[0]
        shape = layer_input.shape
        hidden_states = layer_input.reshape(-1, shape[-1])
        top_k_logits, top_k_index = self.router.layer(hidden_states).float().topk(self.router.top_k, dim=-1)
        top_k_weights = torch.softmax(top_k_logits, dim=-1).to(hidden_states.dtype)
        activation = self.activation

        def gated(h: Tensor) -> Tensor:
            gate, up = h.chunk(2, dim=-1)
            return activation(gate) * up

        up, up_bias, up_lora = _linear(self.input_linear)
        down, down_bias, down_lora = _linear(self.output_linear)
        out = moe_mlp(
            hidden_states,
            up,
            down,
            top_k_index,
            top_k_weights,
            gate_up_lora=up_lora,
            down_lora=down_lora,
            gate_up_proj_bias=up_bias,
            down_proj_bias=down_bias,
            activation="silu" if isinstance(activation, nn.SiLU) else gated,
        )
        return out.reshape(shape)


def _block(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """The forward of a block of router, experts and shared experts: its output, and the routing weights."""
    shape = hidden_states.shape
    jitter = getattr(block, "jitter_noise", 0.0)
    if block.training and jitter > 0:
        hidden_states *= torch.empty_like(hidden_states).uniform_(1.0 - jitter, 1.0 + jitter)
    hidden_states = hidden_states.reshape(-1, shape[-1])
    router = block.gate if hasattr(block, "gate") else block.router
    _, top_k_weights, top_k_index = router(hidden_states)
    out = _experts(block.experts, hidden_states, top_k_index, top_k_weights)
    for name in ("shared_expert", "shared_experts"):
        shared = getattr(block, name, None)
        if shared is not None:
            shared_out = shared(hidden_states)
            shared_gate = getattr(block, "shared_expert_gate", None)
            if shared_gate is not None:
                shared_out = torch.sigmoid(shared_gate(hidden_states)) * shared_out
            out = out + shared_out
    return out.reshape(shape), top_k_weights


def _experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    if not has_hooks([experts]) and not has_another_forward(experts):
        if is_param_wrapper(experts):
            return param_wrapper_forward(experts, hidden_states, top_k_index, top_k_weights)
        # transformers' tensor and expert parallelism put a forward around it.
        if is_experts(experts) and dispatches(experts) and put_forward(experts) is None:
            return experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    return experts(hidden_states, top_k_index, top_k_weights)


def _linear(module: Any) -> tuple[Tensor, Tensor | None, ExpertLoRA | None]:
    """Weight, bias and LoRA of an expert linear: a module with ``weight [E, out, in]``, or PEFT's wrapper of it."""
    wrappers, linear = unwrap(module)
    lora = None
    for wrapper in wrappers:
        if wrapper.parameter_name != "weight" or len(wrappers) > 1:
            raise ValueError(f"ScatterMoEGatedMLP: can't fuse LoRA on {wrapper.parameter_name}, only on weight")
        lora = active_lora(wrapper)
    if getattr(linear, "lora_A", None) is not None:
        if lora is not None:
            raise ValueError("ScatterMoEGatedMLP: an expert linear has both PEFT's LoRA and its own; take one off")
        lora = ExpertLoRA.from_expert_major(linear.lora_A, linear.lora_B, linear.num_experts, linear.scaling)
    return linear.weight, getattr(linear, "bias", None), lora
