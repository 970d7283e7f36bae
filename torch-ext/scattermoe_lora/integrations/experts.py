"""The fused forward of any transformers experts module: reads its flags, weights and activation, calls `moe_mlp`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..moe_mlp import moe_mlp
from ..reference import clamped_glu
from ..types import ExpertLoRA

# What transformers' @use_experts_implementation sets on every instance: by these an experts module is known.
FLAGS = ("config", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")

# The attribute of an experts module that holds the LoRA of its next call.
HANDED_OVER = "_scattermoe_lora_factors"

# Activation modules by class name, and functions by theirs, with the fused activation that computes the same.
ACTIVATIONS = {
    "silu": "silu",
    "gelu": "gelu",
    "relu": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
    "LinearActivation": "identity",
}


# Experts with a clamped gate of their own, gpt-oss's and those that follow it: the attributes of alpha (None: 1, a
# clamped SwiGLU) and limit, and the shift.
CLAMPED_GATES = {
    "GptOssExperts": ("alpha", "limit", 1.0),
    "OpenAIPrivacyFilterExperts": ("alpha", "limit", 1.0),
    "MiniMaxM3VLExperts": ("swiglu_alpha", "swiglu_limit", 1.0),
    "DeepseekV4Experts": (None, "limit", 0.0),
    "Glm5NextTextExperts": (None, "swiglu_limit", 0.0),
    "HYV4Experts": (None, "swiglu_limit", 0.0),
    "HYV4VLExperts": (None, "swiglu_limit", 0.0),
}


def is_experts(module: nn.Module) -> bool:
    """Whether a module is an experts class of transformers, in any layout.

    Its flags are its own: what wraps experts (PEFT's `ModulesToSaveWrapper`, torch's checkpoints, FSDP) has those of
    the module inside as well, which is the one to switch.
    """
    return all(flag in vars(module) for flag in FLAGS) and hasattr(module, "down_proj")


def runs_experts_forward(experts: Any) -> bool:
    """Whether a call of an experts module ends in `experts_forward`, by its config's experts implementation."""
    moe = sys.modules.get("transformers.integrations.moe")
    return moe is not None and moe.ALL_EXPERTS_FUNCTIONS.get(experts.config._experts_implementation) is experts_forward


def unsupported(experts: Any) -> str | None:
    """Why an experts module can't take the fused path, or None if it can."""
    for name in (up_name(experts), "down_proj"):
        weight = _stored(experts, name)
        if isinstance(weight, Tensor) and (not weight.is_floating_point() or weight.dtype.itemsize < 2):
            return f"its {name} is quantised ({weight.dtype})"
        # As torchao's: other tensors inside, under the dtype that they stand for.
        if hasattr(weight, "__tensor_flatten__") and type(weight).__name__ != "DTensor":
            return f"its {name} is a {type(weight).__name__}, not a plain tensor"
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            return f"its {name} is not a [E, out, in] tensor"
    return None


def dispatches(experts: Any) -> bool:
    """Whether an experts class has the forward of @use_experts_implementation, which asks the config what runs."""
    return _module_of(type(experts).forward) == "transformers.integrations.moe"


def forward_slot(module: nn.Module) -> str:
    """The attribute for a module's ``forward``: accelerate's hook takes that name, and calls what it put aside.

    What was put over the hook since does not call it.
    """
    hooked = "_hf_hook" in vars(module) and getattr(vars(module).get("forward"), "func", None)
    return "_old_forward" if hooked and _module_of(hooked) == "accelerate.hooks" else "forward"


def put_forward(module: nn.Module) -> Any:
    """The function that was put on a module as its ``forward``, in place of its class's; None if there is none.

    That is under what bound, compiled and decorated it, accelerate's hooks among that. A module that torch compiled
    calls the one inside.
    """
    slot = forward_slot(module)
    if slot not in vars(module):
        return None
    function = _function(vars(module)[slot])
    return None if function in (nn.Module.__call__, _function(type(module).forward)) else function


