"""Which backend computes a tensor: plain PyTorch on the CPU, Triton on every GPU. Both have the same functions."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import reference


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
