"""Every way of switching the kernel on and off again, and who gives way where another kernel is there already."""

from __future__ import annotations

import copy
import functools
import sys
import types
import warnings
from collections import Counter

import kernels
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import inner
from numerics import assert_close
from peft import LoraConfig, get_peft_model
from tiny import BOUND, check_same, loss_and_grads, tiny_model, tokens, wrap
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoConfig, AutoModelForCausalLM, KernelConfig
from transformers.integrations import hub_kernels, moe
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts, Mxfp4GptOssMLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.utils import is_kernels_available
from transformers.utils import kernel_config as transformers_kernel_config

# `use_kernels` and `KernelConfig`, and the names that transformers gives to classes: 5.23 asks for kernels 0.18.
integrated = pytest.mark.skipif(
    not is_kernels_available(),
    reason=f"transformers {transformers.__version__} does not take kernels {kernels.__version__}",
)

NAMES = [f"model.layers.{i}.mlp.experts" for i in range(2)]


@pytest.fixture
def mappings(monkeypatch):
    """Mappings and the names of classes are global to `kernels`: what a test adds goes, and no default is loaded."""

    def subclasses(cls):
        return {cls}.union(*map(subclasses, cls.__subclasses__()))

    monkeypatch.setattr(hub_kernels, "_KERNEL_MAPPING_CACHE", {}, raising=is_kernels_available())
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        yield
    for cls in subclasses(nn.Module):
        if cls.__dict__.get("kernel_layer_name") in ("ScatterMoEExperts", "ScatterMoEParamWrapper"):
            del cls.kernel_layer_name, cls.kernel_condition


def untouched(model: nn.Module) -> bool:
    """Whether nothing of `kernelize` is left in a model."""
    return not any(
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or any("scattermoe" in name for name in module.__dict__)
        or getattr(module, "config", None) is not None
        and module.config._experts_implementation == "scattermoe_lora"
        for module in model.modules()
    )


# Off again


@pytest.mark.parametrize("when", ["before", "after", "twice"])
def test_unkernelize(kernel, ran, when):
    """The untouched model's forward runs again, and gives its bits."""
    ids = tokens()
    want = loss_and_grads(wrap(tiny_model("mixtral"), "mixtral"), ids)
    model = tiny_model("mixtral")
    if when == "before":
        kernel.kernelize(model)
    model = wrap(model, "mixtral")
    for _ in range({"before": 0, "after": 1, "twice": 2}[when]):
        kernel.kernelize(model)
    with ran:
        loss_and_grads(model, ids)
    assert ran.ops and not ran.merges and not untouched(model)
    names = kernel.unkernelize(model)
    assert [name.replace(".base_layer", "") for name in names] == [f"base_model.model.{name}" for name in NAMES]
    assert untouched(model)
    with ran:
        logits, grads = loss_and_grads(model, ids)
    assert not ran.ops and ran.merges
    assert torch.equal(logits, want[0]) and all(torch.equal(grads[name], want[1][name]) for name in want[1])
    assert kernel.unkernelize(model) == ()
    kernel.kernelize(model)
    with ran:
        loss_and_grads(model, ids)
    assert ran.ops and not ran.merges


@pytest.mark.parametrize("chosen", ["eager", "batched_mm", "scattermoe_lora"])
def test_unkernelize_brings_back_what_was_chosen(kernel, chosen):
    kernel.register()
    model = tiny_model("mixtral")
    model.set_experts_implementation(chosen)
    assert [entry.replaced for entry in kernel.kernelize(model).switched] == [chosen, chosen]
    report = kernel.kernelize(copy.deepcopy(model))
    assert f"silu; in place of {chosen}" in str(report)
    kernel.unkernelize(model)
    assert model.config._experts_implementation == chosen
    kernel.kernelize(model)
    model.set_experts_implementation("grouped_mm")  # another choice, and kernelize again
    assert kernel.kernelize(model).switched[0].replaced == "grouped_mm"
    kernel.unkernelize(model)
    assert model.config._experts_implementation == "grouped_mm"


