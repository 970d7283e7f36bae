"""The custom ops: forward and backward of the experts layer and of one expert linear, each a short walk of kernels.

They compute; `moe_mlp.py` and `parallel_linear.py` check arguments and differentiate. An op returns a list because a
schema has no optional results: of gradients those that were asked for, and empty tensors for what there is none of to
save. They are registered by `define` and `impl`: a call of an empty `custom_op` took an H200's host 24 us, of this 10.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, List, Optional

import torch
from torch import Tensor

from . import backend
from ._ops import add_op_namespace_prefix, ops
from .reference import DROPPED_ACTIVATION, DROPPED_INPUT
from .types import A_by_expert, B_by_expert, Routing, peft_B_by_expert


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``; asked first, as a conversion of nothing takes the host 1 us."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _by_expert(
    A: Optional[Tensor], B: Optional[Tensor], num_experts: int, b_by_expert: Callable[[Tensor, int], Tensor]
) -> tuple[Optional[Tensor], Optional[Tensor]]:
    """Factors by expert, views of those that are matrices."""
    return None if A is None else A_by_expert(A, num_experts), None if B is None else b_by_expert(B, num_experts)


def _new_grad(
    run: ModuleType, factor: Optional[Tensor], num_experts: int, by_expert: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """A gradient like the factor as it was given, and a view of it by expert, to be written."""
    grad = run.empty_like(factor)
    return grad, by_expert(grad, num_experts)


def _new_grad_of_B(
    run: ModuleType,
    B: Optional[Tensor],
    num_experts: int,
    by_expert: Callable[[Tensor, int], Tensor],
    stacks: List[tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """The same of B, where what is to be written may be a dense stack, which is then one of the ``stacks`` to cast."""
    grad, view = _new_grad(run, B, num_experts, by_expert)
    stack = run.dense(view)
    if stack is not view:
        stacks.append((stack, view))
    return grad, stack


def _schema_list(outputs: List[Optional[Tensor]], like: Tensor) -> List[Tensor]:
    """Outputs as an op returns them, with empty tensors for Nones."""
    return [like.new_empty(0) if output is None else output for output in outputs]


def _route(expert_ids: Tensor, num_experts: int) -> List[Tensor]:
    """See `reference.route`; ids of any shape."""
    return backend.of(expert_ids).replay(_route_body, (expert_ids.contiguous(),), (num_experts,))


def _route_body(run: ModuleType, expert_ids: Tensor, num_experts: int) -> List[Tensor]:
    return list(run.route(expert_ids.view(-1), num_experts))


torch.library.define(add_op_namespace_prefix("route"), torch.library.infer_schema(_route, mutates_args=()))
torch.library.impl(add_op_namespace_prefix("route"), "CompositeExplicitAutograd", _route)
route = ops.route.default


@torch.library.register_fake(add_op_namespace_prefix("route"))
def _(expert_ids, num_experts):
    num_slots = expert_ids.numel()
    return [expert_ids.new_empty(n, dtype=torch.int64) for n in (num_slots, num_slots, num_experts)]


def _moe_mlp_forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Optional[Tensor],
    down_proj_bias: Optional[Tensor],
    gate_up_A: Optional[Tensor],
    gate_up_B: Optional[Tensor],
    down_A: Optional[Tensor],
    down_B: Optional[Tensor],
    top_k_weights: Tensor,
    top_k_index: Tensor,
    dropout_seed: Optional[Tensor],
    gate_up_scaling: float,
    down_scaling: float,
    is_transposed: bool,
    is_concatenated: bool,
    has_gate: bool,
    activation: str,
    lora_dropout: float,
    needs: List[bool],
) -> List[Tensor]:
    """``[out]``, and with ``needs`` what the backward needs: ``h, xa, waa, scattered_idxs, expert_offsets, tiles``.

    Factors are by expert, or PEFT's matrices: these are viewed where the op is recorded, as a view takes the host 1 to
    10 us. ``needs`` is `moe_mlp_backward`'s, empty where none follows. ``waa`` is the down projection's product into
    the rank times the routing weights, as the gradient of B has it.
    """
    dtype = gate_up_proj.dtype
    tensors = (
        _in_dtype(hidden_states, dtype),
        gate_up_proj,
        down_proj,
        gate_up_proj_bias,
        down_proj_bias,
        gate_up_A,
        gate_up_B,
        down_A,
        down_B,
        top_k_weights.contiguous(),
        top_k_index.contiguous(),
        dropout_seed,
    )
    flags = (gate_up_scaling, down_scaling, is_transposed, is_concatenated, has_gate, activation, lora_dropout)

    def backward(outputs: List[Optional[Tensor]]) -> None:
        out, *saved = _schema_list(outputs, gate_up_proj)
        routing = (top_k_weights, top_k_index, dropout_seed)
        moe_mlp_backward(out, hidden_states, *tensors[1:9], *routing, *saved, *flags, needs, True)

    options = (hidden_states.dtype, *flags, bool(needs))
    outputs = backend.of(hidden_states).replay(_forward_body, tensors, options, backward if needs else None)
    return _schema_list(outputs, gate_up_proj)


def _forward_body(
    run: ModuleType,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Optional[Tensor],
    down_proj_bias: Optional[Tensor],
    gate_up_A: Optional[Tensor],
    gate_up_B: Optional[Tensor],
    down_A: Optional[Tensor],
    down_B: Optional[Tensor],
    weights: Tensor,
    expert_ids: Tensor,
    seed: Optional[Tensor],
    out_dtype: torch.dtype,
    gate_up_scaling: float,
    down_scaling: float,
    is_transposed: bool,
    is_concatenated: bool,
    has_gate: bool,
    activation: str,
    lora_dropout: float,
    save: bool,
) -> List[Optional[Tensor]]:
    num_experts = gate_up_proj.shape[0]
    num_tokens, fan_out = expert_ids.shape
    weights, expert_ids = weights.view(-1), expert_ids.view(-1)
    w_up = gate_up_proj if is_transposed else gate_up_proj.mT
    w_down = down_proj if is_transposed else down_proj.mT
    (A_up, B_up), (A_down, B_down) = run.in_factors(
        w_up.dtype,
        _by_expert(gate_up_A, gate_up_B, num_experts, peft_B_by_expert),
        _by_expert(down_A, down_B, num_experts, peft_B_by_expert),
    )
    _, scattered_idxs, expert_offsets = run.route(expert_ids, num_experts)
    routing = backend.scheduled(run, scattered_idxs, expert_offsets, (w_up, w_down))

    xa = expand = None
    if A_up is not None and B_up is not None:
        dropped = x if seed is None else run.dropout(x, seed, p=lora_dropout, stream=DROPPED_INPUT)
        xa = run.shrink(dropped, A_up.mT, routing, x_fan_out=fan_out, scale=gate_up_scaling)
        del dropped
        expand = B_up.mT
    h, a = run.grouped_gemm_act(
        x,
        w_up,
        routing,
        x_fan_out=fan_out,
        z=xa,
        expand=expand,
        bias=gate_up_proj_bias,
        activation=activation,
        has_gate=has_gate,
        is_concatenated=is_concatenated,
        save=save,
    )
    aa = waa = expand = None
    A_up = B_up = None  # their memory is free for y
    if A_down is not None and B_down is not None:
        dropped = a if seed is None else _drop_activation(run, a, seed, lora_dropout, routing)
        aa, waa = _weighted_shrink(
            run, dropped, A_down.mT, routing, weights if save else None, x_fan_out=0, scale=down_scaling
        )
        del dropped
        expand, A_down = B_down.mT, None
    out = run.empty(num_tokens, w_down.shape[2], dtype=out_dtype, device=x.device)
    _gemm_combine(
        run,
        out,
        a,
        w_down,
        routing,
        z=aa,
        expand=expand,
        bias=down_proj_bias,
        weights=weights,
        expert_ids=expert_ids,
        in_pieces=not (save and _in_one_piece(w_down, has_gate)),
    )
    return [out, h, xa, waa, scattered_idxs, expert_offsets, routing.tiles] if save else [out]


def _drop_activation(
    run: ModuleType, a: Tensor, seed: Tensor, p: float, routing: Routing, out: Optional[Tensor] = None
) -> Tensor:
    """Dropout of grouped rows, whose mask belongs to their slots: it does not depend on the routing of others."""
    return run.dropout(a, seed, p=p, stream=DROPPED_ACTIVATION, rows=routing.scattered_idxs, out=out)


def _weighted_shrink(
    run: ModuleType,
    x: Tensor,
    factor: Tensor,
    routing: Routing,
    weights: Optional[Tensor],
    *,
    x_fan_out: int,
    scale: float,
) -> tuple[Tensor, Optional[Tensor]]:
    """The product into the rank, and, with weights of its rows, times these, as the gradient of B has it."""
    weighted = None
    if weights is not None:
        weighted = run.empty(routing.num_slots, factor.shape[2], dtype=factor.dtype, device=x.device)
    options = {"x_fan_out": x_fan_out, "scale": scale, "row_weights": weights, "weighted": weighted}
    return run.shrink(x, factor, routing, **options), weighted


# Bytes of grouped rows that wait to be combined; more of them are computed in two pieces of columns. Where they are
# the peak of a step that takes half of them off it, for 1 to 3 % of its time. No more than two: each piece reads all
# of x again, and eight at 32768 tokens took 12.8 ms for the 12.0 of one.
COMBINE_BYTES = 128 * 2**20
# The least columns of a piece: fewer and the GEMM's tile is not full.
COMBINE_COLUMNS = 256


def _in_one_piece(w_down: Tensor, has_gate: bool) -> bool:
    """Whether a step's rows are combined in one piece, as its peak would hardly be lower in two.

    With a gate, and H up to 4I, whose backward has that peak where it keeps ``h``: 608.7, 498.7 and 1143 MiB (Qwen3,
    Qwen3.5, GLM-4.5-Air) in one piece and in two. Where it writes over ``h`` the backward stays below in one piece,
    too, which takes 2.69 ms for 2.71 at 8192 tokens, 9.91 for 10.16 at 32768. Without a gate, or with one and H = 8I,
    one piece would have 5 to 11 % more.
    """
    return has_gate and w_down.shape[2] <= 4 * w_down.shape[1]


def _gemm_combine(
    run: ModuleType,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    *,
    z: Optional[Tensor],
    expand: Optional[Tensor],
    bias: Optional[Tensor],
    weights: Optional[Tensor],
    expert_ids: Tensor,
    in_pieces: bool = True,
) -> None:
    """``out [T, N] = combine(grouped_gemm(x, weight))`` of grouped rows, in one piece of columns or two."""
    num_slots, N = routing.num_slots, weight.shape[2]
    columns = max(1, N)
    if in_pieces and num_slots * N * weight.element_size() > COMBINE_BYTES and N >= 2 * COMBINE_COLUMNS:
        columns = -(-N // (2 * COMBINE_COLUMNS)) * COMBINE_COLUMNS
    for start in range(0, N, columns):
        piece = slice(start, start + columns)
        y = run.grouped_gemm(
            x,
            run.columns(weight, piece),
            routing,
            x_fan_out=0,
            out_scattered=True,
            z=z,
            expand=None if expand is None else run.columns(expand, piece),
            bias=None if bias is None else run.columns(bias, piece),
        )
        run.combine(
            y,
            weights,
            run.columns(out, piece),
            fan_out=num_slots // max(1, out.shape[0]),
            expert_ids=expert_ids,
            num_experts=routing.num_experts,
        )
        del y  # before the next piece is allocated


torch.library.define(
    add_op_namespace_prefix("moe_mlp_forward"), torch.library.infer_schema(_moe_mlp_forward, mutates_args=())
)
torch.library.impl(add_op_namespace_prefix("moe_mlp_forward"), "CompositeExplicitAutograd", _moe_mlp_forward)
moe_mlp_forward = ops.moe_mlp_forward.default


@torch.library.register_fake(add_op_namespace_prefix("moe_mlp_forward"))
def _(
    hidden_states, gate_up_proj, down_proj, gate_up_proj_bias, down_proj_bias, gate_up_A, gate_up_B, down_A, down_B,
    top_k_weights, top_k_index, dropout_seed, gate_up_scaling, down_scaling, is_transposed, *flags,
):  # fmt: skip
    out = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    if not flags[-1]:
        return [out]
    num_slots = top_k_index.shape[0] * top_k_index.shape[1]
    width = gate_up_proj.shape[2 if is_transposed else 1]
    return [
        out,
        gate_up_proj.new_empty(num_slots, width),
        backend.fake_rank_product(gate_up_proj, gate_up_A, num_slots),
        backend.fake_rank_product(gate_up_proj, down_A, num_slots),
        top_k_index.new_empty(num_slots, dtype=torch.int64),
        top_k_index.new_empty(gate_up_proj.shape[0], dtype=torch.int64),
        backend.fake_schedule(top_k_index, num_slots, gate_up_proj.shape[0]),
    ]


def _moe_mlp_backward(
    dout: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Optional[Tensor],
    down_proj_bias: Optional[Tensor],
    gate_up_A: Optional[Tensor],
    gate_up_B: Optional[Tensor],
    down_A: Optional[Tensor],
    down_B: Optional[Tensor],
    top_k_weights: Tensor,
    top_k_index: Tensor,
    dropout_seed: Optional[Tensor],
    h: Tensor,
    xa: Tensor,
    waa: Tensor,
    scattered_idxs: Tensor,
    expert_offsets: Tensor,
    tiles: Tensor,
    gate_up_scaling: float,
    down_scaling: float,
    is_transposed: bool,
    is_concatenated: bool,
    has_gate: bool,
    activation: str,
    lora_dropout: float,
    needs: List[bool],
    overwrite: bool,
) -> List[Tensor]:
    """Gradients of those of the first ten tensor arguments of `moe_mlp_forward` that ``needs`` says, in that order.

    With ``overwrite`` the gradient of ``h`` is written over it: nobody else may read ``h``, then or later.
    """
    dtype = gate_up_proj.dtype
    tensors = (
        _in_dtype(dout, dtype),
        _in_dtype(hidden_states, dtype),
        gate_up_proj,
        down_proj,
        gate_up_proj_bias,
        down_proj_bias,
        gate_up_A,
        gate_up_B,
        down_A,
        down_B,
        top_k_weights.contiguous(),
        top_k_index.contiguous(),
        dropout_seed,
        h,
        xa,
        waa,
        scattered_idxs,
        expert_offsets,
        tiles,
        down_proj_bias.to(dtype) if down_proj_bias is not None and needs[9] else None,
    )
    flags = (is_transposed, is_concatenated, has_gate, activation, lora_dropout)
    options = (hidden_states.dtype, gate_up_scaling, down_scaling, *flags, tuple(needs), overwrite)
    *grads, bias_dot = backend.of(dout).replay(_backward_body, tensors, options, overwrites=overwrite)
    if grads[9] is not None:
        grads[9] = _weights_grad(grads[9], bias_dot, top_k_weights)
    return [grad for grad in grads if grad is not None]


def _backward_body(
    run: ModuleType,
    dout: Tensor,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    gate_up_proj_bias: Optional[Tensor],
    down_proj_bias: Optional[Tensor],
    gate_up_A: Optional[Tensor],
    gate_up_B: Optional[Tensor],
    down_A: Optional[Tensor],
    down_B: Optional[Tensor],
    weights: Tensor,
    expert_ids: Tensor,
    seed: Optional[Tensor],
    h: Tensor,
    xa: Tensor,
    waa: Tensor,
    scattered_idxs: Tensor,
    expert_offsets: Tensor,
    tiles: Tensor,
    bias_of_dot: Optional[Tensor],
    dx_dtype: torch.dtype,
    gate_up_scaling: float,
    down_scaling: float,
    is_transposed: bool,
    is_concatenated: bool,
    has_gate: bool,
    activation: str,
    lora_dropout: float,
    needs: tuple[bool, ...],
    overwrite: bool,
) -> List[Optional[Tensor]]:
    """The ten gradients, where needed, and what a bias adds to that of the routing weights."""
    fan_out = expert_ids.shape[1]
    weights, expert_ids = weights.view(-1), expert_ids.view(-1)
    w_up = gate_up_proj if is_transposed else gate_up_proj.mT
    w_down = down_proj if is_transposed else down_proj.mT
    tile_rows = run.tile_rows(expert_offsets, expert_ids.shape[0], (w_up, w_down))
    routing = Routing(scattered_idxs, expert_offsets, tiles, tile_rows)

    need_x, need_up, need_down, need_up_bias, need_down_bias, *rest = needs
    need_up_A, need_up_B, need_down_A, need_down_B, need_weights = rest
    need_dh = need_x or need_up or need_up_bias or need_up_A or need_up_B
    need_a = need_down or need_down_A
    makes_u_up = gate_up_A is not None and gate_up_B is not None and (need_x or need_up_A)
    grads: List[Any] = [None] * 11
    num_experts = w_up.shape[0]
    up_A, up_B = _by_expert(gate_up_A, gate_up_B, num_experts, peft_B_by_expert)
    (A_up, B_up), (A_down, B_down) = run.in_factors(
        w_up.dtype,
        (up_A if makes_u_up and need_x else None, up_B if makes_u_up else None),
        _by_expert(down_A, down_B, num_experts, peft_B_by_expert),
    )
    dB_up = dA_down = dB_down = None
    stacks: List[tuple[Tensor, Tensor]] = []

    # Down projection and activation: y is never needed, and a is made again from h.
    u_down = None
    if A_down is not None and B_down is not None:
        if need_down_B:
            grads[8], dB_down = _new_grad_of_B(run, down_B, num_experts, peft_B_by_expert, stacks)
        u_down = _rank_products(run, dout, B_down, waa, routing, dB_down, fan_out=fan_out, scaling=down_scaling)
    made = None
    if need_dh or need_a or need_weights:
        if seed is None or A_down is None:
            a = run.grouped_gemm(dout, w_down.mT, routing, x_fan_out=fan_out, z=u_down, expand=A_down)
        else:  # LoRA's part of the gradient goes through the dropout, the rest does not
            a = run.grouped_gemm(dout, w_down.mT, routing, x_fan_out=fan_out)
            update = run.grouped_gemm(u_down, A_down, routing, x_fan_out=0)
            _drop_activation(run, update, seed, lora_dropout, routing, out=a)
            del update
        if need_up_B:
            grads[6], dB_up = _new_grad_of_B(run, gate_up_B, num_experts, peft_B_by_expert, stacks)
        if need_down_A:
            grads[7], dA_down = _new_grad(run, down_A, num_experts, A_by_expert)
        of_activation: dict[str, Any] = {
            "row_weights": weights,
            "activation": activation,
            "has_gate": has_gate,
            "is_concatenated": is_concatenated,
            "dot_dtype": _dot_dtype(weights, bias_of_dot) if need_weights else None,
            "out": h if overwrite else None,
        }
        if dA_down is not None and dB_up is not None and not need_down and makes_u_up:
            # All that reads a, or dh for its rank: where one pass makes it, it needs neither to be there for it.
            made = run.act_grad_grams(
                a,
                h,
                routing,
                **of_activation,
                right_a=u_down,
                out_a=dA_down.mT,
                factor=B_up,
                right_h=xa,
                out_h=dB_up,
                scale=gate_up_scaling,
                seed=seed,
                p=lora_dropout,
            )
        if made is not None:
            dh, grads[9], u_up = made
        else:
            # The gradient of a until now, from here on a times the routing weights.
            dh, grads[9] = run.act_grad(a, h, routing, h_fan_out=0, save_a=need_a, **of_activation)
        if bias_of_dot is not None:
            grads[10] = _bias_dot(run, dout, bias_of_dot, routing, fan_out)
    if need_down:
        grads[2] = run.empty_like(down_proj)
        dw = grads[2] if is_transposed else grads[2].mT
        run.gram(a, dout, routing, dw, left_fan_out=0, right_fan_out=fan_out)
    if need_down_bias:
        grads[4] = run.empty_like(down_proj_bias)
        run.gram(dout, None, routing, grads[4][:, :, None], left_fan_out=fan_out, row_weights=weights)
    if dA_down is not None and made is None:
        dropped = a if seed is None else _drop_activation(run, a, seed, lora_dropout, routing)
        run.gram(dropped, u_down, routing, dA_down.mT, left_fan_out=0)
        del dropped
    a = None  # its memory is free for dX

    # Gate and up projection.
    if made is None:
        u_up = None
        if B_up is not None:
            u_up = _rank_products(run, dh, B_up, xa, routing, dB_up, fan_out=0, scaling=gate_up_scaling)
        elif dB_up is not None:
            run.gram(dh, xa, routing, dB_up, left_fan_out=0)
    run.cast(stacks)
    A_down = B_down = B_up = dB_up = dB_down = None  # their memory is free for dX
    stacks.clear()
    if need_up:
        grads[1] = run.empty_like(gate_up_proj)
        dw = grads[1] if is_transposed else grads[1].mT
        run.gram(x, dh, routing, dw, left_fan_out=fan_out)
    if need_up_bias:
        grads[3] = run.empty_like(gate_up_proj_bias)
        run.gram(dh, None, routing, grads[3][:, :, None], left_fan_out=0)
    if need_up_A:
        grads[5], dA_up = _new_grad(run, gate_up_A, num_experts, A_by_expert)
        dropped = x if seed is None else run.dropout(x, seed, p=lora_dropout, stream=DROPPED_INPUT)
        run.gram(dropped, u_up, routing, dA_up.mT, left_fan_out=fan_out)
        del dropped
    if need_x:
        grads[0] = run.empty(*x.shape, dtype=dx_dtype, device=x.device)
        z, expand = (u_up, A_up) if seed is None else (None, None)
        _gemm_combine(
            run,
            grads[0],
            dh,
            w_up.mT,
            routing,
            z=z,
            expand=expand,
            bias=None,
            weights=None,
            expert_ids=expert_ids,
            in_pieces=not (overwrite and _in_one_piece(w_down, has_gate)),
        )
        if seed is not None and u_up is not None and A_up is not None:
            update = run.empty(*x.shape, dtype=x.dtype, device=x.device)
            _gemm_combine(
                run, update, u_up, A_up, routing, z=None, expand=None, bias=None, weights=None, expert_ids=expert_ids
            )
            run.dropout(update, seed, p=lora_dropout, stream=DROPPED_INPUT, out=grads[0])
    return grads


def _rank_products(
    run: ModuleType,
    dy: Tensor,
    B: Tensor,
    xa: Tensor,
    routing: Routing,
    dB: Optional[Tensor],
    *,
    fan_out: int,
    scaling: float,
) -> Tensor:
    """``scaling * dy B`` of every slot, which dX and dA are made of, and, if it is asked for, dB."""
    if dB is None:
        return run.shrink(dy, B, routing, x_fan_out=fan_out, scale=scaling)
    return run.shrink_gram(dy, B, xa, routing, dB, x_fan_out=fan_out, scale=scaling)


def _bias_dot(run: ModuleType, dout: Tensor, bias: Tensor, routing: Routing, fan_out: int) -> Tensor:
    """``<dout, bias[e]>`` of each slot, scattered ``[S, 1]``: what the bias adds to a routing weight's gradient."""
    return run.shrink(dout, bias[:, :, None], routing, x_fan_out=fan_out, scale=1.0, out_scattered=True)


