"""Compiles the kernels that the launchers launch, ahead of time, for GPUs that this machine need not have.

    python tests/aot.py [--family sm_90 ...] [--layer gated ...] [--package DIR] [--report FILE]    after build

No launch is written twice: the public functions run on CPU tensors with the Triton backend put in the CPU's place, a
launch is caught where Triton would bind its arguments, Triton's own binder specialises them as for a GPU (pointers and
sizes divisible by 16, ones and Nones as constants), and the result is compiled for the family's GPU. Nothing runs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "scattermoe_lora_aot"

# Bytes of spilled registers that a block's threads may have. Written and read once by those of a 128 x 128 tile,
# outside its loop, they are 64 KiB through L1, where the operands of its 2048-deep product are 1 MiB: with 13 KiB one
# for sm_80 took 5 % less than with none (Triton 3.6, twice as deep). Such a few come and go with the compiler's
# version; a kernel that has no registers left spills hundreds of bytes a thread to thousands.
SPILL_LIMIT = 32 * 1024
# Loads of a single 16-bit number that a product may have: of 16 rows of 16 ranks a thread of AMD's has one.
NARROW_LIMIT = 4
NARROW_LOAD = r"\bld\.global(?!\S*\.v\d)\S*\.b16\b|(?:global|buffer)_load_(?:ushort|u16|short_d16|d16(?:_hi)?_b16)\b"
# NVIDIA's warp group instructions multiply 64 rows or more; fewer go to the warp's own, on every generation.
WARP_GROUP_ROWS = 64


@dataclass(frozen=True)
class Family:
    """A GPU family: what Triton calls it, the shared memory of one block, and its matrix instructions."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    instruction: str
    wide_instruction: str | None = None

    def expected(self, rows: int) -> str:
        """The instruction that a product of ``rows`` rows becomes."""
        return self.wide_instruction if self.wide_instruction and rows >= WARP_GROUP_ROWS else self.instruction


# Shared memory: CUDA programming guide, "maximum amount of shared memory per thread block"; HIP, LDS of a work group.
FAMILIES = {
    family.name: family
    for family in (
        Family("sm_80", "cuda", 80, 32, 163 * 1024, "mma.sync"),
        Family("sm_86", "cuda", 86, 32, 99 * 1024, "mma.sync"),
        Family("sm_89", "cuda", 89, 32, 99 * 1024, "mma.sync"),
        Family("sm_90", "cuda", 90, 32, 227 * 1024, "mma.sync", "wgmma.mma_async"),
        Family("sm_100", "cuda", 100, 32, 227 * 1024, "mma.sync", "tcgen05.mma"),
        Family("sm_120", "cuda", 120, 32, 99 * 1024, "mma.sync"),
        Family("gfx90a", "hip", "gfx90a", 64, 64 * 1024, "v_mfma"),
        Family("gfx942", "hip", "gfx942", 64, 64 * 1024, "v_mfma"),
        Family("gfx950", "hip", "gfx950", 64, 160 * 1024, "v_mfma"),
        Family("gfx1100", "hip", "gfx1100", 32, 64 * 1024, "v_wmma"),
    )
}
# Of any GPU: grids depend on it, and the width of Hopper's narrow grams' tiles; with so many they are of both widths.
PROCESSORS = 108
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma", "v_wmma")


@dataclass(frozen=True)
class Case:
    """One use of the public functions: a key of `LAYERS`, the rows of an expert (hence of a tile), dtype and rank."""

    layer: str
    rows: int
    dtype: str
    rank: int

    def __str__(self) -> str:
        return f"{self.layer}-{self.rows}-{self.dtype}-r{self.rank}"


