"""Combine: the gather-reduce ``out[t] = sum_j w[t, j] * y[t, j]`` of a token's slots, in float32, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from .launch import launch

# Columns of a program, of rows that have as many.
MAX_BLOCK = 1024


@triton.jit
def _combine_kernel(
    y_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    N,
    num_experts,
    stride_out,
    FAN_OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for j in range(FAN_OUT):
        slot = t * FAN_OUT + j
        valid = mask
        if ids_ptr is not None:
            expert = tl.load(ids_ptr + slot)
            valid = n < tl.where((expert >= 0) & (expert < num_experts), N, 0)
        y = tl.load(y_ptr + slot * N + n, mask=valid, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            # Not y * weight where the slot is not valid: 0 * Inf would be NaN.
            weight = tl.load(weights_ptr + slot).to(tl.float32)
            y = tl.where(valid, y * weight, 0.0)
        acc += y
    tl.store(out_ptr + t * stride_out + n, acc.to(out_ptr.dtype.element_ty), mask=mask)


def combine(
    y: Tensor,
    weights: Tensor | None,
    out: Tensor,
    *,
    fan_out: int,
    expert_ids: Tensor | None = None,
    num_experts: int = 0,
) -> None:
    """See `reference.combine`. ``y`` must be contiguous, and so must the rows of ``out``."""
    num_tokens, N = out.shape
    if out.numel() == 0:
        return
    block_n = min(MAX_BLOCK, tiles.next_power_of_2(N))
    launch(
        _combine_kernel,
        (num_tokens, tiles.cdiv(N, block_n)),
        (y, weights, expert_ids, out),
        (N, num_experts, out.stride(0)),
        4,
        1,
        FAN_OUT=fan_out,
        BLOCK_N=block_n,
    )
