"""Every experts class of the installed transformers, tiny and random, against itself with the kernel.

``python tests/families.py`` compares them all and writes the table of ``docs/supported-models.md``; `test_families`
does the same a family at a time and holds the file to it.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from numerics import relative_error
from peft import LoraConfig, get_peft_model
from test_transformers import Ran
from torch import Tensor, nn

BOUND = 1e-5
DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "supported-models.md"

# Every size that some config of a family has; each config takes those that are its own.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 4,
    # experts and routing
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "mlp_layer_types": ["sparse", "sparse"],
    "n_shared_experts": 1,
    "num_nextn_predict_layers": 0,
    # latent attention and its indexer
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # linear attention and state-space layers
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_head_dim": 16,
    "linear_num_heads": 2,
}

# What a family needs beside SMALL.
CHANGES: dict[str, dict[str, Any]] = {
    "AXK1Experts": {"head_dim": 8},
    "DeepseekV3Experts": {"head_dim": 8},
    "DeepseekV4Experts": {"mlp_layer_types": ["moe", "moe"]},
    "DiffusionGemmaTextExperts": {},
    "Ernie4_5_VLMoeMoeExperts": {"moe_intermediate_size": [24, 20]},
    "Gemma4TextExperts": {"enable_moe_block": True, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8},
    "Glm4vMoeTextExperts": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
    "Glm5NextTextExperts": {"index_kpool": 2, "qk_rope_head_dim": 0},
    "GraniteMoeHybridExperts": {"mamba_n_heads": 8},
    "MiMoV2FlashExperts": {"num_key_value_heads": 1},
    "Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 20},
    "ZayaExperts": {"num_experts_per_tok": 1},
}

# The model to build where it is not the module's *ForCausalLM, nor its *TextModel.
MODELS: dict[str, str] = {
    "OpenAIPrivacyFilterExperts": "OpenAIPrivacyFilterForTokenClassification",
    "Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel",
}

# The experts module alone, and why not the model.
ALONE: dict[str, str] = {}


@dataclass(frozen=True)
class Family:
    """One class that carries @use_experts_implementation."""

    model_type: str
    module: str
    experts_class: str

    def __str__(self) -> str:
        return f"{self.model_type}-{self.experts_class}"

    def load(self) -> ModuleType:
        return importlib.import_module(self.module)


@dataclass(frozen=True)
class Result:
    """What the comparison of one family gave: an error, or the reason why there is none."""

    layout: str
    activation: str
    tested: str
    error: float | None
    reason: str = ""

    def cells(self) -> tuple[str, ...]:
        result = self.reason or ("0" if not self.error else f"{self.error:.0e}".replace("e-0", "e-"))
        return self.layout, self.activation, self.tested, result


@functools.cache
def families() -> tuple[Family, ...]:
    """The decorated classes, read from the sources: nothing of transformers' models is imported."""
    found = []
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "\n@use_experts_implementation" not in source:
            continue
        for node in ast.parse(source).body:
            decorators = [ast.unparse(d) for d in node.decorator_list] if isinstance(node, ast.ClassDef) else []
            if any(d.startswith("use_experts_implementation") for d in decorators):
                module = f"transformers.models.{path.parent.name}.{path.stem}"
                found.append(Family(path.parent.name, module, node.name))
    return tuple(found)


def model_class(family: Family) -> type[transformers.PreTrainedModel]:
    module = family.load()
    if name := MODELS.get(family.experts_class):
        return getattr(module, name)
    for ending in ("ForCausalLM", "TextModel"):
        for name, value in vars(module).items():
            if name.endswith(ending) and isinstance(value, type) and value.__module__ == module.__name__:
                return value
    raise LookupError("no *ForCausalLM and no *TextModel")


def config_of(family: Family) -> transformers.PreTrainedConfig:
    default = model_class(family).config_class()
    default = getattr(default, "text_config", default)
    cls = type(default)
    known = {*cls.__dataclass_fields__, *cls.attribute_map}
    own = {name: value for name, value in SMALL.items() if name in known}
    return cls(**{**own, **CHANGES.get(family.experts_class, {})})


