"""The activation and its gradient: passes over memory between two GEMMs.

As epilogues of the general GEMM they cost more: an accumulator of 128 x 256 leaves no registers to overlap their loads
and stores with products, and the gradient took 220 us of a step where this pass takes 168. (Hopper's own GEMM has the
activation as its epilogue.) With the shrink of its result in the same pass the gradient took 232, where the two take
229, and at rank 64 it took 494, where they take 236; with both grams of its operands, 244 for 261. By Hopper's
specialised warps all of these in one pass take 170 for 252: see `hopper_act_grad`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..reference import clamped_glu_parameters
from ..types import Routing
from . import activations
from .device import gpu, uses_hopper_tiles
from .launch import empty, launch
from .rows import operand_rows, scheduled_part, tile_rows


@triton.jit
def _load_gate_up(
    h_row, n, start, N, stride_hn, mask,
    HAS_GATE: tl.constexpr, CONCATENATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gate and up of the units n, in float32; without a gate, the pre-activation twice."""
    full = mask[:, None] & (n < N)[None, :]
    if not HAS_GATE:
        gate = tl.load(h_row[:, None] + n[None, :].to(tl.int64) * stride_hn, mask=full, other=0.0).to(tl.float32)
        up = gate
    elif CONCATENATED:
        gate = tl.load(h_row[:, None] + n[None, :].to(tl.int64) * stride_hn, mask=full, other=0.0).to(tl.float32)
        up = tl.load(h_row[:, None] + (n + N)[None, :].to(tl.int64) * stride_hn, mask=full, other=0.0).to(tl.float32)
    else:
        both = 2 * start + tl.arange(0, 2 * BLOCK_N)
        full = mask[:, None] & (both < 2 * N)[None, :]
        h = tl.load(h_row[:, None] + both[None, :].to(tl.int64) * stride_hn, mask=full, other=0.0)
        gate, up = tl.split(tl.reshape(h.to(tl.float32), (BLOCK_M, BLOCK_N, 2)))
    return gate, up


