"""Cast: adapters' factors dense, in the base's dtype and padded to aligned ranks, where they are not; and back.

PEFT's are float32, and its B has the experts side by side, as its gradient has. One launch casts up to four: a host
that feeds a GPU takes 8 to 15 us for each launch, and a step with PEFT's adapters casts ten stacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..operands import is_read_as_it_is, padded_rank
from .launch import empty, launch

# Elements of a program's block, and experts of it where they lie side by side: 128 bytes of PEFT's float32.
ELEMENTS, EXPERTS = 4096, 32
# Stacks of a launch: two factors of two projections. What the kernel is given in place of one: sizes, and a block.
STACKS = 4
NO_SIZES, NO_BLOCK = (0,) * 10, (1, 1, 1)

Factor: TypeAlias = Tensor | None


@triton.jit
def _cast_block(index, x_ptr, out_ptr, num_experts, sizes, BLOCK: tl.constexpr):
    """Casts the block ``index`` of a stack, if it has so many; returns what is left of the index for the next one."""
    M, N, out_M, out_N, stride_e, stride_m, stride_n, stride_oe, stride_om, stride_on = sizes
    BLOCK_E: tl.constexpr = BLOCK[0]
    BLOCK_M: tl.constexpr = BLOCK[1]
    BLOCK_N: tl.constexpr = BLOCK[2]
    expert_blocks = tl.cdiv(num_experts, BLOCK_E)
    column_tiles = tl.cdiv(out_N, BLOCK_N)
    blocks = expert_blocks * tl.cdiv(out_M, BLOCK_M) * column_tiles
    if (index >= 0) & (index < blocks):
        tile = index // expert_blocks
        e = (index % expert_blocks) * BLOCK_E + tl.arange(0, BLOCK_E)[:, None, None].to(tl.int64)
        m = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)[None, :, None].to(tl.int64)
        n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, None, :].to(tl.int64)
        inside = (e < num_experts) & (m < M) & (n < N)
        # Padding is zeros.
        written = (e < num_experts) & (m < out_M) & (n < out_N)
        # Triton loads by the strides of x and stores by those of out: between them a block is transposed in shared
        # memory.
        x = tl.load(x_ptr + e * stride_e + m * stride_m + n * stride_n, mask=inside, other=0.0)
        out = out_ptr + e * stride_oe + m * stride_om + n * stride_on
        tl.store(out, x.to(out_ptr.dtype.element_ty), mask=written)
    return index - blocks


@triton.jit
def _cast_kernel(
    x0_ptr,
    out0_ptr,
    x1_ptr,
    out1_ptr,
    x2_ptr,
    out2_ptr,
    x3_ptr,
    out3_ptr,
    num_experts,
    sizes0,
    sizes1,
    sizes2,
    sizes3,
    BLOCK0: tl.constexpr,
    BLOCK1: tl.constexpr,
    BLOCK2: tl.constexpr,
    BLOCK3: tl.constexpr,
):
    """Up to four stacks, one after another."""
    index = _cast_block(tl.program_id(0), x0_ptr, out0_ptr, num_experts, sizes0, BLOCK0)
    if x1_ptr is not None:
        index = _cast_block(index, x1_ptr, out1_ptr, num_experts, sizes1, BLOCK1)
    if x2_ptr is not None:
        index = _cast_block(index, x2_ptr, out2_ptr, num_experts, sizes2, BLOCK2)
    if x3_ptr is not None:
        _cast_block(index, x3_ptr, out3_ptr, num_experts, sizes3, BLOCK3)


def in_factors(dtype: torch.dtype, *pairs: tuple[Factor, Factor]) -> list[tuple[Factor, Factor]]:
    """See `reference.in_factors`; ranks are followed by zeros, see `operands.padded_rank`."""
    casts: list[tuple[Tensor, Tensor]] = []

    def read(factor: Factor, rank_dim: int) -> Factor:
        if factor is None:
            return None
        rank = factor.shape[rank_dim]
        if is_read_as_it_is(factor, dtype) and padded_rank(rank) == rank:
            return factor
        shape = list(factor.shape)
        shape[rank_dim] = padded_rank(rank)
        casts.append((factor, empty(*shape, dtype=dtype, device=factor.device)))
        return casts[-1][1]

    read_pairs = [(read(A, 1), read(B, 2)) for A, B in pairs]
    cast(casts)
    return read_pairs


def dense(out: Tensor) -> Tensor:
    """See `reference.dense`.

    A dense stack where experts lie side by side. A gram has one expert's sums at a time, and each of their elements
    would be a write of 32 bytes. On an H200 the two passes that make PEFT's gradients of B took 103 and 196 us so, 48
    and 157 densely (8192 tokens; 69 and 60, 12 and 26 with 512), and casting both takes 8 to 16.
    """
    return empty(*out.shape, dtype=out.dtype, device=out.device) if has_experts_side_by_side(out) else out


def cast(stacks: Sequence[tuple[Tensor, Tensor]]) -> None:
    """``out[:, :M, :N] = x``, zeros elsewhere, of each ``(x, out)``: see `reference.cast`.

    ``x`` is ``[E, M, N]``, ``out`` may have more rows and columns; strides are any, E is the same in all stacks.
    """
    stacks = [(x, out) for x, out in stacks if out.numel()]
    for first in range(0, len(stacks), STACKS):
        some = stacks[first : first + STACKS]
        num_experts = some[0][0].shape[0]
        operands: list[Tensor | None] = []
        sizes, blocks, programs = [], [], 0
        for x, out in some:
            block_e, block_m, block_n = _block(x, out)
            operands += (x, out)
            sizes.append((*x.shape[1:], *out.shape[1:], *x.stride(), *out.stride()))
            blocks.append((block_e, block_m, block_n))
            expert_blocks = tiles.cdiv(num_experts, block_e)
            programs += expert_blocks * tiles.cdiv(out.shape[1], block_m) * tiles.cdiv(out.shape[2], block_n)
        absent = STACKS - len(some)
        blocks += [NO_BLOCK] * absent
        launch(
            _cast_kernel,
            (programs, 1),
            (*operands, *(None, None) * absent),
            (num_experts, *sizes, *(NO_SIZES,) * absent),
            4,
            1,
            **{f"BLOCK{i}": block for i, block in enumerate(blocks)},
        )


def _block(x: Tensor, out: Tensor) -> tuple[int, int, int]:
    """A program's experts, rows and columns."""
    num_experts, out_M, out_N = out.shape
    side_by_side = has_experts_side_by_side(x) or has_experts_side_by_side(out)
    block_e = min(EXPERTS, tiles.next_power_of_2(num_experts)) if side_by_side else 1
    block_n = min(ELEMENTS // (4 * block_e), tiles.next_power_of_2(out_N))
    return block_e, min(ELEMENTS // (block_e * block_n), tiles.next_power_of_2(out_M)), block_n


def has_experts_side_by_side(stack: Tensor) -> bool:
    """Whether an element of ``[E, M, N]`` lies nearer to other experts' than to others of its own, as in PEFT's B."""
    others = [stride for n, stride in zip(stack.shape[1:], stack.stride()[1:], strict=True) if n > 1]
    return stack.shape[0] > 1 and stack.stride(0) < min(others, default=0)
