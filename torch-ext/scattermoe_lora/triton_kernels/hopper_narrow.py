"""A narrow gram on Hopper, and the shrink of the rows that it reads, by specialised warps: see `hopper_gemm`.

Four warps copy rows, four to six stages ahead, four sum the gram, and four more make the product into the rank.
Triton's own pipeline is no deeper than the loads of slots that its rows wait for: of gathered rows its two passes got
5.5 TB/s each out of L2, which gives up to 7.8.
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
from .launch import empty, launch
from .rows import expert_rows, scheduled_chunk
from .totals import partial_sums, row_parts, totals

# Columns and rows of a stage, and ranks of a right operand: of 64 a thread holds 128 sums.
STAGE_COLUMNS, STAGE_ROWS, RANKS = 256, 64, (16, 32, 64)


@gluon.jit
def num_units(tiles_ptr, num_experts, P, CHUNKED: gl.constexpr, WIDTH: gl.constexpr):
    """Tiles of all experts, and of all chunks of those that have several."""
    groups = num_experts
    if CHUNKED:
        groups += gl.load(tiles_ptr + 2)
    return groups * gl.cdiv(P, WIDTH)


@gluon.jit
def unit_of(
    tiles_ptr, offsets_ptr, unit, num_experts, chunk_rows, P, CHUNKED: gl.constexpr, BY_COLUMNS: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """``(expert, first row, end of the rows, tile of WIDTH columns, chunk)``.

    ``chunk`` is -1 where the rows are all of the expert's, or none as it has several chunks, which are the last units.

    All tiles of an expert after one another, or the same columns of all of them: see `gram`.
    """
    column_tiles = gl.cdiv(P, WIDTH)
    expert = unit // column_tiles
    tile = unit % column_tiles
    chunk = expert - num_experts
    if CHUNKED:
        if chunk >= 0:
            expert, start, end, _first = scheduled_chunk(tiles_ptr, chunk)
            end = gl.minimum(end, start + chunk_rows)
        else:
            if BY_COLUMNS:
                expert = unit % num_experts
                tile = unit // num_experts
            start, end = expert_rows(offsets_ptr, expert)
            end = gl.where(end - start > chunk_rows, start, end)
    else:
        if BY_COLUMNS:
            expert = unit % num_experts
            tile = unit // num_experts
        start, end = expert_rows(offsets_ptr, expert)
    return expert, start, end, tile, gl.maximum(chunk, -1)


@gluon.jit
def steps_of(start, end, BLOCK_M: gl.constexpr):
    """Blocks of rows; without rows one, of zeros."""
    return gl.maximum(gl.cdiv(end - start, BLOCK_M), 1)


@gluon.jit
def _load(
    x_ptr, right_ptr, factor_ptr, tiles_ptr, offsets_ptr, scattered_ptr, x_ring, right_ring, factors, full, empty,
    unused, num_experts, chunk_rows, P, stride_xm, stride_fe, stride_fp, FAN_OUT: gl.constexpr,
    EVEN_P: gl.constexpr, CHUNKED: gl.constexpr, BY_COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    PIECES: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """The loading warps: all blocks of all units, as far ahead as the ring allows."""
    WIDTH: gl.constexpr = PIECES * BLOCK_P
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, COPIES))
    stage = 0
    phase = 1
    turn = 0
    turn_phase = 1
    units = num_units(tiles_ptr, num_experts, P, CHUNKED, WIDTH)
    own = gl.minimum(gl.program_id(0), units - 1)
    expert, start, end, tile, _chunk = unit_of(
        tiles_ptr, offsets_ptr, own, num_experts, chunk_rows, P, CHUNKED, BY_COLUMNS, WIDTH
    )
    slots = gl.load(scattered_ptr + start + row, mask=start + row < end, other=0)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        steps = steps_of(start, end, BLOCK_M)
        p = tile * WIDTH
        # A unit ahead, as the slots of its first rows wait for it, and its copies for them.
        following = gl.minimum(unit + gl.num_programs(0), units - 1)
        next_expert, next_start, next_end, next_tile, _chunk = unit_of(
            tiles_ptr, offsets_ptr, following, num_experts, chunk_rows, P, CHUNKED, BY_COLUMNS, WIDTH
        )
        if factor_ptr is not None:
            factor = factor_ptr + expert.to(gl.int64) * stride_fe
            mbarrier.wait(unused.index(turn), turn_phase)
            for piece in gl.static_range(PIECES):
                column = p + piece * BLOCK_P + gl.arange(0, BLOCK_P, layout=gl.SliceLayout(1, COPIES))
                copy_rows(
                    factor, column, column, column < P, stride_fp, 0, BLOCK_Q, factors.index(PIECES * turn + piece),
                    0, True, BLOCK_Q,
                )  # fmt: skip
            turn, turn_phase = next_stage(turn, turn_phase, 2)
        for k in range(0, steps):
            rows = start + k * BLOCK_M + row
            inside = rows < end
            # Before the copies, which they would wait for.
            next_rows = gl.where(k + 1 < steps, rows + BLOCK_M, next_start + row)
            next_inside = next_rows < gl.where(k + 1 < steps, end, next_end)
            next_slots = gl.load(scattered_ptr + next_rows, mask=next_inside, other=0)
            for piece in gl.static_range(PIECES):
                first = p + piece * BLOCK_P
                mbarrier.wait(empty.index(stage), phase)
                copy_rows(
                    x_ptr, rows, slots, inside, stride_xm, first, P, x_ring.index(stage), FAN_OUT, EVEN_P, BLOCK_P
                )
                copy_rows(
                    right_ptr, rows, slots, inside, BLOCK_Q, 0, BLOCK_Q, right_ring.index(stage), 0, True, BLOCK_Q
                )
                rows_arrive(full.index(stage), increment_count=False)  # of the factor's copies too
                stage, phase = next_stage(stage, phase, STAGES)
            slots = next_slots
        expert = next_expert
        start = next_start
        end = next_end
        tile = next_tile


@gluon.jit
def store_sums(acc, out, partial_ptr, p, P, out_columns, stride_op, stride_oq, chunk, CHUNKED: gl.constexpr):
    """Stores the sums of a stage's columns: the expert's, or in float32 those of one of its chunks."""
    Q: gl.constexpr = acc.shape[1]
    p += gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
    q = gl.arange(0, Q, layout=gl.SliceLayout(0, acc.type.layout))
    inside = (p < P)[:, None]
    acc += 0.0  # else ptxas takes its conversion for one beneath the products, and at rank 64 waits for each
    if CHUNKED:
        of_partial = partial_ptr + chunk.to(gl.int64) * (P * Q) + p[:, None] * Q + q[None, :]
        gl.store(of_partial, acc, mask=inside & (chunk >= 0))
        inside = inside & (chunk < 0)
    out += p[:, None].to(gl.int64) * stride_op + q[None, :].to(gl.int64) * stride_oq
    gl.store(out, acc.to(out.dtype.element_ty), mask=inside & (q < out_columns)[None, :])


@gluon.jit
def _sum(
    out_ptr, partial_ptr, tiles_ptr, offsets_ptr, x_ring, right_ring, full, empty, num_experts, chunk_rows, P,
    out_columns, stride_oe, stride_op, stride_oq, CHUNKED: gl.constexpr, BY_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr, PIECES: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr,
    BLOCK_M: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the gram."""
    WIDTH: gl.constexpr = PIECES * BLOCK_P
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    stage = 0
    phase = 0
    units = num_units(tiles_ptr, num_experts, P, CHUNKED, WIDTH)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        expert, start, end, tile, chunk = unit_of(
            tiles_ptr, offsets_ptr, unit, num_experts, chunk_rows, P, CHUNKED, BY_COLUMNS, WIDTH
        )
        # New ones: to go on with what was stored, and added to, takes another 128 registers a thread at rank 64.
        acc = gl.zeros((BLOCK_P, BLOCK_Q), gl.float32, layout=products)
        second = gl.zeros((BLOCK_P, BLOCK_Q), gl.float32, layout=products)
        for k in range(0, steps_of(start, end, BLOCK_M)):
            wait_full(full.index(stage), phase, True)
            acc = add_product(x_ring.index(stage).permute((1, 0)), right_ring.index(stage), acc)
            mbarrier.arrive(empty.index(before(stage, STAGES)), pred=k > 0)
            stage, phase = next_stage(stage, phase, STAGES)
            if PIECES == 2:
                wait_full(full.index(stage), phase, True)
                x = x_ring.index(stage).permute((1, 0))
                second = add_product(x, right_ring.index(stage), second)
                mbarrier.arrive(empty.index(before(stage, STAGES)))
                stage, phase = next_stage(stage, phase, STAGES)
        if PIECES == 2:
            acc, second = warpgroup_mma_wait(0, deps=[acc, second])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(before(stage, STAGES)))
        out = out_ptr + expert.to(gl.int64) * stride_oe
        p = tile * WIDTH
        store_sums(acc, out, partial_ptr, p, P, out_columns, stride_op, stride_oq, chunk, CHUNKED)
        if PIECES == 2:
            p += BLOCK_P
            store_sums(second, out, partial_ptr, p, P, out_columns, stride_op, stride_oq, chunk, CHUNKED)


