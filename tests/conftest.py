"""Shared fixtures: the kernel as a user loads it, and the device that the numerics run on (``--device``).

- ``cpu`` (default): the CPU backend; every test that needs no GPU runs.
- ``interpreter``: the Triton kernels themselves, in Triton's interpreter, on CPU tensors; only tests marked
  ``every_device`` or ``interpreter`` run.
- ``cuda``: the Triton kernels on the GPU; tests marked ``every_device`` or ``gpu`` run. With ``--code-for sm_80`` it
  runs those for an older GPU, see `older_gpu`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import older_gpu
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REPO_ID = "org/scattermoe-lora"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "interpreter", "cuda"), help="see tests/conftest.py")
    parser.addoption("--code-for", choices=older_gpu.OLDER, help="see tests/conftest.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
        quicken_the_interpreter()
    if config.getoption("--code-for"):
        older_gpu.run_code_for(config.getoption("--code-for"))
    slow = config.getoption("--device") != "cpu"  # a GPU compiles for every new size
    common = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
    hypothesis.settings.register_profile("few", max_examples=15 if slow else 200, derandomize=True, **common)
    hypothesis.settings.register_profile("many", max_examples=300 if slow else 3000, **common)
    hypothesis.settings.load_profile(config.getoption("--hypothesis-profile") or "few")
    torch.set_num_threads(1)  # the products are tiny, and threads would contend with xdist's workers
    os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
    if not (ROOT / "build").is_dir() and os.environ["LOCAL_KERNELS"] == f"{REPO_ID}={ROOT}":
        pytest.exit("there is no build/ to test: run `make build` first", returncode=2)


def quicken_the_interpreter() -> None:
    """Half of the time of Triton's interpreter is not the kernels' arithmetic.

    - At every call of a device function it looks for builtins to replace. A launch has replaced those of
      `triton.language` already; those of `core`, which Triton's own functions use, are never put back, and replaced
      here.
    - It computes every sum and product of int32 in int64 too, and compares: sizes at which these overflow would take
      it days.
    - It makes the table of numpy's dtypes for every array, and works out the shape of every block and tensor, anew.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    interpreter._patch_lang(tl.sum.fn)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    of_scalar = functools.cache(interpreter._get_np_dtype)

    def np_dtype(dtype: tl.dtype) -> np.dtype:
        scalar = dtype.scalar  # types of blocks and of pointers have no hash
        return np.dtype(np.uint64) if scalar.is_ptr() else of_scalar(scalar)

    interpreter._get_np_dtype = np_dtype

    make_block, make_tensor, known = tl.block_type.__init__, tl.tensor.__init__, {}

    def block_init(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        key = (element_ty.name, *(size.value if isinstance(size, tl.constexpr) else size for size in shape))
        if key not in known:
            make_block(self, element_ty, shape)
            known[key] = vars(self)
        self.__dict__ = known[key]

    def tensor_init(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        if not hasattr(type, "of_tensors"):
            make_tensor(self, handle, type)
            type.of_tensors = {name: getattr(self, name) for name in ("shape", "numel", "type", "dtype")}
        self.__dict__.update(type.of_tensors, handle=handle)

    tl.block_type.__init__, tl.tensor.__init__ = block_init, tensor_init


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    device = config.getoption("--device")
    wanted = {"interpreter": {"every_device", "interpreter"}, "cuda": {"every_device", "gpu"}}.get(device)
    kept, dropped = [], []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        runs = bool(wanted & marks) if wanted else not marks & {"gpu", "interpreter"}
        (kept if runs else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    """The kernel, loaded with `get_kernel` from the build that LOCAL_KERNELS names."""
    from kernels import get_kernel

    module = get_kernel(REPO_ID, version=1)
    if request.config.getoption("--device") == "interpreter":
        triton_kernels = inner(module, "triton_kernels")
        inner(module, "backend").of = lambda tensor: triton_kernels
    return module


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device")
    return torch.device("cuda" if name == "cuda" else "cpu")


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param == "bfloat16" and request.config.getoption("--device") == "interpreter":
        pytest.skip("Triton's interpreter multiplies bfloat16 as integers")
    return getattr(torch, request.param)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A `tiny.Ran`: which ops run inside it."""
    from tiny import Ran

    return Ran(monkeypatch)


def inner(kernel: ModuleType, name: str) -> ModuleType:
    """A module inside the kernel: the loader gives the package a generated name, so it can't be imported by ours."""
    return importlib.import_module(f"{kernel.__name__}.{name}")
