"""Grouped GEMM: ``y[row] = gather(x)[row] @ W[e] + z[row] @ expand[e] + bias[e]``, LoRA in the same accumulator.

One persistent kernel for the four products of a step. What differs is a parameter: how rows of x and of the output are
addressed, and how the weight is laid out.

Rows that a tile has too many read some valid row instead: products do not mix rows, and what they give is not stored.
Columns that it has too many are zeros, as is what lies past the K dimension, which a product sums over.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .. import tiles
from ..operands import tma_can_read
from ..types import Routing
from .act import act, constants
from .device import HOPPER_COLUMNS, gpu, has_tma, uses_hopper_tiles
from .launch import empty, launch
from .rows import operand_rows, scheduled_tile, tile_rows

# Row tiles of an expert that share a sweep over the columns; see `scheduled_tile`.
GROUP_M = 16


@triton.jit
def _load_w(
    w, w_column, inside, expert, k, first_column, K, stride_wk,
    TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_K rows of the expert's weight from k on, by the tile's BLOCK_N columns; zeros outside.

    The one place where a weight is read: another storage format is another branch here, not another kernel.
    """
    if TMA == "k":
        return tl.trans(tl.reshape(w.load([expert, first_column, k]), (BLOCK_N, BLOCK_K)))
    elif TMA == "n":
        return tl.reshape(w.load([expert, k, first_column]), (BLOCK_K, BLOCK_N))
    else:
        kk = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
        mask = inside[None, :] if EVEN_K else inside[None, :] & (kk < K)[:, None]
        return tl.load(w_column[None, :] + kk[:, None] * stride_wk, mask=mask, other=0.0)


@triton.jit
def _lora_step(acc, z_row, expand_column, inside, first, R, stride_er, BLOCK_R: tl.constexpr):
    """BLOCK_R ranks of the LoRA update."""
    r = first + tl.arange(0, BLOCK_R)
    r_mask = r < R
    z = tl.load(z_row[:, None] + r[None, :], mask=r_mask[None, :], other=0.0)
    b_mask = r_mask[:, None] & inside[None, :]
    b = tl.load(expand_column[None, :] + r[:, None].to(tl.int64) * stride_er, mask=b_mask, other=0.0)
    return tl.dot(z, b, acc, input_precision="ieee")


