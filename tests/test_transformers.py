"""Real transformers classes, with and without PEFT: `kernelize`, the experts implementation, layers of `kernels`."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import weakref
from pathlib import Path

import kernels
import peft.tuners.lora.layer as peft_layer
import pytest
import torch
from conftest import inner
from kernels import LocalLayerRepository, Mode, replace_kernel_forward_from_hub, use_kernel_mapping
from numerics import assert_close
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import BLOCK, BOUND, FAMILIES, check_same, loss_and_grads, targets, tiny_model, tokens, wrap
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoConfig, AutoModelForCausalLM


def moe_layers(model) -> int:
    return sum(hasattr(module, "down_proj") and hasattr(module, "is_transposed") for module in model.modules())


@pytest.mark.every_device
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
def test_peft_kernelized(kernel, device, ran, family, when):
    """Adapters before or after `kernelize`: PEFT's own logits and gradients, from the fused ops, without a merge."""
    ids = tokens().to(device)
    model = tiny_model(family).to(device)
    want = loss_and_grads(wrap(copy.deepcopy(model), family), ids)
    if when == "before":
        kernel.kernelize(model)
    model = wrap(model, family)
    if when == "after":
        kernel.kernelize(model)
    with ran:
        got = loss_and_grads(model, ids)
    check_same(got, want)
    assert len(got[1]) == 4 * moe_layers(model), "two factors of two projections in every layer have a gradient"
    assert ran.ops == {"moe_mlp_forward": moe_layers(model), "moe_mlp_backward": moe_layers(model)}
    assert ran.merges == 0


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "granitemoe", "gpt_oss"])
def test_more_families(kernel, ran, family):
    """Shared experts, group-limited routing, transposed interleaved biased weights with a clamped gate."""
    ids = tokens()
    model = tiny_model(family)
    want = loss_and_grads(wrap(copy.deepcopy(model), family), ids)
    model = wrap(model, family)
    report = kernel.kernelize(model)
    assert len(report.switched) == moe_layers(model) and not report.left
    activation = "clamped_glu(1.702, 7.0, 1.0)" if family == "gpt_oss" else "silu"
    assert report.switched[0].activation == activation
    with ran:
        got = loss_and_grads(model, ids)
    check_same(got, want)
    assert ran.ops["moe_mlp_forward"] == moe_layers(model)
    assert ran.merges == 0


def test_a_class_made_by_fsdp_keeps_its_gate(kernel):
    """`fully_shard` gives a module a subclass of its class, named otherwise."""
    model = tiny_model("gpt_oss")
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.__class__ = type(f"FSDP{type(experts).__name__}", (type(experts),), {})
    report = kernel.kernelize(model)
    assert {entry.activation for entry in report.switched} == {"clamped_glu(1.702, 7.0, 1.0)"}
    assert {entry.experts_class for entry in report.switched} == {"FSDPGptOssExperts"}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_full_fine_tuning(kernel, ran, family):
    """No PEFT: every parameter trains, experts and router among them, as in the untouched model."""
    ids = tokens()
    model = tiny_model(family)
    want = loss_and_grads(copy.deepcopy(model), ids)
    kernel.kernelize(model)
    with ran:
        got = loss_and_grads(model, ids)
    check_same(got, want)
    assert ran.ops
    assert any("gate_up_proj" in name for name in got[1])


@pytest.mark.parametrize("projection", ["gate_up_proj", "down_proj"])
def test_one_projection(kernel, ran, projection):
    ids = tokens()
    model = tiny_model("mixtral")
    only = [f"mlp.experts.{projection}"]
    want = loss_and_grads(wrap(copy.deepcopy(model), "mixtral", only), ids)
    model = wrap(model, "mixtral", only)
    report = kernel.kernelize(model)
    assert all(entry.lora == (projection,) for entry in report.switched)
    with ran:
        check_same(loss_and_grads(model, ids), want)
    assert ran.merges == 0 and ran.ops["moe_mlp_forward"] == 2


def test_lora_beside_the_experts(kernel, ran):
    """Attention, router and experts adapted together; rsLoRA's scaling; ranks that are no power of two."""
    ids = tokens()
    model = tiny_model("qwen3_moe")
    changes = {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 3}
    parameters = [*targets("qwen3_moe"), "mlp.gate.weight"]
    want = loss_and_grads(wrap(copy.deepcopy(model), "qwen3_moe", parameters, **changes), ids)
    model = wrap(model, "qwen3_moe", parameters, **changes)
    kernel.kernelize(model)
    with ran:
        got = loss_and_grads(model, ids)
    check_same(got, want)
    assert ran.ops["moe_mlp_forward"] == 2 and ran.merges == 0


