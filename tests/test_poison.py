"""What must not spread, interfere or vary: NaN and Inf, threads, repetition. Bit for bit, forward and backward."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import inner
from numerics import Case, Linear
from torch import Tensor
from torch.utils.checkpoint import checkpoint

every_device = pytest.mark.every_device

T, H, I, E, k, r = 19, 24, 16, 6, 2, 4  # noqa: E741
TOKEN, CHOICE, EXPERT = 7, 1, 2
EXPERTS_OWN = (
    "gate_up_proj",
    "down_proj",
    "gate_up_proj_bias",
    "down_proj_bias",
    "gate_up_A",
    "gate_up_B",
    "down_A",
    "down_B",
)


def experts_case(dtype: torch.dtype = torch.float32, **options) -> Case:
    is_concatenated = dtype == torch.float32  # gate and up are loaded one way or the other
    return Case(T, H, I, E, k, r, dtype=dtype, has_bias=True, is_concatenated=is_concatenated, **options)


def differing(got: Tensor, want: Tensor) -> set[int]:
    """The rows (tokens, or experts) that are not the same bits; NaN differs from everything."""
    return set(torch.nonzero((got != want).flatten(1).any(1))[:, 0].tolist())


def run(kernel, case: Case, device: torch.device) -> dict[str, Tensor]:
    return case.run(kernel, kernel.moe_mlp, device, reference=False)


@functools.cache
def clean_run(kernel, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    return run(kernel, experts_case(dtype), device)


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", EXPERTS_OWN)
def test_one_experts_weights(kernel, device, name, dtype):
    """A weight, bias or factor of one expert: its tokens, and its own gradients. Nothing of any other expert."""
    case = experts_case(dtype)
    clean = clean_run(kernel, dtype, device)
    case.tensors[name][EXPERT] = float("nan" if "down" in name else "inf")
    got = run(kernel, case, device)
    tokens = set(torch.nonzero((case.top_k_index == EXPERT).any(1))[:, 0].tolist())
    assert 0 < len(tokens) < T
    assert differing(got["output"], clean["output"]) == tokens
    for other in ("d hidden_states", "d top_k_weights"):
        assert differing(got[other], clean[other]) <= tokens, other
    weights = got["d top_k_weights"][case.top_k_index != EXPERT], clean["d top_k_weights"][case.top_k_index != EXPERT]
    assert torch.equal(*weights), "the weight of a token's other choice depends on the other expert alone"
    for own in EXPERTS_OWN:
        assert differing(got[f"d {own}"], clean[f"d {own}"]) <= {EXPERT}, own


@every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["hidden_states", "top_k_weights", "grad"])
def test_one_tokens_values(kernel, device, name, dtype):
    """A token's activations, a routing weight or its incoming gradient: that token, and its experts' gradients.

    A routing weight's gradient is no function of the weight, nor a down bias's of the activations.
    """
    case = experts_case(dtype)
    clean = clean_run(kernel, dtype, device)
    experts = set(case.top_k_index[TOKEN].tolist())
    if name == "grad":
        case.grad[TOKEN] = float("nan")
    elif name == "top_k_weights":
        case.tensors[name][TOKEN, CHOICE] = float("nan")
        experts = {int(case.top_k_index[TOKEN, CHOICE])}
    else:
        case.tensors[name][TOKEN] = float("nan")
    got = run(kernel, case, device)
    assert differing(got["output"], clean["output"]) == (set() if name == "grad" else {TOKEN})
    assert differing(got["d hidden_states"], clean["d hidden_states"]) == {TOKEN}
    weights = set() if name == "top_k_weights" else {TOKEN}
    assert differing(got["d top_k_weights"], clean["d top_k_weights"]) == weights
    for own in EXPERTS_OWN:
        spoilt = set() if (name, own) == ("hidden_states", "down_proj_bias") else experts
        assert differing(got[f"d {own}"], clean[f"d {own}"]) == spoilt, own


@every_device
@pytest.mark.parametrize("layout", ["bias", "gates bias", "grouped_in grouped_out"])
@pytest.mark.parametrize("name", ["expert_weights", "inputs"])
def test_parallel_linear_lora(kernel, device, name, layout):
    """One expert's Inf, or one row's NaN, in a single linear."""
    case = Linear(T, k, E, r, H, I, torch.float32, layout)
    clean = case.run(kernel, device)
    ids = case.ids.reshape(-1)
    row = 7
    if "grouped_in" in layout:
        hit = case.order == case.order[row]  # rows and slots are in grouped order
        slots = ids[case.order] == EXPERT if name == "expert_weights" else hit
        owners = {int(ids[case.order[row]])}
    else:
        slots = ids == EXPERT if name == "expert_weights" else torch.arange(T * k) // k == row
        owners = set(case.ids[row].tolist())
    case.tensors[name][EXPERT if name == "expert_weights" else row] = (
        float("inf") if name == "expert_weights" else float("nan")
    )
    got = case.run(kernel, device)
    tokens = slots.view(T, k).any(1)
    want = set(torch.nonzero(tokens if "gates" in layout else slots)[:, 0].tolist())
    assert 0 < len(want) < T
    assert differing(got["output"], clean["output"]) == want
    rows = slots if "grouped_in" in layout else tokens
    spoilt = set(torch.nonzero(rows)[:, 0].tolist()) if name == "expert_weights" else set()
    assert differing(got["d inputs"], clean["d inputs"]) == spoilt, "dx is no function of x"
    experts = set() if name == "expert_weights" else owners
    assert differing(got["d expert_weights"], clean["d expert_weights"]) == experts, "nor dW of W"


def repeated(call: Callable[[], list[Tensor]], times: int) -> None:
    first = call()
    for _ in range(times - 1):
        assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))


def step(kernel, case: Case, device: torch.device, how: str) -> Callable[[], list[Tensor]]:
    """A forward and backward on fresh leaves: its output and all gradients."""

    def layer(x: dict[str, Tensor], index: Tensor) -> Tensor:
        rest = {name: x[name] for name in x if name[-2:] not in ("_A", "_B")}
        up = kernel.ExpertLoRA(x["gate_up_A"], x["gate_up_B"], 0.5)
        down = kernel.ExpertLoRA(x["down_A"], x["down_B"], 2.0)
        return kernel.moe_mlp(**rest, top_k_index=index, gate_up_lora=up, down_lora=down)

    function = torch.compile(layer, fullgraph=True, backend="aot_eager") if how == "compiled" else layer

    def call() -> list[Tensor]:
        x = {name: t.to(device, case.dtype, copy=True).requires_grad_() for name, t in case.tensors.items()}
        index = case.top_k_index.to(device)
        if how == "checkpointed":
            out = checkpoint(function, x, index, use_reentrant=False)
        else:
            out = function(x, index)
        out.backward(case.grad.to(device, case.dtype))
        return [out.detach(), *(leaf.grad for leaf in x.values())]

    return call


@every_device
@pytest.mark.parametrize("how", ["plain", "checkpointed"])
def test_twenty_runs_are_one(kernel, device, request, how):
    """Same input, same bits: every gradient, twenty times (in the interpreter two: nothing there is parallel)."""
    times = 2 if request.config.getoption("--device") == "interpreter" else 20
    repeated(step(kernel, experts_case(pattern="hot"), device, how), times)


def test_twenty_compiled_runs_are_one(kernel):
    case, device = experts_case(), torch.device("cpu")
    call = step(kernel, case, device, "compiled")
    repeated(call, 20)
    plain = step(kernel, case, device, "plain")()
    assert all(torch.equal(a, b) for a, b in zip(call(), plain, strict=True))


def test_threads(kernel):
    """Two threads at once, each with its own layer: the bits of each alone."""
    device = torch.device("cpu")
    calls = [step(kernel, experts_case(seed=seed), device, "plain") for seed in (0, 1)]
    alone = [call() for call in calls]
    together = threading.Barrier(2)

    def work(number: int) -> bool:
        together.wait(60)
        results = [calls[number]() for _ in range(20)]
        return all(torch.equal(a, b) for result in results for a, b in zip(result, alone[number], strict=True))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(work, (0, 1)))


@every_device
def test_a_graph_that_is_kept(kernel, device):
    """Two backwards of a graph give the same gradients: only the last one writes over what was saved."""
    case = experts_case()
    arguments, leaves = case.layer(kernel, device)
    out = kernel.moe_mlp(**arguments)
    grad = case.grad.to(out)

    def gradients(**options) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, list(leaves.values()), grad, **options)

    first, again = gradients(retain_graph=True), gradients()
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        gradients()


@every_device
def test_a_backward_that_failed(kernel, device, monkeypatch):
    """It may have written over what was saved: a second try is an error, and no wrong gradient."""
    case = experts_case()
    arguments, leaves = case.layer(kernel, device)
    out = kernel.moe_mlp(**arguments)
    with monkeypatch.context() as patch:

        def fail(*arguments):
            raise torch.OutOfMemoryError("out of memory")

        patch.setattr(inner(kernel, "ops"), "moe_mlp_backward", fail)
        with pytest.raises(torch.OutOfMemoryError):
            torch.autograd.grad(out, list(leaves.values()), case.grad.to(out))
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(out, list(leaves.values()), case.grad.to(out))
