"""`kernel_mapping()`: this package's layers as a mapping of `kernels`, for `use_kernels` and `kernels.kernelize`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .. import layers
from ..integrations.kernelize import EXPERTS_NAME, WRAPPER_NAME
from ..integrations.versions import warn_of_untested

DEVICES = ("cpu", "cuda", "rocm", "xpu")


@dataclass(frozen=True)
class Layer:
    """A layer of this very package, as a repository of `kernels`: nothing is downloaded or loaded a second time."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return getattr(layers, self.layer_name)


def kernel_mapping(*model_types: str) -> dict[str, dict[str, Layer]]:
    """The mapping for `kernels.register_kernel_mapping` and `kernels.use_kernel_mapping`, for training and inference.

    `kernels` replaces the forward of classes that have a name, which transformers' experts classes and PEFT's
    ``ParamWrapper`` have not: those that are loaded get one here (``ScatterMoEExperts``, ``ScatterMoEParamWrapper``),
    unless they have another. So call it when the model is there, and PEFT's adapters are on it. The mapping also has
    ``MegaBlocksMoeMLP``, which is transformers' name for gpt-oss's block, and the names that axolotl gives to blocks.

    Args:
        model_types: families of transformers to load first, such as ``qwen3_moe``. For
            ``from_pretrained(..., use_kernels=True)``: the classes of a family are loaded with its first model.

    Returns:
        Layers by name and device.

    Raises:
        ImportError: `kernels` is missing, or transformers has no such family.
        TypeError: a model type that is no string.
    """
    try:
        from kernels import replace_kernel_forward_from_hub
    except ImportError as error:
        raise ImportError("scattermoe-lora: kernel_mapping needs the package kernels") from error
    for model_type in model_types:
        _load(model_type)
    warn_of_untested()
    for cls in _subclasses(nn.Module):
        if _is_experts_class(cls):
            name = EXPERTS_NAME
        elif cls is getattr(sys.modules.get("peft.tuners.lora.layer"), "ParamWrapper", None):
            name = WRAPPER_NAME
        else:
            continue
        if not hasattr(cls, "kernel_layer_name"):
            replace_kernel_forward_from_hub(cls, name)
    return {name: dict.fromkeys(DEVICES, Layer(name)) for name in layers.__all__}


def _load(model_type: str) -> None:
    """Imports the classes of a family of transformers."""
    if not isinstance(model_type, str):
        raise TypeError(f"kernel_mapping: model_types must be strings, got {type(model_type).__name__}")
    module = f"transformers.models.{model_type}.modeling_{model_type}"
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        # Without transformers, or what it needs, there is no telling.
        if error.name in (None, "transformers") or not module.startswith(error.name):
            raise
        raise ImportError(
            f"kernel_mapping: model_types must be families of transformers, such as qwen3_moe, got {model_type!r}"
        ) from error


def _subclasses(cls: type) -> Iterator[type]:
    subclass: type
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _is_experts_class(cls: type) -> bool:
    """Whether transformers' @use_experts_implementation made it: it wraps two functions, and sees to a gate."""
    wrapped = all(hasattr(vars(cls).get(name), "__wrapped__") for name in ("__init__", "forward"))
    return wrapped and hasattr(cls, "_apply_gate")
