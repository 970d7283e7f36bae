"""`kernel.kernels`, one by one against a loop over experts in float64; and the public API, frozen."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import pytest
import torch
from conftest import inner
from numerics import BOUNDS, assert_close, random_routing
from torch import Tensor

every_device = pytest.mark.every_device

T, k, E, r, K, N = 19, 2, 5, 12, 41, 24
S = T * k


@dataclass
class Batch:
    """Random operands in float64, rounded to a dtype, and the routing of a batch with an empty expert."""

    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(11)
        ids = random_routing(T, E - 1, k, self.generator, "uniform").flatten()
        self.ids, self.order = torch.sort(ids + (ids >= 2), stable=True)  # expert 2 gets no rows
        self.offsets = torch.bincount(self.ids, minlength=E).cumsum(0)
        self.W, self.b = self.normal(E, K, N, scale=K**-0.5), self.normal(E, N)
        self.A, self.B = self.normal(E * r, K, scale=K**-0.5), self.normal(N, E * r, scale=r**-0.5)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.dtype).double()

    def cast(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """As the kernels get them: on the device, in the dtype."""
        return tuple(t.to(self.device, self.dtype if t.is_floating_point() else t.dtype) for t in tensors)

    def factors(self, e: int) -> tuple[Tensor, Tensor]:
        """One expert's A [r, K] and B [N, r]: both factors are expert-major."""
        return self.A[e * r : (e + 1) * r], self.B[:, e * r : (e + 1) * r]

    def rows(self, x: Tensor, fan_out: int, grouped: bool) -> Tensor:
        """The operand's row of every grouped row."""
        return x if grouped else x[self.order // fan_out]

    def per_expert(self, x: Tensor, weights: list[Tensor], grouped: bool) -> Tensor:
        """``x[i] @ weights[e of i]`` of grouped rows; back in slot order unless ``grouped``."""
        y = torch.stack([row @ weights[e] for row, e in zip(x, self.ids.tolist(), strict=True)])
        return y if grouped else torch.empty_like(y).index_copy_(0, self.order, y)

    def check(self, named: dict[str, tuple[Tensor, Tensor]]) -> None:
        assert all(value.dtype == self.dtype for value, _ in named.values())
        assert_close(named, BOUNDS[self.dtype])


@pytest.fixture
def batch(dtype, device) -> Batch:
    return Batch(dtype, device)


ADDRESSING = [
    pytest.param(1, False, False, id="scatter-to-scatter"),
    pytest.param(k, False, True, id="fan-out-to-grouped"),
    pytest.param(1, True, False, id="grouped-to-scatter"),
    pytest.param(1, True, True, id="grouped-to-grouped"),
]


@every_device
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("fan_out, x_grouped, y_grouped", ADDRESSING)
def test_scatter2scatter(kernel, batch, fan_out, x_grouped, y_grouped, has_bias):
    X = batch.normal(S // fan_out, K)
    want = batch.per_expert(batch.rows(X, fan_out, x_grouped), list(batch.W), grouped=True)
    want = want + batch.b[batch.ids] if has_bias else want
    want = want if y_grouped else torch.empty_like(want).index_copy_(0, batch.order, want)
    x, w, bias, ids, order = batch.cast(X, batch.W, batch.b, batch.ids, batch.order)
    out = torch.full((S, N), float("nan"), device=batch.device, dtype=batch.dtype)
    returned = kernel.kernels.scatter2scatter(
        x, w, ids, order, fan_out, bias if has_bias else None, x_grouped, y_grouped, out
    )
    assert returned is out
    fresh = kernel.kernels.scatter2scatter(
        X=x,
        W=w,
        sorted_expert_idxs=ids,
        sorted_scattered_idxs=order,
        k=fan_out,
        b=bias if has_bias else None,
        x_grouped=x_grouped,
        y_grouped=y_grouped,
    )
    assert torch.equal(fresh, out)
    batch.check({"y": (out, want)})


@every_device
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("fan_out, x_grouped, y_grouped", ADDRESSING)
def test_scatter2scatter_lora(kernel, batch, fan_out, x_grouped, y_grouped, has_bias):
    X = batch.normal(S // fan_out, K)
    merged = [batch.W[e] + 0.5 * (batch.factors(e)[1] @ batch.factors(e)[0]).T for e in range(E)]
    want = batch.per_expert(batch.rows(X, fan_out, x_grouped), merged, grouped=True)
    want = want + batch.b[batch.ids] if has_bias else want
    want = want if y_grouped else torch.empty_like(want).index_copy_(0, batch.order, want)
    x, w, bias, A, B, ids, order = batch.cast(X, batch.W, batch.b, batch.A, batch.B, batch.ids, batch.order)
    w = w.mT.contiguous().mT  # as `ParallelExperts` passes its weight
    out = torch.full((S, N), float("nan"), device=batch.device, dtype=batch.dtype)
    arguments = (x, w, ids, order, fan_out, A, B, 0.5, bias if has_bias else None, x_grouped, y_grouped)
    assert kernel.kernels.scatter2scatter_lora(*arguments, out) is out
    assert torch.equal(kernel.kernels.scatter2scatter_lora(*arguments), out)
    batch.check({"y": (out, want)})


@every_device
@pytest.mark.parametrize("fan_out, dy_grouped, dx_grouped", ADDRESSING)
def test_scatter2scatter_lora_dX(kernel, batch, fan_out, dy_grouped, dx_grouped):
    DY = batch.normal(S // fan_out, N)
    merged = [batch.W[e].T + 0.5 * batch.factors(e)[1] @ batch.factors(e)[0] for e in range(E)]
    want = batch.per_expert(batch.rows(DY, fan_out, dy_grouped), merged, dx_grouped)
    dy, w, A, B, ids, order = batch.cast(DY, batch.W, batch.A, batch.B, batch.ids, batch.order)
    out = torch.full((S, K), float("nan"), device=batch.device, dtype=batch.dtype)
    arguments = (dy, w, ids, order, fan_out, A, B, 0.5, dy_grouped, dx_grouped)
    assert kernel.kernels.scatter2scatter_lora_dX(*arguments, out) is out
    assert torch.equal(kernel.kernels.scatter2scatter_lora_dX(*arguments), out)
    batch.check({"dx": (out, want)})


@every_device
@pytest.mark.parametrize("with_out", [False, True], ids=["fresh", "out"])
@pytest.mark.parametrize("coeff_shape", [None, (S,), (T, k)], ids=str)
@pytest.mark.parametrize("fan_out", [1, k])
def test_group(kernel, batch, fan_out, coeff_shape, with_out):
    rows = batch.normal(S // fan_out, N)
    coeff = None if coeff_shape is None else batch.normal(*coeff_shape)
    want = rows[batch.order // fan_out]
    a, order = batch.cast(rows, batch.order)
    out = torch.full((S, N), float("nan"), device=batch.device, dtype=batch.dtype) if with_out else None
    if coeff is None:
        got = kernel.kernels.group(a, order, fan_out=fan_out, out=out)
        assert torch.equal(got.cpu().double(), want), "a gather moves bits"
    else:
        given = coeff.to(batch.device, torch.float32)  # the result is in A's dtype
        got = kernel.kernels.group(a, order, given, fan_out, out)
        batch.check({"rows": (got, want * coeff.flatten()[batch.order, None])})
    assert out is None or got is out


@every_device
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
def test_group_bwd_W(kernel, batch, has_bias):
    DY, X = batch.normal(S, N), batch.normal(S, K)
    DW, Db = kernel.kernels.group_bwd_W(*batch.cast(DY, X, batch.offsets), E, has_bias)
    member = torch.nn.functional.one_hot(batch.ids, E).double()
    batch.check({"DW": (DW, torch.einsum("se,sk,sn->ekn", member, X, DY))})
    assert not DW[2].any(), "an expert without rows gets zeros"
    if has_bias:
        batch.check({"Db": (Db, member.T @ DY)})
        assert not Db[2].any()
    else:
        assert Db is None


@every_device
@pytest.mark.parametrize("scaling", [0.5, 0.0])
def test_group_bwd_lora(kernel, batch, scaling):
    DY, X = batch.normal(S, N), batch.normal(S, K)
    arguments = batch.cast(DY, X, batch.A, batch.B, batch.offsets)
    dA, dB = kernel.kernels.group_bwd_lora(*arguments, E, scaling)
    want_A, want_B = torch.zeros_like(batch.A), torch.zeros_like(batch.B)
    for e in range(E):
        own, (A, B) = batch.ids == e, batch.factors(e)
        want_A[e * r : (e + 1) * r] = scaling * (DY[own] @ B).T @ X[own]
        want_B[:, e * r : (e + 1) * r] = scaling * DY[own].T @ (X[own] @ A.T)
    batch.check({"dA": (dA, want_A), "dB": (dB, want_B)})
    assert not dA[2 * r : 3 * r].any() and not dB[:, 2 * r : 3 * r].any()


@every_device
@pytest.mark.parametrize("choices", [1, 3])
def test_single2scatter(kernel, batch, choices):
    X, ids = batch.normal(1, K), torch.tensor([[4, 0, 3]])[:, :choices]
    y = kernel.kernels.single2scatter(*batch.cast(X, batch.W, ids))
    batch.check({"y": (y, torch.cat([X @ batch.W[e] for e in ids[0]]))})


@every_device
@pytest.mark.parametrize("y_grouped", [False, True])
def test_rows_of_no_expert_are_zeros(kernel, device, y_grouped):
    """Also in a given ``out``; whatever the rows' inputs hold."""
    batch = Batch(torch.float32, device)
    ids = batch.ids.clone()
    ids[-5:] = E
    X = batch.normal(S, K)
    X[batch.order[-5:]] = float("nan")
    x, w, ids, order, A, B = batch.cast(X, batch.W, ids, batch.order, batch.A, batch.B)
    dead = torch.arange(S - 5, S) if y_grouped else batch.order[-5:]
    for lora in ((None, None), (A, B)):
        out = torch.full((S, N), float("nan"), device=device)
        kernel.kernels.scatter2scatter_lora(x, w, ids, order, 1, *lora, 1.0, y_grouped=y_grouped, out=out)
        assert not out[dead].any() and torch.isfinite(out).all() and (out != 0).any(1).sum() == S - 5


@every_device
def test_choices_of_no_expert_are_not_read(kernel, device):
    """Whatever memory and weights hold there: they are not multiplied by zero, which NaN and Inf survive."""
    ids = torch.tensor([[0, -1], [E, 1]], device=device)
    y, weights = torch.full((4, N), float("nan"), device=device), torch.full((4,), float("inf"), device=device)
    y[[0, 3]], weights[[0, 3]] = torch.randn(2, N, device=device), torch.tensor([0.5, 2.0], device=device)
    out = torch.empty(2, N, device=device)
    run = inner(kernel, "backend").of(y)
    run.combine(y, weights, out, fan_out=2, expert_ids=ids.flatten(), num_experts=E)
    assert torch.equal(out, y[[0, 3]] * weights[[0, 3], None])


@every_device
def test_no_rows(kernel, device):
    ids = torch.empty(0, dtype=torch.int64, device=device)
    offsets, W = torch.zeros(E, dtype=torch.int64, device=device), torch.randn(E, K, N, device=device)
    x, dy = torch.empty(0, K, device=device), torch.empty(0, N, device=device)
    A, B = torch.randn(E * r, K, device=device), torch.randn(N, E * r, device=device)
    assert kernel.kernels.scatter2scatter(x, W, ids, ids, k).shape == (0, N)
    assert kernel.kernels.scatter2scatter_lora_dX(dy, W, ids, ids, 1, A, B, 1.0).shape == (0, K)
    assert kernel.kernels.group(x, ids).shape == (0, K)
    DW, Db = kernel.kernels.group_bwd_W(dy, x, offsets, E, has_bias=True)
    dA, dB = kernel.kernels.group_bwd_lora(dy, x, A, B, offsets, E, 1.0)
    for grad, shape in ((DW, W.shape), (Db, (E, N)), (dA, A.shape), (dB, B.shape)):
        assert grad.shape == shape and not grad.any()


@every_device
def test_adapters_of_another_dtype(kernel, device):
    """fp32 adapters on a half precision base: results in the base's dtype, adapter gradients in the adapter's."""
    batch = Batch(torch.float16, device)
    x, dy, w, ids, order, offsets = batch.cast(
        batch.normal(S, K), batch.normal(S, N), batch.W, batch.ids, batch.order, batch.offsets
    )
    A, B = batch.A.to(device, torch.float32), batch.B.to(device, torch.float32)
    y = kernel.kernels.scatter2scatter_lora(x, w, ids, order, 1, A, B, 0.5)
    assert torch.equal(y, kernel.kernels.scatter2scatter_lora(x, w, ids, order, 1, A.half(), B.half(), 0.5))
    grads = kernel.kernels.group_bwd_lora(dy, x, A, B, offsets, E, 0.5)
    halves = kernel.kernels.group_bwd_lora(dy, x, A.half(), B.half(), offsets, E, 0.5)
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert all(torch.equal(grad.half(), half) for grad, half in zip(grads, halves, strict=True))


def test_no_autograd(kernel):
    """On the CPU as where kernels run: nothing is kept for a backward that there is none of."""
    batch = Batch(torch.float32, torch.device("cpu"))
    x, w, ids, order = batch.cast(batch.normal(T, K), batch.W, batch.ids, batch.order)
    for leaf in (x, w):
        leaf.requires_grad_()
    assert not kernel.kernels.scatter2scatter(x, w, ids, order, k).requires_grad
    assert not kernel.kernels.group(x, order, fan_out=k).requires_grad


@every_device
def test_int32_indices(kernel, device):
    batch = Batch(torch.float32, device)
    x, w, ids, order, offsets = batch.cast(batch.normal(T, K), batch.W, batch.ids, batch.order, batch.offsets)
    wide = kernel.kernels.scatter2scatter(x, w, ids, order, k)
    assert torch.equal(kernel.kernels.scatter2scatter(x, w, ids.int(), order.int(), k), wide)
    grouped = kernel.kernels.group(x, order, fan_out=k)
    assert torch.equal(kernel.kernels.group(x, order.int(), fan_out=k), grouped)
    DW, _ = kernel.kernels.group_bwd_W(wide, grouped, offsets, E)
    assert torch.equal(kernel.kernels.group_bwd_W(wide, grouped, offsets.int(), E)[0], DW)


@every_device
@pytest.mark.parametrize("kernels", ["one kernel", "several kernels"])
@pytest.mark.parametrize("T, E, k", [(1, 1, 1), (3, 5, 2), (64, 4, 2), (65, 130, 3), (300, 7, 1), (1, 300, 8)])
def test_slots_are_sorted_by_expert(kernel, device, request, monkeypatch, T, E, k, kernels):
    """Stably, and slots of no expert last; few slots by one kernel, many by several."""
    if request.config.getoption("--device") != "cpu":
        monkeypatch.setattr(inner(kernel, "triton_kernels.route"), "FEW", 2**30 if kernels == "one kernel" else 0)
    generator = torch.Generator().manual_seed(T)
    for low in (0, E // 2):  # half of the experts idle
        ids = torch.randint(low, E + 3, (T, k), generator=generator)
        ids[ids == E + 1] = 2**32  # these are nobody's: E, E + 2, and what is 0 in 32 bits
        experts = ids.flatten().clamp(max=E)
        order = experts.argsort(stable=True)
        got = inner(kernel, "ops").route(ids.flatten().to(device), E)
        assert torch.equal(got[0].cpu(), experts[order])
        assert torch.equal(got[1].cpu(), order)
        assert torch.equal(got[2].cpu(), experts.bincount(minlength=E + 1)[:E].cumsum(0))


@every_device
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("few", [True, False], ids=["few rows", "many rows"])
def test_experts_whose_rows_are_summed_in_parts(kernel, device, request, monkeypatch, few, bits):
    """Hot experts beside idle ones: their rows are cut into chunks, and every row is counted once."""
    on_gpu = device.type == "cuda"
    if few and request.config.getoption("--device") != "cpu":
        monkeypatch.setattr(inner(kernel, "tiles"), "chunk_rows", lambda num_slots, num_experts: 16)
        monkeypatch.setattr(inner(kernel, "triton_kernels.totals"), "CHUNKED", 32)
    elif not few and not on_gpu:
        pytest.skip("thousands of rows, for a GPU")
    # 16 rows a chunk for few, 2048 for many: one less than some chunks, just that, and one more.
    if few:
        counts = [0, 63, 64, 65, 0, 1, 129, 16, *[0] * 22, 31, 2]
    else:
        counts = [0, 4095, 4096, 4097, 0, 1, 8195, 2048, 2049, *[0] * 54, 700]
    num_experts, rows, rank = len(counts), sum(counts), 5
    generator = torch.Generator().manual_seed(3)
    dtype = torch.float32 if bits == 32 else torch.bfloat16 if on_gpu else torch.float16
    width = 304  # more columns than a tile has, and what Hopper's own kernel reads
    X, DY = (torch.randn(rows, n, generator=generator).to(dtype) for n in (K, width))
    A, B = (
        torch.randn(num_experts * rank, K, generator=generator),
        torch.randn(width, num_experts * rank, generator=generator),
    )
    offsets = torch.tensor(counts).cumsum(0)
    arguments = [t.to(device) for t in (DY, X, A, B, offsets)]
    dA, dB = kernel.kernels.group_bwd_lora(*arguments, num_experts, 0.5)
    again = kernel.kernels.group_bwd_lora(*arguments, num_experts, 0.5)
    assert torch.equal(dA, again[0]) and torch.equal(dB, again[1])
    want_A, want_B = [], []
    for e, (x, dy) in enumerate(zip(X.double().split(counts), DY.double().split(counts), strict=True)):
        A_e, B_e = A.to(dtype)[e * rank : (e + 1) * rank].double(), B.to(dtype)[:, e * rank : (e + 1) * rank].double()
        want_A.append(0.5 * (dy @ B_e).T @ x)
        want_B.append(0.5 * dy.T @ (x @ A_e.T))
    assert_close({"dA": (dA, torch.cat(want_A)), "dB": (dB, torch.cat(want_B, dim=1))}, BOUNDS[dtype])


# The public API

SIGNATURES = {
    "kernels.scatter2scatter": "X, W, sorted_expert_idxs, sorted_scattered_idxs, k, b=None, x_grouped=False,"
    " y_grouped=False, out=None",
    "kernels.scatter2scatter_lora": "X, W, sorted_expert_idxs, sorted_scattered_idxs, k, lora_A, lora_B, scaling,"
    " b=None, x_grouped=False, y_grouped=False, out=None",
    "kernels.scatter2scatter_lora_dX": "DY, W, sorted_expert_idxs, sorted_scattered_idxs, k, lora_A, lora_B, scaling,"
    " dy_grouped=True, dx_grouped=False, out=None",
    "kernels.single2scatter": "X, W, expert_idxs",
    "kernels.group": "A, sorted_expert_idxs, coeff=None, fan_out=1, out=None",
    "kernels.group_bwd_W": "DY, X, expert_offsets, E, has_bias=False",
    "kernels.group_bwd_lora": "DY, X, lora_A, lora_B, expert_offsets, E, scaling",
    "flatten_sort_count": "expert_idxs, num_experts",
    "parallel_linear": "inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets,"
    " expert_biases=None, gates=None, grouped_in=False, grouped_out=False",
    "parallel_linear_lora": "inputs, expert_weights, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets,"
    " lora_A=None, lora_B=None, scaling=1.0, expert_biases=None, gates=None, grouped_in=False, grouped_out=False",
    "ParallelExperts": "num_experts, input_size, output_size, bias=False",
    "ParallelExperts.forward": "self, inputs, k, sorted_expert_idxs, sorted_scattered_idxs, expert_offsets,"
    " gates=None, grouped_in=False, grouped_out=False",
    "ParallelExperts.set_lora": "self, lora_A, lora_B, scaling=1.0",
    "ParallelExperts.clear_lora": "self",
    "moe_mlp": "hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights, *, gate_up_lora=None,"
    " down_lora=None, gate_up_proj_bias=None, down_proj_bias=None, is_transposed=False, is_concatenated=True,"
    " has_gate=True, activation='silu', expert_norm=None, expert_parallel=False, lora_dropout=0.0,"
    " dropout_seed=None",
    "kernelize": "model, *, lora_dropout=0.0",
    "unkernelize": "model",
    "kernel_mapping": "*model_types",
    "ExpertLoRA": "A, B, scaling=1.0",
    "ExpertLoRA.from_peft": "lora_A, lora_B, num_experts, scaling",
    "ExpertLoRA.from_expert_major": "lora_A, lora_B, num_experts, scaling",
    "ExpertLoRA.to_peft": "self",
}


@pytest.mark.kernels_ci
@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(kernel, name):
    """Users of ScatterMoE and ScatterMoE-LoRA call these by position and by name: neither may change."""
    function = kernel
    for part in name.split("."):
        function = getattr(function, part)
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == f"({SIGNATURES[name]})"


def test_public_names(kernel):
    assert sorted(kernel.__all__) == [
        "ExpertLoRA",
        "ParallelExperts",
        "Report",
        "activate",
        "flatten_sort_count",
        "kernel_mapping",
        "kernelize",
        "kernels",
        "layers",
        "moe_mlp",
        "parallel_linear",
        "parallel_linear_lora",
        "reference",
        "register",
        "unkernelize",
    ]
    assert all(hasattr(kernel, name) for name in kernel.__all__)


@pytest.mark.parametrize("offsets", [[9, 2], [-1, 4], [3, 2], [0, 99]], ids=str)
def test_offsets_that_leave_the_rows_are_refused(kernel, offsets):
    """On the CPU, as those of the linears; on a GPU it would cost a sync."""
    X, DY, A, B = torch.randn(4, 6), torch.randn(4, 3), torch.randn(4, 6), torch.randn(3, 4)
    message = r"expert_offsets must be counts that grow from 0 to S = 4, got"
    with pytest.raises(ValueError, match=f"group_bwd_W: {message}"):
        kernel.kernels.group_bwd_W(DY, X, torch.tensor(offsets), 2)
    with pytest.raises(ValueError, match=f"group_bwd_lora: {message}"):
        kernel.kernels.group_bwd_lora(DY, X, A, B, torch.tensor(offsets), 2, 1.0)
