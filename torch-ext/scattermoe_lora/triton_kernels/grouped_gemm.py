"""Grouped GEMM: ``y[row] = gather(x)[row] @ W[e] + z[row] @ expand[e] + bias[e]``, LoRA in the same accumulator.

One persistent kernel for the four products of a step. What differs is a parameter: how rows of x and of the output are
addressed, how the weight is laid out, and the epilogue:

- ``STORE``: the product.
- ``ACT``: the pre-activation ``h`` and ``a = act(gate) * up``. A tile holds as many gate as up columns, for the same
  units, whatever their places in the weight, so that both halves of a pair lie in one thread's registers.
- ``ACT_GRAD``: the accumulator is ``g``, the gradient of ``a`` before the routing weight. Recomputes ``a`` from the
  saved ``h`` and stores ``dh``, per-tile parts of ``<a, g>``, and ``a`` where a gram will want it.

Rows and columns that a tile has too many read some valid row or column instead: products do not mix rows or columns,
and what they give is not stored. Only the K dimension, which a product sums over, is masked.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import tiles
from ..types import Routing
from .activations import act, act_grad
from .device import gpu
from .launch import launch
from .rows import operand_rows, tile_rows

# Row tiles that share a sweep over the columns, so that a weight block is read from L2 and not again from memory.
GROUP_M = 8


@triton.jit
def _load_x(x, x_row, first_row, k, K, stride_xk, TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_M rows of x by BLOCK_K columns from k on; columns past K are zeros."""
    if TMA:
        return x.load([first_row, k])
    else:
        kk = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        if EVEN_K:
            return tl.load(x_row[:, None] + kk[None, :] * stride_xk)
        else:
            return tl.load(x_row[:, None] + kk[None, :] * stride_xk, mask=(kk < K)[None, :], other=0.0)


