"""A newer NVIDIA GPU that runs the code for an older one: Triton compiles for that, ptxas assembles for this.

For GPUs that nobody here has: their tiles, their way to load operands (`cp.async`) and to multiply (`mma.sync`), and
so their numbers. Not their speed, but which of two kernels takes longer.
"""

from __future__ import annotations

import types

import pytest
import torch
from aot import FAMILIES

OLDER = ("sm_80", "sm_86", "sm_89")


def run_code_for(name: str) -> None:
    """For the rest of the process; a GPU that is no newer ends the tests, as passed and in words."""
    if not torch.cuda.is_available() or torch.version.hip or torch.cuda.get_device_capability() < (9, 0):
        pytest.exit(
            f"SKIPPED: code for {name} is run on NVIDIA's GPUs from sm_90 on. Nothing was tested.", returncode=0
        )
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    older = FAMILIES[name]
    assert isinstance(older.arch, int)
    target = GPUTarget(older.backend, older.arch, older.warp_size)
    here = driver.active.get_current_target().arch
    properties_of, assemble = torch.cuda.get_device_properties, CUDABackend.make_cubin

    def get_device_properties(device=None):
        properties = properties_of(device)
        known = {field: getattr(properties, field) for field in dir(properties) if not field.startswith("_")}
        known |= {"major": older.arch // 10, "minor": older.arch % 10}
        return types.SimpleNamespace(**known | {"shared_memory_per_block_optin": older.shared_memory})

    torch.cuda.get_device_properties = get_device_properties
    driver.active.get_current_target = lambda: target
    CUDABackend.make_cubin = lambda self, src, metadata, options, _: assemble(self, src, metadata, options, here)
