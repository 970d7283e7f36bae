"""A wide gram on Hopper, the gradient of a base weight or of factors of many ranks: see `hopper_gemm`.

Gathered rows are copied by address, grouped ones loaded by TMA. An expert's last rows, if they do not fill a block,
are copied too: rows of the next expert, or of none, would be multiplied by zeros but may hold a NaN. The two products
of a Qwen3-30B-A3B step took an H200 1.12 ms for 2.0.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma_wait

from .. import tiles
from ..types import Routing
from .device import gpu
from .hopper import (
    COLUMNS,
    COPIES,
    DEPTH,
    REGISTERS,
    ROWS,
    add_product,
    barriers,
    before,
    copy_rows,
    descriptor,
    held_block,
    held_outputs,
    hold,
    load_block,
    next_stage,
    num_stages,
    rows_arrive,
    store,
    wait_full,
)
from .launch import launch
from .rows import expert_rows


@gluon.jit
def _gram_tile(offsets_ptr, tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """``(expert, its first row, end of its rows, first row and first column of the output)``.

    All tiles of an expert after one another: its rows are then read from memory once, and from L2 for the others.
    """
    row_tiles = gl.cdiv(M, BLOCK_M)
    per_expert = row_tiles * gl.cdiv(N, BLOCK_N)
    expert, within = tile // per_expert, tile % per_expert
    start, end = expert_rows(offsets_ptr, expert)
    return expert, start, end, (within % row_tiles) * BLOCK_M, (within // row_tiles) * BLOCK_N


@gluon.jit
def _load(
    left_ptr, left, right_ptr, right, offsets_ptr, scattered_ptr, a_ring, b_ring, full, empty, num_tiles, M, N,
    stride_lm, stride_rm, LEFT_FAN_OUT: gl.constexpr, RIGHT_FAN_OUT: gl.constexpr, EVEN_M: gl.constexpr,
    EVEN_N: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """The loading warps: all blocks of all tiles, as far ahead as the ring allows."""
    HALF: gl.constexpr = BLOCK_M // 2
    BYTES: gl.constexpr = a_ring.dtype.primitive_bitwidth // 8
    BY_TMA: gl.constexpr = (BLOCK_M if LEFT_FAN_OUT == 0 else 0) + (BLOCK_N if RIGHT_FAN_OUT == 0 else 0)
    row = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, COPIES))
    stage = 0
    phase = 1
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        _expert, start, end, m, n = _gram_tile(offsets_ptr, tile, M, N, BLOCK_M, BLOCK_N)
        slots = gl.load(scattered_ptr + start + row, mask=start + row < end, other=0)
        whole = start + (end - start) // BLOCK_K * BLOCK_K
        for first in range(start, whole, BLOCK_K):
            rows = first + row
            # Before the copies, which it would wait for.
            next_slots = gl.load(scattered_ptr + rows + BLOCK_K, mask=rows + BLOCK_K < end, other=0)
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            mbarrier.expect(barrier, BLOCK_K * BY_TMA * BYTES)
            a_0 = a_ring.index(2 * stage)
            a_1 = a_ring.index(2 * stage + 1)
            b = b_ring.index(stage)
            if LEFT_FAN_OUT == 0:
                load_block(left, [first, m], barrier, a_0)
                load_block(left, [first, m + HALF], barrier, a_1)
            else:
                copy_rows(left_ptr, rows, slots, None, stride_lm, m, M, a_0, LEFT_FAN_OUT, EVEN_M, HALF)
                copy_rows(left_ptr, rows, slots, None, stride_lm, m + HALF, M, a_1, LEFT_FAN_OUT, EVEN_M, HALF)
            if RIGHT_FAN_OUT == 0:
                load_block(right, [first, n], barrier, b)
            else:
                copy_rows(right_ptr, rows, slots, None, stride_rm, n, N, b, RIGHT_FAN_OUT, EVEN_N, BLOCK_N)
            rows_arrive(barrier, increment_count=False)
            slots = next_slots
            stage, phase = next_stage(stage, phase, STAGES)
        if (whole < end) | (start == end):  # without rows, one block of zeros
            rows = whole + row
            mask = rows < end
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            mbarrier.arrive(barrier)
            a_0 = a_ring.index(2 * stage)
            a_1 = a_ring.index(2 * stage + 1)
            copy_rows(left_ptr, rows, slots, mask, stride_lm, m, M, a_0, LEFT_FAN_OUT, EVEN_M, HALF)
            copy_rows(left_ptr, rows, slots, mask, stride_lm, m + HALF, M, a_1, LEFT_FAN_OUT, EVEN_M, HALF)
            copy_rows(
                right_ptr, rows, slots, mask, stride_rm, n, N, b_ring.index(stage), RIGHT_FAN_OUT, EVEN_N, BLOCK_N
            )
            rows_arrive(barrier, increment_count=False)
            fence_async_shared()  # before TMA writes there again; else the compiler has a fence in the loop above
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _store(out_ptr, held, rows, column, columns, stride, block, PART: gl.constexpr):
    """A block of a held output."""
    y = held_block(held, PART, block // 2, block % 2)
    row = block % 2 * y.shape[0] + gl.arange(0, y.shape[0], layout=gl.SliceLayout(1, COPIES))
    store(out_ptr, y, row.to(gl.int64) * stride, row < rows, column + block // 2 * 64, columns)


@gluon.jit
def _multiply(
    out_ptr, offsets_ptr, a_ring, b_ring, held, full, empty, num_tiles, M, N, stride_oe, stride_om,
    PART: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the first (PART 0) or second half of every tile's rows."""
    HALF: gl.constexpr = BLOCK_M // 2
    IS_HELD: gl.constexpr = out_ptr.dtype.element_ty != gl.float32
    HELD: gl.constexpr = 2 * (BLOCK_N // 64)
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage = 0
    phase = 0
    # A tile's output is stored while the next one is multiplied; in float32, for which there is no room, at once.
    held_ptr = out_ptr
    held_rows = 0
    held_column = 0
    block = HELD
    acc = gl.zeros((HALF, BLOCK_N), gl.float32, layout=products)  # never zeroed again, see `hopper_gemm`
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        expert, start, end, m, n = _gram_tile(offsets_ptr, tile, M, N, BLOCK_M, BLOCK_N)
        m += HALF * PART
        # At least one block, of zeros, for an expert without rows.
        for k in range(0, gl.maximum(gl.cdiv(end - start, BLOCK_K), 1)):
            wait_full(full.index(stage), phase, True)
            a = a_ring.index(2 * stage + PART).permute((1, 0))
            acc = add_product(a, b_ring.index(stage), acc, use_acc=k > 0)
            mbarrier.arrive(empty.index(before(stage, STAGES)), pred=k > 0)
            if IS_HELD:
                if block < HELD:
                    _store(held_ptr, held, held_rows, held_column, N, stride_om, block, PART)
                    block += 1
            stage, phase = next_stage(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before(stage, STAGES)))
        out = out_ptr + expert.to(gl.int64) * stride_oe + m.to(gl.int64) * stride_om
        if IS_HELD:
            for rest in range(block, HELD):
                _store(held_ptr, held, held_rows, held_column, N, stride_om, rest, PART)
            hold(held, acc, PART)
            held_ptr = out
            held_rows = M - m
            held_column = n
            block = 0
        else:
            row = gl.arange(0, HALF, layout=gl.SliceLayout(1, products))
            store(out, acc, row.to(gl.int64) * stride_om, row < M - m, n, N)
    if IS_HELD:
        for rest in range(block, HELD):
            _store(held_ptr, held, held_rows, held_column, N, stride_om, rest, PART)


