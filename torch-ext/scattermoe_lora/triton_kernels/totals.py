"""Totals: adds up, in order, what tiles of columns and chunks of rows each have of a sum. So nothing needs atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..types import Routing
from .launch import empty, launch
from .rows import scheduled_chunk

# Rows, and elements of a gram, of one program. 32 rows of rank 16 are 16 bytes a thread of each part.
ROWS, BLOCK = 32, 1024
# Columns up to which rows are split, if there are more than CHUNKED: a wider output has tiles enough to be busy with
# one expert, and fewer rows are summed before the host has launched another kernel.
NARROW, CHUNKED = 64, 4096


@triton.jit
def _total_gram(
    chunk, block, partial_ptr, out_ptr, tiles_ptr, chunk_rows, P, columns, stride_oe, stride_op, stride_oq,
    Q: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of an expert's gram, of which ``chunk`` is the first."""
    expert, start, end, _first = scheduled_chunk(tiles_ptr, chunk)
    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < P * Q
    partial = partial_ptr + chunk.to(tl.int64) * P * Q + element
    acc = tl.zeros((BLOCK,), tl.float32)
    for _ in range(tl.cdiv(end - start, chunk_rows)):
        acc += tl.load(partial, mask=inside, other=0.0)
        partial += P * Q
    p = (element // Q).to(tl.int64)
    q = element % Q
    out = out_ptr + expert.to(tl.int64) * stride_oe + p * stride_op + q.to(tl.int64) * stride_oq
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=inside & (q < columns))


