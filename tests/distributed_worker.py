"""What each process of `test_distributed` runs: a tiny PEFT model through an engine, and the same in one process.

``torchrun --nproc-per-node 2 tests/distributed_worker.py OUT SCENARIO...`` writes ``{scenario: {what: value}}`` to
OUT: relative errors of the losses and of every gradient of two steps, and what else a scenario says of itself.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import peft.tuners.lora.layer as peft_layer
import torch
import torch.distributed as dist
from conftest import inner
from kernels import get_kernel
from numerics import relative_error
from tiny import tiny_model, tokens, wrap
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

FAMILY = "qwen3_moe"
LAYERS = 2
STEPS = 2
IDS = tokens(4, 13)

# transformers 5.23 masks ids of others' experts behind the router, not at it, and has tensor parallelism beside it.
MASKS_BY_PLAN = not hasattr(DistributedConfig, "ep_implementation")
SAME_TOKENS: dict[str, Any] = {"tp_size": 2, "tp_plan": {}} if MASKS_BY_PLAN else {"tp_size": 2}

Steps = list[tuple[Tensor, dict[str, Tensor]]]


def tiny() -> nn.Module:
    """As many key and value heads as ranks that tensor parallelism shares them out to."""
    return tiny_model(FAMILY, num_key_value_heads=2)


def adapted(kernel: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The kernelized tiny model with adapters in float32 on a frozen base of ``dtype``."""
    model = wrap(tiny().to(dtype), FAMILY)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    kernel.kernelize(model)
    return model


def full(tensor: Tensor) -> Tensor:
    """A copy of all of a sharded tensor."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def train(model: nn.Module, batches: list[Tensor], backward: Callable[[Tensor], None] | None = None) -> Steps:
    """Loss and gradients of each step, the mean over ``batches``, which this process accumulates."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    steps = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        total = torch.zeros(())
        for ids in batches:
            loss = model(input_ids=ids, labels=ids).loss / len(batches)
            (backward or torch.Tensor.backward)(loss)
            total += loss.detach()
        steps.append((total, {n: full(p.grad) for n, p in model.named_parameters() if p.grad is not None}))
        optimizer.step()
    return steps


def halves() -> list[Tensor]:
    return list(IDS.chunk(dist.get_world_size()))


def my_half() -> list[Tensor]:
    return halves()[dist.get_rank() :][:1]


def errors(got: Steps, want: Steps, mean_loss: bool = True) -> dict[str, float]:
    """The relative error of each loss, averaged over the processes if they differ, and of each gradient."""
    found = {}
    for number, ((loss, grads), (want_loss, want_grads)) in enumerate(zip(got, want, strict=True)):
        if mean_loss:
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        names = {name.removeprefix("module."): grad for name, grad in grads.items()}
        assert names.keys() == want_grads.keys(), names.keys() ^ want_grads.keys()
        found[f"loss {number}"] = relative_error(loss, want_loss)
        for name, grad in names.items():
            found[f"d {name} {number}"] = relative_error(grad, want_grads[name])
    return found


def ddp(kernel: Any) -> Iterator[dict[str, Any]]:
    want = train(adapted(kernel), halves())
    yield errors(train(DistributedDataParallel(adapted(kernel)), my_half()), want)


def accelerate(kernel: Any) -> Iterator[dict[str, Any]]:
    """Trainer's way to DDP."""
    from accelerate import Accelerator

    want = train(adapted(kernel), halves())
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(adapted(kernel))
    yield {"is DDP": isinstance(model, DistributedDataParallel)}
    yield errors(train(model, my_half(), accelerator.backward), want)


