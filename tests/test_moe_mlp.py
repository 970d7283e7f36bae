"""`moe_mlp` against fp64 autograd over the definition: sizes, layouts, dtypes, routing, and what must not happen."""

from __future__ import annotations

import pytest
import torch
from conftest import inner
from functorch.compile import aot_function, nop
from numerics import (
    BASE,
    BOUNDS,
    Case,
    assert_close,
    assert_differentiable,
    assert_differentiable_once,
    relative_error,
)
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

every_device = pytest.mark.every_device

# T, H, I, E, k, r: odd sizes everywhere. A gradient of one token through rank 1 is one scalar product times a vector:
# its relative error is that product's cancellation, so T = 1 goes with larger ranks and r = 1 with more tokens.
SIZES = [
    (1, 40, 24, 1, 1, 12),
    (1, 200, 96, 64, 8, 16),
    (63, 40, 24, 5, 2, 4),
    (63, 200, 24, 5, 1, 12),
    (63, 40, 96, 40, 8, 1),
    (500, 200, 96, 5, 2, 64),
    (500, 40, 96, 40, 2, 16),
    (130, 72, 40, 3, 2, 24),
    (63, 40, 24, 5, 2, 200),
    (0, 40, 24, 5, 2, 4),
]


@every_device
@pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.float32], ids=str)
def test_pefts_layout_at_sizes_of_hoppers_kernels(kernel, device, adapter_dtype):
    """Rows, columns and rank enough for these to be used where there is a Hopper GPU."""
    sizes = {"T": 70, "H": 256, "I": 256, "E": 4, "k": 2, "r": 16}
    case = Case(**sizes, dtype=torch.float16, adapter_dtype=adapter_dtype, of_peft=True, frozen=BASE)
    case.check(kernel, device)


@every_device
@pytest.mark.kernels_ci
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(kernel, device, dtype, size):
    Case(*size, dtype=dtype).check(kernel, device)


@every_device
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "nogate"])
@pytest.mark.parametrize("is_concatenated", [True, False], ids=["halves", "interleaved"])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "transposed"])
def test_layouts(kernel, device, dtype, is_transposed, is_concatenated, has_gate, has_bias):
    case = Case(
        63,
        40,
        24,
        5,
        2,
        4,
        dtype=dtype,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
        has_gate=has_gate,
        has_bias=has_bias,
    )
    case.check(kernel, device)


