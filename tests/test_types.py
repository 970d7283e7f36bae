"""`ExpertLoRA`: PEFT's factors as views, against what PEFT itself makes of them on transformers' own experts."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from numerics import assert_close, relative_error
from torch import Tensor, nn

H, I = 24, 10  # noqa: E741


def _experts(family: str, num_experts: int) -> nn.Module:
    """Tiny experts of a real class: Qwen3-MoE's are ``[E, out, in]``; gpt_oss' ``[E, in, out]``, with biases."""
    if family == "qwen3_moe":
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts

        config = Qwen3MoeConfig(num_experts=num_experts, hidden_size=H, moe_intermediate_size=I)
    else:
        from transformers import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts as Experts

        config = GptOssConfig(num_local_experts=num_experts, hidden_size=H, intermediate_size=I)
    config._experts_implementation = "eager"
    return Experts(config)


def _peft(family: str, num_experts: int, rank: int) -> tuple[nn.Module, dict[str, nn.Module]]:
    """PEFT's wrapper around the experts, with random factors; and its wrapper of each projection, by name."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank + 1, target_parameters=targets, init_lora_weights=False)
    experts = _experts(family, num_experts)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = get_peft_model(nn.ModuleDict({"experts": experts}), config).double()
    outer = wrapper = model.base_model.model["experts"]
    wrappers = {}
    while wrapper is not experts:
        wrappers[wrapper.parameter_name] = wrapper
        wrapper = wrapper.base_layer
    assert set(wrappers) == {"gate_up_proj", "down_proj"}
    return outer, wrappers


def _factors(wrapper: nn.Module) -> tuple[nn.Parameter, nn.Parameter, float]:
    return wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight, wrapper.scaling["default"]


def _delta(lora) -> Tensor:
    """``scaling * B_e A_e``, ``[E, out, in]``."""
    return lora.scaling * torch.einsum("eor,eri->eoi", lora.B, lora.A)


CASES = [(family, E, rank) for family in ("qwen3_moe", "gpt_oss") for E in (1, 4) for rank in (3, 12)]


@pytest.mark.parametrize("family, num_experts, rank", CASES)
def test_the_update_is_pefts_own(kernel, family, num_experts, rank):
    """On both layouts of a stack; B is expert-fastest: read expert-major it is another update."""
    _, wrappers = _peft(family, num_experts, rank)
    for name, wrapper in wrappers.items():
        lora_A, lora_B, scaling = _factors(wrapper)
        lora = kernel.ExpertLoRA.from_peft(lora_A, lora_B, num_experts, scaling)
        assert (lora.num_experts, lora.rank, lora.scaling) == (num_experts, rank, (2 * rank + 1) / rank)
        assert (lora.in_features, lora.out_features) == ((H, 2 * I) if name == "gate_up_proj" else (I, H))
        want = wrapper.get_delta_weight("default")
        if num_experts == 1:
            want = want[None]  # PEFT takes one expert for a plain linear: [out, in] in both layouts
        elif family == "gpt_oss":
            want = want.mT
        assert_close({name: (_delta(lora), want)}, 1e-12)
        wrong = kernel.ExpertLoRA.from_expert_major(lora_A, lora_B, num_experts, scaling)
        assert (relative_error(_delta(wrong), want) > 0.5) == (num_experts > 1)


@pytest.mark.parametrize("num_experts, rank", [(1, 3), (4, 3), (4, 12)])
def test_from_peft_and_to_peft_are_views(kernel, num_experts, rank):
    lora_A, lora_B = torch.randn(num_experts * rank, H), torch.randn(I, rank * num_experts)
    lora = kernel.ExpertLoRA.from_peft(lora_A, lora_B, num_experts, 0.5)
    assert lora.A.data_ptr() == lora_A.data_ptr() and lora.B.data_ptr() == lora_B.data_ptr()
    assert lora.B.shape == (num_experts, I, rank)
    for e in range(num_experts):
        assert torch.equal(lora.A[e], lora_A[e * rank : (e + 1) * rank])
        assert torch.equal(lora.B[e], lora_B[:, e::num_experts])
    for view, original in zip(lora.to_peft(), (lora_A, lora_B), strict=True):
        assert view.data_ptr() == original.data_ptr()
        assert view.stride() == original.stride() and torch.equal(view, original)