def test_one_config_switched_in_parts(kernel):
    """Layer by layer, the layers again as a model, or two models of one config: off is what there was."""
    model = tiny_model("mixtral")
    for part in (*model.model.layers, model):
        kernel.kernelize(part)
    assert kernel.unkernelize(model) == tuple(NAMES) and untouched(model)
    other = tiny_model("mixtral")
    for layer in other.model.layers:
        layer.mlp.experts.config = model.config
    for part in (model, other):
        kernel.kernelize(part)
    for part in (other, model):
        kernel.unkernelize(part)
    assert untouched(model) and untouched(other)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, lambda experts: torch.compile(experts, backend="eager")])
def test_wrapped_experts(kernel, ran, wrapper, when):
    """What wraps experts has their attributes as well: the experts inside are switched, and that is undone."""
    ids = tokens()
    want = loss_and_grads(tiny_model("mixtral"), ids)
    model = tiny_model("mixtral")
    if when == "before":
        kernel.kernelize(model)
    for layer in model.model.layers:
        layer.mlp.experts = wrapper(layer.mlp.experts)
    if when == "after":
        report = kernel.kernelize(model)
        assert [entry.experts_class for entry in report.switched] == ["MixtralExperts"] * 2 and not report.left
    with ran:
        logits, grads = loss_and_grads(model, ids)
    assert ran.ops["moe_mlp_backward"] == 2
    assert_close({"logits": (logits, want[0])}, BOUND)
    assert_close({name: (grad, want[1][name]) for name, grad in zip(want[1], grads.values(), strict=True)}, BOUND)
    assert len(kernel.unkernelize(model)) == 2 and model.config._experts_implementation == "grouped_mm"
    left = [name for module in model.modules() for name in vars(module) if "scattermoe" in name]
    assert not left and not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("when", ["before", "after"])
def test_experts_that_peft_saves_whole(kernel, ran, when):
    """``modules_to_save=["experts"]``: PEFT trains a copy of them, and its wrapper is no experts module."""
    options = {"target_modules": ["q_proj"], "modules_to_save": ["experts"]}
    model = tiny_model("mixtral")
    torch.manual_seed(4)
    want = loss_and_grads(get_peft_model(model, LoraConfig(**options)), tokens())
    model = tiny_model("mixtral")
    if when == "before":
        kernel.kernelize(model)
    torch.manual_seed(4)
    model = get_peft_model(model, LoraConfig(**options))
    if when == "after":
        assert {entry.experts_class for entry in kernel.kernelize(model).switched} == {"MixtralExperts"}
    with ran:
        check_same(loss_and_grads(model, tokens()), want)
    assert ran.ops["moe_mlp_backward"] == 2
    kernel.unkernelize(model)
    assert untouched(model)


def test_a_gate_without_numbers_is_the_modules_own(kernel):
    """Where nothing is clamped there is nothing to fuse. A module without its limit is an error before any change."""
    model = tiny_model("gpt_oss")
    experts = model.model.layers[1].mlp.experts
    del experts.limit
    with pytest.raises(AttributeError, match="limit"):
        kernel.kernelize(model)
    assert untouched(model)
    experts.limit = None
    assert [entry.activation for entry in kernel.kernelize(model).switched] == ["clamped_glu(1.702, 7.0, 1.0)", "own"]


@pytest.mark.parametrize("call", ["kernelize", "unkernelize"])
@pytest.mark.parametrize("model", [None, "Qwen/Qwen3-30B-A3B", []])
def test_no_model(kernel, call, model):
    with pytest.raises(TypeError, match=f"{call}: model must be a torch.nn.Module, got {type(model).__name__}"):
        getattr(kernel, call)(model)


def test_names_that_register_refuses(kernel):
    """Transformers' own implementations stay what they are, for everybody in the process."""
    known = dict(moe.ALL_EXPERTS_FUNCTIONS)
    for name in ("grouped_mm", "eager", ""):
        with pytest.raises(ValueError, match=f"register: name must be none of transformers' own.* got '{name}'"):
            kernel.register(name)
    with pytest.raises(TypeError, match="register: name must be a str, got int"):
        kernel.register(3)
    assert dict(moe.ALL_EXPERTS_FUNCTIONS) == known


