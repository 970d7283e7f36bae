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


def is_read_as_it_is(factor: Tensor, dtype: torch.dtype) -> bool:
    """Whether an adapter factor ``[E, r, in]`` or ``[E, out, r]`` is in the base's dtype and dense, or TMA takes it.

    TMA takes ScatterMoE's expert-major factors. In PEFT's B the expert index is fastest.
    """
    return factor.dtype == dtype and (factor.is_contiguous() or tma_can_read(factor, 2))
