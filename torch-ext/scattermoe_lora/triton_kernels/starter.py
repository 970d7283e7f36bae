"""What starts a compiled kernel again and again: Triton's launcher in C, with descriptors encoded once an address.

Around it Triton has Python that walks all arguments and encodes every descriptor at every launch: it took an H100's
host 31 us for a product with four of them and 10 for any other kernel. In a simulation of the host, launches stubbed,
a step takes 141 us without it and 177 with it.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .device import KNOWN_TRITON, TRITON

# A descriptor is Triton's or Gluon's, which have the same fields and, in Gluon's, a layout.
Operand: TypeAlias = Tensor | TensorDescriptor | None
Pointers: TypeAlias = tuple[int | None, ...]

# Encoded descriptors kept, of all kernels: every layer of a model has weights of its own, at addresses that stay.
ENCODED = 8192


class _Address:
    """What Triton's launcher asks of a descriptor's tensor."""

    __slots__ = ("pointer",)

    def __init__(self, pointer: int | None) -> None:
        self.pointer = pointer

    def data_ptr(self) -> int | None:
        return self.pointer


class _Descriptor:
    """A descriptor that was checked when it was recorded, to be had at other addresses."""

    def __init__(self, place: int, recorded: Any, encode: Callable[[Any], list] | None = None) -> None:
        self.place, self.kind, self.encode = place, type(recorded), encode
        self.fields = {name: value for name, value in recorded.__dict__.items() if name != "base"}

    def at(self, pointer: int | None) -> Any:
        descriptor: Any = object.__new__(self.kind)
        descriptor.__dict__.update(self.fields)
        descriptor.base = _Address(pointer)
        return descriptor


@functools.lru_cache(maxsize=ENCODED)
def _encoded(descriptor: _Descriptor, pointer: int | None) -> list:
    """What the launcher in C takes in a descriptor's place. It follows from these two, whatever the memory holds."""
    assert descriptor.encode is not None
    return descriptor.encode(descriptor.at(pointer))


def starter(
    compiled: Any, grid: tuple[int, int], operands: Sequence[Operand], tail: tuple
) -> Callable[[int, Pointers], None]:
    """A function that launches a compiled kernel on a stream, with operands at other addresses.

    The kernel's attributes, of which some are properties, are looked up here, once.
    """
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    x, y = grid
    places = [i for i, operand in enumerate(operands) if operand is not None and not isinstance(operand, Tensor)]
    launch = _launcher_in_c(run)
    if launch is None:
        described = [_Descriptor(place, operands[place]) for place in places]

        def start_by_triton(stream: int, pointers: Pointers) -> None:
            given: list[Any] = [*pointers, *tail]
            for descriptor in described:
                given[descriptor.place] = descriptor.at(pointers[descriptor.place])
            run(x, y, 1, stream, function, metadata, None, None, None, *given)

        return start_by_triton

    encodings = zip(places, _encodings(compiled, len(places)), strict=True)
    # The last first, as each becomes several arguments.
    encoded = [_Descriptor(place, operands[place], encode) for place, encode in encodings][::-1]
    options = (function, run.launch_cooperative_grid, run.launch_pdl)
    scratch, no_hooks = (None, None), (None, None, None)
    flat = not hasattr(run, "kernel_signature")  # Triton 3.6, where each signature has a launcher of its own
    if flat:
        head: tuple = (*options, *scratch, metadata, *no_hooks)
    else:
        head = (*options, metadata, *no_hooks, *scratch, run.arg_annotations, run.kernel_signature)

    def start(stream: int, pointers: Pointers) -> None:
        given: list[Any] = [*pointers, *tail]
        for descriptor in encoded:
            place = descriptor.place
            given[place : place + 1] = _encoded(descriptor, pointers[place])
        if flat:
            launch(x, y, 1, stream, *head, *given)
        else:
            launch(x, y, 1, stream, *head, given)

    return start


def _launcher_in_c(run: Any) -> Callable | None:
    """Triton's launcher for NVIDIA's GPUs without the Python around it; None where it is not known, or does more."""
    if type(run).__name__ != "CudaLauncher" or TRITON not in KNOWN_TRITON:
        return None
    if run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False):
        return None
    if inspect.isfunction(run.launch):  # what encodes descriptors, around it
        return inspect.getclosurevars(run.launch).nonlocals.get("launcher")
    return run.launch


def _encodings(compiled: Any, count: int) -> list[Callable[[Any], list]]:
    """How Triton encodes each descriptor of a kernel."""
    encode = sys.modules[type(compiled.run).__module__].make_tensordesc_arg
    more = (None,) * (len(inspect.signature(encode).parameters) - 2)  # Triton 3.8 and later give it what it ignores

    def encoding(kind: Any) -> Callable[[Any], list]:
        return lambda descriptor: encode(descriptor, kind, *more)

    return [encoding(kind) for kind in compiled.metadata.tensordesc_meta or [None] * count]
