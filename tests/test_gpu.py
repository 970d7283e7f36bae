"""What only a GPU can show: half precision at the sizes of real models, tensors past 2**31 elements, other devices."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import MODELS
from conftest import inner
from numerics import BASE, Case, Linear, assert_close, relative_error

pytestmark = pytest.mark.gpu

# What the best other systems reach in bfloat16 at these sizes.
BOUNDS = {torch.bfloat16: 5.5e-3, torch.float16: 1e-3}


def real_case(name: str, T: int, dtype: torch.dtype, r: int = 16, train_base: bool = False) -> Case:
    """A model's experts layer on the GPU, if its definition in float64 fits there."""
    model = MODELS[name]
    weights = 3 * model.num_experts * model.hidden_size * model.intermediate_size
    needed = 5 * 8 * weights  # the definition in float64: the weights, merged, their gradients, and room
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory")
    return Case.of_model(model, T, dtype, r, train_base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", list(MODELS))
def test_real_sizes(kernel, name, dtype):
    T = 8192 if name.startswith("Qwen3-30B") else 2048
    real_case(name, T, dtype).check(kernel, torch.device("cuda"), BOUNDS[dtype])


@pytest.mark.parametrize("T", [1, 16, 64, 192, 512])
def test_few_tokens(kernel, T):
    real_case("Qwen3-30B-A3B", T, torch.bfloat16).check(kernel, torch.device("cuda"), BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("r", [4, 64, 200])
def test_ranks(kernel, r):
    real_case("OLMoE-1B-7B", 2048, torch.bfloat16, r=r).check(kernel, torch.device("cuda"), BOUNDS[torch.bfloat16])


def test_trainable_base(kernel):
    case = real_case("OLMoE-1B-7B", 2048, torch.bfloat16, train_base=True)
    got = case.check(kernel, torch.device("cuda"), BOUNDS[torch.bfloat16])
    assert "d gate_up_proj" in got


def test_deterministic_at_real_size(kernel):
    case = real_case("Qwen3-30B-A3B", 8192, torch.bfloat16)
    first = case.run(kernel, kernel.moe_mlp, torch.device("cuda"), reference=False)
    for _ in range(20):
        again = case.run(kernel, kernel.moe_mlp, torch.device("cuda"), reference=False)
        assert all(torch.equal(first[name], again[name]) for name in first)


REPLAYED = {
    "frozen base": {"frozen": BASE, "adapter_dtype": torch.float32, "I": 256},
    "gpt-oss": {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    "gpt-oss, frozen base": {"is_concatenated": False, "frozen": BASE},
    "no gate": {"has_gate": False, "activation": "relu2", "frozen": ("gate_up_proj",)},
    "no LoRA": {"r": 0},
    "rank over 128": {"r": 144, "T": 6000, "frozen": BASE},  # tiles enough for Hopper's shrink
    "tiles dealt out": {"H": 2816, "T": 1200, "frozen": BASE},
}


@pytest.mark.parametrize("options", REPLAYED.values(), ids=REPLAYED)
def test_replay(kernel, options):
    """The second call of a shape is a replay of the first, with other data at other addresses."""
    programs = inner(kernel, "triton_kernels.replay")._programs
    sizes = {"T": 600, "H": 256, "I": 160, "E": 8, "k": 3, "r": 16, "dtype": torch.bfloat16}
    cases = [Case(**(sizes | options), seed=seed, home=torch.device("cuda")) for seed in (1, 2, 3)]
    bound = BOUNDS[torch.bfloat16]
    kept = [cases[0].check(kernel, torch.device("cuda"), bound)]
    known = set(programs)
    for case in cases[1:]:
        kept.append(case.check(kernel, torch.device("cuda"), bound))
    assert len(known) > 0 and set(programs) == known


CLAMPED = "clamped_glu(1.702, 7.0, 1.0)"
HOPPER = {
    "frozen base": {"frozen": BASE, "adapter_dtype": torch.float32},
    "adapters as PEFT has them": {"frozen": BASE, "adapter_dtype": torch.float32, "of_peft": True},
    "gpt-oss": {"is_transposed": True, "is_concatenated": False, "has_bias": True, "activation": CLAMPED},
    "transposed halves": {"is_transposed": True, "has_bias": True, "activation": CLAMPED},
    "no LoRA": {"r": 0, "dtype": torch.float16},
    "rank 8, odd depths": {"r": 8, "H": 336, "I": 344},
    "rank 32, an expert's rows in parts": {"r": 32, "T": 3000},
    "wide tiles of narrow grams": {"E": 72, "T": 3000},
    "an expert's rows in parts": {"T": 3000, "frozen": BASE, "adapter_dtype": torch.float32},
    "rank 64": {"r": 64, "frozen": BASE},
    "rank 48": {"r": 48, "H": 272, "I": 264, "k": 1},
    "rank 112": {"r": 112, "frozen": BASE},
    "rank 128": {"r": 128, "frozen": BASE, "adapter_dtype": torch.float32, "of_peft": True},
    "rank 144": {"r": 144, "frozen": BASE},
    "rank 200": {"r": 200, "frozen": BASE},
    "rank 256, depths of no tile": {"r": 256, "H": 336, "I": 272},
    "rank 320, tiles dealt out": {"r": 320, "H": 2816, "T": 2200, "frozen": BASE},
    "tiles dealt out": {"H": 2816, "T": 2200, "frozen": BASE},
    "... transposed, interleaved, biased": {
        "H": 2880,
        "T": 2200,
        "is_transposed": True,
        "is_concatenated": False,
        "has_bias": True,
    },
    "no gate": {"has_gate": False, "activation": "relu2"},
    "gelu": {"activation": "gelu", "has_bias": True},
    "all of the activation's gradient in one pass": {"I": 384, "frozen": BASE, "adapter_dtype": torch.float32},
    "... adapters as PEFT has them": {"I": 256, "frozen": BASE, "of_peft": True},
    "... rank 32 and 16-bit weights, in parts": {"I": 256, "r": 32, "frozen": BASE, "T": 3000},
    "... rank 8, gelu": {"I": 128, "r": 8, "frozen": BASE, "activation": "gelu", "dtype": torch.float16},
    "... no gradient of the routing weights": {"I": 128, "frozen": (*BASE, "top_k_weights")},
    "... none of x": {"I": 128, "frozen": (*BASE, "hidden_states")},
    "... gpt-oss": {"is_concatenated": False, "has_bias": True, "activation": CLAMPED, "frozen": BASE},
    "... gpt-oss, in parts": {"is_concatenated": False, "I": 336, "T": 3000, "activation": CLAMPED, "frozen": BASE},
}
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


def spy(monkeypatch, module, name) -> list[tuple[dict, object]]:
    """A function's calls from now on: keyword arguments, tensors as their shapes, and what it answered, if a bool.

    So no tensor lives longer for it.
    """
    original, calls = getattr(module, name), []

    def call(*args, **options):
        answer = original(*args, **options)
        told = {key: getattr(value, "shape", value) for key, value in options.items()}
        calls.append((told, answer if isinstance(answer, bool) else None))
        return answer

    monkeypatch.setattr(module, name, call)
    return calls


def use_general_kernels(kernel, monkeypatch):
    for name in ("grouped_gemm", "gram", "shrink", "act"):
        module = inner(kernel, f"triton_kernels.{name}")
        monkeypatch.setattr(module, "uses_hopper_tiles", lambda tensor, routing: False)
    monkeypatch.setattr(inner(kernel, "triton_kernels.gram"), "has_hopper_kernels", lambda architecture: False)
    inner(kernel, "triton_kernels.replay")._programs.clear()


@contextlib.contextmanager
def few_programs(kernel, monkeypatch):
    """Five programs for a product, so that each has many tiles: their loads run on from one into the next.

    Of a shrink, there are then tiles enough.
    """
    with monkeypatch.context() as patch:
        for name in ("hopper_gemm", "hopper_gram", "shrink"):
            module = inner(kernel, f"triton_kernels.{name}")
            gpu = module.gpu
            patch.setattr(module, "gpu", lambda tensor, gpu=gpu: dataclasses.replace(gpu(tensor), processors=5))
        yield


@needs_hopper
@pytest.mark.parametrize("options", HOPPER.values(), ids=HOPPER)
def test_hopper_kernels(kernel, options, monkeypatch):
    """Hopper's own kernels are used, right, and give the general ones' bits; experts with few rows or none too."""
    replay = inner(kernel, "triton_kernels.replay")
    sizes = {"T": 1100, "H": 512, "I": 320, "E": 8, "k": 2, "r": 16, "dtype": torch.bfloat16}
    case = Case(**(sizes | options), home=torch.device("cuda"))
    # Rows of an expert: whole tiles, a half and less of one, one row more than these, none, and all the rest.
    slots = torch.randperm(case.top_k_index.numel(), generator=torch.Generator().manual_seed(1)).cuda()
    case.top_k_index.fill_(3)
    for expert, rows in ((0, 128), (1, 64), (2, 30), (4, 129), (6, 148), (7, 65)):
        case.top_k_index.view(-1)[slots[:rows]] = expert
        slots = slots[rows:]
    gemm = inner(kernel, "triton_kernels.hopper_gemm")
    names = "hopper_gemm", "hopper_gram", "hopper_narrow", "hopper_act_grad"
    calls = {name: spy(monkeypatch, inner(kernel, f"triton_kernels.{name}"), name) for name in names}
    deals = spy(monkeypatch, gemm, "deal")
    replay._programs.clear()
    with few_programs(kernel, monkeypatch):
        got = case.check(kernel, torch.device("cuda"), BOUNDS[case.dtype])
    with torch.no_grad():  # nothing but the activation is stored, and there are as many programs as the GPU runs
        assert torch.equal(kernel.moe_mlp(**case.layer(kernel)[0]), got["output"])
    used = {name: {answer for _, answer in calls[name]} for name in names}
    assert used["hopper_gemm"] == {True}
    assert bool(deals) == (case.H >= gemm.DEEP)
    wide = "d gate_up_proj" in got or case.r in (128, 144, 256, 320)  # with tiles that are stored 16 bytes at a time
    assert any(used["hopper_gram"]) == wide and (case.r <= 64 or used["hopper_gram"] <= {wide})
    shrinks = {layout["row_weights"] is not None for layout, _ in calls["hopper_gemm"] if "row_weights" in layout}
    assert shrinks == ({True, False} if case.r > 64 else set())
    in_one_pass = "d gate_up_proj" not in got and case.has_gate and 0 < case.r <= 32
    in_one_pass &= case.I % 128 == 0 if case.is_concatenated else case.r <= 16
    assert bool(used["hopper_act_grad"]) == in_one_pass
    # Whether a product of the same rows is made with the gram, of gathered ones (2) or grouped ones (0).
    fused, alone = {(True, 2), (True, 0), (False, 2)}, {(False, 2), (False, 0)}
    narrow = {(layout.get("factor") is not None, layout["x_fan_out"]) for layout, _ in calls["hopper_narrow"]}
    expected = {8: fused, 16: fused, 32: fused, 64: alone}.get(case.r, set())
    if in_one_pass:
        expected = {(True, 2), (False, 2)}
    assert narrow >= expected and bool(narrow) == bool(expected)
    use_general_kernels(kernel, monkeypatch)
    want = case.run(kernel, kernel.moe_mlp, torch.device("cuda"), reference=False)
    # The general kernel makes no product of rank 32 with a gram, and adds up parts of 256 columns, not 512.
    same = want if case.r != 32 and case.E < 72 else ["output"]
    if in_one_pass:  # parts of rows' sums are of other columns
        same = set(same) - {"d hidden_states", "d gate_up_A", "d top_k_weights"}
    unequal = [name for name in same if not torch.equal(got[name], want[name])]
    assert not unequal


@needs_hopper
@pytest.mark.parametrize("units", [500, 504])
def test_hopper_halves_begin_at_16_bytes(kernel, units, monkeypatch):
    """Where columns of gate and up are contiguous, up's begin at 1000 bytes or at 1008: the former is not for TMA."""
    case = Case(1100, 512, units, 8, 2, 16, torch.bfloat16, is_transposed=True, home=torch.device("cuda"))
    calls = spy(monkeypatch, inner(kernel, "triton_kernels.hopper_gemm"), "hopper_gemm")
    inner(kernel, "triton_kernels.replay")._programs.clear()
    case.check(kernel, torch.device("cuda"), BOUNDS[torch.bfloat16])
    assert {answer for options, answer in calls if options.get("activation")} == {units == 504}


@needs_hopper
@pytest.mark.parametrize("dealt", [False, True], ids=["in turn", "dealt out"])
@pytest.mark.parametrize("all_are", [False, True], ids=["some", "all"])
def test_hopper_kernels_clear_the_rows_of_no_expert(kernel, all_are, dealt, monkeypatch):
    """`parallel_linear`'s rows of no expert are zeros, grouped or scattered, whatever was in that memory."""
    E, T, k, H, N, r = 5, 700, 2, 320, 336, 128 if dealt else 16
    options = {"device": "cuda", "dtype": torch.bfloat16}
    torch.manual_seed(4)
    index = torch.randint(E if all_are else 0, E + 1, (T, k), device="cuda")
    x, weight = torch.randn(T, H, **options, requires_grad=True), torch.randn(E, H, N, **options, requires_grad=True)
    lora_A, lora_B = torch.randn(E * r, H, **options), torch.randn(N, E * r, **options)

    def run():
        results = []
        for grouped_out in (False, True):
            order = kernel.flatten_sort_count(index, E)
            lora = {"lora_A": lora_A, "lora_B": lora_B, "scaling": 2.0}
            out = kernel.parallel_linear_lora(x, weight, k, *order, **lora, grouped_out=grouped_out)
            results += [out, *torch.autograd.grad(out, (x, weight), torch.ones_like(out))]
        return results

    general = inner(kernel, "triton_kernels.grouped_gemm")
    empty = general.empty
    monkeypatch.setattr(general, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    inner(kernel, "triton_kernels.replay")._programs.clear()
    module = inner(kernel, "triton_kernels.hopper_gemm")
    monkeypatch.setattr(module, "DEEP", 0 if dealt else 10**6)
    calls = spy(monkeypatch, module, "hopper_gemm")
    with few_programs(kernel, monkeypatch):
        got = run()
    # No shrink needs to.
    assert calls and all(computed and layout.get("zero_tail", "scale" in layout) for layout, computed in calls)
    no_expert = index.reshape(-1) == E
    assert no_expert.any() and not got[0][no_expert].any() and not got[3][-int(no_expert.sum()) :].any()
    use_general_kernels(kernel, monkeypatch)
    assert all(torch.equal(one, other) for one, other in zip(got, run(), strict=True))


@needs_hopper
@pytest.mark.parametrize("is_concatenated", [True, False], ids=["halves", "interleaved"])
def test_hopper_act_grad_keeps_rows_apart(kernel, is_concatenated, monkeypatch):
    """Its blocks reach into the next expert's rows, and into those of no expert: neither gets into any sum."""
    E, EXPERT = 6, 3
    sizes = {"T": 700, "H": 256, "I": 256, "E": E, "k": 2, "r": 16, "dtype": torch.bfloat16, "frozen": BASE}
    case = Case(**sizes, is_concatenated=is_concatenated, home=torch.device("cuda"))
    case.top_k_index[torch.rand(700, 2, device="cuda") < 0.2] = E
    arguments, leaves = case.layer(kernel)
    module = inner(kernel, "triton_kernels.hopper_act_grad")
    empty, calls = module.empty, spy(monkeypatch, module, "hopper_act_grad")

    def step() -> dict[str, torch.Tensor]:
        inner(kernel, "triton_kernels.replay")._programs.clear()
        out = kernel.moe_mlp(**arguments, expert_parallel=True)
        return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), case.grad.bfloat16()), strict=True))

    clean = step()
    for name in ("hopper_act_grad", "totals", "gram"):
        of = inner(kernel, f"triton_kernels.{name}")
        monkeypatch.setattr(of, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))
    again = step()
    assert calls and all(torch.equal(again[name], clean[name]) for name in clean)
    assert not clean["top_k_weights"][case.top_k_index == E].any() and clean["top_k_weights"].isfinite().all()
    with torch.no_grad():
        arguments["gate_up_proj"][EXPERT] = float("inf")
    got = step()
    others = torch.arange(E, device="cuda") != EXPERT
    for name in ("gate_up_A", "gate_up_B", "down_A", "down_B"):
        assert torch.equal(got[name][others], clean[name][others]), name
    elsewhere = case.top_k_index != EXPERT
    assert torch.equal(got["top_k_weights"][elsewhere], clean["top_k_weights"][elsewhere])
    tokens = elsewhere.all(1)
    assert torch.equal(got["hidden_states"][tokens], clean["hidden_states"][tokens])


