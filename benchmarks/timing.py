"""How scripts time the GPU: medians of CUDA events."""

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
