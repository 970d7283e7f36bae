"""A first step's kernels compiled side by side, by Triton itself, for a GPU that a stand-in for its driver claims."""

from __future__ import annotations

import functools
import gc
import threading
import time
import types

import pytest
import torch
import triton
import triton.language as tl
from conftest import inner
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime import driver


@triton.jit
def _add_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n) + 1, mask=i < n)


@triton.jit
def _double_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i) * 2)


@gluon.jit
def _gluon_kernel(x_ptr, n, a, b, c, BLOCK: gl.constexpr):
    i = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(x_ptr + i, gl.load(x_ptr + i, mask=i < n) + a + b + c, mask=i < n)


@triton.jit
def _broken_kernel(x_ptr, n, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK > 1024)


KERNELS = (_add_kernel, _double_kernel, _gluon_kernel, _broken_kernel)
# In another order than the longest first, some for several sizes.
GIVEN = {
    "double 64": (_double_kernel, 1, (), 64),
    "add 64": (_add_kernel, 2, (5,), 64),
    "gluon 128": (_gluon_kernel, 1, (5, 6, 7, 9), 128),
    "add 128": (_add_kernel, 2, (5,), 128),
    "double 128": (_double_kernel, 1, (), 128),
}
LONGEST_FIRST = ["gluon 128", "add 64", "add 128", "double 64", "double 128"]


class Compiler:
    """The module, what it is given, and what happens there: to be called as `compile_missing`."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module = module
        self.events: list[str] = []
        self.launchers: list[str] = []
        self.parsing = self.most = 0

    def entry(self, name: str, kernel, pointers: int, scalars: tuple[int, ...], block: int):
        warmup = functools.partial(kernel.warmup, *[torch.empty(0)] * pointers, *scalars, grid=(1,), BLOCK=block)

        def noted():
            self.events.append(f"handed in {name}")
            return warmup()

        return kernel, noted

    def __call__(self, names=tuple(GIVEN), **more) -> None:
        """In a thread, so that a test in which one waits for another fails, and does not wait as well."""
        missing = {(name,): self.entry(name, *(GIVEN | more)[name]) for name in (*names, *more)}
        errors: list[BaseException] = []

        def compile_all() -> None:
            try:
                self.module.compile_missing(missing)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=compile_all, daemon=True)
        thread.start()
        thread.join(120)
        assert not thread.is_alive(), "kernels wait for one another"
        assert not self.module.compile_lock.locked()
        assert all(type(kernel.ASTSource) is type for kernel, _ in missing.values()), (
            "Triton's own makes sources again"
        )
        if errors:
            raise errors[0]

    def forget(self) -> None:
        """What this process knows of kernels, not what is in Triton's cache."""
        self.events.clear()
        self.module.compiled_kernels.clear()
        for kernel in KERNELS:
            kernel.device_caches.clear()


@pytest.fixture
def compiler(kernel, monkeypatch, tmp_path):
    module = inner(kernel, "triton_kernels.compiling")
    compiler = Compiler(module)

    class Launcher:
        def __init__(self, src, metadata):
            compiler.launchers.append(src.fn.__name__)

    properties = {"max_shared_mem": 2**17, "max_num_regs": 2**16, "multiprocessor_count": 132, "warpSize": 32}
    utils = types.SimpleNamespace(
        load_binary=lambda *arguments: (1, 1, 10, 0, 1024),
        unload_module=lambda loaded: None,
        get_device_properties=lambda index: properties,
    )
    active = types.SimpleNamespace(
        launcher_cls=Launcher,
        utils=utils,
        get_current_device=lambda: 0,
        get_current_stream=lambda index: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_device_interface=lambda: torch.cuda,
    )
    monkeypatch.setattr(driver, "_active", active)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(module, "compiled_kernels", {})
    for source in (ASTSource, GluonASTSource):

        def make_ir(self, *arguments, parse=source.make_ir):
            compiler.events.append(f"parses {self.fn.__name__}")
            compiler.parsing += 1
            compiler.most = max(compiler.most, compiler.parsing)
            time.sleep(0.02)  # in which others would begin
            try:
                return parse(self, *arguments)
            finally:
                compiler.parsing -= 1

        monkeypatch.setattr(source, "make_ir", make_ir)
    compiler.active = active
    compiler.forget()
    yield compiler
    compiler.forget()
    gc.collect()  # while there is a driver, which Triton 3.6 asks to unload them


