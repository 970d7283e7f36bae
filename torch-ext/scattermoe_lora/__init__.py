"""ScatterMoE with LoRA fused into the grouped products: fast, lean fine-tuning of mixture-of-experts models."""

from . import kernels, layers, reference
from .activation import activate
from .integrations.kernelize import Report, kernelize, register, unkernelize
from .layers.mapping import kernel_mapping
from .moe_mlp import moe_mlp
from .parallel_experts import ParallelExperts
from .parallel_linear import flatten_sort_count, parallel_linear, parallel_linear_lora
from .types import ExpertLoRA

__all__ = [
    "ExpertLoRA",
    "ParallelExperts",
    "Report",
    "activate",
    "flatten_sort_count",
    "kernel_mapping",
    "kernelize",
    "kernels",
    "layers",
    "moe_mlp",
    "parallel_linear",
    "parallel_linear_lora",
    "reference",
    "register",
    "unkernelize",
]
