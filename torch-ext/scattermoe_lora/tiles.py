"""Tile sizes: a table for the GPUs that were measured (`tile_tables/`), and one rule for everything else. No sweep."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch


@dataclass(frozen=True)
class Gpu:
    """What a tile depends on: ``sm_90`` or ``gfx942``, shared memory of one block in bytes, processors."""

    architecture: str
    shared_memory: int
    processors: int


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: rows by columns of its output, depth of a step of its inner loop, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs_per_processor: int = 1

    def shared_memory(self, element_size: int) -> int:
        """Bytes that the software pipeline keeps: both operands' blocks for each stage in flight."""
        return (self.block_m + self.block_n) * self.block_k * element_size * max(1, self.num_stages)


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up; Triton's own is made for kernels too and takes 2 us on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def block_m(num_slots: int, num_experts: int) -> int:
    """Rows of a tile, from the mean rows per expert: a tile should not be mostly padding.

    16 is the least that a tensor core multiplies; 128 the most that two 128-wide operand blocks leave room for.
    """
    return min(128, max(16, next_power_of_2(num_slots // max(1, num_experts))))


def chunk_rows(num_slots: int, num_experts: int) -> int:
    """Rows of one expert that a program sums into a narrow gram: more are summed by further programs, in parts that
    are added in order. One expert with 30 % of the slots made a step 1.4 times as long as a uniform one while one
    program summed all its rows.

    At least a 32nd of all rows, which is less than a processor's share of them. And twice the mean of eight experts or
    more, as half of them have a few rows more than that: Mixtral-8x7B's in chunks of 2048, the mean at 8192 tokens,
    were dealt out unevenly, and took 858 us for 703.
    """
    return 64 * cdiv(max(2048, cdiv(num_slots, 32), cdiv(2 * num_slots, max(8, num_experts))), 64)


# Of all experts that have more than one, as a chunk is at least a 32nd of all rows.
MAX_CHUNKS = 2 * 31


def num_chunks(num_slots: int, num_experts: int) -> int:
    """A bound on the chunks of all experts that have more than one: as many beyond their first ones, and these."""
    return 2 * ((num_slots - 1) // chunk_rows(num_slots, num_experts))


def num_row_tiles(num_slots: int, num_experts: int, block_m: int) -> int:
    """A bound on the row tiles of any routing: full ones, and one that is not for each group (E and no expert)."""
    return min(num_slots, (num_slots + (num_experts + 1) * (block_m - 1)) // block_m)


def schedule_size(num_slots: int, num_experts: int) -> int:
    """Entries of a schedule, with its header: a bound on `num_row_tiles` for every ``block_m``, and on `num_chunks`.

    Smooth in ``num_slots``, so that `torch.compile` need not compile again for another one.
    """
    return num_slots // 16 + num_experts + 2 + MAX_CHUNKS


def _is_rdna(gpu: Gpu) -> bool:
    # RX 7000 and Strix Halo; RX 9000, which with CDNA's tiles spilled up to 1328 bytes a thread (Triton 3.6).
    return gpu.architecture.startswith(("gfx11", "gfx120"))


def _widest(gpu: Gpu) -> int:
    """Columns of a product's tile: on RDNA, with Triton 3.6, 128 of them spilled up to 608 bytes a thread."""
    return 64 if _is_rdna(gpu) else 128


def _multiplies_by_warp(gpu: Gpu) -> bool:
    """Whether an NVIDIA GPU's products are a warp's own, `mma.sync`, and not a warp group's or a block's."""
    return gpu.architecture.startswith(("sm_7", "sm_8", "sm_12"))


def _pipeline(dtype: torch.dtype, gpu: Gpu) -> tuple[int, int]:
    """Depth of a step, and steps in flight: what hides a load without spilling its addresses.

    64 deep; 4 in flight on NVIDIA, but 3 where products are a warp's own, and 2 on AMD, where more did not compile for
    gfx950. 32 deep on gfx950, where 64 spilled 188 bytes a thread with Triton 3.6, and on RDNA, where it spilled up to
    836. Half as deep for float32.
    """
    depth, stages = 64, 4
    if gpu.architecture == "gfx950" or _is_rdna(gpu):
        depth, stages = 32, 2
    elif gpu.architecture.startswith("gfx"):
        stages = 2
    elif _multiplies_by_warp(gpu):
        stages = 3
    return (depth if dtype.itemsize <= 2 else depth // 2), stages


@functools.cache
def gemm_tile(gathered: bool, rows: int, columns: int, dtype: torch.dtype, gpu: Gpu) -> Tile:
    """The grouped GEMM's tile, for gathered or grouped rows of input, rows of `Routing.tile_rows` and columns."""
    depth, stages = _pipeline(dtype, gpu)
    rule = Tile(
        block_m=rows,
        block_n=min(_widest(gpu), max(32, next_power_of_2(columns))),
        block_k=depth,
        # RDNA's warps are half as wide as CDNA's: its 64-row tile spilled 500 bytes a thread in 4 of them.
        num_warps=8 if rows >= (64 if _is_rdna(gpu) else 128) else 4,
        num_stages=stages,
    )
    if _multiplies_by_warp(gpu):
        # Two blocks of 4 warps hide each other's waits: an H100 that ran the code for sm_80 took 4.0 ms for the four
        # products of a Qwen3-30B-A3B step, 8192 tokens, and 5.3 with one block of 8. 64 deep 5 % less, where the two
        # have room (not on sm_86 and sm_89 at 128 rows).
        fit = 2 * (stages - 1) * (rows + rule.block_n) * depth * dtype.itemsize <= gpu.shared_memory
        rule = replace(rule, block_k=depth if fit else depth // 2, num_warps=4, programs_per_processor=2)
    if dtype.itemsize > 2 and gpu.architecture.startswith("sm_"):
        # Products of single numbers, whose operands wait in registers: 128 columns and 32 deep spilled 5 to 6.5 KB a
        # thread, and a step of 1024 tokens of Qwen3-30B-A3B took an H200 337 ms.
        rule = replace(rule, block_n=min(64, rule.block_n), block_k=16, num_stages=3)
    return _choose(f"gemm {'gathered' if gathered else 'grouped'} {rows}", rule, columns, dtype, gpu)


@functools.cache
def act_tile(rows: int, dtype: torch.dtype, gpu: Gpu) -> Tile:
    """The activation's tile: ``block_m`` rows by ``block_n`` units a step, 16 bytes a thread.

    With 32 bytes its gradient took 219 us for 209 on an H100, 169 for 151 on an H200 (Qwen3-30B-A3B, 8192 tokens).
    """
    wide_warps = gpu.architecture.startswith("gfx9")  # of 64 threads, others have 32
    rule = Tile(
        block_m=min(16 if wide_warps else 8, rows),
        block_n=128 if dtype.itemsize <= 2 else 64,
        block_k=1,
        num_warps=4,
        num_stages=1,
    )
    return _choose(f"act {rows}", rule, rule.block_n, dtype, gpu)


@functools.cache
def shrink_tile(rows: int, rank: int, dtype: torch.dtype, gpu: Gpu) -> Tile:
    """The shrink's tile: all of a padded rank up to 128 columns, so that its input is read once."""
    depth, stages = _pipeline(dtype, gpu)
    rule = Tile(
        block_m=min(64, rows),
        block_n=min(128, max(16, next_power_of_2(rank))),
        block_k=2 * depth,
        num_warps=4,
        num_stages=min(3, stages),
    )
    return _choose(f"shrink {rows}", rule, rank, dtype, gpu)


@functools.cache
def gram_tile(left: int, right: int, dtype: torch.dtype, gpu: Gpu) -> Tile:
    """The gram's tile: ``block_m`` by ``block_n`` of one expert's output, ``block_k`` rows a step."""
    rule = Tile(
        block_m=min(128, max(16, next_power_of_2(left))),
        block_n=min(_widest(gpu), max(16, next_power_of_2(right))),
        block_k=32 if dtype.itemsize > 2 or _is_rdna(gpu) else 64,
        # RDNA's 4 warps of a 64-column tile spilled 76 bytes a thread.
        num_warps=4 if right <= (32 if _is_rdna(gpu) else 64) else 8,
        num_stages=min(3, _pipeline(dtype, gpu)[1]),
    )
    if _multiplies_by_warp(gpu) and right > 64 and dtype.itemsize <= 2:
        # 2.4 ms for 3.5 (both of Qwen3-30B-A3B's dW, as above).
        rule = replace(rule, block_k=32, num_warps=4, num_stages=4)
    return _choose(f"gram {'narrow' if right <= 64 else 'wide'}", rule, right, dtype, gpu)


@functools.cache
def shrink_gram_tile(left: int, right: int, dtype: torch.dtype, gpu: Gpu) -> Tile:
    """The same where rows' products are made too: more columns, as each tile of them writes its part of a product."""
    depth, stages = _pipeline(dtype, gpu)
    rule = Tile(
        block_m=min(128 if _is_rdna(gpu) else 256, max(16, next_power_of_2(left))),
        block_n=max(16, next_power_of_2(right)),
        block_k=depth,
        num_warps=4,
        num_stages=stages,
    )
    return _choose("shrink gram", rule, right, dtype, gpu)


def _choose(key: str, rule: Tile, columns: int, dtype: torch.dtype, gpu: Gpu) -> Tile:
    """The table's tile if it has one for the key (16-bit operands only), else the rule's; either made to fit."""
    row = table(gpu.architecture).get(key, {}) if dtype.itemsize == 2 else {}
    tile = replace(rule, **row)
    # The table's tiles were measured on wide outputs: a narrow one needs no more columns than it has.
    tile = replace(tile, block_n=min(tile.block_n, max(16, next_power_of_2(columns))))
    return _fit(tile, dtype.itemsize, gpu.shared_memory)


def _fit(tile: Tile, element_size: int, shared_memory: int) -> Tile:
    """Fewer stages, then a shallower step, until the pipeline fits into ``shared_memory`` bytes."""
    while tile.shared_memory(element_size) > shared_memory and tile.block_k > 16:
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        else:
            tile = replace(tile, block_k=tile.block_k // 2)
    return tile


@functools.cache
def table(architecture: str) -> dict[str, dict[str, int]]:
    """An architecture's measured tiles by kernel and rows: what differs from the rule. Empty without a file."""
    path = Path(__file__).parent / "tile_tables" / f"{architecture}.json"
    return json.loads(path.read_text())["tiles"] if path.is_file() else {}