@needs_hopper
def test_hopper_shrink_of_gathered_rows(kernel, monkeypatch):
    """The one that a linear makes of its tokens' rows, and again times their float32 gates."""
    case = Linear(1500, 2, 6, 128, 320, 336, torch.bfloat16, "gates")
    calls = spy(monkeypatch, inner(kernel, "triton_kernels.hopper_gemm"), "hopper_gemm")
    inner(kernel, "triton_kernels.replay")._programs.clear()
    with few_programs(kernel, monkeypatch):
        got = case.run(kernel, torch.device("cuda"), lambda name, leaf: leaf.float() if name == "gates" else leaf)
    assert any(
        computed and layout["x_fan_out"] == 2 and layout.get("row_weights") is not None for layout, computed in calls
    )
    want = case.want(kernel)
    assert all(relative_error(got[name], want[name]) < BOUNDS[torch.bfloat16] for name in want)


DROPPED = {
    "halves": {},
    "interleaved": {"is_concatenated": False, "activation": CLAMPED, "I": 336},
    "rank 32, float32 adapters as PEFT has them": {"r": 32, "adapter_dtype": torch.float32, "of_peft": True},
    "an expert's rows in parts": {"T": 3000, "pattern": "hot"},
}


@needs_hopper
@pytest.mark.parametrize("options", DROPPED.values(), ids=DROPPED)
def test_hopper_act_grad_with_dropout(kernel, options, monkeypatch):
    """The definition's mask, and the general kernels' bits, of which some drop elements in a pass of its own."""
    sizes = {"T": 700, "H": 512, "I": 256, "E": 6, "k": 2, "r": 16, "dtype": torch.bfloat16, "frozen": BASE}
    case, home = Case(**(sizes | options), home=torch.device("cuda")), torch.device("cuda")
    dropout = {"lora_dropout": 0.3, "dropout_seed": torch.tensor([2**62 + 12345], device=home)}
    calls = spy(monkeypatch, inner(kernel, "triton_kernels.hopper_act_grad"), "hopper_act_grad")

    def run(function, reference):
        inner(kernel, "triton_kernels.replay")._programs.clear()
        return case.run(kernel, functools.partial(function, **dropout), home, reference)

    got, want = run(kernel.moe_mlp, False), run(kernel.reference.moe_mlp, True)
    assert calls and all(options["seed"] is not None for options, _ in calls)
    # LoRA's part of two gradients is rounded apart from the rest's.
    assert all(relative_error(got[name], want[name]) < 1.2 * BOUNDS[torch.bfloat16] for name in want)
    use_general_kernels(kernel, monkeypatch)
    general = run(kernel.moe_mlp, False)
    same = {"output", "d down_A", "d down_B"} if case.r < 32 else {"output"}  # see `test_hopper_kernels`
    assert all(torch.equal(got[name], general[name]) for name in same)


