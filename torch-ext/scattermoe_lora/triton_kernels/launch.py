"""Launching: Triton analyses every argument at every launch; this remembers the answer and goes to the binary.

A forward of 16 tokens, 9 launches, took an H200's host 1.42 ms through Triton's own binder; the GPU's part of it is
0.25 ms. What is launched and allocated here can be recorded, and then replayed without all of this: see `replay.py`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from triton.runtime import driver

from .starter import Operand

# Kernels to compile, by their key in `compiled_kernels`: each, and what compiles it for what it was to be launched on.
Missing: TypeAlias = dict[tuple, tuple[Any, Callable[[], Any]]]

compiled_kernels: dict[tuple, Any] = {}
compile_lock = threading.Lock()
ON_HIP = torch.version.hip is not None


class Recorder(Protocol):
    """What is told of everything that happens here while it is `recording.recorder` of the thread.

    After the first kernel that is ``missing`` nothing is launched, nothing at all where it only ``looks`` for them.
    """

    missing: Missing
    looks: bool

    def launched(self, compiled: Any, grid: tuple[int, int], operands: tuple[Operand, ...], tail: tuple) -> None: ...

    def allocated(self, tensor: Tensor) -> None: ...

    def called(self, function: Callable, tensors: tuple[Tensor, ...]) -> None: ...

    def viewed(self, view: Tensor, base: Tensor) -> None: ...


class _Recording(threading.local):
    recorder: Recorder | None = None


recording = _Recording()


def _classes(scalars: tuple[Any, ...]) -> tuple[Any, ...]:
    """What Triton compiles for of each scalar: of an integer, whether 16 divides it, it is 1, it is long.

    Of a tuple of scalars, of each of its own. Nothing keeps them, as to a cache 2 and 2.0 would be the same.
    """
    return tuple(
        (s % 16 == 0) + 2 * (s == 1) + 4 * (s >= 2**31)
        if isinstance(s, int)
        else _classes(s)
        if isinstance(s, tuple)
        else type(s).__name__
        for s in scalars
    )


def launch(
    kernel: Any,
    grid: tuple[int, int],
    operands: tuple[Operand, ...],
    scalars: tuple[int | float | tuple[int, ...], ...],
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> None:
    """``kernel[grid](*operands, *scalars, **constants)`` on the device of the first tensor, whatever is current.

    Scalars are numbers or tuples of them, ``constants`` the kernel's ``tl.constexpr`` parameters, in order. The hooks
    that Triton calls around a launch are not called.
    """
    device: torch.device | None = None
    key: list[Any] = [id(kernel), num_warps, num_stages, _classes(scalars), *constants.values()]
    arguments: list[Any] = []
    for operand in operands:
        if operand is None:
            key.append(None)
            arguments.append(None)
        elif isinstance(operand, Tensor):
            pointer = operand.data_ptr()
            key.append(operand.dtype)
            if pointer % 16:
                key.append("unaligned")
            if ON_HIP:  # where Triton addresses tensors of up to 2 GiB with 32 bits
                key.append(operand.untyped_storage().size() < 2**31)
            arguments.append(pointer)
            device = device or operand.device
        else:
            key.append((operand.base.dtype, *operand.block_shape))
            arguments.append(operand)
    assert device is not None, "a kernel has at least one tensor"
    index = device.index
    if device.type != "cpu" and index != driver.active.get_current_device():
        with torch.get_device_module(device).device(device):
            return launch(kernel, grid, operands, scalars, num_warps, num_stages, **constants)
    key.append(index)
    known = tuple(key)
    recorder = recording.recorder
    compiled = compiled_kernels.get(known)
    if compiled is None:  # always so in Triton's interpreter, which compiles nothing, and what it runs is not recorded
        names = kernel.arg_names[len(operands) + len(scalars) :]
        assert names == list(constants), f"constants {list(constants)} are not the kernel's {names}"
        # Fused multiply-adds are asked for: Triton 3.9 warns where they are not, and from 3.10 on leaves them out.
        options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **constants}
        if recorder is not None:
            stand_ins = map(_stand_in, operands)
            warmup = functools.partial(kernel.warmup, *stand_ins, *scalars, grid=grid, **options)
            recorder.missing[known] = kernel, warmup
        else:
            with compile_lock:
                compiled_kernels[known] = kernel[grid](*operands, *scalars, **options)
        return None
    if recorder is not None and (recorder.missing or recorder.looks):
        return None
    run, tail = compiled.run, (*scalars, *constants.values())  # the first of its attributes, as that loads the binary
    stream = driver.active.get_current_stream(index)
    run(*grid, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *tail)
    if recorder is not None:
        recorder.launched(compiled, grid, operands, tail)
    return None


def _stand_in(operand: Operand) -> Operand:
    """What Triton compiles the same for as for an operand, and that holds none of its memory."""
    if operand is not None and not isinstance(operand, Tensor):
        return replace(operand, base=operand.base.new_empty(0))
    if operand is None or operand.data_ptr() % 16 or (ON_HIP and operand.untyped_storage().size() >= 2**31):
        return operand
    return operand.new_empty(0)


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new dense tensor; every one that a kernel writes is made here or by `empty_like`."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if recording.recorder is not None:
        recording.recorder.allocated(tensor)
    return tensor


def empty_like(like: Tensor) -> Tensor:
    """A new tensor with the strides of a dense one."""
    tensor = torch.empty_like(like)
    if recording.recorder is not None:
        recording.recorder.allocated(tensor)
    return tensor


def call(function: Callable, *tensors: Tensor) -> None:
    """``function(*tensors)``, which writes one of them, where a kernel of ours would gain nothing."""
    function(*tensors)
    if recording.recorder is not None:
        recording.recorder.called(function, tensors)


def columns(tensor: Tensor, piece: slice) -> Tensor:
    """``tensor[..., piece]``; the tensor itself if that is all of it."""
    if piece.start == 0 and piece.stop >= tensor.shape[-1]:
        return tensor
    view = tensor[..., piece]
    if recording.recorder is not None:
        recording.recorder.viewed(view, tensor)
    return view
