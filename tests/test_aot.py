"""Every kernel compiles for every GPU family, fits its shared memory and registers, and uses its matrix units.

A part of what `aot.py` can print: all families, both half precisions, every row tile and layer, not all combinations.
"""

import re
from pathlib import Path

import aot
import pytest
from aot import Case, Compiled

LARGEST = Case("gated", 128, "bfloat16", 16)
BASE_TRAINS = Case("linear", 128, "bfloat16", 16)
DEEP = Case("deep", 512, "bfloat16", 16)
CASES = [
    *((family, LARGEST) for family in ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")),
    ("sm_80", Case("linear", 32, "float16", 64)),
    ("sm_86", Case("linear", 64, "bfloat16", 16)),
    ("sm_89", Case("linear", 16, "float16", 64)),
    *(("sm_90", Case("gated", rows, "bfloat16", rank)) for rows, rank in ((128, 32), (256, 128))),
    ("sm_90", BASE_TRAINS),
    ("sm_90", DEEP),
    ("sm_90", Case("transposed", 16, "float16", 64)),
    ("sm_90", Case("halves", 4, "float16", 64)),
    ("sm_90", Case("gated", 3, "bfloat16", 64)),
    *(("sm_90", Case("gated", rows, "float32", 16)) for rows in (16, 128)),
    ("sm_90", Case("crowd", 16, "bfloat16", 16)),
    *((family, Case("dropped", 16, "bfloat16", 16)) for family in ("sm_90", "gfx942")),
    ("sm_100", Case("ungated", 64, "float16", 64)),
    ("sm_120", Case("gated", 16, "float16", 64)),
    ("gfx942", Case("linear", 32, "float16", 64)),
    ("gfx90a", Case("linear", 64, "bfloat16", 16)),
    ("gfx950", Case("linear", 128, "bfloat16", 16)),
    ("gfx1100", Case("linear", 64, "float16", 16)),
    ("gfx1100", Case("gated", 128, "bfloat16", 64)),
]


@pytest.fixture(scope="session")
def package(kernel):
    return Path(kernel.__file__).parent


@pytest.fixture(scope="session")
def compile_case(package):
    with aot.workers(1) as pool:
        yield lambda *job: pool.submit(aot.compile_case, package, *job).result()


@pytest.mark.parametrize(("family", "case"), CASES, ids=str)
def test_kernels_fit_the_gpu(compile_case, family, case):
    compiled = compile_case(family, case)
    problems = [problem for one in compiled for problem in one.problems()]
    assert not problems, "\n".join(["", *problems])
    products = [c for c in compiled if c.kernel.startswith(("grouped_gemm", "hopper_gemm"))]
    # From 4 rows an expert on a tile of Hopper's own kernel has 128, and one of the others is at least of 16.
    by_hopper = family == "sm_90" and case.rows >= 4 and case.dtype != "float32" and case.layer != "crowd"
    rows = 128 if by_hopper else max(16, case.rows)
    assert {c.tile.partition("x")[0] for c in products} == {str(rows)}
    assert any(c.kernel == "hopper_gemm" for c in products) == by_hopper
    if by_hopper:
        # The activation is part of its product, but between two linears, and cleared rows are.
        kernels = {c.kernel for c in compiled}
        assert "grouped_gemm" not in kernels and ("act" in kernels) == (case.layer == "linear")
    if by_hopper and case.layer == "gated":  # nor are there general kernels for rank 128
        assert bool({"shrink", "gram all"} & kernels) == (case.rank <= 64)
    if by_hopper and case.layer in ("gated", "dropped") and case.rank <= 32:  # nor passes around this one
        assert "act_grad" not in kernels and any(kernel.startswith("hopper_act_grad") for kernel in kernels)


def test_no_kernel_is_left_out(compile_case, package):
    """Few slots and many, dropout, a base that trains, deep products, on Hopper: together they launch every kernel."""
    defined = set()
    for file in (package / "triton_kernels").glob("*.py"):
        defined |= set(re.findall(r"^@(?:triton|gluon)\.jit\b.*\ndef _(\w+)_kernel\(", file.read_text(), re.MULTILINE))
    assert defined
    cases = LARGEST, BASE_TRAINS, DEEP, *(Case(*case, "bfloat16", 16) for case in (("dropped", 128), ("gated", 2)))
    assert {c.kernel.split()[0] for case in cases for c in compile_case("sm_90", case)} == defined


@pytest.mark.parametrize(
    ("family", "grams"),
    [("sm_80", {"gram rest", "gram first"}), ("sm_90", {"hopper_narrow chunked", "hopper_act_grad chunked"})],
)
def test_a_gram_in_parts_is_compiled(compile_case, family, grams):
    """It takes more rows than other kernels ask for, which the sizes of the cases must go on having."""
    assert grams <= {c.kernel for c in compile_case(family, LARGEST)}


def test_odd_sizes_compile(compile_case):
    """Where Hopper's own kernels can't be used the general ones are; they spill here, storing single elements."""
    compiled = compile_case("sm_90", Case("odd", 128, "bfloat16", 16))
    kernels = {c.kernel.split()[0] for c in compiled}
    assert {"grouped_gemm", "hopper_gemm", "gram"} <= kernels and "hopper_narrow" not in kernels
    assert not [c.error for c in compiled if c.error]


def test_halves_that_tma_cannot_begin_at(compile_case):
    """Hopper's product would stop the GPU at up's first column: it makes both in tiles of all columns, and a pass
    their activation."""
    compiled = compile_case("sm_90", Case("uneven", 128, "bfloat16", 16))
    assert {"hopper_gemm", "act"} <= {c.kernel for c in compiled}
    assert not [c.error for c in compiled if c.error]


def test_a_factors_gradient_with_gates_is_hoppers_narrow_gram(compile_case):
    """What a linear saves is times the gates: as weights of the gram's rows they would ask for the general kernel."""
    assert any(c.kernel.startswith("hopper_narrow") for c in compile_case("sm_90", BASE_TRAINS))


def test_problems_are_found():
    """The limits themselves; a kernel at each of them is fine."""
    sound = Compiled("k", "t", "bf16", "sm_90", 256, 227 * 1024, 255, 128, ("wgmma.mma_async",), 64)
    few_rows = {"instructions": ("mma.sync",), "rows": 16}

    def problems(**changes):
        return Compiled(**{**vars(sound), **changes}).problems()

    assert not problems()
    assert not problems(**few_rows)
    assert not problems(instructions=(), rows=0)
    assert not problems(instructions=(), dtype="fp32")
    assert "spills" in problems(instructions=(), spills=4096, dtype="fp32")[0]
    assert "shared memory" in problems(shared=227 * 1024 + 1)[0]
    assert "shared memory" in problems(family="sm_89", **few_rows)[0]
    assert "spills" in problems(spills=132)[0] and not problems(spills=132, threads=128)
    assert "loads of single numbers" in problems(kernel="grouped_gemm", narrow=5)[0]
    assert not problems(narrow=5) and not problems(kernel="grouped_gemm", narrow=4)
    assert "waits between products" in problems(kernel="hopper_gemm", waits=1)[0]
    assert not problems(waits=1)
    assert "out of L2" in problems(kernel="hopper_gemm", kept=1)[0]
    assert "out of L2" in problems(kernel="hopper_gram", kept=1)[0]
    assert not problems(kept=1) and not problems(kernel="hopper_narrow chunked", kept=1)
    assert "does not compile" in problems(error="PassManager::run failed", instructions=(), rows=0)[0]
    for instructions in ((), ("mma.sync",), ("mma.sync", "wgmma.mma_async")):
        assert "for a product of 64 rows" in problems(instructions=instructions)[0]
