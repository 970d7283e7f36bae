"""`parallel_linear`, `parallel_linear_lora`, `flatten_sort_count`, `ParallelExperts` and the ops: all gradients."""

from __future__ import annotations

import functools
import io
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import inner
from numerics import Case, Linear, assert_close, assert_differentiable, assert_differentiable_once
from torch import nn
from torch.utils.checkpoint import checkpoint

every_device = pytest.mark.every_device


LAYOUTS = [
    f"{into}{out}{bias}".strip()
    for into in ("", "grouped_in ")
    for out in ("", "grouped_out ", "gates ")
    for bias in ("", "bias")
]


@every_device
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.replace(" ", "-") or "plain")
def test_layouts(kernel, device, dtype, layout):
    """Every way to address rows, with LoRA: output and all gradients."""
    Linear(23, 2, 5, 4, 40, 25, dtype, layout).check(kernel, device)


@every_device
def test_more_row_tiles_of_no_expert_than_share_a_sweep(kernel, device):
    """Of 400 slots one has an expert, in tiles of 16 rows: the others' outputs and gradients are zeros."""
    case = Linear(400, 1, 40, 4, 40, 200, torch.float32)
    case.ids[:] = 40
    case.ids[5] = 3
    case.order = torch.sort(case.ids.reshape(-1), stable=True).indices
    case.check(kernel, device)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.replace(" ", "-") or "plain")
def test_layouts_without_lora(kernel, device, dtype, layout):
    Linear(63, 2, 5, 0, 41, 24, dtype, layout).check(kernel, device)


# T, k, E, r, in, out: odd sizes everywhere, ranks from 1 to more than a tile.
SIZES = [
    (1, 1, 1, 12, 40, 25),
    (23, 1, 5, 1, 25, 200),
    (9, 8, 64, 16, 25, 40),
    (130, 2, 5, 64, 200, 72),
    (23, 2, 5, 200, 41, 40),
    (63, 1, 1, 24, 72, 41),
    (0, 2, 5, 4, 40, 25),
]


