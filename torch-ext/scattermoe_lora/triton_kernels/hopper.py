"""What the kernels for Hopper share: a ring of stages, its barriers, and descriptors, in Gluon.

Imported, as they are, only where `device.has_hopper_kernels` says so: another Triton may lack what this imports.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..operands import tma_can_read
from .device import HOPPER_COLUMNS, HOPPER_ROWS
from .rows import operand_rows

# Rows of a tile, half for each warpgroup, its columns, and the depth of a stage.
ROWS, COLUMNS, DEPTH = HOPPER_ROWS, HOPPER_COLUMNS, 64
# Stages of the ring beside 256 columns. With four, processors that share a weight block drift apart: 1.82 GB read from
# memory for 1.24, and 4 % slower.
STAGES = 3
# Registers a thread of the second warpgroup that multiplies; the first gets as many, the loading warps what is left:
# with 224 that were 56, too few for those that copy rows.
REGISTERS = 208

# What Triton 3.9 calls otherwise.
load_block = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
load_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
rows_arrive = async_copy.mbarrier_arrive
_memory = gl.shared_memory_descriptor
_reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret
# How warps copy rows, and store them: 16 bytes a thread, and 64 columns of a row together.
COPIES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def block(stage, descriptor, PARTS: gl.constexpr, part: gl.constexpr = 0):
    """A stage's memory, or one of PARTS of it, as what a descriptor loads."""
    # In parts, as Triton 3.8 reinterprets all of a memory or nothing.
    parts = _reinterpret(stage, stage.dtype, [PARTS] + descriptor.block_type.shape, descriptor.layout)
    return parts.index(part)


@gluon.jit
def parts(stage, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A stage's memory as matrices after one another, whose columns are contiguous.

    Of a wider one that is 64 columns after 64.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, COLUMNS], stage.dtype)
    PARTS: gl.constexpr = stage.shape[0] * stage.shape[1] // (ROWS * COLUMNS)
    return _reinterpret(stage, stage.dtype, [PARTS, ROWS, COLUMNS], layout)


@gluon.jit
def matrix(stage, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A stage's memory, or the first part of it, as a matrix whose columns are contiguous."""
    return parts(stage, ROWS, COLUMNS).index(0)


@gluon.jit
def copy_rows(
    ptr, rows, slots, mask, stride, first_column, columns, memory,
    FAN_OUT: gl.constexpr, EVEN: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr = COPIES,
):  # fmt: skip
    """WIDTH columns of an operand's rows; zeros past the mask, if there is one, and past its columns."""
    column = first_column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    address = ptr + (operand_rows(rows.to(gl.int64), slots, FAN_OUT) * stride)[:, None] + column[None, :]
    if mask is not None:
        inside = mask[:, None]
        if not EVEN:
            inside = inside & (column < columns)[None, :]
        load_rows(memory, address, mask=inside)
    elif EVEN:
        load_rows(memory, address)
    else:
        load_rows(memory, address, mask=(column < columns)[None, :])


@gluon.jit
def barriers(LOADERS: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr = 2):
    """For each stage one that it is full, at which so many arrive, and one that it is empty: at that, all who read."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=LOADERS)
        mbarrier.init(empty.index(stage), count=READERS)
    fence_async_shared()
    return full, empty


@gluon.jit
def wait_full(barrier, phase, COPIED: gl.constexpr):
    """Until a stage is full; then what threads copied there, if they did, may be read by a product."""
    mbarrier.wait(barrier, phase)
    if COPIED:
        fence_async_shared()  # the memory model asks for it, and it takes no time


@gluon.jit
def add_product(a, b, acc, use_acc=True):
    """``acc + a @ b``, or without ``use_acc`` ``a @ b``, under way: only the products before it have ended."""
    acc = warpgroup_mma(a, b, acc, use_acc=use_acc, is_async=True)
    return warpgroup_mma_wait(1, deps=[acc])


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def before(stage, STAGES: gl.constexpr):
    """The stage before; computed, as of two names of one value Triton 3.6 carries one through a loop."""
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def held_outputs(dtype: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, OUTPUTS: gl.constexpr = 1):
    """Memory in which each warpgroup's output, or two of them, wait to be stored, while the next tile is multiplied.

    In registers they leave none to compute an activation with.
    """
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS // 2, COLUMNS], dtype)
    return gl.allocate_shared_memory(dtype, [2 * OUTPUTS, ROWS // 2, COLUMNS], layout)


@gluon.jit
def hold(held, acc, PART: gl.constexpr):
    """A warpgroup's output to where it waits; its second one as the PART after the two first ones."""
    held.index(PART).store(acc.to(held.dtype))


@gluon.jit
def held_block(held, PART: gl.constexpr, columns, half_rows):
    """32 rows of 64 columns of what a warpgroup holds, which lies 64 columns after 64: a thread has 16 elements."""
    ROWS: gl.constexpr = held.shape[1] // 2
    BLOCKS: gl.constexpr = held.shape[2] // 64
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, 64], held.dtype)
    blocks = _reinterpret(held, held.dtype, [2 * held.shape[0] * BLOCKS, ROWS, 64], layout)
    return blocks.index(2 * (BLOCKS * PART + columns) + half_rows).load(COPIES)


@gluon.jit
def store(out_ptr, y, rows, inside, first_column, columns):
    """Rows of an output, of which ``rows`` is where each begins, and ``inside`` whether it is one.

    First to leave L2, for weights that others are about to read: 1 % of a product, 2 of GLM-4.5-Air's (H200).
    """
    column = gl.arange(0, y.shape[1], layout=gl.SliceLayout(0, y.type.layout))
    mask = inside[:, None] & (column < columns - first_column)[None, :]
    out = out_ptr + first_column + rows[:, None] + column[None, :]
    gl.store(out, y, mask=mask, eviction_policy="evict_first")


def num_stages(columns: int, outputs: int, shared_memory: int) -> int:
    """Stages of a ring beside so many held outputs: of tiles of fewer columns as many as there is room for."""
    if columns == COLUMNS:
        return STAGES
    return (shared_memory - 1024 - 2 * outputs * ROWS * columns) // (2 * DEPTH * (ROWS + columns))


def descriptor(tensor: Tensor, block: list[int], contiguous: int) -> TensorDescriptor | None:
    """A tensor for TMA, with its contiguous dimension moved last; None if TMA can't read it."""
    if not tma_can_read(tensor, contiguous):
        return None
    view = tensor.movedim(contiguous, -1)
    dtype = gl.bfloat16 if tensor.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(tensor, list(view.shape), list(view.stride()), block, layout)
