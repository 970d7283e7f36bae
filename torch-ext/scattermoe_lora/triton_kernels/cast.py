"""Cast: an adapter's factor dense, in the base's dtype and padded to aligned ranks, where it is not; and back.

PEFT's are float32, and its B has the experts side by side, as its gradient has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..operands import is_read_as_it_is, padded_rank
from .launch import empty, launch

# Elements of a program's block, and experts of it where they lie side by side: 128 bytes of PEFT's float32.
ELEMENTS, EXPERTS = 4096, 32
# Columns up to which a stack is an adapter's. A wider one is of base weights: a second one of it would take as much
# memory as the weights.
WIDEST = 512


@triton.jit
def _cast_kernel(
    x_ptr,
    out_ptr,
    num_experts,
    M,
    N,
    out_M,
    out_N,
    stride_e,
    stride_m,
    stride_n,
    stride_oe,
    stride_om,
    stride_on,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[:, None, None].to(tl.int64)
    tile = tl.program_id(1)
    column_tiles = tl.cdiv(out_N, BLOCK_N)
    m = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)[None, :, None].to(tl.int64)
    n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, None, :].to(tl.int64)
    inside = (e < num_experts) & (m < M) & (n < N)
    # Padding is zeros.
    written = (e < num_experts) & (m < out_M) & (n < out_N)
    # Triton loads by the strides of x and stores by those of out: between them a block is transposed in shared memory.
    x = tl.load(x_ptr + e * stride_e + m * stride_m + n * stride_n, mask=inside, other=0.0)
    out = out_ptr + e * stride_oe + m * stride_om + n * stride_on
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=written)


def in_factor(factor: Tensor, dtype: torch.dtype, rank_dim: int) -> Tensor:
    """See `reference.in_factor`; its ranks are followed by zeros, see `operands.padded_rank`."""
    rank = factor.shape[rank_dim]
    if is_read_as_it_is(factor, dtype) and padded_rank(rank) == rank:
        return factor
    shape = list(factor.shape)
    shape[rank_dim] = padded_rank(rank)
    out = empty(*shape, dtype=dtype, device=factor.device)
    cast(factor, out)
    return out


def cast(x: Tensor, out: Tensor) -> None:
    """``out[:, :M, :N] = x``, zeros elsewhere; ``[E, M, N]`` of any strides into as many experts' matrices."""
    if out.numel() == 0:
        return
    num_experts, M, N = x.shape
    _, out_M, out_N = out.shape
    side_by_side = has_experts_side_by_side(x) or has_experts_side_by_side(out)
    block_e = min(EXPERTS, tiles.next_power_of_2(num_experts)) if side_by_side else 1
    block_n = min(ELEMENTS // (4 * block_e), tiles.next_power_of_2(out_N))
    block_m = min(ELEMENTS // (block_e * block_n), tiles.next_power_of_2(out_M))
    launch(
        _cast_kernel,
        (tiles.cdiv(num_experts, block_e), tiles.cdiv(out_M, block_m) * tiles.cdiv(out_N, block_n)),
        (x, out),
        (num_experts, M, N, out_M, out_N, *x.stride(), *out.stride()),
        4,
        1,
        BLOCK_E=block_e,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )


def has_experts_side_by_side(stack: Tensor) -> bool:
    """Whether an element of ``[E, M, N]`` lies nearer to other experts' than to others of its own, as in PEFT's B."""
    others = [stride for n, stride in zip(stack.shape[1:], stack.stride()[1:], strict=True) if n > 1]
    return stack.shape[0] > 1 and stack.stride(0) < min(others, default=0)


@contextlib.contextmanager
def dense(out: Tensor) -> Iterator[Tensor]:
    """A stack to write in place of ``out``, which it is cast into afterwards; ``out``, where that is no such layout.

    A gram has one expert's sums at a time, and where experts lie side by side each element is a write of 32 bytes. On
    an H200 the two passes that make PEFT's gradients of B took 103 and 196 us so, 48 and 157 densely (8192 tokens; 69
    and 60, 12 and 26 with 512), and each of the casts takes 5 to 8.
    """
    if out.shape[2] > WIDEST or not has_experts_side_by_side(out):
        yield out
        return
    stack = empty(*out.shape, dtype=out.dtype, device=out.device)
    yield stack
    cast(stack, out)
