"""Replay: the launches and allocations of a step depend on shapes alone, so they are worked out once for each.

The GPU needs 0.5 ms for a step of 16 tokens and 2.5 for one of 8192; an H200's host took 1.5 to 2 ms for its 19
launches where each chose its tile and strides anew. A replay only allocates, fills in pointers and launches.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from .compiling import compile_missing
from .device import use_context
from .launch import ON_HIP, Missing, Recorder, recording
from .starter import Operand, starter

# Programs kept: one for each op, shape and device. Sequence lengths that vary make new ones all the time.
CAPACITY = 1024
# Bytes up to which what a replay allocates for itself is one allocation: each costs an H200's host 3 us, and so a step
# of few tokens has 15 instead of 21. Larger ones are freed as soon as they are used.
SHARED_BYTES = 64 * 2**20
ALIGNMENT = 256

_programs: dict[tuple, _Program] = {}


class _Program:
    """A recording, then its replay.

    ``pointers`` has an entry for each address that a launch is given: None, the inputs, then the tensors allocated and
    the views in the order of their making.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor | None],
        missing: Missing | None = None,
        looks: bool = False,
    ) -> None:
        self.steps: list[tuple] = []
        self.views: dict[int, list[tuple[int, int]]] = {}  # entry of a tensor: (entry, offset) of its views
        self.views_of_inputs: list[tuple[int, list[tuple[int, int]]]] = []
        self.entries: dict[int, int] = {0: 0}  # address: entry; only while recording
        self.roots: dict[int, int] = {}  # entry of a view: that of its tensor; only while recording
        self.allocations: dict[int, tuple] = {}  # entry: shape, strides and dtype; only while recording
        self.size = self.num_fixed = 1 + len(inputs)
        self.complete = True
        self.missing = {} if missing is None else missing  # see `launch.Recorder`
        self.looks = looks
        for entry, tensor in enumerate(inputs, 1):
            if tensor is not None and tensor.numel():
                self.entries[tensor.data_ptr()] = entry
        self.outputs: list[int] = []

    # Recording

    def _entry(self, pointer: int) -> int:
        entry = self.entries.get(pointer)
        if entry is None:  # made by something that is not recorded
            self.complete = False
            return 0
        return entry

    def _new(self, pointer: int) -> int:
        entry = self.size
        self.size += 1
        if pointer:
            self.entries[pointer] = entry
        return entry

    def allocated(self, tensor: Tensor) -> None:
        entry = self._new(tensor.data_ptr())
        self.allocations[entry] = (tensor.shape, tensor.stride(), tensor.dtype)
        make = functools.partial(
            torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
        self.steps.append(("allocate", entry, make))

    def viewed(self, view: Tensor, base: Tensor) -> None:
        pointer = view.data_ptr()
        offset = pointer - base.data_ptr()
        if offset == 0 or view.numel() == 0:
            return
        root = self._entry(base.data_ptr())
        if self.entries.get(pointer, self.size) < self.num_fixed:
            self.complete = False  # another input's address: the two overlap
        entry = self._new(pointer)
        self.roots[entry] = root
        self.views.setdefault(root, []).append((entry, offset))

    def called(self, function: Callable, tensors: tuple[Tensor, ...]) -> None:
        entries = tuple(self._entry(tensor.data_ptr()) for tensor in tensors)
        whole = all(entry in self.allocations for entry in entries)
        self.complete = self.complete and whole
        self.steps.append(("call", entries, function))

    def launched(self, compiled: Any, grid: tuple[int, int], operands: tuple[Operand, ...], tail: tuple) -> None:
        tensors = [getattr(operand, "base", operand) for operand in operands]
        entries = tuple(0 if tensor is None else self._entry(tensor.data_ptr()) for tensor in tensors)
        self.steps.append(("launch", entries, (starter(compiled, grid, operands, tail), itemgetter(*entries))))

    def finish(self, outputs: Sequence[Tensor | None]) -> bool:
        """Ends the recording; False if it can't be replayed."""
        for output in outputs:
            entry = 0 if output is None else self._entry(output.data_ptr())
            if output is not None:
                same = self.allocations.get(entry) == (output.shape, output.stride(), output.dtype)
                self.complete = self.complete and same
            self.outputs.append(entry)
        self._share_memory()
        self.views_of_inputs = [(entry, views) for entry, views in self.views.items() if entry < self.num_fixed]
        # Where each allocation is used last, so that its memory is free for the next ones.
        dead: dict[int, list[int]] = {}
        for entry, position in self._last_uses().items():
            if entry in self.allocations and entry not in self.outputs:
                dead.setdefault(position, []).append(entry)
        self.steps = [(*step, tuple(dead.get(position, ()))) for position, step in enumerate(self.steps)]
        self.entries, self.roots, self.allocations = {}, {}, {}
        return self.complete

    def _last_uses(self) -> dict[int, int]:
        """The step that uses each input and allocation last, or a view of it."""
        last: dict[int, int] = {}
        for position, (kind, entries, _) in enumerate(self.steps):
            for entry in (entries,) if kind == "allocate" else entries:
                last[self.roots.get(entry, entry)] = position
        return last

    def _share_memory(self) -> None:
        """Makes one allocation of those that end with the program, each where no other is while it is used."""
        called = {entry for kind, entries, _ in self.steps if kind == "call" for entry in entries}
        last = self._last_uses()
        placed: dict[int, tuple[int, int]] = {}  # entry: its first byte, and the first after it
        device = None
        for position, (kind, entry, make) in enumerate(self.steps):
            if kind != "allocate" or entry in self.outputs or entry in called:
                continue
            shape, strides, dtype = self.allocations[entry]
            elements = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if all(shape) else 0
            size = -(-elements * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            begin = 0
            for other_begin, other_end in sorted(placed[other] for other in placed if last[other] >= position):
                if begin + size <= other_begin:
                    break
                begin = max(begin, other_end)
            placed[entry] = begin, begin + size
            device = make.keywords["device"]
        total = max((end for _, end in placed.values()), default=0)
        if total == 0 or total > SHARED_BYTES:
            return
        shared = self.size
        self.size += 1
        self.steps = [step for step in self.steps if step[0] != "allocate" or step[1] not in placed]
        make = functools.partial(torch.empty_strided, (total,), (1,), dtype=torch.uint8, device=device)
        self.steps.insert(0, ("allocate", shared, make))
        self.allocations[shared] = (torch.Size((total,)), (1,), torch.uint8)
        views = self.views[shared] = []
        for entry, (begin, _) in placed.items():
            views.append((entry, begin))
            views += [(view, begin + offset) for view, offset in self.views.pop(entry, ())]
        self.roots |= {entry: shared for entry, _ in views}

    # Replay

    def run(self, pointers: list, index: int) -> list[Tensor | None]:
        """The outputs for other inputs of the same shapes, whose ``pointers`` these are, with a None in front."""
        tensors: list[Any] = [None] * self.size
        pointers += [None] * (self.size - len(pointers))
        views = self.views
        for entry, of_input in self.views_of_inputs:
            for view, offset in of_input:
                pointers[view] = pointers[entry] + offset
        stream = driver.active.get_current_stream(index)
        for kind, entries, what, dead in self.steps:
            if kind == "launch":
                start, get = what
                start(stream, get(pointers))
            elif kind == "allocate":
                # No other name for it: a name would keep its memory until the next one is allocated.
                tensors[entries] = what()
                pointer = pointers[entries] = tensors[entries].data_ptr()
                for view, offset in views.get(entries, ()):
                    pointers[view] = pointer + offset
            else:
                what(*(tensors[entry] for entry in entries))
            for entry in dead:
                tensors[entry] = None
        return [tensors[entry] for entry in self.outputs]


def can_replay(tensor: Tensor) -> bool:
    """Whether there is something to replay: on CPU tensors Triton's interpreter works, which compiles nothing."""
    return not tensor.is_cpu


@contextlib.contextmanager
def _recorded_by(recorder: Recorder) -> Iterator[None]:
    outer, recording.recorder = recording.recorder, recorder
    try:
        yield
    finally:
        recording.recorder = outer


def _record(
    body: Callable,
    tensors: Sequence[Tensor | None],
    options: tuple,
    missing: Missing | None = None,
    looks: bool = False,
) -> tuple[_Program, list[Tensor | None]]:
    recorder = _Program(tensors, missing, looks)
    with _recorded_by(recorder):
        return recorder, body(sys.modules[__package__], *tensors, *options)


def replay(
    body: Callable,
    tensors: Sequence[Tensor | None],
    options: tuple,
    backward: Callable[[list[Tensor | None]], Any] | None = None,
    overwrites: bool = False,
) -> list[Tensor | None]:
    """``body(run, *tensors, *options)``, recorded once for each shape of the tensors and value of the options.

    ``body`` computes by the functions of this package alone: by `empty`, `columns` and their like, and by those that
    launch; ``run`` is the package. It returns tensors that it allocated, or Nones. ``backward``, given such results,
    calls what will be replayed next: where kernels are missing it is called on results that were never written, and
    launches none of ours, so that its kernels are compiled side by side with these. A ``body`` that ``overwrites`` an
    input can't begin twice, so what it launches is compiled before it begins.
    """
    first = tensors[0]
    assert first is not None
    if not can_replay(first):
        return body(sys.modules[__package__], *tensors, *options)
    if recording.recorder is not None:  # a backward whose forward has kernels to compile
        return _record(body, tensors, options, recording.recorder.missing)[1]
    device = first.device
    index = device.index
    if device.type != "cpu" and index != driver.active.get_current_device():
        with torch.get_device_module(device).device(device):
            return replay(body, tensors, options, backward, overwrites)
    use_context()
    pointers: list[int | None] = [None, *[None if t is None else t.data_ptr() or None for t in tensors]]
    given = [pointer for pointer in pointers if pointer]
    if functools.reduce(or_, given, 0) % 16:
        return body(sys.modules[__package__], *tensors, *options)
    key: list[Any] = [t if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
    if ON_HIP:  # as in `launch`
        key += [t is not None and t.untyped_storage().size() < 2**31 for t in tensors]
    if len(set(given)) < len(given):  # tensors that share an address are not told apart: they always must share it
        key.append(tuple(map(given.index, given)))
    known = (body, index, options, *key)
    program = _programs.get(known)
    if program is not None:
        return program.run(pointers, index)
    recorder, outputs = _record(body, tensors, options, looks=overwrites)
    missing = recorder.missing
    if missing or overwrites:
        is_full = False
        if missing and backward is not None:
            try:
                with _recorded_by(recorder):
                    backward(outputs)
            except torch.OutOfMemoryError:  # it may be a forward alone; if not, the backward compiles its own
                is_full = True
        del recorder, outputs  # what it allocated, and never wrote
        if is_full:
            torch.cuda.empty_cache()  # kernels are loaded into memory that torch does not hold
        if missing:
            compile_missing(missing)
        recorder, outputs = _record(body, tensors, options)
        assert not recorder.missing, "a kernel was compiled for other arguments than it is launched with"
    if recorder.finish(outputs):
        if len(_programs) >= CAPACITY:
            _programs.clear()
        _programs[known] = recorder
    return outputs