def test_families_that_there_are_not(kernel):
    with pytest.raises(ImportError, match="kernel_mapping: model_types must be families.* got 'Qwen/Qwen3-30B-A3B'"):
        kernel.kernel_mapping("Qwen/Qwen3-30B-A3B")
    with pytest.raises(ImportError, match="got 'no_such_family'"):
        kernel.kernel_mapping("no_such_family")
    with pytest.raises(TypeError, match="kernel_mapping: model_types must be strings, got NoneType"):
        kernel.kernel_mapping(None)


def test_only_the_config_of_the_experts_changes(kernel):
    """A config may hold others: the implementation of those is not ours to choose."""
    experts = tiny_model("mixtral").model.layers[0].mlp.experts
    config = experts.config = AutoConfig.for_model("qwen3_vl_moe")
    config._experts_implementation = {"": "grouped_mm", "text_config": "batched_mm"}
    kernel.kernelize(experts)
    assert config._experts_implementation == "scattermoe_lora"
    assert config.text_config._experts_implementation == "batched_mm"
    kernel.unkernelize(experts)
    assert config._experts_implementation == "grouped_mm"
    assert config.text_config._experts_implementation == "batched_mm"


# On


def by_use_kernels(kernel, family, folder):
    kernels.register_kernel_mapping(kernel.kernel_mapping(family))
    return AutoModelForCausalLM.from_pretrained(folder, use_kernels=True)


def by_experts_implementation_at_load(kernel, family, folder):
    return AutoModelForCausalLM.from_pretrained(folder, experts_implementation=kernel.register())