def _dot_dtype(weights: Tensor, bias: Optional[Tensor]) -> torch.dtype:
    """What the gradient of routing weights is written in: more precisely where a bias adds to it."""
    return weights.dtype if bias is None else torch.promote_types(weights.dtype, torch.float32)


def _weights_grad(dot: Tensor, bias_dot: Optional[Tensor], weights: Tensor) -> Tensor:
    """The gradient of weights ``[T, k]`` from ``dot [S]``, and what `_bias_dot` adds to it."""
    total = dot if bias_dot is None else dot + bias_dot[:, 0]
    return _in_dtype(total, weights.dtype).view(weights.shape)


def _fake_grads(inputs, needs):
    return [torch.empty_like(t) for t, need in zip(inputs, needs, strict=True) if need]


torch.library.define(
    add_op_namespace_prefix("moe_mlp_backward"), torch.library.infer_schema(_moe_mlp_backward, mutates_args=())
)
torch.library.impl(add_op_namespace_prefix("moe_mlp_backward"), "CompositeExplicitAutograd", _moe_mlp_backward)
moe_mlp_backward = ops.moe_mlp_backward.default


@torch.library.register_fake(add_op_namespace_prefix("moe_mlp_backward"))
def _(dout, hidden_states, *rest):
    inputs = [hidden_states.contiguous(), *rest[:8], rest[8].contiguous()]
    return _fake_grads(inputs, rest[-2])


