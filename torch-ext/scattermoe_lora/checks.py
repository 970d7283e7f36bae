"""Argument checks: errors that name the argument, what it was and what it should be, before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from .types import ExpertLoRA

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


class Arguments:
    """Checks the tensors of one call against each other: symbols such as ``H`` mean the same size in all of them."""

    def __init__(self, function: str) -> None:
        self.function = function
        self.sizes: dict[str, tuple[int, str]] = {}
        self.device: tuple[torch.device, str] | None = None

    def fail(self, name: str, must: str, got: object) -> ValueError:
        return ValueError(f"{self.function}: {name} must be {must}, got {got}")

    def tensor(self, name: str, value: object, shape: tuple[str, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """Checks type, dtype, device and shape, in which a symbol seen before must have the size it had."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.function}: {name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{self.function}: {name} must be {wanted}, got {value.dtype}")
        if value.device.type != "cpu" and value.dtype == torch.float64:
            raise TypeError(
                f"{self.function}: {name} is float64, which only the CPU backend computes; got {value.device}"
            )
        if self.device is None:
            self.device = value.device, name
        elif value.device != self.device[0]:
            raise self.fail(name, f"on {self.device[0]} like {self.device[1]}", value.device)
        spelled = f"[{', '.join(shape)}]"
        if value.dim() != len(shape):
            raise self.fail(name, spelled, f"shape {tuple(value.shape)}")
        for symbol, size in zip(shape, value.shape, strict=True):
            known, source = self.sizes.setdefault(symbol, (size, name))
            if size != known:
                raise self.fail(
                    name, f"{spelled} with {symbol} = {known} as in {source}", f"shape {tuple(value.shape)}"
                )
        return value

    def lora(self, name: str, lora: object, in_symbol: str, out_symbol: str) -> None:
        """Checks an optional `ExpertLoRA` against the projection it updates."""
        if lora is None:
            return
        if not isinstance(lora, ExpertLoRA):
            raise TypeError(f"{self.function}: {name} must be an ExpertLoRA or None, got {type(lora).__name__}")
        self.tensor(f"{name}.A", lora.A, ("E", f"{name} rank", in_symbol), FLOATS)
        self.tensor(f"{name}.B", lora.B, ("E", out_symbol, f"{name} rank"), FLOATS)

    def size(self, symbol: str) -> int:
        return self.sizes[symbol][0]

    def bind(self, symbol: str, size: int, source: str) -> None:
        """Fixes a symbol's size before a tensor shows it."""
        self.sizes[symbol] = (size, source)

    def expert_ids(self, name: str, ids: Tensor, num_experts: int, allow_sentinels: bool) -> None:
        """Checks the range where it costs no device sync: on the CPU."""
        if ids.device.type != "cpu" or ids.numel() == 0 or torch.compiler.is_compiling():
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (high >= num_experts and not allow_sentinels):
            raise self.fail(name, f"in [0, E = {num_experts})", f"ids from {low} to {high}")
