"""A narrow gram on Hopper, and the shrink of the rows that it reads, by specialised warps: see `hopper_gemm`.

Four warps copy rows, six stages ahead, four sum the gram, and four more make the product into the rank. Triton's own
pipeline is no deeper than the loads of slots that its rows wait for: of gathered rows its two passes got 5.5 TB/s each
out of L2, which gives up to 7.8.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .. import tiles
from ..types import Routing
from .device import gpu
from .hopper import COPIES, add_product, barriers, before, copy_rows, next_stage, rows_arrive, wait_full
from .launch import launch
from .rows import expert_rows

# Columns of a tile, rows of a stage, and ranks of a right operand: of 64 a thread holds 128 sums.
COLUMNS, ROWS, RANKS = 256, 64, (16, 32, 64)


@gluon.jit
def _unit(offsets_ptr, unit, num_experts, P, BY_COLUMNS: gl.constexpr, BLOCK_P: gl.constexpr):
    """``(expert, its first row, end of its rows, tile of columns)``.

    All tiles of an expert after one another, or the same columns of all of them: see `gram`.
    """
    column_tiles = gl.cdiv(P, BLOCK_P)
    if BY_COLUMNS:
        expert, tile = unit % num_experts, unit // num_experts
    else:
        expert, tile = unit // column_tiles, unit % column_tiles
    start, end = expert_rows(offsets_ptr, expert)
    return expert, start, end, tile


@gluon.jit
def _steps(start, end, CHUNK: gl.constexpr, BLOCK_M: gl.constexpr):
    """Stages of an expert's first chunk; without rows one, of zeros."""
    return gl.maximum(gl.cdiv(gl.minimum(end - start, CHUNK), BLOCK_M), 1)


@gluon.jit
def _load(
    x_ptr, right_ptr, factor_ptr, offsets_ptr, scattered_ptr, x_ring, right_ring, factors, full, empty, unused,
    num_units, num_experts, P, stride_xm, stride_fe, stride_fp, FAN_OUT: gl.constexpr, BY_COLUMNS: gl.constexpr,
    HAS_FACTOR: gl.constexpr, EVEN_P: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, BLOCK_P: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """The loading warps: all blocks of all units, as far ahead as the ring allows."""
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, COPIES))
    stage = 0
    phase = 1
    turn = 0
    turn_phase = 1
    expert, start, last, tile = _unit(offsets_ptr, gl.program_id(0), num_experts, P, BY_COLUMNS, BLOCK_P)
    slots = gl.load(scattered_ptr + start + row, mask=start + row < last, other=0)
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        end = gl.minimum(last, start + CHUNK)
        steps = _steps(start, last, CHUNK, BLOCK_M)
        p = tile * BLOCK_P
        # A unit ahead, as the slots of its first rows wait for it, and its copies for them.
        following = gl.minimum(unit + gl.num_programs(0), num_units - 1)
        next_expert, next_start, next_last, next_tile = _unit(
            offsets_ptr, following, num_experts, P, BY_COLUMNS, BLOCK_P
        )
        if HAS_FACTOR:
            column = p + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, COPIES))
            mbarrier.wait(unused.index(turn), turn_phase)
            copy_rows(
                factor_ptr + expert.to(gl.int64) * stride_fe, column, column, column < P, stride_fp, 0, BLOCK_Q,
                factors.index(turn), 0, True, BLOCK_Q,
            )  # fmt: skip
            turn, turn_phase = next_stage(turn, turn_phase, 2)
        for k in range(0, steps):
            rows = start + k * BLOCK_M + row
            inside = rows < end
            # Before the copies, which they would wait for.
            next_rows = gl.where(k + 1 < steps, rows + BLOCK_M, next_start + row)
            next_slots = gl.load(
                scattered_ptr + next_rows, mask=next_rows < gl.where(k + 1 < steps, end, next_last), other=0
            )
            mbarrier.wait(empty.index(stage), phase)
            copy_rows(x_ptr, rows, slots, inside, stride_xm, p, P, x_ring.index(stage), FAN_OUT, EVEN_P, BLOCK_P)
            copy_rows(right_ptr, rows, slots, inside, BLOCK_Q, 0, BLOCK_Q, right_ring.index(stage), 0, True, BLOCK_Q)
            rows_arrive(full.index(stage), increment_count=False)  # of the factor's copies too
            slots = next_slots
            stage, phase = next_stage(stage, phase, STAGES)
        expert = next_expert
        start = next_start
        last = next_last
        tile = next_tile