@gluon.jit
def _project(
    products_ptr, tiles_ptr, offsets_ptr, x_ring, factors, full, empty, unused, num_experts, chunk_rows, P, scale,
    stride_pt, CHUNKED: gl.constexpr, BY_COLUMNS: gl.constexpr, STAGES: gl.constexpr,
    PIECES: gl.constexpr, BLOCK_P: gl.constexpr, BLOCK_Q: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Another warpgroup: the part that a tile's columns have in each row's product."""
    WIDTH: gl.constexpr = PIECES * BLOCK_P
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_Q, 16])
    stage = 0
    phase = 0
    turn = 0
    product = gl.zeros((BLOCK_M, BLOCK_Q), gl.float32, layout=products)
    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, products))
    q = gl.arange(0, BLOCK_Q, layout=gl.SliceLayout(0, products))
    units = num_units(tiles_ptr, num_experts, P, CHUNKED, WIDTH)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _expert, start, end, tile, _chunk = unit_of(
            tiles_ptr, offsets_ptr, unit, num_experts, chunk_rows, P, CHUNKED, BY_COLUMNS, WIDTH
        )
        for k in range(0, steps_of(start, end, BLOCK_M)):
            for piece in gl.static_range(PIECES):
                wait_full(full.index(stage), phase, True)
                factor = factors.index(PIECES * turn + piece)
                product = warpgroup_mma(x_ring.index(stage), factor, product, use_acc=piece > 0, is_async=True)
                product = warpgroup_mma_wait(0, deps=[product])
                mbarrier.arrive(empty.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
            rows = start + k * BLOCK_M + row
            out = products_ptr + tile.to(gl.int64) * stride_pt + rows.to(gl.int64)[:, None] * BLOCK_Q + q[None, :]
            gl.store(out, product * scale, mask=(rows < end)[:, None])
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
    tiles_ptr,
    offsets_ptr,
    scattered_ptr,
    scale,
    num_experts,
    chunk_rows,
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
    EVEN_P: gl.constexpr,
    CHUNKED: gl.constexpr,
    BY_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
    PIECES: gl.constexpr,
    BLOCK_P: gl.constexpr,
    BLOCK_Q: gl.constexpr,
    BLOCK_M: gl.constexpr,
):
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    x_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_P], dtype)
    right_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_Q], dtype)
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_P], x_layout)
    right_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_Q], right_layout)
    full, empty = barriers(128, STAGES, 1 if factor_ptr is None else 2)
    if factor_ptr is not None:
        factor_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_P, BLOCK_Q], dtype)
        factors = gl.allocate_shared_memory(dtype, [2 * PIECES, BLOCK_P, BLOCK_Q], factor_layout)
        unused = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        for turn in gl.static_range(2):
            mbarrier.init(unused.index(turn), count=1)
        fence_async_shared()
        gl.warp_specialize(
            [
                (
                    _sum,
                    (
                        out_ptr, partial_ptr, tiles_ptr, offsets_ptr, x_ring, right_ring, full, empty, num_experts,
                        chunk_rows, P, out_columns, stride_oe, stride_op, stride_oq, CHUNKED, BY_COLUMNS, STAGES,
                        PIECES, BLOCK_P, BLOCK_Q, BLOCK_M,
                    ),
                ),
                (
                    _project,
                    (
                        products_ptr, tiles_ptr, offsets_ptr, x_ring, factors, full, empty, unused, num_experts,
                        chunk_rows, P, scale, stride_pt, CHUNKED, BY_COLUMNS, STAGES, PIECES, BLOCK_P, BLOCK_Q,
                        BLOCK_M,
                    ),
                ),
                (
                    _load,
                    (
                        x_ptr, right_ptr, factor_ptr, tiles_ptr, offsets_ptr, scattered_ptr, x_ring, right_ring,
                        factors, full, empty, unused, num_experts, chunk_rows, P, stride_xm, stride_fe, stride_fp,
                        FAN_OUT, EVEN_P, CHUNKED, BY_COLUMNS, STAGES, PIECES, BLOCK_P, BLOCK_Q, BLOCK_M,
                    ),
                ),
            ],
            [4, 4],
            [128, 128],
        )  # fmt: skip
    else:  # none load a factor or wait for its memory; what is given for these is not used
        gl.warp_specialize(
            [
                (
                    _sum,
                    (
                        out_ptr, partial_ptr, tiles_ptr, offsets_ptr, x_ring, right_ring, full, empty, num_experts,
                        chunk_rows, P, out_columns, stride_oe, stride_op, stride_oq, CHUNKED, BY_COLUMNS, STAGES,
                        PIECES, BLOCK_P, BLOCK_Q, BLOCK_M,
                    ),
                ),
                (
                    _load,
                    (
                        x_ptr, right_ptr, factor_ptr, tiles_ptr, offsets_ptr, scattered_ptr, x_ring, right_ring,
                        right_ring, full, empty, empty, num_experts, chunk_rows, P, stride_xm, stride_fe, stride_fp,
                        FAN_OUT, EVEN_P, CHUNKED, BY_COLUMNS, STAGES, PIECES, BLOCK_P, BLOCK_Q, BLOCK_M,
                    ),
                ),
            ],
            [4],
            [128],
        )  # fmt: skip


def reads(x: Tensor, right: Tensor, factor: Tensor | None) -> bool:
    """Whether operands are what this kernel reads."""
    P, Q = x.shape[1], right.shape[1]
    if x.element_size() != 2 or right.dtype != x.dtype or P < STAGE_COLUMNS or Q not in RANKS:
        return False
    # Copies are of 16 bytes, and compiled for sizes and strides that are multiples of 16.
    if not x.stride(1) == right.stride(1) == 1 or right.stride(0) != Q or P % 16 or x.stride(0) % 16:
        return False
    if factor is not None and (factor.dtype != x.dtype or factor.stride(2) != 1):
        return False
    if factor is not None and (factor.stride(0) % 16 or factor.stride(1) % 16):
        return False
    return all(operand is None or operand.data_ptr() % 16 == 0 for operand in (x, right, factor))


def tile_columns(num_experts: int, P: int, Q: int, processors: int) -> int:
    """Columns of a tile: two stages', where their sums fit into the registers and processors, which take whole tiles,
    are idle for no more than a tenth longer. Their rows lie closer together, and products are made of half the parts:
    on an H200 the gram of ``x`` at 32,768 tokens took 134 us for 165, and at 8192 ``dO``'s, with the parts added, 50
    for 62.
    """
    stages = (1, 2)
    narrow, wide = (n * tiles.cdiv(num_experts * tiles.cdiv(P, n * STAGE_COLUMNS), processors) for n in stages)
    return 2 * STAGE_COLUMNS if Q <= 32 and 10 * wide <= 11 * narrow else STAGE_COLUMNS


def hopper_narrow(
    x: Tensor,
    right: Tensor,
    routing: Routing,
    out: Tensor,
    *,
    x_fan_out: int,
    factor: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor | None:
    """The launches of a `gram` of what it `reads`; with a factor of a `shrink_gram`, whose product it returns."""
    num_experts, P, out_columns = out.shape
    num_slots, Q, size = routing.num_slots, right.shape[1], x.element_size()
    columns = tile_columns(num_experts, P, Q, gpu(x).processors)
    product = products = None
    if factor is not None:
        product = empty(num_slots, Q, dtype=factor.dtype, device=factor.device)
        products = row_parts(tiles.cdiv(P, columns), num_slots, Q, x.device)
    chunk, partial = partial_sums(routing, out, Q, firsts=True)
    factors = 0 if factor is None else 2 * columns * Q * size
    stages = (gpu(x).shared_memory - 1024 - factors) // (STAGE_ROWS * (STAGE_COLUMNS + Q) * size)
    groups = num_experts + (0 if partial is None else partial.shape[0])
    launch(
        _hopper_narrow_kernel,
        (min(groups * tiles.cdiv(P, columns), gpu(x).processors), 1),
        (x, right, factor, out, partial, products, routing.tiles, routing.expert_offsets, routing.scattered_idxs),
        (
            scale,
            num_experts,
            chunk,
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
        EVEN_P=P % columns == 0,
        CHUNKED=partial is not None,
        BY_COLUMNS=x_fan_out > 1,
        STAGES=stages,
        PIECES=columns // STAGE_COLUMNS,
        BLOCK_P=STAGE_COLUMNS,
        BLOCK_Q=Q,
        BLOCK_M=STAGE_ROWS,
    )
    totals(routing, chunk=chunk, grams=((partial, out),), products=products, product=product)
    return product
