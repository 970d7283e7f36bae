"""What the launchers ask of a device: its properties, whether Hopper's own kernels are for it, a thread's context."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .. import tiles
from ..tiles import Gpu
from ..types import Routing

# Tritons whose inner parts are known: with which Hopper's own kernels compile to the same order of waits, arrivals and
# products, as Gluon changes, and whose launcher in C `starter` calls.
KNOWN_TRITON = ("3.6", "3.7", "3.8", "3.9")
TRITON = ".".join(triton.__version__.split(".")[:2])

# Rows and columns of their tiles. A base's products of fewer columns are not theirs, nor of fewer rows an expert than
# HOPPER_LEAST: with 4 to 64 of them a step took up to 18 % less than with tiles of so many rows, and 0.4 % more at
# most; with fewer 1 to 2 % less at the median, for as much more of a forward alone.
HOPPER_ROWS, HOPPER_COLUMNS, HOPPER_LEAST = 128, 256, 4


@functools.cache
def _gpu(device_type: str, index: int | None) -> Gpu:
    if device_type == "xpu":  # whose processors are its subslices, as torch's own compiler counts
        return Gpu("unknown", 64 * 1024, torch.xpu.get_device_properties(index).gpu_subslice_count)
    if device_type != "cuda":
        return Gpu("unknown", 64 * 1024, 8)  # the CPU tensors of Triton's interpreter
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        architecture = properties.gcnArchName.partition(":")[0]
        return Gpu(architecture, properties.shared_memory_per_block, properties.multi_processor_count)
    architecture = f"sm_{properties.major}{properties.minor}"
    if properties.major < 8:  # sm_75's products, in float16 too, are of single numbers and spill 4.5 KB a thread
        warnings.warn(
            f"scattermoe-lora: Triton does not use the tensor cores of {architecture}, older than sm_80: compare the "
            "time of a step with the untouched model's",
            stacklevel=2,
        )
    # A block may opt into more than the 48 KB that it gets unasked; what torch calls it is in no stub.
    shared_memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(architecture, shared_memory, properties.multi_processor_count)


def gpu(tensor: Tensor) -> Gpu:
    """The tensor's GPU, looked up once."""
    return _gpu(tensor.device.type, tensor.device.index)


class _Thread(threading.local):
    has_context = False


_thread = _Thread()


def use_context() -> None:
    """Gives the thread the current device's CUDA context.

    One of autograd's has none until something asks for it. Without it Triton 3.6 encodes no descriptor ("invalid
    device context"), so a backward that began with a product failed, and a tensor out of torch's cache takes 8 us for
    2, on another H200's host 16. What launches outside of an op has used torch there before.
    """
    if not _thread.has_context and torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        torch.cuda.mem_get_info()
        _thread.has_context = True


@functools.cache
def has_tma(architecture: str) -> bool:
    """Whether blocks are loaded by descriptors: for GPUs without TMA Triton makes these loads of an element each."""
    if architecture.startswith("sm_"):
        return int(architecture[3:]) >= 90
    return not architecture.startswith("gfx")


@functools.cache
def has_hopper_kernels(architecture: str) -> bool:
    """Whether the kernels in `hopper_gemm`, `hopper_gram`, `hopper_narrow` and `hopper_act_grad` can be used."""
    return architecture == "sm_90" and TRITON in KNOWN_TRITON


def uses_hopper_tiles(tensor: Tensor, routing: Routing) -> bool:
    """Whether Hopper's own kernels can be used, and the routing's rows lie in their tiles: see `tile_rows`."""
    return routing.tile_rows == HOPPER_ROWS and has_hopper_kernels(gpu(tensor).architecture)


def tile_rows(expert_offsets: Tensor, num_slots: int, weights: Sequence[Tensor]) -> int:
    """Rows of a row tile of these products, see `backend.scheduled`: everything that walks the schedule shares it."""
    num_experts = expert_offsets.shape[0]
    if num_slots >= HOPPER_LEAST * num_experts and has_hopper_kernels(gpu(expert_offsets).architecture):
        # Sizes that Hopper's kernels leave to the general one, they leave to it in its own tiles.
        wide = all(min(weight.shape[1:]) >= HOPPER_COLUMNS for weight in weights)
        even = all(n % 16 == 0 for weight in weights for n in weight.shape[1:])
        if weights and wide and even and all(weight.element_size() == 2 for weight in weights):
            return HOPPER_ROWS
    return tiles.block_m(num_slots, num_experts)
