"""The grouped GEMM on Hopper, and the shrink into many ranks: the general kernels' bits, by specialised warps.

One warp loads by TMA, or two and two more where rows are gathered; two warpgroups multiply 64 rows each: loads run on
into the next tile, an output is stored while the next one is multiplied, with its activation where it has one, and the
half that an expert's last rows leave empty multiplies nothing. With four loading warps, an H200 took 2.01 ms for 2.25
for the four products of a Qwen3-30B-A3B step, and for the up product with its activation 666 us for 642 and a pass of
77; now 1 to 2 % less. Gluon, as Triton itself leaves gathered rows in one group of warps; no interpreter runs it.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .. import tiles
from ..types import Routing
from . import activations
from .deal import deal
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
    block,
    copy_rows,
    descriptor,
    held_block,
    held_outputs,
    hold,
    load_block,
    matrix,
    next_stage,
    num_stages,
    rows_arrive,
    store,
    wait_full,
)
from .launch import launch
from .rows import scheduled_tile, tile_entry, tile_of_entry

# How two warps copy gathered rows: 16 bytes a thread, as `COPIES`. Two copy each half, so one on each of a processor's
# schedulers: two for all rows filled the queues of two schedulers, and the warps there that multiply waited, 3 to 6 %
# of a product of gathered rows.
ROW_COPIES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [2, 1], [1, 0]))


# Products of several column tiles at least so deep, of so many rows an expert on the mean if no deeper, have their
# tiles dealt out. On an H100 GLM-4.5-Air's gradients, 2816 and 4096 deep, then took 7 and 8 % less at 512 rows an
# expert, but with 256 of them as long, and Qwen3-30B-A3B's up product, 2048 deep, 2 % more at 512. Rows of no expert
# count as well: the host knows no better.
DEEP, MANY_ROWS = 2560, 480


@gluon.jit
def _weights(stage, CONTIGUOUS: gl.constexpr, DEPTH: gl.constexpr, COLUMNS: gl.constexpr):
    """A stage's memory as weights ``[DEPTH, COLUMNS]``, whichever of the two is contiguous."""
    if CONTIGUOUS == "k":
        return matrix(stage, COLUMNS, DEPTH).permute((1, 0))
    else:
        return matrix(stage, DEPTH, COLUMNS)


@gluon.jit
def _expect(barrier, both, EITHER: gl.constexpr, EACH_HALF: gl.constexpr):
    """Bytes on their way to a stage: those of either half of the rows, and those of the halves that have any."""
    mbarrier.expect(barrier, EITHER + 2 * EACH_HALF, pred=both)
    mbarrier.expect(barrier, EITHER + EACH_HALF, pred=both == 0)


@gluon.jit
def _tell(told, stage, first_row, end, column_tile, expert):
    """Tells those who multiply of the tile that begins in this stage, which is empty."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    told.index(4 * stage).store(gl.full([1], first_row, gl.int32, layout=one))
    told.index(4 * stage + 1).store(gl.full([1], end, gl.int32, layout=one))
    told.index(4 * stage + 2).store(gl.full([1], column_tile, gl.int32, layout=one))
    told.index(4 * stage + 3).store(gl.full([1], expert, gl.int32, layout=one))


@gluon.jit
def _told(told, stage):
    """What was told, once the stage is full."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    first_row = gl.sum(told.index(4 * stage).load(one), 0)
    end = gl.sum(told.index(4 * stage + 1).load(one), 0)
    column_tile = gl.sum(told.index(4 * stage + 2).load(one), 0)
    return first_row, end, column_tile, gl.sum(told.index(4 * stage + 3).load(one), 0)