def test_report(kernel):
    model = wrap(tiny_model("qwen3_moe"), "qwen3_moe")
    report = kernel.kernelize(model)
    assert [entry.name for entry in report.switched] == [
        f"base_model.model.model.layers.{i}.mlp.experts" for i in range(2)
    ]
    assert all(entry.lora == ("gate_up_proj", "down_proj") for entry in report.switched)
    text = str(report)
    assert "2 experts modules switched, 2 of them with LoRA" in text
    assert "layers.1.mlp.experts (Qwen3MoeExperts): LoRA on gate_up_proj, down_proj" in text
    assert str(kernel.kernelize(model)) == text, "a second call changes nothing"
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == 2


def test_a_bare_module(kernel, ran):
    """An experts module, or PEFT's wrapper of one, with no model around it."""
    block = tiny_model("mixtral").model.layers[0].mlp
    wrapped = wrap(tiny_model("mixtral"), "mixtral").base_model.model.model.layers[0].mlp
    x, index, weights = torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    for experts, lora in ((block.experts, ()), (wrapped.experts, ("gate_up_proj", "down_proj"))):
        want = experts(x, index, weights)
        report = kernel.kernelize(experts)
        assert [(entry.name, entry.lora) for entry in report.switched] == [("", lora)]
        with ran:
            assert_close({"output": (experts(x, index, weights), want)}, BOUND)
        assert ran.ops["moe_mlp_forward"] == 1 and ran.merges == 0


def test_a_model_without_experts_is_an_error(kernel):
    config = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=24, num_hidden_layers=1, vocab_size=64)
    config.num_attention_heads = config.num_key_value_heads = 2
    with pytest.raises(ValueError, match="LlamaForCausalLM has no experts module"):
        kernel.kernelize(AutoModelForCausalLM.from_config(config))


def test_weights_of_other_tensors_inside_are_left(kernel):
    """As torchao's quantised ones, whose dtype is that of what they stand for."""
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    weight = experts.down_proj.detach()
    experts.down_proj = torch.nn.Parameter(TwoTensor(weight, weight.clone()))
    report = kernel.kernelize(model)
    assert [entry.name for entry in report.switched] == ["model.layers.1.mlp.experts"]
    ((name, reason),) = report.left
    assert name == "model.layers.0.mlp.experts" and "its down_proj is a TwoTensor" in reason


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8], ids=str)
def test_quantised_experts_are_left(kernel, monkeypatch, dtype):
    model = tiny_model("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    packed = second.down_proj.data.to(dtype)
    if dtype == torch.uint8:  # two numbers of 4 bits each, as bitsandbytes packs them
        packed = packed.view(-1, 2)[:, :1]
    second.down_proj = torch.nn.Parameter(packed, requires_grad=False)
    report = kernel.kernelize(model)
    assert [entry.name for entry in report.switched] == ["model.layers.0.mlp.experts"]
    assert report.left == (("model.layers.1.mlp.experts", f"its down_proj is quantised ({dtype})"),)
    assert "left as it was: model.layers.1.mlp.experts" in str(report)
    # The config that chooses the implementation is shared: what was left must still run its own forward.
    assert second.config._experts_implementation == "scattermoe_lora"
    own = []
    monkeypatch.setattr(type(second).forward, "__wrapped__", lambda *arguments: own.append(arguments))
    second(1, 2, 3)
    assert own == [(second, 1, 2, 3)]
    first.down_proj = torch.nn.Parameter(first.down_proj.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        kernel.kernelize(model)


def test_adapters_switch_disable_and_merge(kernel, ran):
    """A second adapter, a disabled one (DPO's reference), a merged one, a deleted one: PEFT's own results."""
    ids = tokens()

    def build():
        model = wrap(tiny_model("qwen3_moe"), "qwen3_moe")
        torch.manual_seed(6)
        model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
        return model.eval()

    stock, fused = build(), build()
    kernel.kernelize(fused)

    def compare() -> None:
        with torch.no_grad():
            want = stock(input_ids=ids).logits
            with ran:
                got = fused(input_ids=ids).logits
        assert_close({"logits": (got, want)}, BOUND)
        assert ran.ops, "the fused experts ran"
        assert ran.merges == 0

    compare()
    for model in (stock, fused):
        model.set_adapter("second")
    compare()
    with stock.disable_adapter(), fused.disable_adapter():
        compare()
    for model in (stock, fused):
        model.merge_adapter()
    compare()
    for model in (stock, fused):
        model.unmerge_adapter()
    compare()
    for model in (stock, fused):
        model.merge_adapter()
    with stock.disable_adapter(), fused.disable_adapter():
        compare()  # which unmerges
    compare()
    for model in (stock, fused):
        model.base_model.set_adapter(["default", "second"])
    compare()  # two at once: their factors stack along the rank
    for model in (stock, fused):
        model.base_model.set_adapter("default")
        model.delete_adapter("second")
    compare()


def test_several_active_adapters_train(kernel, ran):
    """Adapters of different rank and scaling, active together: every factor's gradient is PEFT's."""
    ids = tokens()

    def build():
        model = wrap(tiny_model("qwen3_moe"), "qwen3_moe")
        torch.manual_seed(6)
        other = copy.deepcopy(model.peft_config["default"])
        other.r, other.lora_alpha = 3, 7
        model.add_adapter("second", other)
        model.base_model.set_adapter(["default", "second"])
        return model

    want = loss_and_grads(build(), ids)
    model = build()
    kernel.kernelize(model)
    with ran:
        got = loss_and_grads(model, ids)
    check_same(got, want)
    assert len(got[1]) == 16 and ran.merges == 0


def test_train_eval_and_generate(kernel, ran):
    model = wrap(tiny_model("qwen3_moe"), "qwen3_moe").eval()
    ids = tokens(1, 5)
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    kernel.kernelize(model)
    for mode in (True, False):
        model.train(mode)
        with ran, torch.no_grad():
            model(input_ids=ids)
        assert ran.ops["moe_mlp_forward"] == 2
    with ran:
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), want)
    assert ran.ops["moe_mlp_forward"] > 10