def _dropout(x: Tensor, seed: Tensor, p: float, stream: int, rows: Optional[Tensor]) -> Tensor:
    """See `reference.dropout`."""
    return backend.of(x).dropout(x, seed, p=p, stream=stream, rows=rows)


torch.library.define(add_op_namespace_prefix("dropout"), torch.library.infer_schema(_dropout, mutates_args=()))
torch.library.impl(add_op_namespace_prefix("dropout"), "CompositeExplicitAutograd", _dropout)
dropout = ops.dropout.default


@torch.library.register_fake(add_op_namespace_prefix("dropout"))
def _(x, seed, p, stream, rows):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _activate(h: Tensor, activation: str, has_gate: bool, is_concatenated: bool) -> Tensor:
    """See `reference.activated`."""
    options = (activation, has_gate, is_concatenated)
    return backend.of(h).replay(_activate_body, (h.contiguous(),), options)[0]


def _activate_body(
    run: ModuleType, h: Tensor, activation: str, has_gate: bool, is_concatenated: bool
) -> List[Optional[Tensor]]:
    return [run.activated(h, activation=activation, has_gate=has_gate, is_concatenated=is_concatenated)]


torch.library.define(add_op_namespace_prefix("activate"), torch.library.infer_schema(_activate, mutates_args=()))
torch.library.impl(add_op_namespace_prefix("activate"), "CompositeExplicitAutograd", _activate)
activate = ops.activate.default


