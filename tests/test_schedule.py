"""Which program computes which tile of a product: all are computed once, and long and short ones go round."""

import pytest
import torch
import triton
import triton.language as tl
from conftest import inner

ROWS, COLUMN_TILES = 16, 6


@triton.jit
def _visit_kernel(visits_ptr, tiles_ptr, num_column_tiles, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """Writes, for each tile that is visited, the program that does so."""
    for tile in range(tl.program_id(0), tl.load(tiles_ptr) * num_column_tiles, tl.num_programs(0)):
        where = scheduled_tile(tiles_ptr, tile, num_column_tiles, BLOCK_M, GROUP_M)  # noqa: F821  set by the test
        _, first_row, _, column_tile = where
        visit = visits_ptr + first_row * num_column_tiles + column_tile
        tl.atomic_add(visit, 1 + tl.program_id(0))


@pytest.mark.interpreter
@pytest.mark.parametrize("height, programs", [(1, 4), (2, 4), (2, 12), (3, 6), (3, 8), (4, 8), (5, 8), (7, 6)])
def test_no_program_has_all_the_long_tiles(kernel, height, programs):
    """Every expert's last row tile has one row, and programs are a multiple of an expert's row tiles, or are not."""
    globals()["scheduled_tile"] = inner(kernel, "triton_kernels.rows").scheduled_tile
    run = inner(kernel, "triton_kernels")
    rows = (height - 1) * ROWS + 1
    num_experts = height * programs
    offsets = torch.arange(1, num_experts + 1) * rows
    num_slots = num_experts * rows
    schedule = run.schedule(offsets, num_slots, ROWS)
    visits = torch.zeros(num_slots, COLUMN_TILES, dtype=torch.int32)
    _visit_kernel[(programs,)](visits, schedule, COLUMN_TILES, BLOCK_M=ROWS, GROUP_M=16)

    visits = visits.view(num_experts, rows, COLUMN_TILES)
    begins = torch.zeros(rows, dtype=torch.bool)
    begins[::ROWS] = True
    assert not visits[:, ~begins].any(), "no tile begins elsewhere"
    by = visits[:, begins] - 1
    assert by.shape[1] == height and 0 <= by.min() and by.max() < programs, "each tile is computed, once"
    assert by.unique().numel() == programs
    short = by[:, -1].flatten().bincount(minlength=programs)
    all_tiles = by.flatten().bincount(minlength=programs)
    assert all_tiles.max() - all_tiles.min() <= 1
    share = height * short / all_tiles
    assert 0.5 < share.min() and share.max() < 1.5, "a program has its share of the short tiles"
