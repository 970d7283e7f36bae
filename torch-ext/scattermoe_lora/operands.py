"""Which operands the kernels read as they are: what strides TMA takes, and which factors of an adapter need a cast."""

from __future__ import annotations

import torch
from torch import Tensor


def tma_can_read(tensor: Tensor, contiguous: int) -> bool:
    """Whether TMA can read a tensor along a dimension: stride 1 there, a 16-byte aligned base and other strides."""
    if tensor.stride(contiguous) != 1 or tensor.numel() == 0 or tensor.data_ptr() % 16:
        return False
    size = tensor.element_size()
    others = [stride for dim, stride in enumerate(tensor.stride()) if dim != contiguous]
    return all(stride > 0 and stride * size % 16 == 0 for stride in others)


def padded_rank(rank: int) -> int:
    """Columns that the kernels give a rank: of others than multiples of 16 they would read an element at a time.

    At rank 8 a step of Qwen3-30B-A3B took 7 % longer than at 16, at 24 14, at 4 17 (8192 tokens, H200).
    """
    return -(-rank // 16) * 16


def is_read_as_it_is(factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether an adapter factor ``[E, r, in]`` or ``[E, out, r]`` is in the base's dtype and dense, or TMA takes it.

    TMA takes ScatterMoE's expert-major factors. In PEFT's B the expert index is fastest.
    """
    return factor.dtype == dtype and (factor.is_contiguous() or tma_can_read(factor, 2))