def test_router_logits_and_aux_loss(kernel):
    ids = tokens()
    model = tiny_model("qwen3_moe", router_aux_loss_coef=0.1, output_router_logits=True)
    want = model(input_ids=ids, labels=ids)
    kernel.kernelize(model)
    got = model(input_ids=ids, labels=ids)
    assert len(got.router_logits) == len(want.router_logits) == 2
    pairs = {f"router {i}": pair for i, pair in enumerate(zip(got.router_logits, want.router_logits, strict=True))}
    assert_close({"aux": (got.aux_loss, want.aux_loss), "loss": (got.loss, want.loss), **pairs}, BOUND)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(kernel, use_reentrant):
    ids = tokens()
    model = wrap(tiny_model("qwen3_moe"), "qwen3_moe")
    kernel.kernelize(model)
    want_logits, want = loss_and_grads(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    logits, grads = loss_and_grads(model, ids)
    assert torch.equal(logits, want_logits)
    assert grads.keys() == want.keys() and all(torch.equal(grads[name], want[name]) for name in want)


def test_fp32_adapters_on_a_bf16_base(kernel):
    """PEFT's default for half precision bases, with and without autocast: gradients are float32, close to PEFT's."""
    ids = tokens()
    model = wrap(tiny_model("qwen3_moe").to(torch.bfloat16), "qwen3_moe")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    fused = copy.deepcopy(model)
    kernel.kernelize(fused)
    exact = wrap(tiny_model("qwen3_moe").to(torch.bfloat16).float(), "qwen3_moe")
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    want_logits, want = loss_and_grads(exact, ids)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            _, grads = loss_and_grads(fused, ids)
            _, stock = loss_and_grads(model, ids)
        for name, grad in grads.items():
            assert grad.dtype == torch.float32 and grad.shape == want[name].shape
            ours, theirs = ((g - want[name]).norm() / want[name].norm() for g in (grad, stock[name]))
            # bfloat16 moves tokens across routing ties, for PEFT as for us: no worse than half as much again.
            assert ours <= max(1.5 * theirs, 0.05), (name, enabled, float(ours), float(theirs))


def test_adapter_saves_and_loads_in_stock_peft(kernel, tmp_path):
    """Nothing of the kernel is saved: the files are those of an untouched PEFT model, bit for bit, and load there."""
    ids = tokens()
    stock, fused = (wrap(tiny_model("mixtral"), "mixtral").eval() for _ in range(2))
    kernel.kernelize(fused)
    assert list(fused.state_dict()) == list(stock.state_dict())
    stock.save_pretrained(tmp_path / "stock")
    fused.save_pretrained(tmp_path / "fused")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "fused").iterdir())
    for name in names:
        if name.endswith((".safetensors", ".json")):
            assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes(), name
    loaded = PeftModel.from_pretrained(tiny_model("mixtral"), tmp_path / "fused").eval()
    saved = load_file(tmp_path / "fused" / "adapter_model.safetensors")
    assert saved and all(".lora_" in name for name in saved)
    with torch.no_grad():
        assert_close({"logits": (fused(input_ids=ids).logits, loaded(input_ids=ids).logits)}, BOUND)
    kernel.kernelize(loaded)
    with torch.no_grad():
        assert torch.equal(fused(input_ids=ids).logits, loaded(input_ids=ids).logits)
    fused.base_model.model.save_pretrained(tmp_path / "base")
    assert "scattermoe" not in (tmp_path / "base" / "config.json").read_text()