@needs_hopper
@pytest.mark.parametrize("ranks", [(16, 32), (32, 8), (1, 16)], ids=str)
def test_hopper_act_grad_of_two_ranks(kernel, ranks, monkeypatch):
    """The projections have different ones, and experts as many rows as a chunk, one more, and several chunks."""
    rows = [2048, 2049, 4097, 0, 100, 128, *[0] * 9, 77]
    E, H, I, T = len(rows), 256, 128, sum(rows)  # noqa: E741
    options = {"device": "cuda", "dtype": torch.bfloat16}
    torch.manual_seed(6)
    index = torch.repeat_interleave(torch.arange(E), torch.tensor(rows))[torch.randperm(T)].cuda()[:, None]
    x, weights = torch.randn(T, H, **options), torch.rand(T, 1, **options)
    up, down = torch.randn(E, 2 * I, H, **options) * H**-0.5, torch.randn(E, H, I, **options) * I**-0.5
    shapes = (E, ranks[0], H), (E, 2 * I, ranks[0]), (E, ranks[1], I), (E, H, ranks[1])
    factors = [torch.randn(shape, **options) * 0.1 for shape in shapes]
    grad = torch.randn(T, H, **options)
    calls = spy(monkeypatch, inner(kernel, "triton_kernels.hopper_act_grad"), "totals")

    def run(dtype, layer):
        leaves = [t.to(dtype).requires_grad_() for t in (x.clone(), weights.clone(), *(f.clone() for f in factors))]
        loras = [kernel.ExpertLoRA(*pair, 2.0) for pair in (leaves[2:4], leaves[4:])]
        base = up.to(dtype), down.to(dtype), index
        out = layer(leaves[0], *base, leaves[1], gate_up_lora=loras[0], down_lora=loras[1])
        return torch.autograd.grad(out, leaves, grad.to(dtype))

    inner(kernel, "triton_kernels.replay")._programs.clear()
    got = run(torch.bfloat16, kernel.moe_mlp)
    assert {options["chunk"] for options, _ in calls} == {2048}
    for one, want in zip(got, run(torch.float64, kernel.reference.moe_mlp), strict=True):
        assert relative_error(one, want) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("share", [0.0, 0.3], ids=["nobody's slots", "most slots nobody's"])