@dataclass(frozen=True)
class Compiled:
    """What came of one kernel. ``rows`` are those of its smallest product, 0 without one; registers are a thread's.

    ``waits`` are those for a warp group's products that the assembler added to the program's, ``kept`` the stores that
    do not leave L2 first, ``narrow`` the loads of a single 16-bit number where there is no bias, which is read so.
    """

    kernel: str
    tile: str
    dtype: str
    family: str
    threads: int
    shared: int = 0
    registers: int = 0
    spills: int = 0
    instructions: tuple[str, ...] = ()
    rows: int = 0
    waits: int = 0
    kept: int = 0
    narrow: int = 0
    error: str = ""

    def problems(self) -> list[str]:
        """What a GPU of the family could not launch, or would run slowly; one line each."""
        family = FAMILIES[self.family]
        found = []
        if self.error:
            found.append(f"does not compile: {self.error}")
        if self.shared > family.shared_memory:
            found.append(f"{self.shared} bytes of shared memory, of {family.shared_memory}")
        if self.spills * self.threads > SPILL_LIMIT:
            found.append(f"{self.spills} bytes of spills a thread, more than {SPILL_LIMIT // self.threads}")
        # float32's products are exact (``ieee``), which no matrix instruction of NVIDIA's is.
        if self.dtype != "fp32":
            expected = family.expected(self.rows)
            if self.rows and self.instructions != (expected,):
                used = " and ".join(self.instructions) or "no matrix instruction"
                found.append(f"{used} for a product of {self.rows} rows, not {expected}")
            # Hopper's own kernels are held to it. Of the others one had such waits, a gram of rank 64 with Triton 3.6.
            if self.waits and self.kernel.startswith("hopper"):
                found.append(f"{self.waits} waits between products that should follow one another")
            # Triton makes a descriptor's load these where a GPU has no TMA: a step then took 47 ms for 6.3.
            if self.kernel == "grouped_gemm" and self.narrow > NARROW_LIMIT:
                found.append(f"{self.narrow} loads of single numbers")
            # What a narrow gram stores is small, or read by the next kernel.
            if self.kept and self.kernel.startswith(("hopper_gemm", "hopper_gram")):
                found.append(f"{self.kept} stores that keep weights out of L2")
        return [f"{self.kernel} {self.tile} {self.dtype} on {self.family}: {problem}" for problem in found]


# The layers. Sizes are Qwen3-30B-A3B's, with few experts: a tile is chosen from rows per expert.

# At 128 rows an expert, rows enough for a gram in parts.
NUM_EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 48, 8, 2048, 768


class _Tensors:
    """Uninitialised tensors of one case: what nothing reads costs nothing."""

    def __init__(self, kernel: types.ModuleType, case: Case, hidden: int = HIDDEN):
        import torch

        self.kernel, self.torch, self.rank = kernel, torch, case.rank
        self.dtype = getattr(torch, case.dtype)
        self.num_tokens = NUM_EXPERTS * case.rows // TOP_K
        self.x = self(self.num_tokens, hidden)
        self.ids = torch.zeros(self.num_tokens, TOP_K, dtype=torch.int64)

    def __call__(self, *shape: int, dtype=None, trains: bool = True):
        return self.torch.empty(*shape, dtype=dtype or self.dtype, requires_grad=trains)

    def lora(self, in_features: int, out_features: int, dtype=None):
        A, B = (
            self(NUM_EXPERTS * self.rank, in_features, dtype=dtype),
            self(out_features, self.rank * NUM_EXPERTS, dtype=dtype),
        )
        return self.kernel.ExpertLoRA.from_peft(A, B, NUM_EXPERTS, 2.0)

    def step(self, function, *arguments, **options) -> None:
        """Forward as in inference, then forward and backward; the gradient that comes in is dense."""
        with self.torch.no_grad():
            function(*arguments, **options)
        out = function(*arguments, **options)
        out.backward(self.torch.empty_like(out))


def _order(kernel: types.ModuleType, ids, num_experts: int):
    """A routing in earnest, as indices on the CPU are checked; what the kernels would write is left as it was."""
    kernel.flatten_sort_count(ids, num_experts)
    return kernel.reference.route(ids.reshape(-1), num_experts)


def _gated(
    kernel: types.ModuleType,
    case: Case,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    lora_dropout: float = 0.0,
) -> None:
    """Qwen3, Mixtral, GLM: weights of transformers, frozen; PEFT's float32 adapters; float32 routing weights."""
    t = _Tensors(kernel, case, hidden)
    f32 = t.torch.float32
    t.step(
        kernel.moe_mlp,
        t.x,
        t(NUM_EXPERTS, 2 * intermediate, hidden, trains=False),
        t(NUM_EXPERTS, hidden, intermediate, trains=False),
        t.ids,
        t(t.num_tokens, TOP_K, dtype=f32),
        gate_up_lora=t.lora(hidden, 2 * intermediate, f32),
        down_lora=t.lora(intermediate, hidden, f32),
        lora_dropout=lora_dropout,
    )


