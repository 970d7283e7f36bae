"""Cast: an adapter's factor dense and in the base's dtype. PEFT's are float32, and B has experts side by side."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..operands import is_read_as_it_is
from .launch import empty, launch

# Elements of a program's block, and experts of it where they lie side by side: 128 bytes of PEFT's float32.
ELEMENTS, EXPERTS = 4096, 32


@triton.jit
def _cast_kernel(
    x_ptr,
    out_ptr,
    num_experts,
    M,
    N,
    stride_e,
    stride_m,
    stride_n,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[:, None, None].to(tl.int64)
    tile = tl.program_id(1)
    column_tiles = tl.cdiv(N, BLOCK_N)
    m = tile // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)[None, :, None].to(tl.int64)
    n = tile % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, None, :].to(tl.int64)
    inside = (e < num_experts) & (m < M) & (n < N)
    # Triton loads by the strides of x and stores by those of out: between them a block is transposed in shared memory.
    x = tl.load(x_ptr + e * stride_e + m * stride_m + n * stride_n, mask=inside, other=0.0)
    tl.store(out_ptr + e * M * N + m * N + n, x.to(out_ptr.dtype.element_ty), mask=inside)


def in_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.in_factor`."""
    if is_read_as_it_is(factor, dtype):
        return factor
    num_experts, M, N = factor.shape
    out = empty(num_experts, M, N, dtype=dtype, device=factor.device)
    if out.numel() == 0:
        return out
    block_e = min(EXPERTS, tiles.next_power_of_2(num_experts)) if factor.stride(0) < factor.stride(2) else 1
    block_n = min(ELEMENTS // (4 * block_e), tiles.next_power_of_2(N))
    block_m = min(ELEMENTS // (block_e * block_n), tiles.next_power_of_2(M))
    launch(
        _cast_kernel,
        (tiles.cdiv(num_experts, block_e), tiles.cdiv(M, block_m) * tiles.cdiv(N, block_n)),
        (factor, out),
        (num_experts, M, N, *factor.stride()),
        4,
        1,
        BLOCK_E=block_e,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
    return out
