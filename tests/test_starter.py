"""What a replay launches is what Triton's own launcher would: its arguments, caught where they reach the one in C."""

from __future__ import annotations

import contextvars
import itertools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from conftest import inner
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

GRID, STREAM, TAIL = (3, 2), 7, (5, 0.5, (1, 2**40), "silu", (4, 8))
TENSOR = {"swizzle": 3, "elem_size": 2, "elem_type": 12, "block_size": [8, 8], "fp4_padded": False}
SIGNATURES = {
    "tensors": (["*bf16", "*bf16"], None),
    "nothing": (["*bf16", "constexpr"], None),
    "a descriptor": (["*bf16", "tensordesc<bf16[8, 8]>"], [TENSOR]),
    "descriptors": (["tensordesc<bf16[8, 8]>", "*bf16", "tensordesc<bf16[8, 8]>"], [TENSOR, TENSOR | {"swizzle": 1}]),
    "descriptors of a GPU without TMA": (["tensordesc<bf16[8, 8]>", "*bf16"], []),
}


class Launch:
    """A kernel as Triton would have compiled it, for operands of a signature; ``caught`` is what reaches C."""

    def __init__(self, operand_types: list[str], tensordesc_meta: list[dict] | None) -> None:
        self.caught: list[list] = []
        run: Any = object.__new__(nvidia.CudaLauncher)
        run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, True
        run.global_scratch_size = run.profile_scratch_size = 0
        run.global_scratch_align = run.profile_scratch_align = 1
        if hasattr(nvidia, "make_kernel_signature"):  # Triton 3.7 and later
            run.arg_annotations, run.kernel_signature, run.gsan_enabled = ["annotations"], b"signature", False
        signature = dict(enumerate([*operand_types, "i32", "fp32", ("constexpr", "i64"), "constexpr", "constexpr"]))
        run.launch = nvidia.wrap_handle_tensordesc(self._catch, signature, tensordesc_meta)
        metadata = types.SimpleNamespace(tensordesc_meta=tensordesc_meta)
        self.compiled = types.SimpleNamespace(run=run, function=11, packed_metadata=(4, 1, 99), metadata=metadata)
        self.operands: list[Any] = []
        for kind in operand_types:
            tensor = torch.empty(16, 16, dtype=torch.bfloat16)
            is_descriptor = kind.startswith("tensordesc")
            operand = TensorDescriptor(tensor, [16, 16], [16, 1], [8, 8]) if is_descriptor else tensor
            self.operands.append(None if kind == "constexpr" else operand)

    def _catch(self, *arguments: Any) -> None:
        plain = lambda a: a.data_ptr() if hasattr(a, "data_ptr") else a  # noqa: E731
        *front, last = arguments
        rest = last if isinstance(last, (list, tuple)) else [last]
        self.caught.append([plain(argument) for argument in (*front, *rest)])

    def pointers(self) -> tuple[int | None, ...]:
        tensors = [getattr(operand, "base", operand) for operand in self.operands]
        return tuple(None if tensor is None else tensor.data_ptr() for tensor in tensors)

    def by_triton(self) -> list:
        plain = [o.data_ptr() if isinstance(o, torch.Tensor) else o for o in self.operands]
        compiled = self.compiled
        what = (compiled.function, compiled.packed_metadata, None, None, None)
        compiled.run(*GRID, 1, STREAM, *what, *plain, *TAIL)
        return self.caught.pop()


@pytest.fixture
def encoded(monkeypatch) -> list[tuple]:
    """The arguments of every descriptor that Triton encodes, which without a GPU stand for what would come of them."""
    calls: list[tuple] = []

    def fill(*arguments: Any) -> tuple:
        calls.append(arguments)
        return tuple(map(str, arguments))

    utils = types.SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    monkeypatch.setattr(driver, "_active", types.SimpleNamespace(utils=utils))
    return calls


@pytest.fixture
def starter(kernel) -> Callable:
    return inner(kernel, "triton_kernels.starter").starter


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """The calls of Triton's own launcher."""
    calls: list[tuple] = []
    call = nvidia.CudaLauncher.__call__
    monkeypatch.setattr(
        nvidia.CudaLauncher, "__call__", lambda *arguments: calls.append(arguments) or call(*arguments)
    )
    return calls


@pytest.mark.parametrize("signature", SIGNATURES.values(), ids=SIGNATURES)
def test_the_launcher_in_c_is_given_what_triton_gives_it(starter, encoded, asked, signature):
    launch = Launch(*signature)
    want = launch.by_triton()
    assert len(asked) == 1
    starter(launch.compiled, GRID, launch.operands, TAIL)(STREAM, launch.pointers())
    assert launch.caught == [want]
    assert len(asked) == 1


def test_a_descriptor_is_encoded_once_an_address(starter, encoded):
    launch = Launch(*SIGNATURES["descriptors"])
    start = starter(launch.compiled, GRID, launch.operands, TAIL)
    here, there = launch.pointers(), tuple(pointer + 4096 for pointer in launch.pointers())
    for pointers in (here, here, there, here):
        start(STREAM, pointers)
    assert [call[0] for call in encoded] == [here[2], here[0], there[2], there[0]]
    assert launch.caught[0] == launch.caught[1] == launch.caught[3] != launch.caught[2]


@pytest.mark.parametrize("change", ["scratch memory", "another launcher", "another Triton"])
def test_what_is_not_known_is_left_to_triton(starter, encoded, asked, change, monkeypatch, kernel):
    launch = Launch(*SIGNATURES["descriptors"])
    run = launch.compiled.run
    if change == "scratch memory":
        run.global_scratch_size = 64
        monkeypatch.setattr(nvidia._allocation, "_allocator", contextvars.ContextVar("", default=lambda *size: 4096))
    elif change == "another launcher":
        run.__class__ = type("HIPLauncher", (nvidia.CudaLauncher,), {})
    else:
        monkeypatch.setattr(inner(kernel, "triton_kernels.starter"), "TRITON", "9.0")
    want = launch.by_triton()
    starter(launch.compiled, GRID, launch.operands, TAIL)(STREAM, launch.pointers())
    assert launch.caught == [want]
    assert len(asked) == 2


@triton.jit
def _two_scalars(first, second):
    pass


@pytest.mark.parametrize("arrange", [lambda a, b: (a, b), lambda a, b: (a, (b, 3)), lambda a, b: ((a, (b,)), 1)])
@pytest.mark.parametrize("backend", [GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)], ids=lambda t: t.arch)
def test_what_triton_compiles_for_follows_from_the_class(kernel, monkeypatch, arrange, backend):
    """A binary is kept by its scalars' classes: scalars of equal classes, in tuples too, have the same one."""
    monkeypatch.setattr(driver, "_active", types.SimpleNamespace(get_current_target=lambda: backend))
    classes = inner(kernel, "triton_kernels.launch")._classes
    *_, bind = _two_scalars.create_binder()
    binaries: dict[tuple, Any] = {}
    values = (0, 1, 2, 16, 40, 48, 2**31 - 1, 2**31, 2**31 + 5, 2**40, 0.5, 2.0, 16.0)
    for scalars in itertools.starmap(arrange, itertools.product(values, values)):
        _, binary, _ = bind(*scalars, debug=False)
        assert binaries.setdefault(classes(scalars), binary) == binary, scalars
    assert len(binaries) > 20