def _dropped(kernel: types.ModuleType, case: Case) -> None:
    """The same with dropout: its passes, and products of the rank alone in the backward."""
    _gated(kernel, case, lora_dropout=0.1)


def _transposed(kernel: types.ModuleType, case: Case, is_concatenated: bool = False) -> None:
    """GPT-OSS's layout: transposed, interleaved, biased, with its gate; everything trains, then LoRA alone."""
    t = _Tensors(kernel, case)
    for trains in (True, False):
        t.step(
            kernel.moe_mlp,
            t.x,
            t(NUM_EXPERTS, HIDDEN, 2 * INTERMEDIATE, trains=trains),
            t(NUM_EXPERTS, INTERMEDIATE, HIDDEN, trains=trains),
            t.ids,
            t(t.num_tokens, TOP_K),
            gate_up_lora=t.lora(HIDDEN, 2 * INTERMEDIATE),
            down_lora=t.lora(INTERMEDIATE, HIDDEN),
            gate_up_proj_bias=t(NUM_EXPERTS, 2 * INTERMEDIATE, trains=trains),
            down_proj_bias=t(NUM_EXPERTS, HIDDEN, trains=trains),
            is_transposed=True,
            is_concatenated=is_concatenated,
            activation=kernel.reference.clamped_glu(1.702, 7.0, 1.0),
        )


def _halves(kernel: types.ModuleType, case: Case) -> None:
    """Aria's and the privacy filter's: the same, but gate and up are halves."""
    _transposed(kernel, case, is_concatenated=True)


def _ungated(kernel: types.ModuleType, case: Case) -> None:
    """Nemotron: no gate."""
    t = _Tensors(kernel, case)
    t.step(
        kernel.moe_mlp,
        t.x,
        t(NUM_EXPERTS, INTERMEDIATE, HIDDEN, trains=False),
        t(NUM_EXPERTS, HIDDEN, INTERMEDIATE, trains=False),
        t.ids,
        t(t.num_tokens, TOP_K),
        gate_up_lora=t.lora(HIDDEN, INTERMEDIATE),
        down_lora=t.lora(INTERMEDIATE, HIDDEN),
        has_gate=False,
        activation="relu2",
    )


def _linear(kernel: types.ModuleType, case: Case) -> None:
    """ScatterMoE's pair of linears: gathered to grouped rows, without LoRA; grouped rows to gated tokens, with it; and
    the activation between."""
    t = _Tensors(kernel, case)
    order = _order(kernel, t.ids, NUM_EXPERTS)
    up, down = t(NUM_EXPERTS, HIDDEN, INTERMEDIATE), t(NUM_EXPERTS, INTERMEDIATE, HIDDEN, trains=False)
    lora = {"lora_A": t(NUM_EXPERTS * t.rank, INTERMEDIATE), "lora_B": t(HIDDEN, NUM_EXPERTS * t.rank)}
    gates = t(t.num_tokens, TOP_K)
    t.step(kernel.parallel_linear, t.x, up, TOP_K, *order, grouped_out=True)
    t.step(kernel.activate, t(t.num_tokens * TOP_K, 2 * INTERMEDIATE))
    a = t(t.num_tokens * TOP_K, INTERMEDIATE)
    t.step(kernel.parallel_linear_lora, a, down, 1, *order, **lora, gates=gates, grouped_in=True)


def _odd(kernel: types.ModuleType, case: Case) -> None:
    """What Hopper's own kernels leave to the general ones: rows of no multiple of 16 columns in a wider tensor, none
    at all, and a narrow base's gradient whose right rows are gathered."""
    t = _Tensors(kernel, case)
    x, weights = t(t.num_tokens, 352)[:, :344], t(t.num_tokens, TOP_K)
    up, down = t(NUM_EXPERTS, 2 * INTERMEDIATE, 344), t(NUM_EXPERTS, 344, INTERMEDIATE)
    t.step(kernel.moe_mlp, x, up, down, t.ids, weights)
    up, down = t(NUM_EXPERTS, 2 * INTERMEDIATE, HIDDEN), t(NUM_EXPERTS, HIDDEN, INTERMEDIATE)
    t.step(kernel.moe_mlp, t.x[:0], up, down, t.ids[:0], weights[:0])
    order = _order(kernel, t.ids, NUM_EXPERTS)
    t.step(kernel.parallel_linear, t(t.num_tokens, 512), t(NUM_EXPERTS, 512, 64), TOP_K, *order)


