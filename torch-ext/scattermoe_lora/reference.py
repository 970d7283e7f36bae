"""The whole computation in plain PyTorch: the oracle of the tests, the CPU backend, and what to read first.

The first half is the definition: `moe_mlp` and `parallel_linear` as one would write them on a blackboard, a loop over
the experts, differentiable by autograd. In float64 it is what every other path is judged by.

The second half is the CPU backend: the eight kernels of `triton_kernels/` with the same names, arguments and results,
each a loop over experts of dense matrix products. The operands of one call share one dtype. Rows of no expert come
back as zeros.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operands import is_read_as_it_is
from .types import ExpertLoRA, Routing

# ---------------------------------------------------------------------------------------------------------------------
# The definition
# ---------------------------------------------------------------------------------------------------------------------


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
    lora_dropout: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """The experts layer by definition; arguments as in the package's `moe_mlp`. Returns ``[T, H]``.

    What LoRA reads is dropped by token before the first projection, by slot before the second.
    """
    if not is_transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    k = top_k_index.shape[1]
    out = torch.zeros_like(hidden_states)

    def update(x: Tensor, lora: ExpertLoRA | None, e: int, stream: int, rows: Tensor) -> Tensor | float:
        if lora is None:
            return 0.0
        if lora_dropout:
            assert dropout_seed is not None
            keep = dropout_keep(dropout_seed, rows, x.shape[1], p=lora_dropout, stream=stream)
            x = torch.where(keep, x / (1.0 - lora_dropout), 0.0)
        return lora.scaling * (x @ lora.A[e].mT.to(x.dtype)) @ lora.B[e].mT.to(x.dtype)

    for e, (w_up, w_down) in enumerate(zip(gate_up_proj.unbind(), down_proj.unbind(), strict=True)):
        token, choice = torch.where(top_k_index == e)
        x = hidden_states[token]
        h = x @ w_up + update(x, gate_up_lora, e, DROPPED_INPUT, token)
        if gate_up_proj_bias is not None:
            h = h + gate_up_proj_bias[e]
        a = activation(h) if callable(activation) else activate(h, activation, has_gate, is_concatenated)
        y = a @ w_down + update(a, down_lora, e, DROPPED_ACTIVATION, token * k + choice)
        if down_proj_bias is not None:
            y = y + down_proj_bias[e]
        out = out.index_add(0, token, y * top_k_weights[token, choice, None])
    return out


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    expert_idxs: Tensor,
    *,
    lora: ExpertLoRA | None = None,
    expert_biases: Tensor | None = None,
) -> Tensor:
    """``y[s] = inputs[s] @ W[expert_idxs[s]] + bias``: ``inputs [S, in]``, ``W [E, in, out]`` to ``[S, out]``."""
    weights = merge_lora(expert_weights, lora)
    out = inputs.new_zeros(inputs.shape[0], weights.shape[2])
    for e, weight in enumerate(weights.unbind()):
        rows = torch.where(expert_idxs == e)[0]
        y = inputs[rows] @ weight
        if expert_biases is not None:
            y = y + expert_biases[e]
        out = out.index_add(0, rows, y)
    return out


def merge_lora(weight: Tensor, lora: ExpertLoRA | None) -> Tensor:
    """``W + scaling * (B A)^T`` for ``weight [E, in, out]``: what PEFT's merge makes."""
    if lora is None:
        return weight
    return weight + lora.scaling * torch.einsum("eor,eri->eio", lora.B.to(weight.dtype), lora.A.to(weight.dtype))


# The streams of a seed's dropout: what the first projection's LoRA reads, and what the second's does.
DROPPED_INPUT, DROPPED_ACTIVATION = 0, 1

_32_BITS = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    """MurmurHash3's finalizer (Appleby, 2008) of 32-bit numbers in int64: every bit of it depends on every bit."""
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _32_BITS
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _32_BITS
    return h ^ (h >> 16)


def dropout_threshold(p: float) -> int:
    """Which of the 31-bit hashes are dropped: those below."""
    return min(round(p * 2**31), 2**31 - 1)


