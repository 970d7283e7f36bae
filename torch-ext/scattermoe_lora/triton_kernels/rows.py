"""Addressing shared by the kernels: which rows a tile owns, and where a grouped row lies in an operand."""

import triton
import triton.language as tl


@triton.jit
def expert_rows(offsets_ptr, expert):
    """An expert's first grouped row, and the one after its last, as int32."""
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0).to(tl.int32)
    return start, tl.load(offsets_ptr + expert).to(tl.int32)


@triton.jit
def tile_entry(tiles_ptr, tile, mask=None):
    """``(expert, first row, end of the expert's rows, its first tile)`` of a scheduled tile; see `Routing.tiles`."""
    entry = tiles_ptr + 4 + tile * 4
    return (
        tl.load(entry, mask=mask),
        tl.load(entry + 1, mask=mask),
        tl.load(entry + 2, mask=mask),
        tl.load(entry + 3, mask=mask),
    )


@triton.jit
def scheduled_chunk(tiles_ptr, chunk):
    """The same of a chunk of an expert that has several, and its first chunk in place of its first tile."""
    return tile_entry(tiles_ptr, tl.load(tiles_ptr + 3) + chunk)


@triton.jit
def scheduled_part(tiles_ptr, program, TILE_ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """``(expert, first row, end of its rows, whether there are any, whether an expert's)`` of BLOCK_M rows of a tile.

    For kernels that want more programs than a product has tiles, and fewer rows each.
    """
    parts: tl.constexpr = TILE_ROWS // BLOCK_M
    tile = program // parts
    scheduled = tile < tl.load(tiles_ptr + 1)
    expert, first_row, end, _ = tile_entry(tiles_ptr, tile, scheduled)
    first_row += program % parts * BLOCK_M
    return expert, first_row, end, scheduled & (first_row < end), tile < tl.load(tiles_ptr)


@triton.jit
def scheduled_tile(tiles_ptr, tile, num_column_tiles, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """``(expert, first row, end of the expert's rows, column tile)`` of a product's tile."""
    entry = tile_entry(tiles_ptr, tile // num_column_tiles)
    return tile_of_entry(entry, tile, num_column_tiles, BLOCK_M, GROUP_M)


@triton.jit
def tile_of_entry(entry, tile, num_column_tiles, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """The same, of the entry at ``tile // num_column_tiles``, which a loop may load long before it is used.

    An expert's tiles follow one another, up to GROUP_M row tiles for each column tile: they read a weight block
    together, so once from memory. Where a program would always have the same of an expert's row tiles, as their number
    divides the programs', it has the next one each time: with two of them, and the second one not full, half of the
    programs had all of the full ones.
    """
    expert, first_row, end, first_tile = entry
    row_tile = tile // num_column_tiles  # of this expert, and of this group
    start = first_row - (row_tile - first_tile) * BLOCK_M
    group = (row_tile - first_tile) // GROUP_M * GROUP_M
    left = (end - start + BLOCK_M - 1) // BLOCK_M - group
    height = tl.where(left < GROUP_M, left, GROUP_M)
    first = (first_tile + group) * num_column_tiles
    column_tile = (tile - first) // height
    first += column_tile * height  # the first row tile's of this column tile
    programs = tl.num_programs(0)
    turn = tl.where(programs % height == 0, first // programs, 0)
    return expert, start + (group + (tile - first + turn) % height) * BLOCK_M, end, column_tile


@triton.jit
def tile_rows(first_row, end, scattered_ptr, BLOCK_M: tl.constexpr):
    """``(rows, slots, mask)`` of BLOCK_M grouped rows, as int64.

    Rows past the end are out of the mask and repeat a valid one, so that they may be read.
    """
    rows = first_row + tl.arange(0, BLOCK_M)
    mask = rows < end
    rows = tl.where(mask, rows, tl.minimum(first_row, end - 1)).to(tl.int64)
    return rows, tl.load(scattered_ptr + rows), mask


@triton.jit
def operand_rows(rows, slots, FAN_OUT: tl.constexpr):
    """The operand's row of each grouped row: the row itself if FAN_OUT is 0, else the slot's ``slot // FAN_OUT``."""
    if FAN_OUT == 0:
        return rows
    else:
        return slots // FAN_OUT
