"""`kernelize(model)`: switches every experts module of a transformers model to the fused path, and says which.

`unkernelize(model)` undoes it.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pickle import PicklingError
from typing import Any, NoReturn

from torch import Tensor, nn

from ..checks import probability
from .experts import (
    calls_what_was_there,
    dispatches,
    experts_forward,
    forward_slot,
    fused_activation,
    is_experts,
    put_forward,
    unsupported,
)
from .peft import is_param_wrapper, param_wrapper_forward, unwrap
from .versions import warn_of_untested

IMPLEMENTATION = "scattermoe_lora"

# The names that `kernel_mapping` gives to experts classes and to PEFT's wrapper of parameters.
EXPERTS_NAME = "ScatterMoEExperts"
WRAPPER_NAME = "ScatterMoEParamWrapper"


@dataclass(frozen=True)
class Switched:
    """One experts module on the fused path.

    Attributes:
        name: its path in the model; experts_class: its class.
        lora: the parameters that PEFT wraps, empty without adapters.
        activation: the fused activation, or ``own`` for the module's function between two fused products.
        replaced: the experts implementation that gave way, as `unkernelize` brings it back: transformers' default is
            ``grouped_mm``, ``eager`` is the module's own forward.
        lora_dropout: the dropout of the input of its LoRA in train mode.
    """

    name: str
    experts_class: str
    lora: tuple[str, ...]
    activation: str
    replaced: str
    lora_dropout: float


@dataclass(frozen=True)
class Report:
    """What `kernelize` did: the modules it switched, and those it left with the reason.

    Attributes:
        switched: a `Switched` for each module on the fused path, in the model's order.
        left: ``(path, reason)`` of each experts module that runs what it ran before.
    """

    switched: tuple[Switched, ...]
    left: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        with_lora = sum(bool(entry.lora) for entry in self.switched)
        lines = [f"scattermoe-lora: {len(self.switched)} experts modules switched, {with_lora} of them with LoRA"]
        for entry in self.switched:
            lora = f"LoRA on {', '.join(entry.lora)}" if entry.lora else "no LoRA"
            if entry.lora_dropout:
                lora += f" (dropout {entry.lora_dropout:g})"
            lines.append(
                f"  {entry.name} ({entry.experts_class}): {lora}; activation {entry.activation}; "
                f"in place of {entry.replaced}"
            )
        lines += [f"  left as it was: {name}: {reason}" for name, reason in self.left]
        return "\n".join(lines)


def register(name: str = IMPLEMENTATION) -> str:
    """Makes the fused path an experts implementation of transformers: ``experts_implementation=name`` chooses it.

    Returns:
        The name.

    Raises:
        ImportError: transformers is missing or older than 5.0.
        TypeError: the name is no string.
        ValueError: it is empty, or one of transformers' own.
    """
    if not isinstance(name, str):
        raise TypeError(f"register: name must be a str, got {type(name).__name__}")
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError("scattermoe-lora: register needs transformers with experts implementations (5.0)") from error
    known = ALL_EXPERTS_FUNCTIONS.get(name)
    if name in ("", "eager") or getattr(known, "__module__", "").startswith("transformers."):
        raise ValueError(f"register: name must be none of transformers' own experts implementations, got {name!r}")
    warn_of_untested()
    ALL_EXPERTS_FUNCTIONS.register(name, experts_forward)
    return name


def kernelize(model: nn.Module, *, lora_dropout: float = 0.0) -> Report:
    """Switches every experts module of a model to the fused path: forward and backward, LoRA included.

    Call it on a transformers model, before or after PEFT wraps it. Experts run through transformers' own dispatch
    (``config._experts_implementation``); PEFT's wrappers around them get a forward that merges nothing. Parameters,
    state dict and adapters stay as they are.

    Give it the whole model: experts share their config, by which transformers chooses, so that given a part of a model
    it switches the rest too, which the report does not know.

    The experts implementation that was chosen gives way (`Switched.replaced`). A forward that something else put on
    the experts, on their wrapper or on their block (a kernel of transformers' own mapping, Liger's) stays, and the
    report says which.

    Args:
        model: a transformers model, a PEFT model, or any module that holds experts of transformers.
        lora_dropout: probability of dropping an element of what the experts' LoRA reads, in ``[0, 1)``, in train mode
            only: ``y = W x + scaling * B A dropout(x)``, see `moe_mlp`. PEFT itself takes only 0 for experts. A second
            call sets it anew.

    Returns:
        A `Report`; ``print`` it to see which modules were taken, which not and why.

    Raises:
        TypeError: ``model`` is no module.
        TypeError, ValueError: ``lora_dropout`` is no probability below 1.
        ValueError: no experts module could be switched.
    """
    _check_model("kernelize", model)
    lora_dropout = probability("kernelize", "lora_dropout", lora_dropout)
    warn_of_untested()
    modules: dict[str, Any] = dict(model.named_modules())
    uses_kernels = any(getattr(module, "use_kernels", False) is True for module in modules.values())
    taken: list[tuple[str, str]] = []
    left: list[tuple[str, str]] = []
    for name, experts in modules.items():
        if not is_experts(experts):
            if _looks_like_experts(experts):
                cls = type(experts).__name__
                left.append((name, f"{cls} takes no experts implementation (@use_experts_implementation)"))
            continue
        outer_name = name
        while outer_name and is_param_wrapper(modules.get(_parent(outer_name))):
            outer_name = _parent(outer_name)
        reason = unsupported(experts) or _held(modules, outer_name, uses_kernels)
        if reason is None:
            taken.append((name, outer_name))
        else:
            left.append((name, reason))
    if not taken:
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in left)
        raise ValueError(
            f"kernelize: {type(model).__name__} has no experts module that can be switched"
            + (reasons or "; is it a mixture-of-experts model of transformers 5?")
        )
    # Before anything is written, as it may fail on a module that lacks what its class has.
    activations = {name: fused_activation(modules[name]) for name, _ in taken}
    register()
    # Before the first is switched: experts share their config, which chooses the implementation.
    for name, _ in taken:
        experts = modules[name]
        chosen = experts.config._experts_implementation
        if chosen != IMPLEMENTATION or "_scattermoe_lora_replaced" not in vars(experts):
            experts._scattermoe_lora_replaced = chosen
        experts._scattermoe_lora_dropout = lora_dropout
    switched = (_switch(modules, name, outer_name, activations[name]) for name, outer_name in taken)
    return Report(tuple(switched), tuple(left))


def unkernelize(model: nn.Module) -> tuple[str, ...]:
    """Undoes `kernelize`, however often it was called: the experts implementation, PEFT's forward, hooks, dropout.

    Returns:
        The paths of the experts modules that run again what they ran before; empty for a model that was not
        kernelized.

    Raises:
        TypeError: ``model`` is no module.
    """
    _check_model("unkernelize", model)
    restored = []
    for name, module in model.named_modules():
        if "_scattermoe_lora_replaced" in vars(module):
            # Ours gave way to itself where a module's config had been switched with another module.
            if module._scattermoe_lora_replaced != IMPLEMENTATION:
                module.config._experts_implementation = {"": module._scattermoe_lora_replaced}
            del module._scattermoe_lora_replaced, module._scattermoe_lora_dropout
            restored.append(name)
        if is_param_wrapper(module) and put_forward(module) is param_wrapper_forward:
            if forward_slot(module) == "forward":
                del module.forward
            else:  # a hook's own forward stays
                module._old_forward = type(module).forward.__get__(module)
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _FuseLater):
                del module._forward_pre_hooks[key]
    return tuple(restored)


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _looks_like_experts(module: nn.Module) -> bool:
    """Whether a module is called experts, as Llama 4's and those that MXFP4 puts in the place of gpt-oss's, or has an
    expert stack and takes ids and weights."""
    name = type(module).__name__
    if name.endswith("Experts") and not name.endswith("SharedExperts"):  # which every token has
        return True
    weight = module._parameters.get("down_proj")
    stacked = isinstance(weight, Tensor) and weight.dim() == 3
    return stacked and len(inspect.signature(type(module).forward).parameters) == 4


def _held(modules: dict[str, Any], outer_name: str, uses_kernels: bool) -> str | None:
    """What holds an experts module, so that a switch would not be what runs; None if nothing does.

    Looked at are the experts, PEFT's wrappers around them, and the block that calls them.
    """
    wrappers, experts = unwrap(modules[outer_name])
    block = [modules[_parent(outer_name)]] if outer_name else []
    for module in (*wrappers, experts, *block):
        what = "it" if module is experts else type(module).__name__
        function = put_forward(module)
        if function is not None:
            if calls_what_was_there(function):
                continue
            return f"{what} runs {function.__module__}.{function.__qualname__}, which stays; take it off first"
        layer = getattr(type(module), "kernel_layer_name", None)
        if uses_kernels and layer not in (None, EXPERTS_NAME, WRAPPER_NAME):
            return f"{what} runs what use_kernels maps {layer} to, which stays; use_kernels=False, or map it to ours"
    if not dispatches(experts):
        function = type(experts).forward
        return f"it runs {function.__module__}.{function.__qualname__}, its class's own, which stays"
    return None


def _switch(modules: dict[str, Any], name: str, outer_name: str, activation: object) -> Switched:
    """Switches one experts module, its PEFT wrappers if it has any, and sees to wrappers that come later."""
    experts, outer = modules[name], modules[outer_name]
    experts.config._experts_implementation = {"": IMPLEMENTATION}  # of this config, not of those inside it
    fuse_wrapper(outer)
    if outer_name:
        parent, attribute = modules[_parent(outer_name)], outer_name.rpartition(".")[2]
        if attribute not in (getattr(hook, "attribute", None) for hook in parent._forward_pre_hooks.values()):
            parent.register_forward_pre_hook(_FuseLater(attribute))
    return Switched(
        name=outer_name,
        experts_class=type(experts).__name__,
        lora=tuple(wrapper.parameter_name for wrapper in reversed(unwrap(outer)[0])),
        activation=activation if isinstance(activation, str) else "own",
        replaced=experts._scattermoe_lora_replaced or "eager",
        lora_dropout=experts._scattermoe_lora_dropout,
    )


def fuse_wrapper(module: Any) -> None:
    """Gives the outermost `ParamWrapper` around experts the forward that merges nothing; other modules are left."""
    if not is_param_wrapper(module):
        return
    slot = forward_slot(module)
    # Its class's own is there under a hook, after one that was taken off, and where `kernels` has nothing better.
    if slot not in vars(module) or getattr(vars(module)[slot], "__func__", None) is type(module).forward:
        setattr(module, slot, _FusedForward(module))


class _FusedForward:
    """`param_wrapper_forward` of a wrapper, without keeping it alive: a deleted model is freed at once, as PEFT's is.

    With a partial, or a bound method (which Dynamo can't make), it would wait for Python's garbage collector with all
    its experts.
    """

    func = staticmethod(param_wrapper_forward)  # named as a partial's, for `put_forward`

    def __init__(self, wrapper: nn.Module) -> None:
        self.wrapper: Callable[[], Any] = weakref.ref(wrapper)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return param_wrapper_forward(self.wrapper(), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _FusedForward:
        return _FusedForward(copy.deepcopy(self.wrapper(), memo))

    def __reduce__(self) -> NoReturn:
        _refuse_to_pickle()


def _refuse_to_pickle() -> NoReturn:
    raise PicklingError(
        "scattermoe-lora: a kernelized model can't be pickled: it holds functions of a kernel, which each process "
        "loads under a name of its own. Save adapters or weights by save_pretrained, or unkernelize(model) first"
    )


@dataclass(frozen=True)
class _FuseLater:
    """A forward pre-hook of the block that holds experts as ``attribute``: PEFT may wrap them after `kernelize`.

    It can be copied but not pickled: what `torch.save` of a kernelized model wrote, no process could read again.
    """

    attribute: str

    def __call__(self, parent: nn.Module, args: object) -> None:
        fuse_wrapper(getattr(parent, self.attribute))

    def __deepcopy__(self, memo: object) -> _FuseLater:
        return self

    def __reduce__(self) -> NoReturn:
        _refuse_to_pickle()
