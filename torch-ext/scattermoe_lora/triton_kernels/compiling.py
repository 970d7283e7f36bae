"""Compiling: the kernels that a first step lacks, side by side, with little waiting for Python's lock.

One after another the 19 of a step took an H200's host 11 s. Most of that was ptxas, and gcc for Triton 3.6's
launchers, which are Python modules: what gcc makes is kept in Triton's cache, and loaded from there by one thread, as
those modules share a name, and a thread that loads one again may be given what another thread has just loaded.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import cpu_count
from typing import Any

import triton
from triton.runtime import JITFunction, driver

from .device import KNOWN_TRITON, TRITON
from .launch import Missing, compile_lock, compiled_kernels


class _InTurn:
    """Compiles in threads, but parses one source that it made at a time, in the order in which they are handed in.

    Parsing is Python, 2 s of it for a step. Where 17 threads parsed at once, each that left Python for a moment waited
    for all others before it came back, so that the longest kernels, with 1 to 2 s of MLIR and ptxas ahead of them,
    were parsed after 3 to 4 s.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self.pool = pool
        self.parsed = threading.Event()  # set when what was handed in last is parsed
        self.parsed.set()
        self.made = threading.Event()  # the same for the source that was made last; if none ever was, for all

    def source(self, kind: Callable[..., Any], *arguments: Any) -> Any:
        """A kernel's source, which is parsed when those handed in before it are."""
        source = kind(*arguments)
        parse, before, parsed = source.make_ir, self.parsed, threading.Event()

        def parse_in_turn(*arguments: Any) -> Any:
            before.wait()
            try:
                return parse(*arguments)
            finally:
                parsed.set()

        source.make_ir, self.made = parse_in_turn, parsed
        return source

    def submit(self, compile_source: Callable[[], Any]) -> Future[Any]:
        """Hands in what compiles the source that was made last; the kernel's launcher is made as well."""
        before, parsed = self.parsed, self.made
        self.parsed = parsed

        def compile_and_link() -> Any:
            try:
                kernel = compile_source()
            finally:
                before.wait()  # what is in Triton's own cache is not parsed
                parsed.set()
            # Where that fails it does so again when the kernel is first run; here Triton keeps a failure for good.
            with contextlib.suppress(Exception):
                driver.active.launcher_cls(kernel.src, kernel.metadata)
            return kernel

        return self.pool.submit(compile_and_link)


@contextlib.contextmanager
def _sources_by(make: Callable[..., Any], kernels: Iterable[Any]) -> Iterator[None]:
    """Sources of these kernels are made by ``make(kind, *arguments)`` meanwhile, where Triton is one that we know."""
    with contextlib.ExitStack() as stack:
        for kernel in {id(kernel): kernel for kernel in kernels}.values():
            if isinstance(kernel, JITFunction) and TRITON in KNOWN_TRITON:
                kernel.device_caches[driver.active.get_current_device()]  # which sets the next, where it was not asked
                stack.callback(setattr, kernel, "ASTSource", kernel.ASTSource)
                kernel.ASTSource = functools.partial(make, kernel.ASTSource)
        yield


def compile_missing(missing: Missing) -> None:
    """Compiles the kernels of a recording for the current device.

    All are handed in before the first begins: 0.3 s for 17 of them on two cores, where against threads that parse,
    each of which wants Python's lock, it took 1.0 to 1.4 s. Those with most arguments, the longest, go first.
    """
    handed_in = threading.Event()

    def compile_all(pool: ThreadPoolExecutor) -> None:
        in_turn = _InTurn(pool)
        with triton.AsyncCompileMode(in_turn), _sources_by(in_turn.source, (kernel for kernel, _ in missing.values())):
            try:
                for _, warmup in sorted(missing.values(), key=lambda entry: -len(entry[0].arg_names)):
                    warmup()
            finally:
                handed_in.set()

    with compile_lock, ThreadPoolExecutor(2 * cpu_count(), initializer=handed_in.wait) as pool:
        # In a context of its own: where a compilation fails or is interrupted, Triton 3.6 leaves the mode on, and with
        # it nothing more can be compiled.
        contextvars.copy_context().run(compile_all, pool)
        compiled = {key: warmup() for key, (_, warmup) in missing.items()}  # they are in Triton's own cache now
        for kernel in compiled.values():
            if kernel is not None:  # None: Triton's interpreter
                kernel.run  # noqa: B018  Triton loads launcher and binary when this is first asked for
                if kernel.function is None:  # that failed before, for want of memory
                    kernel._init_handles()
    compiled_kernels.update(compiled)
