"""Random experts layers and expert linears (hypothesis): any sizes, dtypes, layouts, flags, routing and strides.

The same few examples at every run of `make test`; ``make properties`` draws new ones, thousands (see conftest). NaN
lies beside every strided argument and in all fresh memory, so what is read past an end shows.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from numerics import BASE, BOUNDS, Case, Linear
from torch import Tensor

pytestmark = pytest.mark.every_device

# Two dense layouts, then what slicing, unstacking and an unaligned start leave.
STRIDES = ("dense", "transposed", "sliced", "every other", "offset")
PATTERNS = ("uniform", "hot", "empty", "repeated", "one expert", "some absent", "all absent")
SMOOTH = ("identity", "silu", "gelu", "gelu_tanh", "relu2", "own")
# Their gradients jump, and rounding puts half precision values on either side.
KINKED = ("relu", "clamped_glu(1.702, 0.6, 1.0)")


def restride(x: Tensor, how: str) -> Tensor:
    """The same values, differentiably, in other strides."""
    junk = float("nan") if x.is_floating_point() else 10**6
    if how == "transposed" and x.dim() > 1:
        return x.mT.contiguous().mT
    if how == "sliced":
        return torch.cat([x.new_full((*x.shape[:-1], 3), junk), x, x.new_full((*x.shape[:-1], 2), junk)], -1)[
            ..., 3 : 3 + x.shape[-1]
        ]
    if how == "every other":
        return torch.stack([x, torch.full_like(x, junk)], -1)[..., 0]
    if how == "offset":
        return torch.cat([x.new_full((1,), junk), x.reshape(-1)])[1:].view(x.shape)
    return x


def route(pattern: str, T: int, E: int, k: int, index: Tensor, seed: int) -> Tensor:
    """`random_routing`'s patterns as they are, and those that distinct experts can't give."""
    generator = torch.Generator().manual_seed(seed)
    if pattern == "repeated":
        return torch.randint(0, E, (T, k), generator=generator)
    if pattern == "one expert":
        return torch.full((T, k), int(torch.randint(0, E, (), generator=generator)))
    if pattern == "some absent":
        return torch.where(torch.rand(T, k, generator=generator) < 0.4, E + 2, index)
    if pattern == "all absent":
        return torch.full((T, k), E)
    return index


@pytest.fixture
def poisoned_memory():
    """Every fresh tensor is NaN, every fresh integer the largest."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch fills fresh memory with NaN in this mode"
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def dtypes(request: pytest.FixtureRequest) -> list[torch.dtype]:
    device = request.config.getoption("--device")
    more = {"cpu": [torch.bfloat16, torch.float64], "interpreter": [], "cuda": [torch.bfloat16]}[device]
    return [torch.float32, torch.float16, *more]


@pytest.fixture
def wide(device: torch.device) -> st.SearchStrategy[bool]:
    """Whether a layer is as wide as Hopper's own kernels ask for: on a GPU every second one, as interpreters and the
    CPU would take too long. Of any multiple of 4 columns, so that halves of them begin anywhere."""
    return st.booleans() if device.type == "cuda" else st.just(False)


WIDE = st.integers(64, 112).map(lambda n: 4 * n)
MANY_RANKS = st.sampled_from([0, 4, 8, 16, 24, 32, 64, 80, 128, 144])


def draws(*sizes: int) -> int:
    """How many draws of the values tell the size of a result: one of few elements is small in several."""
    return 3 if min(sizes) >= 8 else 12


def check(got: dict[str, Tensor], wants: list[dict[str, Tensor]], bound: float) -> None:
    """The error of each tensor by the largest norm of several draws of the values.

    In one draw alone a sum of few terms may cancel to nearly nothing, of which any rounding is a large part.
    """
    assert got.keys() == wants[0].keys()
    errors = {}
    for name, value in got.items():
        assert value.shape == wants[0][name].shape, name
        difference = (value.cpu().double() - wants[0][name]).norm()
        size = max(want[name].norm() for want in wants)
        errors[name] = float(difference / size) if size > 0 else float(difference)
    note(f"errors {errors}")
    bad = {name: error for name, error in errors.items() if not error <= bound}
    assert not bad, f"relative errors over {bound:.1e}: {bad}"


