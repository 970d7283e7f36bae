"""Gram: a reduction over an expert's rows, ``out[e] = sum w * outer(left, right)``: gradients of A, B, W, bias."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..types import Routing
from .device import gpu
from .launch import launch
from .rows import operand_rows


@triton.jit
def _gram_kernel(
    left_ptr,
    right_ptr,
    row_weights_ptr,
    out_ptr,
    offsets_ptr,
    scattered_ptr,
    P,
    Q,
    stride_lm,
    stride_lp,
    stride_rm,
    stride_rq,
    stride_oe,
    stride_op,
    stride_oq,
    LEFT_FAN_OUT: tl.constexpr,
    RIGHT_FAN_OUT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    p_tiles = tl.cdiv(P, BLOCK_P)
    expert = tl.program_id(0) // p_tiles
    p = (tl.program_id(0) % p_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    end = tl.load(offsets_ptr + expert).to(tl.int32)
    dtype: tl.constexpr = left_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
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
        if HAS_RIGHT:
            right_rows = operand_rows(rows, slots, RIGHT_FAN_OUT)
            right = tl.load(
                right_ptr + right_rows[:, None] * stride_rm + q[None, :].to(tl.int64) * stride_rq,
                mask=mask[:, None] & (q < Q)[None, :],
                other=0.0,
            )
        else:
            right = tl.where(mask[:, None] & (q < Q)[None, :], 1.0, 0.0)
        if HAS_WEIGHTS:
            weights = tl.load(row_weights_ptr + slots, mask=mask, other=0.0).to(tl.float32)
            right = right.to(tl.float32) * weights[:, None]
        acc = tl.dot(left, right.to(dtype), acc, input_precision="ieee")
    out = out_ptr + expert.to(tl.int64) * stride_oe
    out += p[:, None].to(tl.int64) * stride_op + q[None, :].to(tl.int64) * stride_oq
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(p < P)[:, None] & (q < Q)[None, :])


def gram(
    left: Tensor,
    right: Tensor | None,
    routing: Routing,
    out: Tensor,
    *,
    left_fan_out: int,
    right_fan_out: int = 0,
    row_weights: Tensor | None = None,
) -> Tensor:
    """See `reference.gram`."""
    num_experts, P, Q = out.shape
    if out.numel() == 0:
        return out
    tile = tiles.gram_tile(P, Q, left.dtype, gpu(left))
    launch(
        _gram_kernel,
        (num_experts * tiles.cdiv(P, tile.block_m), tiles.cdiv(Q, tile.block_n)),
        (left, right, row_weights, out, routing.expert_offsets, routing.scattered_idxs),
        (P, Q, *left.stride(), *((0, 0) if right is None else right.stride()), *out.stride()),
        tile.num_warps,
        tile.num_stages,
        LEFT_FAN_OUT=left_fan_out,
        RIGHT_FAN_OUT=right_fan_out,
        HAS_RIGHT=right is not None,
        HAS_WEIGHTS=row_weights is not None,
        BLOCK_P=tile.block_m,
        BLOCK_Q=tile.block_n,
        BLOCK_M=tile.block_k,
    )
    return out