def by_set_experts_implementation(kernel, family, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.set_experts_implementation(kernel.register())
    return model


def by_kernels_kernelize(kernel, family, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with kernels.use_kernel_mapping(kernel.kernel_mapping()):
        return kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")


def by_kernel_config(kernel, family, folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.kernel_config = KernelConfig(kernel.kernel_mapping())
    model.use_kernels = True
    return model


WAYS = [
    by_experts_implementation_at_load,
    by_set_experts_implementation,
    by_kernels_kernelize,
    pytest.param(by_use_kernels, marks=integrated),
    pytest.param(by_kernel_config, marks=integrated),
]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_ways_in(kernel, mappings, ran, tmp_path, way, family):
    """Each way, in eval as it is loaded, in train, and in eval again, then with PEFT: what ran, and what it gave."""
    ids = tokens()
    stock = tiny_model(family)
    stock.save_pretrained(tmp_path)
    want = loss_and_grads(stock, ids)
    model = way(kernel, family, tmp_path)
    assert not model.training
    for training in (False, True, False, True):
        model.train(training)
        with ran, torch.no_grad():
            logits = model(input_ids=ids).logits
        assert ran.ops == {"moe_mlp_forward": 2}, (training, ran.ops)
        assert_close({"logits": (logits, want[0])}, BOUND)
    with ran:
        check_same(loss_and_grads(model, ids), want)
    assert ran.ops == {"moe_mlp_forward": 2, "moe_mlp_backward": 2}
    want = loss_and_grads(wrap(stock, family), ids)
    model = wrap(model, family)
    for training in (False, True):
        model.train(training)
        with ran:
            check_same(loss_and_grads(model, ids), want)
        assert ran.ops == {"moe_mlp_forward": 2, "moe_mlp_backward": 2}


def test_the_mapping_takes_peft_too(kernel, mappings, ran):
    """With the adapters there first, `kernels.kernelize` gives the wrapper our forward: PEFT's is not called."""
    ids = tokens()
    model = wrap(tiny_model("qwen3_moe"), "qwen3_moe")
    want = loss_and_grads(copy.deepcopy(model), ids)
    with kernels.use_kernel_mapping(kernel.kernel_mapping()):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    assert wrapper.forward.__func__ is kernel.layers.ScatterMoEParamWrapper.forward
    assert type(wrapper).kernel_layer_name == "ScatterMoEParamWrapper"
    for training in (True, False):
        model.train(training)
        with ran:
            check_same(loss_and_grads(model, ids), want)
        assert ran.ops["moe_mlp_forward"] == 2 and not ran.merges
    report = kernel.kernelize(model)
    assert not report.left, "our own forward holds nothing against us"


@integrated
def test_the_mapping(kernel, mappings, monkeypatch):
    monkeypatch.setattr(modeling_olmoe.OlmoeExperts, "kernel_layer_name", "Somebodys", raising=False)
    mapping = kernel.kernel_mapping()
    assert set(mapping) == set(kernel.layers.__all__) >= {"MegaBlocksMoeMLP", "HFScatterMoEGatedMLP"}
    assert all(set(devices) == {"cpu", "cuda", "rocm", "xpu"} for devices in mapping.values())
    assert modeling_mixtral.MixtralExperts.kernel_layer_name == "ScatterMoEExperts"
    assert GptOssMLP.kernel_layer_name == "MegaBlocksMoeMLP"
    assert modeling_olmoe.OlmoeExperts.kernel_layer_name == "Somebodys", "a class that has a name keeps it"
    assert not hasattr(nn.Linear, "kernel_layer_name")


@integrated
def test_the_trap_of_a_kernel_config_of_strings(kernel, mappings, ran, tmp_path, monkeypatch):
    """docs/switching-on.md: given to from_pretrained, transformers maps it for eval alone, and train() puts back the
    original forward; ours as its mapping is for both."""
    ids = tokens()
    tiny_model("mixtral").save_pretrained(tmp_path)
    kernel.kernel_mapping("mixtral")  # gives the class its name
    monkeypatch.setattr(transformers_kernel_config, "KERNELS_SUPPORTED_DEVICE_TYPES", ["cpu"])
    monkeypatch.setattr(kernels.LayerRepository, "_resolve_revision", lambda self: "v1")  # which asks the Hub
    monkeypatch.setattr(kernels.LayerRepository, "load", lambda self: getattr(kernel.layers, self.layer_name))
    config = KernelConfig({"ScatterMoEExperts": ("org/scattermoe-lora:ScatterMoEExperts", {"version": 1})})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, use_kernels=True, kernel_config=config)
    for training, expected in ((False, {"moe_mlp_forward": 2}), (True, {})):
        model.train(training)
        with ran, torch.no_grad():
            model(input_ids=ids)
        assert ran.ops == expected
    model.kernel_config = KernelConfig(kernel.kernel_mapping())
    for training in (False, True):
        model.train(training)
        with ran, torch.no_grad():
            model(input_ids=ids)
        assert ran.ops == {"moe_mlp_forward": 2}


class MegaBlocks(nn.Module):
    """What transformers' own mapping has for gpt-oss's block."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states), None


class MegaBlocksRepository:
    def load(self):
        return MegaBlocks


@integrated
def test_the_trap_of_transformers_own_mapping(kernel, mappings, ran, monkeypatch):
    """docs/switching-on.md: use_kernels registers its own mapping after ours; a kernel_config comes after that."""
    theirs = {"MegaBlocksMoeMLP": {"cpu": MegaBlocksRepository()}}
    monkeypatch.setattr(hub_kernels, "_KERNEL_MAPPING_CACHE", theirs)
    model = tiny_model("gpt_oss")
    kernels.register_kernel_mapping(kernel.kernel_mapping())
    model.use_kernels = True
    assert model.model.layers[0].mlp.forward.__func__ is MegaBlocks.forward
    model.kernel_config = KernelConfig(kernel.kernel_mapping())
    for training in (False, True):
        model.train(training)
        assert model.model.layers[0].mlp.forward.__func__ is kernel.layers.MegaBlocksMoeMLP.forward
        with ran, torch.no_grad():
            model(input_ids=tokens())
        assert ran.ops == {"moe_mlp_forward": 2}


@integrated
@pytest.mark.parametrize("with_peft", [False, True])
def test_gpt_oss_block(kernel, mappings, ran, with_peft):
    """`MegaBlocksMoeMLP`, by the name that transformers gives the class: output and router scores, as the class's."""
    ids = tokens()
    model = tiny_model("gpt_oss")
    if with_peft:
        model = wrap(model, "gpt_oss")
    want = loss_and_grads(copy.deepcopy(model), ids)
    block = next(module for module in model.modules() if isinstance(module, GptOssMLP))
    x = torch.randn(2, 5, 32)
    want_out, want_scores = block(x)
    with kernels.use_kernel_mapping(kernel.kernel_mapping()):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    assert block.forward.__func__ is kernel.layers.MegaBlocksMoeMLP.forward
    out, scores = block(x)
    assert_close({"output": (out, want_out), "scores": (scores, want_scores)}, BOUND)
    with ran:
        check_same(loss_and_grads(model, ids), want)
    assert ran.ops == {"moe_mlp_forward": 2, "moe_mlp_backward": 2} and not ran.merges


# Where another kernel is


class Other(nn.Module):
    """What somebody else's kernel puts in the place of gpt-oss's block, or of experts."""

    def forward(self, hidden_states):
        Other.calls.append(self)
        return torch.zeros_like(hidden_states), None

    calls: list[nn.Module] = []


def test_another_block_stays(kernel, ran):
    """One block runs another kernel: the report says so, and so it is; the other block is ours."""
    ids = tokens()
    model = wrap(tiny_model("gpt_oss"), "gpt_oss")
    first, second = (layer.mlp for layer in model.base_model.model.model.layers)
    second.forward = types.MethodType(Other.forward, second)
    report = kernel.kernelize(model)
    assert [entry.name for entry in report.switched] == ["base_model.model.model.layers.0.mlp.experts"]
    ((name, reason),) = report.left
    assert name.startswith("base_model.model.model.layers.1.mlp.experts")
    assert reason == "GptOssMLP runs test_ways_in.Other.forward, which stays; take it off first"
    Other.calls.clear()
    with ran:
        model(input_ids=ids)
    assert Other.calls == [second] and ran.ops == {"moe_mlp_forward": 1}
    first.forward = types.MethodType(Other.forward, first)
    kernel.unkernelize(model)
    with pytest.raises(ValueError, match=r"no experts module that can be switched\n.*GptOssMLP runs test_ways_in.Oth"):
        kernel.kernelize(model)
    assert model.config._experts_implementation == "grouped_mm", "nothing is half-changed"


def test_a_forward_of_a_class_stays(kernel, monkeypatch):
    """Of a class below transformers' own, or put on that: what it would do beside calling ours is not known."""

    class Louder(modeling_mixtral.MixtralExperts):
        def forward(self, *args):
            return super().forward(*args) * 1.5

    model = wrap(tiny_model("mixtral"), "mixtral")
    model.base_model.model.model.layers[0].mlp.experts.get_base_layer().__class__ = Louder
    want = loss_and_grads(copy.deepcopy(model), tokens())
    report = kernel.kernelize(model)
    assert len(report.switched) == 1 and "layers.0" in report.left[0][0]
    assert report.left[0][1].endswith("Louder.forward, its class's own, which stays")
    check_same(loss_and_grads(model, tokens()), want)
    monkeypatch.setattr(modeling_mixtral.MixtralExperts, "forward", lambda self, x, *_: x)
    with pytest.raises(ValueError, match="lambda>, its class's own, which stays"):
        kernel.kernelize(tiny_model("mixtral"))


@pytest.mark.parametrize("is_hooked", [False, True])
@pytest.mark.parametrize("where", ["experts", "wrapper"])
def test_another_forward_of_experts_stays(kernel, where, is_hooked):
    """Such as Liger's, put on an instance; also over a hook of accelerate, as ``device_map`` puts on every module."""
    model = wrap(tiny_model("mixtral"), "mixtral")
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    module = wrapper if where == "wrapper" else wrapper.get_base_layer()
    if is_hooked:
        add_hook_to_module(module, ModelHook())

    def other(self, *args):
        return torch.zeros_like(args[0])

    module.forward = types.MethodType(other, module)
    report = kernel.kernelize(model)
    assert len(report.switched) == 1 and len(report.left) == 1
    assert "other, which stays" in report.left[0][1] and "layers.0" in report.left[0][0]
    assert module.forward.__func__ is other
    kernel.unkernelize(model)
    assert module.forward.__func__ is other


def test_other_experts_classes_are_named(kernel, monkeypatch):
    """Liger replaces the class: such experts ask no config what runs, which an error or the report says."""

    class LigerExperts(nn.Module):
        def __init__(self, config) -> None:
            super().__init__()
            E, H, width = config.num_local_experts, config.hidden_size, config.intermediate_size
            self.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * width, H))
            self.down_proj = nn.Parameter(torch.zeros(E, H, width))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    with monkeypatch.context() as patch:
        patch.setattr(modeling_mixtral, "MixtralExperts", LigerExperts)
        model = tiny_model("mixtral")
    with pytest.raises(ValueError, match="layers.1.mlp.experts: LigerExperts takes no experts implementation"):
        kernel.kernelize(model)
    model.model.layers[0].mlp.experts = tiny_model("mixtral").model.layers[0].mlp.experts
    report = kernel.kernelize(model)
    assert len(report.switched) == 1 and [name for name, _ in report.left] == [NAMES[1]]