def dropout_keep(seed: Tensor, rows: Tensor, columns: int, *, p: float, stream: int) -> Tensor:
    """Which elements stay: bool ``[R, columns]``, each True with probability ``1 - p``.

    A hash of the element's place, so that forward, backward and a checkpoint's replay agree and nothing is kept.

    Args:
        seed: int64 ``[1]``; rows: int64 ``[R]``, the number of each row (a token, or a slot), below 2**32.
        stream: tells apart what is dropped with one seed.
    """
    key = _mix(_mix(seed & _32_BITS) ^ ((seed >> 32) & _32_BITS))
    key = _mix(_mix((key + stream) & _32_BITS) ^ (rows & _32_BITS))[:, None]
    n = torch.arange(columns, device=rows.device)
    # Two keys for a row: with one, two rows could be pieces of the same sequence.
    bits = _mix((_mix(n ^ key) + _mix(key ^ 0x9E3779B9)) & _32_BITS)
    return (bits >> 1) >= dropout_threshold(p)


def split_gate_up(h: Tensor, is_concatenated: bool) -> tuple[Tensor, Tensor]:
    """The gate and up halves of ``h [S, 2I]``: ``[gate; up]`` if concatenated, else ``[g0, u0, g1, u1, ...]``."""
    if is_concatenated:
        gate, up = h.chunk(2, dim=-1)
        return gate, up
    return h[..., 0::2], h[..., 1::2]


def activate(h: Tensor, activation: str, has_gate: bool, is_concatenated: bool) -> Tensor:
    """``act(gate) * up`` of ``h [S, 2I]``, or ``act(h)`` of ``h [S, I]`` for experts without a gate."""
    if not has_gate:
        return ACTIVATIONS[activation][0](h)
    value, factor = _gate(*split_gate_up(h, is_concatenated), activation)
    return value * factor


# What passes at a clamp's very limit is the torch at hand's to say: the gradient up to 2.13, nothing from 2.14 on.
PASSES_AT_LIMIT = torch.__version__ < "2.14"


def clamped_glu(alpha: float, limit: float, shift: float) -> str:
    """The activation ``g sigmoid(alpha g) (u + shift)`` of ``g = min(gate, limit)``, ``u = clamp(up, -limit, limit)``.

    gpt-oss's is ``clamped_glu(1.702, 7.0, 1.0)``; that of a clamped SwiGLU has alpha 1 and shift 0. The limit is not
    negative.
    """
    return f"clamped_glu({float(alpha)!r}, {float(limit)!r}, {float(shift)!r})"


def clamped_glu_parameters(activation: str) -> tuple[float, float, float] | None:
    """``(alpha, limit, shift)`` of what `clamped_glu` returned, None of any other activation.

    Raises:
        ValueError: the numbers are none, or none that it takes.
    """
    if not activation.startswith("clamped_glu("):
        return None
    alpha, limit, shift = map(float, activation.removeprefix("clamped_glu(").removesuffix(")").split(","))
    if not (activation.endswith(")") and limit >= 0 and math.isfinite(alpha) and math.isfinite(shift)):
        raise ValueError(f"clamped_glu must have finite numbers and a limit of at least 0, got {activation}")
    return alpha, limit, shift


