"""The one rule that picks tile sizes: from rows per expert, operand width and the GPU's shared memory. No sweep."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: rows by columns of its output, depth of a step of its inner loop, and how it is run."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_memory(self, element_size: int) -> int:
        """Bytes that the software pipeline keeps: both operands' blocks for each stage in flight."""
        return (self.block_m + self.block_n) * self.block_k * element_size * max(1, self.num_stages - 1)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def block_m(num_slots: int, num_experts: int) -> int:
    """Rows of a tile, from the mean rows per expert: a tile should not be mostly padding.

    16 is the least that a tensor core multiplies; 128 the most that two 128-wide operand blocks leave room for.
    """
    return min(128, max(16, next_power_of_2(num_slots // max(1, num_experts))))


def gemm_tile(rows: int, columns: int, dtype: torch.dtype, shared_memory: int) -> Tile:
    """The grouped GEMM's tile for ``rows`` (from `block_m`) and ``columns`` of output."""
    size = dtype.itemsize
    tile = Tile(
        block_m=rows,
        block_n=min(128, max(32, next_power_of_2(columns))),
        block_k=64 if size <= 2 else 32,
        num_warps=8 if rows >= 128 else 4,
        num_stages=4,
    )
    return _fit(tile, size, shared_memory)


def shrink_tile(rows: int, rank: int, dtype: torch.dtype, shared_memory: int) -> Tile:
    """The shrink's tile: all of a padded rank up to 128 columns, so that its input is read once."""
    size = dtype.itemsize
    tile = Tile(
        block_m=min(64, rows),
        block_n=min(128, max(16, next_power_of_2(rank))),
        block_k=128 if size <= 2 else 64,
        num_warps=4,
        num_stages=3,
    )
    return _fit(tile, size, shared_memory)


def gram_tile(left: int, right: int, dtype: torch.dtype, shared_memory: int) -> Tile:
    """The gram's tile: ``block_m`` by ``block_n`` of one expert's output, ``block_k`` rows a step."""
    size = dtype.itemsize
    tile = Tile(
        block_m=min(128, max(16, next_power_of_2(left))),
        block_n=min(128, max(16, next_power_of_2(right))),
        block_k=64 if size <= 2 else 32,
        num_warps=4 if right <= 64 else 8,
        num_stages=3,
    )
    return _fit(tile, size, shared_memory)


def _fit(tile: Tile, element_size: int, shared_memory: int) -> Tile:
    """Fewer stages, then a shallower step, until the pipeline fits into ``shared_memory`` bytes."""
    stages, block_k = tile.num_stages, tile.block_k
    while True:
        fitted = Tile(tile.block_m, tile.block_n, block_k, tile.num_warps, stages)
        if fitted.shared_memory(element_size) <= shared_memory or block_k == 16:
            return fitted
        if stages > 2:
            stages -= 1
        else:
            block_k //= 2
