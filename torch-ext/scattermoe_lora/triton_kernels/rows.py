"""Addressing shared by the kernels: which rows a tile owns, and where a grouped row lies in an operand."""

import triton
import triton.language as tl


@triton.jit
def tile_rows(tiles_ptr, offsets_ptr, scattered_ptr, tile, num_slots, num_experts, BLOCK_M: tl.constexpr, skip):
    """``(expert, first row, rows, slots, mask)``: BLOCK_M rows of a scheduled tile, past its first ``skip`` ones.

    Expert num_experts owns the rows of no expert. Rows past the group's end are out of the mask and repeat its first
    row, so that they may be read.
    """
    expert = tl.load(tiles_ptr + 2 + tile * 2)
    first_row = tl.load(tiles_ptr + 3 + tile * 2) + skip
    end = tl.load(offsets_ptr + expert, mask=expert < num_experts, other=0).to(tl.int32)
    end = tl.where(expert == num_experts, num_slots, end)
    rows = first_row + tl.arange(0, BLOCK_M)
    mask = rows < end
    rows = tl.where(mask, rows, tl.minimum(first_row, num_slots - 1))
    return expert, first_row, rows.to(tl.int64), tl.load(scattered_ptr + rows), mask


@triton.jit
def operand_rows(rows, slots, FAN_OUT: tl.constexpr):
    """The operand's row of each grouped row: the row itself if FAN_OUT is 0, else the slot's ``slot // FAN_OUT``."""
    if FAN_OUT == 0:
        return rows
    else:
        return slots // FAN_OUT
