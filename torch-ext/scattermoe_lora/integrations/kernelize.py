"""`kernelize(model)`: switches every experts module of a transformers model to the fused path, and says which."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from .experts import experts_forward, fused_activation, is_experts, unsupported
from .peft import is_param_wrapper, param_wrapper_forward, unwrap

IMPLEMENTATION = "scattermoe_lora"


@dataclass(frozen=True)
class Switched:
    """One experts module on the fused path.

    Attributes:
        name: its path in the model; experts_class: its class.
        lora: the parameters that PEFT wraps, empty without adapters.
        activation: the fused activation, or ``own`` for the module's function between two fused products.
    """

    name: str
    experts_class: str
    lora: tuple[str, ...]
    activation: str


@dataclass(frozen=True)
class Report:
    """What `kernelize` did: the modules it switched, and those it left with the reason."""

    switched: tuple[Switched, ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        with_lora = sum(bool(entry.lora) for entry in self.switched)
        lines = [f"scattermoe-lora: {len(self.switched)} experts modules switched, {with_lora} of them with LoRA"]
        for entry in self.switched:
            lora = f"LoRA on {', '.join(entry.lora)}" if entry.lora else "no LoRA"
            lines.append(f"  {entry.name} ({entry.experts_class}): {lora}; activation {entry.activation}")
        lines += [f"  left as it was: {name}: {reason}" for name, reason in self.left]
        return "\n".join(lines)


def register(name: str = IMPLEMENTATION) -> str:
    """Makes the fused path an experts implementation of transformers: ``experts_implementation=name`` chooses it.

    Returns:
        The name.

    Raises:
        ImportError: transformers is missing or older than 5.0.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError("scattermoe-lora: register needs transformers with experts implementations (5.0)") from error
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    return name


def kernelize(model: nn.Module) -> Report:
    """Switches every experts module of a model to the fused path: forward and backward, LoRA included.

    Call it on a transformers model, before or after PEFT wraps it. Experts run through transformers' own dispatch
    (``config._experts_implementation``); PEFT's wrappers around them get a forward that merges nothing. Parameters,
    state dict and adapters stay as they are.

    Args:
        model: a transformers model, a PEFT model, or any module that holds experts of transformers.

    Returns:
        A `Report`; ``print`` it to see which modules were taken, which not and why.

    Raises:
        ValueError: no experts module could be switched.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    switched: list[Switched] = []
    left: list[tuple[str, str]] = []
    for name, experts in modules.items():
        if not is_experts(experts):
            continue
        reason = unsupported(experts)
        if reason is not None:
            left.append((name, reason))
            continue
        outer_name = name
        while outer_name and is_param_wrapper(modules.get(_parent(outer_name))):
            outer_name = _parent(outer_name)
        switched.append(_switch(modules, name, outer_name))
    if not switched:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in left)
        raise ValueError(
            f"kernelize: {type(model).__name__} has no experts module that can be switched"
            + (reasons or "; is it a mixture-of-experts model of transformers 5?")
        )
    return Report(tuple(switched), tuple(left))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _switch(modules: dict[str, Any], name: str, outer_name: str) -> Switched:
    """Switches one experts module, its PEFT wrappers if it has any, and sees to wrappers that come later."""
    experts, outer = modules[name], modules[outer_name]
    experts.config._experts_implementation = register()
    fuse_wrapper(outer)
    if outer_name:
        parent, attribute = modules[_parent(outer_name)], outer_name.rpartition(".")[2]
        if attribute not in (getattr(hook, "attribute", None) for hook in parent._forward_pre_hooks.values()):
            parent.register_forward_pre_hook(_FuseLater(attribute))
    activation = fused_activation(experts)
    return Switched(
        name=outer_name,
        experts_class=type(experts).__name__,
        lora=tuple(wrapper.parameter_name for wrapper in reversed(unwrap(outer)[0])),
        activation=activation if isinstance(activation, str) else "own",
    )


def fuse_wrapper(module: Any) -> None:
    """Gives the outermost `ParamWrapper` around experts the forward that merges nothing; other modules are left."""
    if is_param_wrapper(module) and "forward" not in module.__dict__:
        module.forward = MethodType(param_wrapper_forward, module)


@dataclass(frozen=True)
class _FuseLater:
    """A forward pre-hook of the block that holds experts as ``attribute``: PEFT may wrap them after `kernelize`."""

    attribute: str

    def __call__(self, parent: nn.Module, args: object) -> None:
        fuse_wrapper(getattr(parent, self.attribute))
