"""Gram: a reduction over an expert's rows, ``out[e] = sum w * outer(left, right)``: gradients of A, B, W, bias.

With a factor also ``left @ factor[e]`` of the rows that it reads, as a shrink computes.
"""

from __future__ import annotations

from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..types import Routing
from .combine import MAX_BLOCK, combine
from .device import HOPPER_ROWS, gpu, has_hopper_kernels, uses_hopper_tiles
from .launch import empty, launch
from .rows import expert_rows, operand_rows
from .shrink import shrink
from .totals import partial_sums

# Ranks up to which one pass makes both products: each tile of columns writes its part of a row's product in float32,
# at rank 16 and 256 columns an eighth of what a second pass would read. Alone on an H100 105 us for 161 at rank 16 (dH
# of Qwen3-30B-A3B, 8192 tokens), 449 for 654 (Mixtral); of gathered rows, which come from L2, 114 for 121 and 235 for
# 238 (GLM-4.5-Air). Rank 24 spilled up to 632 bytes a thread. With Hopper's own kernel on an H200 of dO 50 for 96, 109
# for 209, at rank 32 71 for 101, and of dH 74 for 110; at rank 64 no less. And the elements that one launch can add.
FUSED_RANK, HOPPER_FUSED_RANK, FUSED_ELEMENTS = 16, 32, 65535 * MAX_BLOCK


