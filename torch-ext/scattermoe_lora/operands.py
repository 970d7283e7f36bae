"""Operands as the kernels read them: which strides TMA takes, and an adapter's factors in the dtype of the base."""

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


def in_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """An adapter factor ``[E, r, in]`` or ``[E, out, r]`` in the base's dtype, dense or of strides that TMA takes.

    ScatterMoE's expert-major factors have such; in PEFT's B the expert index is fastest.
    """
    if factor.dtype == dtype and (factor.is_contiguous() or tma_can_read(factor, 2)):
        return factor
    # Both at once where both are needed: `to` alone keeps the strides of a factor of another dtype.
    return factor.to(dtype, memory_format=torch.contiguous_format).contiguous()
