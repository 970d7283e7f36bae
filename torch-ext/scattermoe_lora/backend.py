"""Which backend computes a tensor: plain PyTorch on the CPU, Triton on every GPU. Both have the same functions."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import reference, tiles
from .types import Routing


def of(tensor: Tensor) -> ModuleType:
    """The module of a device: ``route``, ``schedule``, ``shrink``, ``grouped_gemm*``, ``gram`` and ``combine``."""
    if tensor.device.type == "cpu":
        return reference
    try:
        from . import triton_kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError(
            f"scattermoe-lora needs the package triton for tensors on {tensor.device}; install triton or use the CPU"
        ) from error
    return triton_kernels


def routing(scattered_idxs: Tensor, expert_offsets: Tensor) -> Routing:
    """A routing with its schedule, from indices of any strides and integer dtype."""
    scattered_idxs, expert_offsets = dense_indices(scattered_idxs, expert_offsets)
    schedule = of(scattered_idxs).schedule(expert_offsets, scattered_idxs.shape[0])
    return Routing(scattered_idxs, expert_offsets, schedule)


def dense_indices(*indices: Tensor) -> tuple[Tensor, ...]:
    """Indices as the kernels read them, densely, and multiply them into addresses that pass 2**31."""
    return tuple(index.to(torch.int64).contiguous() for index in indices)


def fake_schedule(like: Tensor, num_slots: int, num_experts: int) -> Tensor:
    """What `schedule` returns, in shape and dtype, for ops that are traced."""
    size = 0 if like.device.type == "cpu" else tiles.schedule_size(num_slots, num_experts)
    return like.new_empty(size, 3, dtype=torch.int32)