def fsdp(
    kernel: Any, dtype: torch.dtype, units: Callable[[nn.Module], list[nn.Module]], checkpointing: bool = False
) -> Iterator[dict[str, Any]]:
    """FSDP2 of each decoder layer and of ``units`` in it; whole weights must be gone after forward and backward."""
    want = train(adapted(kernel, dtype), halves())
    model = adapted(kernel, dtype)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    stacks = {tuple(p.shape) for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))}
    for layer in model.base_model.model.model.layers:
        for unit in [*units(layer), layer]:
            fully_shard(unit, reshard_after_forward=True)
    fully_shard(model)
    yield errors(train(model, my_half()), want)

    saved: dict[int, tuple[torch.UntypedStorage, tuple[int, ...]]] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage(), tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=my_half()[0], labels=my_half()[0]).loss
    weights = [storage for storage, shape in saved.values() if shape in stacks]
    yield {"weights saved": len(weights), "bytes after forward": sum(storage.nbytes() for storage in weights)}
    loss.backward()
    yield {"bytes after backward": sum(storage.nbytes() for storage in weights)}


def split_model(model: nn.Module, **options: Any) -> Any:
    """The same model, loaded as a `DistributedConfig` says."""
    folder = Path(sys.argv[1]).parent / "model"
    model.save_pretrained(folder)  # type: ignore[operator]  # by the first process
    dist.barrier()
    split = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**options)).train()
    dist.barrier()  # the next one is saved in the same folder
    return split


def expert_parallel_model(**options: Any) -> Any:
    """The tiny model with half of each layer's experts here."""
    return split_model(tiny(), ep_size=2, **options)


def with_lora(model: Any) -> nn.Module:
    """PEFT around its experts: PEFT 0.21.2 takes none that a tensor parallel plan names, split by it or not."""
    model.tp_plan = {name: style for name, style in model.tp_plan.items() if ".experts" not in name}
    return wrap(model, FAMILY)


def tensor_parallel(kernel: Any) -> Iterator[dict[str, Any]]:
    """transformers' tensor parallelism: every rank has half of the units of every expert, and all tokens.

    Without LoRA: PEFT 0.21.2 puts none on experts split so.
    """
    want = train(tiny(), [IDS])
    model = split_model(tiny(), tp_size=2)
    yield {"units of a rank": model.model.layers[0].mlp.experts.down_proj.to_local().shape[-1]}
    kernel.kernelize(model)
    yield errors(train(model, [IDS]), want, mean_loss=False)
    try:
        wrap(split_model(tiny(), tp_size=2), FAMILY)
    except AttributeError as error:
        yield {"PEFT refuses": str(error)}