@every_device
@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "nogate"])
@pytest.mark.parametrize("activation", ["identity", "silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_activations(kernel, device, dtype, activation, has_gate):
    Case(63, 40, 24, 5, 2, 4, dtype=dtype, activation=activation, has_gate=has_gate).check(kernel, device)


@every_device
@pytest.mark.parametrize("is_concatenated", [True, False])
@pytest.mark.parametrize("alpha, limit, shift", [(1.702, 0.6, 1.0), (1.0, 0.4, 0.0)], ids=["gpt-oss", "clamped silu"])
def test_clamped_glu(kernel, device, dtype, alpha, limit, shift, is_concatenated):
    """Limits that many pre-activations pass, against the definition and the formula written out by itself.

    In bfloat16 the output alone: the gradient jumps at the limit, and rounding puts values on either side of it.
    """
    activation = kernel.reference.clamped_glu(alpha, limit, shift)
    case = Case(63, 40, 24, 5, 2, 4, dtype=dtype, activation=activation, is_concatenated=is_concatenated)
    got = case.run(kernel, kernel.moe_mlp, device, reference=False)

    def function(h: torch.Tensor) -> torch.Tensor:
        gate, up = kernel.reference.split_gate_up(h, is_concatenated)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + shift)

    for definition in (activation, function):
        case.activation = definition
        want = case.run(kernel, kernel.reference.moe_mlp, case.home, reference=True)
        compared = ["output"] if dtype == torch.bfloat16 else list(want)
        assert_close({name: (got[name], want[name]) for name in compared}, BOUNDS[dtype])


@every_device
def test_more_row_tiles_of_an_expert_than_share_a_sweep(kernel, device):
    """Tiles have 16 rows, one expert 400, and the outputs several column tiles."""
    Case(400, 200, 40, 40, 1, 4, dtype=torch.float32, pattern="hot").check(kernel, device)


@every_device
def test_own_activation(kernel, device, dtype):
    """Any differentiable function may stand between the two products: here a gate of interleaved halves."""

    def gate_of_halves(h):
        gate, up = h[..., ::2], h[..., 1::2]
        return (torch.tanh(up) + 1) * gate * torch.sigmoid(gate * 1.702)

    # The function's own intermediates are rounded to the dtype, which no fused activation does: twice the bound.
    bound = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    case = Case(63, 40, 24, 5, 2, 4, dtype=dtype, activation=gate_of_halves, is_transposed=True, has_bias=True)
    case.check(kernel, device, bound)


@every_device
@pytest.mark.parametrize("activation", ["silu", lambda h: torch.tanh(h[:, :24]) * h[:, 24:]], ids=["silu", "own"])
def test_expert_norm(kernel, device, activation):
    """A norm of every expert's output before its routing weight, against the definition written out."""
    case = Case(63, 40, 24, 5, 2, 4, dtype=torch.float32, has_bias=True, activation=activation)

    def norm(y):
        return torch.nn.functional.rms_norm(y, (40,))

    def definition(top_k_index, top_k_weights, **options):
        out = 0
        for j in range(2):
            ones = torch.ones_like(top_k_weights[:, j : j + 1])
            y = kernel.reference.moe_mlp(top_k_index=top_k_index[:, j : j + 1], top_k_weights=ones, **options)
            out = out + norm(y) * top_k_weights[:, j : j + 1]
        return out

    got = case.run(kernel, lambda **options: kernel.moe_mlp(expert_norm=norm, **options), device, reference=False)
    want = case.run(kernel, definition, device, reference=True)
    assert_close({name: (got[name], want[name]) for name in want}, 1e-6)


@every_device
def test_own_activation_in_float32(kernel, device):
    """An activation may compute in float32, as autocast makes some do; its result is taken in the weights' dtype."""

    def gate(h):
        return torch.nn.functional.silu(h[:, :24].float()) * h[:, 24:]

    Case(63, 40, 24, 5, 2, 4, dtype=torch.float16, activation=gate).check(kernel, device)


@every_device
def test_dtypes_around_own_functions(kernel, device):
    """They get the weights' dtype and may return another; the output has the input's, and so has its gradient."""
    case = Case(9, 16, 8, 3, 2, 2, dtype=torch.float16, adapter_dtype=torch.float32, has_gate=False)
    arguments, _ = case.layer(kernel, device)
    arguments["hidden_states"] = x = arguments["hidden_states"].detach().float().requires_grad_()
    given = []

    def in_float32(y):
        given.append(y.dtype)
        return y.float().tanh()

    out = kernel.moe_mlp(**arguments | {"activation": in_float32, "expert_norm": in_float32})
    out.sum().backward()
    assert given == [torch.float16] * 2 and out.dtype == x.grad.dtype == torch.float32
    assert kernel.moe_mlp(**arguments | {"activation": in_float32}).dtype == torch.float32


@every_device
@pytest.mark.parametrize("pattern", ["hot", "empty"])
@pytest.mark.parametrize("size", [(130, 40, 24, 5, 2, 4), (500, 40, 24, 16, 1, 4)], ids=str)
def test_routing_patterns(kernel, device, dtype, size, pattern):
    got = Case(*size, dtype=dtype, pattern=pattern).check(kernel, device)
    if pattern == "empty":
        unused = slice(max(size[4], size[3] // 2), None)
        for name in ("d gate_up_proj", "d down_proj", "d gate_up_A", "d gate_up_B", "d down_A", "d down_B"):
            assert not got[name][unused].any(), f"{name} of an expert without tokens must be exactly zero"


@every_device
def test_no_lora(kernel, device, dtype):
    Case(63, 40, 24, 5, 2, 0, dtype=dtype).check(kernel, device)


@every_device
def test_lora_on_one_projection(kernel, device):
    for kept in ("gate_up", "down"):
        case = Case(63, 40, 24, 5, 2, 4, dtype=torch.float32)
        x = {name: tensor.float().to(device).requires_grad_() for name, tensor in case.tensors.items()}
        lora = {f"{kept}_lora": kernel.ExpertLoRA(x[f"{kept}_A"], x[f"{kept}_B"], 0.5)}
        base = [x[name] for name in ("hidden_states", "gate_up_proj", "down_proj")]
        index = case.top_k_index.to(device)
        out = kernel.moe_mlp(*base, index, x["top_k_weights"], **lora)
        want = kernel.reference.moe_mlp(*base, index, x["top_k_weights"], **lora)
        leaves = [*base, x["top_k_weights"], x[f"{kept}_A"], x[f"{kept}_B"]]
        grads = torch.autograd.grad(out, leaves, case.grad.float().to(device))
        wants = torch.autograd.grad(want, leaves, case.grad.float().to(device))
        pairs = {str(i): pair for i, pair in enumerate(zip(grads, wants, strict=True))}
        assert_close({"output": (out, want), **pairs}, 1e-6)


@every_device
def test_scaling_zero_means_zero(kernel, device):
    case = Case(63, 40, 24, 5, 2, 4, dtype=torch.float32, scalings=(0.0, 0.0))
    got = case.check(kernel, device)
    plain = Case(63, 40, 24, 5, 2, 0, dtype=torch.float32)
    plain.tensors = {name: case.tensors[name] for name in plain.tensors}
    plain.top_k_index, plain.grad = case.top_k_index, case.grad
    without = plain.run(kernel, kernel.moe_mlp, device, reference=False)
    assert torch.equal(got["output"], without["output"])
    assert not got["d gate_up_A"].any() and not got["d down_B"].any()


@every_device
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapter_dtype(kernel, device, adapter_dtype):
    """fp32 masters on a half precision base, as PEFT keeps them: gradients come back in the adapter's dtype."""
    base = torch.float16
    case = Case(130, 40, 24, 5, 2, 16, dtype=base, adapter_dtype=adapter_dtype)
    got = case.run(kernel, kernel.moe_mlp, device, reference=False)
    want = case.run(kernel, kernel.reference.moe_mlp, device, reference=True)
    for name in got:
        expected = adapter_dtype if name.endswith(("_A", "_B")) else base
        assert got[name].dtype == expected, name
    # The adapter is rounded to the base's dtype, as PEFT's own merge rounds it; bfloat16 gradients are rounded again.
    bound = 1.5e-3 if adapter_dtype == torch.float32 else 4e-3
    assert_close({name: (got[name], want[name]) for name in want}, bound)


@every_device
def test_a_bias_that_all_but_cancels(kernel, device):
    """The gradient of a routing weight is then little of two sums: it is rounded once, after they are added."""
    case = Case(1, 40, 24, 1, 1, 0, dtype=torch.float32, has_bias=True, seed=1)
    case.tensors["down_proj_bias"].zero_()
    arguments, _ = case.layer(kernel, reference=True)
    ones = torch.ones(1, 1, dtype=torch.float64)
    y = kernel.reference.moe_mlp(**arguments | {"top_k_weights": ones}).detach()
    case.tensors["down_proj_bias"] = (-0.99 * y).float().double()
    arguments, _ = case.layer(kernel, device)
    arguments["top_k_weights"] = weights = ones.to(device, torch.bfloat16).requires_grad_()
    kernel.moe_mlp(**arguments).backward(case.grad.to(device, torch.float32))
    assert relative_error(weights.grad, (0.01 * y * case.grad).sum()[None, None]) < 4e-3


@every_device
def test_frozen_arguments_get_no_gradient(kernel, device):
    frozen = ("hidden_states", "gate_up_proj", "down_proj", "top_k_weights")
    case = Case(63, 72, 40, 9, 2, 4, dtype=torch.float32, frozen=frozen)
    got = case.check(kernel, device)
    assert set(got) == {"output", "d gate_up_A", "d gate_up_B", "d down_A", "d down_B"}


def test_weights_are_never_copied(kernel):
    """Twenty thousand experts that are one in memory: a dense copy, or a dense gradient, would take hundreds of GB."""
    E, H, I = 20_000, 1024, 1024  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(1, 2 * I, H, generator=generator, dtype=torch.float64).expand(E, -1, -1)
    down = torch.randn(1, H, I, generator=generator, dtype=torch.float64).expand(E, -1, -1)
    x = torch.randn(3, H, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    out = kernel.moe_mlp(x, up, down, torch.randint(0, E, (3, 2), generator=generator), weights)
    grads = torch.autograd.grad(out.sum(), [x, weights])
    want = kernel.moe_mlp(x, up[:1], down[:1], torch.zeros(3, 2, dtype=torch.int64), weights)
    wants = torch.autograd.grad(want.sum(), [x, weights])
    pairs = {str(i): pair for i, pair in enumerate(zip(grads, wants, strict=True))}
    assert_close({"output": (out, want), **pairs}, 1e-12)


@every_device
@pytest.mark.parametrize("of_peft", [False, True])
@pytest.mark.parametrize("frozen_input", [True, False])
def test_each_gradient_alone(kernel, device, frozen_input, of_peft):
    """Any subset of gradients may be asked for; each is what it is when all are."""
    case = Case(21, 40, 24, 5, 2, 4, dtype=torch.float32, has_bias=True, of_peft=of_peft)
    every = case.run(kernel, kernel.moe_mlp, device, reference=False)
    for name in case.tensors:
        case.frozen = [other for other in case.tensors if other != name]
        if not frozen_input and name != "hidden_states":
            case.frozen.remove("hidden_states")
        alone = case.run(kernel, kernel.moe_mlp, device, reference=False)
        assert torch.equal(alone[f"d {name}"], every[f"d {name}"]), name


@every_device
def test_second_backward(kernel, device):
    """Saved tensors are never overwritten: a retained graph gives the same gradients again."""
    case = Case(63, 40, 24, 5, 2, 4, dtype=torch.float32, has_bias=True)
    leaves = {name: tensor.float().to(device).requires_grad_() for name, tensor in case.tensors.items()}
    out = _call(kernel, leaves, case.top_k_index.to(device))
    grad = case.grad.float().to(device)
    first = torch.autograd.grad(out, list(leaves.values()), grad, retain_graph=True)
    second = torch.autograd.grad(out, list(leaves.values()), grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_device
def test_deterministic(kernel, device, dtype):
    case = Case(130, 40, 24, 5, 2, 4, dtype=dtype, has_bias=True, pattern="hot")
    first = case.run(kernel, kernel.moe_mlp, device, reference=False)
    for _ in range(3):
        again = case.run(kernel, kernel.moe_mlp, device, reference=False)
        assert all(torch.equal(first[name], again[name]) for name in first)


@every_device
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(kernel, device, dtype, use_reentrant):
    case = Case(63, 40, 24, 5, 2, 4, dtype=dtype)
    results = []
    for checkpointed in (False, True):
        leaves = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in case.tensors.items()}
        index = case.top_k_index.to(device)
        if checkpointed:
            names = list(leaves)

            def call(*tensors, names=names, index=index):
                return _call(kernel, dict(zip(names, tensors, strict=True)), index)

            out = checkpoint(call, *leaves.values(), use_reentrant=use_reentrant)
        else:
            out = _call(kernel, leaves, index)
        out.backward(case.grad.to(device, dtype))
        results.append([out, *(leaf.grad for leaf in leaves.values())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_device
def test_no_nan_crosses_experts(kernel, device, dtype):
    """One expert's Inf weights and one token's NaN touch what depends on them and not a bit of anything else."""
    case = Case(130, 40, 24, 5, 2, 4, dtype=dtype, has_bias=True)
    clean = case.run(kernel, kernel.moe_mlp, device, reference=False)
    expert, token = 2, 7
    case.tensors["gate_up_proj"][expert] = float("inf")
    case.tensors["down_proj"][expert] = float("inf")
    case.tensors["hidden_states"][token] = float("nan")
    poisoned = case.run(kernel, kernel.moe_mlp, device, reference=False)
    hit = (case.top_k_index == expert).any(1)
    hit[token] = True
    spared_experts = [e for e in range(5) if e != expert and e not in case.top_k_index[token]]
    assert spared_experts and hit.any() and not hit.all()
    assert not torch.isfinite(poisoned["output"][hit]).all(1).any()
    for name in ("output", "d hidden_states", "d top_k_weights"):
        assert torch.equal(poisoned[name][~hit], clean[name][~hit]), name
    for name in clean:
        if clean[name].shape[0] == 5 and name.startswith("d "):
            assert torch.equal(poisoned[name][spared_experts], clean[name][spared_experts]), name


@every_device
def test_uninitialised_memory_is_never_read(kernel, device, dtype):
    """With every fresh tensor filled with NaN the results are the same, sentinels and empty experts included."""
    case = Case(130, 40, 24, 9, 2, 4, dtype=dtype, has_bias=True, pattern="empty")
    case.top_k_index[::3, 0] = 9
    x = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in case.tensors.items()}
    index, grad = case.top_k_index.to(device), case.grad.to(device, dtype)
    clean = _call(kernel, x, index, expert_parallel=True)
    clean_grads = torch.autograd.grad(clean, list(x.values()), grad)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all(), "torch fills fresh memory with NaN in this mode"
    try:
        filled = _call(kernel, x, index, expert_parallel=True)
        filled_grads = torch.autograd.grad(filled, list(x.values()), grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(clean, filled)
    assert all(torch.equal(a, b) for a, b in zip(clean_grads, filled_grads, strict=True))


@every_device
def test_sentinels_contribute_nothing(kernel, device):
    """Ids >= E (expert parallelism): as if the choice had weight zero, and no gradient to its weight."""
    case = Case(63, 40, 24, 5, 2, 4, dtype=torch.float32, has_bias=True)
    absent = torch.zeros(63, 2, dtype=torch.bool)
    absent[::4] = True
    absent[1::4, 1] = True
    x = {name: tensor.float().to(device).requires_grad_() for name, tensor in case.tensors.items()}
    y = {name: tensor.detach().clone().requires_grad_() for name, tensor in x.items()}
    out = _call(kernel, x, case.top_k_index.masked_fill(absent, 5).to(device), expert_parallel=True)
    out.backward(case.grad.float().to(device))
    mask = absent.to(device)
    weights = y["top_k_weights"].masked_fill(mask, 0.0)
    want = _call(kernel, {**y, "top_k_weights": weights}, case.top_k_index.to(device))
    want.backward(case.grad.float().to(device))
    pairs = {name: (x[name].grad, y[name].grad) for name in x}
    assert_close({"output": (out, want), **pairs}, 1e-6)
    assert not x["top_k_weights"].grad[mask].any()
    assert not out[::4].any() and not x["hidden_states"].grad[::4].any()


@every_device
def test_sentinels_before_a_norm(kernel, device):
    """Without work, output or gradient, whatever the norm makes of zeros, and whatever weights they have."""
    T, H, I, E, k = 9, 16, 8, 4, 3  # noqa: E741
    torch.manual_seed(0)
    x, up, down = (torch.randn(*s, device=device) for s in ((T, H), (E, 2 * I, H), (E, H, I)))
    index = torch.rand(T, E).topk(k).indices.to(device)
    index[:, 1] = E
    weights = torch.rand(T, k, device=device)
    weights[:, 1] = float("inf")
    leaf = weights.clone().requires_grad_()
    bias = torch.randn(H, device=device, requires_grad=True)

    def norm(y):
        return y / y.norm(dim=-1, keepdim=True) + bias

    layer = {"hidden_states": x, "gate_up_proj": up, "down_proj": down, "expert_norm": norm}
    out = kernel.moe_mlp(top_k_index=index, top_k_weights=leaf, expert_parallel=True, **layer)
    grads = torch.autograd.grad(out.sum(), [leaf, bias])
    real = [0, 2]
    leaf = weights[:, real].requires_grad_()
    want = kernel.moe_mlp(top_k_index=index[:, real], top_k_weights=leaf, **layer)
    wants = torch.autograd.grad(want.sum(), [leaf, bias])
    assert not grads[0][:, 1].any()
    assert_close(
        {"output": (out, want), "d weights": (grads[0][:, real], wants[0]), "d bias": (grads[1], wants[1])}, 1e-6
    )


@every_device
def test_strides(kernel, device):
    """Weights, inputs and adapters of any strides: slices, transposes, expanded tensors, offsets."""
    case = Case(63, 40, 24, 5, 2, 4, dtype=torch.float32)
    want = case.run(kernel, kernel.reference.moe_mlp, device, reference=True)
    x = {name: tensor.float().to(device) for name, tensor in case.tensors.items()}
    wide = torch.randn(63, 100, device=device)
    wide[:, 7:87:2] = x["hidden_states"]
    x["hidden_states"] = wide[:, 7:87:2]
    x["gate_up_proj"] = torch.cat([x["gate_up_proj"], x["gate_up_proj"]], 2)[..., :40]
    x["down_proj"] = x["down_proj"].mT.contiguous().mT
    x["gate_up_B"] = x["gate_up_B"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    x["top_k_weights"] = x["top_k_weights"].t().contiguous().t()
    index = case.top_k_index.t().contiguous().t().to(device)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    out = _call(kernel, leaves, index)
    out.backward(case.grad.float().to(device))
    assert_close({"output": (out, want["output"]), **{n: (leaves[n].grad, want[f"d {n}"]) for n in leaves}}, 1e-6)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    out = _call(kernel, leaves, index)
    out.sum().backward()  # an expanded gradient, of strides zero
    ones = torch.autograd.grad(_call(kernel, leaves, index), leaves["gate_up_A"], torch.ones_like(out))[0]
    assert torch.equal(leaves["gate_up_A"].grad, ones)


@every_device
@pytest.mark.parametrize("layout", ["sliced", "expanded", "int32"])
def test_strided_routing(kernel, device, layout):
    """Routing whose flat view is not dense: a column of a sorted router output, one weight expanded over all."""
    case = Case(63, 40, 24, 5, 1, 4, dtype=torch.float32, has_bias=True)
    if layout == "expanded":
        case.tensors["top_k_weights"] = torch.full((63, 1), 0.5, dtype=torch.float64)
    want = case.run(kernel, kernel.reference.moe_mlp, device, reference=True)
    x = {name: tensor.float().to(device) for name, tensor in case.tensors.items()}
    index = case.top_k_index.to(device)
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    if layout == "sliced":
        weights = torch.stack([x["top_k_weights"], torch.rand_like(x["top_k_weights"])], 2)[:, :, 0]
        index = torch.cat([index, torch.randint(0, 5, (63, 3), device=device)], 1)[:, :1]
    elif layout == "expanded":
        x["top_k_weights"] = torch.full((1, 1), 0.5, device=device).requires_grad_()
        weights = x["top_k_weights"].expand(63, 1)
    else:
        weights, index = x["top_k_weights"], index.int()
    assert layout == "int32" or not weights.is_contiguous() or not weights.reshape(-1).is_contiguous()
    out = _call(kernel, {**x, "top_k_weights": weights}, index)
    out.backward(case.grad.float().to(device))
    pairs = {n: (x[n].grad, want[f"d {n}"]) for n in x if n != "top_k_weights" or layout != "expanded"}
    assert_close({"output": (out, want["output"]), **pairs}, 1e-6)


@every_device
@pytest.mark.parametrize("size", [(9, 1, 24, 5, 2, 4), (9, 40, 1, 5, 2, 4), (9, 40, 3, 1, 1, 4)], ids=str)
def test_sizes_too_small_for_tma(kernel, device, size):
    """Strides of 1 in more than one dimension, and halves of 2 bytes: sizes that only pointers can read."""
    Case(*size, dtype=torch.float32).check(kernel, device)
    Case(*size, dtype=torch.float32, has_gate=False, is_transposed=True).check(kernel, device)


@every_device
def test_int32_ids_and_repeated_experts(kernel, device):
    """int32 ids are as good as int64; a token may choose an expert twice (`torch.randint` routing in the wild)."""
    case = Case(63, 40, 24, 5, 2, 4, dtype=torch.float32)
    case.top_k_index = torch.randint(0, 5, (63, 2), dtype=torch.int32)
    case.top_k_index[:9, 1] = case.top_k_index[:9, 0]
    case.check(kernel, device)


@every_device
def test_forward_without_gradients_is_the_same(kernel, device, dtype):
    case = Case(63, 40, 24, 5, 2, 4, dtype=dtype, has_bias=True)
    x = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in case.tensors.items()}
    index = case.top_k_index.to(device)
    trained = _call(kernel, x, index)
    with torch.no_grad():
        assert torch.equal(_call(kernel, x, index), trained)
    with torch.inference_mode():
        assert torch.equal(_call(kernel, x, index), trained)


@every_device
def test_autocast(kernel, device):
    """Under autocast hidden states may be float32 and weights half precision, or all float32: each gives its own."""
    case = Case(63, 40, 24, 5, 2, 4, dtype=torch.float16, adapter_dtype=torch.float32)
    x = {name: tensor.to(device, torch.float16) for name, tensor in case.tensors.items()}
    x = {name: tensor.float() if name.endswith(("_A", "_B", "states")) else tensor for name, tensor in x.items()}
    index = case.top_k_index.to(device)
    want = case.run(kernel, kernel.reference.moe_mlp, device, reference=True)
    full = {name: tensor.float() for name, tensor in x.items()}
    full_want = _call(kernel, full, index)
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = _call(kernel, leaves, index)
        assert torch.equal(_call(kernel, full, index), full_want), "float32 weights compute in float32"
    assert out.dtype == torch.float32
    out.backward(case.grad.float().to(device))
    pairs = {name: (leaf.grad, want[f"d {name}"]) for name, leaf in leaves.items()}
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    assert_close({"output": (out, want["output"]), **pairs}, 1.5e-3)


def test_cpu_autocast_of_a_float32_model(kernel):
    """Autocast must not reach into the CPU backend's products."""
    case = Case(63, 40, 24, 5, 2, 4, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.check(kernel, torch.device("cpu"))


@every_device
def test_double_backward_is_refused(kernel, device):
    case = Case(5, 40, 24, 5, 2, 4, dtype=torch.float32)
    x = {name: tensor.float().to(device).requires_grad_() for name, tensor in case.tensors.items()}
    index = case.top_k_index.to(device)
    assert_differentiable_once(_call(kernel, x, index), list(x.values()))
    assert_differentiable(lambda: _call(kernel, x, index), list(x.values()))


def test_forward_mode_is_refused(kernel, monkeypatch):
    """A tangent would be lost without a word; where there is none, a dual level changes and keeps nothing."""
    ops, needs = inner(kernel, "ops"), []
    for op in ("moe_mlp_forward", "parallel_linear_forward"):
        forward = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda *args, forward=forward: needs.append(args[-1]) or forward(*args))
    h = torch.randn(5, 12)
    case = Case(5, 40, 24, 5, 2, 4, dtype=torch.float32)
    x = {name: tensor.float() for name, tensor in case.tensors.items()}
    experts, slots, offsets = kernel.flatten_sort_count(case.top_k_index, 5)
    calls = {
        "hidden_states": lambda y: _call(kernel, {**x, "hidden_states": y}, case.top_k_index),
        "inputs": lambda y: kernel.parallel_linear(y, x["gate_up_proj"].mT, 2, experts, slots, offsets),
        "h": lambda y: kernel.activate(y),
    }
    for name, call in calls.items():
        value = h if name == "h" else x["hidden_states"]
        want = call(value)
        with forward_ad.dual_level():
            assert torch.equal(call(value), want) and not any(needs)
            with pytest.raises(NotImplementedError, match="jvp"):
                call(forward_ad.make_dual(value, torch.ones_like(value)))
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.jvp(call, (value,), (torch.ones_like(value),))
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(lambda y, call=call: call(y).sum())(value)


def test_a_traced_graph_may_be_kept(kernel):
    """A backward traced without ``retain_graph`` may run with it: so it writes over nothing that it reads."""
    case = Case(9, 40, 24, 5, 2, 4, dtype=torch.float32)
    leaves = [tensor.float().requires_grad_() for tensor in case.tensors.values()]

    def call(index, *tensors):
        return _call(kernel, dict(zip(case.tensors, tensors, strict=True)), index)

    want = torch.autograd.grad(call(case.top_k_index, *leaves).sum(), leaves)
    graphs = []
    traced = aot_function(call, fw_compiler=nop, bw_compiler=lambda graph, _: graphs.append(graph) or graph)
    out = traced(case.top_k_index, *leaves)
    for keep in (True, False):
        got = torch.autograd.grad(out.sum(), leaves, retain_graph=keep)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    step = make_fx(lambda *given: torch.autograd.grad(call(*given).sum(), given[1:]))
    graphs.append(step(case.top_k_index, *leaves))
    for graph in graphs:
        (backward,) = (node for node in graph.graph.nodes if "moe_mlp_backward" in str(node.target))
        assert backward.args[-1] is False


def test_float64_on_the_cpu(kernel):
    Case(63, 40, 24, 5, 2, 4, dtype=torch.float64, has_bias=True).check(kernel, torch.device("cpu"))


def test_gradcheck(kernel):
    """The definition itself, and the hand-written backward, against finite differences."""
    case = Case(3, 4, 3, 3, 2, 2, dtype=torch.float64, has_bias=True)
    names = list(case.tensors)
    leaves = [case.tensors[name].requires_grad_() for name in names]

    def call(function, *tensors):
        return _call(kernel, dict(zip(names, tensors, strict=True)), case.top_k_index, function)

    assert torch.autograd.gradcheck(lambda *t: call(kernel.reference.moe_mlp, *t), leaves)
    assert torch.autograd.gradcheck(lambda *t: call(kernel.moe_mlp, *t), leaves, nondet_tol=0.0)


def test_compiles_without_a_graph_break(kernel):
    case = Case(63, 40, 24, 5, 2, 4, dtype=torch.float32)
    compiled = torch.compile(lambda x, i: _call(kernel, x, i), fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (63, 62, 17):
        leaves = {name: tensor.float().clone() for name, tensor in case.tensors.items()}
        for name in ("hidden_states", "top_k_weights"):
            leaves[name] = leaves[name][:T]
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        out = compiled(leaves, case.top_k_index[:T])
        want = _call(kernel, leaves, case.top_k_index[:T])
        grads = torch.autograd.grad(out.sum(), list(leaves.values()))
        wants = torch.autograd.grad(want.sum(), list(leaves.values()))
        assert torch.equal(out, want) and all(torch.equal(a, b) for a, b in zip(grads, wants, strict=True))


def test_bound_catches_a_wrong_result(kernel):
    """The yardstick itself: a one-percent error and a NaN must not pass."""
    value = torch.randn(50, 50)
    assert relative_error(value * 1.01, value) > 9e-3
    for wrong in (value * 1.01, value.clone().fill_(float("nan"))):
        with pytest.raises(AssertionError):
            assert_close({"x": (wrong, value)}, 8e-3)


def _call(kernel, tensors, index, function=None, **options):
    rest = dict(tensors)
    for projection in ("gate_up", "down"):
        if f"{projection}_A" in rest:
            A, B = rest.pop(f"{projection}_A"), rest.pop(f"{projection}_B")
            rest[f"{projection}_lora"] = kernel.ExpertLoRA(A, B, 0.5 if projection == "gate_up" else 2.0)
    return (function or kernel.moe_mlp)(**rest, top_k_index=index, **options)