def test_experts_of_another_kind_are_named(kernel):
    """gpt-oss's in MXFP4, as its checkpoints have them, with weights that are no parameters; Llama 4's own."""
    model = tiny_model("gpt_oss")
    for layer in model.model.layers:
        layer.mlp = Mxfp4GptOssMLP(layer.mlp.router, Mxfp4GptOssExperts(model.config))
        for name in ("gate_up_proj", "down_proj"):
            delattr(layer.mlp.experts, name)
    with pytest.raises(ValueError, match="layers.1.mlp.experts: Mxfp4GptOssExperts takes no experts implementation"):
        kernel.kernelize(model)
    llama = nn.ModuleDict({"experts": Llama4TextExperts(Llama4TextConfig(hidden_size=8, intermediate_size=8))})
    with pytest.raises(ValueError, match="experts: Llama4TextExperts takes no experts implementation"):
        kernel.kernelize(llama)
    # Experts that every token has are not meant.
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.shared_experts = type("InklingSharedExperts", (nn.Module,), {})()
    assert not kernel.kernelize(model).left


@integrated
def test_use_kernels_holds_blocks_that_it_names(kernel, mappings):
    """transformers maps them again at every train() and eval(): a switch would not last, so there is none."""
    model = tiny_model("gpt_oss")
    model.use_kernels = True
    with pytest.raises(ValueError, match="GptOssMLP runs what use_kernels maps MegaBlocksMoeMLP to, which stays"):
        kernel.kernelize(model)
    mixtral = tiny_model("mixtral")  # its block has no name
    mixtral.use_kernels = True
    assert len(kernel.kernelize(mixtral).switched) == 2


