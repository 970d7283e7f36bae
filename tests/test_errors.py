"""Wrong calls: an error that names the argument, what it was and what it should be, before anything is launched."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import REPO_ID, ROOT
from torch import Tensor

T, k, E, H, I, r = 6, 2, 5, 12, 7, 3  # noqa: E741
S = T * k
BACKEND = "route schedule shrink grouped_gemm grouped_gemm_act act_grad act_grad_grams activated gram combine".split()

# The tensors of every public function.
TENSORS = {
    "moe_mlp": "hidden_states gate_up_proj down_proj top_k_index top_k_weights gate_up_proj_bias down_proj_bias",
    "parallel_linear": "inputs expert_weights sorted_expert_idxs sorted_scattered_idxs expert_offsets expert_biases"
    " gates",
    "parallel_linear_lora": "inputs expert_weights sorted_expert_idxs sorted_scattered_idxs expert_offsets lora_A"
    " lora_B expert_biases gates",
    "activate": "h",
    "flatten_sort_count": "expert_idxs",
    "ExpertLoRA": "A B",
    "from_peft": "lora_A lora_B",
    "set_lora": "lora_A lora_B",
    "ParallelExperts": "inputs sorted_expert_idxs sorted_scattered_idxs expert_offsets",
    "scatter2scatter": "X W sorted_expert_idxs sorted_scattered_idxs b out",
    "scatter2scatter_lora": "X W sorted_expert_idxs sorted_scattered_idxs lora_A lora_B b out",
    "scatter2scatter_lora_dX": "DY W sorted_expert_idxs sorted_scattered_idxs lora_A lora_B out",
    "single2scatter": "X W expert_idxs",
    "group": "A sorted_expert_idxs coeff out",
    "group_bwd_W": "DY X expert_offsets",
    "group_bwd_lora": "DY X lora_A lora_B expert_offsets",
}
CALLS = [*TENSORS, "from_expert_major"]
EACH_TENSOR = [(call, name) for call, names in TENSORS.items() for name in names.split()]


@pytest.fixture
def calls(kernel) -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A right call of every public function, with every optional argument: what the tables below change."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(0, E, (T, k), generator=generator)
    experts, slots, offsets = kernel.flatten_sort_count(ids, E)
    routing = {"sorted_expert_idxs": experts, "sorted_scattered_idxs": slots}
    lora = {"lora_A": normal(E * r, H), "lora_B": normal(I, E * r)}
    linear = {"inputs": normal(T, H), "expert_weights": normal(E, H, I), "k": k, **routing, "expert_offsets": offsets}
    rest = {"expert_biases": normal(E, I), "gates": normal(T, k)}
    scatter = {"X": normal(T, H), "W": normal(E, H, I), **routing, "k": k}
    grouped = {"DY": normal(S, I), "X": normal(S, H), "expert_offsets": offsets, "E": E}
    module = kernel.ParallelExperts(E, H, I)
    low = kernel.kernels
    return {
        "moe_mlp": (
            kernel.moe_mlp,
            {
                "hidden_states": normal(T, H),
                "gate_up_proj": normal(E, 2 * I, H),
                "down_proj": normal(E, H, I),
                "top_k_index": ids,
                "top_k_weights": normal(T, k),
                "gate_up_proj_bias": normal(E, 2 * I),
                "down_proj_bias": normal(E, H),
                "gate_up_lora": kernel.ExpertLoRA(normal(E, r, H), normal(E, 2 * I, r)),
                "down_lora": kernel.ExpertLoRA(normal(E, r, I), normal(E, H, r)),
            },
        ),
        "parallel_linear": (kernel.parallel_linear, {**linear, **rest}),
        "parallel_linear_lora": (kernel.parallel_linear_lora, {**linear, **lora, "scaling": 0.5, **rest}),
        "activate": (kernel.activate, {"h": normal(S, 2 * I)}),
        "flatten_sort_count": (kernel.flatten_sort_count, {"expert_idxs": ids, "num_experts": E}),
        "ExpertLoRA": (kernel.ExpertLoRA, {"A": normal(E, r, H), "B": normal(E, I, r), "scaling": 0.5}),
        "from_peft": (kernel.ExpertLoRA.from_peft, {**lora, "num_experts": E, "scaling": 0.5}),
        "from_expert_major": (kernel.ExpertLoRA.from_expert_major, {**lora, "num_experts": E, "scaling": 0.5}),
        "set_lora": (module.set_lora, {**lora, "scaling": 0.5}),
        "ParallelExperts": (module, {name: value for name, value in linear.items() if name != "expert_weights"}),
        "scatter2scatter": (low.scatter2scatter, {**scatter, "b": normal(E, I), "out": normal(S, I)}),
        "scatter2scatter_lora": (
            low.scatter2scatter_lora,
            {**scatter, **lora, "scaling": 0.5, "b": normal(E, I), "out": normal(S, I)},
        ),
        "scatter2scatter_lora_dX": (
            low.scatter2scatter_lora_dX,
            {
                "DY": normal(S, I),
                **{name: value for name, value in scatter.items() if name != "X"},
                **lora,
                "scaling": 0.5,
                "out": normal(S, H),
            },
        ),
        "single2scatter": (low.single2scatter, {"X": normal(1, H), "W": normal(E, H, I), "expert_idxs": ids[:1]}),
        "group": (
            low.group,
            {"A": normal(T, H), "sorted_expert_idxs": slots, "coeff": normal(S), "fan_out": k, "out": normal(S, H)},
        ),
        "group_bwd_W": (low.group_bwd_W, {**grouped, "has_bias": True}),
        "group_bwd_lora": (low.group_bwd_lora, {**grouped, **lora, "scaling": 0.5}),
    }


@pytest.fixture
def fail(calls, kernel, monkeypatch) -> Callable[..., str]:
    """Makes a right call with a change, and returns what it says; a backend function that is called fails the test."""
    for name in BACKEND:

        def launched(*args: Any, name: str = name, **kwargs: Any) -> None:
            raise AssertionError(f"{name} was launched before the arguments were checked")

        monkeypatch.setattr(kernel.reference, name, launched)

    def fail(call: str, change: dict[str, Any], error: type[Exception]) -> str:
        function, arguments = calls[call]
        with pytest.raises((TypeError, ValueError)) as caught:
            function(**{**arguments, **change})
        assert caught.type is error, caught.value
        return str(caught.value)

    return fail


def _assert_says(message: str, name: str, *words: str) -> None:
    """The message names the argument (`lora.A` for the A of an `ExpertLoRA`) and has all the words."""
    assert re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message), f"doesn't name {name}: {message}"
    missing = [word for word in words if word not in message]
    assert not missing, f"doesn't say {missing}: {message}"


@pytest.mark.parametrize("call", CALLS)
def test_the_right_calls_are_right(calls, call):
    """Else the tables below prove nothing."""
    function, arguments = calls[call]
    function(**arguments)


LAUNCHING = [
    call for call in CALLS if call not in ("ExpertLoRA", "from_peft", "from_expert_major", "set_lora", "group")
]


@pytest.mark.parametrize("call", LAUNCHING)
def test_the_guard_sees_a_launch(calls, fail, call):
    """A right call launches something, and the guard that the tests below rely on sees it."""
    function, arguments = calls[call]
    with pytest.raises(AssertionError, match="was launched before"):
        function(**arguments)


# What is wrong in the same way for every tensor of every function.


@pytest.mark.parametrize("call, name", EACH_TENSOR)
def test_not_a_tensor(calls, fail, call, name):
    message = fail(call, {name: [1.0, 2.0]}, TypeError)
    _assert_says(message, name, "tensor", "list")


@pytest.mark.parametrize("call, name", [pair for pair in EACH_TENSOR if pair[1] not in ("coeff", "expert_idxs")])
def test_wrong_number_of_dimensions(calls, fail, call, name):
    tensor = calls[call][1][name]
    message = fail(call, {name: tensor[None]}, ValueError)
    _assert_says(message, name, "[", str((1, *tensor.shape)))
    message = fail(call, {name: torch.tensor(1, dtype=tensor.dtype)}, ValueError)
    _assert_says(message, name, "[", "()")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.float8_e4m3fn, torch.bool], ids=str)
@pytest.mark.parametrize("call, name", EACH_TENSOR)
def test_unsupported_dtype(calls, fail, call, name, dtype):
    """Ids of float or bool, weights of int8 or float8: a TypeError."""
    if dtype == torch.float8_e4m3fn and call in ("ExpertLoRA", "from_peft", "set_lora"):
        return  # these hold any floating point factors; the functions that compute with them check further
    tensor = calls[call][1][name].to(dtype)
    message = fail(call, {name: tensor}, TypeError)
    _assert_says(message, name, str(dtype))


@pytest.mark.parametrize(
    "call, name", [pair for pair in EACH_TENSOR if pair[0] not in ("activate", "flatten_sort_count")]
)
def test_different_devices(calls, fail, call, name):
    tensor = calls[call][1][name].to("meta")
    message = fail(call, {name: tensor}, ValueError)
    _assert_says(message, name, "meta", "cpu")


def test_float64_elsewhere(calls, fail):
    h = calls["activate"][1]["h"]
    message = fail("activate", {"h": h.to("meta", torch.float64)}, TypeError)
    _assert_says(message, "h", "float64, which only the CPU backend computes", "meta")


@pytest.mark.parametrize(
    "call", ["parallel_linear_lora", "scatter2scatter_lora", "scatter2scatter_lora_dX", "group_bwd_lora"]
)
@pytest.mark.parametrize("width", [0, E * r - 1])
def test_factors_that_experts_can_not_share(calls, fail, call, width):
    """Both of them as wide as each other, but no multiple of the experts."""
    lora_A, lora_B = (calls[call][1][name] for name in ("lora_A", "lora_B"))
    message = fail(call, {"lora_A": lora_A[:width], "lora_B": lora_B[:, :width]}, ValueError)
    _assert_says(message, "lora_A", "positive multiple of E = 5", str((width, H)))


@pytest.mark.parametrize("call", ["parallel_linear_lora", "scatter2scatter_lora"])
def test_scaling_is_not_looked_at_without_factors(calls, call):
    function, arguments = calls[call]
    plain = arguments | {"lora_A": None, "lora_B": None}
    assert torch.equal(function(**plain | {"scaling": None}), function(**plain))


@pytest.mark.parametrize("call, name", [pair for pair in EACH_TENSOR if pair[0] in ("moe_mlp", "parallel_linear")])
def test_not_dense(calls, fail, call, name):
    tensor = calls[call][1][name]
    _assert_says(fail(call, {name: tensor.to_sparse()}, TypeError), name, "dense", "torch.sparse_coo")
    _assert_says(fail(call, {name: torch.nested.nested_tensor([tensor])}, TypeError), name, "dense", "nested")


# What is wrong in its own way: (call, argument, its value made from the right one or from all, error, words).

WRONG = [
    # moe_mlp
    ("moe_mlp", "hidden_states", lambda x: x[:, :-1], ValueError, "gate_up_proj", "H = 11", str((E, 2 * I, H))),
    ("moe_mlp", "gate_up_proj", lambda x: x[:, :-1], ValueError, "even", str((E, 2 * I - 1, H))),
    ("moe_mlp", "gate_up_proj", lambda x: x[:, :-2], ValueError, "down_proj", "I = 6", str((E, H, I))),
    ("moe_mlp", "gate_up_proj", lambda x: x.mT, ValueError, "[E, 2I, H]", "H = 12", str((E, H, 2 * I))),
    ("moe_mlp", "down_proj", lambda x: x[1:], ValueError, "[E, H, I]", "E = 5", str((E - 1, H, I))),
    ("moe_mlp", "down_proj", lambda x: x.mT, ValueError, "[E, H, I]", "H = 12", str((E, I, H))),
    ("moe_mlp", "down_proj", lambda x: x.bfloat16(), TypeError, "torch.float32", "torch.bfloat16"),
    ("moe_mlp", "top_k_index", lambda x: x[1:], ValueError, "[T, k]", "T = 6", str((T - 1, k))),
    ("moe_mlp", "top_k_index", lambda x: x - 9, ValueError, "[0, E = 5)", "-9"),
    ("moe_mlp", "top_k_index", lambda x: x.clamp(min=1) + 1, ValueError, "[0, E = 5)", "to 5"),
    ("moe_mlp", "top_k_index", lambda x: x.float(), TypeError, "torch.int64", "torch.float32"),
    ("moe_mlp", "top_k_index", lambda x: x.short(), TypeError, "torch.int64", "torch.int16"),
    ("moe_mlp", "top_k_weights", lambda x: x[:, :1], ValueError, "[T, k]", "k = 2", str((T, 1))),
    ("moe_mlp", "top_k_weights", lambda x: x.long(), TypeError, "torch.float32", "torch.int64"),
    ("moe_mlp", "gate_up_proj_bias", lambda x: x[:, 1:], ValueError, "[E, 2I]", str((E, 2 * I - 1))),
    ("moe_mlp", "down_proj_bias", lambda x: x[:, 1:], ValueError, "[E, H]", str((E, H - 1))),
    *(
        (call, name, lambda _, value=value: value, TypeError, "bool", repr(value))
        for call, names in (
            ("moe_mlp", ("is_transposed", "is_concatenated", "has_gate", "expert_parallel")),
            ("activate", ("has_gate", "is_concatenated")),
            ("parallel_linear", ("grouped_in", "grouped_out")),
            ("parallel_linear_lora", ("grouped_in", "grouped_out")),
        )
        for name in names
        for value in ("no", None, 1)
    ),
    ("moe_mlp", "down_proj_bias", lambda x: x[1:], ValueError, "[E, H]", "E = 5", str((E - 1, H))),
    ("moe_mlp", "gate_up_lora", lambda x: (x.A, x.B), TypeError, "ExpertLoRA", "tuple"),
    ("moe_mlp", "gate_up_lora", lambda x: type(x)(x.A[1:], x.B[1:]), ValueError, "E = 5", str((E - 1, r, H))),
    ("moe_mlp", "gate_up_lora", lambda x: type(x)(x.A, x.B[:, :I]), ValueError, "2I = 14", str((E, I, r))),
    ("moe_mlp", "gate_up_lora", lambda x: type(x)(x.A.to("meta"), x.B.to("meta")), ValueError, "cpu", "meta"),
    ("moe_mlp", "gate_up_lora", lambda x: type(x)(x.A.to(torch.float8_e5m2), x.B), TypeError, "torch.float8_e5m2"),
    ("moe_mlp", "down_lora", lambda x: type(x)(x.A[..., 1:], x.B), ValueError, "I = 7", str((E, r, I - 1))),
    ("moe_mlp", "down_lora", lambda x: type(x)(x.A, x.B[:, 1:]), ValueError, "H = 12", str((E, H - 1, r))),
    ("moe_mlp", "activation", lambda _: "swish", ValueError, "silu", "'swish'"),
    ("moe_mlp", "activation", lambda _: None, ValueError, "silu", "None"),
    ("moe_mlp", "activation", lambda _: ["silu"], ValueError, "silu"),
    ("moe_mlp", "activation", lambda _: "clamped_glu(1.0, 7.0)", ValueError, "clamped_glu(alpha, limit, shift)"),
    ("moe_mlp", "activation", lambda _: "clamped_glu(a, b, c)", ValueError, "clamped_glu(alpha, limit, shift)"),
    ("moe_mlp", "activation", lambda _: "clamped_glu(1.0, 7.0, 0.0", ValueError, "clamped_glu(alpha, limit, shift)"),
    ("moe_mlp", "activation", lambda _: "clamped_glu(1.0, -1.0, 0.0)", ValueError, "-1.0"),
    ("moe_mlp", "activation", lambda _: "clamped_glu(1.0, 7.0, nan)", ValueError, "nan"),
    ("moe_mlp", "top_k_index", lambda x: torch.nn.Parameter(x + 1, requires_grad=False), ValueError, "[0, E = 5)"),
    # activate
    ("activate", "h", lambda x: x[:, 1:], ValueError, "even", str((S, 2 * I - 1))),
    ("activate", "activation", lambda _: "swish", ValueError, "silu", "'swish'"),
    ("activate", "activation", lambda _: torch.tanh, ValueError, "silu", "tanh"),
    # parallel_linear; the lines with lora are parallel_linear_lora's
    ("parallel_linear", "inputs", lambda x: x[1:], ValueError, "[S / k, in]", "5 rows", "k = 2", "S = 12"),
    ("parallel_linear", "inputs", lambda x: x[:, 1:], ValueError, "expert_weights", "in = 11", str((E, H, I))),
    ("parallel_linear", "expert_weights", lambda x: x.mT, ValueError, "[E, in, out]", "in = 12", str((E, I, H))),
    ("parallel_linear", "expert_offsets", lambda x: x[1:], ValueError, "[E]", "E = 5", "(4,)"),
    ("parallel_linear", "sorted_expert_idxs", lambda x: x[1:], ValueError, "[S]", "(11,)"),
    ("parallel_linear", "sorted_scattered_idxs", lambda x: x[1:], ValueError, "[S]", "11", "12"),
    ("parallel_linear", "k", lambda _: 0, ValueError, "at least 1", "0"),
    ("parallel_linear", "k", lambda _: 2.0, TypeError, "int", "float"),
    ("parallel_linear", "k", lambda _: True, TypeError, "int", "bool"),
    ("parallel_linear", "expert_biases", lambda x: x[:, 1:], ValueError, "[E, out]", "out = 7", str((E, I - 1))),
    ("parallel_linear", "gates", lambda x: x[1:], ValueError, "[T, k]", "S = 12", str((T - 1, k))),
    ("parallel_linear", "gates", lambda x: x[:, :0], ValueError, "k > 0", str((T, 0))),
    ("parallel_linear", "sorted_expert_idxs", lambda x: x.flip(0), ValueError, "sorted", "from row"),
    ("parallel_linear", "grouped_out", lambda _: True, ValueError, "gates", "False", "True"),
    ("parallel_linear", "grouped_in", lambda _: True, ValueError, "inputs", "[S, in]", "6 rows"),
    ("parallel_linear_lora", "lora_A", lambda _: None, ValueError, "lora_B", "both"),
    ("parallel_linear_lora", "lora_B", lambda _: None, ValueError, "lora_A", "both"),
    ("parallel_linear_lora", "lora_A", lambda x: x[1:], ValueError, "lora_B", "E * r", "14"),
    ("parallel_linear_lora", "lora_A", lambda x: x[:, 1:], ValueError, "12", str(H - 1)),
    ("parallel_linear_lora", "lora_B", lambda x: x[1:], ValueError, "7", str(I - 1)),
    ("parallel_linear_lora", "lora_B", lambda x: x[:, :-E], ValueError, "lora_A", "E * r", str((I, E * r - E))),
    ("parallel_linear_lora", "scaling", lambda _: None, TypeError, "float", "None"),
    ("parallel_linear_lora", "scaling", lambda _: "0.5", TypeError, "float", "'0.5'"),
    ("parallel_linear_lora", "scaling", lambda _: float("inf"), ValueError, "finite", "inf"),
    ("parallel_linear", "sorted_scattered_idxs", lambda x: x + 1, ValueError, "[0, S = 12)", "from 1 to 12"),
    ("parallel_linear", "sorted_scattered_idxs", lambda x: x - 1, ValueError, "[0, S = 12)", "from -1 to 10"),
    ("parallel_linear", "expert_offsets", lambda x: x + 1, ValueError, "S = 12", "13]"),
    ("parallel_linear", "expert_offsets", lambda x: x - 12, ValueError, "S = 12", "[-"),
    ("parallel_linear", "expert_offsets", lambda x: x.flip(0), ValueError, "grow", "[12,"),
    # flatten_sort_count
    ("flatten_sort_count", "expert_idxs", lambda x: x.float(), TypeError, "int32 or int64", "torch.float32"),
    ("flatten_sort_count", "num_experts", lambda _: 0, ValueError, "at least 1", "0"),
    ("flatten_sort_count", "num_experts", lambda _: -3, ValueError, "at least 1", "-3"),
    ("flatten_sort_count", "num_experts", lambda _: 5.0, TypeError, "int", "float"),
    ("flatten_sort_count", "num_experts", lambda _: True, TypeError, "int", "bool"),
    ("flatten_sort_count", "num_experts", lambda _: None, TypeError, "int", "NoneType"),
    # ExpertLoRA
    ("ExpertLoRA", "A", lambda x: x[1:], ValueError, "experts", "4", "5"),
    ("ExpertLoRA", "B", lambda x: x[1:], ValueError, "experts", "4", "5"),
    ("ExpertLoRA", "A", lambda x: x[:, 1:], ValueError, "rank", "2", "3"),
    ("ExpertLoRA", "A", lambda x: x[:, :0], ValueError, "rank", "positive", "0"),
    ("ExpertLoRA", "scaling", lambda _: None, TypeError, "float", "None"),
    ("ExpertLoRA", "scaling", lambda _: True, TypeError, "float", "True"),
    ("ExpertLoRA", "scaling", lambda _: torch.tensor(1.0), TypeError, "float", "tensor"),
    ("ExpertLoRA", "scaling", lambda _: float("nan"), ValueError, "finite", "nan"),
    ("ExpertLoRA", "scaling", lambda _: 1e39, ValueError, "float32", "1e+39"),
    ("ExpertLoRA", "scaling", lambda _: 10**400, ValueError, "finite", "1000"),
    *(
        row
        for call in ("from_peft", "from_expert_major")
        for row in (
            (call, "lora_A", lambda x: x[1:], ValueError, "E = 5", str((E * r - 1, H))),
            (call, "lora_A", lambda x: x[:0], ValueError, "positive", str((0, H))),
            (call, "lora_B", lambda x: x[:, E:], ValueError, "E * r", str((I, E * r - E))),
            (call, "num_experts", lambda _: 0, ValueError, "0"),
            (call, "num_experts", lambda _: None, TypeError, "int", "None"),
            (call, "num_experts", lambda _: 5.0, TypeError, "int", "float"),
            (call, "scaling", lambda _: None, TypeError, "float", "None"),
        )
    ),
    # ParallelExperts
    ("set_lora", "lora_A", lambda x: x[:, 1:], ValueError, "[E * r, 12]", str((E * r, H - 1))),
    ("set_lora", "lora_B", lambda x: x[1:], ValueError, "[7, E * r]", str((I - 1, E * r))),
    ("set_lora", "lora_B", lambda _: None, TypeError, "tensor", "NoneType"),
    ("set_lora", "scaling", lambda _: None, TypeError, "float", "None"),
    ("ParallelExperts", "inputs", lambda x: x[:, 1:], ValueError, "11", "12"),
    ("ParallelExperts", "k", lambda _: 0, ValueError, "at least 1", "0"),
    ("ParallelExperts", "expert_offsets", lambda x: x[1:], ValueError, "[E]", "E = 5", "(4,)"),
    # kernels
    ("scatter2scatter", "X", lambda x: x[1:], ValueError, "[S / k, K]", "5 rows", "k = 2", "S = 12"),
    ("scatter2scatter", "W", lambda x: x.mT, ValueError, "[E, K, N]", "K = 12", str((E, I, H))),
    ("scatter2scatter", "W", lambda x: x.half(), TypeError, "torch.float32", "torch.float16"),
    ("scatter2scatter", "sorted_scattered_idxs", lambda x: x[1:], ValueError, "[S]", "S = 12", "(11,)"),
    ("scatter2scatter", "sorted_scattered_idxs", lambda x: x + 1, ValueError, "[0, S = 12)", "to 12"),
    ("scatter2scatter", "sorted_expert_idxs", lambda x: x.flip(0), ValueError, "sorted", "from row"),
    ("scatter2scatter", "sorted_expert_idxs", lambda x: x - E, ValueError, "at least 0", "-"),
    ("scatter2scatter_lora_dX", "sorted_expert_idxs", lambda x: x.flip(0), ValueError, "sorted", "from row"),
    ("scatter2scatter", "k", lambda _: 0, ValueError, "0"),
    ("scatter2scatter", "k", lambda _: 2.0, TypeError, "int", "float"),
    ("scatter2scatter", "b", lambda x: x[:, 1:], ValueError, "[E, N]", "N = 7", str((E, I - 1))),
    ("scatter2scatter", "out", lambda x: x[1:], ValueError, "[S, N]", "S = 12", str((S - 1, I))),
    ("scatter2scatter", "out", lambda x: x.half(), TypeError, "torch.float32", "torch.float16"),
    ("scatter2scatter", "out", lambda x: x.mT.contiguous().mT, ValueError, "contiguous", "(1, 12)"),
    ("scatter2scatter_lora", "lora_A", lambda _: None, ValueError, "lora_B", "both"),
    ("scatter2scatter_lora", "lora_B", lambda _: None, ValueError, "lora_A", "both"),
    ("scatter2scatter_lora", "lora_A", lambda x: x[:, 1:], ValueError, "12", "11"),
    ("scatter2scatter_lora", "scaling", lambda _: None, TypeError, "float", "None"),
    ("scatter2scatter_lora_dX", "DY", lambda x: x[:, 1:], ValueError, "W", "N = 6", str((E, H, I))),
    ("scatter2scatter_lora_dX", "DY", lambda x: x[1:], ValueError, "11 rows", "S = 12"),
    ("scatter2scatter_lora_dX", "lora_A", lambda _: None, TypeError, "tensor", "None"),
    ("scatter2scatter_lora_dX", "lora_B", lambda x: x[1:], ValueError, "7", "6"),
    ("scatter2scatter_lora_dX", "out", lambda x: x[:, 1:], ValueError, "12", str((S, H - 1))),
    ("single2scatter", "X", lambda x: x.repeat(2, 1), ValueError, "one token", str((2, H))),
    ("single2scatter", "W", lambda x: x[:, 1:], ValueError, "K = 12", str((E, H - 1, I))),
    ("single2scatter", "expert_idxs", lambda x: x[0], ValueError, "k]", "(2,)"),
    ("group", "A", lambda x: x[1:], ValueError, "S / fan_out", "S = 12", "fan_out = 2", str((T - 1, H))),
    ("group", "fan_out", lambda _: 0, ValueError, "0"),
    ("group", "fan_out", lambda _: 2.0, TypeError, "int", "float"),
    ("group", "coeff", lambda x: x[1:], ValueError, "[S]", "S = 12", "(11,)"),
    ("group", "out", lambda x: x[1:], ValueError, "[S, N]", "S = 12", str((S - 1, H))),
    ("group", "out", lambda x: x.half(), TypeError, "torch.float32", "torch.float16"),
    ("group_bwd_W", "DY", lambda x: x[1:], ValueError, "[S, N]", "S = 12", str((S - 1, I))),
    ("group_bwd_W", "DY", lambda x: x.half(), TypeError, "torch.float32", "torch.float16"),
    ("group_bwd_W", "expert_offsets", lambda x: x[1:], ValueError, "[E]", "E = 5", "(4,)"),
    ("group_bwd_W", "E", lambda _: 4, ValueError, "E = 4", "(5,)"),
    ("group_bwd_lora", "lora_A", lambda _: None, TypeError, "tensor", "None"),
    ("group_bwd_lora", "lora_A", lambda x: x[:, 1:], ValueError, "12", "11"),
    ("group_bwd_lora", "E", lambda _: 4, ValueError, "E = 4", "(5,)"),
    ("group_bwd_lora", "scaling", lambda _: None, TypeError, "float", "None"),
]


@pytest.mark.parametrize(
    "call, name, make, error, words",
    [pytest.param(*row[:4], row[4:], id=f"{row[0]}-{row[1]}-{i}") for i, row in enumerate(WRONG)],
)
def test_wrong_call(calls, fail, call, name, make, error, words):
    value = make(calls[call][1].get(name))
    _assert_says(fail(call, {name: value}, error), name, *words)


def test_more_choices_than_can_be_counted(kernel):
    """Of nothing but views of one element."""
    index, weights = torch.zeros(1, dtype=torch.int64), torch.ones(1)
    x, up, down = torch.ones(1, 1).expand(2**30, H), torch.ones(E, 2 * I, H), torch.ones(E, H, I)
    must = "must be of fewer than 2147483648 choices, got shape (1073741824, 2)"
    with pytest.raises(ValueError, match=re.escape(f"moe_mlp: top_k_index {must}")):
        kernel.moe_mlp(x, up, down, index.expand(2**30, 2), weights.expand(2**30, 2))
    with pytest.raises(ValueError, match=re.escape(f"flatten_sort_count: expert_idxs {must}")):
        kernel.flatten_sort_count(index.expand(2**30, 2), E)
    with pytest.raises(ValueError, match="flatten_sort_count: expert_idxs must be of fewer than 134152223 choices"):
        kernel.flatten_sort_count(index.expand(134152223), 2048)


@pytest.mark.parametrize(
    "sizes, error, words",
    [
        ((0, H, I), ValueError, "num_experts must be at least 1, got 0"),
        ((E, 8.0, I), TypeError, "input_size must be an int, got float"),
        ((E, H, -1), ValueError, "output_size must be at least 1, got -1"),
        ((E, H, I, "yes"), TypeError, "bias must be a bool, got 'yes'"),
    ],
)
def test_experts_of_wrong_sizes(kernel, sizes, error, words):
    with pytest.raises(error, match=f"ParallelExperts: {words}"):
        kernel.ParallelExperts(*sizes)


def test_lora_of_the_wrong_projection(calls, fail):
    arguments = calls["moe_mlp"][1]
    for name, other in (("gate_up_lora", "down_lora"), ("down_lora", "gate_up_lora")):
        message = fail("moe_mlp", {name: arguments[other], other: None}, ValueError)
        _assert_says(message, name, f"{name}.A", f"{H if name == 'gate_up_lora' else I} as in")


def test_no_choice_and_no_expert(calls, fail):
    """k = 0 or E = 0: nothing that could be computed, and no tile could be divided among."""
    mlp = calls["moe_mlp"][1]
    none = {name: mlp[name][:, :0] for name in ("top_k_index", "top_k_weights")}
    _assert_says(fail("moe_mlp", none, ValueError), "top_k_index", "one", "0")
    none = {name: mlp[name][:0] for name in ("gate_up_proj", "down_proj")}
    none |= {name: None for name in mlp if name.endswith(("bias", "lora"))}
    _assert_says(fail("moe_mlp", none, ValueError), "gate_up_proj", "one", "0")


@pytest.mark.parametrize("call", ["parallel_linear", "scatter2scatter", "group_bwd_W"])
def test_no_expert(calls, fail, call):
    arguments = calls[call][1]
    none = {name: arguments[name][:0] for name in ("expert_weights", "expert_offsets", "W") if name in arguments}
    none |= {name: None for name in ("expert_biases", "b") if name in arguments}
    none |= {"E": 0} if "E" in arguments else {}
    message = fail(call, none, ValueError)
    _assert_says(message, {"parallel_linear": "expert_weights", "scatter2scatter": "W", "group_bwd_W": "E"}[call], "0")


def test_sentinels_are_allowed_where_asked_for(calls):
    """expert_parallel=True takes ids >= E; never negative ones."""
    function, arguments = calls["moe_mlp"]
    ids = arguments["top_k_index"].masked_fill(arguments["top_k_index"] == 0, E + 2)
    assert (ids >= E).any()
    with pytest.raises(ValueError, match=r"top_k_index must be in \[0, E = 5\)"):
        function(**{**arguments, "top_k_index": ids})
    function(**{**arguments, "top_k_index": ids, "expert_parallel": True})
    with pytest.raises(ValueError, match="top_k_index .* -1"):
        function(**{**arguments, "top_k_index": ids.masked_fill(ids == 1, -1), "expert_parallel": True})


@pytest.mark.parametrize(
    "activation, error, words",
    [
        (lambda h: h, ValueError, ("I = 7", str((S, 2 * I)))),
        (lambda h: h[1:, :I], ValueError, (str(S), str((S - 1, I)))),
        (lambda h: h[None, :, :I], ValueError, ("[S, I]", str((1, S, I)))),
        (lambda h: h[:, :I].long(), TypeError, ("torch.float32", "torch.int64")),
        (lambda h: h[:, :I].to("meta"), ValueError, ("cpu", "meta")),
        (lambda h: None, TypeError, ("tensor", "NoneType")),
    ],
)
def test_own_activation_of_a_wrong_result(kernel, calls, monkeypatch, activation, error, words):
    """It is known only after the up projection: but nothing more is launched."""
    function, arguments = calls["moe_mlp"]
    launches, grouped_gemm = [], kernel.reference.grouped_gemm

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        launches.append(1)
        return grouped_gemm(*args, **kwargs)

    monkeypatch.setattr(kernel.reference, "grouped_gemm", counted)
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**arguments, activation=activation)
    assert caught.type is error, caught.value
    _assert_says(str(caught.value), "activation", *words)
    assert len(launches) == 1


# Nothing but arguments decides what the kernel does, and loading it changes nothing of the process.


def _names(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain."""
    if isinstance(node, ast.Attribute):
        return f"{_names(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("file", sorted((ROOT / "torch-ext").rglob("*.py")), ids=lambda file: file.name)