def test_experts_implementation(kernel, ran):
    """`register`, then transformers' own switches; PEFT's own forward runs, and the factors reach the kernel."""
    assert kernel.register() == "scattermoe_lora"
    ids = tokens()
    want = loss_and_grads(wrap(tiny_model("mixtral"), "mixtral"), ids)
    config = tiny_model("mixtral").config
    chosen = AutoModelForCausalLM.from_config(config, experts_implementation="scattermoe_lora")
    chosen.load_state_dict(tiny_model("mixtral").state_dict())
    switched = tiny_model("mixtral")
    switched.set_experts_implementation("scattermoe_lora")
    for model in (chosen, switched):
        model = wrap(model, "mixtral")
        with ran:
            check_same(loss_and_grads(model, ids), want)
        assert ran.ops == {"moe_mlp_forward": 2, "moe_mlp_backward": 2}


@pytest.mark.parametrize(
    ("where", "kind"),
    [
        ("experts", "forward_hook"),
        ("experts", "forward_pre_hook"),
        ("experts", "full_backward_hook"),
        ("experts", "full_backward_pre_hook"),
        ("inner wrapper", "forward_hook"),
    ],
)
def test_hooks_below_the_wrapper_still_run(kernel, ran, where, kind):
    """A user's hook on the experts (accelerate's offloading, FSDP's) is not bypassed by the fused wrapper.

    Nor is one on an inner wrapper, whose forward is PEFT's then.
    """
    ids = tokens()
    model = wrap(tiny_model("mixtral"), "mixtral")
    want = loss_and_grads(copy.deepcopy(model), ids)
    kernel.kernelize(model)
    seen = []
    for layer in model.base_model.model.model.layers:
        wrapper = layer.mlp.experts
        hooked = wrapper.get_base_layer() if where == "experts" else wrapper.base_layer
        getattr(hooked, f"register_{kind}")(lambda *_: seen.append(1))
    with ran:
        check_same(loss_and_grads(model, ids), want)
    assert len(seen) == 2
    if where == "experts":
        assert ran.ops == {"moe_mlp_forward": 2, "moe_mlp_backward": 2} and ran.merges == 0


def test_hooks_with_another_experts_implementation(kernel, ran):
    """A hooked module that would not end in our forward gets PEFT's own, with the adapter."""
    ids = tokens()
    model = wrap(tiny_model("mixtral"), "mixtral")
    want = loss_and_grads(copy.deepcopy(model), ids)
    kernel.kernelize(model)
    model.base_model.model.set_experts_implementation("eager")
    for layer in model.base_model.model.model.layers:
        layer.mlp.experts.get_base_layer().register_forward_pre_hook(lambda *_: None)
    with ran:
        check_same(loss_and_grads(model, ids), want)
    assert not ran.ops and ran.merges > 0


def test_lora_handed_over_in_vain(kernel):
    """What does not come to use it gives an error, no output without the adapter, and nothing is left."""
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    experts.forward = lambda hidden_states: hidden_states
    before = set(vars(experts))
    with pytest.raises(RuntimeError, match="forward of MixtralExperts did not come to use its LoRA"):
        inner(kernel, "integrations.experts").call_with_loras(experts, {}, torch.ones(3, 32))
    assert set(vars(experts)) == before