# Sizes that follow the number of tokens are not compiled for being 1 or divisible by 16, as in `route`.
@triton.jit(do_not_specialize=["num_rows"])
def _act_kernel(
    h_ptr,
    a_ptr,
    tiles_ptr,
    scattered_ptr,
    num_rows,
    N,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CONCATENATED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of the experts' rows or, without a schedule, of all."""
    if tiles_ptr is None:
        rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = rows < num_rows
    else:
        _, first_row, end, has_rows, has_expert = scheduled_part(tiles_ptr, tl.program_id(0), TILE_ROWS, BLOCK_M)
        if not (has_rows & has_expert):
            return
        rows, slots, mask = tile_rows(first_row, end, scattered_ptr, BLOCK_M)
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    h_row = h_ptr + rows * (2 * N if HAS_GATE else N)
    a_row = a_ptr + rows * N
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        gate, up = _load_gate_up(h_row, n, start, N, 1, mask, HAS_GATE, CONCATENATED, BLOCK_M, BLOCK_N)
        if HAS_GATE:
            value, factor = activations.gated(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT)
            a = (value * factor).to(dtype)
        else:
            a = activations.act(gate, ACTIVATION).to(dtype)
        tl.store(a_row[:, None] + n[None, :], a, mask=mask[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _act_grad_kernel(
    g_ptr,
    h_ptr,
    row_weights_ptr,
    dh_ptr,
    dot_ptr,
    tiles_ptr,
    scattered_ptr,
    num_rows,
    N,
    stride_hm,
    stride_hn,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CONCATENATED: tl.constexpr,
    H_FAN_OUT: tl.constexpr,
    OUT_SCATTERED: tl.constexpr,
    ZERO_TAIL: tl.constexpr,
    SAVE_A: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of the experts' rows or, without a schedule and weights, of all."""
    if tiles_ptr is None:
        rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        slots = rows
        mask = rows < num_rows
        of_expert = mask
        stores = mask
        weight = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        _, first_row, end, has_rows, has_expert = scheduled_part(tiles_ptr, tl.program_id(0), TILE_ROWS, BLOCK_M)
        # Rows of no expert are visited where something is to be zeroed.
        if not (has_rows & (has_expert | ZERO_TAIL | (dot_ptr is not None))):
            return
        rows, slots, mask = tile_rows(first_row, end, scattered_ptr, BLOCK_M)
        # Only experts' rows are read: others hold nothing.
        of_expert = rows < tl.where(has_expert, end, 0)
        of_expert &= mask
        stores = mask if ZERO_TAIL else of_expert
        weight = tl.load(row_weights_ptr + slots, mask=of_expert, other=0.0).to(tl.float32)
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    g_row = g_ptr + rows * N
    h_row = h_ptr + operand_rows(rows, slots, H_FAN_OUT) * stride_hm
    dh_row = dh_ptr + operand_rows(rows, slots, 1 if OUT_SCATTERED else 0) * (2 * N if HAS_GATE else N)
    dot = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < N)[None, :]
        g = tl.load(g_row[:, None] + n[None, :], mask=of_expert[:, None] & inside, other=0.0).to(tl.float32)
        gate, up = _load_gate_up(h_row, n, start, N, stride_hn, of_expert, HAS_GATE, CONCATENATED, BLOCK_M, BLOCK_N)
        da = g * weight[:, None]
        if HAS_GATE:
            value, factor = activations.gated(gate, up, ACTIVATION, ALPHA, LIMIT, SHIFT)
            slope, factor_slope = activations.gated_slopes(gate, up, ACTIVATION, ALPHA, LIMIT)
            a = value * factor
            d_gate = (da * factor * slope).to(dtype)
            d_up = (da * value * factor_slope).to(dtype)
            if CONCATENATED:
                tl.store(dh_row[:, None] + n[None, :], d_gate, mask=stores[:, None] & inside)
                tl.store(dh_row[:, None] + (n + N)[None, :], d_up, mask=stores[:, None] & inside)
            else:
                both = 2 * start + tl.arange(0, 2 * BLOCK_N)
                dh = tl.reshape(tl.join(d_gate, d_up), (BLOCK_M, 2 * BLOCK_N))
                tl.store(dh_row[:, None] + both[None, :], dh, mask=stores[:, None] & (both < 2 * N)[None, :])
        else:
            a = activations.act(gate, ACTIVATION)
            dh = (da * activations.act_grad(gate, ACTIVATION)).to(dtype)
            tl.store(dh_row[:, None] + n[None, :], dh, mask=stores[:, None] & inside)
        dot += tl.sum(a * g, axis=1)
        if SAVE_A:
            tl.store(g_row[:, None] + n[None, :], (a * weight[:, None]).to(dtype), mask=stores[:, None] & inside)
    if dot_ptr is not None:
        tl.store(dot_ptr + slots, dot.to(dot_ptr.dtype.element_ty), mask=mask)


@functools.cache
def constants(activation: str) -> dict[str, str | float]:
    """An activation as the kernels' constants."""
    parameters = clamped_glu_parameters(activation)
    name = activation if parameters is None else "clamped_glu"
    return dict(zip(("ACTIVATION", "ALPHA", "LIMIT", "SHIFT"), (name, *(parameters or (0.0, 0.0, 0.0))), strict=True))


def _tile(h: Tensor, routing: Routing | None) -> tuple[int, tiles.Tile, tuple[int, int]]:
    """Rows of a scheduled tile, the tile of a program, and the grid; without a routing, for all rows."""
    if routing is None:
        tile = tiles.act_tile(128, h.dtype, gpu(h))
        return tile.block_m, tile, (tiles.cdiv(h.shape[0], tile.block_m), 1)
    num_slots, num_experts, rows_of_tile = routing.num_slots, routing.num_experts, routing.tile_rows
    tile = tiles.act_tile(tiles.block_m(num_slots, num_experts), h.dtype, gpu(h))
    num_tiles = tiles.num_row_tiles(num_slots, num_experts, rows_of_tile)
    return rows_of_tile, tile, (num_tiles * (rows_of_tile // tile.block_m), 1)


def act(
    h: Tensor, a: Tensor, routing: Routing | None, *, activation: str, has_gate: bool, is_concatenated: bool
) -> None:
    """``a = act(h)``, both contiguous. Rows of no expert are left unwritten (and never read)."""
    rows_of_tile, tile, grid = _tile(h, routing)
    order = (None, None) if routing is None else (routing.tiles, routing.scattered_idxs)
    launch(
        _act_kernel,
        grid,
        (h, a, *order),
        tuple(a.shape),
        tile.num_warps,
        tile.num_stages,
        **constants(activation),
        HAS_GATE=has_gate,
        CONCATENATED=is_concatenated,
        TILE_ROWS=rows_of_tile,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )


def act_grad(
    g: Tensor,
    h: Tensor,
    routing: Routing | None,
    *,
    h_fan_out: int,
    row_weights: Tensor | None,
    activation: str,
    has_gate: bool,
    is_concatenated: bool,
    save_a: bool = False,
    dot_dtype: torch.dtype | None = None,
    out_scattered: bool = False,
    zero_tail: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `reference.act_grad`. ``g`` must be contiguous. Rows of no expert are unwritten but as it says."""
    num_slots, N = g.shape
    dh = empty(num_slots, h.shape[1], dtype=g.dtype, device=g.device) if out is None else out
    dot = None if dot_dtype is None else empty(num_slots, dtype=dot_dtype, device=g.device)
    if num_slots == 0:
        return dh, dot
    rows_of_tile, tile, grid = _tile(g, routing)
    order = (None, None) if routing is None else (routing.tiles, routing.scattered_idxs)
    launch(
        _act_grad_kernel,
        grid,
        (g, h, row_weights, dh, dot, *order),
        (num_slots, N, *h.stride()),
        tile.num_warps,
        tile.num_stages,
        **constants(activation),
        HAS_GATE=has_gate,
        CONCATENATED=is_concatenated,
        H_FAN_OUT=h_fan_out,
        OUT_SCATTERED=out_scattered,
        ZERO_TAIL=zero_tail,
        SAVE_A=save_a,
        TILE_ROWS=rows_of_tile,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
    )
    return dh, dot


def act_grad_grams(
    g: Tensor,
    h: Tensor,
    routing: Routing,
    *,
    activation: str,
    has_gate: bool,
    is_concatenated: bool,
    right_a: Tensor,
    right_h: Tensor,
    factor: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor | None, Tensor] | None:
    """See `reference.act_grad_grams`: made on Hopper, where the ranks are small."""
    if not has_gate or not uses_hopper_tiles(g, routing):
        return None
    from . import hopper_act_grad

    if not hopper_act_grad.reads(g, h, right_a, right_h, factor, is_concatenated):
        return None
    return hopper_act_grad.hopper_act_grad(
        g,
        h,
        routing,
        activation=constants(activation),
        is_concatenated=is_concatenated,
        right_a=right_a,
        right_h=right_h,
        factor=factor,
        **options,
    )


def activated(h: Tensor, *, activation: str, has_gate: bool, is_concatenated: bool) -> Tensor:
    """See `reference.activated`. ``h`` must be contiguous."""
    a = empty(h.shape[0], h.shape[1] // 2 if has_gate else h.shape[1], dtype=h.dtype, device=h.device)
    if a.numel():
        act(h, a, None, activation=activation, has_gate=has_gate, is_concatenated=is_concatenated)
    return a


def activated_grad(da: Tensor, h: Tensor, *, activation: str, has_gate: bool, is_concatenated: bool) -> Tensor:
    """See `reference.activated_grad`. ``da`` must be contiguous."""
    dh, _ = act_grad(
        da,
        h,
        None,
        h_fan_out=0,
        row_weights=None,
        activation=activation,
        has_gate=has_gate,
        is_concatenated=is_concatenated,
    )
    return dh
