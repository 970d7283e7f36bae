"""`ParallelExperts`: an expert stack as an `nn.Module`, with LoRA factors as real parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .checks import Arguments
from .parallel_linear import parallel_linear, parallel_linear_lora
from .types import ExpertLoRA


class ParallelExperts(nn.Module):
    """``E`` linear layers, of which each slot uses its own (ScatterMoE's class of that name).

    Attributes:
        weight: ``[E, out, in]``; bias: ``[E, out]`` or None.
        lora_A: ``[E * r, in]``, lora_B: ``[out, E * r]``, expert-major, or None: see `set_lora`.
        scaling: the LoRA scaling, a float that is not part of the state dict.
    """

    def __init__(self, num_experts: int, input_size: int, output_size: int, bias: bool = False) -> None:
        super().__init__()
        args = Arguments("ParallelExperts")
        for name, size in (("num_experts", num_experts), ("input_size", input_size), ("output_size", output_size)):
            args.count(name, size)
        args.flag("bias", bias)
        self.num_experts = num_experts
        self.input_size = input_size
        self.output_size = output_size
        self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))
        self.bias = nn.Parameter(torch.empty(num_experts, output_size)) if bias else None
        self.lora_A: nn.Parameter | None
        self.lora_B: nn.Parameter | None
        self.register_parameter("lora_A", None)
        self.register_parameter("lora_B", None)
        self.scaling = 1.0
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.02 and zero biases, as ScatterMoE has them."""
        nn.init.normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def set_lora(self, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> None:
        """Makes the factors parameters of this module: they move, save and train with it.

        Args:
            lora_A: ``[E * r, in]``, lora_B: ``[out, E * r]``, expert-major. A Parameter is kept as it is.
            scaling: multiplies the update.

        Raises:
            TypeError, ValueError: factors that do not fit; the module is then as it was.
        """
        lora = ExpertLoRA.from_expert_major(lora_A, lora_B, self.num_experts, scaling)
        if (lora.in_features, lora.out_features) != (self.input_size, self.output_size):
            raise ValueError(
                f"set_lora: lora_A and lora_B must be [E * r, {self.input_size}] and [{self.output_size}, E * r], "
                f"got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
            )
        self.lora_A = lora_A if isinstance(lora_A, nn.Parameter) else nn.Parameter(lora_A)
        self.lora_B = lora_B if isinstance(lora_B, nn.Parameter) else nn.Parameter(lora_B)
        self.scaling = scaling

    def clear_lora(self) -> None:
        """Takes the factors off."""
        self.lora_A = self.lora_B = None

    def forward(
        self,
        inputs: Tensor,
        k: int,
        sorted_expert_idxs: Tensor,
        sorted_scattered_idxs: Tensor,
        expert_offsets: Tensor,
        gates: Tensor | None = None,
        grouped_in: bool = False,
        grouped_out: bool = False,
    ) -> Tensor:
        """See `parallel_linear` and `parallel_linear_lora`."""
        routing = (k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets)
        rest: dict[str, Any] = {
            "expert_biases": self.bias,
            "gates": gates,
            "grouped_in": grouped_in,
            "grouped_out": grouped_out,
        }
        if self.lora_A is None:
            return parallel_linear(inputs, self.weight.mT, *routing, **rest)
        return parallel_linear_lora(
            inputs, self.weight.mT, *routing, lora_A=self.lora_A, lora_B=self.lora_B, scaling=self.scaling, **rest
        )

    def extra_repr(self) -> str:
        text = f"{self.num_experts}, {self.input_size}, {self.output_size}, bias={self.bias is not None}"
        return text if self.lora_A is None else f"{text}, lora_rank={self.lora_A.shape[0] // self.num_experts}"
