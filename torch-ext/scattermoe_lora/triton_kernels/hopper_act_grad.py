"""The activation's gradient on Hopper, and what LoRA makes of its two sides, in one pass: see `hopper_gemm`.

Four warps load blocks of ``g`` and ``h``, twice eight make ``a`` and ``dh`` of them where they lie, and four sum the
grams of both and make the product of ``dh`` into the rank. So ``a`` is never written, and ``dh`` not read again: on an
H200 Qwen3-30B-A3B's three passes of 8192 tokens took 170 us for 252.
"""

from __future__ import annotations

import torch
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
from ..reference import DROPPED_ACTIVATION, dropout_threshold
from ..types import Routing
from . import activations
from .device import gpu
from .dropout import dropped, seed_key
from .hopper import COPIES, barriers, copy_rows, descriptor, load_block, next_stage, parts, rows_arrive, wait_full
from .hopper_narrow import num_units, steps_of, store_sums, unit_of
from .launch import empty, launch
from .totals import partial_sums, row_parts, totals

# Units and rows of a stage.
UNITS, ROWS = 128, 64
# The warps that make half of a stage's units each, and registers a thread of theirs and of the loading ones, by the
# larger rank; those that sum have what is left, and need more at 32. Others spill 72 to 180 bytes (Triton 3.6, 3.9).
WARPS, REGISTERS = gl.constexpr(8), {16: (72, 56), 32: (56, 64)}
# How they hold 32 rows of 64 units, a row in eight threads, and of gate and up next to one another.
HALVES = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))
PAIRS = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0]))


@gluon.jit
def _block_columns(n, N, CONCATENATED: gl.constexpr, UNITS: gl.constexpr):
    """The columns of ``h`` at which its two blocks of the units from ``n`` on begin."""
    if CONCATENATED:
        return n, N + n
    else:
        return 2 * n, 2 * n + UNITS


