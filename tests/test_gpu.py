"""What only a GPU can show: half precision at the sizes of real models, tensors past 2**31 elements, other devices."""

from __future__ import annotations

import pytest
import torch
from cases import MODELS
from numerics import Case, relative_error

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


@pytest.mark.parametrize("T", [1, 16, 512])
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
    for _ in range(5):
        again = case.run(kernel, kernel.moe_mlp, torch.device("cuda"), reference=False)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_output_past_two_to_the_31(kernel):
    """``S * 2I`` and the gather target beyond 2**31 elements; sampled rows against the definition."""
    T, H, I, E, k = 300_000, 512, 4096, 4, 1  # noqa: E741
    assert T * 2 * I > 2**31
    x = torch.randn(T, H, device="cuda", dtype=torch.bfloat16)
    up = torch.randn(E, 2 * I, H, device="cuda", dtype=torch.bfloat16) * H**-0.5
    down = torch.randn(E, H, I, device="cuda", dtype=torch.bfloat16) * I**-0.5
    index = torch.randint(0, E, (T, k), device="cuda")
    weights = torch.rand(T, k, device="cuda", dtype=torch.bfloat16)
    x.requires_grad_()
    out = kernel.moe_mlp(x, up, down, index, weights)
    out.backward(torch.ones_like(out))
    rows = torch.cat([torch.arange(50), torch.arange(T - 50, T)]).cuda()
    sample = x.detach()[rows].double().requires_grad_()
    want = kernel.reference.moe_mlp(sample, up.double(), down.double(), index[rows], weights[rows].double())
    want.backward(torch.ones_like(want))
    assert relative_error(out[rows], want) < 5.5e-3
    assert relative_error(x.grad[rows], sample.grad) < 5.5e-3


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
    x = {name: t.to(torch.bfloat16).requires_grad_(name not in case.frozen) for name, t in case.tensors.items()}
    lora = {f"{p}_lora": kernel.ExpertLoRA(x.pop(f"{p}_A"), x.pop(f"{p}_B"), 2.0) for p in ("gate_up", "down")}
    grad = case.grad.to(torch.bfloat16)
    kernel.moe_mlp(**x, **lora, top_k_index=case.top_k_index).backward(grad)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.moe_mlp(**x, **lora, top_k_index=case.top_k_index).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