@triton.jit
def _tile(
    x_ptr, x, w, z_ptr, expand_ptr, bias_ptr, out_ptr, scattered_ptr,
    expert, first_row, end, column_tile, N, K, R,
    stride_xm, stride_xk, stride_we, stride_wk, stride_wn, stride_ee, stride_er, stride_en, stride_be, stride_bn,
    X_FAN_OUT: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr, OUT_SCATTERED: tl.constexpr,
    LORA_STEPS: tl.constexpr, UNROLL_LORA: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of the output, of BLOCK_M rows."""
    rows, slots, mask = tile_rows(first_row, end, scattered_ptr, BLOCK_M)
    e = expert.to(tl.int64)
    n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column = n.to(tl.int64)
    inside = n < N
    x_row = x_ptr
    if not X_TMA:
        x_row += operand_rows(rows, slots, X_FAN_OUT) * stride_xm
    w_column = w
    if W_TMA == "":
        w_column = w + e * stride_we + column * stride_wn

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        if X_TMA:
            xk = x.load([first_row, k])
        else:
            kk = (k + tl.arange(0, BLOCK_K)).to(tl.int64)
            if EVEN_K:
                xk = tl.load(x_row[:, None] + kk[None, :] * stride_xk)
            else:
                xk = tl.load(x_row[:, None] + kk[None, :] * stride_xk, mask=(kk < K)[None, :], other=0.0)
        wk = _load_w(
            w, w_column, inside, expert, k, column_tile * BLOCK_N, K, stride_wk, W_TMA, EVEN_K, BLOCK_K, BLOCK_N
        )
        acc = tl.dot(xk, wk, acc, input_precision="ieee")

    if LORA_STEPS > 0:
        expand_column = expand_ptr + e * stride_ee + column * stride_en
        z_row = z_ptr + rows * R
        if UNROLL_LORA:
            for step in tl.static_range(LORA_STEPS):
                acc = _lora_step(acc, z_row, expand_column, inside, step * BLOCK_R, R, stride_er, BLOCK_R)
        else:
            for step in tl.range(0, LORA_STEPS, num_stages=2):
                acc = _lora_step(acc, z_row, expand_column, inside, step * BLOCK_R, R, stride_er, BLOCK_R)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + e * stride_be + column * stride_bn, mask=inside, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out = out_ptr + operand_rows(rows, slots, 1 if OUT_SCATTERED else 0)[:, None] * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask[:, None] & inside[None, :])


@triton.jit
def _grouped_gemm_kernel(
    x_ptr,
    x,
    w,
    z_ptr,
    expand_ptr,
    bias_ptr,
    out_ptr,
    tiles_ptr,
    scattered_ptr,
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
    X_FAN_OUT: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    OUT_SCATTERED: tl.constexpr,
    ZERO_TAIL: tl.constexpr,
    LORA_STEPS: tl.constexpr,
    UNROLL_LORA: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_column_tiles = tl.cdiv(N, BLOCK_N)
    num_row_tiles = tl.load(tiles_ptr + (1 if ZERO_TAIL else 0))
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        expert, first_row, end, column_tile = scheduled_tile(tiles_ptr, tile, num_column_tiles, BLOCK_M, GROUP_M)
        if ZERO_TAIL and expert == num_experts:
            rows, slots, mask = tile_rows(first_row, end, scattered_ptr, BLOCK_M)
            n = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
            out = out_ptr + operand_rows(rows, slots, 1 if OUT_SCATTERED else 0)[:, None] * N + n[None, :]
            zeros = tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty)
            tl.store(out, zeros, mask=mask[:, None] & (n < N)[None, :])
        else:
            _tile(
                x_ptr, x, w, z_ptr, expand_ptr, bias_ptr, out_ptr, scattered_ptr,
                expert, first_row, end, column_tile, N, K, R,
                stride_xm, stride_xk, stride_we, stride_wk, stride_wn,
                stride_ee, stride_er, stride_en, stride_be, stride_bn,
                X_FAN_OUT, X_TMA, W_TMA, OUT_SCATTERED, LORA_STEPS, UNROLL_LORA, EVEN_K,
                BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
            )  # fmt: skip


def _tma_reads(tensor: Tensor, contiguous: int) -> bool:
    return has_tma(gpu(tensor).architecture) and tma_can_read(tensor, contiguous)


def _x_operand(x: Tensor, x_fan_out: int, tile: tiles.Tile) -> TensorDescriptor | None:
    """x for TMA, if its rows are grouped and it can be read so; gathered ones are read by pointer."""
    if x_fan_out == 0 and _tma_reads(x, 1):
        return TensorDescriptor(x, list(x.shape), list(x.stride()), [tile.block_m, tile.block_k])
    return None


def _w_operand(weight: Tensor, tile: tiles.Tile) -> tuple[Any, str]:
    """The weight ``[E, K, N]`` as the kernel takes it: by TMA whichever of K and N is contiguous, else by pointer."""
    E, K, N = weight.shape
    stride_e, stride_k, stride_n = weight.stride()
    if _tma_reads(weight, 1):
        return TensorDescriptor(weight, [E, N, K], [stride_e, stride_n, 1], [1, tile.block_n, tile.block_k]), "k"
    if _tma_reads(weight, 2):
        return TensorDescriptor(weight, [E, K, N], [stride_e, stride_k, 1], [1, tile.block_k, tile.block_n]), "n"
    return weight, ""


def _by_hopper(
    x: Tensor, weight: Tensor, routing: Routing, out: Tensor | None, element_size: int, **options: Any
) -> bool:
    """Whether Hopper's own kernel is there, wants the product, and has computed it."""
    full = weight.shape[2] >= HOPPER_COLUMNS and x.element_size() == element_size == 2
    if not full or not uses_hopper_tiles(x, routing):
        return False
    from .hopper_gemm import hopper_gemm

    return hopper_gemm(x, weight, routing, out, group_m=GROUP_M, **options)


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
    """See `reference.grouped_gemm_act`. Rows of no expert are left unwritten."""
    num_slots, N = routing.num_slots, weight.shape[2]
    layout = {"has_gate": has_gate, "is_concatenated": is_concatenated}
    product: dict[str, Any] = {"x_fan_out": x_fan_out, "z": z, "expand": expand, "bias": bias}
    a = empty(num_slots, N // 2 if has_gate else N, dtype=weight.dtype, device=weight.device)
    h = empty(num_slots, N, dtype=weight.dtype, device=weight.device) if save else None
    if a.numel() == 0:
        return h, a
    options = {"a": a, "activation": constants(activation), **layout}
    if _by_hopper(x, weight, routing, h, weight.element_size(), **product, **options):
        return h, a
    h = grouped_gemm(x, weight, routing, **product, out=h)
    act(h, a, routing, activation=activation, **layout)
    return h if save else None, a


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
    """See `reference.grouped_gemm`. ``out`` must be contiguous. Rows of no expert are unwritten but by zero_tail."""
    num_slots, num_experts = routing.num_slots, routing.num_experts
    K, N = weight.shape[1], weight.shape[2]
    if out is None:
        out = empty(num_slots, N, dtype=out_dtype or weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    layout: dict[str, Any] = {"x_fan_out": x_fan_out, "out_scattered": out_scattered, "zero_tail": zero_tail}
    if _by_hopper(x, weight, routing, out, out.element_size(), **layout, z=z, expand=expand, bias=bias):
        return out
    tile = tiles.gemm_tile(x_fan_out > 0, routing.tile_rows, N, weight.dtype, gpu(weight))
    rank = 0 if z is None else z.shape[1]
    # At rank 64 on an H200, by 16 ranks a step, unrolled, or by 32 in a pipeline: the two products by A, whose columns
    # are contiguous, took 1.40 and 1.65 ms of a Qwen3-30B-A3B step, those by B, whose ranks are, 1.30 and 1.21. On
    # sm_80 four unrolled steps spilled 136 bytes a thread.
    by_columns = expand is None or expand.stride(2) == 1
    unroll_lora = by_columns and (rank <= 32 or gpu(x).architecture == "sm_90")
    block_r = min(16 if unroll_lora else 32, max(16, tiles.next_power_of_2(rank)))
    x_descriptor = _x_operand(x, x_fan_out, tile)
    w_operand, w_tma = _w_operand(weight, tile)
    num_tiles = tiles.num_row_tiles(num_slots, num_experts, routing.tile_rows) * tiles.cdiv(N, tile.block_n)
    launch(
        _grouped_gemm_kernel,
        (min(num_tiles, gpu(x).processors * tile.programs_per_processor), 1),
        (x, x_descriptor, w_operand, z, expand, bias, out, routing.tiles, routing.scattered_idxs),
        (
            num_experts,
            N,
            K,
            rank,
            *x.stride(),
            *weight.stride(),
            *((0, 0, 0) if expand is None else expand.stride()),
            *((0, 0) if bias is None else bias.stride()),
        ),
        tile.num_warps,
        tile.num_stages,
        X_FAN_OUT=x_fan_out,
        X_TMA=x_descriptor is not None,
        W_TMA=w_tma,
        OUT_SCATTERED=out_scattered,
        ZERO_TAIL=zero_tail,
        LORA_STEPS=tiles.cdiv(rank, block_r),
        UNROLL_LORA=unroll_lora,
        EVEN_K=K % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_R=block_r,
        GROUP_M=GROUP_M,
    )
    return out
