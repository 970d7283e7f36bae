"""Which backend computes a tensor: plain PyTorch on the CPU, Triton on every GPU. Both have the same functions."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import reference, tiles
from .operands import padded_rank
from .types import Routing

# The launchers use what came with it: AsyncCompileMode, and descriptors made on the host.
OLDEST_TRITON = "3.6"


def of(tensor: Tensor) -> ModuleType:
    """The module of a device: ``route``, ``schedule``, ``shrink``, ``grouped_gemm``, ``gram``, ``combine``, ..."""
    return reference if tensor.is_cpu else _triton_kernels(tensor.device)


@functools.cache
def _triton_kernels(device: torch.device) -> ModuleType:
    try:
        import triton
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"scattermoe-lora needs the package triton for tensors on {device.type}; install triton or use the CPU"
        ) from error
    major, minor = triton.__version__.split(".")[:2]
    if (int(major), int(minor)) < tuple(map(int, OLDEST_TRITON.split("."))):
        raise RuntimeError(
            f"scattermoe-lora needs triton {OLDEST_TRITON} or newer for tensors on {device.type}, and this is "
            f"{triton.__version__}; install a newer torch, which brings its own, or use the CPU"
        )
    from . import triton_kernels

    return triton_kernels


def routing(
    scattered_idxs: Tensor,
    expert_offsets: Tensor,
    weights: Sequence[Tensor] = (),
) -> Routing:
    """`scheduled` indices of any strides and integer dtype."""
    scattered_idxs, expert_offsets = dense_indices(scattered_idxs, expert_offsets)
    return scheduled(of(scattered_idxs), scattered_idxs, expert_offsets, weights)


def scheduled(
    run: ModuleType,
    scattered_idxs: Tensor,
    expert_offsets: Tensor,
    weights: Sequence[Tensor],
) -> Routing:
    """A routing with its schedule, by a backend; ``weights [E, K, N]`` are those of the products that it is for."""
    tile_rows = run.tile_rows(expert_offsets, scattered_idxs.shape[0], weights)
    schedule = run.schedule(expert_offsets, scattered_idxs.shape[0], tile_rows)
    return Routing(scattered_idxs, expert_offsets, schedule, tile_rows)


def dense_indices(*indices: Tensor) -> tuple[Tensor, ...]:
    """Indices as the kernels read them, densely, and multiply them into addresses that pass 2**31."""
    # Asked first, as a conversion of nothing takes longer than both answers.
    return tuple(
        index if index.dtype is torch.int64 and index.is_contiguous() else index.to(torch.int64).contiguous()
        for index in indices
    )


def fake_rank_product(like: Tensor, A: Tensor | None, num_slots: int) -> Tensor:
    """What a `shrink` by a factor ``A [E, r, in]`` or ``[E * r, in]`` returns, for ops that are traced.

    The kernels pad its ranks. ``like`` is a stack of as many experts.
    """
    if A is None:
        return like.new_empty(0)
    rank = A.shape[1] if A.dim() == 3 else A.shape[0] // like.shape[0]
    return like.new_empty(num_slots, rank if like.device.type == "cpu" else padded_rank(rank))


def fake_schedule(like: Tensor, num_slots: int, num_experts: int) -> Tensor:
    """What `schedule` returns, in shape and dtype, for ops that are traced."""
    size = 0 if like.device.type == "cpu" else tiles.schedule_size(num_slots, num_experts)
    return like.new_empty(size, 4, dtype=torch.int32)