@gluon.jit
def _load(
    g, h, right_a_ptr, right_h_ptr, factor_ptr, weights_ptr, tiles_ptr, offsets_ptr, scattered_ptr, g_ring, left_ring,
    right_ring, weights_ring, slots_ring, right_a_ring, right_h_ring, factors, full, empty, unused, num_experts,
    chunk_rows, N, stride_fe, stride_fp, CONCATENATED: gl.constexpr, CHUNKED: gl.constexpr, DROPS: gl.constexpr,
    STAGES: gl.constexpr, Q_A: gl.constexpr, Q_H: gl.constexpr, UNITS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The loading warps: all blocks of all tiles, as far ahead as the ring allows."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPIES))
    column = gl.arange(0, UNITS, layout=gl.SliceLayout(1, COPIES))
    stage = 0
    phase = 1
    turn = 0
    turn_phase = 1
    units = num_units(tiles_ptr, num_experts, N, CHUNKED, UNITS)
    own = gl.minimum(gl.program_id(0), units - 1)
    expert, start, end, tile, _chunk = unit_of(
        tiles_ptr, offsets_ptr, own, num_experts, chunk_rows, N, CHUNKED, False, UNITS
    )
    slots = gl.load(scattered_ptr + start + row, mask=start + row < end, other=0)
    weights = gl.load(weights_ptr + slots, mask=start + row < end, other=0.0)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        steps = steps_of(start, end, ROWS)
        # A tile ahead, as the weights of its first rows wait for their slots, and these for it.
        following = gl.minimum(unit + gl.num_programs(0), units - 1)
        next_expert, next_start, next_end, next_tile, _chunk = unit_of(
            tiles_ptr, offsets_ptr, following, num_experts, chunk_rows, N, CHUNKED, False, UNITS
        )
        n = tile * UNITS
        left, right = _block_columns(n, N, CONCATENATED, UNITS)
        factor = factor_ptr + expert.to(gl.int64) * stride_fe
        mbarrier.wait(unused.index(turn), turn_phase)
        of_left = left + column
        of_right = right + column
        copy_rows(factor, of_left, of_left, of_left < 2 * N, stride_fp, 0, Q_H, factors.index(2 * turn), 0, True, Q_H)
        copy_rows(
            factor, of_right, of_right, of_right < 2 * N, stride_fp, 0, Q_H, factors.index(2 * turn + 1), 0, True, Q_H
        )
        turn, turn_phase = next_stage(turn, turn_phase, 2)
        for k in range(0, steps):
            first = start + k * ROWS
            rows = first + row
            inside = rows < end
            # A step ahead: the weights are waited for once in two steps of memory's latency, not twice in each.
            next_rows = gl.where(k + 1 < steps, rows + ROWS, next_start + row)
            next_inside = next_rows < gl.where(k + 1 < steps, end, next_end)
            next_slots = gl.load(scattered_ptr + next_rows, mask=next_inside, other=0)
            barrier = full.index(stage)
            mbarrier.wait(empty.index(stage), phase)
            weights_ring.index(stage).store(weights.to(gl.float32))
            if DROPS:
                slots_ring.index(stage).store(slots.to(gl.int32))
                slots = next_slots
            mbarrier.expect(barrier, 3 * ROWS * UNITS * g.dtype.primitive_bitwidth // 8)
            load_block(g, [first, n], barrier, g_ring.index(stage))
            load_block(h, [first, left], barrier, left_ring.index(stage))
            load_block(h, [first, right], barrier, right_ring.index(stage))
            copy_rows(right_a_ptr, rows, rows, inside, Q_A, 0, Q_A, right_a_ring.index(stage), 0, True, Q_A)
            copy_rows(right_h_ptr, rows, rows, inside, Q_H, 0, Q_H, right_h_ring.index(stage), 0, True, Q_H)
            rows_arrive(barrier, increment_count=False)  # of the factor's copies too
            mbarrier.arrive(barrier)  # of the weights
            stage, phase = next_stage(stage, phase, STAGES)
            weights = gl.load(weights_ptr + next_slots, mask=next_inside, other=0.0)
        expert = next_expert
        start = next_start
        end = next_end
        tile = next_tile


@gluon.jit
def _gate_up(left, right, HALF: gl.constexpr, part: gl.constexpr, CONCATENATED: gl.constexpr):
    """Gate and up of a stage's first or second 64 units, of 32 of its rows."""
    ROWS: gl.constexpr = left.shape[0] // 2
    if CONCATENATED:
        gate = parts(left, ROWS, 64).index(2 * HALF + part).load(HALVES)
        up = parts(right, ROWS, 64).index(2 * HALF + part).load(HALVES)
        return gate, up
    else:
        both = right if HALF else left
        gate, up = gl.split(gl.reshape(both.slice(part * ROWS, ROWS).load(PAIRS), (ROWS, 64, 2)))
        return gl.convert_layout(gate, HALVES), gl.convert_layout(up, HALVES)


@gluon.jit
def _activate(
    g, gate, up, weights, inside, whole, ACTIVATION: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    SHIFT: gl.constexpr,
):  # fmt: skip
    """``a`` times the rows' weights, both parts of ``dh``, and ``<a, g>``; zeros of rows that are not inside."""
    dtype: gl.constexpr = g.dtype
    if whole == 0:  # rows of other experts, or of none
        g = gl.where(inside[:, None], g, 0.0)
        gate = gl.where(inside[:, None], gate, 0.0)
        up = gl.where(inside[:, None], up, 0.0)
    g, gate, up = g.to(gl.float32), gate.to(gl.float32), up.to(gl.float32)
    da = g * weights[:, None]
    value, factor = activations.gated(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT)
    slope, factor_slope = activations.gated_slopes(gate, up, ACTIVATION, ALPHA, LIMIT)
    a = value * factor
    d_gate = (da * factor * slope).to(dtype)
    d_up = (da * value * factor_slope).to(dtype)
    return (a * weights[:, None]).to(dtype), d_gate, d_up, gl.sum(a * g, axis=1)


@gluon.jit
def _drop(a, key, slots, column, threshold, scale):
    """``a`` of rows of these slots and these columns after dropout."""
    return dropped(a.to(gl.float32), key, slots[:, None], column[None, :], threshold, scale).to(a.dtype)


@gluon.jit
def _keep(left, right, d_gate, d_up, HALF: gl.constexpr, part: gl.constexpr, CONCATENATED: gl.constexpr):
    """The gradients of what `_gate_up` read to where that was."""
    ROWS: gl.constexpr = left.shape[0] // 2
    if CONCATENATED:
        parts(left, ROWS, 64).index(2 * HALF + part).store(d_gate)
        parts(right, ROWS, 64).index(2 * HALF + part).store(d_up)
    else:
        both = right if HALF else left
        both.slice(part * ROWS, ROWS).store(gl.reshape(gl.join(d_gate, d_up), (ROWS, 128)))


@gluon.jit
def _store(dh_ptr, dot_ptr, d_gate, d_up, dot, rows, inside, n, N, CONCATENATED: gl.constexpr):
    """The gradients of these units' gate and up, and their part of the routing weights'."""
    dh_row = dh_ptr + (rows.to(gl.int64) * (2 * N))[:, None]
    if CONCATENATED:
        column = n + gl.arange(0, 64, layout=gl.SliceLayout(0, HALVES))
        gl.store(dh_row + column[None, :], d_gate, mask=inside[:, None])
        gl.store(dh_row + N + column[None, :], d_up, mask=inside[:, None])
    else:
        both = gl.convert_layout(gl.reshape(gl.join(d_gate, d_up), (d_gate.shape[0], 128)), PAIRS)
        column = 2 * n + gl.arange(0, 128, layout=gl.SliceLayout(0, PAIRS))
        inside_pairs = gl.convert_layout(inside, gl.SliceLayout(1, PAIRS))
        pairs_row = gl.convert_layout(dh_row, PAIRS)
        gl.store(pairs_row + column[None, :], both, mask=inside_pairs[:, None] & (column < 2 * N)[None, :])
    gl.store(dot_ptr + rows, dot, mask=inside)


@gluon.jit
def _derive(
    dh_ptr, dots_ptr, seed_ptr, tiles_ptr, offsets_ptr, g_ring, left_ring, right_ring, weights_ring, slots_ring, full,
    ready, threshold, drop_scale, num_experts, chunk_rows, N, stride_dt, STREAM: gl.constexpr, HALF: gl.constexpr,
    CONCATENATED: gl.constexpr, CHUNKED: gl.constexpr, STAGES: gl.constexpr, UNITS: gl.constexpr, ROWS: gl.constexpr,
    ACTIVATION: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, SHIFT: gl.constexpr,
):  # fmt: skip
    """Some warps: of the first (HALF 0) or the second 64 units of every stage ``a``, after dropout if there is any, in
    place of ``g``, and ``dh`` in place of ``h``, which is also stored."""
    row = gl.arange(0, ROWS // 2, layout=gl.SliceLayout(1, HALVES))
    stage = 0
    phase = 0
    if seed_ptr is not None:
        key = seed_key(seed_ptr, STREAM)
    units = num_units(tiles_ptr, num_experts, N, CHUNKED, UNITS)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        _expert, start, end, tile, _chunk = unit_of(
            tiles_ptr, offsets_ptr, unit, num_experts, chunk_rows, N, CHUNKED, False, UNITS
        )
        n = tile * UNITS + HALF * 64
        column = n + gl.arange(0, 64, layout=gl.SliceLayout(0, HALVES))
        dot_ptr = dots_ptr + (2 * tile + HALF).to(gl.int64) * stride_dt
        for k in range(0, steps_of(start, end, ROWS)):
            rows_0 = start + k * ROWS + row
            rows_1 = rows_0 + ROWS // 2
            inside_0 = rows_0 < end
            inside_1 = rows_1 < end
            whole = start + (k + 1) * ROWS <= end
            g = parts(g_ring.index(stage), ROWS // 2, 64)
            left = left_ring.index(stage)
            right = right_ring.index(stage)
            wait_full(full.index(stage), phase, False)
            # All loads before the first store: else warps wait for one another seven times, not three.
            weights = weights_ring.index(stage)
            weights_0 = weights.slice(0, ROWS // 2).load(gl.SliceLayout(1, HALVES))
            weights_1 = weights.slice(ROWS // 2, ROWS // 2).load(gl.SliceLayout(1, HALVES))
            g_0 = g.index(2 * HALF).load(HALVES)
            g_1 = g.index(2 * HALF + 1).load(HALVES)
            gate_0, up_0 = _gate_up(left, right, HALF, 0, CONCATENATED)
            gate_1, up_1 = _gate_up(left, right, HALF, 1, CONCATENATED)
            a_0, d_gate_0, d_up_0, dot_0 = _activate(
                g_0, gate_0, up_0, weights_0, inside_0, whole, ACTIVATION, ALPHA, LIMIT, SHIFT
            )
            if seed_ptr is not None:
                slots = slots_ring.index(stage).slice(0, ROWS // 2).load(gl.SliceLayout(1, HALVES))
                a_0 = _drop(a_0, key, slots, column, threshold, drop_scale)
            g.index(2 * HALF).store(a_0)
            _keep(left, right, d_gate_0, d_up_0, HALF, 0, CONCATENATED)
            a_1, d_gate_1, d_up_1, dot_1 = _activate(
                g_1, gate_1, up_1, weights_1, inside_1, whole, ACTIVATION, ALPHA, LIMIT, SHIFT
            )
            if seed_ptr is not None:
                slots = slots_ring.index(stage).slice(ROWS // 2, ROWS // 2).load(gl.SliceLayout(1, HALVES))
                a_1 = _drop(a_1, key, slots, column, threshold, drop_scale)
            g.index(2 * HALF + 1).store(a_1)
            _keep(left, right, d_gate_1, d_up_1, HALF, 1, CONCATENATED)
            fence_async_shared()
            mbarrier.arrive(ready.index(stage))
            # The fence would wait for them.
            _store(dh_ptr, dot_ptr, d_gate_0, d_up_0, dot_0, rows_0, inside_0, n, N, CONCATENATED)
            _store(dh_ptr, dot_ptr, d_gate_1, d_up_1, dot_1, rows_1, inside_1, n, N, CONCATENATED)
            stage, phase = next_stage(stage, phase, STAGES)


@gluon.jit
def _sum(
    out_a_ptr, out_h_ptr, partial_a_ptr, partial_h_ptr, products_ptr, tiles_ptr, offsets_ptr, g_ring, left_ring,
    right_ring, right_a_ring, right_h_ring, factors, ready, empty, unused, num_experts, chunk_rows, N, columns_a,
    columns_h, scale, stride_pt, stride_ae, stride_ap, stride_aq, stride_he, stride_hp, stride_hq,
    CONCATENATED: gl.constexpr, CHUNKED: gl.constexpr, STAGES: gl.constexpr, Q_A: gl.constexpr,
    Q_H: gl.constexpr, UNITS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: both grams, and the part that a tile's units have in each row's product."""
    sums_a: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q_A, 16])
    sums_h: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q_H, 16])
    stage = 0
    phase = 0
    turn = 0
    product = gl.zeros((ROWS, Q_H), gl.float32, layout=sums_h)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, sums_h))
    q = gl.arange(0, Q_H, layout=gl.SliceLayout(0, sums_h))
    units = num_units(tiles_ptr, num_experts, N, CHUNKED, UNITS)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        expert, start, end, tile, chunk = unit_of(
            tiles_ptr, offsets_ptr, unit, num_experts, chunk_rows, N, CHUNKED, False, UNITS
        )
        of_a = gl.zeros((UNITS, Q_A), gl.float32, layout=sums_a)
        of_left = gl.zeros((UNITS, Q_H), gl.float32, layout=sums_h)
        of_right = gl.zeros((UNITS, Q_H), gl.float32, layout=sums_h)
        for k in range(0, steps_of(start, end, ROWS)):
            wait_full(ready.index(stage), phase, True)
            a = g_ring.index(stage)
            left_block = left_ring.index(stage)
            right_block = right_ring.index(stage)
            of_h = right_h_ring.index(stage)
            of_a = warpgroup_mma(a.permute((1, 0)), right_a_ring.index(stage), of_a, is_async=True)
            of_left = warpgroup_mma(left_block.permute((1, 0)), of_h, of_left, is_async=True)
            of_right = warpgroup_mma(right_block.permute((1, 0)), of_h, of_right, is_async=True)
            product = warpgroup_mma(left_block, factors.index(2 * turn), product, use_acc=False, is_async=True)
            product = warpgroup_mma(right_block, factors.index(2 * turn + 1), product, is_async=True)
            of_a, of_left, of_right, product = warpgroup_mma_wait(0, deps=[of_a, of_left, of_right, product])
            mbarrier.arrive(empty.index(stage))
            stage, phase = next_stage(stage, phase, STAGES)
            rows = start + k * ROWS + row
            out = products_ptr + tile.to(gl.int64) * stride_pt + rows.to(gl.int64)[:, None] * Q_H + q[None, :]
            gl.store(out, product * scale, mask=(rows < end)[:, None])
        mbarrier.arrive(unused.index(turn))
        turn = 1 - turn
        out_a = out_a_ptr + expert.to(gl.int64) * stride_ae
        out_h = out_h_ptr + expert.to(gl.int64) * stride_he
        n = tile * UNITS
        left, right = _block_columns(n, N, CONCATENATED, UNITS)
        store_sums(of_a, out_a, partial_a_ptr, n, N, columns_a, stride_ap, stride_aq, chunk, CHUNKED)
        store_sums(of_left, out_h, partial_h_ptr, left, 2 * N, columns_h, stride_hp, stride_hq, chunk, CHUNKED)
        store_sums(of_right, out_h, partial_h_ptr, right, 2 * N, columns_h, stride_hp, stride_hq, chunk, CHUNKED)


@gluon.jit
def _hopper_act_grad_kernel(
    g,
    h,
    right_a_ptr,
    right_h_ptr,
    factor_ptr,
    weights_ptr,
    dh_ptr,
    dots_ptr,
    seed_ptr,
    out_a_ptr,
    out_h_ptr,
    partial_a_ptr,
    partial_h_ptr,
    products_ptr,
    tiles_ptr,
    offsets_ptr,
    scattered_ptr,
    scale,
    threshold,
    drop_scale,
    num_experts,
    chunk_rows,
    N,
    columns_a,
    columns_h,
    stride_dt,
    stride_pt,
    stride_fe,
    stride_fp,
    stride_ae,
    stride_ap,
    stride_aq,
    stride_he,
    stride_hp,
    stride_hq,
    STREAM: gl.constexpr,
    ACTIVATION: gl.constexpr,
    ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
    SHIFT: gl.constexpr,
    CONCATENATED: gl.constexpr,
    CHUNKED: gl.constexpr,
    STAGES: gl.constexpr,
    Q_A: gl.constexpr,
    Q_H: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADING_REGISTERS: gl.constexpr,
):
    dtype: gl.constexpr = g.dtype
    block: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, BLOCK_N], dtype)
    rank_a: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, Q_A], dtype)
    rank_h: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, Q_H], dtype)
    of_factor: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, Q_H], dtype)
    of_weights: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    g_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_N], block)
    left_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_N], block)
    right_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_N], block)
    weights_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], of_weights)
    slots_ring = weights_ring  # given where nothing is dropped, and not used
    if seed_ptr is not None:
        slots_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_M], of_weights)
    right_a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, Q_A], rank_a)
    right_h_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, Q_H], rank_h)
    factors = gl.allocate_shared_memory(dtype, [4, BLOCK_N, Q_H], of_factor)
    full, empty = barriers(130, STAGES, 1)  # what TMA loads, each loading thread's copies, and the weights
    ready, unused = barriers(2, STAGES, 1)
    gl.warp_specialize(
        [
            (
                _sum,
                (
                    out_a_ptr, out_h_ptr, partial_a_ptr, partial_h_ptr, products_ptr, tiles_ptr, offsets_ptr, g_ring,
                    left_ring, right_ring, right_a_ring, right_h_ring, factors, ready, empty, unused, num_experts,
                    chunk_rows, N, columns_a, columns_h, scale, stride_pt, stride_ae, stride_ap, stride_aq, stride_he,
                    stride_hp, stride_hq, CONCATENATED, CHUNKED, STAGES, Q_A, Q_H, BLOCK_N, BLOCK_M,
                ),
            ),
            (
                _derive,
                (
                    dh_ptr, dots_ptr, seed_ptr, tiles_ptr, offsets_ptr, g_ring, left_ring, right_ring, weights_ring,
                    slots_ring, full, ready, threshold, drop_scale, num_experts, chunk_rows, N, stride_dt, STREAM, 0,
                    CONCATENATED, CHUNKED, STAGES, BLOCK_N, BLOCK_M, ACTIVATION, ALPHA, LIMIT, SHIFT,
                ),
            ),
            (
                _derive,
                (
                    dh_ptr, dots_ptr, seed_ptr, tiles_ptr, offsets_ptr, g_ring, left_ring, right_ring, weights_ring,
                    slots_ring, full, ready, threshold, drop_scale, num_experts, chunk_rows, N, stride_dt, STREAM, 1,
                    CONCATENATED, CHUNKED, STAGES, BLOCK_N, BLOCK_M, ACTIVATION, ALPHA, LIMIT, SHIFT,
                ),
            ),
            (
                _load,
                (
                    g, h, right_a_ptr, right_h_ptr, factor_ptr, weights_ptr, tiles_ptr, offsets_ptr, scattered_ptr,
                    g_ring, left_ring, right_ring, weights_ring, slots_ring, right_a_ring, right_h_ring, factors, full,
                    empty, unused, num_experts, chunk_rows, N, stride_fe, stride_fp, CONCATENATED, CHUNKED,
                    seed_ptr is not None, STAGES, Q_A, Q_H, BLOCK_N, BLOCK_M,
                ),
            ),
        ],
        [WARPS, WARPS, 4],
        [REGISTERS, REGISTERS, LOADING_REGISTERS],
    )  # fmt: skip


def reads(g: Tensor, h: Tensor, right_a: Tensor, right_h: Tensor, factor: Tensor, is_concatenated: bool) -> bool:
    """Whether operands are what this kernel reads: ``h [S, 2I]`` with gate and up concatenated or interleaved."""
    operands = (g, h, right_a, right_h, factor)
    if g.element_size() != 2 or any(operand.dtype != g.dtype or operand.data_ptr() % 16 for operand in operands):
        return False
    # A block of gate must not reach into up. Interleaved ones with 56 registers spilled 104 bytes a thread.
    ranks, columns = ((16, 32), UNITS) if is_concatenated else ((16,), 16)
    if g.shape[1] % columns or right_a.shape[1] not in ranks or right_h.shape[1] not in ranks:
        return False
    if not all(operand.is_contiguous() for operand in operands[:-1]) or factor.stride(2) != 1:
        return False
    return factor.stride(0) % 16 == factor.stride(1) % 16 == 0


def hopper_act_grad(
    g: Tensor,
    h: Tensor,
    routing: Routing,
    *,
    row_weights: Tensor,
    activation: dict[str, str | float],
    is_concatenated: bool,
    dot_dtype: torch.dtype | None,
    out: Tensor | None,
    right_a: Tensor,
    out_a: Tensor,
    factor: Tensor,
    right_h: Tensor,
    out_h: Tensor,
    scale: float,
    seed: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The launches of a `reference.act_grad_grams` of what it `reads`."""
    num_slots, N = g.shape
    num_experts = out_a.shape[0]
    Q_A, Q_H, size = right_a.shape[1], right_h.shape[1], g.element_size()
    num_tiles = tiles.cdiv(N, UNITS)
    stage = ROWS * (3 * UNITS + Q_A + Q_H) * size + ROWS * 8
    stages = (gpu(g).shared_memory - 1024 - 4 * UNITS * Q_H * size) // stage
    dh = empty(*h.shape, dtype=h.dtype, device=h.device) if out is None else out
    dot = None if dot_dtype is None else empty(num_slots, dtype=dot_dtype, device=g.device)
    products = row_parts(num_tiles, num_slots, Q_H, g.device)
    dots = row_parts(2 * num_tiles, num_slots, 1, g.device)
    chunk, partial_a = partial_sums(routing, out_a, Q_A, firsts=True)
    _, partial_h = partial_sums(routing, out_h, Q_H, firsts=True)
    groups = num_experts + (0 if partial_a is None else partial_a.shape[0])
    registers, loading_registers = REGISTERS[max(Q_A, Q_H)]
    launch(
        _hopper_act_grad_kernel,
        (min(groups * num_tiles, gpu(g).processors), 1),
        (
            descriptor(g, [ROWS, UNITS], 1),
            descriptor(h, [ROWS, UNITS], 1),
            right_a,
            right_h,
            factor,
            row_weights,
            dh,
            dots,
            seed,
            out_a,
            out_h,
            partial_a,
            partial_h,
            products,
            routing.tiles,
            routing.expert_offsets,
            routing.scattered_idxs,
        ),
        (
            scale,
            dropout_threshold(p),
            1.0 / (1.0 - p),
            num_experts,
            chunk,
            N,
            out_a.shape[2],
            out_h.shape[2],
            dots.stride(0),
            products.stride(0),
            *factor.stride()[:2],
            *out_a.stride(),
            *out_h.stride(),
        ),
        4,
        stages,
        STREAM=DROPPED_ACTIVATION,
        **activation,
        CONCATENATED=is_concatenated,
        CHUNKED=partial_a is not None,
        STAGES=stages,
        Q_A=Q_A,
        Q_H=Q_H,
        BLOCK_N=UNITS,
        BLOCK_M=ROWS,
        REGISTERS=registers,
        LOADING_REGISTERS=loading_registers,
    )
    product = empty(num_slots, Q_H, dtype=factor.dtype, device=g.device)
    totals(
        routing,
        chunk=chunk,
        products=products,
        product=product,
        dots=dots,
        dot=dot,
        grams=((partial_a, out_a), (partial_h, out_h)),
    )
    return dh, dot, product