def names_of(parsed: list[str]) -> list[str]:
    return [f"parses {GIVEN[name][0].__name__}" for name in parsed]


def test_the_longest_are_parsed_first_and_one_at_a_time(compiler):
    """All are handed in before; a launcher is made for each, and all can be run."""
    compiler()
    assert compiler.events == [f"handed in {name}" for name in LONGEST_FIRST] + names_of(LONGEST_FIRST) + [
        f"handed in {name}" for name in GIVEN
    ]
    assert compiler.most == 1
    kernels = compiler.module.compiled_kernels
    assert set(kernels) == {(name,) for name in GIVEN}
    assert all("ptx" in kernel.asm for kernel in kernels.values())
    # In a thread, where gcc makes it, and again by who loads it.
    assert sorted(compiler.launchers) == sorted(2 * [kernel.__name__ for kernel, *_ in GIVEN.values()])


def test_nothing_waits_for_what_is_not_parsed(compiler):
    """Kernels in Triton's own cache, between others, and one that is given twice."""
    compiler(("add 64", "double 64"))
    compiler.forget()
    compiler(again=GIVEN["gluon 128"])
    parsed = [event for event in compiler.events if event.startswith("parses")]
    assert parsed == names_of(["gluon 128", "add 128", "double 128"]) and compiler.most == 1
    assert len(compiler.module.compiled_kernels) == len(GIVEN) + 1


def test_one_that_does_not_compile(compiler):
    """It is an error, nothing waits for it, and the next call compiles what it can."""
    for _ in range(2):
        with pytest.raises(Exception, match="static_assert"):
            compiler(broken=(_broken_kernel, 1, (5,), 64))
        assert not compiler.module.compiled_kernels
        compiler.forget()
    compiler()
    assert len(compiler.module.compiled_kernels) == len(GIVEN)


def test_one_that_cannot_be_handed_in(compiler, monkeypatch):
    """Those that were do not wait for it."""
    monkeypatch.setitem(GIVEN, "add 128", (_add_kernel, 3, (5,), 128))  # an argument too many
    with pytest.raises(TypeError):
        compiler()
    assert [event for event in compiler.events if event.startswith("parses")] == names_of(["gluon 128", "add 64"])


def test_a_launcher_that_fails_once(compiler):
    """Triton keeps a compilation that failed: so a launcher that does fails for who runs the kernel, not for good."""

    def fail(src, metadata):
        raise RuntimeError("no gcc")

    made, compiler.active.launcher_cls = compiler.active.launcher_cls, fail
    with pytest.raises(RuntimeError, match="no gcc"):
        compiler()
    assert not compiler.module.compiled_kernels
    compiler.active.launcher_cls = made
    compiler()
    assert len(compiler.module.compiled_kernels) == len(GIVEN)


def test_a_binary_that_is_not_loaded_once(compiler):
    """For want of memory, say: Triton keeps such a kernel, and does not try again."""

    def fail(*arguments):
        raise RuntimeError("out of memory")

    load, compiler.active.utils.load_binary = compiler.active.utils.load_binary, fail
    with pytest.raises(RuntimeError, match="out of memory"):
        compiler()
    assert not compiler.module.compiled_kernels
    compiler.active.utils.load_binary = load
    compiler()
    assert all(kernel.function is not None for kernel in compiler.module.compiled_kernels.values())


def test_a_triton_that_is_not_known(compiler, monkeypatch):
    """Its sources are left alone, so they are parsed at once."""
    monkeypatch.setattr(compiler.module, "TRITON", "4.0")
    compiler()
    assert compiler.most > 1 and len(compiler.module.compiled_kernels) == len(GIVEN)
