"""Shrink: a product into the LoRA rank, ``z = scale * gather(x) @ factor[e]``, rank-sized and nearly free."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..types import Routing
from .device import HOPPER_ROWS, gpu, uses_hopper_tiles
from .launch import call, empty, launch
from .rows import operand_rows, scheduled_part, tile_rows

# Ranks up to which the general kernel makes the product on Hopper, too; above, Hopper's GEMM. The four of a step of
# Qwen3-30B-A3B (8192 tokens) took an H200 224 us by that for 247 at rank 64, which is not worth four more kernels to
# compile; 288 for 425 at 128, 454 for 830 at 256.
GENERAL_RANK = 64


@triton.jit
def _shrink_kernel(
    x_ptr,
    factor_ptr,
    out_ptr,
    weighted_ptr,
    row_weights_ptr,
    tiles_ptr,
    scattered_ptr,
    scale,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_fe,
    stride_fk,
    stride_fr,
    X_FAN_OUT: tl.constexpr,
    OUT_SCATTERED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert, first_row, end, has_rows, has_expert = scheduled_part(tiles_ptr, tl.program_id(0), TILE_ROWS, BLOCK_M)
    if not (has_rows & has_expert):
        return
    rows, slots, mask = tile_rows(first_row, end, scattered_ptr, BLOCK_M)
    dtype: tl.constexpr = factor_ptr.dtype.element_ty
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + operand_rows(rows, slots, X_FAN_OUT) * stride_xm
    factor = factor_ptr + expert.to(tl.int64) * stride_fe + r[None, :].to(tl.int64) * stride_fr
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, K, BLOCK_K):
        kk = (start + k).to(tl.int64)
        x = tl.load(x_row[:, None] + kk[None, :] * stride_xk, mask=(kk < K)[None, :], other=0.0)
        f = tl.load(factor + kk[:, None] * stride_fk, mask=(kk < K)[:, None] & (r < R)[None, :], other=0.0)
        acc = tl.dot(x, f, acc, input_precision="ieee")
    inside = mask[:, None] & (r < R)[None, :]
    out_rows = operand_rows(rows, slots, 1 if OUT_SCATTERED else 0)
    tl.store(out_ptr + out_rows[:, None] * R + r[None, :], (acc * scale).to(dtype), mask=inside)
    if weighted_ptr is not None:
        weights = tl.load(row_weights_ptr + slots, mask=mask, other=0.0).to(tl.float32)
        weighted = (acc * scale * weights[:, None]).to(dtype)
        tl.store(weighted_ptr + rows[:, None] * R + r[None, :], weighted, mask=inside)


def _by_hopper(x: Tensor, factor: Tensor, routing: Routing, out: Tensor, **options: Any) -> bool:
    """Whether Hopper's GEMM is there, wants the product, and has computed it."""
    wide = factor.shape[2] > GENERAL_RANK and x.element_size() == factor.element_size() == 2
    if not wide or not uses_hopper_tiles(x, routing):
        return False
    # The general kernel has more tiles: where this one's are few, they leave processors idle.
    if tiles.num_row_tiles(routing.num_slots, routing.num_experts, HOPPER_ROWS) < gpu(x).processors:
        return False
    from .hopper_gemm import hopper_gemm

    return hopper_gemm(x, factor, routing, out, z=None, expand=None, bias=None, group_m=1, **options)


def shrink(
    x: Tensor,
    factor: Tensor,
    routing: Routing,
    *,
    x_fan_out: int,
    scale: float,
    out_scattered: bool = False,
    row_weights: Tensor | None = None,
    weighted: Tensor | None = None,
) -> Tensor:
    """See `reference.shrink`. Rows of no expert are zeros if ``out_scattered``, else left unwritten (never read)."""
    num_slots, num_experts = routing.num_slots, routing.num_experts
    K, R = factor.shape[1], factor.shape[2]
    out = empty(num_slots, R, dtype=factor.dtype, device=factor.device)
    if out.numel() == 0:
        return out
    if out_scattered:
        call(Tensor.zero_, out)
    elif _by_hopper(x, factor, routing, out, x_fan_out=x_fan_out, scale=scale, row_weights=row_weights, a=weighted):
        return out
    tile = tiles.shrink_tile(tiles.block_m(num_slots, num_experts), R, factor.dtype, gpu(x))
    num_tiles = tiles.num_row_tiles(num_slots, num_experts, routing.tile_rows)
    grid = (num_tiles * (routing.tile_rows // tile.block_m), tiles.cdiv(R, tile.block_n))
    launch(
        _shrink_kernel,
        grid,
        (x, factor, out, weighted, row_weights, routing.tiles, routing.scattered_idxs),
        (scale, K, R, *x.stride(), *factor.stride()),
        tile.num_warps,
        tile.num_stages,
        X_FAN_OUT=x_fan_out,
        OUT_SCATTERED=out_scattered,
        TILE_ROWS=routing.tile_rows,
        BLOCK_M=tile.block_m,
        BLOCK_R=tile.block_n,
        BLOCK_K=tile.block_k,
    )
    return out
