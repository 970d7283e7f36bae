"""The sizes that numerics and benchmarks run at: the experts layers of real models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """One experts layer: E experts, k of them a token, hidden size H, intermediate size I, transformers' layout."""

    name: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    is_transposed: bool = False
    is_concatenated: bool = True
    has_bias: bool = False

    def forward_flops(self, tokens: int) -> float:
        """Of the base products, two a multiply-add: ``6 T k H I``. A step (forward and backward) is twice that."""
        return 6.0 * tokens * self.top_k * self.hidden_size * self.intermediate_size


MODELS = {
    model.name: model
    for model in (
        Model("Qwen3-30B-A3B", 128, 8, 2048, 768),
        Model("Qwen3.5-35B-A3B", 256, 8, 2048, 512),
        Model("OLMoE-1B-7B", 64, 8, 2048, 1024),
        Model("GLM-4.5-Air", 128, 8, 4096, 1408),
        Model("Mixtral-8x7B", 8, 2, 4096, 14336),
        Model("gpt-oss-20b", 32, 4, 2880, 2880, is_transposed=True, is_concatenated=False, has_bias=True),
    )
}
