"""Data types: the routing of a batch and the LoRA factors of an expert stack. They carry shapes and import nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Routing:
    """Where the ``S = T * k`` routed slots of a batch go (ScatterMoE, arXiv 2403.08245, section 3).

    A *slot* is one (token, choice) pair, numbered ``t * k + j`` in *scattered* order. *Grouped* order is the slots
    sorted by expert, stably. Rows past ``expert_offsets[-1]`` belong to no expert (expert-parallel sentinels).

    Attributes:
        scattered_idxs: int64 ``[S]``; the slot that each grouped row stands for.
        expert_offsets: int64 ``[E]``; cumulative: expert ``e`` owns grouped rows ``[offsets[e - 1], offsets[e])``.
        tiles: int32 ``[n, 4]``, the kernels' schedule: first how many row tiles the experts have, how many with those
            of no expert, how many chunks a narrow gram has of the experts whose rows it cuts into several, and which
            of the following entries are theirs; then (expert, first grouped row, end of the expert's rows, the
            expert's first tile) of each tile, expert ``E`` for rows of no expert, and the same of each chunk. Empty
            for the CPU backend, which needs none.
        tile_rows: how many rows a tile has.
    """

    scattered_idxs: Tensor
    expert_offsets: Tensor
    tiles: Tensor
    tile_rows: int

    @property
    def num_slots(self) -> int:
        return self.scattered_idxs.shape[0]

    @property
    def num_experts(self) -> int:
        return self.expert_offsets.shape[0]


@dataclass(frozen=True)
class ExpertLoRA:
    """The LoRA update of one expert stack: ``y_e = W_e x + scaling * B_e (A_e x)`` (arXiv 2106.09685, per expert).

    Args:
        A: ``[E, r, in]``, any strides.
        B: ``[E, out, r]``, any strides.
        scaling: a float, usually ``alpha / r``. ``0.0`` means zero.

    Raises:
        TypeError: a factor is not a floating point tensor, or ``scaling`` is not a number.
        ValueError: the factors' shapes or devices do not go together, or ``scaling`` is not finite.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    def __post_init__(self) -> None:
        A, B, scaling = self.A, self.B, self.scaling
        for name, factor in (("A", A), ("B", B)):
            if not isinstance(factor, Tensor):
                raise TypeError(f"ExpertLoRA: {name} must be a tensor, got {type(factor).__name__}")
            if not factor.is_floating_point():
                raise TypeError(f"ExpertLoRA: {name} must be floating point, got {factor.dtype}")
            if factor.dim() != 3:
                shape = "[E, r, in]" if name == "A" else "[E, out, r]"
                raise ValueError(f"ExpertLoRA: {name} must be {shape}, got shape {tuple(factor.shape)}")
        check_scaling("ExpertLoRA", scaling)
        (experts, rank, _), (experts_of_B, _, rank_of_B) = A.shape, B.shape
        if experts != experts_of_B:
            raise ValueError(f"ExpertLoRA: A has {experts} experts and B has {experts_of_B}; they must be equal")
        if rank != rank_of_B or rank == 0:
            raise ValueError(
                "ExpertLoRA: the rank of A [E, r, in] and B [E, out, r] must be equal and positive, "
                f"got {rank} and {rank_of_B}"
            )
        if A.device != B.device:
            raise ValueError(f"ExpertLoRA: A and B must be on one device, got {A.device} and {B.device}")

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """``(A, B)``, or the two matrices that `from_peft` was given."""
        peft = self.__dict__.get("_peft")
        return (self.A, self.B) if peft is None else peft[:2]

    @property
    def num_experts(self) -> int:
        peft = self.__dict__.get("_peft")
        return self.A.shape[0] if peft is None else peft[2]

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def in_features(self) -> int:
        return self.A.shape[2]

    @property
    def out_features(self) -> int:
        return self.B.shape[1]

    @classmethod
    def from_peft(cls, lora_A: Tensor, lora_B: Tensor, num_experts: int, scaling: float) -> ExpertLoRA:
        """PEFT's factors for an expert stack (``peft.tuners.lora.ParamWrapper``); A and B are views of them.

        Args:
            lora_A: ``[E * r, in]``, the expert index slowest.
            lora_B: ``[out, r * E]``, the expert index **fastest**.
            num_experts: ``E``.
            scaling: PEFT's ``scaling[adapter]``.
        """
        _check_factors(lora_A, lora_B, num_experts)
        check_scaling("ExpertLoRA", scaling)
        lora = object.__new__(cls)
        object.__setattr__(lora, "_peft", (lora_A, lora_B, num_experts))
        object.__setattr__(lora, "scaling", scaling)
        return lora

    def __getattr__(self, name: str) -> Tensor:
        """A and B of PEFT's matrices, which are viewed when somebody first asks for them.

        `moe_mlp` takes the matrices until then, which saves a layer six views and their autograd nodes.
        """
        peft = self.__dict__.get("_peft")
        if name not in ("A", "B") or peft is None:
            if name in self.__dict__:  # another thread was faster
                return self.__dict__[name]
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        lora_A, lora_B, num_experts = peft
        with torch.enable_grad():  # they are kept, and may be differentiated later
            factors = {"A": A_by_expert(lora_A, num_experts), "B": peft_B_by_expert(lora_B, num_experts)}
        # Dynamo can't trace the second.
        if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            self.__dict__.update(factors)
            self.__dict__.pop("_peft", None)
        return factors[name]

    @classmethod
    def from_expert_major(cls, lora_A: Tensor, lora_B: Tensor, num_experts: int, scaling: float) -> ExpertLoRA:
        """Views of ScatterMoE-LoRA's factors: ``lora_A [E * r, in]``, ``lora_B [out, E * r]``, expert-major both."""
        _check_factors(lora_A, lora_B, num_experts)
        return cls(A_by_expert(lora_A, num_experts), B_by_expert(lora_B, num_experts), scaling)

    def to_peft(self) -> tuple[Tensor, Tensor]:
        """``(lora_A [E * r, in], lora_B [out, r * E])`` in PEFT's layout; views of what ``from_peft`` was given."""
        lora_A = self.A.reshape(self.num_experts * self.rank, self.in_features)
        lora_B = self.B.permute(1, 2, 0).reshape(self.out_features, self.rank * self.num_experts)
        return lora_A, lora_B


def A_by_expert(A: Tensor, num_experts: int) -> Tensor:
    """``[E, r, in]`` of an expert-major ``A [E * r, in]``, taken as checked: a view. Itself if it is by expert."""
    return A if A.dim() == 3 else A.view(num_experts, A.shape[0] // num_experts, A.shape[1])


def B_by_expert(B: Tensor, num_experts: int) -> Tensor:
    """``[E, out, r]`` of an expert-major ``B [out, E * r]``, as `A_by_expert`."""
    return B if B.dim() == 3 else B.view(B.shape[0], num_experts, B.shape[1] // num_experts).permute(1, 0, 2)


def peft_B_by_expert(B: Tensor, num_experts: int) -> Tensor:
    """``[E, out, r]`` of PEFT's ``B [out, r * E]``, as `A_by_expert`."""
    return B if B.dim() == 3 else B.view(B.shape[0], B.shape[1] // num_experts, num_experts).permute(2, 0, 1)


def check_scaling(function: str, scaling: object) -> None:
    """Raises if it is not a finite number."""
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"{function}: scaling must be a float, got {scaling!r}")
    if not abs(scaling) <= FLOAT32_MAX:  # a NaN is not; an int may be larger than any float
        raise ValueError(f"{function}: scaling must be finite in float32, got {scaling!r}")


def _check_factors(lora_A: Tensor, lora_B: Tensor, num_experts: int) -> None:
    """Raises if they are no two factors of a stack."""
    for name, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        if not isinstance(factor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(factor).__name__}")
        if factor.dim() != 2:
            shape = "[E * r, in]" if name == "lora_A" else "[out, E * r]"
            raise ValueError(f"{name} must be {shape}, got shape {tuple(factor.shape)}")
        if not factor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {factor.dtype}")
    if lora_A.device != lora_B.device:
        raise ValueError(f"lora_A and lora_B must be on one device, got {lora_A.device} and {lora_B.device}")
    if not isinstance(num_experts, int) or isinstance(num_experts, bool):
        raise TypeError(f"num_experts must be an int, got {type(num_experts).__name__} {num_experts!r}")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    check_width(lora_A, lora_B, num_experts)


def check_width(lora_A: Tensor, lora_B: Tensor, num_experts: int) -> None:
    """Raises if two matrices do not share a width that the experts do."""
    width = lora_A.shape[0]
    if width != lora_B.shape[1] or width % num_experts or width == 0:
        raise ValueError(
            f"lora_A [E * r, in] and lora_B [out, E * r] must share E * r, a positive multiple of E = {num_experts}; "
            f"got {tuple(lora_A.shape)} and {tuple(lora_B.shape)}"
        )