@triton.jit
def _load_w(
    w,
    w_column,
    expert,
    k,
    i,
    K,
    stride_wk,
    TMA: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_K rows of the expert's weight from k on, by the tile's BLOCK_N columns; rows past K are zeros.

    The one place where a weight is read: another storage format is another branch here, not another kernel.
    """
    if TMA == "k":
        block = w.load([expert, 0, i, k])
        return tl.trans(tl.reshape(block, (BLOCK_N, BLOCK_K)))
    elif TMA == "n":
        block = w.load([expert, k, 0, i])
        return tl.reshape(block, (BLOCK_K, BLOCK_N))
    else:
        kk = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        if EVEN_K:
            return tl.load(w_column[None, :] + kk[:, None] * stride_wk)
        else:
            return tl.load(w_column[None, :] + kk[:, None] * stride_wk, mask=(kk < K)[:, None], other=0.0)


@triton.jit
def _grouped_gemm_kernel(
    x,
    w,
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
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    H_FAN_OUT: tl.constexpr,
    OUT_SCATTERED: tl.constexpr,
    ZERO_TAIL: tl.constexpr,
    LORA_STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CONCATENATED: tl.constexpr,
    STORE_H: tl.constexpr,
    STORE_A: tl.constexpr,
    STORE_DOT: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # In an ACT tile of concatenated weights the first half of the columns is gate, the second up.
    HALVES: tl.constexpr = 2 if EPILOGUE == "ACT" and HAS_GATE and CONCATENATED else 1
    WIDTH: tl.constexpr = BLOCK_N // HALVES
    num_column_tiles = tl.cdiv(N, BLOCK_N)
    num_row_tiles = tl.load(tiles_ptr + (1 if ZERO_TAIL else 0))
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        group = tile // (GROUP_M * num_column_tiles)
        height = tl.minimum(num_row_tiles - group * GROUP_M, GROUP_M)
        within = tile % (GROUP_M * num_column_tiles)
        row_tile = group * GROUP_M + within % height
        column_tile = within // height

        expert, first_row, rows, slots, mask = tile_rows(
            tiles_ptr, offsets_ptr, scattered_ptr, row_tile, num_slots, num_experts, BLOCK_M, 0
        )
        n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        out_rows = operand_rows(rows, slots, 1 if OUT_SCATTERED else 0)
        if ZERO_TAIL and expert == num_experts:
            zeros = tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_rows[:, None] * N + n[None, :], zeros, mask=mask[:, None] & (n < N)[None, :])
        else:
            e = expert.to(tl.int64)
            # The weight's column of each column of the tile.
            i = column_tile * WIDTH + tl.arange(0, BLOCK_N) % WIDTH
            column = tl.minimum(i, N // HALVES - 1) + (tl.arange(0, BLOCK_N) // WIDTH) * (N // HALVES)
            column = column.to(tl.int64)
            x_row = x
            if not X_TMA:
                x_row = x + operand_rows(rows, slots, X_FAN_OUT) * stride_xm
            w_column = w
            if W_TMA == "":
                w_column = w + e * stride_we + column * stride_wn

            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in tl.range(0, K, BLOCK_K):
                xk = _load_x(x, x_row, first_row, k, K, stride_xk, X_TMA, EVEN_K, BLOCK_K)
                wk = _load_w(
                    w, w_column, expert, k, column_tile * WIDTH, K, stride_wk, W_TMA, HALVES, EVEN_K, BLOCK_K, BLOCK_N
                )
                acc = tl.dot(xk, wk, acc, input_precision="ieee")

            if LORA_STEPS > 0:
                expand_column = expand_ptr + e * stride_ee + column * stride_en
                for step in tl.static_range(LORA_STEPS):
                    r = step * BLOCK_R + tl.arange(0, BLOCK_R)
                    z = tl.load(z_ptr + rows[:, None] * R + r[None, :], mask=(r < R)[None, :], other=0.0)
                    b = tl.load(
                        expand_column[None, :] + r[:, None].to(tl.int64) * stride_er, mask=(r < R)[:, None], other=0.0
                    )
                    acc = tl.dot(z, b, acc, input_precision="ieee")

            if HAS_BIAS:
                acc += tl.load(bias_ptr + e * stride_be + column * stride_bn).to(tl.float32)[None, :]

            if EPILOGUE == "STORE":
                out = out_ptr + out_rows[:, None] * N + n[None, :]
                tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask[:, None] & (n < N)[None, :])
            if EPILOGUE == "ACT":
                _act_epilogue(
                    acc, h_ptr, a_ptr, rows, mask, column_tile, N, stride_hm, stride_hn,
                    ACTIVATION, HAS_GATE, CONCATENATED, STORE_H, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            if EPILOGUE == "ACT_GRAD":
                _act_grad_epilogue(
                    acc, h_ptr, out_ptr, a_ptr, dot_ptr, row_weights_ptr, rows, slots, out_rows, mask,
                    column_tile, num_column_tiles, N, stride_hm, stride_hn,
                    H_FAN_OUT, ACTIVATION, HAS_GATE, CONCATENATED, STORE_A, STORE_DOT, BLOCK_M, BLOCK_N,
                )  # fmt: skip


@triton.jit
def _act_epilogue(
    acc, h_ptr, a_ptr, rows, mask, column_tile, N, stride_hm, stride_hn,
    ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr, CONCATENATED: tl.constexpr, STORE_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    if HAS_GATE:
        width = N // 2
        i = column_tile * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        if CONCATENATED:
            gate, up = _halves(acc, BLOCK_M, BLOCK_N)
        else:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        y = act(gate, ACTIVATION) * up
    else:
        width = N
        i = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        y = act(acc, ACTIVATION)
    full = mask[:, None] & (i < width)[None, :]
    if STORE_H:
        h_row = h_ptr + rows[:, None] * stride_hm
        if HAS_GATE and CONCATENATED:
            tl.store(h_row + i[None, :] * stride_hn, gate.to(h_ptr.dtype.element_ty), mask=full)
            tl.store(h_row + (i + width)[None, :] * stride_hn, up.to(h_ptr.dtype.element_ty), mask=full)
        else:
            n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            h = h_row + n[None, :] * stride_hn
            tl.store(h, acc.to(h_ptr.dtype.element_ty), mask=mask[:, None] & (n < N)[None, :])
    tl.store(a_ptr + rows[:, None] * width + i[None, :], y.to(a_ptr.dtype.element_ty), mask=full)


@triton.jit
def _halves(x, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def _act_grad_epilogue(
    acc, h_ptr, dh_ptr, a_ptr, dot_ptr, row_weights_ptr, rows, slots, out_rows, mask,
    column_tile, num_column_tiles, N, stride_hm, stride_hn,
    H_FAN_OUT: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr, CONCATENATED: tl.constexpr,
    STORE_A: tl.constexpr, STORE_DOT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    weight = tl.load(row_weights_ptr + slots, mask=mask, other=0.0).to(tl.float32)
    h_row = h_ptr + operand_rows(rows, slots, H_FAN_OUT) * stride_hm
    dh_row = dh_ptr + out_rows * (2 * N if HAS_GATE else N)
    a_row = a_ptr
    if STORE_A:
        a_row = a_ptr + rows * N
    # In quarters of the columns: h, a and dh of a whole tile beside its accumulator spill 4 KB a thread.
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    dot = tl.zeros((BLOCK_M,), tl.float32)
    for half in tl.static_range(2):
        quarters = _halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
        for quarter in tl.static_range(2):
            n = column_tile * BLOCK_N + (2 * half + quarter) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            dot += _act_grad_columns(
                quarters[quarter], h_row, dh_row, a_row, weight, mask, n, N, stride_hn,
                ACTIVATION, HAS_GATE, CONCATENATED, STORE_A,
            )  # fmt: skip
    if STORE_DOT:
        tl.store(dot_ptr + slots * num_column_tiles + column_tile, dot, mask=mask)


@triton.jit
def _act_grad_columns(
    g, h_row, dh_row, a_row, weight, mask, n, N, stride_hn,
    ACTIVATION: tl.constexpr, HAS_GATE: tl.constexpr, CONCATENATED: tl.constexpr, STORE_A: tl.constexpr,
):  # fmt: skip
    """Stores ``dh`` and ``a`` for some columns of a tile; returns their part of ``<a, g>``."""
    full = mask[:, None] & (n < N)[None, :]
    dtype: tl.constexpr = dh_row.dtype.element_ty
    da = g * weight[:, None]
    if HAS_GATE:
        gate_n = (n if CONCATENATED else 2 * n)[None, :]
        up_n = (n + N if CONCATENATED else 2 * n + 1)[None, :]
        gate = tl.load(h_row[:, None] + gate_n.to(tl.int64) * stride_hn, mask=full, other=0.0).to(tl.float32)
        up = tl.load(h_row[:, None] + up_n.to(tl.int64) * stride_hn, mask=full, other=0.0).to(tl.float32)
        activated = act(gate, ACTIVATION)
        a = activated * up
        tl.store(dh_row[:, None] + gate_n, (da * up * act_grad(gate, ACTIVATION)).to(dtype), mask=full)
        tl.store(dh_row[:, None] + up_n, (da * activated).to(dtype), mask=full)
    else:
        h = tl.load(h_row[:, None] + n[None, :].to(tl.int64) * stride_hn, mask=full, other=0.0).to(tl.float32)
        a = act(h, ACTIVATION)
        tl.store(dh_row[:, None] + n[None, :], (da * act_grad(h, ACTIVATION)).to(dtype), mask=full)
    if STORE_A:
        tl.store(a_row[:, None] + n[None, :], a.to(dtype), mask=full)
    return tl.sum(tl.where(full, a * g, 0.0), axis=1)


def _tma_can_read(tensor: Tensor, contiguous: int) -> bool:
    """Whether TMA can read a tensor along a dimension: stride 1 there, a 16-byte aligned base and other strides."""
    if tensor.stride(contiguous) != 1 or tensor.numel() == 0 or tensor.data_ptr() % 16:
        return False
    size = tensor.element_size()
    others = [stride for dim, stride in enumerate(tensor.stride()) if dim != contiguous]
    return all(stride > 0 and stride * size % 16 == 0 for stride in others)


def _x_operand(x: Tensor, x_fan_out: int, tile: tiles.Tile) -> tuple[Any, bool]:
    """x as the kernel takes it: grouped contiguous rows by TMA, gathered rows by pointer."""
    if x_fan_out == 0 and _tma_can_read(x, 1):
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [tile.block_m, tile.block_k]), True
    return x, False


def _w_operand(weight: Tensor, halves: int, tile: tiles.Tile) -> tuple[Any, str]:
    """The weight ``[E, K, N]`` as the kernel takes it: by TMA whichever of K and N is contiguous, else by pointer.

    N is split in ``halves`` (gate and up), so that one block takes the same columns of both.
    """
    E, K, N = weight.shape
    stride_e, stride_k, stride_n = weight.stride()
    width, block = N // halves, tile.block_n // halves
    if _tma_can_read(weight, 1):
        strides = [stride_e, stride_n * width, stride_n, 1]
        return TensorDescriptor(weight, [E, halves, width, K], strides, [1, halves, block, tile.block_k]), "k"
    if _tma_can_read(weight, 2) and width * weight.element_size() % 16 == 0:
        strides = [stride_e, stride_k, width, 1]
        return TensorDescriptor(weight, [E, K, halves, width], strides, [1, tile.block_k, halves, block]), "n"
    return weight, ""


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
    if num_slots == 0 or N == 0:
        return
    tile = _tile(epilogue, routing, weight)
    rank = 0 if z is None else z.shape[1]
    block_r = min(64, max(16, tiles.next_power_of_2(rank)))
    halves = 2 if epilogue == "ACT" and has_gate and is_concatenated else 1
    x_operand, x_tma = _x_operand(x, x_fan_out, tile)
    w_operand, w_tma = _w_operand(weight, halves, tile)
    num_tiles = tiles.num_row_tiles(num_slots, num_experts, tile.block_m) * tiles.cdiv(N, tile.block_n)
    num_programs = min(num_tiles, gpu(x).processors * tile.programs_per_processor)
    launch(
        _grouped_gemm_kernel,
        (num_programs,),
        x_operand,
        w_operand,
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
        X_TMA=x_tma,
        W_TMA=w_tma,
        H_FAN_OUT=h_fan_out,
        OUT_SCATTERED=out_scattered,
        ZERO_TAIL=zero_tail,
        LORA_STEPS=tiles.cdiv(rank, block_r),
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        HAS_GATE=has_gate,
        CONCATENATED=is_concatenated,
        STORE_H=h is not None,
        STORE_A=a is not None,
        STORE_DOT=dot is not None,
        EVEN_K=K % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=block_r,
        GROUP_M=GROUP_M,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _tile(epilogue: str, routing: Routing, weight: Tensor) -> tiles.Tile:
    rows = tiles.block_m(routing.num_slots, routing.num_experts)
    return tiles.gemm_tile(epilogue, rows, weight.shape[2], weight.dtype, gpu(weight))


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
            num_slots,
            tiles.cdiv(N, _tile("ACT_GRAD", routing, weight).block_n),
            dtype=torch.float32,
            device=weight.device,
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