def test_source_reads_no_environment_and_sets_no_global(file):
    for node in ast.walk(ast.parse(file.read_text())):
        imported = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        roots = {name.partition(".")[0] for name in imported}
        assert not roots & {"os", "environ", "getenv"}, f"line {node.lineno} imports {imported}"
        assert not isinstance(node, (ast.Global, ast.Nonlocal)), f"line {node.lineno}: {ast.unparse(node)}"
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            assert not _names(target).startswith(("torch.", "sys.")), f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Call):
            called = _names(node.func)
            assert not re.match(r"torch\.(\w+\.)*(set_|use_|manual_seed|seed)", called), (
                f"line {node.lineno}: {called}"
            )


FLAGS = """
import json, os, sys, warnings
import sympy  # torch's, which it imports when a custom op is called first: it adds a filter of warnings
import torch
import kernels  # the loader, whose own doings are not the kernel's

def flags():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warning": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills memory": torch.utils.deterministic.fill_uninitialized_memory,
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "grad mode": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        "matmul precision": torch.get_float32_matmul_precision(),
        "tf32": [torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32],
        "reduced": str(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
        "benchmark": torch.backends.cudnn.benchmark,
        "autocast": [torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")],
        "flush denormal": (torch.tensor([1e-310], dtype=torch.float64) * 1).item() == 0,
        "random state": torch.get_rng_state().tolist(),
        "print options": str(torch._tensor_str.PRINT_OPTS),
        "environment": dict(os.environ),
        "warning filters": len(warnings.filters),
        "hooks": [str(sys.excepthook), str(torch.Tensor.__torch_function__)],
    }

before = flags()
kernel = kernels.get_kernel(sys.argv[1], version=1)
ids = torch.zeros(3, 2, dtype=torch.int64)
kernel.moe_mlp(torch.ones(3, 4), torch.ones(1, 6, 4), torch.ones(1, 4, 3), ids, torch.ones(3, 2))
after = flags()
print(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))
"""


def test_loading_and_calling_sets_no_global_state(tmp_path):
    script = tmp_path / "flags.py"
    script.write_text(FLAGS)
    done = subprocess.run([sys.executable, script, REPO_ID], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}
