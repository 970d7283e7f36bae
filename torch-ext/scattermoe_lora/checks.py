"""Argument checks: errors that name the argument, what it was and what it should be, before anything is launched."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

from .types import A_by_expert, B_by_expert, ExpertLoRA, check_scaling, check_width

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def probability(function: str, name: str, value: object) -> float:
    """Checks a probability of dropping an element: a number in ``[0, 1)``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{function}: {name} must be a float, got {type(value).__name__}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{function}: {name} must be in [0, 1), got {value}")
    return float(value)


def is_traced(*tensors: Tensor) -> bool:
    """Whether a call may be written down, to run later on other tensors: `torch.compile`, `make_fx`, AOT autograd."""
    if torch.compiler.is_compiling():
        return True
    mode = getattr(_python_dispatch, "_get_current_dispatch_mode", None)  # private, as is what traces by it
    if mode is not None and mode() is not None:
        return True
    return any(type(tensor) is not Tensor for tensor in tensors)


def needs_autograd(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd must see a call: for a gradient, or to refuse a forward-mode derivative, which it has not.

    Below autograd a tensor's tangent would be lost without a word.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    return getattr(forward_ad, "_current_level", -1) >= 0


def _values_are_at_hand(tensor: Tensor) -> bool:
    """Whether a look at a tensor's values costs no device sync and no graph break."""
    return tensor.is_cpu and not is_traced(tensor.detach() if isinstance(tensor, nn.Parameter) else tensor)


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
        dtype = value.dtype
        if dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"{self.function}: {name} must be {wanted}, got {dtype}")
        if value.layout != torch.strided or value.is_nested:
            got = "a nested tensor" if value.is_nested else value.layout
            raise TypeError(f"{self.function}: {name} must be a dense tensor, got {got}")
        device = value.device
        if dtype is torch.float64 and device.type != "cpu":
            raise TypeError(f"{self.function}: {name} is float64, which only the CPU backend computes; got {device}")
        if self.device is None:
            self.device = device, name
        elif device != self.device[0]:
            raise self.fail(name, f"on {self.device[0]} like {self.device[1]}", device)
        given, sizes = value.shape, self.sizes
        if len(given) != len(shape):
            raise self.fail(name, f"[{', '.join(shape)}]", f"shape {tuple(given)}")
        for symbol, size in zip(shape, given, strict=True):
            known = sizes.get(symbol)
            if known is None:
                sizes[symbol] = (size, name)
            elif size != known[0]:
                must = f"[{', '.join(shape)}] with {symbol} = {known[0]} as in {known[1]}"
                raise self.fail(name, must, f"shape {tuple(given)}")
        return value

    def flag(self, name: str, value: object) -> None:
        """Checks a bool: anything else, the string "no" among them, may count as the wrong one."""
        if not isinstance(value, bool):
            raise TypeError(f"{self.function}: {name} must be a bool, got {value!r}")

    def lora(self, name: str, lora: object, in_symbol: str, out_symbol: str) -> None:
        """Checks an optional `ExpertLoRA` against the projection it updates."""
        if lora is None:
            return
        if not isinstance(lora, ExpertLoRA):
            raise TypeError(f"{self.function}: {name} must be an ExpertLoRA or None, got {type(lora).__name__}")
        A, B = lora.factors
        if A.dim() == 2 and lora.num_experts == self.size("E"):  # PEFT's, whose widths are known to go together
            self.tensor(f"{name}.A", A, (f"{name} E * r", in_symbol), FLOATS)
            self.tensor(f"{name}.B", B, (out_symbol, f"{name} r * E"), FLOATS)
        else:
            self.tensor(f"{name}.A", lora.A, ("E", f"{name} rank", in_symbol), FLOATS)
            self.tensor(f"{name}.B", lora.B, ("E", out_symbol, f"{name} rank"), FLOATS)

    def has_lora(self, lora_A: object, lora_B: object) -> bool:
        """Whether factors that may be left out are there; both or neither must be."""
        if (lora_A is None) != (lora_B is None):
            missing = "lora_A" if lora_A is None else "lora_B"
            raise ValueError(f"{self.function}: lora_A and lora_B must be given both or neither; {missing} is None")
        return lora_A is not None

    def factors(
        self, lora_A: object, lora_B: object, scaling: float, in_symbol: str, out_symbol: str
    ) -> tuple[Tensor, Tensor]:
        """Checks expert-major factors, ``lora_A [E * r, in]``, ``lora_B [out, E * r]``."""
        A = self.tensor("lora_A", lora_A, ("E * r", in_symbol), FLOATS)
        B = self.tensor("lora_B", lora_B, (out_symbol, "E * r"), FLOATS)
        check_width(A, B, self.size("E"))
        check_scaling(self.function, scaling)
        return A, B

    def expert_major(
        self, lora_A: object, lora_B: object, scaling: float, in_symbol: str, out_symbol: str
    ) -> ExpertLoRA:
        """The same, viewed by expert."""
        A, B = self.factors(lora_A, lora_B, scaling, in_symbol, out_symbol)
        return ExpertLoRA(A_by_expert(A, self.size("E")), B_by_expert(B, self.size("E")), float(scaling))

    def count(self, name: str, value: object) -> int:
        """Checks a count: an int of at least 1."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{self.function}: {name} must be an int, got {type(value).__name__}")
        if value < 1:
            raise self.fail(name, "at least 1", value)
        return value

    def size(self, symbol: str) -> int:
        return self.sizes[symbol][0]

    def bind(self, symbol: str, size: int, source: str) -> None:
        """Fixes a symbol's size before a tensor shows it."""
        self.sizes[symbol] = (size, source)

    def expert_ids(self, name: str, ids: Tensor, num_experts: int, allow_sentinels: bool) -> None:
        """Checks how many there are and, where it costs no device sync, on the CPU, their range."""
        self.choices(name, ids, num_experts)
        if not _values_are_at_hand(ids) or ids.numel() == 0:
            return
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (high >= num_experts and not allow_sentinels):
            raise self.fail(name, f"in [0, E = {num_experts})", f"ids from {low} to {high}")

    def choices(self, name: str, ids: Tensor, num_experts: int) -> None:
        """Checks that rows, and each expert's of every 128 slots, can be counted in int32."""
        limit = min(2**31, 2**38 // (num_experts + 1))
        if ids.numel() >= limit:
            raise self.fail(name, f"of fewer than {limit} choices", f"shape {tuple(ids.shape)}")

    def routing(self, scattered_idxs: Tensor, expert_offsets: Tensor, expert_idxs: Tensor | None = None) -> None:
        """Checks that a routing stays within its slots, where it costs no device sync: on the CPU."""
        self.slots(scattered_idxs, expert_idxs)
        if not _values_are_at_hand(scattered_idxs):
            return
        slots, previous = scattered_idxs.shape[0], 0
        for offset in expert_offsets.tolist():
            if not previous <= offset <= slots:
                raise self.fail("expert_offsets", f"counts that grow from 0 to S = {slots}", expert_offsets.tolist())
            previous = offset

    def slots(self, scattered_idxs: Tensor, expert_idxs: Tensor | None = None) -> None:
        """Checks grouped rows' slots and, if given, that their experts ascend; on the CPU."""
        if not _values_are_at_hand(scattered_idxs):
            return
        slots = scattered_idxs.shape[0]
        if slots and not 0 <= int(scattered_idxs.min()) <= int(scattered_idxs.max()) < slots:
            got = f"from {int(scattered_idxs.min())} to {int(scattered_idxs.max())}"
            raise self.fail("sorted_scattered_idxs", f"in [0, S = {slots})", got)
        if expert_idxs is not None and slots and int(expert_idxs[0]) < 0:
            raise self.fail("sorted_expert_idxs", "of at least 0", f"{int(expert_idxs[0])} in row 0")
        if expert_idxs is not None and (falls := (expert_idxs.diff() < 0).nonzero().flatten().tolist()):
            got = f"{expert_idxs[falls[0] : falls[0] + 2].tolist()} from row {falls[0]} on"
            raise self.fail("sorted_expert_idxs", "sorted", got)