def test_a_hook_that_calls_the_experts(kernel, ran):
    """As one that measures them: what it calls has the LoRA, and so has the call that it is a hook of."""
    ids = tokens()
    model = wrap(tiny_model("mixtral"), "mixtral")

    def measured(model):
        norms = []
        for layer in model.base_model.model.model.layers:
            experts = layer.mlp.experts.get_base_layer()
            experts.register_forward_pre_hook(lambda module, args: norms.append(module.forward(*args).norm().view(1)))
            wrapper, calls = layer.mlp.experts, []

            def compare(module, args, wrapper=wrapper, calls=calls):
                calls.append(args)
                if len(calls) == 1:  # not in the call that it makes
                    norms.append(wrapper(*args).norm().view(1))

            experts.register_forward_pre_hook(compare)
        return loss_and_grads(model, ids), norms

    want, want_norms = measured(copy.deepcopy(model))
    kernel.kernelize(model)
    got, norms = measured(model)
    check_same(got, want)
    assert_close({"norms": (torch.cat(norms), torch.cat(want_norms))}, BOUND)


def halved(function, is_decorated=True):
    def half(*args):
        return function(*args) * 0.5

    return functools.wraps(function)(half) if is_decorated else half


@pytest.mark.parametrize(
    "where", ["experts", "experts, decorated", "their class", "wrapper within", "wrapper within, decorated", "eager"]
)
def test_another_forward_since(kernel, ran, where, monkeypatch):
    """What was put there or chosen after `kernelize` runs, with the adapter, and not what it replaced."""
    ids = tokens()
    model = wrap(tiny_model("mixtral"), "mixtral")

    def change(model, patch):
        for layer in model.base_model.model.model.layers:
            module = layer.mlp.experts.base_layer
            if where == "eager":
                model.base_model.model.set_experts_implementation("eager")
            elif where == "their class":
                patch.setattr(type(module.base_layer), "forward", halved(type(module.base_layer).forward, False))
            else:
                module = module.base_layer if where.startswith("experts") else module
                module.forward = halved(module.forward, where.endswith("decorated"))

    untouched = loss_and_grads(model, ids)
    changed = copy.deepcopy(model)
    with monkeypatch.context() as patch:
        change(changed, patch)
        want = loss_and_grads(changed, ids)
    assert torch.allclose(untouched[0], want[0]) == (where == "eager")
    kernel.kernelize(model)
    change(model, monkeypatch)
    with ran:
        check_same(loss_and_grads(model, ids), want)
    assert bool(ran.ops) == (where != "eager")


GATES = {"act_fn's forward": "mixtral", "act_fn's hook": "mixtral", "act_fn's backward hook": "mixtral"}
GATES |= {"act_fn's class's forward": "mixtral", "its class's, decorated": "mixtral"}
GATES |= {"the module's": "mixtral", "a class's below": "gpt_oss", "its class's": "gpt_oss"}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("what", "family"), GATES.items(), ids=GATES)
def test_another_gate(kernel, what, family, when, monkeypatch):
    """An activation with hooks or another forward, and a gate that is not its class's, are no fused ones."""
    ids = tokens()

    def gate(self, gate_up):
        return torch.tanh(gate_up[..., ::2]) * gate_up[..., 1::2]

    def change(model, patch):
        for layer in model.base_model.model.model.layers:
            experts = layer.mlp.experts.get_base_layer()
            if what == "act_fn's forward":
                experts.act_fn.forward = torch.tanh
            elif what == "act_fn's class's forward":
                patch.setattr(type(experts.act_fn), "forward", lambda self, x: torch.tanh(x))
            elif what == "its class's, decorated":
                patch.setattr(type(experts), "_apply_gate", halved(type(experts)._apply_gate))
            elif what == "act_fn's hook":
                experts.act_fn.register_forward_hook(lambda module, args, out: out * 0.5)
            elif what == "act_fn's backward hook":
                experts.act_fn.register_full_backward_hook(lambda module, grads, _: (grads[0] * 0.5,))
            elif what == "the module's":
                experts._apply_gate = lambda gate_up: gate(None, gate_up)
            elif what == "its class's":
                patch.setattr(type(experts), "_apply_gate", gate)
            else:
                experts.__class__ = type("Below", (type(experts),), {"_apply_gate": gate})

    with monkeypatch.context() as patch:
        model = wrap(tiny_model(family), family)
        change(model, patch)
        want = loss_and_grads(model, ids)
    model = wrap(tiny_model(family), family)
    if when == "before":
        change(model, monkeypatch)
    report = kernel.kernelize(model)
    if when == "before":
        assert {entry.activation for entry in report.switched} == {"own"}
    else:
        change(model, monkeypatch)
    check_same(loss_and_grads(model, ids), want)