def masks(kernel: Any, lora: bool) -> Iterator[dict[str, Any]]:
    """transformers' expert parallelism by masks: every rank has every token, ids of others' experts are sentinels."""
    want = train(adapted(kernel) if lora else tiny(), [IDS])
    plan = {"model.layers.*.mlp.gate": "ep_router", "model.layers.*.mlp.experts": "moe_tp_experts"}
    way: dict[str, Any] = {"ep_plan": plan} if MASKS_BY_PLAN else {"ep_implementation": "all_reduce"}
    model = expert_parallel_model(**SAME_TOKENS, **way)
    yield {"experts of a rank": model.model.layers[0].mlp.experts.num_experts}
    if lora:
        model = with_lora(model)
    kernel.kernelize(model)
    integration = inner(kernel, "integrations.experts")
    moe_mlp = integration.moe_mlp
    absent: list[bool] = []

    def seen(x: Tensor, up: Tensor, down: Tensor, top_k_index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        absent.append(bool((top_k_index == len(up)).any()))
        return moe_mlp(x, up, down, top_k_index, *args, **kwargs)

    with mock.patch.object(integration, "moe_mlp", seen):
        yield errors(train(model, [IDS]), want, mean_loss=False)
    yield {"sentinels seen": len(absent) == STEPS * LAYERS and all(absent)}


def dispatch(kernel: Any) -> Iterator[dict[str, Any]]:
    """The same by sending tokens to their experts' ranks, beside FSDP2 of the rest; against itself without the kernel.

    Not against one process: transformers halves the experts' gradients here, with or without us.
    """
    want = train(expert_parallel_model(fsdp_size=2, tp_size=1), my_half())
    for loss, _ in want:
        dist.all_reduce(loss)
    want = [(loss / dist.get_world_size(), grads) for loss, grads in want]
    model = expert_parallel_model(fsdp_size=2, tp_size=1)
    kernel.kernelize(model)
    yield errors(train(model, my_half()), want)
    yield {"loss of one process": relative_error(want[0][0], train(tiny(), halves())[0][0])}
    model = with_lora(expert_parallel_model(fsdp_size=2, tp_size=1))
    kernel.kernelize(model)
    try:
        model(input_ids=my_half()[0])
    except NotImplementedError as error:
        yield {"refused": str(error)}


def dispatch_lora(kernel: Any) -> Iterator[dict[str, Any]]:
    """Tokens sent among ranks that have the same ones: each sends a part of them, and all get every gradient."""
    want = train(adapted(kernel), [IDS])
    model = with_lora(expert_parallel_model(**SAME_TOKENS))
    kernel.kernelize(model)
    yield errors(train(model, [IDS]), want, mean_loss=False)


def fsdp_loaded(kernel: Any) -> Iterator[dict[str, Any]]:
    """transformers' own FSDP2: layers are sharded as they are loaded, and no FSDP knows the adapters that come later.

    Every rank has all of them, and Trainer averages their gradients in such hooks.
    """

    def average(parameter: Tensor) -> None:
        dist.all_reduce(parameter.grad)
        assert parameter.grad is not None
        parameter.grad /= dist.get_world_size()

    want = train(adapted(kernel), halves())
    model = wrap(split_model(tiny(), fsdp_size=2), FAMILY)
    kernel.kernelize(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(average)
    yield errors(train(model, my_half()), want)


def zero3(kernel: Any) -> Iterator[dict[str, Any]]:
    """DeepSpeed ZeRO-3. It finds gradients by hooks on inputs that need them, so the embeddings' output must."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    want = train(adapted(kernel), halves())[:1]
    model = adapted(kernel)
    model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    stage = {"stage": 3, "stage3_param_persistence_threshold": 0}  # else parameters this small are not sharded
    options = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.5), config=options)
    stacks = [p for n, p in model.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))]
    yield {"elements here between steps": sum(p.numel() for p in stacks)}
    loss = engine(input_ids=my_half()[0], labels=my_half()[0]).loss
    engine.backward(loss)
    grads = {n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad}
    yield errors([(loss.detach(), grads)], want)


def of_experts(layer: Any) -> list[nn.Module]:
    return [layer.mlp.experts.get_base_layer()]


def of_wrapper(layer: Any) -> list[nn.Module]:
    return [layer.mlp.experts]


SCENARIOS: dict[str, Callable[[Any], Iterator[dict[str, Any]]]] = {
    "ddp": ddp,
    "accelerate": accelerate,
    "fsdp layers": lambda kernel: fsdp(kernel, torch.float32, lambda layer: []),
    "fsdp layers bf16": lambda kernel: fsdp(kernel, torch.bfloat16, lambda layer: []),
    "fsdp layers checkpointed": lambda kernel: fsdp(kernel, torch.float32, lambda layer: [], checkpointing=True),
    "fsdp wrapper": lambda kernel: fsdp(kernel, torch.float32, of_wrapper),
    "fsdp experts": lambda kernel: fsdp(kernel, torch.float32, of_experts),
    "fsdp loaded": fsdp_loaded,
    "tp": tensor_parallel,
    "ep masks": lambda kernel: masks(kernel, lora=False),
    "ep masks lora": lambda kernel: masks(kernel, lora=True),
    "ep dispatch": dispatch,
    "ep dispatch lora": dispatch_lora,
    "zero3": zero3,
}


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    kernel = get_kernel("org/scattermoe-lora", version=1)
    ran: collections.Counter[str] = collections.Counter()
    grouped_gemm, merge = kernel.reference.grouped_gemm, peft_layer._LoraFactorsProxy.forward

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        ran["products"] += 1
        return grouped_gemm(*args, **kwargs)

    def counted_merge(*args: Any) -> Tensor:
        ran["merges"] += 1
        return merge(*args)

    kernel.reference.grouped_gemm = counted
    peft_layer._LoraFactorsProxy.forward = counted_merge
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        ran.clear()
        results[name] = {}
        for found in SCENARIOS[name](kernel):
            results[name] |= found
        results[name] |= {"fused products": ran["products"], "merges": ran["merges"]}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
