"""The activation and its gradient, each with the shrink of its result: a pass over memory between two GEMMs.

As epilogues of the GEMMs they cost more: an accumulator of 128 x 256 leaves no registers to overlap their loads and
stores with products, and the activation's gradient took 250 us of a step where this pass takes half.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..types import Routing
from .activations import act, act_grad
from .device import gpu
from .launch import empty, launch
from .rows import operand_rows, tile_entry, tile_rows
from .shrink import shrink


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


@triton.jit
def _load_factor(factor, k, k_mask, R, stride_fk, stride_fr, BLOCK_R: tl.constexpr):
    """Rows k of an expert's factor, zeros where there is none and past its R columns."""
    r = tl.arange(0, BLOCK_R)
    return tl.load(
        factor + k[:, None].to(tl.int64) * stride_fk + r[None, :].to(tl.int64) * stride_fr,
        mask=k_mask[:, None] & (r < R)[None, :],
        other=0.0,
    )


@triton.jit
def _act_kernel(
    h_ptr,
    factor_ptr,
    a_ptr,
    z_ptr,
    tiles_ptr,
    scattered_ptr,
    scale,
    N,
    R,
    stride_fe,
    stride_fk,
    stride_fr,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CONCATENATED: tl.constexpr,
    SHRINK: tl.constexpr,
    SCHEDULED_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    parts: tl.constexpr = SCHEDULED_M // BLOCK_M
    tile = tl.program_id(0) // parts
    if tile >= tl.load(tiles_ptr):
        return
    expert, first_row, end = tile_entry(tiles_ptr, tile)
    first_row += (tl.program_id(0) % parts) * BLOCK_M
    if first_row >= end:
        return
    rows, _, mask = tile_rows(first_row, end, scattered_ptr, BLOCK_M)
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    h_row = h_ptr + rows * (2 * N if HAS_GATE else N)
    a_row = a_ptr + rows * N
    r = tl.arange(0, BLOCK_R)
    factor = factor_ptr
    if SHRINK:
        factor += expert.to(tl.int64) * stride_fe
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        gate, up = _load_gate_up(h_row, n, start, N, 1, mask, HAS_GATE, CONCATENATED, BLOCK_M, BLOCK_N)
        y = act(gate, ACTIVATION)
        if HAS_GATE:
            y *= up
        a = y.to(dtype)
        tl.store(a_row[:, None] + n[None, :], a, mask=mask[:, None] & (n < N)[None, :])
        if SHRINK:
            f = _load_factor(factor, n, n < N, R, stride_fk, stride_fr, BLOCK_R)
            acc = tl.dot(a, f, acc, input_precision="ieee")
    if SHRINK:
        z = z_ptr + rows[:, None] * R + r[None, :]
        tl.store(z, (acc * scale).to(dtype), mask=mask[:, None] & (r < R)[None, :])


@triton.jit
def _act_grad_kernel(
    g_ptr,
    h_ptr,
    factor_ptr,
    row_weights_ptr,
    dh_ptr,
    u_ptr,
    dot_ptr,
    tiles_ptr,
    scattered_ptr,
    scale,
    N,
    R,
    stride_hm,
    stride_hn,
    stride_fe,
    stride_fk,
    stride_fr,
    ACTIVATION: tl.constexpr,
    HAS_GATE: tl.constexpr,
    CONCATENATED: tl.constexpr,
    H_FAN_OUT: tl.constexpr,
    OUT_SCATTERED: tl.constexpr,
    ZERO_TAIL: tl.constexpr,
    SAVE_A: tl.constexpr,
    STORE_DOT: tl.constexpr,
    SHRINK: tl.constexpr,
    SCHEDULED_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    parts: tl.constexpr = SCHEDULED_M // BLOCK_M
    tile = tl.program_id(0) // parts
    # Rows of no expert are visited where something is to be zeroed.
    if tile >= tl.load(tiles_ptr + (1 if ZERO_TAIL or STORE_DOT else 0)):
        return
    expert, first_row, end = tile_entry(tiles_ptr, tile)
    first_row += (tl.program_id(0) % parts) * BLOCK_M
    if first_row >= end:
        return
    rows, slots, mask = tile_rows(first_row, end, scattered_ptr, BLOCK_M)
    dtype: tl.constexpr = dh_ptr.dtype.element_ty
    # Only experts' rows are read: others hold nothing.
    has_expert = tile < tl.load(tiles_ptr)
    of_expert = rows < tl.where(has_expert, end, 0)
    of_expert &= mask
    stores = mask if ZERO_TAIL else of_expert
    weight = tl.load(row_weights_ptr + slots, mask=of_expert, other=0.0).to(tl.float32)
    g_row = g_ptr + rows * N
    h_row = h_ptr + operand_rows(rows, slots, H_FAN_OUT) * stride_hm
    dh_row = dh_ptr + operand_rows(rows, slots, 1 if OUT_SCATTERED else 0) * (2 * N if HAS_GATE else N)
    r = tl.arange(0, BLOCK_R)
    factor = factor_ptr
    if SHRINK:
        factor += tl.where(has_expert, expert, 0).to(tl.int64) * stride_fe
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    dot = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < N)[None, :]
        g = tl.load(g_row[:, None] + n[None, :], mask=of_expert[:, None] & inside, other=0.0).to(tl.float32)
        gate, up = _load_gate_up(h_row, n, start, N, stride_hn, of_expert, HAS_GATE, CONCATENATED, BLOCK_M, BLOCK_N)
        da = g * weight[:, None]
        a = act(gate, ACTIVATION)
        if HAS_GATE:
            d_gate = (da * up * act_grad(gate, ACTIVATION)).to(dtype)
            d_up = (da * a).to(dtype)
            a *= up
            if CONCATENATED:
                tl.store(dh_row[:, None] + n[None, :], d_gate, mask=stores[:, None] & inside)
                tl.store(dh_row[:, None] + (n + N)[None, :], d_up, mask=stores[:, None] & inside)
                if SHRINK:
                    f = _load_factor(factor, n, n < N, R, stride_fk, stride_fr, BLOCK_R)
                    acc = tl.dot(d_gate, f, acc, input_precision="ieee")
                    f = _load_factor(factor, n + N, n < N, R, stride_fk, stride_fr, BLOCK_R)
                    acc = tl.dot(d_up, f, acc, input_precision="ieee")
            else:
                both = 2 * start + tl.arange(0, 2 * BLOCK_N)
                dh = tl.reshape(tl.join(d_gate, d_up), (BLOCK_M, 2 * BLOCK_N))
                tl.store(dh_row[:, None] + both[None, :], dh, mask=stores[:, None] & (both < 2 * N)[None, :])
                if SHRINK:
                    f = _load_factor(factor, both, both < 2 * N, R, stride_fk, stride_fr, BLOCK_R)
                    acc = tl.dot(dh, f, acc, input_precision="ieee")
        else:
            dh = (da * act_grad(gate, ACTIVATION)).to(dtype)
            tl.store(dh_row[:, None] + n[None, :], dh, mask=stores[:, None] & inside)
            if SHRINK:
                f = _load_factor(factor, n, n < N, R, stride_fk, stride_fr, BLOCK_R)
                acc = tl.dot(dh, f, acc, input_precision="ieee")
        dot += tl.sum(a * g, axis=1)
        if SAVE_A:
            tl.store(g_row[:, None] + n[None, :], a.to(dtype), mask=stores[:, None] & inside)
    if STORE_DOT:
        tl.store(dot_ptr + slots, dot.to(dot_ptr.dtype.element_ty), mask=mask)
    if SHRINK:
        u = u_ptr + rows[:, None] * R + r[None, :]
        tl.store(u, (acc * scale).to(dtype), mask=of_expert[:, None] & (r < R)[None, :])


# Ranks that one program multiplies. More than these are a launch of their own: `act_grad_shrink` overwrites what it
# reads, so a row must not be read by two programs.
MAX_RANK = 128


def _tile(h: Tensor, routing: Routing, rank: int) -> tuple[int, tiles.Tile, tuple[int, int]]:
    """Rows of a scheduled tile, the tile of a program, and the grid."""
    num_slots, num_experts = routing.num_slots, routing.num_experts
    scheduled_m = tiles.block_m(num_slots, num_experts)
    tile = tiles.act_tile(scheduled_m, rank, h.dtype, gpu(h))
    num_tiles = tiles.num_row_tiles(num_slots, num_experts, scheduled_m)
    return scheduled_m, tile, (num_tiles * (scheduled_m // tile.block_m), 1)


def act_shrink(
    h: Tensor,
    routing: Routing,
    *,
    activation: str,
    has_gate: bool,
    is_concatenated: bool,
    factor: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """See `reference.act_shrink`. ``h`` must be contiguous. Rows of no expert are left unwritten (and never read)."""
    if factor is not None and factor.shape[2] > MAX_RANK:
        a, _ = act_shrink(h, routing, activation=activation, has_gate=has_gate, is_concatenated=is_concatenated)
        return a, shrink(a, factor, routing, x_fan_out=0, scale=scale)
    num_slots = routing.num_slots
    N = h.shape[1] // 2 if has_gate else h.shape[1]
    rank = 0 if factor is None else factor.shape[2]
    a = empty(num_slots, N, dtype=h.dtype, device=h.device)
    z = None if factor is None else empty(num_slots, rank, dtype=h.dtype, device=h.device)
    if a.numel() == 0:
        return a, z
    scheduled_m, tile, grid = _tile(h, routing, rank)
    launch(
        _act_kernel,
        grid,
        (h, factor, a, z, routing.tiles, routing.scattered_idxs),
        (scale, N, rank, *((0, 0, 0) if factor is None else factor.stride())),
        tile.num_warps,
        tile.num_stages,
        ACTIVATION=activation,
        HAS_GATE=has_gate,
        CONCATENATED=is_concatenated,
        SHRINK=factor is not None,
        SCHEDULED_M=scheduled_m,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_k,
        BLOCK_R=tile.block_n,
    )
    return a, z


def act_grad_shrink(
    g: Tensor,
    h: Tensor,
    routing: Routing,
    *,
    h_fan_out: int,
    row_weights: Tensor,
    activation: str,
    has_gate: bool,
    is_concatenated: bool,
    factor: Tensor | None = None,
    scale: float = 1.0,
    save_a: bool = False,
    dot_dtype: torch.dtype | None = None,
    out_scattered: bool = False,
    zero_tail: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `reference.act_grad_shrink`. ``g`` must be contiguous. Rows of no expert are unwritten but as it says."""
    if factor is not None and factor.shape[2] > MAX_RANK:
        dh, _, dot = act_grad_shrink(
            g,
            h,
            routing,
            h_fan_out=h_fan_out,
            row_weights=row_weights,
            activation=activation,
            has_gate=has_gate,
            is_concatenated=is_concatenated,
            save_a=save_a,
            dot_dtype=dot_dtype,
        )
        return dh, shrink(dh, factor, routing, x_fan_out=0, scale=scale), dot
    num_slots, N = g.shape
    rank = 0 if factor is None else factor.shape[2]
    dh = empty(num_slots, h.shape[1], dtype=g.dtype, device=g.device)
    u = None if factor is None else empty(num_slots, rank, dtype=g.dtype, device=g.device)
    dot = None if dot_dtype is None else empty(num_slots, dtype=dot_dtype, device=g.device)
    if num_slots == 0:
        return dh, u, dot
    scheduled_m, tile, grid = _tile(h, routing, rank)
    launch(
        _act_grad_kernel,
        grid,
        (g, h, factor, row_weights, dh, u, dot, routing.tiles, routing.scattered_idxs),
        (
            scale,
            N,
            rank,
            *h.stride(),
            *((0, 0, 0) if factor is None else factor.stride()),
        ),
        tile.num_warps,
        tile.num_stages,
        ACTIVATION=activation,
        HAS_GATE=has_gate,
        CONCATENATED=is_concatenated,
        H_FAN_OUT=h_fan_out,
        OUT_SCATTERED=out_scattered,
        ZERO_TAIL=zero_tail,
        SAVE_A=save_a,
        STORE_DOT=dot is not None,
        SHRINK=factor is not None,
        SCHEDULED_M=scheduled_m,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_k,
        BLOCK_R=tile.block_n,
    )
    return dh, u, dot
