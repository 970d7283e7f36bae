"""The rules that tiles follow, where nothing but a clock would notice a change."""

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