@triton.jit
def _more_chunks(offsets_ptr, num_experts, chunk_rows, EXPERTS: tl.constexpr):
    """Of every expert: ``(index, first row, end, chunks beyond the first, those of it and the experts before)``."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(offsets_ptr + e, mask=e < num_experts, other=0).to(tl.int32)
    start = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < num_experts), other=0).to(tl.int32)
    more = tl.maximum(end - start - 1, 0) // chunk_rows
    return e, start, end, more, tl.cumsum(more)


@triton.jit
def _gram_kernel(
    left_ptr,
    right_ptr,
    row_weights_ptr,
    factor_ptr,
    out_ptr,
    partial_ptr,
    products_ptr,
    offsets_ptr,
    scattered_ptr,
    scale,
    num_experts,
    chunk_rows,
    P,
    Q,
    out_columns,
    stride_pt,
    stride_lm,
    stride_lp,
    stride_rm,
    stride_rq,
    stride_fe,
    stride_fp,
    stride_fq,
    stride_oe,
    stride_op,
    stride_oq,
    LEFT_FAN_OUT: tl.constexpr,
    RIGHT_FAN_OUT: tl.constexpr,
    PART: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of an expert's output, of all its rows; with PART "rest" a partial one, of a chunk that is not the
    expert's first; with "first" that of its first chunk, and the partial ones added. With a factor the part that the
    tile's P columns have in each row's product, ``products [tiles of P, slots, Q]``. Of Q columns, which a rank's
    padding is among, ``out_columns`` are stored."""
    q_tiles = tl.cdiv(Q, BLOCK_Q)
    tiles = tl.cdiv(P, BLOCK_P) * q_tiles
    # All tiles of an expert after one another: its rows are then read from memory once, and from L2 for the others.
    # But of rows that several experts share the same columns of all: 32,768 tokens took an H200 184 us for 196.
    units = tl.num_programs(0) // tiles
    by_columns = (LEFT_FAN_OUT > 1) & (q_tiles == 1)
    unit = tl.where(by_columns, tl.program_id(0) % units, tl.program_id(0) // tiles)
    tile = tl.where(by_columns, tl.program_id(0) // units, tl.program_id(0) % tiles)
    p = (tile // q_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = (tile % q_tiles) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    if PART == "rest":
        e, starts, ends, more, more_until = _more_chunks(offsets_ptr, num_experts, chunk_rows, EXPERTS)
        if unit >= tl.max(more_until):
            return
        mine = e == tl.sum((more_until <= unit).to(tl.int32))
        chunk = 1 + unit - tl.sum(tl.where(mine, more_until - more, 0))
        expert = tl.sum(tl.where(mine, e, 0))
        start = tl.sum(tl.where(mine, starts, 0)) + chunk * chunk_rows
        end = tl.minimum(tl.sum(tl.where(mine, ends, 0)), start + chunk_rows)
    else:
        expert = unit
        start, end = expert_rows(offsets_ptr, unit)
        if PART == "first":
            end = tl.minimum(end, start + chunk_rows)
    dtype: tl.constexpr = left_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    inside = (p < P)[:, None] & (q < Q)[None, :]
    if factor_ptr is not None:
        factor = factor_ptr + expert.to(tl.int64) * stride_fe
        factor += p[:, None].to(tl.int64) * stride_fp + q[None, :].to(tl.int64) * stride_fq
        factor = tl.load(factor, mask=inside, other=0.0)
        products = products_ptr + (tile // q_tiles).to(tl.int64) * stride_pt
    for first in range(start, end, BLOCK_M):
        rows = (first + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask = rows < end
        slots = tl.load(scattered_ptr + rows, mask=mask, other=0)
        left_rows = operand_rows(rows, slots, LEFT_FAN_OUT)
        left = tl.load(
            left_ptr + left_rows[None, :] * stride_lm + p[:, None].to(tl.int64) * stride_lp,
            mask=mask[None, :] & (p < P)[:, None],
            other=0.0,
        )
        if right_ptr is not None:
            right_rows = operand_rows(rows, slots, RIGHT_FAN_OUT)
            right = tl.load(
                right_ptr + right_rows[:, None] * stride_rm + q[None, :].to(tl.int64) * stride_rq,
                mask=mask[:, None] & (q < Q)[None, :],
                other=0.0,
            )
        else:
            right = tl.where(mask[:, None] & (q < Q)[None, :], 1.0, 0.0)
        if row_weights_ptr is not None:
            weights = tl.load(row_weights_ptr + slots, mask=mask, other=0.0).to(tl.float32)
            right = right.to(tl.float32) * weights[:, None]
        acc = tl.dot(left, right.to(dtype), acc, input_precision="ieee")
        if factor_ptr is not None:
            product = tl.dot(tl.trans(left), factor, input_precision="ieee") * scale
            tl.store(products + rows[:, None] * Q + q[None, :], product, mask=mask[:, None] & (q < Q)[None, :])
    of_partial = p[:, None].to(tl.int64) * Q + q[None, :]
    if PART == "rest":
        tl.store(partial_ptr + unit.to(tl.int64) * P * Q + of_partial, acc, mask=inside)
    else:
        if PART == "first":
            if tl.load(offsets_ptr + unit).to(tl.int32) > end:
                e, starts, ends, more, more_until = _more_chunks(offsets_ptr, num_experts, chunk_rows, EXPERTS)
                chunks = tl.sum(tl.where(e == unit, more, 0))
                before = tl.sum(tl.where(e == unit, more_until, 0)) - chunks
                for chunk in range(chunks):
                    partial = partial_ptr + (before + chunk).to(tl.int64) * P * Q
                    acc += tl.load(partial + of_partial, mask=inside, other=0.0)
        out = out_ptr + unit.to(tl.int64) * stride_oe
        out += p[:, None].to(tl.int64) * stride_op + q[None, :].to(tl.int64) * stride_oq
        tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(p < P)[:, None] & (q < out_columns)[None, :])


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
    """See `reference.gram`."""
    _, P, Q = out.shape
    if out.numel() == 0:
        return
    wide = min(P, Q) >= HOPPER_ROWS and row_weights is None and left.element_size() == 2
    if right is not None and wide and has_hopper_kernels(gpu(left).architecture):
        from .hopper_gram import hopper_gram

        if hopper_gram(left, right, routing, out, left_fan_out=left_fan_out, right_fan_out=right_fan_out):
            return
    narrow = _hopper_narrow(left, right, routing, right_fan_out, row_weights)
    if narrow is not None:
        narrow.hopper_narrow(left, right, routing, out, x_fan_out=left_fan_out)
        return
    tile = tiles.gram_tile(P, Q, left.dtype, gpu(left))
    _launch(
        left,
        right,
        routing,
        out,
        tile,
        left_fan_out=left_fan_out,
        right_fan_out=right_fan_out,
        row_weights=row_weights,
    )


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
    """See `reference.shrink_gram`: in one pass where the rank is small, else in two."""
    P = out.shape[1]
    num_slots, Q = routing.num_slots, right.shape[1]
    narrow = _hopper_narrow(x, right, routing, 0, None, factor)
    fused = Q <= (FUSED_RANK if narrow is None else HOPPER_FUSED_RANK) and factor.element_size() == 2
    if not fused or not 0 < num_slots * Q <= FUSED_ELEMENTS or P == 0:
        gram(x, right, routing, out, left_fan_out=x_fan_out)
        return shrink(x, factor, routing, x_fan_out=x_fan_out, scale=scale)
    if narrow is not None:
        return narrow.hopper_narrow(x, right, routing, out, x_fan_out=x_fan_out, factor=factor, scale=scale)
    tile = tiles.shrink_gram_tile(P, Q, x.dtype, gpu(x))
    # Padded, for combine's block and all strides to be the same for any number of slots: they are compiled for. What
    # it adds up in the padding and in rows of no expert was never written, and is never read.
    size = tiles.cdiv(num_slots * Q, MAX_BLOCK) * MAX_BLOCK
    product = empty(1, size, dtype=factor.dtype, device=factor.device)
    products = empty(tiles.cdiv(P, tile.block_m), size, dtype=torch.float32, device=x.device)
    _launch(x, right, routing, out, tile, left_fan_out=x_fan_out, factor=factor, products=products, scale=scale)
    combine(products, None, product, fan_out=products.shape[0])
    return product[0, : num_slots * Q].view(num_slots, Q)


def _hopper_narrow(
    left: Tensor,
    right: Tensor | None,
    routing: Routing,
    right_fan_out: int,
    row_weights: Tensor | None,
    factor: Tensor | None = None,
) -> ModuleType | None:
    """The module of Hopper's own kernel, where it is there, wants the gram, and reads its operands.

    It uses no row tiles, but is made for as many rows as tiles of HOPPER_ROWS are.
    """
    if right is None or right_fan_out != 0 or row_weights is not None or not uses_hopper_tiles(left, routing):
        return None
    from . import hopper_narrow

    return hopper_narrow if hopper_narrow.reads(left, right, factor) else None


def _launch(
    left: Tensor,
    right: Tensor | None,
    routing: Routing,
    out: Tensor,
    tile: tiles.Tile,
    *,
    left_fan_out: int,
    right_fan_out: int = 0,
    row_weights: Tensor | None = None,
    factor: Tensor | None = None,
    products: Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """Launches the kernel, twice where rows are split; with ``factor`` it writes ``products`` too."""
    num_experts, P, out_columns = out.shape
    Q = out_columns if right is None else right.shape[1]
    chunk, partial = partial_sums(routing, out, Q, firsts=False)
    launches = [("all", num_experts)] if partial is None else [("rest", partial.shape[0]), ("first", num_experts)]
    for part, units in launches:
        launch(
            _gram_kernel,
            (units * tiles.cdiv(P, tile.block_m) * tiles.cdiv(Q, tile.block_n), 1),
            (
                left,
                right,
                row_weights,
                factor,
                out,
                partial,
                products,
                routing.expert_offsets,
                routing.scattered_idxs,
            ),
            (
                scale,
                num_experts,
                chunk,
                P,
                Q,
                out_columns,
                0 if products is None else products.stride(0),
                *left.stride(),
                *((0, 0) if right is None else right.stride()),
                *((0, 0, 0) if factor is None else factor.stride()),
                *out.stride(),
            ),
            tile.num_warps,
            tile.num_stages,
            LEFT_FAN_OUT=left_fan_out,
            RIGHT_FAN_OUT=right_fan_out,
            PART=part,
            EXPERTS=max(16, tiles.next_power_of_2(num_experts)),
            BLOCK_P=tile.block_m,
            BLOCK_Q=tile.block_n,
            BLOCK_M=tile.block_k,
        )
