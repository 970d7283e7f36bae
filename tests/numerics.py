"""How the tests judge numbers: random layers against fp64 autograd over the definition, by ||x - ref|| / ||ref||."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# The bounds. What the best other systems reach in bfloat16 is 5.5e-3 at real sizes.
BOUNDS = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float64: 1e-12}

# The arguments that LoRA leaves frozen.
BASE = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``||value - reference|| / ||reference||``, in float64 on the reference's device; 0 for two zeros."""
    reference = reference.detach().double()
    difference = (value.detach().to(reference.device).double() - reference).norm()
    scale = reference.norm()
    return float(difference / scale) if scale > 0 else float(difference)


def assert_close(named: dict[str, tuple[Tensor, Tensor]], bound: float) -> None:
    """Every (value, reference) pair has the same shape and a relative error within the bound; NaN never passes."""
    errors = {}
    for name, (value, reference) in named.items():
        assert value.shape == reference.shape, f"{name}: shape {tuple(value.shape)}, not {tuple(reference.shape)}"
        errors[name] = relative_error(value, reference)
    bad = {name: error for name, error in errors.items() if not error <= bound}
    assert not bad, f"relative errors over {bound:.1e}: {bad}; all: {errors}"


def assert_differentiable_once(out: Tensor, leaves: Sequence[Tensor]) -> None:
    """With ``create_graph`` the gradients are the same, and a derivative of any of them, or of ``out``'s, an error."""
    plain = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    dout = torch.ones_like(out, requires_grad=True)
    for grad_output in (dout, dout.detach()):
        grads = torch.autograd.grad(out, leaves, grad_output, create_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))
        for leaf in (*leaves, dout) if grad_output is dout else leaves:
            with pytest.raises(RuntimeError, match="differentiable once"):
                torch.autograd.grad(grads[0].sum(), leaf, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.stack([grad.sum() for grad in grads]).sum().backward()


def assert_differentiable(call: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    """The same gradients with ``create_graph``, also where the graph is not kept, and in a checkpoint."""
    want = torch.autograd.grad(call().sum(), leaves)
    for out in (call(), checkpoint(call, use_reentrant=False)):
        got = torch.autograd.grad(out.sum(), leaves, create_graph=True, retain_graph=False)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def random_routing(T: int, E: int, k: int, generator: torch.Generator, pattern: str) -> Tensor:
    """``[T, k]`` distinct experts a token: ``uniform``, ``hot`` (expert 0 in every token), ``empty`` (half unused)."""
    usable = max(k, E // 2) if pattern == "empty" else E
    scores = torch.rand(T, usable, generator=generator, device=generator.device)
    if pattern == "hot":
        scores[:, 0] = 2.0
    return scores.topk(k, dim=1).indices if T else torch.empty(0, k, dtype=torch.int64, device=generator.device)


@dataclass
class Case:
    """Random inputs of one experts layer, in float64, each rounded to the dtype it will be computed in."""

    T: int
    H: int
    I: int  # noqa: E741
    E: int
    k: int
    r: int
    dtype: torch.dtype
    is_transposed: bool = False
    is_concatenated: bool = True
    has_gate: bool = True
    has_bias: bool = False
    activation: Any = "silu"
    pattern: str = "uniform"
    scalings: tuple[float, float] = (0.5, 2.0)
    adapter_dtype: torch.dtype | None = None
    of_peft: bool = False  # the adapters' factors are PEFT's matrices
    frozen: Sequence[str] = ()
    seed: int = 20
    home: torch.device = torch.device("cpu")  # where the float64 tensors live and the definition runs
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator(self.home).manual_seed(self.seed)
        adapter = self.adapter_dtype or self.dtype

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=self.home) * scale).to(dtype).double()

        N = 2 * self.I if self.has_gate else self.I
        up = normal(self.E, N, self.H, scale=self.H**-0.5)
        down = normal(self.E, self.H, self.I, scale=self.I**-0.5)
        if self.is_transposed:
            up, down = up.mT.contiguous(), down.mT.contiguous()
        self.tensors = {
            "hidden_states": normal(self.T, self.H),
            "gate_up_proj": up,
            "down_proj": down,
            "top_k_weights": torch.rand(self.T, self.k, generator=generator, device=self.home).to(self.dtype).double(),
        }
        if self.has_bias:
            self.tensors["gate_up_proj_bias"] = normal(self.E, N)
            self.tensors["down_proj_bias"] = normal(self.E, self.H)
        if self.r:
            # LoRA is a correction: B is a fraction of what would make the update as large as W x.
            self.tensors["gate_up_A"] = normal(self.E, self.r, self.H, scale=self.H**-0.5, dtype=adapter)
            self.tensors["gate_up_B"] = normal(self.E, N, self.r, scale=0.5 * self.r**-0.5, dtype=adapter)
            self.tensors["down_A"] = normal(self.E, self.r, self.I, scale=self.I**-0.5, dtype=adapter)
            self.tensors["down_B"] = normal(self.E, self.H, self.r, scale=0.5 * self.r**-0.5, dtype=adapter)
        self.top_k_index = random_routing(self.T, self.E, self.k, generator, self.pattern)
        self.grad = normal(self.T, self.H)

    @classmethod
    def of_model(cls, model: Any, T: int, dtype: torch.dtype, r: int = 16, train_base: bool = False) -> Case:
        """The experts layer of a real model (`cases.Model`) on the GPU, its base frozen unless ``train_base``."""
        return cls(
            T,
            model.hidden_size,
            model.intermediate_size,
            model.num_experts,
            model.top_k,
            r,
            dtype=dtype,
            is_transposed=model.is_transposed,
            is_concatenated=model.is_concatenated,
            has_bias=model.has_bias,
            scalings=(2.0, 2.0),
            frozen=() if train_base else BASE,
            home=torch.device("cuda"),
        )

    def layer(
        self, kernel: ModuleType, device: torch.device | None = None, reference: bool = False
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The arguments of `moe_mlp`, and by name those of them that train.

        On a device (if None at home) in their dtypes, or for the reference at home in float64.
        """
        where = self.home if device is None or reference else device
        leaves = {}
        for name, tensor in self.tensors.items():
            dtype = (self.adapter_dtype or self.dtype) if name.endswith(("_A", "_B")) else self.dtype
            leaf = tensor.detach() if reference else tensor.to(where, dtype, copy=True)
            leaves[name] = leaf.requires_grad_(name not in self.frozen)
        arguments: dict[str, Any] = dict(leaves)
        if self.r:
            for projection, scaling in zip(("gate_up", "down"), self.scalings, strict=True):
                A, B = arguments.pop(f"{projection}_A"), arguments.pop(f"{projection}_B")
                lora = kernel.ExpertLoRA(A, B, scaling)
                if self.of_peft and not reference:
                    A, B = (
                        matrix.detach().requires_grad_(factor.requires_grad)
                        for matrix, factor in zip(lora.to_peft(), (A, B), strict=True)
                    )
                    leaves[f"{projection}_A"], leaves[f"{projection}_B"] = A, B
                    lora = kernel.ExpertLoRA.from_peft(A, B, self.E, scaling)
                arguments[f"{projection}_lora"] = lora
        arguments |= {
            "top_k_index": self.top_k_index.to(where),
            "is_transposed": self.is_transposed,
            "is_concatenated": self.is_concatenated,
            "has_gate": self.has_gate,
            "activation": self.activation,
        }
        return arguments, {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}

    def run(self, kernel: ModuleType, function: Any, device: torch.device, reference: bool) -> dict[str, Tensor]:
        """Output and gradients of `function`: in float64 for the reference, else in its dtypes on the device."""
        arguments, leaves = self.layer(kernel, device, reference)
        out = function(**arguments)
        out.backward(self.grad.to(out.device, out.dtype))
        grads = {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        for name in grads if self.of_peft and not reference else ():
            if name.endswith("_A"):
                grads[name] = grads[name].view(self.E, self.r, -1)
            elif name.endswith("_B"):
                grads[name] = grads[name].view(-1, self.r, self.E).permute(2, 0, 1)
        return {"output": out.detach(), **grads}

    def check(self, kernel: ModuleType, device: torch.device, bound: float | None = None) -> dict[str, Tensor]:
        """Compares `moe_mlp` with the definition; returns what `moe_mlp` gave."""
        got = self.run(kernel, kernel.moe_mlp, device, reference=False)
        want = self.run(kernel, kernel.reference.moe_mlp, device, reference=True)
        assert got.keys() == want.keys()
        assert_close({name: (got[name], want[name]) for name in want}, BOUNDS[self.dtype] if bound is None else bound)
        return got


@dataclass
class Linear:
    """Random inputs of one expert linear, in float64, each rounded to the dtype it will be computed in."""

    T: int
    k: int
    E: int
    r: int
    K: int
    N: int
    dtype: torch.dtype
    layout: str = ""  # any of grouped_in, grouped_out, gates, bias; without grouped_in a row of inputs is a token's
    pattern: str = "uniform"
    scaling: float = 0.5
    sentinels: bool = False
    adapter_dtype: torch.dtype | None = None
    frozen: tuple[str, ...] = ()
    seed: int = 7
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = self.dtype) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype).double()

        S = self.T * self.k
        rows = S if "grouped_in" in self.layout else self.T
        self.tensors = {"inputs": normal(rows, self.K), "expert_weights": normal(self.E, self.K, self.N)}
        self.tensors["expert_weights"] *= 2.0 ** -round(torch.tensor(self.K).log2().item() / 2)
        if "bias" in self.layout:
            self.tensors["expert_biases"] = normal(self.E, self.N)
        if "gates" in self.layout:
            self.tensors["gates"] = torch.rand(self.T, self.k, generator=generator).to(self.dtype).double()
        if self.r:
            adapter = self.adapter_dtype or self.dtype
            self.tensors["lora_A"] = normal(self.E * self.r, self.K, scale=self.K**-0.5, dtype=adapter)
            self.tensors["lora_B"] = normal(self.N, self.E * self.r, scale=0.5 * self.r**-0.5, dtype=adapter)
        self.ids = random_routing(self.T, self.E, self.k, generator, self.pattern)
        if self.sentinels:
            self.ids[::3, 0] = self.E
            self.ids[1::3] = self.E + 3
        self.order = torch.sort(self.ids.reshape(-1), stable=True).indices
        self.grad = normal(self.T if "gates" in self.layout else S, self.N)

    def routing(self, kernel, device) -> dict[str, Tensor]:
        names = ("sorted_expert_idxs", "sorted_scattered_idxs", "expert_offsets")
        return dict(zip(names, kernel.flatten_sort_count(self.ids.to(device), self.E), strict=True))

    def run(self, kernel, device, view=lambda name, leaf: leaf) -> dict[str, Tensor]:
        """Output and gradients of the kernel, which is given ``view(name, leaf)`` of each tensor."""
        leaves = {}
        for name, tensor in self.tensors.items():
            dtype = (self.adapter_dtype or self.dtype) if name.startswith("lora") else self.dtype
            leaves[name] = tensor.to(device, dtype, copy=True).requires_grad_(name not in self.frozen)
        grouped_in, grouped_out = "grouped_in" in self.layout, "grouped_out" in self.layout
        arguments = {name: view(name, leaf) for name, leaf in leaves.items()}
        arguments |= {"k": 1 if grouped_in else self.k, "grouped_in": grouped_in, "grouped_out": grouped_out}
        arguments |= self.routing(kernel, device)
        if self.r:
            out = kernel.parallel_linear_lora(**arguments, scaling=self.scaling)
        else:
            out = kernel.parallel_linear(**arguments)
        if out.requires_grad:
            out.backward(self.grad.to(device, out.dtype))
        grads = {f"d {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {"output": out.detach(), **grads}

    def want(self, kernel) -> dict[str, Tensor]:
        """The same by the definition: a row for every slot, a loop over experts with merged weights, autograd."""
        x = {name: t.clone().requires_grad_(name not in self.frozen) for name, t in self.tensors.items()}
        if "grouped_in" in self.layout:
            scattered = x["inputs"][torch.argsort(self.order)]
        else:
            scattered = x["inputs"].repeat_interleave(self.k, 0)
        lora = None
        if self.r:
            A = x["lora_A"].view(self.E, self.r, self.K)
            B = x["lora_B"].view(self.N, self.E, self.r).transpose(0, 1)
            lora = kernel.ExpertLoRA(A, B, self.scaling)
        ids, bias = self.ids.reshape(-1), x.get("expert_biases")
        y = kernel.reference.parallel_linear(scattered, x["expert_weights"], ids, lora=lora, expert_biases=bias)
        if "gates" in self.layout:
            out = (x["gates"][..., None] * y.view(self.T, self.k, self.N)).sum(1)
        else:
            out = y[self.order] if "grouped_out" in self.layout else y
        out.backward(self.grad)
        return {"output": out.detach(), **{f"d {n}": leaf.grad for n, leaf in x.items() if leaf.grad is not None}}

    def check(self, kernel, device, bound: float | None = None) -> dict[str, Tensor]:
        got, want = self.run(kernel, device), self.want(kernel)
        assert got.keys() == want.keys()
        assert_close({name: (got[name], want[name]) for name in want}, BOUNDS[self.dtype] if bound is None else bound)
        return got