def test_what_from_peft_gives_is_like_any_other(kernel):
    """It views its matrices by expert when it is first asked to: in copies, in what is printed, in comparisons."""
    lora_A, lora_B = torch.randn(4 * 3, H), torch.randn(I, 3 * 4)

    def make():
        return kernel.ExpertLoRA.from_peft(lora_A, lora_B, 4, 0.5)

    assert make().factors[0] is lora_A and make().factors[1] is lora_B
    other = dataclasses.replace(make(), scaling=2.0)
    assert other.scaling == 2.0 and torch.equal(other.B, make().B) and other.factors[0].dim() == 3
    for same in (copy.copy(make()), copy.deepcopy(make())):
        assert same.scaling == 0.5 and same.num_experts == 4 and torch.equal(same.B, make().B)
    assert repr(make()) == repr(kernel.ExpertLoRA(make().A, make().B, 0.5))
    lora = make()
    assert hash(lora) == hash(lora) and lora == lora and lora != make().scaling
    assert lora.A is lora.A and lora.factors[0] is lora.A and lora.num_experts == 4
    assert hasattr(make(), "A") and not hasattr(make(), "C")
    assert not hasattr(object.__new__(kernel.ExpertLoRA), "A")  # as copies are made
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().A = lora_A


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_factors_of_peft_train_whoever_looks_at_them(kernel, mode):
    """Once they are viewed by expert it is these views that a layer's gradients go through, to PEFT's matrices."""
    x, index, weights = torch.randn(5, H), torch.randint(4, (5, 2)), torch.rand(5, 2)
    up, down = torch.randn(4, 2 * I, H), torch.randn(4, H, I)
    grads = []
    for looks in (False, True):
        torch.manual_seed(0)
        lora_A, lora_B = torch.randn(4 * 3, H, requires_grad=True), torch.randn(2 * I, 3 * 4, requires_grad=True)
        lora, seen = kernel.ExpertLoRA.from_peft(lora_A, lora_B, 4, 0.5), []
        if looks:
            with mode():
                assert lora.rank == 3
            if mode is not torch.inference_mode:
                lora.B.register_hook(seen.append)
        kernel.moe_mlp(x, up, down, index, weights, gate_up_lora=lora).square().sum().backward()
        grads.append((lora_A.grad, lora_B.grad))
        assert len(seen) == (looks and mode is not torch.inference_mode)
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "num_experts, shape_A, shape_B, words",
    [
        (3, (9, H), (2 * I, 9), ("gate_up_lora.A", "E = 4 as in gate_up_proj", "(3, 3, 24)")),
        (4, (12, H + 1), (2 * I, 12), ("gate_up_lora.A", "H = 24 as in hidden_states", "(12, 25)")),
        (4, (12, H), (2 * I + 2, 12), ("gate_up_lora.B", "2I = 20 as in gate_up_proj", "(22, 12)")),
    ],
)
def test_factors_of_peft_that_do_not_fit_the_layer(kernel, num_experts, shape_A, shape_B, words):
    lora = kernel.ExpertLoRA.from_peft(torch.randn(shape_A), torch.randn(shape_B), num_experts, 1.0)
    weights = torch.randn(4, 2 * I, H), torch.randn(4, H, I)
    layer = torch.randn(5, H), *weights, torch.randint(4, (5, 2)), torch.rand(5, 2)
    with pytest.raises(ValueError, match="gate_up_lora") as error:
        kernel.moe_mlp(*layer, gate_up_lora=lora)
    assert all(word in str(error.value) for word in words)


def test_expert_major_is_a_view_and_converts_to_peft(kernel):
    lora_A, lora_B = torch.randn(4 * 3, H), torch.randn(I, 4 * 3)
    lora = kernel.ExpertLoRA.from_expert_major(lora_A, lora_B, 4, 0.5)
    assert lora.A.data_ptr() == lora_A.data_ptr() and lora.B.data_ptr() == lora_B.data_ptr()
    assert all(torch.equal(lora.B[e], lora_B[:, 3 * e : 3 * e + 3]) for e in range(4))
    again = kernel.ExpertLoRA.from_peft(*lora.to_peft(), 4, 0.5)
    assert torch.equal(again.A, lora.A) and torch.equal(again.B, lora.B)


@pytest.mark.parametrize("family, num_experts", [("qwen3_moe", 1), ("qwen3_moe", 4), ("gpt_oss", 4)])
def test_gradients_land_in_pefts_parameters(kernel, family, num_experts):
    """Through the views into the parameters' ``.grad``, with their strides, as PEFT's own forward puts them there."""
    outer, wrappers = _peft(family, num_experts, 3)
    experts = outer.get_base_layer()
    factors = {name: _factors(wrapper) for name, wrapper in wrappers.items()}
    parameters = [parameter for A, B, _ in factors.values() for parameter in (A, B)]
    x, weights = torch.randn(9, H, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    index, grad = torch.randint(0, num_experts, (9, 2)), torch.randn(9, H, dtype=torch.float64)
    want = outer(x, index, weights)
    want_grads = torch.autograd.grad(want, parameters, grad)
    options = {"is_transposed": family == "gpt_oss"}
    if family == "gpt_oss":
        options["activation"] = experts._apply_gate
        options |= {name: getattr(experts, name) for name in ("gate_up_proj_bias", "down_proj_bias")}
    loras = {
        name.replace("proj", "lora"): kernel.ExpertLoRA.from_peft(A, B, num_experts, scaling)
        for name, (A, B, scaling) in factors.items()
    }
    out = kernel.moe_mlp(x, experts.gate_up_proj, experts.down_proj, index, weights, **options, **loras)
    out.backward(grad)
    pairs = {str(i): (p.grad, g) for i, (p, g) in enumerate(zip(parameters, want_grads, strict=True))}
    assert_close({"output": (out, want), **pairs}, 1e-12)
    assert all(p.grad.stride() == p.stride() and p.grad.is_contiguous() for p in parameters)


def test_is_immutable_and_keeps_a_scaling_of_zero(kernel):
    A, B = torch.randn(4, 3, H), torch.randn(4, I, 3)
    lora = kernel.ExpertLoRA(A, B, 0.0)
    assert lora.scaling == 0.0 and kernel.ExpertLoRA(A, B).scaling == 1.0 and kernel.ExpertLoRA(A, B, 2).scaling == 2
    assert lora.A is A and lora.B is B
    with pytest.raises(dataclasses.FrozenInstanceError):
        lora.scaling = 1.0