def test_few_rows_of_many_slots(kernel, share):
    """Tiles are chosen by slots, of which expert parallelism leaves a rank few or none: the rest is zeros."""
    E, T, k, H, I = 4, 1024, 2, 512, 320  # noqa: E741
    options = {"device": "cuda", "dtype": torch.bfloat16}
    torch.manual_seed(3)
    index = torch.randint(0, E, (T, k), device="cuda")
    index[torch.rand(T, k, device="cuda") >= share] = E
    index[index == 1] = E  # an expert without rows
    x, up, down = torch.randn(T, H, **options), torch.randn(E, 2 * I, H, **options), torch.randn(E, H, I, **options)
    up, down = up * H**-0.5, down * I**-0.5
    weights = torch.rand(T, k, **options)
    grad = torch.randn(T, H, **options)

    def run(of, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, up, down, weights)]
        out = of(*leaves[:3], index, leaves[3])
        out.backward(grad.to(dtype))
        return [out, *(leaf.grad for leaf in leaves)]

    def definition(x, up, down, index, weights):
        out = torch.zeros_like(x)
        for e in range(E):
            token, choice = (index == e).nonzero(as_tuple=True)
            gate, unit = (x[token] @ up[e].T).chunk(2, dim=-1)
            y = (torch.nn.functional.silu(gate) * unit) @ down[e].T
            out = out.index_add(0, token, y * weights[token, choice, None])
        return out

    got = run(lambda *args: kernel.moe_mlp(*args, expert_parallel=True), torch.bfloat16)
    want = run(definition, torch.float64)
    for one, reference in zip(got, want, strict=True):
        if share:
            assert relative_error(one, reference) < BOUNDS[torch.bfloat16]
        else:
            assert not one.any()
    assert not got[2][1].any() and not got[3][1].any()