@every_device
@pytest.mark.parametrize("layout", ["", "grouped_in gates bias"], ids=["up", "down"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(kernel, device, dtype, size, layout):
    Linear(*size, dtype, layout).check(kernel, device)


@every_device
@pytest.mark.parametrize("pattern", ["hot", "empty"])
@pytest.mark.parametrize("layout", ["grouped_out bias", "grouped_in gates"], ids=["up", "down"])
def test_routing_patterns(kernel, device, layout, pattern):
    got = Linear(130, 2, 8, 4, 40, 25, torch.float32, layout, pattern).check(kernel, device)
    if pattern == "empty":
        used = {"d expert_weights": got["d expert_weights"], "d lora_A": got["d lora_A"].view(8, 4, 40)}
        used["d lora_B"] = got["d lora_B"].view(25, 8, 4).transpose(0, 1)
        for name, grad in used.items():
            assert grad[:4].any() and not grad[4:].any(), f"{name} of an expert without rows must be exactly zero"


@pytest.mark.parametrize("layout", ["", "gates bias", "grouped_in", "grouped_in gates bias", "grouped_out"])
def test_each_gradient_alone(kernel, device, layout):
    """Frozen arguments get None; what is asked for is what it is when everything is."""
    case = Linear(23, 2, 5, 4, 40, 25, torch.float32, layout)
    every = case.run(kernel, device)
    assert set(every) == {"output", *(f"d {name}" for name in case.tensors)}
    for name in case.tensors:
        case.frozen = tuple(other for other in case.tensors if other != name)
        alone = case.run(kernel, device)
        assert set(alone) == {"output", f"d {name}"}
        assert torch.equal(alone[f"d {name}"], every[f"d {name}"]), name
    case.frozen = tuple(case.tensors)
    assert torch.equal(case.run(kernel, device)["output"], every["output"]), "without autograd: the same bits"


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("r", [0, 4], ids=["base", "lora"])
def test_checkpointed(kernel, device, r, use_reentrant):
    """What is saved is asked for once: without reentrance, torch refuses a second time."""
    case = Linear(23, 2, 5, r, 40, 25, torch.float32, "gates bias")
    function = kernel.parallel_linear_lora if r else kernel.parallel_linear

    def checkpointed(inputs, **arguments):
        return checkpoint(lambda x: function(x, **arguments), inputs, use_reentrant=use_reentrant)

    again = SimpleNamespace(
        flatten_sort_count=kernel.flatten_sort_count, parallel_linear=checkpointed, parallel_linear_lora=checkpointed
    )
    got, want = case.run(again, device), case.run(kernel, device)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_with_a_function_for_activation(kernel, device, use_reentrant):
    case = Case(23, 40, 24, 5, 2, 4, dtype=torch.float32)

    def function(**arguments):
        return kernel.moe_mlp(**arguments | {"activation": lambda h: F.silu(h[:, :24]) * h[:, 24:]})

    def checkpointed(hidden_states, **arguments):
        return checkpoint(lambda x: function(hidden_states=x, **arguments), hidden_states, use_reentrant=use_reentrant)

    got, want = (case.run(kernel, layer, device, reference=False) for layer in (checkpointed, function))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_autograd_sees_the_factors_themselves(kernel, device):
    """No view of them that it would have to undo: two linears have six of its nodes less."""
    case = Linear(23, 2, 5, 4, 40, 25, torch.float32)
    x = {name: tensor.to(device, torch.float32).requires_grad_() for name, tensor in case.tensors.items()}
    out = kernel.parallel_linear_lora(**x, **case.routing(kernel, device), k=2)
    leaves = [getattr(node, "variable", None) for node, _ in out.grad_fn.next_functions if node is not None]
    assert all(any(leaf is tensor for leaf in leaves) for tensor in x.values())


@every_device
def test_second_backward_and_none_of_the_second_order(kernel, device):
    """A retained graph gives the same gradients again; a gradient of a gradient is refused, not wrong."""
    case = Linear(23, 2, 5, 4, 40, 25, torch.float32, "gates bias")
    x = {name: tensor.to(device, torch.float32).requires_grad_() for name, tensor in case.tensors.items()}
    out = kernel.parallel_linear_lora(**x, **case.routing(kernel, device), k=2)
    first = torch.autograd.grad(out.sum(), list(x.values()), retain_graph=True)
    second = torch.autograd.grad(out.sum(), list(x.values()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_differentiable_once(out, list(x.values()))
    call = functools.partial(kernel.parallel_linear_lora, **x, **case.routing(kernel, device), k=2)
    assert_differentiable(call, list(x.values()))


@every_device
def test_scaling_zero_means_zero(kernel, device):
    case = Linear(23, 2, 5, 4, 40, 25, torch.float32, "bias", scaling=0.0)
    got = case.check(kernel, device)
    assert not got["d lora_A"].any() and not got["d lora_B"].any()
    case.r = 0
    case.tensors = {name: tensor for name, tensor in case.tensors.items() if not name.startswith("lora")}
    plain = case.run(kernel, device)
    assert all(torch.equal(plain[name], got[name]) for name in plain)


def test_adapter_dtype(kernel, device):
    """fp32 adapters on a half precision base: their gradients are float32, the others' are the base's."""
    case = Linear(63, 2, 5, 12, 40, 25, torch.float16, "gates bias", adapter_dtype=torch.float32)
    got = case.check(kernel, device, bound=1.5e-3)
    for name, tensor in got.items():
        assert tensor.dtype == (torch.float32 if "lora" in name else torch.float16), name


@every_device
@pytest.mark.parametrize("layout", ["bias", "grouped_out", "gates bias", "grouped_in gates bias", "grouped_in"])
def test_rows_of_no_expert_are_zeros(kernel, device, layout):
    """Ids >= E: exactly zero rows, forward and in dx, whatever lies in their inputs or in fresh memory."""
    case = Linear(23, 2, 5, 4, 40, 25, torch.float32, layout, sentinels=True)
    case.check(kernel, device)
    dead = case.ids.reshape(-1) >= 5
    if "grouped_in" in layout:
        case.tensors["inputs"][dead[case.order]] = float("nan")
    elif "gates" not in layout:
        case.tensors["inputs"][dead.view(23, 2).all(1)] = float("nan")
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch fills fresh memory with NaN in this mode"
    try:
        got = case.run(kernel, device)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in got.values())
    slots = dead[case.order] if "grouped_out" in layout else dead
    if "gates" in layout:
        assert not got["d gates"].view(-1)[slots].any() and not got["output"][dead.view(23, 2).all(1)].any()
    else:
        assert got["output"][~slots].any(1).all() and not got["output"][slots].any()
    rows = dead[case.order] if "grouped_in" in layout else dead.view(23, 2).all(1)
    assert got["d inputs"][~rows].any(1).all() and not got["d inputs"][rows].any()


@every_device
def test_two_linears_are_the_experts_layer(kernel, device):
    """How ScatterMoE users write an MoE: up to grouped rows, the activation, down from them with the gates, k = 1."""
    case = Case(23, 40, 24, 5, 2, 4, dtype=torch.float32, has_bias=True)
    want = case.run(kernel, kernel.moe_mlp, device, reference=False)
    x = {name: tensor.to(device, torch.float32).requires_grad_() for name, tensor in case.tensors.items()}
    routing = kernel.flatten_sort_count(case.top_k_index.to(device), 5)

    def linear(inputs, projection, k, scaling, **options):
        A, B = x[f"{projection}_A"].reshape(5 * 4, -1), x[f"{projection}_B"].transpose(0, 1).reshape(-1, 5 * 4)
        weight, bias = x[f"{projection}_proj"].mT, x[f"{projection}_proj_bias"]
        return kernel.parallel_linear_lora(inputs, weight, k, *routing, A, B, scaling, bias, **options)

    gate, up = linear(x["hidden_states"], "gate_up", 2, 0.5, grouped_out=True).chunk(2, -1)
    a = torch.nn.functional.silu(gate) * up
    out = linear(a, "down", 1, 2.0, gates=x["top_k_weights"], grouped_in=True)
    out.backward(case.grad.to(device, torch.float32))
    assert_close({"output": (out, want["output"]), **{n: (x[n].grad, want[f"d {n}"]) for n in x}}, 1e-6)


@every_device
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape, num_experts", [((37, 8), 64), ((300,), 5), ((0, 2), 5), ((1, 1), 1)], ids=str)
def test_flatten_sort_count(kernel, device, shape, num_experts, dtype):
    """A stable sort: slots of one expert keep their order; offsets are cumulative counts, one an expert."""
    ids = torch.randint(0, num_experts, shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    experts, slots, offsets = kernel.flatten_sort_count(ids.to(device), num_experts)
    want = torch.sort(ids.flatten().long(), stable=True)
    assert experts.dtype == slots.dtype == offsets.dtype == torch.int64
    assert torch.equal(experts.cpu(), want.values) and torch.equal(slots.cpu(), want.indices)
    assert torch.equal(offsets.cpu(), torch.bincount(want.values, minlength=num_experts).cumsum(0))


@every_device
def test_flatten_sort_count_puts_sentinels_last(kernel, device):
    ids = torch.tensor([[5, 0], [-1, 4], [900, 0], [4, 6]], device=device)
    experts, slots, offsets = kernel.flatten_sort_count(ids, 5)
    assert slots.tolist() == [1, 5, 3, 6, 0, 2, 4, 7]
    assert experts[:4].tolist() == [0, 0, 4, 4] and (experts[4:] >= 5).all()
    assert offsets.tolist() == [2, 2, 2, 2, 4], "sentinels are counted by no expert"


def test_compiles_without_a_graph_break(kernel):
    """Routing included, with any number of tokens."""

    def call(x, ids):
        routing = kernel.flatten_sort_count(ids, 5)
        y = kernel.parallel_linear_lora(x["inputs"], x["expert_weights"], 2, *routing, x["lora_A"], x["lora_B"], 0.5)
        ones = torch.eye(25)[None].expand(5, 25, 25)
        return kernel.parallel_linear(y, ones, 1, *routing, gates=x["gates"])

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    case = Linear(23, 2, 5, 4, 40, 25, torch.float32, "gates")
    for T in (23, 17):
        x = {name: tensor.float() for name, tensor in case.tensors.items()}
        x = {name: t[:T] if name in ("inputs", "gates") else t for name, t in x.items()}
        x = {name: tensor.clone().requires_grad_() for name, tensor in x.items()}
        out, want = compiled(x, case.ids[:T]), call(x, case.ids[:T])
        grads, wants = (torch.autograd.grad(y.sum(), list(x.values())) for y in (out, want))
        assert torch.equal(out, want) and all(torch.equal(a, b) for a, b in zip(grads, wants, strict=True))


# ParallelExperts


def _module(kernel, bias: bool = True, lora: bool = True):
    torch.manual_seed(3)
    module = kernel.ParallelExperts(5, 40, 25, bias=bias)
    if bias:
        nn.init.normal_(module.bias)
    if lora:
        module.set_lora(torch.randn(5 * 3, 40), torch.randn(25, 5 * 3), 0.5)
    return module


@every_device
@pytest.mark.parametrize("lora", [False, True], ids=["base", "lora"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_parallel_experts(kernel, device, bias, lora):
    """The module is the function of its own parameters, and all of them get their gradients."""
    module = _module(kernel, bias, lora).to(device)
    assert 0.019 < module.weight.std() < 0.021
    assert set(dict(module.named_parameters())) == {
        "weight",
        *(["bias"] if bias else []),
        *(["lora_A", "lora_B"] if lora else []),
    }
    case = Linear(23, 2, 5, 3 if lora else 0, 40, 25, torch.float32, "grouped_in gates " + "bias" * bias)
    names = {"expert_weights": "weight", "expert_biases": "bias"}
    owned = {name: names.get(name, name) for name in case.tensors if name not in ("inputs", "gates")}
    for name, attribute in owned.items():
        value = getattr(module, attribute).detach().cpu().double()
        case.tensors[name] = value.mT if attribute == "weight" else value
    want = case.want(kernel)
    inputs, gates = (case.tensors[name].to(device, torch.float32).requires_grad_() for name in ("inputs", "gates"))
    routing = kernel.flatten_sort_count(case.ids.to(device), 5)
    out = module(inputs, 1, *routing, gates=gates, grouped_in=True)
    out.backward(case.grad.to(device, torch.float32))
    grads = {name: getattr(module, attribute).grad for name, attribute in owned.items()}
    grads["expert_weights"] = grads["expert_weights"].mT
    grads |= {"inputs": inputs.grad, "gates": gates.grad}
    assert_close({"output": (out, want["output"]), **{n: (grads[n], want[f"d {n}"]) for n in grads}}, 1e-6)


def test_parallel_experts_passes_every_flag(kernel):
    module = _module(kernel)
    ids = torch.randint(0, 5, (9, 2))
    routing = kernel.flatten_sort_count(ids, 5)
    x = torch.randn(9, 40)
    scattered, grouped = module(x, 2, *routing), module(x, 2, *routing, grouped_out=True)
    assert torch.equal(scattered[routing[1]], grouped)
    assert torch.equal(module(x.repeat_interleave(2, 0)[routing[1]], 1, *routing, grouped_in=True), scattered)


def test_set_lora_makes_parameters(kernel):
    module = _module(kernel, lora=False)
    A, B = nn.Parameter(torch.randn(5 * 3, 40)), torch.randn(25, 5 * 3)
    module.set_lora(A, B, 0.25)
    assert module.lora_A is A, "a Parameter is kept: an optimizer or PEFT may hold it"
    assert isinstance(module.lora_B, nn.Parameter) and module.lora_B.requires_grad
    assert module.lora_B.data_ptr() == B.data_ptr() and module.scaling == 0.25
    assert {"lora_A", "lora_B"} <= set(dict(module.named_parameters()))
    assert "lora_rank=3" in repr(module)
    module.to(torch.bfloat16)
    assert module.lora_A.dtype == module.lora_B.dtype == module.weight.dtype == torch.bfloat16
    module.clear_lora()
    assert module.lora_A is None and module.lora_B is None and "lora" not in repr(module)
    assert set(module.state_dict()) == {"weight", "bias"}
    module.set_lora(torch.randn(5 * 7, 40), torch.randn(25, 5 * 7))
    assert module.scaling == 1.0 and "lora_rank=7" in repr(module), "may be set again, with another rank"


def test_clear_lora_gives_the_base_again(kernel):
    module = _module(kernel)
    routing = kernel.flatten_sort_count(torch.randint(0, 5, (9, 2)), 5)
    x = torch.randn(9, 40)
    with_lora = module(x, 2, *routing)
    module.set_lora(module.lora_A, module.lora_B, 0.0)
    assert torch.equal(module(x, 2, *routing), kernel.parallel_linear(x, module.weight.mT, 2, *routing, module.bias))
    module.clear_lora()
    without = module(x, 2, *routing)
    base = kernel.parallel_linear(x, module.weight.mT, 2, *routing, expert_biases=module.bias)
    assert torch.equal(without, base) and not torch.equal(without, with_lora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_round_trip(kernel, dtype):
    """Bit for bit through a file, LoRA included; nothing but the four tensors is in it."""
    module = _module(kernel).to(dtype)
    assert list(module.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = kernel.ParallelExperts(5, 40, 25, bias=True).to(dtype)
    other.set_lora(torch.zeros(5 * 3, 40, dtype=dtype), torch.zeros(25, 5 * 3, dtype=dtype), module.scaling)
    other.load_state_dict(torch.load(file, weights_only=True))
    for name, tensor in module.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor) and other.state_dict()[name].dtype == dtype


@pytest.mark.parametrize(
    "A, B, scaling",
    [
        (torch.zeros(15, 41), torch.zeros(25, 15), 1.0),
        (torch.zeros(15, 40), torch.zeros(24, 15), 1.0),
        (torch.zeros(15, 40), torch.zeros(25, 20), 1.0),
        (torch.zeros(16, 40), torch.zeros(25, 16), 1.0),
        (torch.zeros(5, 3, 40), torch.zeros(25, 15), 1.0),
        (torch.zeros(15, 40, dtype=torch.int32), torch.zeros(25, 15), 1.0),
        (torch.zeros(15, 40), torch.zeros(25, 15, dtype=torch.int8), 1.0),
        (torch.zeros(15, 40), None, 1.0),
        (torch.zeros(15, 40), torch.zeros(25, 15), None),
        (torch.zeros(15, 40), torch.zeros(25, 15, device="meta"), 1.0),
    ],
)
def test_failing_set_lora_changes_nothing(kernel, A, B, scaling):
    module = _module(kernel)
    before = dict(vars(module)), dict(module.named_parameters())
    with pytest.raises((TypeError, ValueError)):
        module.set_lora(A, B, scaling)
    after = dict(vars(module)), dict(module.named_parameters())
    assert module.scaling == 0.5
    assert all(after[1][name] is parameter for name, parameter in before[1].items())
    assert before[0].keys() == after[0].keys() and before[1].keys() == after[1].keys()


# The custom ops: what torch.compile believes of them (fakes, mutation, aliasing) against what they do.

OPCHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("size", [(7, 2), (0, 2)], ids=str)
def test_opcheck_route(kernel, size):
    ids = torch.randint(0, 5, size).flatten()
    for dtype in (torch.int32, torch.int64):
        torch.library.opcheck(inner(kernel, "ops").route, (ids.to(dtype), 4), test_utils=OPCHECKS)


@pytest.mark.parametrize("strides", ["dense", "strided", "matrices"])
@pytest.mark.parametrize("other_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lora, bias", [(False, False), (True, False), (True, True)])
def test_opcheck_moe_mlp(kernel, lora, bias, other_dtype, strides):
    ops = inner(kernel, "ops")
    is_transposed = strides == "strided"
    case = Case(7, 12, 10, 3, 2, 4 if lora else 0, dtype=torch.float32, has_bias=bias, is_transposed=is_transposed)
    x = {name: tensor.float() for name, tensor in case.tensors.items()}
    x |= {name: x[name].to(other_dtype) for name in ("hidden_states", "down_A", "top_k_weights") if name in x}
    if strides == "strided":  # transposed in memory, as PEFT's B and gpt_oss-like weights are
        for name in ("hidden_states", "gate_up_proj", "down_B", "gate_up_B", "top_k_weights"):
            if name in x:
                x[name] = x[name].mT.contiguous().mT
    if strides == "matrices" and lora:  # as PEFT has them
        for projection in ("gate_up", "down"):
            x[f"{projection}_A"] = x[f"{projection}_A"].flatten(0, 1)
            x[f"{projection}_B"] = x[f"{projection}_B"].permute(1, 2, 0).flatten(1)
    order = ("hidden_states", "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")
    order += ("gate_up_A", "gate_up_B", "down_A", "down_B", "top_k_weights")
    tensors = [x.get(name) for name in order]
    seed = torch.tensor([5]) if bias else None
    flags = (0.5, 2.0, is_transposed, True, True, "silu", 0.0 if seed is None else 0.3)
    given_index = (case.top_k_index, seed)
    given = [tensor is not None for tensor in tensors]
    for needs in ([], given):
        torch.library.opcheck(ops.moe_mlp_forward, (*tensors, *given_index, *flags, needs), test_utils=OPCHECKS)
    out, *saved = ops.moe_mlp_forward(*tensors, *given_index, *flags, given)
    adapters = [given[i] and i in (5, 6, 7, 8) for i in range(10)]
    for needs in [given] + [adapters] * lora:
        arguments = (torch.randn_like(out), *tensors, *given_index, *saved, *flags, needs, False)
        torch.library.opcheck(ops.moe_mlp_backward, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("strides", ["dense", "strided", "matrices"])
@pytest.mark.parametrize("other_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["", "gates bias", "grouped_in gates", "grouped_out"])
def test_opcheck_parallel_linear(kernel, layout, other_dtype, strides):
    ops = inner(kernel, "ops")
    case = Linear(7, 2, 3, 4 if layout else 0, 12, 10, torch.float32, layout)
    x = {name: tensor.float() for name, tensor in case.tensors.items()}
    x |= {name: x[name].to(other_dtype) for name in ("inputs", "lora_A", "gates") if name in x}
    if case.r and strides == "matrices":
        x["A"], x["B"] = x["lora_A"], x["lora_B"]
    elif case.r:
        x["A"], x["B"] = x["lora_A"].view(3, 4, 12), x["lora_B"].view(10, 3, 4).transpose(0, 1)
    if strides == "strided":
        x |= {name: x[name].mT.contiguous().mT for name in ("inputs", "expert_weights", "gates") if name in x}
    tensors = [x.get(name) for name in ("inputs", "expert_weights", "expert_biases", "A", "B", "gates")]
    _, *routing = kernel.flatten_sort_count(case.ids, 3)
    flags = (1 if "grouped_in" in layout else 2, 0.5, "grouped_in" in layout, "grouped_out" in layout)
    given = [tensor is not None for tensor in tensors]
    for needs in ([], given):
        torch.library.opcheck(ops.parallel_linear_forward, (*tensors, *routing, *flags, needs), test_utils=OPCHECKS)
    out, *saved = ops.parallel_linear_forward(*tensors, *routing, *flags, given)
    for needs in (given, [True] + [False] * 5):
        arguments = (torch.randn_like(out), *tensors, *saved, *routing, *flags, needs)
        torch.library.opcheck(ops.parallel_linear_backward, arguments, test_utils=OPCHECKS)


@every_device
def test_strided_indices(kernel, device):
    case = Linear(23, 2, 5, 4, 40, 25, torch.float32, "gates")
    indices = case.routing(kernel, device)
    case.routing = lambda kernel, device: {name: torch.stack([t, t], 1)[:, 0] for name, t in indices.items()}
    case.check(kernel, device)


def test_what_tma_can_read(kernel):
    can_read, memory = inner(kernel, "operands").tma_can_read, torch.zeros(1024, dtype=torch.float16)
    dense = memory[:512].view(4, 8, 16)
    assert can_read(dense, 2) and can_read(dense.mT, 1) and not can_read(dense, 1)
    assert not can_read(memory[1:513].view(4, 8, 16), 2), "a base that is not aligned"
    assert not can_read(memory[:480].view(4, 8, 15)[..., :8], 2), "rows that are not"
    assert not can_read(dense[:1].expand(4, 8, 16), 2), "a stride of 0"
    assert not can_read(dense[:0], 2)


@every_device
@pytest.mark.parametrize("E, N, r", [(3, 40, 16), (1, 5, 3), (37, 130, 64), (8, 2000, 4), (5, 24, 40)])
def test_factors_are_copied_only_where_the_kernels_can_not_read_them(kernel, device, E, N, r):
    """Expert-major ones are views of what is trained; others in the kernels' dtype are made dense, ranks padded."""
    run = kernel.backend.of(torch.empty(0, device=device))
    padding = 0 if run is kernel.reference else -r % 16
    options = {"dtype": torch.float16, "device": device}
    A, B = torch.randn(E * r, N, **options), torch.randn(N, E * r, **options)
    lora, peft = kernel.ExpertLoRA.from_expert_major(A, B, E, 1.0), kernel.ExpertLoRA.from_peft(A, B, E, 1.0)
    readable = [(torch.randn(E, r, 3, device=device), 1), (lora.A, 1)]
    if r % 8 == 0:
        readable.append((lora.B, 2))
    wide = torch.randn(E, N, r + 1, **options)[..., :r]
    shifted = torch.randn(E * N * r + 1, **options)[1:].view(N, E, r).transpose(0, 1)
    copied = [(wide, 2), *([(lora.A[:1].expand(E, r, N), 1), (shifted, 2), (peft.B, 2)] if E > 1 else [])]
    if padding:
        copied, readable = copied + readable, []

    def read(factor, dim, dtype):
        ((A, B),) = run.in_factors(dtype, (factor, None) if dim == 1 else (None, factor))
        assert (A is None) == (dim == 2) and (B is None) == (dim == 1)
        return A if dim == 1 else B

    def padded(factor, dim):
        return F.pad(factor, (0, padding) if dim == 2 else (0, 0, 0, padding))

    for factor, dim in readable:
        assert read(factor, dim, factor.dtype) is factor
    for factor, dim in copied:
        copy = read(factor, dim, factor.dtype)
        assert copy is not factor and copy.is_contiguous() and torch.equal(copy, padded(factor, dim))
    for factor, dim in (*copied, *readable, (peft.A.mT, 2)):
        dtype = torch.float32 if factor.dtype == torch.float16 else torch.float16
        cast = read(factor, dim, dtype)
        assert cast.is_contiguous() and torch.equal(cast, padded(factor, dim).to(dtype)) and cast.dtype != factor.dtype


@every_device
@pytest.mark.parametrize("number", range(1, 10))
def test_stacks_that_are_cast_together(kernel, device, number):
    """As many as there are, of any layouts and dtypes: each into its own, padding zeros, and nothing beside them."""
    run = kernel.backend.of(torch.empty(0, device=device))
    orders = [(0, 1, 2), (1, 2, 0), (2, 0, 1), (1, 0, 2), (2, 1, 0)]
    E, stacks, wanted = 5, [], []
    for i in range(number):
        M, N = (3, 70, 8, 1, 33)[i % 5], (40, 8, 0 if i == 2 else 9, 16, 7)[(i + i // 5) % 5]
        rows, columns = (M, N) if run is kernel.reference else (M + i % 3, N + i % 2 * 3)
        x, order = torch.randn(E, M, N, device=device), orders[i % 5]
        x = x.permute(order).contiguous().permute([order.index(j) for j in range(3)])
        order, shape = orders[(i + 2) % 5], (E, rows, columns)
        dtype = (torch.float16, torch.float32)[i % 2]
        room = torch.full([shape[j] + 1 for j in order], -1.0, device=device, dtype=dtype)
        room = room.permute([order.index(j) for j in range(3)])
        stacks.append((x, room[:E, :rows, :columns]))
        want = F.pad(x, (0, columns - N, 0, rows - M)).to(dtype)
        wanted.append((F.pad(want, (0, 1, 0, 1, 0, 1), value=-1.0), room))
    run.cast(stacks)
    for want, room in wanted:
        assert torch.equal(room, want)


@every_device
@pytest.mark.parametrize(
    "shape, order, is_copied",
    [
        ((4, 40, 16), (1, 2, 0), True),  # PEFT's B
        ((4, 40, 16), (2, 1, 0), True),
        ((4, 40, 1), (1, 0, 2), True),  # expert-major, and of rank 1
        ((4, 40, 16), (0, 1, 2), False),
        ((4, 40, 16), (1, 0, 2), False),  # expert-major
        ((4, 40, 16), (2, 0, 1), False),  # PEFT's B, transposed in memory
        ((1, 40, 16), (1, 2, 0), False),
    ],
    ids=str,
)
def test_gradients_are_written_densely_where_experts_lie_side_by_side(kernel, device, shape, order, is_copied):
    """A gram into any layout: by a copy where each element would be a write of its own; the same sums."""
    run = kernel.backend.of(torch.empty(0, device=device))
    if run is kernel.reference:
        pytest.skip("the CPU backend writes where it is told to")
    E, P, Q = shape
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(24, n, generator=generator).to(device) for n in (P, Q))
    offsets = torch.arange(24 // E, 25, 24 // E, device=device)
    routing = inner(kernel, "backend").routing(torch.arange(24, device=device), offsets)
    memory = torch.full([shape[i] for i in order], float("nan"), device=device)
    out = memory.permute([order.index(i) for i in range(3)])
    stack = run.dense(out)
    assert (stack is not out) == is_copied and stack.shape == out.shape
    run.gram(left, right, routing, stack, left_fan_out=0)
    if is_copied:
        run.cast([(stack, out)])
    want = left.view(E, -1, P).mT.double() @ right.view(E, -1, Q).double()
    assert ((out - want).norm() / want.norm()) < 1e-6
