"""`activate` against fp64 autograd over the definition: layouts, dtypes, strides, no rows, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from conftest import inner
from numerics import BOUNDS, assert_close, assert_differentiable, assert_differentiable_once

every_device = pytest.mark.every_device
NAMES = ["identity", "silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_glu"]
# float32's derivatives of GELU cancel where they are small.
GRADIENT_BOUNDS = BOUNDS | {torch.float32: 2e-6}


def _name(kernel, name: str) -> str:
    return kernel.reference.clamped_glu(1.702, 2.0, 1.0) if name == "clamped_glu" else name


@every_device
@pytest.mark.parametrize("is_concatenated", [True, False], ids=["halves", "interleaved"])
@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "nogate"])
@pytest.mark.parametrize("name", NAMES)
def test_activations(kernel, device, dtype, name, has_gate, is_concatenated):
    if name == "clamped_glu" and not has_gate:
        pytest.skip("it has a gate by definition")
    flags = {"has_gate": has_gate, "is_concatenated": is_concatenated}
    torch.manual_seed(0)
    h = torch.randn(37, 2 * 45).to(dtype)
    da = torch.randn(37, 45 if has_gate else 90).to(dtype)
    leaf = h.to(device).requires_grad_()
    a = kernel.activate(leaf, _name(kernel, name), **flags)
    wide = h.double().requires_grad_()
    want = kernel.reference.activate(wide, _name(kernel, name), has_gate, is_concatenated)
    assert a.dtype == dtype and a.is_contiguous()
    assert_close({"a": (a, want)}, BOUNDS[dtype])
    (dh,) = torch.autograd.grad(a, leaf, da.to(device))
    assert_close({"dh": (dh, torch.autograd.grad(want, wide, da.double())[0])}, GRADIENT_BOUNDS[dtype])


@every_device
def test_at_the_limit(kernel, device):
    """A clamp's gradient at its very limit is what the torch at hand has there, which 2.14 changed."""
    h = torch.tensor([[g, u] for g in (1.0, 2.0, 3.0) for u in (-3.0, -2.0, 0.0, 2.0, 3.0)], device=device)
    leaf, wide = h.clone().requires_grad_(), h.double().requires_grad_()
    gate, up = wide.clamp(max=2.0)[:, 0], wide.clamp(-2.0, 2.0)[:, 1]
    (want,) = torch.autograd.grad((gate * torch.sigmoid(1.702 * gate) * (up + 1)).sum(), wide)
    a = kernel.activate(leaf, kernel.reference.clamped_glu(1.702, 2.0, 1.0))
    (got,) = torch.autograd.grad(a.sum(), leaf)
    assert_close({"dh": (got, want)}, 2e-6)
    assert torch.equal(got == 0, want == 0)


@every_device
def test_at_nan(kernel, device):
    """Value and gradient are NaN where torch's own are: a zero would hide it from all that follows."""
    for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2"):
        leaf = torch.tensor([[float("nan"), 1.0]], device=device).requires_grad_()
        a = kernel.activate(leaf, name, has_gate=False)
        (dh,) = torch.autograd.grad(a.sum(), leaf)
        assert a.isnan().tolist() == [[True, False]], name
        assert dh.isnan().tolist() == [[name != "relu", False]], name
    clamped = kernel.reference.clamped_glu(1.0, 2.0, 0.0)
    for h in ([float("nan"), 1.0], [1.0, float("nan")]):
        assert kernel.activate(torch.tensor([h], device=device), clamped).isnan().all()


@every_device
@pytest.mark.parametrize("rows, units", [(0, 8), (1, 1), (8, 128), (9, 130), (300, 24)])
def test_sizes_and_strides(kernel, device, rows, units):
    """Columns of a wider tensor, transposed rows, a gradient that is a view: the results of dense ones."""
    torch.manual_seed(0)
    dense = torch.randn(rows, 2 * units, device=device)
    da = torch.randn(rows, units, device=device)
    views = {
        "columns": torch.cat([dense, dense], 1)[:, : 2 * units],
        "transposed": dense.T.contiguous().T,
    }
    results = []
    for h, grad in ((dense, da), *((view, da.T.contiguous().T) for view in views.values())):
        leaf = h.detach().requires_grad_()
        a = kernel.activate(leaf)
        results.append((a, *torch.autograd.grad(a, leaf, grad)))
    for a, dh in results:
        assert a.shape == (rows, units) and dh.shape == dense.shape
        assert_close({"a": (a, results[0][0]), "dh": (dh, results[0][1])}, 1e-6)


@every_device
def test_between_two_linears_it_is_the_layer(kernel, device):
    """Two linears with it between compute what `moe_mlp` computes, and it keeps nothing but its input."""
    torch.manual_seed(0)
    T, H, I, E, k = 40, 32, 24, 4, 2  # noqa: E741
    x, up, down = (torch.randn(*s, device=device) for s in ((T, H), (E, 2 * I, H), (E, H, I)))
    index = torch.rand(T, E, device=device).topk(k, dim=1).indices
    weights = torch.rand(T, k, device=device)
    order = kernel.flatten_sort_count(index, E)
    saved: list[tuple[int, ...]] = []

    def pack(tensor):
        saved.append(tuple(tensor.shape))
        return tensor

    h = kernel.parallel_linear(x, up.mT, k, *order, grouped_out=True).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        a = kernel.activate(h)
    assert saved == [(T * k, 2 * I)]
    out = kernel.parallel_linear(a, down.mT, 1, *order, gates=weights, grouped_in=True)
    want = kernel.moe_mlp(x, up, down, index, weights)
    assert_close({"out": (out, want)}, 1e-6)


@every_device
@pytest.mark.parametrize("has_gate", [True, False])
def test_ops_say_what_they_return(kernel, device, has_gate):
    ops = inner(kernel, "ops")
    checks = ("test_schema", "test_faketensor")
    h, da = torch.randn(6, 8, device=device), torch.randn(6, 4 if has_gate else 8, device=device)
    for given in (h, torch.randn(8, 6, device=device).T):
        torch.library.opcheck(ops.activate, (given, "silu", has_gate, True), test_utils=checks)
        torch.library.opcheck(ops.activate_backward, (da, given, "silu", has_gate, True), test_utils=checks)


@every_device
def test_identity_is_a_new_tensor(kernel, device):
    h = torch.randn(6, 8, device=device, requires_grad=True)
    a = kernel.activate(h, "identity", has_gate=False)
    assert a.data_ptr() != h.data_ptr() and torch.equal(a, h)
    a.mul_(2).sum().backward()
    assert torch.equal(h.grad, torch.full_like(h, 2))


def test_compiles_without_a_graph_break(kernel):
    compiled = torch.compile(lambda h: kernel.activate(h), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (7, 8, 31):
        h = torch.randn(rows, 12).requires_grad_()
        (got,) = torch.autograd.grad(compiled(h).sum(), h)
        (want,) = torch.autograd.grad(kernel.activate(h).sum(), h)
        assert torch.equal(got, want)


def test_a_gate_of_its_own_needs_one(kernel):
    with pytest.raises(ValueError, match="activation must be one of identity, .*, relu2, got 'clamped_glu"):
        kernel.activate(torch.randn(3, 4), kernel.reference.clamped_glu(1.0, 2.0, 0.0), has_gate=False)


def test_double_backward_is_refused(kernel):
    h = torch.randn(5, 12, requires_grad=True)
    assert_differentiable_once(kernel.activate(h), [h])
    assert_differentiable(lambda: kernel.activate(h), [h])