@gluon.jit
def _hopper_gram_kernel(
    left_ptr,
    left,
    right_ptr,
    right,
    out_ptr,
    offsets_ptr,
    scattered_ptr,
    num_tiles,
    M,
    N,
    stride_lm,
    stride_rm,
    stride_oe,
    stride_om,
    LEFT_FAN_OUT: gl.constexpr,
    RIGHT_FAN_OUT: gl.constexpr,
    EVEN_M: gl.constexpr,
    EVEN_N: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    dtype: gl.constexpr = left_ptr.dtype.element_ty
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, BLOCK_M // 2], dtype)
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, BLOCK_N], dtype)
    a_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_K, BLOCK_M // 2], a_layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], b_layout)
    held = b_ring  # given where nothing is held, and not used
    if out_ptr.dtype.element_ty != gl.float32:
        held = held_outputs(out_ptr.dtype.element_ty, BLOCK_M, BLOCK_N)
    # What TMA loads, and each loading thread.
    full, empty = barriers(129, STAGES)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    out_ptr, offsets_ptr, a_ring, b_ring, held, full, empty, num_tiles, M, N, stride_oe, stride_om,
                    0, STAGES, BLOCK_M, BLOCK_N, BLOCK_K,
                ),
            ),
            (
                _multiply,
                (
                    out_ptr, offsets_ptr, a_ring, b_ring, held, full, empty, num_tiles, M, N, stride_oe, stride_om,
                    1, STAGES, BLOCK_M, BLOCK_N, BLOCK_K,
                ),
            ),
            (
                _load,
                (
                    left_ptr, left, right_ptr, right, offsets_ptr, scattered_ptr, a_ring, b_ring, full, empty,
                    num_tiles, M, N, stride_lm, stride_rm, LEFT_FAN_OUT, RIGHT_FAN_OUT, EVEN_M, EVEN_N, STAGES,
                    BLOCK_M, BLOCK_N, BLOCK_K,
                ),
            ),
        ],
        [4, 4],
        [REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip


def hopper_gram(
    left: Tensor, right: Tensor, routing: Routing, out: Tensor, *, left_fan_out: int, right_fan_out: int
) -> bool:
    """`gram` without row weights; False, and nothing done, where operands are not what this kernel reads."""
    if out.stride(2) != 1:  # its columns are to be contiguous: the transposed product
        left, right, out = right, left, out.mT
        left_fan_out, right_fan_out = right_fan_out, left_fan_out
    num_experts, M, N = out.shape
    left_block = descriptor(left, [DEPTH, ROWS // 2], 1)
    columns = COLUMNS if N >= COLUMNS else COLUMNS // 2
    right_block = descriptor(right, [DEPTH, columns], 1)
    readable = left_block is not None and right_block is not None and left.dtype == right.dtype
    # Copies are of 16 bytes, and compiled for sizes and strides that are multiples of 16.
    if not readable or out.stride(2) != 1 or any(n % 16 for n in (M, N, left.stride(0), right.stride(0))):
        return False
    stages = num_stages(columns, 1 if out.element_size() == 2 else 0, gpu(out).shared_memory)
    num_tiles = num_experts * tiles.cdiv(M, ROWS) * tiles.cdiv(N, columns)
    launch(
        _hopper_gram_kernel,
        (min(num_tiles, gpu(out).processors), 1),
        (
            left,
            left_block if left_fan_out == 0 else None,
            right,
            right_block if right_fan_out == 0 else None,
            out,
            routing.expert_offsets,
            routing.scattered_idxs,
        ),
        (num_tiles, M, N, left.stride(0), right.stride(0), out.stride(0), out.stride(1)),
        4,
        stages,
        LEFT_FAN_OUT=left_fan_out,
        RIGHT_FAN_OUT=right_fan_out,
        EVEN_M=M % ROWS == 0,
        EVEN_N=N % columns == 0,
        STAGES=stages,
        REGISTERS=REGISTERS,
        BLOCK_M=ROWS,
        BLOCK_N=columns,
        BLOCK_K=DEPTH,
    )
    return True
