"""Dropout of what the experts' LoRA reads: the same mask everywhere, from a seed that torch's generator gives."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import inner
from numerics import BASE, BOUNDS, Case, assert_close
from tiny import check_same, loss_and_grads, tiny_model, tokens, wrap
from torch.utils.checkpoint import checkpoint

every_device = pytest.mark.every_device

P = 0.3
LAYOUTS = {
    "frozen base": {"frozen": BASE},
    "everything trains": {"is_transposed": True, "is_concatenated": False, "has_bias": True, "scalings": (2.0, 0.5)},
    "no gate": {"has_gate": False, "activation": "relu2"},
    "empty experts": {"pattern": "empty"},
    "own activation": {"activation": lambda h: torch.tanh(h[:, :24]) * h[:, 24:], "has_bias": True},
}


def both(kernel, case: Case, device: torch.device, seed: torch.Tensor, **options):
    """`moe_mlp`, and the definition in float64, with one seed."""
    function = functools.partial(kernel.moe_mlp, lora_dropout=P, dropout_seed=seed.to(device), **options)
    definition = functools.partial(kernel.reference.moe_mlp, lora_dropout=P, dropout_seed=seed.to(case.home))
    return case.run(kernel, function, device, False), case.run(kernel, definition, case.home, True)


@every_device
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_against_the_definition(kernel, device, dtype, layout):
    """Output and every gradient, with the same mask, at odd sizes."""
    case = Case(21, 40, 24, 5, 2, 4, dtype=dtype, **layout)
    got, want = both(kernel, case, device, torch.tensor([2**62 + 12345]))
    # LoRA's part of two gradients is rounded apart from the rest's.
    assert_close({name: (got[name], want[name]) for name in want}, 1.5 * BOUNDS[dtype])
    plain = case.run(kernel, kernel.reference.moe_mlp, case.home, reference=True)
    changed = {name for name in want if (want[name] - plain[name]).norm() > 0.05 * plain[name].norm()}
    assert changed >= {"output", "d hidden_states", "d gate_up_A", "d gate_up_B", "d down_A", "d down_B"}


@every_device
def test_sentinels(kernel, device):
    """Rows of no expert hold nothing, and what is made of them reaches nothing."""
    case = Case(21, 20, 12, 5, 2, 4, dtype=torch.float32)
    case.top_k_index[::3, 0] = 5
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        got, want = both(kernel, case, device, torch.tensor([7]), expert_parallel=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close({name: (got[name], want[name]) for name in want}, 1e-6)


@every_device
@pytest.mark.parametrize("projection", ["gate_up", "down"])
def test_lora_on_one_projection(kernel, device, projection):
    case = Case(21, 20, 12, 4, 2, 4, dtype=torch.float32)
    results = []
    for function, where, dtype in (
        (kernel.moe_mlp, device, torch.float32),
        (kernel.reference.moe_mlp, case.home, torch.float64),
    ):
        x = {name: tensor.to(where, dtype).requires_grad_() for name, tensor in case.tensors.items()}
        arguments = {name: tensor for name, tensor in x.items() if name[-2:] not in ("_A", "_B")}
        arguments[f"{projection}_lora"] = kernel.ExpertLoRA(x[f"{projection}_A"], x[f"{projection}_B"], 2.0)
        options = {"lora_dropout": P, "dropout_seed": torch.tensor([7], device=where)}
        out = function(**arguments, **options, top_k_index=case.top_k_index.to(where))
        out.backward(case.grad.to(where, dtype))
        results.append({"output": out, **{name: tensor.grad for name, tensor in x.items() if tensor.grad is not None}})
    got, want = results
    assert got.keys() == want.keys() and len(want) == 7
    assert_close({name: (got[name], want[name]) for name in want}, 1e-6)


@every_device
def test_the_mask_is_the_same_everywhere(kernel, device, dtype):
    """Bit for bit as `reference.dropout_keep`: odd sizes, strides, numbered rows, seeds of 64 bits, results added."""
    dropout, keep = inner(kernel, "ops").dropout, kernel.reference.dropout_keep
    torch.manual_seed(0)
    x = torch.rand(9, 1100).to(device, dtype) + 1
    rows = torch.randint(2**32, (9,))
    for seed, p, stream in ((0, 0.1, 0), (1, 0.999, 1), (2**31, 1e-9, 0), (2**63 - 1, 0.1, 1), (-1, 0.5, 0)):
        seed = torch.tensor([seed])
        got = dropout(x, seed.to(device), p, stream, rows.to(device))
        assert torch.equal(got.cpu() != 0, keep(seed, rows, 1100, p=p, stream=stream))
    seed, numbers = torch.tensor([3]), torch.arange(9)
    wide = dropout(x.mT.contiguous().mT, seed.to(device), 0.5, 0, None)
    mask = keep(seed, numbers, 1100, p=0.5, stream=0)
    assert torch.equal(wide.cpu(), torch.where(mask, x.cpu() * 2, 0.0)) and wide.is_contiguous()
    backend = inner(kernel, "backend").of(x)
    out = torch.ones_like(x)
    assert backend.dropout(x, seed.to(device), p=0.5, stream=0, out=out) is out
    assert_close({"sum": (out, 1 + torch.where(mask, x.cpu().double() * 2, 0.0))}, BOUNDS[dtype])
    x[0] = torch.inf  # what is dropped is zero, whatever it was
    assert not dropout(x, seed.to(device), 0.5, 0, None).isnan().any()


def test_statistics_of_the_mask(kernel):
    """The rate, by rows and by columns, and independence of neighbours, rows, streams and seeds: five sigma."""
    keep = kernel.reference.dropout_keep
    rows, columns = torch.arange(1000), 1024
    n = len(rows) * columns
    for p in (0.05, 0.5):
        mask = keep(torch.tensor([11]), rows, columns, p=p, stream=0)
        for dim, count in ((None, n), (0, len(rows)), (1, columns)):
            rate = mask.double().mean() if dim is None else mask.double().mean(dim)
            assert ((rate - (1 - p)).abs() < 5 * (p * (1 - p) / count) ** 0.5).all()
        others = {
            "next column": mask.roll(1, 1),
            "next row": mask.roll(1, 0),
            "row after 256": mask.roll(256, 0),
            "a row and a column on": mask.roll((1, 1), (0, 1)),
            "other stream": keep(torch.tensor([11]), rows, columns, p=p, stream=1),
            "next seed": keep(torch.tensor([12]), rows, columns, p=p, stream=0),
            "next seed, other stream": keep(torch.tensor([10]), rows, columns, p=p, stream=1),
            "high bits of the seed": keep(torch.tensor([11 + 2**32]), rows, columns, p=p, stream=0),
        }
        # Two independent masks agree with probability q; neighbours' agreements are themselves dependent: wider.
        q = p * p + (1 - p) * (1 - p)
        for name, other in others.items():
            agree = (mask == other).double().mean()
            assert abs(agree - q) < 10 * (q * (1 - q) / n) ** 0.5, (p, name)


@every_device
def test_torch_gives_the_seed(kernel, device):
    """`torch.manual_seed` repeats a forward, and the next one has another mask."""
    case = Case(9, 20, 12, 4, 2, 4, dtype=torch.float32)
    x = {name: tensor.float().to(device) for name, tensor in case.tensors.items()}
    A, B = x.pop("gate_up_A"), x.pop("gate_up_B")
    x = {name: tensor for name, tensor in x.items() if not name.startswith("down_") or name == "down_proj"}

    def forward() -> torch.Tensor:
        index, lora = case.top_k_index.to(device), kernel.ExpertLoRA(A, B)
        return kernel.moe_mlp(**x, top_k_index=index, gate_up_lora=lora, lora_dropout=P)

    torch.manual_seed(1)
    first, second = forward(), forward()
    torch.manual_seed(1)
    assert torch.equal(forward(), first) and torch.equal(forward(), second)
    assert (first - second).norm() > 0.02 * first.norm()


@pytest.mark.parametrize("use_reentrant", [True, pytest.param(False, marks=every_device)])
def test_checkpoints_replay_the_mask(kernel, device, use_reentrant):
    case = Case(9, 20, 12, 4, 2, 4, dtype=torch.float32)

    def function(**arguments):
        return kernel.moe_mlp(**arguments, lora_dropout=P)

    def checkpointed(hidden_states, **arguments):
        return checkpoint(lambda x: function(hidden_states=x, **arguments), hidden_states, use_reentrant=use_reentrant)

    torch.manual_seed(1)
    want = case.run(kernel, function, device, reference=False)
    torch.manual_seed(1)
    got = case.run(kernel, checkpointed, device, reference=False)
    assert all(torch.equal(got[name], want[name]) for name in want)


@every_device
def test_none_costs_nothing(kernel, device, monkeypatch):
    """Without dropout, or without LoRA, nothing of it runs, and the generator is not asked."""
    backend = inner(kernel, "backend").of(torch.empty(0, device=device))
    monkeypatch.setattr(backend, "dropout", lambda *_, **__: pytest.fail("dropout ran"))
    case = Case(21, 20, 12, 4, 2, 4, dtype=torch.float32)
    state = torch.get_rng_state()
    want = case.run(kernel, kernel.moe_mlp, device, reference=False)
    got = case.run(kernel, functools.partial(kernel.moe_mlp, lora_dropout=0.0), device, reference=False)
    assert all(torch.equal(got[name], want[name]) for name in want)
    without = Case(21, 20, 12, 4, 2, 0, dtype=torch.float32)
    without.run(kernel, functools.partial(kernel.moe_mlp, lora_dropout=P), device, reference=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradcheck(kernel):
    case = Case(7, 6, 4, 3, 2, 2, dtype=torch.float64)
    x = {name: tensor.requires_grad_() for name, tensor in case.tensors.items()}

    def function(hidden_states, gate_up_proj, down_proj, top_k_weights, up_A, up_B, down_A, down_B):
        return kernel.moe_mlp(
            hidden_states,
            gate_up_proj,
            down_proj,
            case.top_k_index,
            top_k_weights,
            gate_up_lora=kernel.ExpertLoRA(up_A, up_B, 0.5),
            down_lora=kernel.ExpertLoRA(down_A, down_B, 2.0),
            lora_dropout=P,
            dropout_seed=torch.tensor([4]),
        )

    assert torch.autograd.gradcheck(function, tuple(x.values()), fast_mode=True)


def test_compiles_without_a_graph_break(kernel):
    case = Case(7, 12, 10, 3, 2, 2, dtype=torch.float32)
    function = torch.compile(
        functools.partial(kernel.moe_mlp, lora_dropout=P, dropout_seed=torch.tensor([4])),
        fullgraph=True,
        backend="aot_eager",
    )
    got = case.run(kernel, function, torch.device("cpu"), reference=False)
    want = both(kernel, case, torch.device("cpu"), torch.tensor([4]))[0]
    assert_close({name: (got[name], want[name]) for name in want}, 1e-6)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout must be in \[0, 1\), got -0.1"),
        ({"lora_dropout": float("nan")}, ValueError, "lora_dropout must be in"),
        ({"lora_dropout": "0.1"}, TypeError, "lora_dropout must be a float, got str"),
        ({"lora_dropout": P, "dropout_seed": 3}, TypeError, "dropout_seed must be a tensor, got int"),
        ({"lora_dropout": P, "dropout_seed": torch.tensor([1.0])}, TypeError, "dropout_seed must be torch.int64"),
        (
            {"lora_dropout": P, "dropout_seed": torch.tensor([1, 2])},
            ValueError,
            r"dropout_seed must be of one element",
        ),
    ],
)
def test_errors(kernel, options, error, message):
    case = Case(7, 12, 10, 3, 2, 2, dtype=torch.float32)
    with pytest.raises(error, match=f"moe_mlp: {message}"):
        case.run(kernel, functools.partial(kernel.moe_mlp, **options), torch.device("cpu"), reference=False)
    if "dropout_seed" not in options:
        with pytest.raises(error, match=f"kernelize: {message}"):
            kernel.kernelize(tiny_model("mixtral"), **options)


# In a model


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_model_trains_with_dropout(kernel, family):
    """In train mode what LoRA reads is dropped, as the definition does it; in eval it is PEFT's own model."""
    ids = tokens()
    stock = wrap(tiny_model(family), family)
    model = copy.deepcopy(stock)
    report = kernel.kernelize(model, lora_dropout=0.25)
    assert "LoRA on gate_up_proj, down_proj (dropout 0.25)" in str(report)
    assert report.switched[0].lora_dropout == 0.25
    block = model.base_model.model.model.layers[0].mlp
    outer, experts = block.experts, block.experts.get_base_layer()
    factors = {}
    for wrapper in (outer, outer.base_layer):
        A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        factors[wrapper.parameter_name] = kernel.ExpertLoRA.from_peft(A, B, wrapper.num_experts, 2.0)
    biases = [f"{name}_bias" for name in factors] if experts.has_bias else []
    calls = []
    hook = outer.register_forward_hook(lambda module, inputs, out: calls.append((*inputs, out)))
    torch.manual_seed(9)
    logits, _ = loss_and_grads(model, ids)
    hook.remove()
    torch.manual_seed(9)
    x, index, weights, out = calls[0]
    want = kernel.reference.moe_mlp(
        x,
        experts.gate_up_proj,
        experts.down_proj,
        index,
        weights,
        gate_up_lora=factors["gate_up_proj"],
        down_lora=factors["down_proj"],
        **{name: getattr(experts, name) for name in biases},
        is_transposed=experts.is_transposed,
        is_concatenated=experts.is_concatenated,
        activation=experts._apply_gate,
        lora_dropout=0.25,
        dropout_seed=torch.randint(2**63 - 1, (1,)),
    )
    assert_close({"first layer": (out, want)}, 1e-5)
    torch.manual_seed(9)
    again, _ = loss_and_grads(model, ids)
    assert torch.equal(again, logits)
    other, _ = loss_and_grads(model, ids)
    assert (other - logits).norm() > 1e-3 * logits.norm()
    model.eval()
    check_same(loss_and_grads(model, ids), loss_and_grads(stock.eval(), ids))
    model.train()
    kernel.kernelize(model)  # anew, without dropout
    check_same(loss_and_grads(model, ids), loss_and_grads(stock.train(), ids))
    kernel.kernelize(model, lora_dropout=0.25)
    kernel.unkernelize(model)
    assert torch.equal(loss_and_grads(model, ids)[0], loss_and_grads(stock, ids)[0])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_model_with_gradient_checkpointing(kernel, use_reentrant):
    ids = tokens()
    model = wrap(tiny_model("qwen3_moe"), "qwen3_moe")
    kernel.kernelize(model, lora_dropout=0.25)
    torch.manual_seed(9)
    want_logits, want = loss_and_grads(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(9)
    logits, grads = loss_and_grads(model, ids)
    assert torch.equal(logits, want_logits)
    assert grads.keys() == want.keys() and all(torch.equal(grads[name], want[name]) for name in want)


@pytest.mark.parametrize("hooked", ["experts", "wrapper"])
def test_dropout_is_never_left_out_in_silence(kernel, hooked):
    """Hooks on the experts, or on the inner wrapper, where PEFT's own forward runs: the same, or an error.

    It is an error where PEFT merges several active adapters into a weight.
    """
    ids = tokens()

    def logits(adapters: list[str]) -> torch.Tensor:
        model.base_model.set_adapter(adapters)
        torch.manual_seed(9)
        return loss_and_grads(model, ids)[0]

    model = wrap(tiny_model("mixtral"), "mixtral")
    torch.manual_seed(6)
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    kernel.kernelize(model, lora_dropout=0.25)
    one, two = logits(["default"]), logits(["default", "second"])
    for layer in model.base_model.model.model.layers:
        wrapper = layer.mlp.experts
        if hooked == "experts":
            wrapper.get_base_layer().register_forward_hook(lambda *_: None)
        else:
            add_hook_to_module(wrapper.base_layer, ModelHook())
    assert_close({"one": (logits(["default"]), one)}, 1e-5)
    if hooked == "experts":
        assert_close({"two": (logits(["default", "second"]), two)}, 1e-5)
    else:
        with pytest.raises(RuntimeError, match="lora_dropout can't be applied where PEFT merges several"):
            logits(["default", "second"])