def _uneven(kernel: types.ModuleType, case: Case) -> None:
    """Halves of gate and up between whose columns, contiguous in memory, no multiple of 16 bytes lies."""
    t = _Tensors(kernel, case)
    up, down = t(NUM_EXPERTS, HIDDEN, 2 * 500, trains=False), t(NUM_EXPERTS, 500, HIDDEN, trains=False)
    with t.torch.no_grad():
        kernel.moe_mlp(t.x, up, down, t.ids, t(t.num_tokens, TOP_K), is_transposed=True)


def _crowd(kernel: types.ModuleType, case: Case) -> None:
    """As many experts as models have, which the routing kernels' blocks grow with; small ones, to hold them here."""
    t = _Tensors(kernel, case)
    for num_experts in (8, 128, 256, 512):
        ids = t.torch.zeros(num_experts * case.rows, 1, dtype=t.torch.int64)
        order = _order(kernel, ids, num_experts)
        x, weight = t(ids.shape[0], 64, trains=False), t(num_experts, 64, 64, trains=False)
        kernel.parallel_linear(x, weight, 1, *order)


def _deep(kernel: types.ModuleType, case: Case) -> None:
    """GLM-4.5-Air's sizes, whose products are deep enough that Hopper's tiles are dealt out."""
    _gated(kernel, case, hidden=4096, intermediate=1408)


LAYERS = {
    "gated": _gated,
    "deep": _deep,
    "dropped": _dropped,
    "transposed": _transposed,
    "halves": _halves,
    "ungated": _ungated,
    "linear": _linear,
    "crowd": _crowd,
    "odd": _odd,
    "uneven": _uneven,
}

# Every tile of the layer that matters most, and the largest and least of the others: 2 rows an expert are multiplied
# as 16, and not by Hopper's own kernels.
ALL_CASES = [
    *(Case("gated", rows, dtype, 16) for dtype in ("bfloat16", "float16") for rows in (2, 32, 64, 128)),
    *(Case("gated", rows, "bfloat16", rank) for rank in (32, 64) for rows in (2, 128)),
    *(Case("gated", rows, "bfloat16", rank) for rank in (128, 256) for rows in (2, 256)),  # shrinks in Hopper's tiles
    Case("gated", 128, "bfloat16", 8),  # PEFT's default, which is padded
    Case("transposed", 128, "bfloat16", 16),  # gate and up of a unit next to one another, by Hopper's act_grad
    *(Case(layer, rows, "bfloat16", 64) for layer in ("transposed", "ungated", "linear") for rows in (2, 64, 128)),
    Case("halves", 128, "bfloat16", 16),
    Case("deep", 512, "bfloat16", 16),
    Case("crowd", 8, "bfloat16", 16),
    *(Case("dropped", rows, "bfloat16", 16) for rows in (2, 128)),
    Case("dropped", 128, "bfloat16", 32),
    *(Case("gated", rows, "float32", 16) for rows in (2, 128)),
]


# Recording and compiling; in a worker process of `workers`, whose Triton they change.