def test_hooks_of_accelerate_are_no_kernel(kernel, ran):
    """They call the forward that they wrap, and still run, as PEFT's own forward between them then does."""
    ids = tokens()
    model = wrap(tiny_model("mixtral"), "mixtral")
    want = loss_and_grads(copy.deepcopy(model), ids)
    calls = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__.removeprefix("Parametrized"))
            return args, kwargs

    for module in list(model.modules()):
        if type(module).__name__ in ("MixtralSparseMoeBlock", "ParamWrapper", "MixtralExperts"):
            add_hook_to_module(module, Hook())
    report = kernel.kernelize(model)
    assert len(report.switched) == 2 and not report.left
    with ran:
        check_same(loss_and_grads(model, ids), want)
    assert ran.ops["moe_mlp_forward"] == 2
    assert Counter(calls) == {"MixtralSparseMoeBlock": 2, "ParamWrapper": 4, "MixtralExperts": 2}


@pytest.mark.parametrize("first", ["hook", "kernelize"])
def test_a_hook_of_accelerate_on_the_wrapper(kernel, ran, first):
    """It goes on running, around the fused forward, and around PEFT's after `unkernelize`, which leaves it there."""
    ids = tokens()
    model = wrap(tiny_model("mixtral"), "mixtral")
    want = loss_and_grads(copy.deepcopy(model), ids)
    wrappers = [layer.mlp.experts for layer in model.base_model.model.model.layers]
    calls = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    def add_hooks():
        for wrapper in wrappers:
            add_hook_to_module(wrapper, Hook())

    def step():
        calls.clear()
        with ran:
            check_same(loss_and_grads(model, ids), want)
        return len(calls), ran.ops["moe_mlp_forward"], ran.merges > 0

    if first == "hook":
        add_hooks()
    kernel.kernelize(model)
    if first == "kernelize":
        add_hooks()
    assert step() == (2, 2, False)
    kernel.unkernelize(model)
    assert step() == (2, 0, True)
    kernel.kernelize(model)
    assert step() == (2, 2, False)
    kernel.unkernelize(model)
    for wrapper in wrappers:
        remove_hook_from_module(wrapper)
    assert step() == (0, 0, True)
    kernel.kernelize(model)
    assert step() == (0, 2, False)