def test_replay_in_pieces(kernel, monkeypatch):
    """Columns of a weight and of the output are views, which a replay finds at other addresses too."""
    ops = inner(kernel, "ops")
    monkeypatch.setattr(ops, "COMBINE_BYTES", 2**18)
    programs = inner(kernel, "triton_kernels.replay")._programs
    known = []
    for seed in (1, 2, 3):
        case = Case(700, 1024, 192, 8, 3, 16, torch.bfloat16, seed=seed, home=torch.device("cuda"), has_bias=True)
        case.check(kernel, torch.device("cuda"), BOUNDS[torch.bfloat16])
        known.append(len(programs))
    assert known[0] > 0 and known[0] == known[2]


def test_peak_memory(kernel):
    """Both the first step of a shape and its replay free what they no longer need."""
    case = real_case("OLMoE-1B-7B", 8192, torch.bfloat16)
    arguments, leaves = case.layer(kernel)
    case.tensors = {}
    grad = case.grad.to(torch.bfloat16)
    slots = 8192 * 8 * 2  # bytes of a column of the slots
    # The pre-activation, the activation, the slots' outputs; dX, the output, and 50 MiB of rank-sized ones.
    bound = slots * (2048 + 1024 + 2048) + 2 * grad.nbytes + 50 * 2**20
    for _ in range(2):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = kernel.moe_mlp(**arguments)
        kept = torch.cuda.memory_allocated()
        assert torch.cuda.max_memory_allocated() - before < bound
        torch.cuda.reset_peak_memory_stats()
        out.backward(grad)
        # The gradient of the pre-activation is written over it.
        assert torch.cuda.max_memory_allocated() - kept < bound - slots * (2048 + 1024)
        del out
        for leaf in leaves.values():
            leaf.grad = None


