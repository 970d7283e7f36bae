"""One linear of an expert stack, differentiable: ScatterMoE's and ScatterMoE-LoRA's functions, same arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .checks import FLOATS, INTEGERS, Arguments, needs_autograd
from .once import differentiable_once
from .types import ExpertLoRA


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the slots of a batch by expert.

    Args:
        expert_idxs: int32 or int64 ``[T, k]`` (or any shape): the experts of each token. Ids outside
            ``[0, num_experts)`` are sorted last and belong to no expert.
        num_experts: ``E``.

    Returns:
        ``(sorted_expert_idxs [S], sorted_scattered_idxs [S], expert_offsets [E])``, int64, ``S = T * k``: the expert
        and the slot of each grouped row, and the row after each expert's last (cumulative counts). The sort is stable.

    Raises:
        TypeError: ``expert_idxs`` is not an integer tensor, or ``num_experts`` not an int.
        ValueError: ``num_experts`` is less than 1, or there are more choices than can be counted in int32.
    """
    if not isinstance(expert_idxs, Tensor) or expert_idxs.dtype not in INTEGERS:
        got = expert_idxs.dtype if isinstance(expert_idxs, Tensor) else type(expert_idxs).__name__
        raise TypeError(f"flatten_sort_count: expert_idxs must be an int32 or int64 tensor, got {got}")
    args = Arguments("flatten_sort_count")
    args.choices("expert_idxs", expert_idxs, args.count("num_experts", num_experts))
    sorted_expert_idxs, sorted_scattered_idxs, expert_offsets = ops.route(expert_idxs, num_experts)
    return sorted_expert_idxs, sorted_scattered_idxs, expert_offsets


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """``y = x @ W[e] + bias[e]`` for every slot, each row by its own expert (ScatterMoE, arXiv 2403.08245).

    Args:
        inputs: ``[S / k, in]`` in token order, or ``[S, in]`` in grouped order if ``grouped_in``.
        expert_weights: ``[E, in, out]``, any strides; trainable or frozen.
        k: how many slots share a row of ``inputs``; 1 for inputs that have a row a slot.
        sorted_expert_idxs, sorted_scattered_idxs, expert_offsets: from `flatten_sort_count`.
        expert_biases: ``[E, out]``.
        gates: ``[T, k']`` with ``T * k' = S``: weights that sum a token's slots, ``out[t] = sum_j gates[t, j] * y``.
        grouped_out: leave the rows in grouped order; not with ``gates``.

    Returns:
        ``[T, out]`` with ``gates``, else ``[S, out]``, in the inputs' dtype. Rows of no expert are zeros.

    Raises:
        TypeError, ValueError: as for `moe_mlp`.
    """
    args = Arguments("parallel_linear")
    _check(args, inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, grouped_in)
    _check_rest(args, expert_biases, gates, grouped_out)
    tensors = (inputs, expert_weights, expert_biases, None, None, gates)
    return _linear(tensors, (sorted_scattered_idxs, expert_offsets), (k, 1.0, grouped_in, grouped_out))


def parallel_linear_lora(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """`parallel_linear` with ``+ scaling * B_e (A_e x)``, fused forward and backward.

    Args:
        lora_A: ``[E * r, in]``, expert-major; lora_B: ``[out, E * r]``, expert-major. Both or neither. For PEFT's
            layout use `ExpertLoRA.from_peft` and `moe_mlp`.
        scaling: multiplies the update; ``0.0`` means none of it.

    The other arguments, the result and the errors are those of `parallel_linear`.
    """
    args = Arguments("parallel_linear_lora")
    _check(args, inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets, grouped_in)
    _check_rest(args, expert_biases, gates, grouped_out)
    if args.has_lora(lora_A, lora_B):
        args.factors(lora_A, lora_B, scaling, "in", "out")
    else:
        scaling = 1.0
    tensors = (inputs, expert_weights, expert_biases, lora_A, lora_B, gates)
    return _linear(tensors, (sorted_scattered_idxs, expert_offsets), (k, float(scaling), grouped_in, grouped_out))


def expert_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    scattered_idxs: Tensor,
    expert_offsets: Tensor,
    *,
    lora: ExpertLoRA | None = None,
    bias: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """`parallel_linear_lora` with factors by expert; arguments are taken as checked."""
    A, B, scaling = (None, None, 1.0) if lora is None else (lora.A, lora.B, float(lora.scaling))
    tensors = (inputs, expert_weights, bias, A, B, gates)
    return _linear(tensors, (scattered_idxs, expert_offsets), (k, scaling, grouped_in, grouped_out))


Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _linear(tensors: Tensors, routing: tuple[Tensor, Tensor], flags: tuple[int, float, bool, bool]) -> Tensor:
    """The differentiable function behind all; of ``tensors`` the factors are by expert, or expert-major as given."""
    if needs_autograd(tensors):
        return _ExpertLinear.apply(flags, routing, *tensors)
    return ops.parallel_linear_forward(*tensors, *routing, *flags, [])[0]


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flags, routing, *tensors):
        needs = list(ctx.needs_input_grad[2:]) if any(ctx.needs_input_grad) else []
        out, *saved = ops.parallel_linear_forward(*tensors, *routing, *flags, needs)
        ctx.save_for_backward(*tensors, *saved, *routing)
        ctx.flags = flags
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout):
        needs = list(ctx.needs_input_grad[2:])
        grads = iter(ops.parallel_linear_backward(dout, *saved, *ctx.flags, needs))
        return None, None, *(next(grads) if need else None for need in needs)


def _check(
    args: Arguments,
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    grouped_in: bool,
) -> None:
    args.count("k", k)
    args.flag("grouped_in", grouped_in)
    args.tensor("inputs", inputs, ("rows", "in"), FLOATS)
    args.tensor("expert_weights", expert_weights, ("E", "in", "out"), FLOATS)
    if args.size("E") == 0:
        raise args.fail("expert_weights", "of at least one expert", f"shape {tuple(expert_weights.shape)}")
    args.tensor("sorted_scattered_idxs", sorted_scattered_idxs, ("S",), INTEGERS)
    args.tensor("sorted_expert_idxs", sorted_expert_idxs, ("S",), INTEGERS)
    args.tensor("expert_offsets", expert_offsets, ("E",), INTEGERS)
    fan_out = 1 if grouped_in else k
    if args.size("rows") * fan_out != args.size("S"):
        got = f"{args.size('rows')} rows for k = {k} and S = {args.size('S')}"
        raise args.fail("inputs", "[S, in] if grouped_in else [S / k, in]", got)
    args.routing(sorted_scattered_idxs, expert_offsets, sorted_expert_idxs)


def _check_rest(args: Arguments, expert_biases: Tensor | None, gates: Tensor | None, grouped_out: bool) -> None:
    args.flag("grouped_out", grouped_out)
    if expert_biases is not None:
        args.tensor("expert_biases", expert_biases, ("E", "out"), FLOATS)
    if gates is not None:
        args.tensor("gates", gates, ("T", "choices"), FLOATS)
        if args.size("choices") == 0 or args.size("T") * args.size("choices") != args.size("S"):
            must = f"[T, k] with k > 0 and T * k = S = {args.size('S')}"
            raise args.fail("gates", must, f"shape {tuple(gates.shape)}")
        if grouped_out:
            raise args.fail("grouped_out", "False with gates, which sum rows in token order", True)