def test_torchs_gelu_is_either(kernel):
    """One class of two formulas, of which the other is 1e-3 off."""
    ids = tokens()
    for approximate, name in (("none", "gelu"), ("tanh", "gelu_tanh")):
        model = tiny_model("mixtral", num_hidden_layers=1)
        model.model.layers[0].mlp.experts.act_fn = torch.nn.GELU(approximate=approximate)
        want = loss_and_grads(copy.deepcopy(model), ids)
        (switched,) = kernel.kernelize(model).switched
        assert switched.activation == name
        check_same(loss_and_grads(model, ids), want)


@pytest.mark.parametrize("case", ["before PEFT", "two adapters", "own activation"])
def test_compiles_whole(kernel, case):
    """Without a graph break, whatever the order, and where the factors are viewed by expert."""
    if case == "before PEFT" and torch.__version__ < "2.13":
        pytest.skip("where a forward is put on a module while it is traced, torch 2.11 traces its class's")
    ids = tokens()
    model = tiny_model("mixtral", num_hidden_layers=1)
    if case == "own activation":
        for layer in model.model.layers:
            layer.mlp.experts.act_fn = torch.nn.Mish()
    if case == "before PEFT":
        kernel.kernelize(model)
    model = wrap(model, "mixtral")
    if case == "two adapters":
        model.add_adapter("other", model.peft_config["default"])
        model.base_model.set_adapter(["default", "other"])
    kernel.kernelize(model)
    want = loss_and_grads(copy.deepcopy(model), ids)
    if case == "before PEFT":  # as it is before its first call
        model = tiny_model("mixtral", num_hidden_layers=1)
        kernel.kernelize(model)
        model = wrap(model, "mixtral")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(input_ids=ids, labels=ids)
    out.loss.backward()
    check_same((out.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), want)


def test_a_kernelized_model_is_not_pickled(kernel, tmp_path):
    """What would be written, no process could read; after `unkernelize` it is PEFT's own again, to be copied too."""
    model = wrap(tiny_model("glm4_moe"), "glm4_moe")
    want = loss_and_grads(model, tokens())
    kernel.kernelize(model)
    experts = next(module for module in model.modules() if type(module).__name__ == "ParamWrapper")
    for pickled in (model, experts):
        with pytest.raises(pickle.PicklingError, match="unkernelize"):
            torch.save(pickled, tmp_path / "model.pt")
    kernel.unkernelize(model)
    torch.save(model, tmp_path / "model.pt")
    check_same(loss_and_grads(torch.load(tmp_path / "model.pt", weights_only=False), tokens()), want)


@pytest.mark.parametrize("with_peft", [False, True])
def test_hooks_below_a_switched_block(mapped, with_peft):
    """`HFScatterMoEGatedMLP` calls experts that have hooks."""
    ids = tokens()
    model = tiny_model("mixtral")
    if with_peft:
        model = wrap(model, "mixtral")
    want = loss_and_grads(copy.deepcopy(model), ids)
    layers = (model.base_model.model if with_peft else model).model.layers
    mapped(model, {type(layers[-1].mlp): "HFScatterMoEGatedMLP"})
    seen = []
    for layer in layers:
        layer.mlp.experts.register_forward_hook(lambda *_: seen.append(1))
    check_same(loss_and_grads(model, ids), want)
    assert len(seen) == 2


@pytest.mark.parametrize("is_decorated", [False, True])
@pytest.mark.parametrize("where", ["wrapper", "experts", "their class"])
def test_another_forward_below_a_switched_block(mapped, where, is_decorated, monkeypatch):
    """`HFScatterMoEGatedMLP` calls what has one, as the block does that it replaces."""
    ids = tokens()
    model = tiny_model("mixtral")
    if where == "wrapper":
        model = wrap(model, "mixtral")
    layers = (model.base_model.model if where == "wrapper" else model).model.layers
    untouched = loss_and_grads(model, ids)
    if where == "their class":
        experts_class = type(layers[0].mlp.experts)
        monkeypatch.setattr(experts_class, "forward", halved(experts_class.forward, is_decorated))
    for layer in layers if where != "their class" else ():
        layer.mlp.experts.forward = halved(layer.mlp.experts.forward, is_decorated)
    want = loss_and_grads(model, ids)
    assert not torch.allclose(untouched[0], want[0])
    mapped(model, {type(layers[-1].mlp): "HFScatterMoEGatedMLP"})
    check_same(loss_and_grads(model, ids), want)