def _gate(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``(value, factor)`` of a gated activation ``value(gate) * factor(up)``."""
    parameters = clamped_glu_parameters(activation)
    if parameters is None:
        return ACTIVATIONS[activation][0](gate), up
    alpha, limit, shift = parameters
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(alpha * gate), up.clamp(-limit, limit) + shift


def _gate_grad(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor | float]:
    """The derivatives of both."""
    parameters = clamped_glu_parameters(activation)
    if parameters is None:
        return ACTIVATIONS[activation][1](gate), 1.0
    alpha, limit, _ = parameters
    inside = torch.le if PASSES_AT_LIMIT else torch.lt
    clamped = gate.clamp(max=limit)
    sig = torch.sigmoid(alpha * clamped)
    return sig * (1 + alpha * clamped * (1 - sig)) * inside(gate, limit), inside(up.abs(), limit).to(up.dtype)


def _silu_grad(x: Tensor) -> Tensor:
    sig = torch.sigmoid(x)
    return sig * (1 + x * (1 - sig))


def _gelu_grad(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * math.sqrt(0.5))) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_grad(x: Tensor) -> Tensor:
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "identity": (torch.clone, torch.ones_like),
    "silu": (F.silu, _silu_grad),
    "gelu": (F.gelu, _gelu_grad),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh_grad),
    "relu": (F.relu, lambda x: (x > 0).to(x.dtype)),
    "relu2": (lambda x: F.relu(x) ** 2, lambda x: 2 * F.relu(x)),
}
"""Each activation by name, and its derivative."""


# ---------------------------------------------------------------------------------------------------------------------
# The CPU backend
# ---------------------------------------------------------------------------------------------------------------------


def replay(
    body: Callable,
    tensors: Sequence[Tensor | None],
    options: tuple,
    backward: Callable[[list[Tensor | None]], Any] | None = None,
    overwrites: bool = False,
) -> list[Tensor | None]:
    """``body(run, *tensors, *options)``, where ``run`` has the functions of this half: it computes by them alone.

    The GPU backend works out what to launch once for each shape, and then replays it; ``backward``, given the results,
    calls what will be replayed next, for its kernels to be compiled along with these. A body may write over an input
    if it ``overwrites``.
    """
    return body(sys.modules[__name__], *tensors, *options)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(like: Tensor) -> Tensor:
    """A new tensor with the strides of a dense one."""
    return torch.empty_like(like)


def columns(tensor: Tensor, piece: slice) -> Tensor:
    """``tensor[..., piece]``."""
    return tensor[..., piece]


def in_factors(
    dtype: torch.dtype, *pairs: tuple[Tensor | None, Tensor | None]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Factors ``A [E, r, in]`` and ``B [E, out, r]``, dense and in the base's dtype.

    One that is read as it is, is itself. A backend may pad ranks with zeros, and all products are then as wide.
    """

    def read(factor: Tensor | None) -> Tensor | None:
        if factor is None or is_read_as_it_is(factor, dtype):
            return factor
        return factor.to(dtype, memory_format=torch.contiguous_format).contiguous()

    return [(read(A), read(B)) for A, B in pairs]


def dense(out: Tensor) -> Tensor:
    """What had better be written in place of a gradient ``out [E, out, r]`` of B, to be `cast` into it.

    A backend may prefer a dense stack; on the CPU it is ``out``.
    """
    return out


def cast(stacks: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Writes each ``(x, out)``'s ``out`` from its ``x``, ``[E, M, N]`` both, for what `dense` made."""
    for x, out in stacks:
        out.copy_(x)


def route(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts slots by expert, stably; ids outside ``[0, num_experts)`` go last, as ``num_experts``.

    Args:
        expert_ids: int ``[S]``, the expert of each slot.
        num_experts: ``E``.

    Returns:
        ``(sorted_expert_idxs [S], sorted_scattered_idxs [S], expert_offsets [E])``, int64; offsets are cumulative.
    """
    ids = expert_ids.to(torch.int64)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    sorted_expert_idxs, sorted_scattered_idxs = torch.sort(ids, stable=True)
    counts = torch.bincount(ids, minlength=num_experts + 1)
    return sorted_expert_idxs, sorted_scattered_idxs, counts[:num_experts].cumsum(0)


def tile_rows(expert_offsets: Tensor, num_slots: int, weights: Sequence[Tensor]) -> int:
    """How many rows of an expert are multiplied together; see `backend.scheduled`. On the CPU all of them."""
    return max(1, num_slots)


def schedule(expert_offsets: Tensor, num_slots: int, tile_rows: int) -> Tensor:
    """The CPU backend walks the offsets themselves: an empty int32 ``[0, 4]``."""
    return torch.empty(0, 4, dtype=torch.int32, device=expert_offsets.device)


def shrink(
    x: Tensor,
    factor: Tensor,
    routing: Routing,
    *,
    x_fan_out: int,
    scale: float,
    out_scattered: bool = False,
    row_weights: Tensor | None = None,
    weighted: Tensor | None = None,
) -> Tensor:
    """``z[row] = scale * x[row'] @ factor[e]``: a product into the LoRA rank.

    Args:
        x: ``[rows, K]``.
        factor: ``[E, K, r]``, any strides.
        x_fan_out: how a grouped row finds its row of ``x``: 0, the same row; ``f`` > 0, row ``slot // f``.
        scale: multiplies the result.
        out_scattered: put the results in scattered instead of grouped order.
        weighted: ``[S, r]`` grouped, to write ``row_weights * z`` to; ``row_weights [S]`` are in scattered order.

    Returns:
        ``[S, r]`` in ``factor``'s dtype, accumulated in float32.
    """
    out = factor.new_zeros(routing.num_slots, factor.shape[2])
    for e, rows in _groups(routing):
        z = scale * _matmul(_take(x, routing, rows, x_fan_out), factor[e])
        _put(out, routing, rows, out_scattered, z)
        if weighted is not None and row_weights is not None:
            weighted[rows] = (z * row_weights[routing.scattered_idxs[rows], None].to(z.dtype)).to(weighted.dtype)
    return out


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    *,
    x_fan_out: int,
    out_scattered: bool = False,
    z: Tensor | None = None,
    expand: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    zero_tail: bool = False,
) -> Tensor:
    """``y[row] = x[row'] @ weight[e] + z[row] @ expand[e] + bias[e]``.

    Args:
        x: ``[rows, K]``, addressed as in `shrink`.
        weight: ``[E, K, N]``, any strides.
        z: ``[S, r]`` grouped, with ``expand [E, r, N]``: the LoRA update, one more step of the same accumulator.
        bias: ``[E, N]``.
        out_scattered: put the results in scattered instead of grouped order.
        out_dtype: of the result; the weight's if None.
        out: ``[S, N]``, written instead of a new tensor.
        zero_tail: write zeros to the rows of no expert; without it they are left as they are (here: always zeros).

    Returns:
        ``[S, N]``.
    """
    if out is None:
        out = weight.new_zeros(routing.num_slots, weight.shape[2], dtype=out_dtype)
    elif zero_tail:
        out.zero_()
    for e, rows in _groups(routing):
        acc = _matmul(_take(x, routing, rows, x_fan_out), weight[e])
        if z is not None and expand is not None:
            acc += _matmul(z[rows], expand[e])
        if bias is not None:
            acc += bias[e].to(acc.dtype)
        _put(out, routing, rows, out_scattered, acc)
    return out


def grouped_gemm_act(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    *,
    x_fan_out: int,
    z: Tensor | None,
    expand: Tensor | None,
    bias: Tensor | None,
    activation: str,
    has_gate: bool,
    is_concatenated: bool,
    save: bool,
) -> tuple[Tensor | None, Tensor]:
    """``(h, a)``: `grouped_gemm` and its activation, ``act(gate) * up``, grouped; ``h`` is None without ``save``.

    ``weight [E, K, 2I]``, or ``[E, K, I]`` without a gate, gives ``h [S, 2I or I]`` and ``a [S, I]``.
    """
    h = grouped_gemm(x, weight, routing, x_fan_out=x_fan_out, z=z, expand=expand, bias=bias)
    a = activated(h, activation=activation, has_gate=has_gate, is_concatenated=is_concatenated)
    return h if save else None, a


def activated(h: Tensor, *, activation: str, has_gate: bool, is_concatenated: bool) -> Tensor:
    """``a [S, I] = act(gate) * up`` of ``h [S, 2I]``, or ``act(h)`` of ``h [S, I]``, computed in float32."""
    return activate(h.to(_acc_dtype(h.dtype)), activation, has_gate, is_concatenated).to(h.dtype)


def activated_grad(da: Tensor, h: Tensor, *, activation: str, has_gate: bool, is_concatenated: bool) -> Tensor:
    """``dh [S, 2I or I]`` of `activated`, from ``da [S, I]``."""
    rows = torch.arange(h.shape[0], device=h.device)
    every_row = Routing(rows, rows.new_tensor([h.shape[0]]), rows.new_empty(0, 4), max(1, h.shape[0]))
    dh, _ = act_grad(
        da,
        h,
        every_row,
        h_fan_out=0,
        row_weights=da.new_ones(h.shape[0]),
        activation=activation,
        has_gate=has_gate,
        is_concatenated=is_concatenated,
    )
    return dh


def act_grad(
    g: Tensor,
    h: Tensor,
    routing: Routing,
    *,
    h_fan_out: int,
    row_weights: Tensor,
    activation: str,
    has_gate: bool,
    is_concatenated: bool,
    save_a: bool = False,
    dot_dtype: torch.dtype | None = None,
    out_scattered: bool = False,
    zero_tail: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The backward of "activate, then weight the row".

    With ``a = act(h)``: ``dh = row_weight * g * act'(h)`` and ``dot = <a, g>``. If ``g`` is the gradient of ``a``
    before the routing weight, ``dot`` is the weight's: no output of the forward is needed.

    Args:
        g: ``[S, I]``, grouped. Overwritten by ``row_weight * a`` if ``save_a``: grams need the one when the other has
            been used.
        h: the saved pre-activation, ``[rows, 2I]`` or ``[rows, I]`` without a gate, addressed by ``h_fan_out`` as in
            `shrink`.
        row_weights: ``[S]`` in scattered order.
        dot_dtype: of ``dot``, or None for no ``dot``.
        out_scattered: put ``dh`` in scattered instead of grouped order.
        zero_tail: write zeros to the rows of ``dh`` of no expert; without it they are left as they are.
        out: where to write ``dh``, or None for a new tensor. It may be a grouped ``h``.

    Returns:
        ``(dh [S, 2I or I], dot [S] or None)``; ``dot`` scattered, zero where there is no expert.
    """
    num_slots = routing.num_slots
    dh = g.new_zeros(num_slots, h.shape[1]) if out is None else out
    dot = g.new_zeros(num_slots, dtype=dot_dtype) if dot_dtype is not None else None
    for _, rows in _groups(routing):
        slots = routing.scattered_idxs[rows]
        gr = g[rows].to(_acc_dtype(g.dtype))
        hr = _take(h, routing, rows, h_fan_out).to(gr.dtype)
        w = row_weights[slots, None].to(gr.dtype)
        if has_gate:
            gate, up = split_gate_up(hr, is_concatenated)
            value, factor = _gate(gate, up, activation)
            slope, factor_slope = _gate_grad(gate, up, activation)
            a = value * factor
            halves = (w * gr * factor * slope, w * gr * value * factor_slope)
            dhr = torch.cat(halves, -1) if is_concatenated else torch.stack(halves, -1).flatten(-2)
        else:
            a = ACTIVATIONS[activation][0](hr)
            dhr = w * gr * ACTIVATIONS[activation][1](hr)
        if dot is not None:
            dot[slots] = (a * gr).sum(-1).to(dot.dtype)
        if save_a:
            g[rows] = (w * a).to(g.dtype)
        _put(dh, routing, rows, out_scattered, dhr)  # last, as a may be h itself, and so may dh
    return dh, dot


def gram(
    left: Tensor,
    right: Tensor | None,
    routing: Routing,
    out: Tensor,
    *,
    left_fan_out: int,
    right_fan_out: int = 0,
    row_weights: Tensor | None = None,
) -> None:
    """``out[e] = sum over e's rows of row_weight * outer(left[row'], right[row''])``; experts without rows get zeros.

    Args:
        left: ``[rows, P]``; right: ``[rows, Q]``, or None for a column of ones (``Q = 1``); addressed as in `shrink`.
        out: ``[E, P, Q]``, any strides and dtype; written whole. Accumulated in float32.
        row_weights: ``[S]`` in scattered order, or None for ones.
    """
    out.zero_()
    for e, rows in _groups(routing):
        lr = _take(left, routing, rows, left_fan_out)
        rr = lr.new_ones(lr.shape[0], 1) if right is None else _take(right, routing, rows, right_fan_out)
        if row_weights is not None:
            rr = rr * row_weights[routing.scattered_idxs[rows], None].to(_acc_dtype(rr.dtype))
        out[e] = _matmul(lr.mT, rr).to(out.dtype)


def shrink_gram(
    x: Tensor,
    factor: Tensor,
    right: Tensor,
    routing: Routing,
    out: Tensor,
    *,
    x_fan_out: int,
    scale: float,
) -> Tensor:
    """`gram` of ``x`` and grouped ``right [S, r]`` into ``out [E, K, r]``; returns the `shrink` of ``x``."""
    gram(x, right, routing, out, left_fan_out=x_fan_out)
    return shrink(x, factor, routing, x_fan_out=x_fan_out, scale=scale)


def act_grad_grams(
    g: Tensor,
    h: Tensor,
    routing: Routing,
    *,
    row_weights: Tensor,
    activation: str,
    has_gate: bool,
    is_concatenated: bool,
    dot_dtype: torch.dtype | None,
    out: Tensor | None,
    right_a: Tensor,
    out_a: Tensor,
    factor: Tensor,
    right_h: Tensor,
    out_h: Tensor,
    scale: float,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """`act_grad` of grouped ``h``, the `gram` of ``row_weight * a`` and ``right_a``, and the `shrink_gram` of ``dh``.

    With a ``seed`` the gram is of what `dropout` makes of that, each row numbered by its slot.

    Returns:
        ``(dh, dot, product)``, or None, and nothing done, where a backend has no one pass for them, as this one.
    """
    return None


def combine(
    y: Tensor,
    weights: Tensor | None,
    out: Tensor,
    *,
    fan_out: int,
    expert_ids: Tensor | None = None,
    num_experts: int = 0,
) -> None:
    """``out[t] = sum_j weights[t * f + j] * y[t * f + j]`` with ``f = fan_out``, accumulated in float32.

    Args:
        y: ``[S, N]`` in scattered order.
        weights: ``[S]`` or None for ones.
        out: ``[S // f, N]``, written.
        expert_ids: ``[S]``; slots whose id is outside ``[0, num_experts)`` are not read. None reads all.
    """
    terms = y.to(_acc_dtype(y.dtype))
    if weights is not None:
        terms = terms * weights[:, None].to(terms.dtype)
    if expert_ids is not None:  # after the weights: 0 * Inf would be NaN
        terms = torch.where(((expert_ids >= 0) & (expert_ids < num_experts))[:, None], terms, 0.0)
    out.copy_(terms.view(out.shape[0], fan_out, y.shape[1]).sum(1))


def dropout(
    x: Tensor, seed: Tensor, *, p: float, stream: int, rows: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """``where(keep, x / (1 - p), 0)`` with `dropout_keep`'s mask, added to ``out`` if that is given.

    Args:
        x: ``[R, N]``.
        seed: int64 ``[1]``.
        rows: int64 ``[R]``, the number of each row; their own order if None.
        out: ``[R, N]``, overwritten by the sum.

    Returns:
        ``[R, N]`` in the dtype of ``x``, or ``out``.
    """
    if rows is None:
        rows = torch.arange(x.shape[0], device=x.device)
    keep = dropout_keep(seed, rows, x.shape[1], p=p, stream=stream)
    y = torch.where(keep, x.to(_acc_dtype(x.dtype)) * (1.0 / (1.0 - p)), 0.0)
    return y.to(x.dtype) if out is None else out.copy_(out.to(y.dtype) + y)


def _acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """A product in the accumulation dtype, as on the GPU: a half precision one is rounded before the epilogue."""
    with torch.autocast(a.device.type, enabled=False):
        return a.to(_acc_dtype(a.dtype)) @ b.to(_acc_dtype(b.dtype))


def _groups(routing: Routing) -> Iterator[tuple[int, slice]]:
    start = 0
    for e, end in enumerate(routing.expert_offsets.tolist()):
        if end > start:
            yield e, slice(start, end)
        start = end


def _take(x: Tensor, routing: Routing, rows: slice, fan_out: int) -> Tensor:
    return x[rows] if fan_out == 0 else x[routing.scattered_idxs[rows] // fan_out]


def _put(out: Tensor, routing: Routing, rows: slice, scattered: bool, values: Tensor) -> None:
    out[routing.scattered_idxs[rows] if scattered else rows] = values.to(out.dtype)
