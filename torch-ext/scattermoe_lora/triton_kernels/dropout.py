"""Dropout by counting: which elements stay is a hash of seed, row and column, made anew wherever it is needed.

A pass of its own over what LoRA reads. Inside the shrink and the GEMM it would cost every launch without dropout.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..reference import dropout_threshold
from .launch import empty, launch


@triton.jit
def _mix(h):
    """See `reference._mix`; of uint32, which multiplies modulo 2**32 by itself."""
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def seed_key(seed_ptr, STREAM: tl.constexpr):
    """What all rows of a stream have in common, see `reference.dropout_keep`."""
    seed = tl.load(seed_ptr).to(tl.uint64)
    return _mix(_mix(_mix(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32)) + STREAM)


@triton.jit
def dropped(x, key, number, n, threshold, scale):
    """Elements of rows of these numbers and columns ``n`` after dropout: zero, or times ``scale``."""
    key = _mix(key ^ number.to(tl.uint32))
    bits = _mix(_mix(n.to(tl.uint32) ^ key) + _mix(key ^ 0x9E3779B9))
    keep = (bits >> 1).to(tl.int32) >= threshold
    return tl.where(keep, x * scale, 0.0)


@triton.jit
def _dropout_kernel(
    x_ptr,
    out_ptr,
    seed_ptr,
    rows_ptr,
    N,
    threshold,
    scale,
    stride_xm,
    stride_xn,
    STREAM: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = n < N
    number = row
    if rows_ptr is not None:
        number = tl.load(rows_ptr + row)
    x = tl.load(x_ptr + row * stride_xm + n.to(tl.int64) * stride_xn, mask=mask, other=0.0).to(tl.float32)
    y = dropped(x, seed_key(seed_ptr, STREAM), number, n, threshold, scale)
    out = out_ptr + row * N + n
    if ADD:
        y += tl.load(out, mask=mask, other=0.0).to(tl.float32)
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)


def dropout(
    x: Tensor, seed: Tensor, *, p: float, stream: int, rows: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """See `reference.dropout`. ``out`` must be contiguous."""
    num_rows, N = x.shape
    add = out is not None
    if out is None:
        out = empty(num_rows, N, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_n = min(1024, tiles.next_power_of_2(N))
    launch(
        _dropout_kernel,
        (num_rows, tiles.cdiv(N, block_n)),
        (x, out, seed, rows),
        (N, dropout_threshold(p), 1.0 / (1.0 - p), *x.stride()),
        4,
        1,
        STREAM=stream,
        ADD=add,
        BLOCK_N=block_n,
    )
    return out
