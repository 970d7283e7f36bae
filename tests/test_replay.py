"""Replays without a GPU: the interpreter's kernels are launched again by the addresses that a replay gives them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import threading
import types

import pytest
import torch
from conftest import inner
from numerics import BASE, Case, assert_close
from torch.multiprocessing.reductions import StorageWeakRef

pytestmark = pytest.mark.interpreter

SIZES = {"T": 21, "H": 48, "I": 40, "E": 4, "k": 2, "r": 4, "dtype": torch.float32}
CASES = {
    "frozen base": {"frozen": BASE},
    "adapters of another dtype": {"frozen": BASE, "dtype": torch.float16, "adapter_dtype": torch.float32},
    "everything trains": {"is_transposed": True, "is_concatenated": False, "has_bias": True},
    "no gate": {"has_gate": False, "activation": "relu2", "frozen": ("gate_up_proj",)},
    "no LoRA": {"r": 0},
    "pieces": {"H": 512, "I": 16, "r": 16, "has_bias": True},
}


def tensor_at(pointer: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in memory that somebody else holds, by its first element: kernels ask for no more of it."""
    return torch.frombuffer((ctypes.c_byte * dtype.itemsize).from_address(pointer), dtype=dtype)


@pytest.fixture
def replay(kernel, monkeypatch):
    """The module, with launches that the interpreter can repeat and CPU tensors that may be replayed."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    launch, compiling, replay = (inner(kernel, f"triton_kernels.{name}") for name in ("launch", "compiling", "replay"))
    start = InterpretedFunction.__getitem__

    class Binary:
        """What Triton's compiler would have returned: launched by addresses."""

        packed_metadata = src = metadata = None
        function = 0

        def __init__(self, function, arguments, options):
            self.function_, self.options = function, options
            self.operands = []
            for argument in arguments:
                if isinstance(argument, TensorDescriptor):
                    self.operands.append(("descriptor", argument.base.dtype))
                elif isinstance(argument, torch.Tensor):
                    self.operands.append(("tensor", argument.dtype))
                elif argument is None:
                    self.operands.append(None)

        def run(self, x, y, z, stream, function, metadata, enter, leave, after, *arguments):
            operands = []
            for known, argument in zip(self.operands, arguments, strict=False):
                if known is None:
                    assert argument is None
                    operands.append(None)
                elif known[0] == "tensor":
                    operands.append(tensor_at(argument, known[1]))
                else:
                    tensor = tensor_at(argument.base.data_ptr(), known[1])
                    operands.append(TensorDescriptor(tensor, argument.shape, argument.strides, argument.block_shape))
            rest = arguments[len(operands) :]
            options = {name: self.options[name] for name in ("num_warps", "num_stages")}
            start(self.function_, (x, y, z))(*operands, *rest, **options)

    def warmup(self, *arguments, grid, **options):
        return Binary(self, arguments, options)

    active = types.SimpleNamespace(
        get_current_stream=lambda index: 0, get_current_device=lambda: None, launcher_cls=lambda src, metadata: None
    )
    for module in (launch, compiling, replay):
        monkeypatch.setattr(module, "driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr(InterpretedFunction, "warmup", warmup)
    kernels = {}
    for module in (launch, compiling):
        monkeypatch.setattr(module, "compiled_kernels", kernels)
    monkeypatch.setattr(replay, "_programs", {})
    monkeypatch.setattr(replay, "can_replay", lambda tensor: True)
    monkeypatch.setattr(inner(kernel, "ops"), "COMBINE_BYTES", 2**16)
    return replay


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_memory_is_shared_by_what_is_not_used_together(kernel, replay, options, monkeypatch):
    """All that a replay allocates for itself is one allocation, and no other way of placing it gives other bits."""
    results = []
    for limit, shared in ((0, 0), (2**20, 1)):
        monkeypatch.setattr(replay, "SHARED_BYTES", limit)
        replay._programs.clear()
        case = Case(**(SIZES | options))
        for _ in range(2):  # the second is the replay
            got = case.run(kernel, kernel.moe_mlp, torch.device("cpu"), reference=False)
        results.append(got)
        assert len(replay._programs) == 2
        for program in replay._programs.values():
            bytes_ = [
                step for step in program.steps if step[0] == "allocate" and step[2].keywords["dtype"] == torch.uint8
            ]
            assert len(bytes_) == shared
            own = {step[1] for step in program.steps if step[0] == "allocate"} - set(program.outputs)
            used = {entry for step in program.steps if step[0] == "call" for entry in step[1]}
            if shared:
                assert len(own - used) == 1
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("few", [True, False], ids=["few slots", "many slots"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_other_data_at_other_addresses(kernel, replay, options, few, monkeypatch):
    """The second step of a shape runs what the first recorded, and gives the definition's numbers for its own data.

    With few slots one kernel sorts; with many a scan of torch's is replayed beside our kernels.
    """
    if not few:
        monkeypatch.setattr(inner(kernel, "triton_kernels.route"), "FEW", 0)
    ran = []
    run = replay._Program.run
    monkeypatch.setattr(replay._Program, "run", lambda self, *arguments: ran.append(self) or run(self, *arguments))
    kept = []
    for seed in (1, 2, 3):
        case = Case(**(SIZES | options), seed=seed)
        kept.append(case.check(kernel, torch.device("cpu")))
        assert len(replay._programs) == 2  # a forward's and a backward's
        assert len(ran) == 2 * (seed - 1)
    assert not torch.equal(kept[1]["output"], kept[2]["output"])


@pytest.mark.parametrize("sizes", [SIZES, SIZES | CASES["pieces"]], ids=["whole", "pieces"])
def test_the_seed_is_no_constant(kernel, replay, sizes):
    """Dropout is replayed with the seed of its own step, in pieces of columns too."""
    case = Case(**sizes)
    for seed in (1, 2, 2**40):
        options = {"lora_dropout": 0.3, "dropout_seed": torch.tensor([seed])}
        got = case.run(kernel, functools.partial(kernel.moe_mlp, **options), torch.device("cpu"), reference=False)
        want = case.run(kernel, functools.partial(kernel.reference.moe_mlp, **options), case.home, reference=True)
        assert_close({name: (got[name], want[name]) for name in want}, 1e-6)
        assert len(replay._programs) == 2


@pytest.mark.parametrize(
    "options, inference, training",
    [({}, 0, 0), (CASES["pieces"], 3, 3), ({"H": 512, "I": 128, "has_bias": True}, 3, 0)],
    ids=["few columns", "H = 64 I", "H = 4 I"],
)
def test_without_gradients(kernel, replay, options, inference, training):
    """Inference is a program of its own, which keeps nothing for a backward, and of wide outputs is made in pieces.

    A training forward is where that makes its peak less: views of weight, B and bias.
    """
    case = Case(**(SIZES | {"r": 16} | options))
    with torch.no_grad():
        arguments = case.layer(kernel, torch.device("cpu"))[0]
        outputs = [kernel.moe_mlp(**arguments) for _ in range(2)]
    (program,) = replay._programs.values()
    assert len(program.outputs) == 1 and len(program.views_of_inputs) == inference
    want = case.run(kernel, kernel.reference.moe_mlp, case.home, reference=True)["output"]
    for output in outputs:
        assert_close({"output": (output, want)}, 1e-6)
    case.check(kernel, torch.device("cpu"))
    (program,) = [program for program in replay._programs.values() if len(program.outputs) == 7]
    assert len(program.views_of_inputs) == training


@pytest.mark.parametrize("is_expanded", [False, True], ids=["dense", "one row of B for all"])
def test_a_linear_is_replayed_and_its_backward_has_the_schedule(kernel, replay, is_expanded, monkeypatch):
    """Routing, forward and backward are a program each, and only the forward works out who computes which rows."""
    E, k, r, K, N = 3, 2, 16, 24, 32
    launched = inner(kernel, "triton_kernels")
    schedule, scheduled = launched.schedule, []
    monkeypatch.setattr(launched, "schedule", lambda *given: scheduled.append(given) or schedule(*given))
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        shapes = (11, K), (E, K, N), (E * r, K), (1 if is_expanded else N, E * r)
        x, weight, lora_A, lora_B = map(torch.randn, shapes)
        leaves = [tensor.requires_grad_() for tensor in (x, weight, lora_A, lora_B.expand(N, E * r))]
        lora_B = leaves[3]
        index = torch.rand(11, E).topk(k).indices
        order = kernel.flatten_sort_count(index, E)
        out = kernel.parallel_linear_lora(x, weight, k, *order, lora_A=lora_A, lora_B=lora_B, scaling=2.0)
        before = len(scheduled)
        got = (out, *torch.autograd.grad(out.square().sum(), leaves))
        assert len(scheduled) == before > 0
        lora = kernel.ExpertLoRA.from_expert_major(lora_A, lora_B, E, 2.0)
        merged = weight + 2.0 * (lora.B @ lora.A).mT
        out = torch.einsum("sk,skn->sn", x.repeat_interleave(k, 0), merged[index.reshape(-1)])
        want = (out, *torch.autograd.grad(out.square().sum(), leaves))
        for one, other in zip(got, want, strict=True):
            assert (one - other).norm() < 1e-5 * other.norm()
    assert len(replay._programs) == 3


LAYOUTS = {
    "dense": lambda lora_B: lora_B,
    "columns of a wider one": lambda lora_B: torch.cat([lora_B, torch.ones_like(lora_B)], dim=1)[:, : lora_B.shape[1]],
    "transposed": lambda lora_B: lora_B.T.contiguous().T,
    "one row for all": lambda lora_B: lora_B[:1].expand_as(lora_B),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", list(CASES.values())[:3], ids=list(CASES)[:3])
def test_factors_of_peft(kernel, replay, options, layout):
    """PEFT's matrices are viewed by expert where a program is recorded: the bits of the same factors by expert."""
    for seed in (1, 2):
        case = Case(**(SIZES | options), seed=seed)
        results = []
        for of_peft in (False, True):
            arguments, leaves = case.layer(kernel, torch.device("cpu"))
            for projection in ("gate_up", "down"):
                lora = arguments[f"{projection}_lora"]
                lora_A, lora_B = (factor.detach().clone() for factor in lora.to_peft())
                new = kernel.ExpertLoRA.from_peft(lora_A, LAYOUTS[layout](lora_B), case.E, lora.scaling)
                if not of_peft:
                    new = kernel.ExpertLoRA(new.A.clone(), new.B.contiguous(), lora.scaling)
                leaves[f"{projection}_A"], leaves[f"{projection}_B"] = (f.requires_grad_() for f in new.factors)
                arguments[f"{projection}_lora"] = new
            out = kernel.moe_mlp(**arguments)
            out.backward(case.grad)
            grads = {name: leaf.grad for name, leaf in leaves.items()}
            for projection in ("gate_up", "down") if of_peft else ():
                A, B = (grads[f"{projection}_{name}"] for name in "AB")
                assert A.shape == leaves[f"{projection}_A"].shape and B.shape == leaves[f"{projection}_B"].shape
                by_expert = kernel.ExpertLoRA.from_peft(A, B, case.E, 1.0)
                grads[f"{projection}_A"], grads[f"{projection}_B"] = by_expert.A, by_expert.B
            results.append({"output": out.detach(), **grads})
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert len(replay._programs) == 4  # each a forward's and a backward's, which the second seed replayed
    # Where nothing is cast: by expert, of the base's dtype and a rank that needs no padding.
    Case(**(SIZES | options | {"r": 16, "adapter_dtype": None})).check(kernel, torch.device("cpu"))
    launches = [sum(step[0] == "launch" for step in program.steps) for program in replay._programs.values()]
    forward, backward = launches[4:]
    # All factors are cast by one launch, as their rank is padded; and where experts lie side by side both gradients.
    assert launches[:2] == [forward + 1, backward + 1]
    assert launches[2:4] == [forward + 1, backward + 1 + (layout != "transposed")]


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_first_forward_compiles_for_its_backward(kernel, replay, options, monkeypatch):
    """All kernels of a first step are compiled side by side; a forward without gradients compiles its own alone."""
    compiled, compile_missing = [], replay.compile_missing
    monkeypatch.setattr(replay, "compile_missing", lambda given: compiled.append(len(given)) or compile_missing(given))
    case = Case(**(SIZES | options))
    with torch.no_grad():
        kernel.moe_mlp(**case.layer(kernel, torch.device("cpu"))[0])
    forward = compiled.copy()
    for _ in range(2):
        case.check(kernel, torch.device("cpu"))
        assert len(forward) == 1 and len(compiled) == 2
    assert sum(compiled) == len(inner(kernel, "triton_kernels.launch").compiled_kernels)


@pytest.mark.parametrize("options", [CASES["frozen base"], CASES["no gate"]], ids=["frozen base", "no gate"])
def test_whichever_kernel_is_missing(kernel, replay, options):
    """A backward writes over what it reads, so nothing of it is launched before it can be launched to its end."""
    case = Case(**(SIZES | options))
    case.check(kernel, torch.device("cpu"))
    compiled = inner(kernel, "triton_kernels.launch").compiled_kernels
    assert len(compiled) > 10
    for key in list(compiled):
        del compiled[key]
        replay._programs.clear()
        case.check(kernel, torch.device("cpu"))


def test_what_writes_over_its_inputs_does_so_on_any_device(kernel, replay, monkeypatch):
    """A body that can't begin twice is told apart where another device is current, too."""
    recorded: list[bool] = []
    record, current = replay._record, [7]

    @contextlib.contextmanager
    def on(device):
        current[0] = device.index
        yield

    def watch(body, tensors, options, missing=None, looks=False):
        recorded.append(looks)
        return record(body, tensors, options, missing, looks)

    active = types.SimpleNamespace(get_current_device=lambda: current[0], get_current_stream=lambda index: 0)
    monkeypatch.setattr(replay, "driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(replay, "use_context", lambda: None)
    monkeypatch.setattr(replay, "_record", watch)
    on_gpu = types.SimpleNamespace(
        device=torch.device("cuda", 1), is_cuda=True, data_ptr=lambda: 16, shape=(3,), stride=lambda: (1,),
        dtype=torch.float32, numel=lambda: 3,
    )  # fmt: skip
    replay.replay(lambda run, _: [None], (on_gpu,), (), overwrites=True)
    assert recorded == [True, False]


def test_a_forward_may_fit_where_its_backward_does_not(kernel, replay, monkeypatch):
    """Compiling for the backward takes the backward's memory: without it, the forward is computed all the same."""
    launched = inner(kernel, "triton_kernels")
    act_grad, failed = launched.act_grad, []

    def fail_once(*arguments, **options):
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        return act_grad(*arguments, **options)

    monkeypatch.setattr(launched, "act_grad", fail_once)
    for _ in range(2):
        Case(**SIZES).check(kernel, torch.device("cpu"))
    assert failed and len(replay._programs) == 2


def test_one_tensor_given_twice(kernel, replay):
    """Arguments that share memory are a case of their own: a recording of one is not replayed for two."""
    T, H, E, k = 9, 16, 3, 2
    torch.manual_seed(0)
    index, weights = torch.rand(T, E).topk(k).indices, torch.rand(T, k)
    square, other = torch.randn(E, H, H), torch.randn(E, H, H)
    x = torch.randn(T, H)
    for up, down in ((square, square), (square, other), (other, other), (other, square)):
        for _ in range(2):
            options = {"has_gate": False, "activation": "relu2"}
            out = kernel.moe_mlp(x, up, down, index, weights, **options)
            want = kernel.reference.moe_mlp(x.double(), up.double(), down.double(), index, weights.double(), **options)
            assert (out - want).norm() < 1e-5 * want.norm()
    assert len(replay._programs) == 2


def test_an_error_leaves_no_recording(kernel, replay, monkeypatch):
    """The next call is recorded as if nothing had been."""
    launched = inner(kernel, "triton_kernels")

    def fail(*arguments, **options):
        raise RuntimeError("out of memory")

    case = Case(**SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(launched, "grouped_gemm_act", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            case.run(kernel, kernel.moe_mlp, torch.device("cpu"), reference=False)
    assert not replay._programs
    case.check(kernel, torch.device("cpu"))
    case.check(kernel, torch.device("cpu"))
    assert len(replay._programs) == 2


def test_a_compilation_that_fails_leaves_triton_as_it_was(kernel, replay, monkeypatch):
    """In Triton 3.6 its mode stays on where a kernel does not compile: the next call must compile all the same."""
    from triton.runtime import _async_compile

    def fail(*arguments):
        raise RuntimeError("no ptxas")

    case = Case(**SIZES)
    with monkeypatch.context() as patch:
        patch.setattr(_async_compile.AsyncCompileMode, "__exit__", fail)
        with pytest.raises(RuntimeError, match="no ptxas"):
            case.run(kernel, kernel.moe_mlp, torch.device("cpu"), reference=False)
    assert _async_compile.active_mode.get() is None
    assert not replay._programs and not inner(kernel, "triton_kernels.launch").compiled_kernels
    case.check(kernel, torch.device("cpu"))
    assert len(replay._programs) == 2


def test_other_lengths_compile_nothing_new(kernel, replay):
    """As long as the rows of a tile are the same, which depend on the mean rows of an expert."""
    compiled = inner(kernel, "triton_kernels.launch").compiled_kernels
    known = []
    for T in (21, 1, 2, 5, 22, 23, 31):
        Case(**(SIZES | {"T": T, "dtype": torch.float16, "frozen": BASE})).check(kernel, torch.device("cpu"))
        known.append(len(compiled))
    assert len(set(known)) == 1
    grams = [binary for binary in compiled.values() if "PART" in binary.options]
    fused = [gram for gram in grams if gram.operands[gram.function_.arg_names.index("factor_ptr")] is not None]
    assert len(fused) == 2, "dO and dH are read once for dB and their product"


def test_programs_are_bounded(kernel, replay, monkeypatch):
    monkeypatch.setattr(replay, "CAPACITY", 4)
    for T in range(5, 10):
        Case(**(SIZES | {"T": T})).check(kernel, torch.device("cpu"))
        assert len(replay._programs) <= 4


def test_another_thread_is_not_recorded(kernel, replay, monkeypatch):
    """While one thread is in the middle of its recording another runs a whole step: each replays its own launches."""
    first, other = Case(**SIZES), Case(**(SIZES | {"T": 9}))
    launched = inner(kernel, "triton_kernels")
    product, device, started = launched.grouped_gemm_act, torch.device("cpu"), []

    def product_after_another_step(*arguments, **options):
        if not started:  # the product of the first recording, not of the step that it starts
            started.append(threading.get_ident())
            thread = threading.Thread(target=lambda: kept.append(other.check(kernel, device)))
            thread.start()
            thread.join(120)
        return product(*arguments, **options)

    kept: list[dict[str, torch.Tensor]] = []
    monkeypatch.setattr(launched, "grouped_gemm_act", product_after_another_step)
    first.check(kernel, device)
    assert len(kept) == 1 and len(replay._programs) == 4, "a forward and a backward of each, all complete"
    for seed in (2, 3):
        for sizes in (SIZES, SIZES | {"T": 9}):
            Case(**(sizes | {"seed": seed})).check(kernel, device)
    assert len(replay._programs) == 4


def test_no_program_keeps_a_tensor(kernel, replay):
    """What FSDP frees after a layer must be gone: recordings and replays hold addresses and shapes, no memory."""
    case = Case(**SIZES, frozen=BASE)
    for _ in range(2):
        x = {name: t.float().requires_grad_(name not in BASE) for name, t in case.tensors.items()}
        loras = {f"{p}_lora": kernel.ExpertLoRA(x.pop(f"{p}_A"), x.pop(f"{p}_B"), 2.0) for p in ("gate_up", "down")}
        out = kernel.moe_mlp(**x, **loras, top_k_index=case.top_k_index)
        held = [StorageWeakRef(t.untyped_storage()) for t in (*x.values(), out)]
        out.sum().backward()
        assert not any(reference.expired() for reference in held)
        del x, loras, out
        gc.collect()
        assert all(reference.expired() for reference in held)
    assert len(replay._programs) == 2


def test_each_thread_gets_a_context_once(kernel, monkeypatch):
    """Not while a graph is captured, nor where there is no CUDA."""
    device = inner(kernel, "triton_kernels.device")
    asked: list[int] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: asked.append(threading.get_ident()))

    def twice(initialized: bool, capturing: bool) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        for _ in range(2):
            device.use_context()

    for given, calls in (((True, False), 1), ((True, True), 1), ((False, False), 1), ((True, False), 2)):
        thread = threading.Thread(target=twice, args=given)
        thread.start()
        thread.join()
        assert len(asked) == calls


def test_a_context_is_there_before_an_op_begins(kernel, replay, monkeypatch):
    """Before its forward and before its backward, which autograd's thread computes; recorded, then replayed."""
    happened: list[str] = []

    def told(function):
        def tell(*args, **options):
            happened.append("work")
            return function(*args, **options)

        return tell

    monkeypatch.setattr(replay, "use_context", lambda: happened.append("context"))
    monkeypatch.setattr(replay, "_record", told(replay._record))
    monkeypatch.setattr(replay._Program, "run", told(replay._Program.run))
    case = Case(**SIZES)
    case.check(kernel, torch.device("cpu"))
    assert happened[0] == "context" and happened.count("context") == 2 and happened[-1] == "work"
    happened.clear()
    case.check(kernel, torch.device("cpu"))
    assert happened == ["context", "work"] * 2


def test_a_context_is_of_the_tensors_device(kernel, replay, monkeypatch):
    """Where another device is current, it is not asked for there, where it would take memory."""
    happened: list[object] = []
    current = [0]

    @contextlib.contextmanager
    def on(device):
        happened.append(device)
        current[0] = device.index
        yield

    active = types.SimpleNamespace(get_current_device=lambda: current[0])
    monkeypatch.setattr(replay, "driver", types.SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setattr(replay, "use_context", lambda: happened.append("context"))
    device = torch.device("cuda", 1)
    unaligned = types.SimpleNamespace(device=device, is_cuda=True, data_ptr=lambda: 8)
    replay.replay(lambda run, tensor: happened.append("body"), (unaligned,), ())
    assert happened == [device, "context", "body"]
