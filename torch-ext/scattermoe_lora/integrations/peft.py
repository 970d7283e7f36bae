"""The fused forward of PEFT's `ParamWrapper` around experts: adapter factors go into the kernel, nothing merges."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from ..types import ExpertLoRA
from .experts import (
    call_with_loras,
    decorates,
    dispatches,
    fused_experts,
    has_another_forward,
    has_hooks,
    is_experts,
    runs_experts_forward,
    unsupported,
    up_name,
)


def is_param_wrapper(module: object) -> bool:
    """Whether a module is PEFT's wrapper of a parameter. Without PEFT imported nothing can be."""
    layer = sys.modules.get("peft.tuners.lora.layer")
    return layer is not None and isinstance(module, layer.ParamWrapper)


def unwrap(module: Any) -> tuple[list[Any], Any]:
    """The nested wrappers, outermost first, and the module inside them."""
    wrappers = []
    while is_param_wrapper(module):
        wrappers.append(module)
        module = module.base_layer
    return wrappers, module


def param_wrapper_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`ParamWrapper.forward` with the same result. Where it can't be fused, it is PEFT's own forward that runs."""
    wrappers, experts = unwrap(self)
    loras = None
    if len(args) == 2 and not kwargs and not _runs_another(wrappers, experts):
        loras = _loras(wrappers, experts)
    if loras is not None and (has_hooks([experts]) or decorates(experts) or experts._is_expert_parallel):
        if runs_experts_forward(experts):
            own = {name: _of_own_experts(loras[name], experts, name) for name in loras}
            return call_with_loras(experts, own, x, *args)
        loras = None
    if loras is None:
        return type(self).forward(self, x, *args, **kwargs)
    top_k_index, top_k_weights = args
    return fused_experts(experts, x, top_k_index, top_k_weights, loras)


def _runs_another(wrappers: list[Any], experts: Any) -> bool:
    """Whether something inside would be passed over: hooks, a forward that was put there, or the user's choice.

    Hooks of the experts, and what decorates their forward, are not, as they are called then.
    """
    if has_hooks(wrappers[1:]) or any(map(has_another_forward, wrappers[1:])):
        return True
    if has_another_forward(experts) and not decorates(experts):
        return True
    # Chosen since `kernelize`. Switched on otherwise, it is not by the config's choice.
    return "_scattermoe_lora_replaced" in vars(experts) and not (dispatches(experts) and runs_experts_forward(experts))


def _of_own_experts(lora: ExpertLoRA, experts: Any, name: str) -> ExpertLoRA:
    """Under transformers' expert parallelism: the factors of this rank's experts.

    Every rank holds all adapters and computes the gradients of its own experts'; backward gathers those of the others.
    """
    if not experts._is_expert_parallel:
        return lora
    from torch.distributed.tensor import DTensor, Replicate, Shard

    weight = getattr(experts, name)
    # With other tokens on each rank transformers shards the experts by FSDP as well, if only over one process.
    if not isinstance(weight, DTensor) or weight.placements != (Shard(0),):
        raise NotImplementedError(
            f"scattermoe-lora: LoRA on {name} works under expert parallelism where all ranks have the same tokens "
            "(fsdp_size=1 and ep_size=tp_size in transformers' DistributedConfig), not where FSDP shards the experts "
            "as well"
        )
    A, B = (
        DTensor.from_local(factor, weight.device_mesh, [Replicate()], run_check=False)
        .redistribute(placements=weight.placements)
        .to_local()
        for factor in (lora.A, lora.B)
    )
    return ExpertLoRA(A, B, lora.scaling)


def _loras(wrappers: list[Any], experts: Any) -> dict[str, ExpertLoRA] | None:
    """The active adapters of each wrapped parameter; None where PEFT must do it."""
    if not is_experts(experts) or unsupported(experts):
        return None
    loras: dict[str, ExpertLoRA] = {}
    for wrapper in wrappers:
        if wrapper.parameter_name not in (up_name(experts), "down_proj") or wrapper.parameter_name in loras:
            return None
        lora = active_lora(wrapper)
        if lora is not None:
            loras[wrapper.parameter_name] = lora
    return loras


def active_lora(wrapper: Any) -> ExpertLoRA | None:
    """The update that a `ParamWrapper` applies now; None if its adapters are disabled or merged, or none is active.

    As PEFT's own forward does, it unmerges what is merged while adapters are disabled. Several active adapters are one
    whose rank is the sum of theirs.
    """
    if wrapper.disable_adapters and wrapper.merged:
        wrapper.unmerge()
    if wrapper.disable_adapters or wrapper.merged:
        return None
    loras = [
        ExpertLoRA.from_peft(
            wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.num_experts, wrapper.scaling[name]
        )
        for name in wrapper.active_adapters
        if name in wrapper.lora_A
    ]
    if len(loras) < 2:
        return loras[0] if loras else None
    A = torch.cat([lora.A for lora in loras], dim=1)
    return ExpertLoRA(A, torch.cat([lora.scaling * lora.B for lora in loras], dim=2))
