"""Addressing shared by the kernels: which rows a tile owns, and where a grouped row lies in an operand."""

import triton
import triton.language as tl


@triton.jit
def tile_rows(tiles_ptr, offsets_ptr, scattered_ptr, tile, num_slots, num_experts, BLOCK_M: tl.constexpr, skip):
    """``(expert, rows, slots, mask)``: BLOCK_M rows of a scheduled tile, past its first ``skip`` ones.

    Expert -1 is an unused entry of the schedule, expert num_experts owns the rows of no expert.
    """
    expert = tl.load(tiles_ptr + tile * 2)
    rows = tl.load(tiles_ptr + tile * 2 + 1) + skip + tl.arange(0, BLOCK_M)
    owned = (expert >= 0) & (expert < num_experts)
    end = tl.load(offsets_ptr + expert, mask=owned, other=0).to(tl.int32)
    end = tl.where(expert == num_experts, num_slots, end)
    mask = rows < end
    slots = tl.load(scattered_ptr + rows, mask=mask, other=0)
    return expert, rows.to(tl.int64), slots, mask


@triton.jit
def operand_rows(rows, slots, FAN_OUT: tl.constexpr):
    """The operand's row of each grouped row: the row itself if FAN_OUT is 0, else the slot's ``slot // FAN_OUT``."""
    if FAN_OUT == 0:
        return rows
    else:
        return slots // FAN_OUT
