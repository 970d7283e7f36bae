"""Every experts class of the installed transformers, tiny and random, against itself with the kernel.

``python tests/families.py`` compares them all and writes the table of ``docs/supported-models.md``; `test_families`
does the same a family at a time and holds the file to it.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from conftest import REPO_ID, ROOT
from kernels import get_kernel
from numerics import relative_error
from peft import LoraConfig, get_peft_model
from tiny import Ran
from torch import Tensor, nn

BOUND = 1e-5
DOCUMENT = ROOT / "docs" / "supported-models.md"

# Every size that some config of a family has; each config takes those that are its own.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "unpadded_vocab_size": 64,
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
    "DeepseekV4Experts": {"mlp_layer_types": ["hash_moe", "moe"]},
    "DiffusionGemmaTextExperts": {"global_head_dim": 16},
    "Ernie4_5_VLMoeMoeExperts": {
        "moe_intermediate_size": [24, 20],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "Gemma4TextExperts": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
    },
    "Glm4vMoeTextExperts": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    },
    "Glm5NextTextExperts": {"index_kpool": 2, "qk_rope_head_dim": 0},
    "GraniteMoeHybridExperts": {"mamba_n_heads": 8},
    "HYV4VLExperts": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "Lfm2MoeExperts": {"layer_types": ["conv", "full_attention"]},
    "MiMoV2FlashExperts": {"num_key_value_heads": 1},
    # One layer with full attention: two gated delta nets in a row amplify float32 noise to near the bound.
    "Qwen3_5MoeExperts": {"layer_types": ["linear_attention", "full_attention"]},
    "Qwen4ExpTextExperts": {
        "layer_types": ["linear_attention", "indexed_attention"],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 20},
    "ZayaExperts": {"num_experts_per_tok": 1},
}

# The model to build where it is not the module's *ForCausalLM, nor its *TextModel.
MODELS: dict[str, str] = {
    "OpenAIPrivacyFilterExperts": "OpenAIPrivacyFilterForTokenClassification",
    "Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel",
}


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


def of_another_kind() -> list[str]:
    """The model types whose experts take no experts implementation."""
    folder = Path(transformers.__file__).parent / "models"
    experts = re.compile(rb"(?m)^class \w+Experts\(")
    types = {path.parent.name for path in folder.glob("*/modeling_*.py") if experts.search(path.read_bytes())}
    return sorted(types - {family.model_type for family in families()})


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


def build(family: Family) -> nn.Module:
    """The tiny model, in float32 and train mode, the same at every call."""
    torch.manual_seed(3)
    model = model_class(family)(config_of(family))
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
    gated = all(experts.has_gate for experts in experts_of(model, family).values())
    names = [f"experts.{'gate_up_proj' if gated else 'up_proj'}", "experts.down_proj"]
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
    inputs: dict[str, Tensor] = {"input_ids": ids}
    name = type(model.get_base_model()).__name__
    if name == "Qwen3OmniMoeTalkerModel":  # its embedding of text is a part of the model around it
        inputs = {"inputs_embeds": model.get_input_embeddings()(ids)}
    elif name == "Ernie4_5_VLMoeTextModel":  # text tokens and image tokens have experts of their own
        inputs["moe_mm_token_type_ids"] = ids % 2
    out = model(**inputs, use_cache=False)
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
    tested = f"model ({model_class(family).__name__})"

    try:
        report = kernel.kernelize(model)
        left = dict(report.left)
    except ValueError as error:
        report, left = None, {"": str(error).rpartition(": ")[2]}
    with pytest.MonkeyPatch.context() as patch, Ran(patch) as ran:
        got = run(model)
    if left:
        assert report is None and not ran.ops, "either all of a family's experts are switched or none"
        assert all(torch.equal(got[name], want[name]) for name in want), "a family that is left is unchanged"
        return Result(layout(first), "-", tested, None, f"left: {left['']}")

    assert report is not None and len(report.switched) == len(experts)
    activation = {entry.activation for entry in report.switched}.pop()
    assert all(len(entry.lora) == 2 for entry in report.switched)
    expected = {f"moe_mlp_{way}": len(calls) for way in ("forward", "backward")}
    if activation == "own" or first.has_post_expert_norm:
        expected = {f"parallel_linear_{way}": 2 * len(calls) for way in ("forward", "backward")}
        expected["route"] = len(calls)
        if activation != "own":
            expected |= {"activate": len(calls), "activate_backward": len(calls)}
    assert dict(ran.ops) == expected, f"{dict(ran.ops)} ran, not {expected}"
    assert ran.merges == 0, "PEFT merged a weight"

    assert got.keys() == want.keys()
    factors = [name for name in want if ".experts." in name and "lora_" in name]
    assert len(factors) == 4 * len(experts), "two factors of two projections have a gradient"
    assert all(want[name].any() for name in factors), "and none of them is zero"
    # Outside the experts some gradients are what is left of terms that cancel (a scale before a norm): float32 noise,
    # whichever forward ran. They are judged by a hundredth of the largest gradient where that is more than their own.
    hundredth = max(float(value.norm()) for name, value in want.items() if name.startswith("d ")) / 100
    errors = {}
    for name, value in want.items():
        assert got[name].shape == value.shape
        errors[name] = relative_error(got[name], value)
        if name.startswith("d ") and ".experts." not in name:
            errors[name] *= min(1.0, (float(value.norm()) or 1.0) / hundredth)
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    assert errors[worst] <= BOUND, f"{worst}: {errors[worst]:.1e}; all: {errors}"
    return Result(layout(first), activation, tested, errors[worst])


HEADER = ("model type", "experts class", "layout", "activation", "tested as", "result")


def row(family: Family, result: Result) -> str:
    return "| " + " | ".join((family.model_type, family.experts_class, *result.cells())) + " |"


def document(results: dict[Family, Result]) -> str:
    matching = sum(result.error is not None for result in results.values())
    lines = [
        "# Supported models",
        "",
        f"Every experts class of transformers {transformers.__version__} that takes experts implementations: "
        f"{len(results)} classes, {matching} matching.",
        "Written by `python tests/families.py`, which `tests/test_families.py` holds it to; `make test` compares the",
        "classes of the newest transformers, a few more, in the same way.",
        "",
        "Each is run in a tiny random model of its family (float32, CPU, train mode) with PEFT's LoRA (r = 4) on both",
        "projections of every experts module, once as it is and once after `kernelize(model)`. Everything but the two",
        "wrapped weights trains. *Result* is the largest relative error ||kernelized - stock|| / ||stock|| over the",
        f"output, the loss and every gradient; it must be at most {BOUND:.0e}. Gradients outside the experts that are",
        "smaller than a hundredth of the model's largest are measured against that hundredth. The test also counts",
        "the kernel's ops (every experts module ran fused, forward and backward) and PEFT's merges (none).",
        "",
        'PEFT finds the experts of all of them by `target_parameters=["experts.gate_up_proj", "experts.down_proj"]`,',
        'and where experts have no gate (nemotron_h) by `"experts.up_proj"` in place of the first.',
        "",
        "- *layout*: `-` is `[E, 2 I, H]`, gate and up in halves, no bias.",
        "- *activation*: what `kernelize` reports: the name of the fused one, or `own` where the class's own function",
        "  runs between two fused products.",
        "",
        "Model types whose experts are of another kind, which `kernelize` leaves as they are and names:",
        f"{', '.join(of_another_kind())}.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *(row(family, result) for family, result in results.items()),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    os.environ.setdefault("LOCAL_KERNELS", f"{REPO_ID}={ROOT}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    kernel = get_kernel(REPO_ID, version=1)
    results = {}
    for family in families():
        try:
            results[family] = compare(kernel, family)
        except Exception as error:  # whatever a family raises is what its row says
            reason = (str(error).splitlines() or [""])[0][:200].replace("|", "/")
            results[family] = Result("?", "?", "-", None, f"does not match: {type(error).__name__}: {reason}")
        print(row(family, results[family]))
    DOCUMENT.write_text(document(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