def test_cuda_graph(kernel):
    """A step is captured, and replayed with other data."""
    case = Case(512, 256, 160, 8, 3, 16, torch.bfloat16, frozen=BASE, home=torch.device("cuda"))
    arguments, leaves = case.layer(kernel)
    index, grad = case.top_k_index, case.grad.to(torch.bfloat16)

    def step() -> list[torch.Tensor]:
        out = kernel.moe_mlp(**arguments)
        return [out, *torch.autograd.grad(out, list(leaves.values()), grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        arguments["hidden_states"].normal_()
        index.copy_(torch.rand(512, 8, device="cuda").topk(3, dim=1).indices)
    graph.replay()
    assert all(torch.equal(got, want) for got, want in zip(captured, step(), strict=True))


def test_a_capture_that_finds_kernels_missing(kernel):
    """They are compiled and loaded meanwhile, as the driver allows it, and the graph is as right as a later call."""
    case = Case(512, 256, 160, 8, 3, 8, torch.bfloat16, activation="gelu_tanh", home=torch.device("cuda"))
    arguments, _ = case.layer(kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        want = kernel.reference.moe_mlp(**case.layer(kernel, reference=True)[0])
        with torch.cuda.graph(graph):
            captured = kernel.moe_mlp(**arguments)
        graph.replay()
        out = kernel.moe_mlp(**arguments)
    assert_close({"eager": (out, want), "captured": (captured, want)}, BOUNDS[torch.bfloat16])


def check_sampled_rows(kernel, T: int, H: int, I: int, E: int, r: int) -> None:  # noqa: E741
    """A layer of one choice a token; the gradient that comes in is zero but for sampled rows, so that the definition
    of those rows alone gives every gradient."""

    def trained(*shape: int, std: float) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_(std=std).requires_grad_()

    x = trained(T, H, std=1.0)
    up = torch.randn(E, 2 * I, H, device="cuda", dtype=torch.bfloat16) * H**-0.5
    down = torch.randn(E, H, I, device="cuda", dtype=torch.bfloat16) * I**-0.5
    factors = [
        trained(E, r, H, std=H**-0.5),
        trained(E, 2 * I, r, std=r**-0.5),
        trained(E, r, I, std=I**-0.5),
        trained(E, H, r, std=r**-0.5),
    ]
    index = torch.randint(0, E, (T, 1), device="cuda")
    weights = torch.rand(T, 1, device="cuda", dtype=torch.bfloat16).requires_grad_()
    rows = torch.cat([torch.arange(50), torch.arange(T - 50, T)]).cuda()
    dout = torch.zeros_like(x, requires_grad=False)
    dout[rows] = 1

    def loras(A_up, B_up, A_down, B_down):
        return {"gate_up_lora": kernel.ExpertLoRA(A_up, B_up), "down_lora": kernel.ExpertLoRA(A_down, B_down)}

    out = kernel.moe_mlp(x, up, down, index, weights, **loras(*factors))
    out.backward(dout)
    sample = x.detach()[rows].double().requires_grad_()
    wide = [factor.detach().double().requires_grad_() for factor in factors]
    of_sample = weights.detach()[rows].double().requires_grad_()
    want = kernel.reference.moe_mlp(sample, up.double(), down.double(), index[rows], of_sample, **loras(*wide))
    want.backward(torch.ones_like(want))
    assert relative_error(out[rows], want) < 5.5e-3
    assert relative_error(weights.grad[rows], of_sample.grad) < 5.5e-3
    assert relative_error(x.grad[rows], sample.grad) < 5.5e-3
    for got, factor in zip(factors, wide, strict=True):
        assert relative_error(got.grad, factor.grad) < 5.5e-3
    x.grad[rows] = 0
    assert x.grad.abs().max() == 0


def test_output_past_two_to_the_31(kernel):
    """``S * 2I`` beyond 2**31 elements: the output of a product, the rows of a gram."""
    assert 300_000 * 2 * 4096 > 2**31
    check_sampled_rows(kernel, T=300_000, H=512, I=4096, E=4, r=8)


def test_input_past_two_to_the_31(kernel, monkeypatch):
    """``T * H`` beyond 2**31 elements: what is gathered from, forward and backward, scattered to, and combined."""
    assert 1_100_000 * 2048 > 2**31
    monkeypatch.setattr(inner(kernel, "ops"), "COMBINE_BYTES", 2**40)  # all columns in one piece
    check_sampled_rows(kernel, T=1_100_000, H=2048, I=64, E=4, r=8)


def test_gram_past_two_to_the_31(kernel):
    """The gradient of a base weight of 64 x 8192 x 4224; the last expert's and the first's against the definition."""
    E, H, I, T = 64, 4224, 4096, 256  # noqa: E741
    up = torch.empty(E, 2 * I, H, device="cuda", dtype=torch.bfloat16).normal_(std=H**-0.5)
    assert up.numel() > 2**31
    down = torch.empty(E, H, I, device="cuda", dtype=torch.bfloat16).normal_(std=I**-0.5)
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    picked = torch.tensor([0, E - 1], device="cuda")
    choice = torch.randint(0, 2, (T, 1), device="cuda")
    weights = torch.rand(T, 1, device="cuda")
    up.requires_grad_()
    kernel.moe_mlp(x, up, down, picked[choice], weights).backward(torch.ones_like(x))
    small = up.detach()[picked].double().requires_grad_()
    want = kernel.reference.moe_mlp(x.double(), small, down[picked].double(), choice, weights.double())
    want.backward(torch.ones_like(want))
    assert relative_error(up.grad[picked], small.grad) < 5.5e-3
    up.grad[picked] = 0
    assert up.grad.abs().max() == 0


def test_weights_past_two_to_the_31(kernel):
    """A stack of 512 experts of 5120 x 2048: 5.4e9 elements; rows routed to the first and the last expert."""
    E, H, I, T, r = 512, 5120, 1024, 64, 8  # noqa: E741
    up = torch.empty(E, 2 * I, H, device="cuda", dtype=torch.bfloat16).normal_(std=H**-0.5)
    down = torch.empty(E, H, I, device="cuda", dtype=torch.bfloat16).normal_(std=I**-0.5)
    assert up.numel() > 2**32
    A = torch.randn(E, r, H, device="cuda") * H**-0.5
    B = torch.randn(E, 2 * I, r, device="cuda") * r**-0.5
    A.requires_grad_()
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    picked = torch.tensor([0, 511, 510, 300], device="cuda")
    choice = torch.randint(0, 4, (T, 1), device="cuda")
    weights = torch.rand(T, 1, device="cuda")
    out = kernel.moe_mlp(x, up, down, picked[choice], weights, gate_up_lora=kernel.ExpertLoRA(A, B, 1.0))
    out.backward(torch.ones_like(out))
    small = A.detach()[picked].double().requires_grad_()
    lora = kernel.ExpertLoRA(small, B[picked].double(), 1.0)
    want = kernel.reference.moe_mlp(
        x.double(), up[picked].double(), down[picked].double(), choice, weights.double(), gate_up_lora=lora
    )
    want.backward(torch.ones_like(want))
    assert relative_error(out, want) < 5.5e-3
    assert relative_error(A.grad[picked], small.grad) < 5.5e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_follow_the_tensors_device(kernel):
    """With GPU 0 current, tensors on GPU 1 are computed on GPU 1."""
    Case(63, 40, 24, 5, 2, 4, dtype=torch.float32).check(kernel, torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0


def test_step_needs_no_sync(kernel):
    """Nothing in a step waits for the device: torch raises on a synchronising call in this mode."""
    case = real_case("OLMoE-1B-7B", 256, torch.bfloat16)
    arguments, _ = case.layer(kernel)
    grad = case.grad.to(torch.bfloat16)
    kernel.moe_mlp(**arguments).backward(grad)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.moe_mlp(**arguments).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def small_step(kernel, seed: int):
    """A step of a small layer as a function, with its own data."""
    case = Case(600, 256, 160, 8, 3, 16, torch.bfloat16, frozen=BASE, seed=seed, home=torch.device("cuda"))
    arguments, leaves = case.layer(kernel)
    grad = case.grad.to(torch.bfloat16)

    def step() -> list[torch.Tensor]:
        out = kernel.moe_mlp(**arguments)
        return [out, *torch.autograd.grad(out, list(leaves.values()), grad)]

    return step


def test_a_first_backward_that_begins_with_a_product(kernel):
    """In autograd's thread, which has no CUDA context yet: all memory, large and small, is in torch's cache."""
    script = """
import torch
from kernels import get_kernel
kernel = get_kernel("org/scattermoe-lora", version=1)
options = {"device": "cuda", "dtype": torch.bfloat16}
x, up, down = (torch.randn(*s, **options) for s in ((64, 256), (4, 512, 256), (4, 256, 256)))
index = torch.arange(128, device="cuda").view(64, 2) % 4
out = kernel.moe_mlp(x.requires_grad_(), up, down, index, torch.rand(64, 2, **options))
dout = torch.ones_like(out)
cache = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in (2**28, *[2**19] * 16)]
del cache
out.backward(dout)
assert x.grad.isfinite().all() and x.grad.any()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_streams(kernel):
    """Steps on two streams at once give what each gives alone."""
    steps = [small_step(kernel, seed) for seed in (1, 2)]
    alone = [step() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    for _ in range(20):
        together = []
        for step, stream in zip(steps, streams, strict=True):
            with torch.cuda.stream(stream):
                together.append(step())
        torch.cuda.synchronize()
        assert all(map(torch.equal, sum(alone, []), sum(together, [])))


def test_two_threads(kernel):
    """Steps of two threads at once, first calls and so compilation included, give what each gives alone."""
    replay = inner(kernel, "triton_kernels.replay")
    launch = inner(kernel, "triton_kernels.launch")
    steps = [small_step(kernel, seed) for seed in (1, 2)]
    alone = [step() for step in steps]
    replay._programs.clear()
    launch.compiled_kernels.clear()

    def run(step) -> list[list[torch.Tensor]]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [step() for _ in range(20)]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, steps))
    for want, results in zip(alone, together, strict=True):
        assert all(all(map(torch.equal, want, got)) for got in results)


def test_long_run(kernel):
    """2000 steps of varied lengths and routings: no memory and no kernels gathered, and near PEFT's loss."""
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    E, H, k, r = 16, 256, 4, 8
    torch.manual_seed(0)
    config = Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=128, num_experts=E, num_experts_per_tok=k)
    config._experts_implementation = "grouped_mm"

    stock = torch.nn.Module()
    with torch.device("cuda"):
        stock.experts = Qwen3MoeExperts(config).to(torch.bfloat16)
    for parameter in stock.parameters():
        torch.nn.init.normal_(parameter, std=parameter.shape[2] ** -0.5)
    teacher = copy.deepcopy(stock)  # away from the student by what an adapter of rank r can learn
    with torch.no_grad():
        for weight in teacher.parameters():
            A, B = torch.randn(E, r, weight.shape[2]), torch.randn(E, weight.shape[1], r)
            weight += (B @ A * (r * weight.shape[2]) ** -0.5).to(weight)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=2 * r, target_modules=[], target_parameters=names), stock)
    ours = copy.deepcopy(stock)
    kernel.kernelize(ours)
    optimizers = {
        module: torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-3)
        for module in (stock, ours)
    }
    losses: dict[torch.nn.Module, list[torch.Tensor]] = {stock: [], ours: []}
    compiled = inner(kernel, "triton_kernels.launch").compiled_kernels
    marks = []  # memory, and binaries: some of ours are one for Triton
    lengths = torch.randint(1, 700, (2000,)).tolist()
    for step, T in enumerate(lengths):
        if step in (1000, 1999):
            torch.cuda.synchronize()
            marks.append((torch.cuda.memory_allocated(), len(set(map(id, compiled.values())))))
        x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
        weights, index = torch.rand(T, E, device="cuda").topk(k)
        weights = (weights / weights.sum(1, keepdim=True)).to(torch.bfloat16)
        with torch.no_grad():
            want = teacher.experts(x, index, weights)
        for module, optimizer in optimizers.items():
            loss = (module.experts(x, index, weights) - want).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[module].append(loss.detach())
    (memory, kernels), (memory_at_end, kernels_at_end) = marks
    assert kernels_at_end == kernels
    # Losses are kept, 512 bytes each of two.
    assert memory_at_end - memory < 2 * 1000 * 512 + 2**20
    first = torch.stack(losses[ours][:50]).mean().item()
    last, last_of_peft = (torch.stack(losses[module][-200:]).mean().item() for module in (ours, stock))
    assert last < 0.8 * first
    # Both end where bfloat16 lets them: ours lower, by 1.5 % on an H200, as PEFT adds adapters into bfloat16 weights,
    # which loses their last bits. On a CPU ours was 0.4 to 6 % lower, and PEFT in float32 lower by a factor of 10.
    assert 0.95 * last_of_peft < last < 1.01 * last_of_peft
