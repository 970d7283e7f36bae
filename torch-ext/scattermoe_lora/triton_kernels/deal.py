"""Deals a product's tiles to its programs, so that after each full round all have had as many short ones, or one more.

A tile is short if an expert's last rows leave its second half empty; it takes 0.84 of a full one's time. Where tiles
are simply taken in turn, programs that read the same weights drift apart by chance: at GLM-4.5-Air's size, counted,
further than half of L2 holds what they read. There a prototype took an H100 8.8 ms for the four products, 8.1 with
tiles dealt out, and 7.3 with 512 rows for each expert; a step 9.2 and 9.3 ms for 9.8 and 9.7 (two machines).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..types import Routing
from .launch import empty, launch


@triton.jit
def _heights(rows, BLOCK_M: tl.constexpr):
    """Row tiles of experts with so many rows, and how many of them are short: one or none."""
    height = (rows + BLOCK_M - 1) // BLOCK_M
    return height, (height * BLOCK_M - rows >= BLOCK_M // 2).to(tl.int32)


@triton.jit
def _short_before(tile, ends, height, short, num_column_tiles, GROUP_M: tl.constexpr):
    """How many of a product's tiles before this one are short, where an expert's last row tile is that in each column.

    In the order of `tile_of_entry`, without its turns.
    """
    last_group = (height - 1) // GROUP_M * GROUP_M
    of_group = tile - (ends - (height - last_group) * num_column_tiles)
    columns = tl.where(of_group > 0, of_group // tl.maximum(height - last_group, 1), 0)
    return tl.sum(tl.where(ends <= tile, num_column_tiles, columns) * short)


# Column tiles and programs are a model's and a GPU's; one kernel for all.
@triton.jit(do_not_specialize=["num_column_tiles", "programs"])
def _deal_kernel(
    offsets_ptr,
    dealt_ptr,
    num_column_tiles,
    programs,
    num_experts,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """dealt[1 + n * programs + p] = the n-th tile of program p: (expert, first row, end of its rows, column tile).

    A round's tiles follow one another in the order of `tile_of_entry`. The short ones go to programs in turn, from one
    full round to the next; the others, in their order, to the other programs.
    """
    e = tl.arange(0, GROUPS)
    inside = e < num_experts
    start = tl.load(offsets_ptr + e - 1, mask=inside & (e > 0), other=0).to(tl.int32)
    end = tl.load(offsets_ptr + e, mask=inside, other=0).to(tl.int32)
    height, short = _heights(tl.where(inside, end - start, 0), BLOCK_M)
    ends = tl.cumsum(height, axis=0) * num_column_tiles
    first = tl.program_id(0) * programs
    # At least one, of no rows if there are none: every program looks one up, if only to be done.
    size = tl.minimum(programs, tl.maximum(tl.sum(height) * num_column_tiles, 1) - first)
    if size > 0:
        short_first = _short_before(first, ends, height, short, num_column_tiles, GROUP_M)
        num_short = _short_before(first + size, ends, height, short, num_column_tiles, GROUP_M) - short_first
        p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        turn = short_first % size
        of_short = (p - turn + size) % size
        is_short = of_short < num_short
        # Programs before p with a short tile: ``num_short`` have one from ``turn`` on, and after the last the first.
        wrapped = turn + num_short - size
        skipped = tl.where(wrapped > 0, wrapped, tl.where(p < turn, 0, num_short))
        number = tl.where(is_short, short_first + of_short, first - short_first + p - skipped)
        short_ends = tl.cumsum(short, axis=0) * num_column_tiles
        bounds = tl.where(is_short[:, None], short_ends[None, :], (ends - short_ends)[None, :])
        before = (bounds <= number[:, None]) & inside[None, :]
        expert = tl.sum(before.to(tl.int32), axis=1)
        number -= tl.max(tl.where(before, bounds, 0), axis=1)  # of this expert's
        dealt = p < size
        first_row = tl.load(offsets_ptr + expert - 1, mask=dealt & (expert > 0), other=0).to(tl.int32)
        end_row = tl.load(offsets_ptr + expert, mask=dealt & (expert < num_experts), other=0).to(tl.int32)
        row_tiles, short_ones = _heights(end_row - first_row, BLOCK_M)
        group = number // (GROUP_M * num_column_tiles) * GROUP_M
        number -= group * num_column_tiles
        of_group = tl.maximum(tl.minimum(row_tiles - short_ones - group, GROUP_M), 1)
        row_tile = tl.where(is_short, row_tiles - 1, group + number % of_group)
        entry = dealt_ptr + 4 + (first + p) * 4
        tl.store(entry, expert, mask=dealt)
        tl.store(entry + 1, first_row + row_tile * BLOCK_M, mask=dealt)
        tl.store(entry + 2, end_row, mask=dealt)
        tl.store(entry + 3, tl.where(is_short, number, number // of_group), mask=dealt)


def deal(routing: Routing, num_tiles: int, num_column_tiles: int, programs: int, group_m: int) -> Tensor:
    """int32 ``[1 + n, 4]``: after a row that means nothing, the tile of each program in each of its rounds.

    As many tiles as `Routing.tiles` says the experts have, for each column tile, and one without rows where they have
    none; what follows, up to ``num_tiles``, is not written.
    """
    num_experts = routing.num_experts
    dealt = empty(1 + num_tiles, 4, dtype=routing.tiles.dtype, device=routing.tiles.device)
    groups = tiles.next_power_of_2(num_experts)
    block = min(64, max(1, 16384 // groups))  # as in `route.schedule`
    launch(
        _deal_kernel,
        (tiles.cdiv(num_tiles, programs), tiles.cdiv(programs, block)),
        (routing.expert_offsets, dealt),
        (num_column_tiles, programs, num_experts),
        4,
        1,
        BLOCK_M=routing.tile_rows,
        GROUP_M=group_m,
        BLOCK=block,
        GROUPS=groups,
    )
    return dealt