def decorates(module: nn.Module) -> bool:
    """Whether a module's ``forward`` was put there around its class's, as a `functools.wraps` of it."""
    forward = vars(module).get("forward")
    return getattr(forward, "__func__", forward) not in (None, type(module).forward) and put_forward(module) is None


def calls_what_was_there(function: Any) -> bool:
    """Whether a `put_forward` is ours, or one of transformers' tensor and expert parallelism around another."""
    source = getattr(function, "__module__", "")
    return source.partition(".")[0] == __name__.partition(".")[0] or source.startswith("transformers.distributed.")


def has_another_forward(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` that is passed over where it is not called: put there, or a decorated one."""
    function = put_forward(module)
    return decorates(module) if function is None else not calls_what_was_there(function)


def _module_of(function: Any) -> str:
    """The module that a function was written in: its ``__module__`` may be another's, which it decorates."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def _function(forward: Any) -> Any:
    forward = inspect.unwrap(getattr(forward, "__func__", forward))
    forward = getattr(forward, "func", forward)  # of a partial, as ours
    return inspect.unwrap(getattr(forward, "__func__", forward))


def has_hooks(modules: list[nn.Module]) -> bool:
    """Hooks (FSDP's unsharding, accelerate's offloading, a user's) run only if the module itself is called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(any(getattr(m, name) for name in hooks) or "_hf_hook" in vars(m) for m in modules)


def up_name(experts: Any) -> str:
    """The name of the first projection's parameter."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def fused_activation(experts: Any) -> str | Callable[[Tensor], Tensor]:
    """The name of the fused activation, or the module's own function where there is none of the same formula."""
    act_fn = getattr(experts, "act_fn", None)
    name = ACTIVATIONS.get(getattr(act_fn, "__name__", type(act_fn).__name__))
    if isinstance(act_fn, nn.GELU) and act_fn.approximate == "tanh":
        name = "gelu_tanh"
    if isinstance(act_fn, nn.Module):
        # A method ``forward`` is what `kernels` maps the activation to, which computes the same, or its class's own.
        method = getattr(vars(act_fn).get("forward"), "__func__", None)
        is_put = "forward" in vars(act_fn) and getattr(method, "__name__", "") != "forward"
        if is_put or has_hooks([act_fn]) or _module_of(type(act_fn).forward) != type(act_fn).__module__:
            name = None
    if not experts.has_gate:
        return name or experts.act_fn
    gate = type(experts)._apply_gate
    if "_apply_gate" in vars(experts):
        return experts._apply_gate
    # transformers gives classes without a gate of their own this one: act(gate) * up of concatenated halves.
    if name and experts.is_concatenated and _module_of(gate) == "transformers.integrations.moe":
        return name
    # The class that the gate is of: a parametrization, as in PEFT's forward, and FSDP2 each make a class from it.
    owner = next(c for c in type(experts).__mro__ if "_apply_gate" in vars(c))
    clamped = CLAMPED_GATES.get(owner.__name__) if _module_of(gate) == owner.__module__ else None
    if clamped is not None and (name == "silu" or act_fn is None):
        alpha, limit, shift = clamped
        numbers = 1.0 if alpha is None else getattr(experts, alpha), getattr(experts, limit)
        if all(isinstance(number, (int, float)) for number in numbers):
            return clamped_glu(*numbers, shift)
    return experts._apply_gate


@dataclass
class _HandedOver:
    """The LoRA of a call of an experts module, and whether that came to use it."""

    loras: Mapping[str, ExpertLoRA]
    is_used: bool = False


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts implementation in transformers' sense: ``[T, H]``, ``[T, k]``, ``[T, k]`` to ``[T, H]``.

    LoRA is what `call_with_loras` handed over, or none. Under PEFT's own forward, which merges LoRA into the
    weights by a parametrization, the factors are taken from the parametrization: no merged weight is used (torch makes
    each once, when PEFT registers it; `kernelize` avoids that). Experts that can't be fused (`unsupported`) run their
    own forward: an experts implementation is chosen for a whole config, which they may share with others that can.
    """
    if unsupported(self):
        return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
    handed_over = self.__dict__.get(HANDED_OVER)
    if handed_over is None:
        return fused_experts(self, hidden_states, top_k_index, top_k_weights, {})
    handed_over.is_used = True
    return fused_experts(self, hidden_states, top_k_index, top_k_weights, handed_over.loras)


def call_with_loras(experts: Any, loras: Mapping[str, ExpertLoRA], *args: Tensor) -> Tensor:
    """Calls an experts module whose hooks or own forward do something, and which ends in `experts_forward`.

    The factors lie on the module meanwhile: what transformers' expert parallelism puts in between takes three tensors
    and nothing else.

    Raises:
        RuntimeError: it did not end there, so that its output is without LoRA.
    """
    handed_over, outer = _HandedOver(loras), vars(experts).get(HANDED_OVER)  # of the call whose hook this one is in
    setattr(experts, HANDED_OVER, handed_over)
    try:
        out = experts(*args)
    finally:
        vars(experts).pop(HANDED_OVER, None)
        if outer is not None:
            setattr(experts, HANDED_OVER, outer)
    if not handed_over.is_used:
        raise RuntimeError(f"scattermoe-lora: the forward of {type(experts).__name__} did not come to use its LoRA")
    return out


def fused_experts(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    loras: Mapping[str, ExpertLoRA],
) -> Tensor:
    """`moe_mlp` on an experts module, with the LoRA of each projection by parameter name.

    In train mode with the dropout that `kernelize` put on the module.

    Raises:
        RuntimeError: there is dropout, and PEFT's own forward has merged LoRA into a weight (of several adapters).
    """
    up = up_name(experts)
    lora_dropout = getattr(experts, "_scattermoe_lora_dropout", 0.0) if experts.training else 0.0
    up_weight, up_lora = _weight_and_lora(experts, up, loras)
    down_weight, down_lora = _weight_and_lora(experts, "down_proj", loras)
    if lora_dropout and (_merged(experts, up, up_lora) or _merged(experts, "down_proj", down_lora)):
        raise RuntimeError("scattermoe-lora: lora_dropout can't be applied where PEFT merges several active adapters")
    return moe_mlp(
        hidden_states,
        up_weight,
        down_weight,
        top_k_index,
        top_k_weights,
        gate_up_lora=up_lora,
        down_lora=down_lora,
        gate_up_proj_bias=getattr(experts, f"{up}_bias") if experts.has_bias else None,
        down_proj_bias=experts.down_proj_bias if experts.has_bias else None,
        is_transposed=experts.is_transposed,
        is_concatenated=experts.is_concatenated,
        has_gate=experts.has_gate,
        activation=fused_activation(experts),
        expert_norm=experts.post_expert_norm if experts.has_post_expert_norm else None,
        expert_parallel=experts._is_expert_parallel,
        lora_dropout=lora_dropout,
    )


def _stored(experts: Any, name: str) -> object:
    """The stored tensor of a parameter, without evaluating a parametrization."""
    if parametrize.is_parametrized(experts, name):
        return experts.parametrizations[name].original
    return getattr(experts, name, None)


def _weight_and_lora(experts: Any, name: str, loras: Mapping[str, ExpertLoRA]) -> tuple[Tensor, ExpertLoRA | None]:
    if parametrize.is_parametrized(experts, name):
        steps = experts.parametrizations[name]
        if name not in loras and len(steps) == 1 and type(steps[0]).__name__ == "_LoraFactorsProxy":
            # PEFT's W + scaling * lhs @ rhs, in the layout of W.
            lhs, rhs, scaling = steps[0].lhs, steps[0].rhs, steps[0].scaling
            A, B = (lhs.mT, rhs.mT) if experts.is_transposed else (rhs, lhs)
            return steps.original, ExpertLoRA(A, B, scaling)
    return getattr(experts, name), loras.get(name)


def _merged(experts: Any, name: str, lora: ExpertLoRA | None) -> bool:
    """Whether PEFT's parametrization puts LoRA into a weight."""
    if lora is not None or not parametrize.is_parametrized(experts, name):
        return False
    return any(type(step).__name__.startswith("_Lora") for step in experts.parametrizations[name])
