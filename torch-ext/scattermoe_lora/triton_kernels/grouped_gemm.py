"""Grouped GEMM: ``y[row] = gather(x)[row] @ W[e] + z[row] @ expand[e] + bias[e]``, LoRA in the same accumulator.

One kernel for the four products of a step. What differs is a parameter: how rows of x and of the output are addressed,
the weight's strides, and the epilogue:

- ``STORE``: the product.
- ``ACT``: the pre-activation ``h`` and ``a = act(gate) * up``. Gate and up columns alternate inside a tile, whatever
  their places in the weight, so that both halves of a pair lie in one thread's registers.
- ``ACT_GRAD``: the accumulator is ``g``, the gradient of ``a`` before the routing weight. Recomputes ``a`` from the
  saved ``h`` and stores ``dh``, per-tile parts of ``<a, g>``, and ``a`` where a gram will want it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..types import Routing
from .activations import act, act_grad
from .device import dot_precision, on_device, shared_memory
from .rows import operand_rows, tile_rows

# Row tiles that share a sweep over the columns, so that a weight block is read from L2 and not again from memory.
GROUP_M = 8


@triton.jit
def _gate_up_column(i, half: tl.constexpr, width, CONCATENATED: tl.constexpr):
    """The column of the gate (half 0) or up (half 1) value of intermediate unit i."""
    if CONCATENATED:
        return i + half * width
    else:
        return 2 * i + half


@triton.jit
def _grouped_gemm_kernel(
    x_ptr,
    w_ptr,
    z_ptr,
    expand_ptr,
    bias_ptr,
    out_ptr,
    h_ptr,
    a_ptr,
    dot_ptr,
    row_weights_ptr,
    tiles_ptr,
    offsets_ptr,
    scattered_ptr,
    num_slots,
    num_experts,
    num_row_tiles,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_we,
    stride_wk,
    stride_wn,
    stride_ee,
    stride_er,
    stride_en,
    stride_be,
    stride_bn,
    stride_hm,
    stride_hn,
    EPILOGUE: tl.constexpr,
    X_FAN_OUT: tl.constexpr,
    H_FAN_OUT: tl.constexpr,
    OUT_SCATTERED: tl.constexpr,
    ZERO_TAIL: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CONCATENATED: tl.constexpr,
    STORE_H: tl.constexpr,
    STORE_A: tl.constexpr,
    STORE_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    num_column_tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (GROUP_M * num_column_tiles)
    height = tl.minimum(num_row_tiles - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * num_column_tiles)
    row_tile = group * GROUP_M + within % height
    column_tile = within // height

    expert, rows, slots, mask = tile_rows(
        tiles_ptr, offsets_ptr, scattered_ptr, row_tile, num_slots, num_experts, BLOCK_M, 0
    )
    if expert < 0:
        return

    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    out_rows = operand_rows(rows, slots, 1 if OUT_SCATTERED else 0)
    if expert == num_experts:
        if ZERO_TAIL:
            zeros = tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_rows[:, None] * N + n[None, :], zeros, mask=mask[:, None] & (n < N)[None, :])
        return

    e = expert.to(tl.int64)
    # The weight's column of each column of the tile.
    if EPILOGUE == "ACT" and HAS_GATE and CONCATENATED:
        column = (n // 2 + (n % 2) * (N // 2)).to(tl.int64)
    else:
        column = n.to(tl.int64)

    k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + operand_rows(rows, slots, X_FAN_OUT) * stride_xm
    w_column = w_ptr + e * stride_we + column * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        kk = (start + k).to(tl.int64)
        x = tl.load(x_row[:, None] + kk[None, :] * stride_xk, mask=mask[:, None] & (kk < K)[None, :], other=0.0)
        w = tl.load(w_column[None, :] + kk[:, None] * stride_wk, mask=(kk < K)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)

    if HAS_LORA:
        expand_column = expand_ptr + e * stride_ee + column * stride_en
        for start in range(0, R, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            z = tl.load(z_ptr + rows[:, None] * R + r[None, :], mask=mask[:, None] & (r < R)[None, :], other=0.0)
            b = tl.load(
                expand_column[None, :] + r[:, None].to(tl.int64) * stride_er,
                mask=(r < R)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            acc = tl.dot(z, b, acc, input_precision=PRECISION)

    if HAS_BIAS:
        bias = tl.load(bias_ptr + e * stride_be + column * stride_bn, mask=n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]

    if EPILOGUE == "STORE":
        out = out_ptr + out_rows[:, None] * N + n[None, :]
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (n < N)[None, :])

    if EPILOGUE == "ACT":
        if STORE_H:
            h = h_ptr + rows[:, None] * stride_hm + column[None, :] * stride_hn
            tl.store(h, acc.to(h_ptr.dtype.element_ty), mask=mask[:, None] & (n < N)[None, :])
        if HAS_GATE:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
            i = column_tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            width = N // 2
            y = act(gate, ACTIVATION) * up
        else:
            i = n
            width = N
            y = act(acc, ACTIVATION)
        a = a_ptr + rows[:, None] * width + i[None, :]
        tl.store(a, y.to(a_ptr.dtype.element_ty), mask=mask[:, None] & (i < width)[None, :])

    if EPILOGUE == "ACT_GRAD":
        full = mask[:, None] & (n < N)[None, :]
        h_row = h_ptr + operand_rows(rows, slots, H_FAN_OUT)[:, None] * stride_hm
        dh_width = 2 * N if HAS_GATE else N
        dh_row = out_ptr + out_rows[:, None] * dh_width
        weight = tl.load(row_weights_ptr + slots, mask=mask, other=0.0).to(tl.float32)
        da = acc * weight[:, None]
        if HAS_GATE:
            gate_column = _gate_up_column(n, 0, N, CONCATENATED)[None, :]
            up_column = _gate_up_column(n, 1, N, CONCATENATED)[None, :]
            gate = tl.load(h_row + gate_column.to(tl.int64) * stride_hn, mask=full, other=0.0).to(tl.float32)
            up = tl.load(h_row + up_column.to(tl.int64) * stride_hn, mask=full, other=0.0).to(tl.float32)
            activated = act(gate, ACTIVATION)
            a = activated * up
            d_gate = da * up * act_grad(gate, ACTIVATION)
            d_up = da * activated
            tl.store(dh_row + gate_column, d_gate.to(out_ptr.dtype.element_ty), mask=full)
            tl.store(dh_row + up_column, d_up.to(out_ptr.dtype.element_ty), mask=full)
        else:
            h = tl.load(h_row + n[None, :].to(tl.int64) * stride_hn, mask=full, other=0.0).to(tl.float32)
            a = act(h, ACTIVATION)
            tl.store(dh_row + n[None, :], (da * act_grad(h, ACTIVATION)).to(out_ptr.dtype.element_ty), mask=full)
        if STORE_A:
            tl.store(a_ptr + rows[:, None] * N + n[None, :], a.to(a_ptr.dtype.element_ty), mask=full)
        if STORE_DOT:
            dot = tl.sum(tl.where(full, a * acc, 0.0), axis=1)
            tl.store(dot_ptr + slots * num_column_tiles + column_tile, dot, mask=mask)


def _launch(
    epilogue: str,
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    *,
    x_fan_out: int,
    z: Tensor | None,
    expand: Tensor | None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    h: Tensor | None = None,
    a: Tensor | None = None,
    dot: Tensor | None = None,
    row_weights: Tensor | None = None,
    h_fan_out: int = 0,
    out_scattered: bool = False,
    zero_tail: bool = False,
    activation: str = "identity",
    has_gate: bool = False,
    is_concatenated: bool = True,
) -> None:
    num_slots, num_experts = routing.num_slots, routing.num_experts
    K, N = weight.shape[1], weight.shape[2]
    num_row_tiles = routing.tiles.shape[0]
    if num_row_tiles == 0 or N == 0:
        return
    tile = _tile(routing, weight)
    rank = 0 if z is None else z.shape[1]
    with on_device(x):
        _grouped_gemm_kernel[(num_row_tiles * triton.cdiv(N, tile.block_n),)](
            x,
            weight,
            z,
            expand,
            bias,
            out,
            h,
            a,
            dot,
            row_weights,
            routing.tiles,
            routing.expert_offsets,
            routing.scattered_idxs,
            num_slots,
            num_experts,
            num_row_tiles,
            N,
            K,
            rank,
            *x.stride(),
            *weight.stride(),
            *((0, 0, 0) if expand is None else expand.stride()),
            *((0, 0) if bias is None else bias.stride()),
            *((0, 0) if h is None else h.stride()),
            EPILOGUE=epilogue,
            X_FAN_OUT=x_fan_out,
            H_FAN_OUT=h_fan_out,
            OUT_SCATTERED=out_scattered,
            ZERO_TAIL=zero_tail,
            HAS_LORA=z is not None,
            HAS_BIAS=bias is not None,
            ACTIVATION=activation,
            HAS_GATE=has_gate,
            CONCATENATED=is_concatenated,
            STORE_H=h is not None,
            STORE_A=a is not None,
            STORE_DOT=dot is not None,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            BLOCK_R=min(64, max(16, tiles.next_power_of_2(rank))),
            GROUP_M=GROUP_M,
            PRECISION=dot_precision(weight.dtype),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def _tile(routing: Routing, weight: Tensor) -> tiles.Tile:
    rows = tiles.block_m(routing.num_slots, routing.num_experts)
    return tiles.gemm_tile(rows, weight.shape[2], weight.dtype, shared_memory(weight))


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
    """See `reference.grouped_gemm`. ``out`` must be contiguous."""
    if out is None:
        out = weight.new_empty(routing.num_slots, weight.shape[2], dtype=out_dtype)
    _launch(
        "STORE",
        x,
        weight,
        routing,
        x_fan_out=x_fan_out,
        z=z,
        expand=expand,
        bias=bias,
        out=out,
        out_scattered=out_scattered,
        zero_tail=zero_tail,
    )
    return out


def grouped_gemm_act(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    *,
    x_fan_out: int,
    activation: str,
    has_gate: bool,
    is_concatenated: bool,
    z: Tensor | None = None,
    expand: Tensor | None = None,
    bias: Tensor | None = None,
    save_h: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """See `reference.grouped_gemm_act`. Rows of no expert are left unwritten (and never read)."""
    N = weight.shape[2]
    h = weight.new_empty(routing.num_slots, N) if save_h else None
    a = weight.new_empty(routing.num_slots, N // 2 if has_gate else N)
    _launch(
        "ACT",
        x,
        weight,
        routing,
        x_fan_out=x_fan_out,
        z=z,
        expand=expand,
        bias=bias,
        out=a,
        h=h,
        a=a,
        activation=activation,
        has_gate=has_gate,
        is_concatenated=is_concatenated,
    )
    return h, a


def grouped_gemm_act_grad(
    dout: Tensor,
    weight: Tensor,
    routing: Routing,
    *,
    dout_fan_out: int,
    h: Tensor,
    h_fan_out: int,
    row_weights: Tensor,
    activation: str,
    has_gate: bool,
    is_concatenated: bool,
    z: Tensor | None = None,
    expand: Tensor | None = None,
    save_a: bool = False,
    need_dot: bool = True,
    out_scattered: bool = False,
    zero_tail: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `reference.grouped_gemm_act_grad`. Rows of no expert are left unwritten without ``zero_tail``."""
    num_slots, N = routing.num_slots, weight.shape[2]
    dh = weight.new_empty(num_slots, h.shape[1])
    a = weight.new_empty(num_slots, N) if save_a else None
    parts = None
    if need_dot:
        # Zeros: slots of no expert have no tile to write theirs.
        parts = torch.zeros(
            num_slots, triton.cdiv(N, _tile(routing, weight).block_n), dtype=torch.float32, device=weight.device
        )
    _launch(
        "ACT_GRAD",
        dout,
        weight,
        routing,
        x_fan_out=dout_fan_out,
        z=z,
        expand=expand,
        out=dh,
        h=h,
        a=a,
        dot=parts,
        row_weights=row_weights,
        h_fan_out=h_fan_out,
        out_scattered=out_scattered,
        zero_tail=zero_tail,
        activation=activation,
        has_gate=has_gate,
        is_concatenated=is_concatenated,
    )
    return dh, a, None if parts is None else parts.sum(1)
