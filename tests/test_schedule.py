"""Which program computes which tile of a product: all are computed once, and long and short ones go round.

And which chunks of rows a hot expert has, whose sums are added up.
"""

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


def _is_short(tile) -> bool:
    return tile[2] - tile[1] <= ROWS // 2


@pytest.mark.interpreter
@pytest.mark.parametrize("programs", [5, 132])
@pytest.mark.parametrize(
    "rows",
    [
        [70, 41, 5, 0, 64, 33, 56, 9, 57, 80, 0, 8, 72, 16],
        [300, 264, 0, 1, 520, 256, 7],  # more tiles than a group has
        [3, 8, 1, 0, 5, 2, 4, 8],  # short ones alone
        [16, 32, 64, 16],  # none
        [0, 0, 0],
        [2999],
    ],
    ids=["few", "many", "short", "whole", "empty", "one expert"],
)
@pytest.mark.parametrize(("column_tiles", "group_m"), [(2, 1), (6, 4)])
def test_short_tiles_go_round(kernel, column_tiles, group_m, programs, rows):
    """Each tile is dealt out once, others than short ones in their order, short ones in turn: after each full round no
    program has had more than one of them more than another, and as many are dealt out as were to come."""
    deal = inner(kernel, "triton_kernels.deal").deal
    offsets = torch.tensor(rows).cumsum(0)
    num_slots = int(offsets[-1]) + 11  # 11 of no expert
    schedule = torch.empty(1, 4, dtype=torch.int32)
    routing = inner(kernel, "types").Routing(torch.empty(num_slots), offsets, schedule, ROWS)
    num_tiles = inner(kernel, "tiles").num_row_tiles(num_slots, len(rows), ROWS) * column_tiles
    dealt = deal(routing, num_tiles, column_tiles, programs, group_m=group_m)

    expected = [
        [expert, first + (group + row) * ROWS, first + num_rows, column]
        for expert, (num_rows, first) in enumerate(zip(rows, [0, *offsets.tolist()], strict=False))
        for group in range(0, -(-num_rows // ROWS), group_m)
        for column in range(column_tiles)
        for row in range(min(group_m, -(-num_rows // ROWS) - group))
    ]
    tiles = dealt[1:][: len(expected)].tolist()
    assert sorted(tiles) == sorted(expected)
    assert [tile for tile in tiles if not _is_short(tile)] == [tile for tile in expected if not _is_short(tile)]
    if not expected:
        assert dealt[1].tolist() == [len(rows), 0, 0, 0]
    had = [0] * programs
    for first in range(0, len(expected) - programs + 1, programs):
        for program, tile in enumerate(tiles[first : first + programs]):
            had[program] += _is_short(tile)
        assert max(had) - min(had) <= 1
        assert sum(had) == sum(map(_is_short, expected[: first + programs]))


@pytest.mark.interpreter
def test_totals_of_chunks_and_of_tiles(kernel, monkeypatch):
    """What is in parts is added up where it belongs, and nothing else is written."""
    monkeypatch.setattr(inner(kernel, "tiles"), "chunk_rows", lambda num_slots, num_experts: 16)
    run, totals = inner(kernel, "triton_kernels"), inner(kernel, "triton_kernels.totals")
    offsets = torch.tensor([0, 40, 16, 17, 0, 5]).cumsum(0)
    num_experts, num_slots, num_rows = len(offsets), 85, 78  # 7 slots of no expert
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_slots, generator=generator)
    schedule = run.schedule(offsets, num_slots, 2 * ROWS)
    number, at = schedule[0, 2:].tolist()
    chunks = schedule[1 + at :][:number].tolist()
    assert chunks == [[1, 0, 40, 0], [1, 16, 40, 0], [1, 32, 40, 0], [3, 56, 73, 3], [3, 72, 73, 3]]
    routing = inner(kernel, "types").Routing(order, offsets, schedule, 2 * ROWS)

    def parts(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    (P_a, Q_a), (P_h, Q_h), room = (70, 16), (40, 32), inner(kernel, "tiles").num_chunks(num_slots, num_experts)
    partial_a, partial_h = parts(room, P_a, Q_a), parts(room, P_h, Q_h)
    out_a = torch.full((num_experts, 9, P_a), -1.0).mT  # of a padded rank 9 columns are
    out_h = torch.full((num_experts, P_h, Q_h), -1.0)
    products = totals.row_parts(11, num_slots, Q_h, order.device)
    dots = totals.row_parts(20, num_slots, 1, order.device)
    products.copy_(parts(*products.shape))
    dots.copy_(parts(*dots.shape))
    product, dot = torch.full((num_slots, Q_h), -1.0), torch.full((num_slots,), -1.0)
    given = {"products": products, "product": product, "dots": dots, "dot": dot}
    totals.totals(routing, chunk=16, grams=((partial_a, out_a), (partial_h, out_h)), **given)

    for out, partial in ((out_a, partial_a), (out_h, partial_h)):
        torch.testing.assert_close(out[1], partial[:3].sum(0)[:, : out.shape[2]])
        torch.testing.assert_close(out[3], partial[3:5].sum(0)[:, : out.shape[2]])
        assert (out[[0, 2, 4, 5]] == -1).all()
    torch.testing.assert_close(product, products.sum(0)[: num_slots * Q_h].view(num_slots, Q_h))
    torch.testing.assert_close(dot[order[:num_rows]], dots.sum(0)[:num_rows])
    assert not dot[order[num_rows:]].any()

    alone = torch.full_like(out_h, -1.0)
    totals.totals(routing, chunk=16, grams=((partial_h, alone),))
    assert torch.equal(alone, out_h)