@pytest.mark.parametrize("by_expert", [True, False])
def test_parallel_experts_below_a_switched_block(mapped, by_expert):
    """`HFScatterMoEGatedMLP` calls what transformers' parallelism puts around the experts' forward."""
    ids = tokens()
    model = tiny_model("mixtral")
    want = loss_and_grads(copy.deepcopy(model), ids)
    mapped(model, {type(model.model.layers[-1].mlp): "HFScatterMoEGatedMLP"})
    seen = []
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts._is_expert_parallel = by_expert

        def parallel_forward(*args, original=experts.forward):
            seen.append(1)
            return original(*args)

        # That of others is called in any case.
        parallel_forward.__module__ = "transformers.distributed.tensor_parallel"
        experts.forward = parallel_forward
    check_same(loss_and_grads(model, ids), want)
    assert len(seen) == 2


def test_copies_are_independent(kernel):
    ids = tokens()
    model = wrap(tiny_model("mixtral"), "mixtral").eval()
    kernel.kernelize(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
        with model.disable_adapter():
            want = model(input_ids=ids).logits
        assert_close({"logits": (twin(input_ids=ids).logits, want)}, BOUND)


@pytest.mark.parametrize("when", ["after PEFT", "before PEFT"])
def test_a_deleted_model_is_freed_at_once(kernel, when):
    """As PEFT's is: memory of a GPU is not seen by Python's garbage collector, which may come late."""
    model = tiny_model("mixtral")
    if when == "before PEFT":
        kernel.kernelize(model)
    model = wrap(model, "mixtral")
    if when == "after PEFT":
        kernel.kernelize(model)
    loss_and_grads(model, tokens())
    kept = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    gc.disable()
    try:
        del model
        assert not [name for name, parameter in kept.items() if parameter() is not None]
    finally:
        gc.enable()


@pytest.fixture
def mapped(kernel):
    """Maps a class to one of the kernel's layers as `kernels` does, and takes the mark off the class afterwards."""
    marked = []
    root = Path(kernel.__file__).parent.parent.parent

    def switch(model, classes):
        mapping = {}
        for cls, layer in classes.items():
            replace_kernel_forward_from_hub(cls, f"Test{cls.__name__}")
            marked.append(cls)
            mapping[f"Test{cls.__name__}"] = {"cpu": LocalLayerRepository(repo_path=root, layer_name=layer)}
        with use_kernel_mapping(mapping, inherit_mapping=False):
            kernels.kernelize(model, mode=Mode.TRAINING, device="cpu", use_fallback=True)

    yield switch
    for cls in marked:
        del cls.kernel_layer_name, cls.kernel_condition


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_layers_for_experts(mapped, ran, family):
    """`ScatterMoEExperts` and `ScatterMoEParamWrapper`, swapped in by `kernels.kernelize`."""
    ids = tokens()
    model = wrap(tiny_model(family), family)
    want = loss_and_grads(copy.deepcopy(model), ids)
    experts = type(model.base_model.model.model.layers[0].mlp.experts.get_base_layer())
    mapped(model, {experts: "ScatterMoEExperts", peft_layer.ParamWrapper: "ScatterMoEParamWrapper"})
    with ran:
        check_same(loss_and_grads(model, ids), want)
    assert ran.ops and ran.merges == 0


@pytest.mark.parametrize("with_peft", [False, True])
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "qwen2_moe", "olmoe", "mixtral", "deepseek_v3", "glm4_moe", "granitemoe"]
)
def test_layer_for_blocks(mapped, ran, family, with_peft):
    """`HFScatterMoEGatedMLP` returns exactly what each block returns, shared experts and router records included.

    GraniteMoe's has the name `ScatterMoEGatedMLP` in axolotl's mapping.
    """
    ids = tokens()
    model = tiny_model(family)
    if with_peft:
        model = wrap(model, family)
    want = loss_and_grads(copy.deepcopy(model), ids)
    layer = (model.base_model.model if with_peft else model).model.layers[-1]
    block = getattr(layer, BLOCK.get(family, "mlp"))
    x = torch.randn(2, 5, 32)
    want_out = block(x)
    name = "ScatterMoEGatedMLP" if family == "granitemoe" else "HFScatterMoEGatedMLP"
    mapped(model, {type(block): name})
    assert block.forward.__func__.__qualname__ == f"{name}.forward"
    assert_close({"block": (block(x), want_out)}, BOUND)
    with ran:
        check_same(loss_and_grads(model, ids), want)
    assert ran.ops["moe_mlp_forward"] == moe_layers(model) and ran.merges == 0


