"""`moe_mlp`: a whole experts layer, LoRA included, as one differentiable function."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .activation import activate_rows, fused_names, is_fused
from .checks import FLOATS, INTEGERS, Arguments, is_traced, needs_autograd, probability
from .once import differentiable_once
from .parallel_linear import expert_linear, flatten_sort_count
from .reference import DROPPED_ACTIVATION, DROPPED_INPUT
from .types import ExpertLoRA


def moe_mlp(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    gate_up_lora: ExpertLoRA | None = None,
    down_lora: ExpertLoRA | None = None,
    gate_up_proj_bias: Tensor | None = None,
    down_proj_bias: Tensor | None = None,
    is_transposed: bool = False,
    is_concatenated: bool = True,
    has_gate: bool = True,
    activation: str | Callable[[Tensor], Tensor] = "silu",
    expert_norm: Callable[[Tensor], Tensor] | None = None,
    expert_parallel: bool = False,
    lora_dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """The experts layer: ``out[t] = sum_j w[t, j] * down_e(act(gate_up_e(x[t])))`` with ``e = top_k_index[t, j]``.

    Each projection is ``W_e x + scaling * B_e (A_e dropout(x)) + bias_e``. Computed in the weights' dtype with float32
    accumulation; differentiable once with respect to every floating point argument, frozen ones cost nothing.

    Args:
        hidden_states: ``[T, H]``, bfloat16, float16 or float32 (float64 on the CPU).
        gate_up_proj: ``[E, 2I, H]`` as transformers stores it; ``[E, H, 2I]`` if ``is_transposed``; ``I`` for ``2I``
            without a gate. Never copied: any strides will do.
        down_proj: ``[E, H, I]``; ``[E, I, H]`` if ``is_transposed``; the same dtype.
        top_k_index: int32 or int64 ``[T, k]``, the experts of each token.
        top_k_weights: floating point ``[T, k]``, the routing weight of each choice.
        gate_up_lora: ``A [E, r, H]``, ``B [E, 2I, r]``.
        down_lora: ``A [E, r, I]``, ``B [E, H, r]``.
        gate_up_proj_bias: ``[E, 2I]``; down_proj_bias: ``[E, H]``, weighted like the rest of the expert's output.
        is_concatenated: gate and up columns are ``[gate; up]``; else they alternate, gate first.
        has_gate: False for ``act(up x)`` without a gate: ``gate_up_proj`` is then the up projection.
        activation: one of ``identity, silu, gelu, gelu_tanh, relu, relu2`` or, with a gate, gpt-oss's kind,
            ``clamped_glu(alpha, limit, shift)`` with numbers (`reference.clamped_glu`), fused; or a function from the
            pre-activation ``[S, 2I]`` (grouped rows, the module's own column order) to ``[S, I]``, which runs between
            two fused products and may be anything autograd knows.
        expert_norm: applied to every expert's output, ``[S, H]`` to ``[S, H]``, before the routing weight.
        expert_parallel: accept ids >= E, transformers' expert-parallel sentinels: no work, no output, no gradient.
        lora_dropout: the probability, in ``[0, 1)``, that an element of what LoRA reads counts as zero; the others are
            divided by ``1 - lora_dropout``. A token's input is dropped once for all its experts, the input of
            ``down_proj`` for each choice. 0 costs nothing.
        dropout_seed: int64 ``[1]``, on the device of the rest: the mask is a hash of it and is never kept. None
            draws one from torch's generator of the device, so `torch.manual_seed` repeats it, and so does gradient
            checkpointing, which restores the generator.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong dtype, also beside the others'.
        ValueError: shapes or devices that do not go together, an activation that is none of these; on the CPU also ids
            out of range.
    """
    args = Arguments("moe_mlp")
    args.flag("is_transposed", is_transposed)
    args.flag("is_concatenated", is_concatenated)
    args.flag("has_gate", has_gate)
    args.flag("expert_parallel", expert_parallel)
    args.tensor("hidden_states", hidden_states, ("T", "H"), FLOATS)
    up_shape = ("E", "H", "2I" if has_gate else "I") if is_transposed else ("E", "2I" if has_gate else "I", "H")
    args.tensor("gate_up_proj", gate_up_proj, up_shape, FLOATS)
    if has_gate:
        if args.size("2I") % 2:
            raise args.fail("gate_up_proj", "of even width 2I with a gate", f"shape {tuple(gate_up_proj.shape)}")
        args.bind("I", args.size("2I") // 2, "gate_up_proj")
    args.tensor("down_proj", down_proj, ("E", "I", "H") if is_transposed else ("E", "H", "I"), (gate_up_proj.dtype,))
    args.tensor("top_k_index", top_k_index, ("T", "k"), INTEGERS)
    args.tensor("top_k_weights", top_k_weights, ("T", "k"), FLOATS)
    if args.size("k") == 0 or args.size("E") == 0:
        got = f"k = {args.size('k')} and E = {args.size('E')}"
        raise args.fail("top_k_index and gate_up_proj", "of at least one choice and one expert", got)
    if gate_up_proj_bias is not None:
        args.tensor("gate_up_proj_bias", gate_up_proj_bias, ("E", "2I" if has_gate else "I"), FLOATS)
    if down_proj_bias is not None:
        args.tensor("down_proj_bias", down_proj_bias, ("E", "H"), FLOATS)
    args.lora("gate_up_lora", gate_up_lora, "H", "2I" if has_gate else "I")
    args.lora("down_lora", down_lora, "I", "H")
    lora_dropout = probability("moe_mlp", "lora_dropout", lora_dropout)
    if dropout_seed is not None:
        args.tensor("dropout_seed", dropout_seed, ("seeds",), (torch.int64,))
        if args.size("seeds") != 1:
            raise args.fail("dropout_seed", "of one element", f"shape {tuple(dropout_seed.shape)}")
    args.expert_ids("top_k_index", top_k_index, args.size("E"), allow_sentinels=expert_parallel)

    if not callable(activation) and not is_fused(activation, has_gate):
        raise args.fail("activation", f"a function or one of {fused_names(has_gate)}", repr(activation))
    if expert_norm is not None and not callable(expert_norm):
        raise TypeError(f"moe_mlp: expert_norm must be a function or None, got {type(expert_norm).__name__}")
    if expert_norm is not None and not callable(activation):
        activation = functools.partial(
            activate_rows, activation=activation, has_gate=has_gate, is_concatenated=is_concatenated
        )
    if lora_dropout == 0.0 or (gate_up_lora is None and down_lora is None):
        lora_dropout, dropout_seed = 0.0, None
    elif dropout_seed is None:
        dropout_seed = torch.randint(2**63 - 1, (1,), device=hidden_states.device)
    if callable(activation):
        return _composed(
            hidden_states,
            gate_up_proj if is_transposed else gate_up_proj.mT,
            down_proj if is_transposed else down_proj.mT,
            top_k_index,
            top_k_weights,
            gate_up_lora,
            down_lora,
            gate_up_proj_bias,
            down_proj_bias,
            activation,
            expert_norm,
            lora_dropout,
            dropout_seed,
            expert_parallel,
            args,
        )

    tensors = (
        hidden_states,
        gate_up_proj,
        down_proj,
        gate_up_proj_bias,
        down_proj_bias,
        *((None, None) if gate_up_lora is None else gate_up_lora.factors),
        *((None, None) if down_lora is None else down_lora.factors),
        top_k_weights,
    )
    flags = (
        1.0 if gate_up_lora is None else float(gate_up_lora.scaling),
        1.0 if down_lora is None else float(down_lora.scaling),
        is_transposed,
        is_concatenated,
        has_gate,
        activation,
        lora_dropout,
    )
    if needs_autograd(tensors):
        return _MoeMlp.apply(flags, top_k_index, dropout_seed, *tensors)
    return ops.moe_mlp_forward(*tensors, top_k_index, dropout_seed, *flags, [])[0]


def _graph_is_freed(*tensors: Tensor) -> bool:
    """Whether what was saved for the running backward is of no use after it: without ``retain_graph``, in eager mode.

    A third of a step's peak is the gradient of ``h``, which then needs no memory of its own.
    """
    if is_traced(*tensors):  # a traced op does not write over its inputs, as a graph may be kept when it runs
        return False
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)  # since torch 2.5
    return keeps_graph is not None and not keeps_graph()


class _MoeMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flags, top_k_index, dropout_seed, *tensors):
        needs = list(ctx.needs_input_grad[3:]) if any(ctx.needs_input_grad) else []
        out, *saved = ops.moe_mlp_forward(*tensors, top_k_index, dropout_seed, *flags, needs)
        ctx.save_for_backward(*tensors, top_k_index, dropout_seed, *saved)
        ctx.flags = flags
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout):
        needs = list(ctx.needs_input_grad[3:])
        h = saved[-6]  # see `moe_mlp_forward`
        overwrite = _graph_is_freed(dout, h)
        if overwrite:
            torch.autograd.graph.increment_version(h)  # so that a second try, if this one fails, is torch's error
        grads = iter(ops.moe_mlp_backward(dout, *saved, *ctx.flags, needs, overwrite))
        return (None, None, None, *(next(grads) if need else None for need in needs))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, seed, p, stream, rows):
        ctx.save_for_backward(seed, rows)
        ctx.options = p, stream
        return ops.dropout(x, seed, p, stream, rows)

    @staticmethod
    @differentiable_once
    def backward(ctx, saved, dout):
        seed, rows = saved
        return ops.dropout(dout, seed, *ctx.options, rows), None, None, None, None


def _composed(
    hidden_states: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up_lora: ExpertLoRA | None,
    down_lora: ExpertLoRA | None,
    gate_up_proj_bias: Tensor | None,
    down_proj_bias: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    expert_norm: Callable[[Tensor], Tensor] | None,
    lora_dropout: float,
    dropout_seed: Tensor | None,
    expert_parallel: bool,
    args: Arguments,
) -> Tensor:
    """The same layer with any activation and norm: two fused linears, and the functions between and after them."""
    num_experts, k = w_up.shape[0], top_k_index.shape[1]
    no_expert = None
    if expert_parallel:
        no_expert = (top_k_index < 0) | (top_k_index >= num_experts)
        top_k_weights = top_k_weights.masked_fill(no_expert, 0.0)
    _, scattered_idxs, expert_offsets = flatten_sort_count(top_k_index, num_experts)
    order = (scattered_idxs, expert_offsets)

    def linear(x, weight, fan_out, lora, stream, rows, *, bias, gates, **layout):
        if lora is None or dropout_seed is None:
            return expert_linear(x, weight, fan_out, *order, lora=lora, bias=bias, gates=gates, **layout)
        # Three linears: what LoRA reads is not what the base reads.
        out = expert_linear(x, weight, fan_out, *order, bias=bias, gates=gates, **layout)
        x = _Dropout.apply(x, dropout_seed, lora_dropout, stream, rows)
        A, B = lora.A.mT.to(weight.dtype), lora.B.mT.to(weight.dtype)
        z = expert_linear(x, A, fan_out, *order, **(layout | {"grouped_out": True}))
        return out + lora.scaling * expert_linear(z, B, 1, *order, gates=gates, **(layout | {"grouped_in": True}))

    x = hidden_states.to(w_up.dtype)
    h = linear(x, w_up, k, gate_up_lora, DROPPED_INPUT, None, bias=gate_up_proj_bias, gates=None, grouped_out=True)
    a = activation(h)
    args.bind("S", h.shape[0], "h")
    a = args.tensor("activation(h)", a, ("S", "I"), FLOATS).to(h.dtype)
    gates = top_k_weights if expert_norm is None else None
    out = linear(
        a, w_down, 1, down_lora, DROPPED_ACTIVATION, scattered_idxs, bias=down_proj_bias, gates=gates, grouped_in=True
    )
    if expert_norm is not None:
        if no_expert is not None:  # ones for zeros, which a norm may divide by
            out = out.masked_fill(no_expert.reshape(-1, 1), 1.0)
        y = args.tensor("expert_norm(y)", expert_norm(out), ("S", "H"), FLOATS)
        out = (y.view(*top_k_index.shape, y.shape[1]) * top_k_weights[:, :, None]).sum(1)
    return out.to(hidden_states.dtype)