@gluon.jit
def _sum(
    out_ptr, partial_ptr, offsets_ptr, x_ring, right_ring, full, empty, num_units, num_experts, P, out_columns,
    stride_oe, stride_op, stride_oq, BY_COLUMNS: gl.constexpr, SPLIT: gl.constexpr, CHUNK: gl.constexpr,
    EXPERTS: gl.constexpr, STAGES: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the gram."""
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    of_experts: gl.constexpr = gl.BlockedLayout([EXPERTS // 32], [32], [4], [0])
    stage = 0
    phase = 0
    acc = gl.zeros((BLOCK_P, BLOCK_Q), gl.float32, layout=products)
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        expert, start, last, tile = _unit(offsets_ptr, unit, num_experts, P, BY_COLUMNS, BLOCK_P)
        for k in range(0, _steps(start, last, CHUNK, BLOCK_M)):
            wait_full(full.index(stage), phase, True)
            acc = add_product(x_ring.index(stage).permute((1, 0)), right_ring.index(stage), acc, use_acc=k > 0)
            mbarrier.arrive(empty.index(before(stage, STAGES)), pred=k > 0)
            stage, phase = next_stage(stage, phase, STAGES)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before(stage, STAGES)))
        p = tile * BLOCK_P + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, products))
        q = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, products))
        if SPLIT:
            chunks = (last - start - 1) // CHUNK
            if chunks > 0:
                e = gl.arange(0, EXPERTS, layout=of_experts)
                ends = gl.load(offsets_ptr + e, mask=e < expert, other=0).to(gl.int32)
                starts = gl.load(offsets_ptr + e - 1, mask=(e > 0) & (e < expert), other=0).to(gl.int32)
                earlier = gl.sum(gl.maximum(ends - starts - 1, 0) // CHUNK, axis=0)
                for chunk in range(0, chunks):
                    partial = partial_ptr + (earlier + chunk).to(gl.int64) * P * BLOCK_Q
                    acc += gl.load(partial + p[:, None].to(gl.int64) * BLOCK_Q + q[None, :], mask=(p < P)[:, None])
        out = out_ptr + expert.to(gl.int64) * stride_oe
        out += p[:, None].to(gl.int64) * stride_op + q[None, :].to(gl.int64) * stride_oq
        gl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(p < P)[:, None] & (q < out_columns)[None, :])


@gluon.jit
def _project(
    products_ptr, offsets_ptr, x_ring, factors, full, empty, unused, num_units, num_experts, P, scale, stride_pt,
    BY_COLUMNS: gl.constexpr, CHUNK: gl.constexpr, STAGES: gl.constexpr, BLOCK_P: gl.constexpr,
    BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Another warpgroup: the part that a tile's columns have in each row's product."""
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    stage = 0
    phase = 0
    turn = 0
    product = gl.zeros((BLOCK_M, BLOCK_Q), gl.float32, layout=products)
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, products))
    q = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, products))
    for unit in range(gl.program_id(0), num_units, gl.num_programs(0)):
        _expert, start, last, tile = _unit(offsets_ptr, unit, num_experts, P, BY_COLUMNS, BLOCK_P)
        end = gl.minimum(last, start + CHUNK)
        for k in range(0, _steps(start, last, CHUNK, BLOCK_M)):
            wait_full(full.index(stage), phase, True)
            product = warpgroup_mma(x_ring.index(stage), factors.index(turn), product, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(empty.index(stage))
            rows = start + k * BLOCK_M + row
            out = products_ptr + tile.to(gl.int64) * stride_pt + rows.to(gl.int64)[:, None] * BLOCK_Q + q[None, :]
            gl.store(out, product * scale, mask=(rows < end)[:, None])
            stage, phase = next_stage(stage, phase, STAGES)
        mbarrier.arrive(unused.index(turn))
        turn = 1 - turn


@gluon.jit
def _hopper_narrow_kernel(
    x_ptr,
    right_ptr,
    factor_ptr,
    out_ptr,
    partial_ptr,
    products_ptr,
    offsets_ptr,
    scattered_ptr,
    scale,
    num_units,
    num_experts,
    P,
    out_columns,
    stride_pt,
    stride_xm,
    stride_fe,
    stride_fp,
    stride_oe,
    stride_op,
    stride_oq,
    FAN_OUT: gl.constexpr,
    BY_COLUMNS: gl.constexpr,
    HAS_FACTOR: gl.constexpr,
    EVEN_P: gl.constexpr,
    SPLIT: gl.constexpr,
    CHUNK: gl.constexpr,
    EXPERTS: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK_P: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_P], dtype)
    narrow_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_Q], dtype)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_P], x_layout)
    right_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_Q], narrow_layout)
    full, empty = barriers(128, STAGES, 2 if HAS_FACTOR else 1)
    if HAS_FACTOR:
        factor_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_P, BLOCK_Q], dtype)
        factors = gl.allocate_shared_memory(dtype, [2, BLOCK_P, BLOCK_Q], factor_layout)
        unused = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for turn in gl.static_range(2):
            mbarrier.init(unused.index(turn), count=1)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    _sum,
                    (
                        out_ptr, partial_ptr, offsets_ptr, x_ring, right_ring, full, empty, num_units, num_experts,
                        P, out_columns, stride_oe, stride_op, stride_oq, BY_COLUMNS, SPLIT, CHUNK, EXPERTS, STAGES,
                        BLOCK_P, BLOCK_Q, BLOCK_M,
                    ),
                ),
                (
                    _project,
                    (
                        products_ptr, offsets_ptr, x_ring, factors, full, empty, unused, num_units, num_experts, P,
                        scale, stride_pt, BY_COLUMNS, CHUNK, STAGES, BLOCK_P, BLOCK_Q, BLOCK_M,
                    ),
                ),
                (
                    _load,
                    (
                        x_ptr, right_ptr, factor_ptr, offsets_ptr, scattered_ptr, x_ring, right_ring, factors, full,
                        empty, unused, num_units, num_experts, P, stride_xm, stride_fe, stride_fp, FAN_OUT,
                        BY_COLUMNS, True, EVEN_P, CHUNK, STAGES, BLOCK_P, BLOCK_Q, BLOCK_M,
                    ),
                ),
            ],
            [4, 4],
            [128, 128],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    _sum,
                    (
                        out_ptr, partial_ptr, offsets_ptr, x_ring, right_ring, full, empty, num_units, num_experts,
                        P, out_columns, stride_oe, stride_op, stride_oq, BY_COLUMNS, SPLIT, CHUNK, EXPERTS, STAGES,
                        BLOCK_P, BLOCK_Q, BLOCK_M,
                    ),
                ),
                (
                    _load,
                    (
                        x_ptr, right_ptr, factor_ptr, offsets_ptr, scattered_ptr, x_ring, right_ring, right_ring,
                        full, empty, empty, num_units, num_experts, P, stride_xm, stride_fe, stride_fp, FAN_OUT,
                        BY_COLUMNS, False, EVEN_P, CHUNK, STAGES, BLOCK_P, BLOCK_Q, BLOCK_M,
                    ),
                ),
            ],
            [4],
            [128],
        )  # fmt: skip