@given(data=st.data())
def test_moe_mlp(kernel, device, dtypes, wide, poisoned_memory, data):
    draw = data.draw
    E = draw(st.integers(1, 12), "E")
    k = draw(st.integers(1, min(E, 6)), "k")
    dtype = draw(st.sampled_from(dtypes), "dtype")
    halved = dtype in (torch.float16, torch.bfloat16)
    activation: Any = draw(st.sampled_from(SMOOTH if halved else SMOOTH + KINKED), "activation")
    has_gate = draw(st.booleans(), "has_gate") or str(activation).startswith("clamped") or activation == "own"
    is_concatenated = draw(st.booleans(), "is_concatenated")
    T, r = draw(st.integers(0, 70), "T"), draw(st.sampled_from([0, 1, 2, 4, 7, 16, 17, 40]), "r")
    H, I = draw(st.integers(1, 80), "H"), draw(st.integers(1, 50), "I")  # noqa: E741
    if draw(wide, "wide"):
        T, r, H, I = draw(st.integers(1, 600), "T"), draw(MANY_RANKS, "r"), draw(WIDE, "H"), draw(WIDE, "I")  # noqa: E741
    seed = draw(st.integers(0, 2**16), "seed")
    if activation == "own":

        def activation(h: Tensor) -> Tensor:
            gate, up = kernel.reference.split_gate_up(h, is_concatenated)
            return torch.tanh(up.float() if halved else up) * gate

    options = {
        "dtype": dtype,
        "is_transposed": draw(st.booleans(), "is_transposed"),
        "is_concatenated": is_concatenated,
        "has_gate": has_gate,
        "has_bias": draw(st.booleans(), "has_bias"),
        "activation": activation,
        "scalings": (draw(st.sampled_from([0.5, 0.0, -2.0]), "scaling of up"), 2.0),
        "adapter_dtype": torch.float32 if halved and draw(st.booleans(), "float32 adapters") else None,
        "pattern": draw(st.sampled_from(PATTERNS), "pattern"),
    }
    cases = [Case(T, H, I, E, k, r, seed=seed + i, **options) for i in range(draws(T, H, I))]
    case = cases[0]
    names = list(case.tensors)
    frozen = draw(st.sets(st.sampled_from(names)) if draw(st.booleans(), "some frozen") else st.just(set()), "frozen")
    if draw(st.booleans(), "base frozen"):
        frozen |= set(BASE)
    if frozen >= set(names):
        frozen = frozen - {"hidden_states"}
    layouts = {name: draw(st.sampled_from(STRIDES), f"strides of {name}") for name in [*names, "top_k_index"]}
    expanded = draw(st.booleans(), "experts are one in memory")
    of_peft = draw(st.booleans(), "adapters are PEFT's matrices")
    for other in cases:
        other.top_k_index = route(options["pattern"], T, E, k, case.top_k_index, seed)
        other.frozen = tuple(frozen)
        if expanded:
            other.tensors["gate_up_proj"] = other.tensors["gate_up_proj"][:1].expand(E, -1, -1).clone()
            other.frozen = (*other.frozen, "gate_up_proj")
    if set(case.frozen) >= set(names):
        return  # nothing is left that needs a gradient
    ids = draw(st.sampled_from([torch.int32, torch.int64]), "ids")

    def strided(**arguments: Any) -> Tensor:
        for name, layout in layouts.items():
            if name in arguments:
                arguments[name] = restride(arguments[name], layout)
        if expanded:
            arguments["gate_up_proj"] = arguments["gate_up_proj"][:1].expand(E, -1, -1)
        for name in ("gate_up", "down"):
            if r:
                lora = arguments[f"{name}_lora"]
                A, B = lora.to_peft() if of_peft else (lora.A, lora.B)
                A, B = restride(A, layouts[f"{name}_A"]), restride(B, layouts[f"{name}_B"])
                make = functools.partial(kernel.ExpertLoRA.from_peft, num_experts=E) if of_peft else kernel.ExpertLoRA
                arguments[f"{name}_lora"] = make(A, B, scaling=lora.scaling)
        arguments["top_k_index"] = arguments["top_k_index"].to(ids)
        return kernel.moe_mlp(**arguments, expert_parallel=True)

    got = case.run(kernel, strided, device, reference=False)
    wants = [other.run(kernel, kernel.reference.moe_mlp, device, reference=True) for other in cases]
    # An own function's intermediates are rounded to the dtype; float32 adapters are rounded to the base's.
    check(got, wants, (4 if halved else 2) * BOUNDS[dtype])


@given(data=st.data())
def test_parallel_linear_lora(kernel, device, dtypes, wide, poisoned_memory, data):
    draw = data.draw
    E = draw(st.integers(1, 12), "E")
    k = draw(st.integers(1, min(E, 6)), "k")
    T, r = draw(st.integers(0, 70), "T"), draw(st.sampled_from([0, 1, 2, 4, 7, 16, 17, 40]), "r")
    K, N = draw(st.integers(1, 80), "K"), draw(st.integers(1, 80), "N")
    if draw(wide, "wide"):
        T, r, K, N = draw(st.integers(1, 600), "T"), draw(MANY_RANKS, "r"), draw(WIDE, "K"), draw(WIDE, "N")
    dtype = draw(st.sampled_from(dtypes), "dtype")
    layout = [
        draw(st.sampled_from(["", "grouped_in"]), "in"),
        draw(st.sampled_from(["", "grouped_out", "gates"]), "out"),
    ]
    layout.append(draw(st.sampled_from(["", "bias"]), "bias"))
    pattern = draw(st.sampled_from(PATTERNS), "pattern")
    seed = draw(st.integers(0, 2**16), "seed")
    scaling = draw(st.sampled_from([0.5, 0.0, -2.0]), "scaling")
    cases = [
        Linear(T, k, E, r, K, N, dtype, " ".join(layout), pattern, scaling, seed=seed + i)
        for i in range(draws(T, K, N))
    ]
    names = list(cases[0].tensors)
    frozen = draw(st.sets(st.sampled_from(names), max_size=len(names) - 1), "frozen")
    layouts = {name: draw(st.sampled_from(STRIDES), f"strides of {name}") for name in names}
    ids = route(pattern, T, E, k, cases[0].ids, seed)
    for case in cases:
        case.ids, case.frozen = ids, tuple(frozen)
        case.order = torch.sort(ids.reshape(-1), stable=True).indices
    got = cases[0].run(kernel, device, view=lambda name, x: restride(x, layouts[name]))
    check(got, [case.want(kernel) for case in cases], 2 * BOUNDS[dtype])