class Alone(nn.Module):
    """Experts under random routing that is part of the weights: its router is a linear layer."""

    def __init__(self, experts: Any, width: int) -> None:
        super().__init__()
        self.experts, self.router = experts, nn.Linear(width, experts.num_experts)
        self.embed = nn.Embedding(SMALL["vocab_size"], width)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        x = self.embed(input_ids.flatten())
        weights, index = self.router(x).softmax(-1).topk(2)
        return self.experts(x, index, weights)


def build(family: Family) -> nn.Module:
    """The tiny model, in float32 and train mode, the same at every call."""
    torch.manual_seed(3)
    config = config_of(family)
    if family.experts_class in ALONE:
        config._experts_implementation = "eager"
        model: nn.Module = Alone(getattr(family.load(), family.experts_class)(config), config.hidden_size)
    else:
        model = model_class(family)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.float().train()


def experts_of(model: nn.Module, family: Family) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == family.experts_class}


def wrap(model: nn.Module, family: Family) -> nn.Module:
    """PEFT around both projections of every experts module; all but the weights that it wraps trains."""
    torch.manual_seed(4)
    names = []
    for name, experts in experts_of(model, family).items():
        names += [f"{name}.{'gate_up_proj' if experts.has_gate else 'up_proj'}", f"{name}.down_proj"]
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_parameters=names))
    wrapped = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.replace("base_layer.", "").endswith(wrapped))
    return model


def run(model: nn.Module) -> dict[str, Tensor]:
    """The output, the randomly weighted sum of its squares, and the gradients of that by parameter name."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, SMALL["vocab_size"], (2, 9), generator=generator)
    torch.manual_seed(6)  # the jitter that some routers add
    out = model(input_ids=ids, use_cache=False)
    if not isinstance(out, Tensor):
        out = out.logits if "logits" in out else out.last_hidden_state
    loss = (out.square() * torch.rand(out.shape, generator=generator)).sum()
    loss.backward()
    grads = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": out.detach(), "loss": loss.detach(), **grads}


def layout(experts: Any) -> str:
    flags = {
        "transposed": experts.is_transposed,
        "interleaved": not experts.is_concatenated,
        "bias": experts.has_bias,
        "no gate": not experts.has_gate,
        "norm after": experts.has_post_expert_norm,
    }
    return ", ".join(name for name, on in flags.items() if on) or "-"


@contextlib.contextmanager
def counting() -> Iterator[Ran]:
    with pytest.MonkeyPatch.context() as patch:
        yield Ran(patch)


def compare(kernel: ModuleType, family: Family) -> Result:
    """Runs a family with and without the kernel.

    Raises:
        AssertionError: it was another forward that ran, a gradient is missing, something merged.
    """
    reference = wrap(build(family), family)
    model = copy.deepcopy(reference)
    experts = experts_of(reference, family)
    calls: list[nn.Module] = []
    for module in experts.values():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    want = run(reference)
    assert len(calls) >= len(experts) > 0, f"{len(calls)} of {len(experts)} experts modules are on the path"
    first = next(iter(experts.values()))
    tested = "experts module" if family.experts_class in ALONE else model_class(family).__name__

    try:
        report = kernel.kernelize(model)
        left = dict(report.left)
    except ValueError as error:
        report, left = None, {"": str(error).rpartition(": ")[2]}
    with counting() as ran, ran:
        got = run(model)
    if left:
        assert report is None and not ran.ops, "either all of a family's experts are switched or none"
        assert all(torch.equal(got[name], want[name]) for name in want), "a family that is left is unchanged"
        return Result(layout(first), "-", tested, None, f"left: {left['']}")

    assert report is not None and len(report.switched) == len(experts)
    activation = {entry.activation for entry in report.switched}.pop()
    assert all(len(entry.lora) == 2 for entry in report.switched)
    expected = {f"moe_mlp_{way}": len(calls) for way in ("forward", "backward")}
    if activation == "own":
        expected = {f"parallel_linear_{way}": 2 * len(calls) for way in ("forward", "backward")}
        expected["route"] = len(calls)
    assert dict(ran.ops) == expected, f"{dict(ran.ops)} ran, not {expected}"
    assert ran.merges == 0, "PEFT merged a weight"

    assert got.keys() == want.keys()
    assert sum("lora_" in name for name in got) == 4 * len(experts)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    assert errors[worst] <= BOUND, f"{worst}: {errors[worst]:.1e}; all: {errors}"
    return Result(layout(first), activation, tested, errors[worst])