def hopper_narrow(
    x: Tensor,
    right: Tensor,
    routing: Routing,
    out: Tensor,
    *,
    x_fan_out: int,
    factor: Tensor | None,
    products: Tensor | None,
    scale: float,
    chunk: int,
    partial: Tensor | None,
) -> bool:
    """The launch of a `gram`, or with a factor of a `shrink_gram`: of all rows, or with ``partial``, those of the
    chunks beyond an expert's first, of the first ones.

    False, and nothing done, where operands are not what this kernel reads.
    """
    num_experts, P, out_columns = out.shape
    Q = right.shape[1]
    readable = x.element_size() == 2 and x.dtype == right.dtype and x.stride(1) == 1 and right.is_contiguous()
    readable = readable and P >= COLUMNS and Q in RANKS
    # Copies are of 16 bytes, and compiled for sizes and strides that are multiples of 16.
    readable = readable and x.data_ptr() % 16 == right.data_ptr() % 16 == P % 16 == x.stride(0) % 16 == 0
    if factor is not None:
        readable = readable and factor.dtype == x.dtype and factor.stride(2) == 1 and factor.data_ptr() % 16 == 0
        readable = readable and factor.stride(0) % 16 == factor.stride(1) % 16 == 0
    if not readable:
        return False
    size = x.element_size()
    factors = 0 if factor is None else 2 * COLUMNS * Q * size
    stages = (gpu(x).shared_memory - 1024 - factors) // (ROWS * (COLUMNS + Q) * size)
    num_units = num_experts * tiles.cdiv(P, COLUMNS)
    launch(
        _hopper_narrow_kernel,
        (min(num_units, gpu(x).processors), 1),
        (x, right, factor, out, partial, products, routing.expert_offsets, routing.scattered_idxs),
        (
            scale,
            num_units,
            num_experts,
            P,
            out_columns,
            0 if products is None else products.stride(0),
            x.stride(0),
            *((0, 0) if factor is None else factor.stride()[:2]),
            *out.stride(),
        ),
        4,
        stages,
        FAN_OUT=x_fan_out,
        BY_COLUMNS=x_fan_out > 1,
        HAS_FACTOR=factor is not None,
        EVEN_P=P % COLUMNS == 0,
        SPLIT=partial is not None,
        CHUNK=chunk if partial is not None else 2**30,
        EXPERTS=max(32, tiles.next_power_of_2(num_experts)),
        STAGES=stages,
        BLOCK_P=COLUMNS,
        BLOCK_Q=Q,
        BLOCK_M=ROWS,
    )
    return True