def _load(package: Path) -> types.ModuleType:
    """The package in a folder, under a name of ours: a build's folder has no importable one."""
    spec = importlib.util.spec_from_file_location(
        PACKAGE, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _recording(family: Family) -> Iterator[dict]:
    """While it is open, the public functions use the Triton backend, and their launches are collected instead."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: dict[str, tuple] = {}

    @functools.cache
    def binder(function):
        *_, backend, bind = function.create_binder()
        return backend, bind

    def run(self, *args, grid, warmup, **kwargs):
        backend, bind = binder(self)
        kwargs["debug"] = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Triton takes for granted now, and later will not
            bound, specialization, options = bind(*args, **kwargs)
            packed = self._pack_args(backend, kwargs, bound, specialization, options)
        options, signature, constants, attributes = packed
        launches[f"{self.__name__} {signature} {constants} {attributes} {options}"] = (
            self,
            signature,
            constants,
            attributes,
            options,
        )

    kernels = importlib.import_module(f"{PACKAGE}.triton_kernels")
    device = importlib.import_module(f"{PACKAGE}.triton_kernels.device")
    backend = importlib.import_module(f"{PACKAGE}.backend")
    tiles = importlib.import_module(f"{PACKAGE}.tiles")
    asked, answer = device.gpu, tiles.Gpu(family.name, family.shared_memory, PROCESSORS)
    target = GPUTarget(family.backend, family.arch, family.warp_size)
    with contextlib.ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(backend, "of", lambda tensor: kernels))
        for name, module in list(sys.modules.items()):
            if name.startswith(kernels.__name__) and getattr(module, "gpu", None) is asked:
                stack.enter_context(patch(module, "gpu", lambda tensor: answer))
        stack.enter_context(patch(driver, "_active", types.SimpleNamespace(get_current_target=lambda: target)))
        stack.enter_context(patch(JITFunction, "run", run))
        yield launches


_compiled: dict[str, Compiled] = {}


def compile_case(package: Path, family_name: str, case: Case) -> list[Compiled]:
    """Every different kernel that ``case`` launches, compiled for a family; in a worker of `workers`."""
    import triton
    from triton.backends.compiler import GPUTarget

    family = FAMILIES[family_name]
    module = sys.modules.get(PACKAGE) or _load(package)
    with _recording(family) as launches:
        LAYERS[case.layer](module, case)
    target = GPUTarget(family.backend, family.arch, family.warp_size)
    results = []
    for launch, (function, signature, constants, attributes, options) in launches.items():
        key = f"{family_name} {launch}"
        if key not in _compiled:
            source = function.ASTSource(function, signature, constants, attributes)
            constants = {function.arg_names[index]: value for (index, *_), value in constants.items()}
            labels = _labels(function.__name__, signature, constants, options)
            labels |= {"family": family_name, "threads": options.num_warps * family.warp_size}
            try:
                compiled = triton.compile(source, target=target, options=options.__dict__)
            except Exception as error:
                _compiled[key] = Compiled(**labels, error=f"{type(error).__name__}: {_last_line(str(error))}")
            else:
                findings = _findings(compiled, family)
                if str(signature.get("bias_ptr")).startswith("*"):
                    findings["narrow"] = 0
                _compiled[key] = Compiled(**labels, **findings)
        results.append(_compiled[key])
    return results


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _labels(name: str, signature: dict, constants: dict, options) -> dict[str, object]:
    sizes = (v for k, v in constants.items() if k.startswith("BLOCK") or k in ("EXPERTS", "GROUPS"))
    # A cast has a block for each of its stacks.
    blocks = "x".join("+".join(map(str, size)) if isinstance(size, tuple) else str(size) for size in sizes)
    pointers = [kind for kind in signature.values() if str(kind).startswith("*")]
    pointer = next((kind for kind in pointers if kind in ("*bf16", "*fp16")), pointers[0])  # sums are in float32
    part = constants.get("PART") or ("chunked" if constants.get("CHUNKED") else None)
    return {
        "kernel": " ".join(filter(None, (name.strip("_").removesuffix("_kernel"), part))),
        "tile": f"{blocks} w{options.num_warps} s{options.num_stages}",
        "dtype": pointer.lstrip("*"),
    }


def _findings(compiled, family: Family) -> dict[str, object]:
    text = compiled.asm["ptx" if family.backend == "cuda" else "amdgcn"]
    products = compiled.asm.get("ttir") or compiled.asm["ttgir"]  # Gluon starts with the latter
    registers, spills = (_cuda_resources if family.backend == "cuda" else _hip_resources)(compiled.asm)
    return {
        "shared": compiled.metadata.shared,
        "registers": registers,
        "spills": spills,
        "instructions": tuple(i for i in INSTRUCTIONS if re.search(rf"\b{re.escape(i)}", text)),
        "waits": _added_waits(compiled.asm),
        "narrow": len(re.findall(NARROW_LOAD, text)),
        "kept": len(re.findall(r"st\.global(?!\S*L2::cache_hint)", text)),
        "rows": min(map(int, re.findall(r"(?:tt\.|group_)dot .*-> tensor<(\d+)x", products)), default=0),
    }


def _cuda_resources(asm) -> tuple[int, int]:
    """Registers, and the bytes of the stack frame: a Triton kernel has nothing else there but what it spilled."""
    usage = _disassembled(asm["cubin"], "--dump-resource-usage")
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert match is not None, usage
    return int(match[1]), int(match[2])


def _disassembled(cubin: bytes, what: str) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _added_waits(asm) -> int:
    """Where ptxas can't tell an accumulator's registers from others, it waits for each of Hopper's products."""
    asked = asm.get("ptx", "").count("wgmma.wait_group")
    return max(0, _disassembled(asm["cubin"], "--dump-sass").count("WARPGROUP.DEPBAR") - asked) if asked else 0


def _hip_resources(asm) -> tuple[int, int]:
    """Vector registers, and the bytes of scratch memory. Scalar ones spill into lanes of vector ones: no memory."""
    registers, scratch = (
        re.search(rf"\.{name}: *(\d+)", asm["amdgcn"]) for name in ("vgpr_count", "private_segment_fixed_size")
    )
    assert registers is not None and scratch is not None
    return int(registers[1]), int(scratch[1])


def workers(count: int) -> ProcessPoolExecutor:
    """Fresh processes for `compile_case`, not forks: Triton may be an interpreter here, which it decides on import."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_no_interpreter)


def _no_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def write_report(path: Path, compiled: Sequence[Compiled]) -> None:
    """What is largest of each family and kernel, in the document's section of this Triton; others are left."""
    version = importlib.metadata.version("triton")
    lines = [
        f"## Triton {version}",
        "",
        "| GPU | kernel | variants | shared memory, KiB of | registers | spills, bytes | matrix instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for one in compiled:
        if one.dtype != "fp32":
            groups.setdefault((one.family, one.kernel.split()[0]), []).append(one)
    for (name, kernel), group in groups.items():
        limit = FAMILIES[name].shared_memory // 1024
        most = {field: max(getattr(one, field) for one in group) for field in ("shared", "registers", "spills")}
        instructions = " ".join(sorted({f"`{i}`" for one in group for i in one.instructions})) or "none needed"
        failed = sum(bool(one.problems()) for one in group)
        lines.append(
            f"| {name} | {kernel} | {len(group)}{f', **{failed} with problems**' if failed else ''} "
            f"| {most['shared'] / 1024:.0f} of {limit} | {most['registers']} | {most['spills']} | {instructions} |"
        )
    before, *sections = re.split(r"(?m)^(?=## Triton )", path.read_text(encoding="utf-8"))
    kept = {section.split("\n", 1)[0]: section.strip() for section in sections}
    kept[lines[0]] = "\n".join(lines)
    path.write_text("\n\n".join([before.strip(), *(kept[title] for title in sorted(kept))]) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compile every kernel for every GPU family and print what came of it."
    )
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--layer", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--report", type=Path, help="a document whose section of the Triton at hand is made anew")
    parser.add_argument("--package", type=Path, default=ROOT / "build" / "torch-cuda")
    options = parser.parse_args(arguments)
    jobs = [
        (family, case)
        for family in options.family
        for case in ALL_CASES
        if case.layer in options.layer and (case.dtype != "float32" or family == "sm_90")
    ]
    header = "kernel,layer,tile,dtype,family,shared,limit,registers,spills,instruction,".split(",")
    row = "{:<21} {:<10} {:<21} {:<5} {:<7} {:>7} {:>7} {:>9} {:>6} {:<16} {}".format
    print(row(*header).rstrip())
    seen: dict[tuple, Compiled] = {}
    problems = []
    with workers(os.cpu_count() or 1) as pool:
        futures = [pool.submit(compile_case, options.package, *job) for job in jobs]
        for (_, case), future in zip(jobs, futures, strict=True):
            for c in future.result():
                if astuple(c) not in seen:
                    seen[astuple(c)] = c
                    limit = FAMILIES[c.family].shared_memory
                    mark = "<-- see below" if c.problems() else ""
                    numbers = (c.shared, limit, c.registers, c.spills, " ".join(c.instructions) or "-", mark)
                    print(row(c.kernel, case.layer, c.tile, c.dtype, c.family, *numbers).rstrip(), flush=True)
                    problems += c.problems()
    print(f"\n{len(seen)} kernels, {len(problems)} problems", *problems, sep="\n")
    if options.report:
        write_report(options.report, list(seen.values()))
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
