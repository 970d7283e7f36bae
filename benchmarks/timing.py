"""How scripts time the GPU: medians of CUDA events, of calls as they are or as graphs."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch


def median_ms(function: Callable[[], Any], repeats: int = 15, calls: int = 1) -> float:
    """Milliseconds of one call, the median of ``repeats`` after three to warm up.

    With ``calls`` > 1 that many are timed together: a single short one would be timed by its launch.
    """
    for _ in range(3):
        function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def graph(call: Callable[[], Any]) -> Callable[[], None]:
    """A call as a CUDA graph; what it allocates stays the graph's."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        call()
    return captured.replay


def median_cold_ms(call: Callable[[], Any], repeats: int) -> float:
    """Milliseconds of a call, calls following one another, L2 flushed before each."""
    call()
    scratch = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        start.record()
        call()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in times)