@torch.library.register_fake(add_op_namespace_prefix("activate"))
def _(h, activation, has_gate, is_concatenated):
    return h.new_empty(h.shape[0], h.shape[1] // 2 if has_gate else h.shape[1])


def _activate_backward(da: Tensor, h: Tensor, activation: str, has_gate: bool, is_concatenated: bool) -> Tensor:
    """See `reference.activated_grad`."""
    options = (activation, has_gate, is_concatenated)
    return backend.of(h).replay(_activate_backward_body, (da.contiguous(), h), options)[0]


def _activate_backward_body(
    run: ModuleType, da: Tensor, h: Tensor, activation: str, has_gate: bool, is_concatenated: bool
) -> List[Optional[Tensor]]:
    return [run.activated_grad(da, h, activation=activation, has_gate=has_gate, is_concatenated=is_concatenated)]


torch.library.define(
    add_op_namespace_prefix("activate_backward"), torch.library.infer_schema(_activate_backward, mutates_args=())
)
torch.library.impl(add_op_namespace_prefix("activate_backward"), "CompositeExplicitAutograd", _activate_backward)
activate_backward = ops.activate_backward.default


@torch.library.register_fake(add_op_namespace_prefix("activate_backward"))
def _(da, h, activation, has_gate, is_concatenated):
    return torch.empty_like(h, memory_format=torch.contiguous_format)


def _parallel_linear_forward(
    inputs: Tensor,
    expert_weights: Tensor,
    expert_biases: Optional[Tensor],
    A: Optional[Tensor],
    B: Optional[Tensor],
    gates: Optional[Tensor],
    scattered_idxs: Tensor,
    expert_offsets: Tensor,
    k: int,
    scaling: float,
    grouped_in: bool,
    grouped_out: bool,
    needs: List[bool],
) -> List[Tensor]:
    """``[out]``, and with ``needs``, as in `moe_mlp_forward`, what the backward needs: ``xa`` and ``tiles``.

    Factors are by expert or expert-major. With gates ``xa`` is times these, as the gradient of B has it.
    """
    dtype = expert_weights.dtype
    tensors = (
        _in_dtype(inputs, dtype),
        expert_weights,
        expert_biases,
        A,
        B,
        None if gates is None else gates.contiguous(),
        *backend.dense_indices(scattered_idxs, expert_offsets),
    )
    flags = (k, scaling, grouped_in, grouped_out)

    def backward(outputs: List[Optional[Tensor]]) -> None:
        out, *saved = _schema_list(outputs, expert_weights)
        parallel_linear_backward(out, inputs, *tensors[1:5], gates, *saved, *tensors[6:], *flags, needs)

    options = (inputs.dtype, *flags, bool(needs))
    outputs = backend.of(inputs).replay(_linear_forward_body, tensors, options, backward if needs else None)
    return _schema_list(outputs, expert_weights)


def _linear_forward_body(
    run: ModuleType,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    A: Optional[Tensor],
    B: Optional[Tensor],
    gates: Optional[Tensor],
    scattered_idxs: Tensor,
    expert_offsets: Tensor,
    out_dtype: torch.dtype,
    k: int,
    scaling: float,
    grouped_in: bool,
    grouped_out: bool,
    save: bool,
) -> List[Optional[Tensor]]:
    x_fan_out = 0 if grouped_in else k
    num_slots = scattered_idxs.shape[0]
    choices = None if gates is None else gates.shape[1]
    gates = None if gates is None else gates.view(-1)
    ((A, B),) = run.in_factors(weight.dtype, _by_expert(A, B, weight.shape[0], B_by_expert))
    routing = backend.scheduled(run, scattered_idxs, expert_offsets, (weight,))
    xa = gated_xa = expand = None
    if A is not None and B is not None:
        xa, gated_xa = _weighted_shrink(
            run, x, A.mT, routing, gates if save else None, x_fan_out=x_fan_out, scale=scaling
        )
        expand, A = B.mT, None
    y = run.grouped_gemm(
        x,
        weight,
        routing,
        x_fan_out=x_fan_out,
        out_scattered=not grouped_out,
        z=xa,
        expand=expand,
        bias=bias,
        out_dtype=out_dtype if choices is None else weight.dtype,
        zero_tail=True,
    )
    out = y
    if choices is not None:
        out = run.empty(num_slots // choices, y.shape[1], dtype=out_dtype, device=x.device)
        run.combine(y, gates, out, fan_out=choices)
    return [out, xa if gated_xa is None else gated_xa, routing.tiles] if save else [out]


torch.library.define(
    add_op_namespace_prefix("parallel_linear_forward"),
    torch.library.infer_schema(_parallel_linear_forward, mutates_args=()),
)
torch.library.impl(
    add_op_namespace_prefix("parallel_linear_forward"), "CompositeExplicitAutograd", _parallel_linear_forward
)
parallel_linear_forward = ops.parallel_linear_forward.default


@torch.library.register_fake(add_op_namespace_prefix("parallel_linear_forward"))
def _(inputs, expert_weights, expert_biases, A, B, gates, scattered_idxs, expert_offsets, *flags):
    num_slots = scattered_idxs.shape[0]
    out = inputs.new_empty(num_slots if gates is None else gates.shape[0], expert_weights.shape[2])
    if not flags[-1]:
        return [out]
    xa = backend.fake_rank_product(expert_weights, A, num_slots)
    return [out, xa, backend.fake_schedule(scattered_idxs, num_slots, expert_offsets.shape[0])]


def _parallel_linear_backward(
    dout: Tensor,
    inputs: Tensor,
    expert_weights: Tensor,
    expert_biases: Optional[Tensor],
    A: Optional[Tensor],
    B: Optional[Tensor],
    gates: Optional[Tensor],
    xa: Tensor,
    tiles: Tensor,
    scattered_idxs: Tensor,
    expert_offsets: Tensor,
    k: int,
    scaling: float,
    grouped_in: bool,
    grouped_out: bool,
    needs: List[bool],
) -> List[Tensor]:
    """Gradients of those of the first six tensor arguments of `parallel_linear_forward` that ``needs`` says.

    ``xa`` is what that saves: with gates times these.
    """
    dtype = expert_weights.dtype
    tensors = (
        _in_dtype(dout, dtype),
        _in_dtype(inputs, dtype),
        expert_weights,
        expert_biases,
        A,
        B,
        None if gates is None else gates.contiguous(),
        xa,
        tiles,
        *backend.dense_indices(scattered_idxs, expert_offsets),
        expert_biases.to(dtype) if expert_biases is not None and needs[5] else None,
    )
    options = (inputs.dtype, k, scaling, grouped_in, grouped_out, tuple(needs))
    *grads, bias_dot = backend.of(dout).replay(_linear_backward_body, tensors, options)
    if grads[0] is not None:
        grads[0] = _in_dtype(grads[0], inputs.dtype)
    if grads[5] is not None and gates is not None:
        grads[5] = _weights_grad(grads[5], bias_dot, gates)
    return [grad for grad in grads if grad is not None]


def _linear_backward_body(
    run: ModuleType,
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    A: Optional[Tensor],
    B: Optional[Tensor],
    gates: Optional[Tensor],
    xa: Tensor,
    tiles: Tensor,
    scattered_idxs: Tensor,
    expert_offsets: Tensor,
    bias_of_dot: Optional[Tensor],
    dx_dtype: torch.dtype,
    k: int,
    scaling: float,
    grouped_in: bool,
    grouped_out: bool,
    needs: tuple[bool, ...],
) -> List[Optional[Tensor]]:
    """The six gradients, where needed, and what a bias adds to that of the gates."""
    x_fan_out = 0 if grouped_in else k
    dout_fan_out = gates.shape[1] if gates is not None else 0 if grouped_out else 1
    gates = None if gates is None else gates.view(-1)
    num_experts, given_A, given_B = weight.shape[0], A, B
    tile_rows = run.tile_rows(expert_offsets, scattered_idxs.shape[0], (weight,))
    routing = Routing(scattered_idxs, expert_offsets, tiles, tile_rows)
    need_x, need_w, need_bias, need_A, need_B, need_gates = needs
    grads: List[Any] = [None] * 7
    A, B = _by_expert(A, B, num_experts, B_by_expert)
    needs_dx = need_x or need_gates
    ((A, B),) = run.in_factors(weight.dtype, (A if needs_dx else None, B if needs_dx or need_A else None))

    u = dB = None
    stacks: List[tuple[Tensor, Tensor]] = []
    if need_B:
        grads[4], dB = _new_grad_of_B(run, given_B, num_experts, B_by_expert, stacks)
    if B is not None:
        u = _rank_products(run, dout, B, xa, routing, dB, fan_out=dout_fan_out, scaling=scaling)
    elif dB is not None:
        run.gram(dout, xa, routing, dB, left_fan_out=dout_fan_out)
    run.cast(stacks)
    B = dB = None  # their memory is free for dX
    stacks.clear()
    if needs_dx:
        dx = run.grouped_gemm(
            dout,
            weight.mT,
            routing,
            x_fan_out=dout_fan_out,
            out_scattered=gates is None and not grouped_in,
            z=u,
            expand=A,
            zero_tail=gates is None,
        )
        if gates is not None:
            dx, grads[5] = run.act_grad(
                dx,
                x,
                routing,
                h_fan_out=x_fan_out,
                row_weights=gates,
                activation="identity",
                has_gate=False,
                is_concatenated=True,
                dot_dtype=_dot_dtype(gates, bias_of_dot) if need_gates else None,
                out_scattered=not grouped_in,
                zero_tail=True,
            )
        if bias_of_dot is not None:
            grads[6] = _bias_dot(run, dout, bias_of_dot, routing, dout_fan_out)
        if need_x:
            grads[0] = dx
            if x_fan_out > 1:
                grads[0] = run.empty(*x.shape, dtype=dx_dtype, device=x.device)
                run.combine(dx, None, grads[0], fan_out=k)
        del dx
    if need_w:
        grads[1] = run.empty_like(weight)
        run.gram(x, dout, routing, grads[1], left_fan_out=x_fan_out, right_fan_out=dout_fan_out, row_weights=gates)
    if need_bias:
        grads[2] = run.empty_like(bias)
        run.gram(dout, None, routing, grads[2][:, :, None], left_fan_out=dout_fan_out, row_weights=gates)
    if need_A:
        grads[3], dA = _new_grad(run, given_A, num_experts, A_by_expert)
        run.gram(x, u, routing, dA.mT, left_fan_out=x_fan_out, row_weights=gates)
    return grads


torch.library.define(
    add_op_namespace_prefix("parallel_linear_backward"),
    torch.library.infer_schema(_parallel_linear_backward, mutates_args=()),
)
torch.library.impl(
    add_op_namespace_prefix("parallel_linear_backward"), "CompositeExplicitAutograd", _parallel_linear_backward
)
parallel_linear_backward = ops.parallel_linear_backward.default


@torch.library.register_fake(add_op_namespace_prefix("parallel_linear_backward"))
def _(dout, inputs, expert_weights, expert_biases, A, B, gates, *rest):
    contiguous_gates = None if gates is None else gates.contiguous()
    return _fake_grads([inputs.contiguous(), expert_weights, expert_biases, A, B, contiguous_gates], rest[-1])
