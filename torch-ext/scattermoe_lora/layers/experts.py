"""Layers that replace an experts module, and PEFT's wrapper around one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..integrations.experts import experts_forward
from ..integrations.peft import param_wrapper_forward


class ScatterMoEExperts(nn.Module):
    """Replaces the forward of any transformers experts class (``@use_experts_implementation``)."""

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states [T, H]``, ``top_k_index [T, k]``, ``top_k_weights [T, k]``; returns ``[T, H]``."""
        return experts_forward(self, hidden_states, top_k_index, top_k_weights)


class ScatterMoEParamWrapper(nn.Module):
    """Replaces the forward of PEFT's ``ParamWrapper`` around experts: same result, no merged weight."""

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x [T, H]``, then the experts' ``top_k_index`` and ``top_k_weights``; returns ``[T, H]``."""
        return param_wrapper_forward(self, x, *args, **kwargs)
