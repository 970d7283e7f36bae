"""The benchmark of `kernels benchmark`: one experts layer with LoRA, verified against the definition."""

from __future__ import annotations

import torch
from kernels.benchmark import Benchmark


class MoeMlpBenchmark(Benchmark):
    """A small experts layer on the CPU, one of Qwen3-30B-A3B's on a GPU."""

    seed = 0

    def setup(self) -> None:
        on_gpu = self.device != "cpu"
        T, H, I, E, k, r = (8192, 2048, 768, 128, 8, 16) if on_gpu else (256, 128, 64, 8, 2, 8)  # noqa: E741
        options = {"device": self.device, "dtype": torch.bfloat16 if on_gpu else torch.float32}
        self.x = torch.randn(T, H, **options)
        self.gate_up = torch.randn(E, 2 * I, H, **options) * H**-0.5
        self.down = torch.randn(E, H, I, **options) * I**-0.5
        self.index = torch.rand(T, E, device=self.device).topk(k).indices
        self.weights = torch.rand(T, k, **options)
        self.loras = {
            "gate_up_lora": self.kernel.ExpertLoRA(
                torch.randn(E, r, H, **options) * H**-0.5, torch.randn(E, 2 * I, r, **options) * 0.1, 2.0
            ),
            "down_lora": self.kernel.ExpertLoRA(
                torch.randn(E, r, I, **options) * I**-0.5, torch.randn(E, H, r, **options) * 0.1, 2.0
            ),
        }

    def benchmark_moe_mlp(self) -> None:
        self.out = self.kernel.moe_mlp(self.x, self.gate_up, self.down, self.index, self.weights, **self.loras)

    def verify_moe_mlp(self) -> torch.Tensor:
        return self.kernel.reference.moe_mlp(self.x, self.gate_up, self.down, self.index, self.weights, **self.loras)
