"""`activate`: the activation between two expert linears, one kernel forward and one backward."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .checks import FLOATS, Arguments, needs_autograd
from .once import differentiable_once
from .reference import ACTIVATIONS, clamped_glu_parameters


def activate(h: Tensor, activation: str = "silu", *, has_gate: bool = True, is_concatenated: bool = True) -> Tensor:
    """``act(gate) * up`` of every row, as `moe_mlp` has it between its products: what comes between two
    `parallel_linear_lora`.

    Args:
        h: ``[S, 2I]``, or ``[S, I]`` without a gate; bfloat16, float16 or float32 (float64 on the CPU).
        activation: one of ``identity, silu, gelu, gelu_tanh, relu, relu2`` or, with a gate,
            ``clamped_glu(alpha, limit, shift)`` with numbers (`reference.clamped_glu`).
        has_gate: False for ``act(h)``.
        is_concatenated: gate and up columns are ``[gate; up]``; else they alternate, gate first.

    Returns:
        ``[S, I]`` in the dtype of ``h``, computed in float32. Differentiable once; of the forward only ``h`` is kept.

    Raises:
        TypeError: ``h`` is not a floating point tensor, or a flag not a bool.
        ValueError: ``h`` is no matrix, or of odd width with a gate; an activation that is none of these.
    """
    args = Arguments("activate")
    args.flag("has_gate", has_gate)
    args.flag("is_concatenated", is_concatenated)
    args.tensor("h", h, ("S", "2I" if has_gate else "I"), FLOATS)
    if has_gate and args.size("2I") % 2:
        raise args.fail("h", "of even width 2I with a gate", f"shape {tuple(h.shape)}")
    if not is_fused(activation, has_gate):
        raise args.fail("activation", f"one of {fused_names(has_gate)}", repr(activation))
    return activate_rows(h, activation, has_gate, is_concatenated)


def activate_rows(h: Tensor, activation: str, has_gate: bool, is_concatenated: bool) -> Tensor:
    """`activate`; arguments are taken as checked."""
    if needs_autograd([h]):
        return _Activate.apply(h, activation, has_gate, is_concatenated)
    return ops.activate(h, activation, has_gate, is_concatenated)


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, *flags):
        ctx.save_for_backward(h)
        ctx.flags = flags
        return ops.activate(h, *flags)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, da):
        return ops.activate_backward(da, *saved, *ctx.flags), None, None, None


def is_fused(activation: object, has_gate: bool) -> bool:
    """Whether an activation is one that the kernels have."""
    if not isinstance(activation, str):
        return False
    if activation in ACTIVATIONS:
        return True
    try:
        return has_gate and clamped_glu_parameters(activation) is not None
    except ValueError:
        return False


def fused_names(has_gate: bool) -> str:
    """Those that it may be, for an error."""
    return ", ".join([*ACTIVATIONS, *(["clamped_glu(alpha, limit, shift)"] if has_gate else [])])
