"""Route: expert ids to grouped order by a stable sort, and the schedule of row tiles, all on the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from .launch import call, empty, launch

# Slots of one program. The rank of a slot among its block's equals is a BLOCK x BLOCK comparison: 128 keeps it at 128
# registers a thread.
BLOCK = 128
# Slots up to which one kernel sorts, comparing each with all, instead of four: 2048 took an H200 5 us for 9, 4096 took
# 10 for 9, and a launch costs the host as much. It compares FEW_BLOCK of them with OTHERS at a time.
FEW, FEW_BLOCK, OTHERS = 4096, 16, 256
# Experts counted in one step: bounds the BLOCK x EXPERTS comparison likewise.
EXPERTS = 128


@triton.jit
def _expert_ids(ids_ptr, slots, num_slots, num_experts):
    # Compared before it is cut to 32 bits: 2**32 is nobody's, not expert 0's.
    ids = tl.load(ids_ptr + slots, mask=slots < num_slots, other=0)
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


# Sizes that follow the number of tokens are not compiled for being 1 or divisible by 16: that comes and goes with it.
@triton.jit(do_not_specialize=["num_slots"])
def _sort_kernel(
    ids_ptr,
    sorted_ptr,
    scattered_ptr,
    offsets_ptr,
    num_slots,
    num_experts,
    BLOCK: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """A slot goes after those of lesser experts and the earlier ones of its own; an expert ends after its last one."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # slots, and experts
    ids = _expert_ids(ids_ptr, local, num_slots, num_experts)
    row = tl.zeros((BLOCK, OTHERS), tl.int32)  # summed over the others at the end, not at every step
    ends = tl.zeros((BLOCK, OTHERS), tl.int32)
    for start in range(0, num_slots, OTHERS):
        slots = start + tl.arange(0, OTHERS)
        others = _expert_ids(ids_ptr, slots, num_slots, num_experts)
        others = tl.where(slots < num_slots, others, num_experts + 1)[None, :]
        before = (others < ids[:, None]) | ((others == ids[:, None]) & (slots[None, :] < local[:, None]))
        row += before.to(tl.int32)
        ends += (others <= local[:, None]).to(tl.int32)
    row, ends = tl.sum(row, axis=1), tl.sum(ends, axis=1)
    tl.store(sorted_ptr + row, ids.to(tl.int64), mask=local < num_slots)
    tl.store(scattered_ptr + row, local.to(tl.int64), mask=local < num_slots)
    tl.store(offsets_ptr + local, ends.to(tl.int64), mask=local < num_experts)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _count_kernel(ids_ptr, counts_ptr, num_slots, num_blocks, num_experts, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    """counts[e, block] = how many of the block's slots chose e; row num_experts counts the slots of no expert."""
    block = tl.program_id(0)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    ids = _expert_ids(ids_ptr, slots, num_slots, num_experts)
    ids = tl.where(slots < num_slots, ids, -1)
    for start in range(0, num_experts + 1, EXPERTS):
        experts = start + tl.arange(0, EXPERTS)
        counts = tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
        tl.store(counts_ptr + experts * num_blocks + block, counts, mask=experts <= num_experts)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _place_kernel(
    ids_ptr,
    counts_ptr,
    ends_ptr,
    sorted_ptr,
    scattered_ptr,
    offsets_ptr,
    num_slots,
    num_blocks,
    num_experts,
    BLOCK: tl.constexpr,
):
    """Each slot goes where its expert's earlier blocks end, plus its rank among the block's slots of that expert.

    The first program also writes where each expert ends.
    """
    block = tl.program_id(0)
    local = tl.arange(0, BLOCK)
    slots = block * BLOCK + local
    mask = slots < num_slots
    ids = _expert_ids(ids_ptr, slots, num_slots, num_experts)
    earlier = (ids[None, :] == ids[:, None]) & (local[None, :] < local[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    cell = ids * num_blocks + block
    end = tl.load(ends_ptr + cell, mask=mask, other=0)
    count = tl.load(counts_ptr + cell, mask=mask, other=0)
    row = end - count + rank
    tl.store(sorted_ptr + row, ids.to(tl.int64), mask=mask)
    tl.store(scattered_ptr + row, slots.to(tl.int64), mask=mask)
    if block == 0:
        for start in range(0, num_experts, BLOCK):
            e = start + local
            ends = tl.load(ends_ptr + (e + 1) * num_blocks - 1, mask=e < num_experts, other=0)
            tl.store(offsets_ptr + e, ends.to(tl.int64), mask=e < num_experts)


@triton.jit(do_not_specialize=["num_slots", "num_tiles", "tile_programs", "chunk"])
def _schedule_kernel(
    offsets_ptr,
    tiles_ptr,
    num_slots,
    num_tiles,
    tile_programs,
    chunk,
    num_experts,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """tiles[1 + i] = (expert, first row, end of its rows, its first tile): experts in order, each cut into BLOCK_M
    rows, then none's. After ``num_tiles`` of them, from further programs, the same of experts with more than ``chunk``
    rows, cut into so many.

    tiles[0] = how many tiles the experts have, how many with those of no expert, how many chunks there are, and where.
    """
    of_chunks = tl.program_id(0) >= tile_programs
    i = (tl.program_id(0) - tl.where(of_chunks, tile_programs, 0)) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, GROUPS)
    start = tl.load(offsets_ptr + e - 1, mask=(e > 0) & (e <= num_experts), other=0).to(tl.int32)
    end = tl.load(offsets_ptr + e, mask=e < num_experts, other=0).to(tl.int32)
    end = tl.where(e == num_experts, num_slots, end)
    tiles = tl.where(e <= num_experts, (end - start + BLOCK_M - 1) // BLOCK_M, 0)
    chunks = tl.where((e < num_experts) & (end - start > chunk), (end - start + chunk - 1) // chunk, 0)
    count = tl.where(of_chunks, chunks, tiles)
    last = tl.cumsum(count, axis=0)
    before = (last[None, :] <= i[:, None]) & (e[None, :] <= num_experts)
    expert = tl.sum(before.to(tl.int32), axis=1)
    first = tl.sum(tl.where(before, count[None, :], 0), axis=1)
    used = (i < tl.where(of_chunks, num_slots, num_tiles)) & (expert <= num_experts)
    base = tl.load(offsets_ptr + expert - 1, mask=used & (expert > 0), other=0).to(tl.int32)
    bound = tl.load(offsets_ptr + expert, mask=expert < num_experts, other=0).to(tl.int32)
    entry = tiles_ptr + 4 + (tl.where(of_chunks, num_tiles, 0) + i) * 4
    tl.store(entry, expert, mask=used)
    tl.store(entry + 1, base + (i - first) * tl.where(of_chunks, chunk, BLOCK_M), mask=used)
    tl.store(entry + 2, tl.where(expert == num_experts, num_slots, bound), mask=used)
    tl.store(entry + 3, first, mask=used)
    if tl.program_id(0) == 0:
        tl.store(tiles_ptr, tl.sum(tl.where(e < num_experts, tiles, 0)))
        tl.store(tiles_ptr + 1, tl.sum(tiles))
        tl.store(tiles_ptr + 2, tl.sum(chunks))
        tl.store(tiles_ptr + 3, num_tiles)


def _cumsum(counts: Tensor, ends: Tensor) -> None:
    torch.cumsum(counts, 0, dtype=torch.int32, out=ends)


def route(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.route`. ``expert_ids`` must be contiguous."""
    num_slots = expert_ids.numel()
    device = expert_ids.device
    sorted_expert_idxs = empty(num_slots, dtype=torch.int64, device=device)
    sorted_scattered_idxs = empty(num_slots, dtype=torch.int64, device=device)
    expert_offsets = empty(num_experts, dtype=torch.int64, device=device)
    if num_slots == 0:
        call(Tensor.zero_, expert_offsets)
        return sorted_expert_idxs, sorted_scattered_idxs, expert_offsets
    if num_slots <= FEW:
        grid = (tiles.cdiv(max(num_slots, num_experts), FEW_BLOCK), 1)
        sorts = (expert_ids, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets)
        launch(_sort_kernel, grid, sorts, (num_slots, num_experts), 4, 1, BLOCK=FEW_BLOCK, OTHERS=OTHERS)
        return sorted_expert_idxs, sorted_scattered_idxs, expert_offsets
    num_blocks = tiles.cdiv(num_slots, BLOCK)
    counts = empty((num_experts + 1) * num_blocks, dtype=torch.int32, device=device)
    ends = empty((num_experts + 1) * num_blocks, dtype=torch.int32, device=device)
    sizes = (num_slots, num_blocks, num_experts)
    grid = (num_blocks, 1)
    launch(_count_kernel, grid, (expert_ids, counts), sizes, 4, 1, BLOCK=BLOCK, EXPERTS=EXPERTS)
    call(_cumsum, counts, ends)
    operands = (expert_ids, counts, ends, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets)
    launch(_place_kernel, grid, operands, sizes, 4, 1, BLOCK=BLOCK)
    return sorted_expert_idxs, sorted_scattered_idxs, expert_offsets


def schedule(expert_offsets: Tensor, num_slots: int, tile_rows: int) -> Tensor:
    """The row tiles of a routing, int32 ``[n, 4]``; see `Routing.tiles`."""
    num_experts = expert_offsets.shape[0]
    num_tiles = tiles.num_row_tiles(num_slots, num_experts, tile_rows)
    size = tiles.schedule_size(num_slots, num_experts)
    schedule = empty(size, 4, dtype=torch.int32, device=expert_offsets.device)
    if num_tiles:
        groups = tiles.next_power_of_2(num_experts + 1)
        # Tiles by groups is a comparison held in registers: 64 x 1024 of them spilled 1000 bytes a thread.
        block = min(64, max(1, 16384 // groups))
        tile_programs = tiles.cdiv(num_tiles, block)
        launch(
            _schedule_kernel,
            (tile_programs + tiles.cdiv(tiles.num_chunks(num_slots, num_experts), block), 1),
            (expert_offsets, schedule),
            (num_slots, num_tiles, tile_programs, tiles.chunk_rows(num_slots, num_experts), num_experts),
            4,
            1,
            BLOCK_M=tile_rows,
            BLOCK=block,
            GROUPS=groups,
        )
    return schedule