def test_a_hook_that_was_taken_off_leaves_the_wrapper_to_be_fused(kernel, ran):
    """Its class's own forward lies on it then; the model was kernelized before PEFT, and has not run since."""
    model = tiny_model("mixtral")
    kernel.kernelize(model)
    model = wrap(model, "mixtral")
    for layer in model.base_model.model.model.layers:
        remove_hook_from_module(add_hook_to_module(layer.mlp.experts, ModelHook()))
    with ran:
        model(input_ids=tokens())
    assert ran.ops["moe_mlp_forward"] == 2 and not ran.merges


@pytest.mark.parametrize("is_hooked", [False, True])
def test_what_decorates_the_wrappers_forward_stays(kernel, is_hooked):
    wrapper = wrap(tiny_model("mixtral"), "mixtral").base_model.model.model.layers[0].mlp.experts
    own, calls = wrapper.forward, []

    @functools.wraps(own)
    def counted(*args):
        calls.append(1)
        return own(*args)

    wrapper.forward = counted
    if is_hooked:
        add_hook_to_module(wrapper, ModelHook())
    kernel.kernelize(wrapper)
    wrapper(torch.randn(4, 32), torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2))
    assert calls == [1]


def test_what_kernels_falls_back_to_is_no_other(kernel, mappings, ran):
    """Where `kernels` has nothing it puts the class's own forward on the instance, which holds nothing."""
    ids = tokens()
    model = wrap(tiny_model("mixtral"), "mixtral")
    want = loss_and_grads(copy.deepcopy(model), ids)
    kernel.kernel_mapping()
    kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    assert wrapper.forward.__func__ is type(wrapper).forward
    assert not kernel.kernelize(model).left
    with ran:
        check_same(loss_and_grads(model, ids), want)
    assert ran.ops["moe_mlp_forward"] == 2 and not ran.merges


def test_a_compiled_forward_is_no_other(kernel):
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.forward = torch.compile(layer.mlp.forward, backend="eager")
    assert len(kernel.kernelize(model).switched) == 2


# Versions


@pytest.mark.parametrize("package", ["torch", "triton", "transformers", "peft", "kernels"])
def test_untested_versions_warn_once(kernel, monkeypatch, package):
    versions = inner(kernel, "integrations.versions")
    model = tiny_model("mixtral")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel.kernelize(model)  # these are tested
    monkeypatch.setattr(sys.modules[package], "__version__", "99.1.2")
    with pytest.warns(UserWarning, match=f"tested with {package} .* and this is 99.1.2") as caught:
        kernel.kernelize(model)
        kernel.kernelize(model)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert versions.TESTED[package][0] in str(caught[0].message)