def test_jitter_of_a_block(mapped):
    """The block's own noise, in train mode only; it works on its input in place, as transformers' does."""
    block = tiny_model("mixtral", router_jitter_noise=0.2).model.layers[-1].mlp
    x = torch.randn(2, 5, 32)

    def run(training):
        torch.manual_seed(0)
        return block.train(training)(x.clone())

    want = run(True), run(False)
    assert not torch.allclose(*want, rtol=0.01)
    mapped(block, {type(block): "HFScatterMoEGatedMLP"})
    for training, value in zip((True, False), want, strict=True):
        assert_close({"block": (run(training), value)}, BOUND)


@pytest.mark.parametrize("lora", ["none", "own", "peft"])
def test_layer_for_granite_style_blocks(kernel, mapped, ran, lora):
    """`ScatterMoEGatedMLP` on `router.layer`, `input_linear`, `output_linear`, against a loop over tokens."""

    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.top_k, self.num_experts = torch.nn.Linear(20, 6, bias=False), 2, 6

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.activation = Router(), torch.nn.SiLU()
            self.input_linear = kernel.ParallelExperts(6, 20, 2 * 12, bias=True)
            self.output_linear = kernel.ParallelExperts(6, 12, 20, bias=True)

        def forward(self, layer_input: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(layer_input)
            for b, sequence in enumerate(layer_input):
                for t, token in enumerate(sequence):
                    top, experts = self.router.layer(token).topk(2)
                    for weight, e in zip(top.softmax(0), experts, strict=True):
                        gate, up = linear(self.input_linear, e, token).chunk(2)
                        out[b, t] += weight * linear(self.output_linear, e, self.activation(gate) * up)
            return out

    def linear(module, e, vector):
        base = getattr(module, "base_layer", module)
        out = base.weight[e] @ vector + base.bias[e]
        if lora == "peft":
            return out + module.get_delta_weight("default")[e] @ vector
        if lora == "own":
            A, B = base.lora_A.view(6, 3, -1)[e], base.lora_B.view(-1, 6, 3)[:, e]
            return out + base.scaling * B @ (A @ vector)
        return out

    torch.manual_seed(0)
    block = Block()
    for stack in (block.input_linear, block.output_linear):
        torch.nn.init.normal_(stack.bias)
        if lora == "own":
            stack.set_lora(torch.randn(18, stack.input_size), torch.randn(stack.output_size, 18), 0.5)
    if lora == "peft":
        parameters = ["block.input_linear.weight", "block.output_linear.weight"]
        config = LoraConfig(r=3, target_parameters=parameters, init_lora_weights=False)
        get_peft_model(torch.nn.ModuleDict({"block": block}), config)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    x = torch.randn(2, 7, 20)
    want = block(x)
    want_grads = torch.autograd.grad(want.square().sum(), trained)
    mapped(block, {Block: "ScatterMoEGatedMLP"})
    with ran:
        got = block(x)
    grads = torch.autograd.grad(got.square().sum(), trained)
    pairs = {str(i): pair for i, pair in enumerate(zip(grads, want_grads, strict=True))}
    assert_close({"output": (got, want), **pairs}, BOUND)
    assert ran.ops["moe_mlp_forward"] == 1
    if lora == "peft":
        block.input_linear.base_layer.set_lora(torch.randn(18, 20), torch.randn(24, 18))
        with pytest.raises(ValueError, match="both PEFT's LoRA and its own"):
            block(x)
        block.input_linear.parameter_name = "bias"
        with pytest.raises(ValueError, match="can't fuse LoRA on bias, only on weight"):
            block(x)