@gluon.jit
def _entry(tiles_ptr, dealt_ptr, tile, num_column_tiles):
    """What is written of a tile: its row tile's entry, or what `deal` has worked out."""
    if dealt_ptr is None:
        return tile_entry(tiles_ptr, tile // num_column_tiles)
    else:
        return tile_entry(dealt_ptr, tile)


@gluon.jit
def _tile_of(dealt_ptr, entry, tile, num_column_tiles, BLOCK_M: gl.constexpr, GROUP_M: gl.constexpr):
    """``(expert, first row, end of the expert's rows, column tile)`` of a tile with this entry."""
    if dealt_ptr is None:
        return tile_of_entry(entry, tile, num_column_tiles, BLOCK_M, GROUP_M)
    else:
        return entry


@gluon.jit
def _first_tile(tiles_ptr, dealt_ptr, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """``(column tiles, end of all tiles, *a program's first one)``; some tile's, if there is none for it."""
    num_column_tiles = gl.cdiv(N, BLOCK_N)
    end_tile = gl.load(tiles_ptr) * num_column_tiles
    first = gl.minimum(gl.program_id(0), gl.maximum(end_tile - 1, 0))
    entry = _entry(tiles_ptr, dealt_ptr, first, num_column_tiles)
    expert, first_row, end, column_tile = _tile_of(dealt_ptr, entry, first, num_column_tiles, BLOCK_M, GROUP_M)
    return num_column_tiles, end_tile, expert, first_row, end, column_tile


@gluon.jit
def _following(tiles_ptr, dealt_ptr, tile, num_column_tiles, end_tile):
    """A program's next tile, or the last one, and its entry.

    Loaded a tile ahead, and told to those who multiply: a look-up takes 700 to 1200 cycles, of a tile's 16,000 to
    40,000, in which the tensor cores had nothing to do.
    """
    following = gl.minimum(tile + gl.num_programs(0), end_tile - 1)
    return following, _entry(tiles_ptr, dealt_ptr, following, num_column_tiles)


@gluon.jit
def _slots(scattered_ptr, rows, end):
    """The slots of grouped rows; 0 for those past the expert's."""
    return gl.load(scattered_ptr + rows, mask=rows < end, other=0)


@gluon.jit
def _load_blocks(
    x_ptr, x, w, z, expand, tiles_ptr, dealt_ptr, scattered_ptr, a_ring, b_ring, told, full, empty, N, K, stride_xm,
    X_FAN_OUT: gl.constexpr, W_TMA: gl.constexpr, EXPAND_TMA: gl.constexpr, LORA_STEPS: gl.constexpr,
    BLOCK_R: gl.constexpr, PIECES: gl.constexpr, EVEN_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Loads all blocks of all tiles, as far ahead as the ring allows; of gathered rows each tile's first half."""
    GATHERED: gl.constexpr = X_FAN_OUT > 0
    HALF: gl.constexpr = BLOCK_M // 2
    dtype: gl.constexpr = w.dtype
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    stage = 0
    phase = 1
    num_column_tiles, end_tile, expert, first_row, end, column_tile = _first_tile(
        tiles_ptr, dealt_ptr, N, BLOCK_M, BLOCK_N, GROUP_M
    )
    if GATHERED:
        row = gl.arange(0, HALF, layout=gl.SliceLayout(1, ROW_COPIES))
        slots = _slots(scattered_ptr, first_row + row, end)
    for tile in range(gl.program_id(0), end_tile, gl.num_programs(0)):
        following, entry = _following(tiles_ptr, dealt_ptr, tile, num_column_tiles, end_tile)
        n = column_tile * (BLOCK_N // PIECES)
        both = first_row + HALF < end
        if GATHERED:  # rows past the expert's are zeros, which cost less to multiply than a repeated row
            inside = first_row + row < end
        mbarrier.wait(empty.index(stage), phase)
        _tell(told, stage, first_row, end, column_tile, expert)
        for k in range(0, K, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            if GATHERED:
                mbarrier.expect(barrier, BLOCK_N * BLOCK_K * BYTES)
            else:
                _expect(barrier, both, BLOCK_N * BLOCK_K * BYTES, HALF * BLOCK_K * BYTES)
            for piece in gl.static_range(PIECES):
                b = block(b_ring.index(stage), w, PIECES, piece)
                if W_TMA == "k":
                    load_block(w, [expert, n + piece * (N // PIECES), k], barrier, b)
                else:
                    load_block(w, [expert, k, n + piece * (N // PIECES)], barrier, b)
            if GATHERED:
                copy_rows(
                    x_ptr, slots, slots, inside, stride_xm, k, K, a_ring.index(2 * stage), X_FAN_OUT, EVEN_K, BLOCK_K,
                    ROW_COPIES,
                )  # fmt: skip
                rows_arrive(barrier, increment_count=False)
            else:
                load_block(x, [first_row, k], barrier, a_ring.index(2 * stage))
                load_block(x, [first_row + HALF, k], barrier, a_ring.index(2 * stage + 1), pred=both)
            stage, phase = next_stage(stage, phase, STAGES)
        next_expert, next_row, next_end, column_tile = _tile_of(
            dealt_ptr, entry, following, num_column_tiles, BLOCK_M, GROUP_M
        )
        if GATHERED:
            slots = _slots(scattered_ptr, next_row + row, next_end)
        for step in gl.static_range(LORA_STEPS):
            mbarrier.wait(empty.index(stage), phase)
            barrier = full.index(stage)
            _expect(barrier, both, BLOCK_N * BLOCK_R * BYTES, HALF * BLOCK_R * BYTES)
            for piece in gl.static_range(PIECES):
                b = block(b_ring.index(stage), expand, PIECES * (BLOCK_K // BLOCK_R), piece)
                if EXPAND_TMA == "k":
                    load_block(expand, [expert, n + piece * (N // PIECES), step * BLOCK_R], barrier, b)
                else:
                    load_block(expand, [expert, step * BLOCK_R, n + piece * (N // PIECES)], barrier, b)
            load_block(z, [first_row, step * BLOCK_R], barrier, block(a_ring.index(2 * stage), z, BLOCK_K // BLOCK_R))
            z_1 = block(a_ring.index(2 * stage + 1), z, BLOCK_K // BLOCK_R)
            load_block(z, [first_row + HALF, step * BLOCK_R], barrier, z_1, pred=both)
            if GATHERED:
                rows_arrive(barrier, increment_count=False)
            stage, phase = next_stage(stage, phase, STAGES)
        expert = next_expert
        first_row = next_row
        end = next_end


@gluon.jit
def _load_rows(
    x_ptr, tiles_ptr, dealt_ptr, scattered_ptr, a_ring, full, empty, N, K, stride_xm, X_FAN_OUT: gl.constexpr,
    LORA_STEPS: gl.constexpr, EVEN_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """Copies the second half of each tile's rows where they are gathered; elsewhere two warps that do nothing."""
    if X_FAN_OUT > 0:
        HALF: gl.constexpr = BLOCK_M // 2
        row = HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, ROW_COPIES))
        stage = 0
        phase = 1
        num_column_tiles, end_tile, _expert, first_row, end, _column = _first_tile(
            tiles_ptr, dealt_ptr, N, BLOCK_M, BLOCK_N, GROUP_M
        )
        slots = _slots(scattered_ptr, first_row + row, end)
        for tile in range(gl.program_id(0), end_tile, gl.num_programs(0)):
            following, entry = _following(tiles_ptr, dealt_ptr, tile, num_column_tiles, end_tile)
            both = first_row + HALF < end
            inside = first_row + row < end
            for k in range(0, K, BLOCK_K):
                mbarrier.wait(empty.index(stage), phase)
                if both:
                    copy_rows(
                        x_ptr, slots, slots, inside, stride_xm, k, K, a_ring.index(2 * stage + 1), X_FAN_OUT, EVEN_K,
                        BLOCK_K, ROW_COPIES,
                    )  # fmt: skip
                rows_arrive(full.index(stage), increment_count=False)
                stage, phase = next_stage(stage, phase, STAGES)
            _expert, first_row, end, _column = _tile_of(
                dealt_ptr, entry, following, num_column_tiles, BLOCK_M, GROUP_M
            )
            slots = _slots(scattered_ptr, first_row + row, end)
            for _step in gl.static_range(LORA_STEPS):
                mbarrier.wait(empty.index(stage), phase)
                rows_arrive(full.index(stage), increment_count=False)
                stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _output_rows(scattered_ptr, first_row, end, ROWS: gl.constexpr, SCATTERED: gl.constexpr):
    """Where grouped rows lie in the output, and which of them are the expert's."""
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPIES))
    inside = rows < end
    rows = rows.to(gl.int64)
    if SCATTERED:
        rows = gl.load(scattered_ptr + rows, mask=inside, other=0)
    return rows, inside


@gluon.jit
def _finish(
    out_ptr, a_ptr, held, scattered_ptr, first_row, end, column, N, step, PART: gl.constexpr,
    OUT_SCATTERED: gl.constexpr, ACTIVATION: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    SHIFT: gl.constexpr, HAS_GATE: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """Stores a block of a held output, which begins in this column of each of its pieces, and its activation, or a
    block of the second output.

    As much as takes no longer than a product: 32 rows by 64 columns of each piece.
    """
    ROWS: gl.constexpr = held.shape[1] // 2
    h = held_block(held, PART, step // 2, step % 2)
    first_row += step % 2 * ROWS
    column += step // 2 * 64
    rows, inside = _output_rows(scattered_ptr, first_row, end, ROWS, OUT_SCATTERED)
    if out_ptr is not None:
        store(out_ptr, h, rows * N, inside, column, N // PIECES)
    if held.shape[0] == 4:  # two outputs of both warpgroups, see `held_outputs`
        store(a_ptr, held_block(held, 2 + PART, step // 2, step % 2), rows * N, inside, column, N)
    if ACTIVATION != "":
        if not HAS_GATE:
            a = activations.act(h.to(gl.float32), ACTIVATION)
            store(a_ptr, a.to(held.dtype), rows * N, inside, column, N)
        else:
            if PIECES == 2:
                up = held_block(held, PART, 2 + step // 2, step % 2)
                if out_ptr is not None:
                    store(out_ptr + N // 2, up, rows * N, inside, column, N // 2)
                gate, up = h.to(gl.float32), up.to(gl.float32)
            else:
                gate, up = gl.split(gl.reshape(h.to(gl.float32), (ROWS, 32, 2)))
                column = column // 2
                rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, gate.type.layout))
                inside = rows < end
                rows = rows.to(gl.int64)
            value, factor = activations.gated(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT)
            store(a_ptr, (value * factor).to(held.dtype), rows * (N // 2), inside, column, N // 2)


@gluon.jit
def _multiply(
    bias_ptr, row_weights_ptr, out_ptr, a_ptr, tiles_ptr, scattered_ptr, a_ring, b_ring, held, told, full, empty, N, K,
    scale, stride_be, stride_bn, PART: gl.constexpr, GATHERED: gl.constexpr, W_TMA: gl.constexpr,
    EXPAND_TMA: gl.constexpr, OUT_SCATTERED: gl.constexpr, ZERO_TAIL: gl.constexpr, LORA_STEPS: gl.constexpr,
    BLOCK_R: gl.constexpr, SCALED: gl.constexpr, ACTIVATION: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr, SHIFT: gl.constexpr, HAS_GATE: gl.constexpr, PIECES: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
):  # fmt: skip
    """One warpgroup: the first (PART 0) or second half of every tile's rows."""
    HALF: gl.constexpr = BLOCK_M // 2
    WIDTH: gl.constexpr = BLOCK_N // PIECES
    BLOCKS: gl.constexpr = 2 * (WIDTH // 64)
    products: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    stage = 0
    phase = 0
    # A tile's output is stored while the next one is multiplied, a block of it in each of the first steps.
    step = BLOCKS
    held_row = 0
    held_end = 0
    held_column = 0
    # Never zeroed again: a tile's first product does without what is there, which makes a step 1 to 2 % shorter.
    acc = gl.zeros((HALF, BLOCK_N), gl.float32, layout=products)
    num_column_tiles = gl.cdiv(N, BLOCK_N)
    for _tile in range(gl.program_id(0), gl.load(tiles_ptr) * num_column_tiles, gl.num_programs(0)):
        mbarrier.wait(full.index(stage), phase)
        first_row, end, column_tile, expert = _told(told, stage)
        first_row += HALF * PART
        if first_row < end:
            if row_weights_ptr is not None:  # at once, as each is waited for twice
                row = first_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, products))
                slots = gl.load(scattered_ptr + row, mask=row < end, other=0)
                row_weights = gl.load(row_weights_ptr + slots, mask=row < end, other=0.0).to(gl.float32)
            for k in range(0, K, BLOCK_K):
                wait_full(full.index(stage), phase, GATHERED)
                b = _weights(b_ring.index(stage), W_TMA, BLOCK_K, BLOCK_N)
                acc = add_product(a_ring.index(2 * stage + PART), b, acc, use_acc=k > 0)
                mbarrier.arrive(empty.index(before(stage, STAGES)), pred=k > 0)
                if step < BLOCKS:
                    _finish(
                        out_ptr, a_ptr, held, scattered_ptr, held_row, held_end, held_column, N, step, PART,
                        OUT_SCATTERED, ACTIVATION, ALPHA, LIMIT, SHIFT, HAS_GATE, PIECES,
                    )  # fmt: skip
                    step += 1
                stage, phase = next_stage(stage, phase, STAGES)
            for _step in gl.static_range(LORA_STEPS):
                wait_full(full.index(stage), phase, False)
                z = matrix(a_ring.index(2 * stage + PART), HALF, BLOCK_R)
                b = _weights(b_ring.index(stage), EXPAND_TMA, BLOCK_R, BLOCK_N)
                acc = add_product(z, b, acc)
                mbarrier.arrive(empty.index(before(stage, STAGES)))
                stage, phase = next_stage(stage, phase, STAGES)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(before(stage, STAGES)))
            for rest in range(step, BLOCKS):
                _finish(
                    out_ptr, a_ptr, held, scattered_ptr, held_row, held_end, held_column, N, rest, PART,
                    OUT_SCATTERED, ACTIVATION, ALPHA, LIMIT, SHIFT, HAS_GATE, PIECES,
                )  # fmt: skip
            if bias_ptr is not None:
                n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, products))
                within = column_tile * WIDTH + n % WIDTH
                column = within + n // WIDTH * (N // PIECES)
                bias = bias_ptr + expert.to(gl.int64) * stride_be + column.to(gl.int64) * stride_bn
                acc += gl.load(bias, mask=within < N // PIECES, other=0.0).to(gl.float32)[None, :]
            if SCALED:
                acc *= scale
            hold(held, acc, PART)
            if row_weights_ptr is not None:
                hold(held, acc * row_weights[:, None], 2 + PART)
            step = 0
            held_row = first_row
            held_end = end
            held_column = column_tile * WIDTH
        else:
            for _ in range(gl.cdiv(K, BLOCK_K) + LORA_STEPS):
                mbarrier.wait(full.index(stage), phase)
                mbarrier.arrive(empty.index(stage))
                stage, phase = next_stage(stage, phase, STAGES)
    for rest in range(step, BLOCKS):
        _finish(
            out_ptr, a_ptr, held, scattered_ptr, held_row, held_end, held_column, N, rest, PART,
            OUT_SCATTERED, ACTIVATION, ALPHA, LIMIT, SHIFT, HAS_GATE, PIECES,
        )  # fmt: skip
    if ZERO_TAIL:  # the tiles of no expert, which follow
        tail = gl.load(tiles_ptr) * num_column_tiles
        skipped = gl.cdiv(gl.maximum(tail - gl.program_id(0), 0), gl.num_programs(0))
        tail_end = gl.load(tiles_ptr + 1) * num_column_tiles
        for tile in range(gl.program_id(0) + skipped * gl.num_programs(0), tail_end, gl.num_programs(0)):
            expert, first_row, end, column_tile = scheduled_tile(tiles_ptr, tile, num_column_tiles, BLOCK_M, GROUP_M)
            first_row += HALF * PART
            rows, inside = _output_rows(scattered_ptr, first_row, end, HALF, OUT_SCATTERED)
            zeros = gl.zeros((HALF, 64), held.dtype, layout=COPIES)
            for column in range(column_tile * BLOCK_N, (column_tile + 1) * BLOCK_N, 64):
                store(out_ptr, zeros, rows * N, inside, column, N)


@gluon.jit
def _hopper_gemm_kernel(
    x_ptr,
    x,
    w,
    z,
    expand,
    bias_ptr,
    row_weights_ptr,
    out_ptr,
    a_ptr,
    tiles_ptr,
    dealt_ptr,
    scattered_ptr,
    scale,
    N,
    K,
    stride_xm,
    stride_be,
    stride_bn,
    X_FAN_OUT: gl.constexpr,
    W_TMA: gl.constexpr,
    EXPAND_TMA: gl.constexpr,
    OUT_SCATTERED: gl.constexpr,
    ZERO_TAIL: gl.constexpr,
    LORA_STEPS: gl.constexpr,
    SCALED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    SHIFT: gl.constexpr,
    HAS_GATE: gl.constexpr,
    PIECES: gl.constexpr,
    EVEN_K: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    BLOCK_R: gl.constexpr,
):
    dtype: gl.constexpr = w.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M // 2, BLOCK_K], dtype)
    a_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_M // 2, BLOCK_K], layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], layout)
    out_dtype: gl.constexpr = a_ptr.dtype.element_ty if out_ptr is None else out_ptr.dtype.element_ty
    held = held_outputs(out_dtype, BLOCK_M, BLOCK_N, 1 if row_weights_ptr is None else 2)
    told = gl.allocate_shared_memory(gl.int32, [4 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # What TMA loads, and each thread that copies rows.
    full, empty = barriers(129 if X_FAN_OUT > 0 else 1, STAGES)
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    bias_ptr, row_weights_ptr, out_ptr, a_ptr, tiles_ptr, scattered_ptr, a_ring, b_ring, held, told,
                    full, empty, N, K, scale, stride_be, stride_bn, 0, X_FAN_OUT > 0, W_TMA, EXPAND_TMA,
                    OUT_SCATTERED, ZERO_TAIL, LORA_STEPS, BLOCK_R, SCALED, ACTIVATION, ALPHA, LIMIT, SHIFT,
                    HAS_GATE, PIECES, GROUP_M, STAGES, BLOCK_M, BLOCK_N, BLOCK_K,
                ),
            ),
            (
                _multiply,
                (
                    bias_ptr, row_weights_ptr, out_ptr, a_ptr, tiles_ptr, scattered_ptr, a_ring, b_ring, held, told,
                    full, empty, N, K, scale, stride_be, stride_bn, 1, X_FAN_OUT > 0, W_TMA, EXPAND_TMA,
                    OUT_SCATTERED, ZERO_TAIL, LORA_STEPS, BLOCK_R, SCALED, ACTIVATION, ALPHA, LIMIT, SHIFT,
                    HAS_GATE, PIECES, GROUP_M, STAGES, BLOCK_M, BLOCK_N, BLOCK_K,
                ),
            ),
            (
                _load_rows,
                (
                    x_ptr, tiles_ptr, dealt_ptr, scattered_ptr, a_ring, full, empty, N, K, stride_xm, X_FAN_OUT,
                    LORA_STEPS, EVEN_K, GROUP_M, STAGES, BLOCK_M, BLOCK_N, BLOCK_K,
                ),
            ),
            (
                _load_blocks,
                (
                    x_ptr, x, w, z, expand, tiles_ptr, dealt_ptr, scattered_ptr, a_ring, b_ring, told, full, empty, N,
                    K, stride_xm, X_FAN_OUT, W_TMA, EXPAND_TMA, LORA_STEPS, BLOCK_R, PIECES, EVEN_K, GROUP_M, STAGES,
                    BLOCK_M, BLOCK_N, BLOCK_K,
                ),
            ),
        ],
        [4, 2, 2 if X_FAN_OUT > 0 else 1],
        [REGISTERS, 504 - 2 * REGISTERS, 504 - 2 * REGISTERS],
    )  # fmt: skip


def _stack(stack: Tensor, depth: int, columns: int) -> tuple[TensorDescriptor | None, str]:
    """A stack ``[E, depth, columns]`` for TMA, and which of the two is contiguous: "k", "n", or "" for neither."""
    by_depth = descriptor(stack, [1, columns, depth], 1)
    if by_depth is not None:
        return by_depth, "k"
    by_columns = descriptor(stack, [1, depth, columns], 2)
    return by_columns, "n" if by_columns is not None else ""


def hopper_gemm(
    x: Tensor,
    weight: Tensor,
    routing: Routing,
    out: Tensor | None,
    *,
    x_fan_out: int,
    out_scattered: bool = False,
    zero_tail: bool = False,
    z: Tensor | None,
    expand: Tensor | None,
    bias: Tensor | None,
    group_m: int,
    a: Tensor | None = None,
    activation: dict[str, str | float] | None = None,
    has_gate: bool = False,
    is_concatenated: bool = False,
    scale: float = 1.0,
    row_weights: Tensor | None = None,
) -> bool:
    """`grouped_gemm` into ``out``, and its activation, if there is one, into ``a``; either may be None.

    Or `shrink`, with ``scale``, and what it weights by ``row_weights`` into ``a``. False, and nothing done, where
    operands are not what this kernel reads.
    """
    num_slots, num_experts = routing.num_slots, routing.num_experts
    _, K, N = weight.shape
    # Fewer for a shrink into no more of them, or into two outputs, for which a tile of 256 leaves no room.
    columns = COLUMNS if N > COLUMNS // 2 and row_weights is None else COLUMNS // 2
    rank = 0 if z is None else z.shape[1]
    block_r = min(DEPTH, max(16, tiles.next_power_of_2(rank)))
    # Gate and up of a unit belong into one tile: half of its columns are of each.
    pieces = 2 if activation is not None and has_gate and is_concatenated else 1
    w, w_tma = _stack(weight, DEPTH, columns // pieces)
    x_block = z_block = expand_block = None
    expand_tma = ""
    if x_fan_out == 0:
        x_block = descriptor(x, [ROWS // 2, DEPTH], 1)
        readable = x_block is not None
    else:
        # Copies are of 16 bytes, and compiled for sizes and strides that are multiples of 16.
        readable = x.stride(1) == 1 and x.data_ptr() % 16 == K % 16 == x.stride(0) % 16 == 0
    if z is not None and expand is not None:
        z_block = descriptor(z, [ROWS // 2, block_r], 1)
        expand_block, expand_tma = _stack(expand, block_r, columns // pieces)
        readable = readable and z_block is not None and expand_block is not None
        readable = readable and z.dtype == expand.dtype == weight.dtype
    if pieces == 2 and "n" in (w_tma, expand_tma):
        # Where columns are contiguous TMA begins at multiples of 16 bytes, and up's columns begin at N / 2: elsewhere
        # an H200 stopped at an illegal instruction.
        readable = readable and N // 2 * weight.element_size() % 16 == 0
    if not readable or w is None or x.dtype != weight.dtype:
        return False
    num_column_tiles = tiles.cdiv(N, columns)
    num_tiles = tiles.num_row_tiles(num_slots, num_experts, ROWS) * num_column_tiles
    programs = min(num_tiles, gpu(x).processors)
    dealt = None
    if num_column_tiles > 1 and K >= DEEP and K * num_slots >= DEEP * MANY_ROWS * num_experts:
        dealt = deal(routing, num_tiles, num_column_tiles, programs, group_m)
    stages = num_stages(columns, 1 if row_weights is None else 2, gpu(x).shared_memory)
    launch(
        _hopper_gemm_kernel,
        (programs, 1),
        (
            x,
            x_block,
            w,
            z_block,
            expand_block,
            bias,
            row_weights,
            out,
            a,
            routing.tiles,
            dealt,
            routing.scattered_idxs,
        ),
        (scale, N, K, x.stride(0), *((0, 0) if bias is None else bias.stride())),
        4,
        stages,
        X_FAN_OUT=x_fan_out,
        W_TMA=w_tma,
        EXPAND_TMA=expand_tma,
        OUT_SCATTERED=out_scattered,
        ZERO_TAIL=zero_tail,
        LORA_STEPS=tiles.cdiv(rank, block_r),
        SCALED=scale != 1.0,
        **(activation or {"ACTIVATION": "", "ALPHA": 0.0, "LIMIT": 0.0, "SHIFT": 0.0}),
        HAS_GATE=has_gate,
        PIECES=pieces,
        EVEN_K=K % DEPTH == 0,
        GROUP_M=group_m,
        STAGES=stages,
        REGISTERS=REGISTERS,
        BLOCK_M=ROWS,
        BLOCK_N=columns,
        BLOCK_K=DEPTH,
        BLOCK_R=block_r,
    )
    return True