# Sizes that follow the number of tokens are not compiled for being 1 or divisible by 16, as in `route`.
@triton.jit(do_not_specialize=["num_slots", "row_programs"])
def _total_kernel(
    products_ptr,
    dots_ptr,
    product_ptr,
    dot_ptr,
    partial_a_ptr,
    out_a_ptr,
    partial_b_ptr,
    out_b_ptr,
    tiles_ptr,
    offsets_ptr,
    scattered_ptr,
    num_slots,
    row_programs,
    num_experts,
    chunk_rows,
    num_tiles,
    num_dots,
    stride_pt,
    stride_dt,
    P_a,
    columns_a,
    stride_ae,
    stride_ap,
    stride_aq,
    P_b,
    columns_b,
    stride_be,
    stride_bp,
    stride_bq,
    Q: tl.constexpr,
    Q_A: tl.constexpr,
    Q_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first ``row_programs`` programs add up rows' products, and the routing weights' gradients, which are 0 of
    rows of no expert; the others the grams of experts with more than a chunk of rows.

    Products of rows of no expert were never written: what that adds up to is never read.
    """
    program = tl.program_id(0)
    if program < row_programs:
        if product_ptr is not None:
            element = program.to(tl.int64) * (BLOCK_M * Q) + tl.arange(0, BLOCK_M * Q)
            end = num_slots.to(tl.int64) * Q
            product = tl.zeros((BLOCK_M * Q,), tl.float32)
            part = products_ptr + element
            for first in range(0, num_tiles, 8):
                for tile in tl.static_range(8):  # loads that do not wait for one another
                    written = element < tl.where(first + tile < num_tiles, end, 0)
                    product += tl.load(part, mask=written, other=0.0)
                    part += stride_pt
            tl.store(product_ptr + element, product.to(product_ptr.dtype.element_ty), mask=element < end)
        if dot_ptr is not None:
            rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
            slots = tl.load(scattered_ptr + rows, mask=rows < num_slots, other=0)
            last = tl.load(offsets_ptr + num_experts - 1)
            dot = tl.zeros((BLOCK_M,), tl.float32)
            part = dots_ptr + rows
            for first in range(0, num_dots, 16):
                for half in tl.static_range(16):
                    written = rows < tl.where(first + half < num_dots, last, 0)
                    dot += tl.load(part, mask=written, other=0.0)
                    part += stride_dt
            tl.store(dot_ptr + slots, dot.to(dot_ptr.dtype.element_ty), mask=rows < num_slots)
    else:
        blocks_a = tl.cdiv(P_a * Q_A, BLOCK)
        blocks = blocks_a + tl.cdiv(P_b * Q_B, BLOCK)
        chunk = (program - row_programs) // blocks
        block = (program - row_programs) % blocks
        if chunk < tl.load(tiles_ptr + 2):
            _expert, _start, _end, first = scheduled_chunk(tiles_ptr, chunk)
            if first == chunk:
                if partial_a_ptr is not None:
                    if block < blocks_a:
                        _total_gram(
                            chunk, block, partial_a_ptr, out_a_ptr, tiles_ptr, chunk_rows, P_a, columns_a, stride_ae,
                            stride_ap, stride_aq, Q_A, BLOCK,
                        )  # fmt: skip
                if partial_b_ptr is not None:
                    if block >= blocks_a:
                        _total_gram(
                            chunk, block - blocks_a, partial_b_ptr, out_b_ptr, tiles_ptr, chunk_rows, P_b, columns_b,
                            stride_be, stride_bp, stride_bq, Q_B, BLOCK,
                        )  # fmt: skip


def row_parts(number: int, num_slots: int, Q: int, device: torch.device) -> Tensor:
    """Room for so many parts of all rows' Q sums, with strides that are the same modulo 16 for any number of slots:
    kernels are compiled for that."""
    return empty(number, tiles.cdiv(num_slots, 16) * 16 * Q, dtype=torch.float32, device=device)


def partial_sums(routing: Routing, out: Tensor, Q: int, *, firsts: bool) -> tuple[int, Tensor | None]:
    """Rows that are summed at once, and room for the sums of further ones, if an expert may have more of them; with
    ``firsts`` for the first ones of these experts, too."""
    chunk = tiles.chunk_rows(routing.num_slots, routing.num_experts)
    if Q > NARROW or routing.num_slots <= CHUNKED:
        return chunk, None
    number = tiles.num_chunks(routing.num_slots, routing.num_experts)
    return chunk, empty(number if firsts else number // 2, out.shape[1], Q, dtype=torch.float32, device=out.device)


def totals(
    routing: Routing,
    *,
    chunk: int,
    grams: tuple[tuple[Tensor | None, Tensor], ...],
    products: Tensor | None = None,
    product: Tensor | None = None,
    dots: Tensor | None = None,
    dot: Tensor | None = None,
) -> None:
    """``product [S, Q]`` out of ``products``, ``dot [S]``, scattered, out of ``dots``, and of one or two grams ``out``
    those of experts with more than ``chunk`` rows out of ``partial``; whichever are given."""
    num_slots, num_experts = routing.num_slots, routing.num_experts
    row_programs = 0 if product is None and dot is None else tiles.cdiv(num_slots, ROWS)
    operands: list[Tensor | None] = []
    scalars: list[int] = []
    ranks, num_chunks, blocks = [], 0, 0
    for partial, out in (*grams, (None, None))[:2]:
        operands += [partial, out]
        if partial is None or out is None:
            scalars += [0] * 5
            ranks.append(0)
            continue
        _, P, Q = partial.shape
        scalars += [P, out.shape[2], *out.stride()]
        ranks.append(Q)
        num_chunks = partial.shape[0]
        blocks += tiles.cdiv(P * Q, BLOCK)
    grid = row_programs + num_chunks * blocks
    if grid == 0:
        return
    launch(
        _total_kernel,
        (grid, 1),
        (products, dots, product, dot, *operands, routing.tiles, routing.expert_offsets, routing.scattered_idxs),
        (
            num_slots,
            row_programs,
            num_experts,
            chunk,
            0 if products is None else products.shape[0],
            0 if dots is None else dots.shape[0],
            0 if products is None else products.stride(0),
            0 if dots is None else dots.stride(0),
            *scalars,
        ),
        4,
        1,
        Q=1 if product is None else product.shape[1],
        Q_A=ranks[0],
        Q_B=ranks[1],
        BLOCK_M=ROWS,
        BLOCK=BLOCK,
    )
