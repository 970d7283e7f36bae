"""The rules that tiles follow, where nothing but a clock would notice a change."""

import importlib
import sys
import types
import warnings

import pytest
import torch
from aot import FAMILIES, PROCESSORS
from conftest import inner


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_an_activation_has_16_bytes_a_thread(kernel, family, dtype):
    tiles = inner(kernel, "tiles")
    gpu = tiles.Gpu(family.name, family.shared_memory, PROCESSORS)
    for rows in (16, 128):
        tile = tiles.act_tile(rows, dtype, gpu)
        assert tile.block_m * tile.block_n * dtype.itemsize == 16 * tile.num_warps * family.warp_size
        assert rows % tile.block_m == 0


def test_descriptors_are_for_gpus_with_tma(kernel):
    has_tma = inner(kernel, "triton_kernels.device").has_tma
    assert {family: has_tma(family) for family in FAMILIES} == {
        family: family in ("sm_90", "sm_100", "sm_120") for family in FAMILIES
    }
    assert has_tma("sm_103") and has_tma("sm_121") and has_tma("unknown")  # XPU's and the interpreter's


@pytest.mark.parametrize(
    ("name", "rows", "depth"), [("sm_80", 128, 64), ("sm_86", 128, 32), ("sm_89", 128, 32), ("sm_120", 64, 64)]
)
def test_two_blocks_share_a_processor_where_products_are_a_warps_own(kernel, name, rows, depth):
    """One block of 8 warps took a third longer; what both hold in flight fits."""
    tiles = inner(kernel, "tiles")
    gpu = tiles.Gpu(name, FAMILIES[name].shared_memory, PROCESSORS)
    for gathered in (True, False):
        tile = tiles.gemm_tile(gathered, rows, 1536, torch.bfloat16, gpu)
        assert (tile.block_m, tile.block_k, tile.num_warps, tile.programs_per_processor) == (rows, depth, 4, 2)
        assert 2 * (tile.num_stages - 1) * (rows + tile.block_n) * depth * 2 <= gpu.shared_memory


def test_a_gpu_of_intels_has_as_many_programs_as_subslices(kernel, monkeypatch):
    device = inner(kernel, "triton_kernels.device")
    properties = types.SimpleNamespace(gpu_subslice_count=128)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: properties)
    assert device._gpu.__wrapped__("xpu", 0).processors == 128


@pytest.mark.parametrize(
    ("name", "known"),
    [("sm_103", "sm_100"), ("sm_110", "sm_100"), ("sm_121", "sm_120"), ("gfx1151", "gfx1100"), ("gfx1201", "gfx1100")],
)
def test_a_gpu_that_is_not_compiled_for_has_the_tiles_of_its_kin(kernel, name, known):
    """With another kind's tiles an RX 9070's products spilled 1328 bytes a thread, and a B300's were half as deep."""
    tiles = inner(kernel, "tiles")
    shared_memory = FAMILIES[known].shared_memory
    ours, kin = (tiles.Gpu(architecture, shared_memory, PROCESSORS) for architecture in (name, known))
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (16, 64, 128):
            assert tiles.gemm_tile(True, rows, 1536, dtype, ours) == tiles.gemm_tile(True, rows, 1536, dtype, kin)
            assert tiles.shrink_tile(rows, 16, dtype, ours) == tiles.shrink_tile(rows, 16, dtype, kin)
        for rank in (16, 64, 1536):
            assert tiles.gram_tile(2048, rank, dtype, ours) == tiles.gram_tile(2048, rank, dtype, kin)
        assert tiles.shrink_gram_tile(2048, 16, dtype, ours) == tiles.shrink_gram_tile(2048, 16, dtype, kin)


def test_a_gpu_whose_tensor_cores_triton_does_not_use_is_warned_of(kernel, monkeypatch):
    properties = {"minor": 5, "shared_memory_per_block_optin": 2**16, "multi_processor_count": 40}
    device = inner(kernel, "triton_kernels.device")
    for major, warned in ((7, 1), (8, 0)):
        answer = types.SimpleNamespace(major=major, **properties)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, answer=answer: answer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert device._gpu.__wrapped__("cuda", 0).architecture == f"sm_{major}5"
        assert ["tensor cores of sm_75" in str(warning.message) for warning in caught] == [True] * warned


@pytest.mark.parametrize("num_experts", [1, 2, 7, 8, 60, 128, 512])
@pytest.mark.parametrize("num_slots", [4097, 16384, 65536, 65537, 262144, 1000003])
def test_a_schedule_holds_the_chunks_of_any_routing(kernel, num_slots, num_experts):
    """The most chunks are those of experts that have one row more than a chunk; and half of them are further ones."""
    tiles = inner(kernel, "tiles")
    chunk, room = tiles.chunk_rows(num_slots, num_experts), tiles.num_chunks(num_slots, num_experts)
    assert chunk % 64 == 0 and 2048 <= chunk
    hot = min(num_experts, num_slots // (chunk + 1))
    rest = num_slots - hot * (chunk + 1)
    assert 2 * hot + rest // chunk <= room and (hot == 0 or tiles.cdiv(num_slots, chunk) <= room)
    assert room // 2 >= (num_slots - 1) // chunk
    for tile_rows in (16, 32, 64, 128):
        row_tiles = tiles.num_row_tiles(num_slots, num_experts, tile_rows)
        if tile_rows == tiles.block_m(num_slots, num_experts) or tile_rows == 128:
            assert 1 + row_tiles + room <= tiles.schedule_size(num_slots, num_experts)


def test_tuning_has_no_kernels_of_hoppers_own(kernel, monkeypatch):
    """They have no tiles to choose: timed in place of the general ones they would make all candidates alike."""
    for name in ("device", "gram"):
        monkeypatch.setattr(inner(kernel, f"triton_kernels.{name}"), "has_hopper_kernels", lambda architecture: True)
    assert importlib.import_module("tune").load() is kernel
    package = f"{kernel.__name__}.triton_kernels"
    asked = [getattr(module, "has_hopper_kernels", None) for name, module in sys.modules.items() if package in name]
    assert not any(ask("sm_90") for ask in asked if ask)
