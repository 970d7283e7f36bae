"""What the launchers ask of a device: its shared memory, and to be current while a kernel is launched on it."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor


@functools.cache
def _shared_memory(device_type: str, index: int | None) -> int:
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(index)
        # What a block may opt into, on NVIDIA; AMD has one limit.
        return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return 64 * 1024


def shared_memory(tensor: Tensor) -> int:
    """Bytes of shared memory that one block may use on the tensor's GPU; 64 KiB where torch doesn't tell."""
    return _shared_memory(tensor.device.type, tensor.device.index)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU current: Triton launches on the current device, which need not be the tensor's."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """float32 operands multiply as float32 (TF32 has 3e-4 of relative error); others have one precision anyway."""
    return "ieee" if dtype == torch.float32 else "tf32"
