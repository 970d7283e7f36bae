"""ScatterMoE's and ScatterMoE-LoRA's kernel-level functions, same names and arguments: no autograd, any device.

Index arguments are those of `flatten_sort_count`; ``S`` slots, ``E`` experts; LoRA factors are expert-major.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import backend, ops
from .checks import FLOATS, INTEGERS, Arguments
from .types import ExpertLoRA, Routing


@torch.no_grad()
def scatter2scatter(
    X: Tensor,
    W: Tensor,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    b: Tensor | None = None,
    x_grouped: bool = False,
    y_grouped: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``y = x @ W[e] + b[e]`` for every slot.

    Args:
        X: ``[S / k, K]``, or ``[S, K]`` in grouped order if ``x_grouped``. W: ``[E, K, N]``, X's dtype. b: ``[E, N]``.
        out: ``[S, N]`` contiguous, of X's dtype, to write, beside all that is read; a new tensor if None.

    Returns:
        ``[S, N]``, in grouped order if ``y_grouped``. Rows of no expert are zeros.
    """
    return scatter2scatter_lora(
        X, W, sorted_expert_idxs, sorted_scattered_idxs, k, None, None, 1.0, b, x_grouped, y_grouped, out
    )


@torch.no_grad()
def scatter2scatter_lora(
    X: Tensor,
    W: Tensor,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    b: Tensor | None = None,
    x_grouped: bool = False,
    y_grouped: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`scatter2scatter` with ``+ scaling * B_e (A_e x)``: ``lora_A [E * r, K]``, ``lora_B [N, E * r]``."""
    args = Arguments("scatter2scatter" if lora_A is lora_B is None else "scatter2scatter_lora")
    args.tensor("X", X, ("rows", "K"), FLOATS)
    args.tensor("W", W, ("E", "K", "N"), (X.dtype,))
    _check(args, "X", sorted_expert_idxs, sorted_scattered_idxs, k, x_grouped, out, "N", X.dtype)
    if b is not None:
        args.tensor("b", b, ("E", "N"), FLOATS)
    lora = args.expert_major(lora_A, lora_B, scaling, "K", "N") if args.has_lora(lora_A, lora_B) else None
    return _gemm(X, W, sorted_expert_idxs, sorted_scattered_idxs, k, lora, b, x_grouped, y_grouped, out)


@torch.no_grad()
def scatter2scatter_lora_dX(
    DY: Tensor,
    W: Tensor,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    dy_grouped: bool = True,
    dx_grouped: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """``dx = dy @ W[e]^T + scaling * (dy @ B_e) @ A_e`` for every slot.

    Args:
        DY: ``[S / k, N]``, or ``[S, N]`` in grouped order if ``dy_grouped``. W: ``[E, K, N]``, the forward's.
        lora_A: ``[E * r, K]``. lora_B: ``[N, E * r]``.

    Returns:
        ``[S, K]``, in grouped order if ``dx_grouped``.
    """
    args = Arguments("scatter2scatter_lora_dX")
    args.tensor("DY", DY, ("rows", "N"), FLOATS)
    args.tensor("W", W, ("E", "K", "N"), (DY.dtype,))
    _check(args, "DY", sorted_expert_idxs, sorted_scattered_idxs, k, dy_grouped, out, "K", DY.dtype)
    lora = args.expert_major(lora_A, lora_B, scaling, "K", "N")
    swapped = ExpertLoRA(lora.B.mT, lora.A.mT, lora.scaling)
    return _gemm(DY, W.mT, sorted_expert_idxs, sorted_scattered_idxs, k, swapped, None, dy_grouped, dx_grouped, out)


@torch.no_grad()
def single2scatter(X: Tensor, W: Tensor, expert_idxs: Tensor) -> Tensor:
    """One token through its experts: ``X [1, K]``, ``W [E, K, N]``, ``expert_idxs [1, k]``; returns ``[k, N]``."""
    args = Arguments("single2scatter")
    args.tensor("X", X, ("tokens", "K"), FLOATS)
    if X.shape[0] != 1:
        raise args.fail("X", "one token, [1, K]", f"shape {tuple(X.shape)}")
    args.tensor("W", W, ("E", "K", "N"), (X.dtype,))
    args.tensor("expert_idxs", expert_idxs, ("tokens", "k"), INTEGERS)
    sorted_expert_idxs, sorted_scattered_idxs, _ = ops.route(expert_idxs, W.shape[0])
    return scatter2scatter(X, W, sorted_expert_idxs, sorted_scattered_idxs, expert_idxs.shape[1])


@torch.no_grad()
def group(
    A: Tensor,
    sorted_expert_idxs: Tensor,
    coeff: Tensor | None = None,
    fan_out: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Rows in grouped order: ``out[i] = coeff[slot] * A[slot // fan_out]`` with ``slot = sorted_expert_idxs[i]``.

    Args:
        A: ``[S / fan_out, N]``.
        sorted_expert_idxs: ``[S]``; what `flatten_sort_count` calls ``sorted_scattered_idxs`` (ScatterMoE's own name).
        coeff: ``[S]`` or ``[T, k]`` in scattered order.
        out: ``[S, N]`` to write; a new tensor if None.
    """
    args = Arguments("group")
    args.tensor("A", A, ("rows", "N"), FLOATS)
    args.tensor("sorted_expert_idxs", sorted_expert_idxs, ("S",), INTEGERS)
    args.count("fan_out", fan_out)
    if args.size("rows") * fan_out != args.size("S"):
        raise args.fail("A", f"[S / fan_out, N] with S = {args.size('S')}, fan_out = {fan_out}", tuple(A.shape))
    if coeff is not None:
        coeff = args.tensor("coeff", coeff.reshape(-1) if isinstance(coeff, Tensor) else coeff, ("S",), FLOATS)
    if out is not None:
        args.tensor("out", out, ("S", "N"), (A.dtype,))
    rows = A.index_select(0, sorted_expert_idxs // fan_out)
    if coeff is not None:
        rows = (rows * coeff.index_select(0, sorted_expert_idxs)[:, None]).to(A.dtype)
    return rows if out is None else out.copy_(rows)


@torch.no_grad()
def group_bwd_W(
    DY: Tensor, X: Tensor, expert_offsets: Tensor, E: int, has_bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Weight gradients: ``DY [S, N]`` and ``X [S, K]`` in grouped order give ``(DW [E, K, N], Db [E, N] or None)``."""
    args = _check_grouped("group_bwd_W", DY, X, expert_offsets, E)
    routing = _grouped_routing(args, X, expert_offsets)
    run = backend.of(X)
    DW = X.new_empty(E, X.shape[1], DY.shape[1])
    run.gram(X, DY, routing, DW, left_fan_out=0)
    if not has_bias:
        return DW, None
    Db = X.new_empty(E, DY.shape[1])
    run.gram(DY, None, routing, Db[:, :, None], left_fan_out=0)
    return DW, Db


@torch.no_grad()
def group_bwd_lora(
    DY: Tensor, X: Tensor, lora_A: Tensor, lora_B: Tensor, expert_offsets: Tensor, E: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Adapter gradients: ``DY [S, N]``, ``X [S, K]`` in grouped order give ``(dA [E * r, K], dB [N, E * r])``."""
    args = _check_grouped("group_bwd_lora", DY, X, expert_offsets, E)
    lora = args.expert_major(lora_A, lora_B, scaling, "K", "N")
    routing = _grouped_routing(args, X, expert_offsets)
    run = backend.of(X)
    dA, dB = torch.empty_like(lora_A), torch.empty_like(lora_B)
    views = ExpertLoRA.from_expert_major(dA, dB, E, lora.scaling)
    ((A, B),) = run.in_factors(X.dtype, (lora.A, lora.B))
    xa = run.shrink(X, A.mT, routing, x_fan_out=0, scale=lora.scaling)
    u = run.shrink_gram(DY, B, xa, routing, views.B, x_fan_out=0, scale=lora.scaling)
    run.gram(X, u, routing, views.A.mT, left_fan_out=0)
    return dA, dB


def _check(
    args: Arguments,
    name: str,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    grouped: bool,
    out: Tensor | None,
    width: str,
    dtype: torch.dtype,
) -> None:
    """What the scatter2scatter functions have in common, once their operand ``name`` and W are checked."""
    args.count("k", k)
    if args.size("E") == 0:
        raise args.fail("W", "of at least one expert", "shape with E = 0")
    args.tensor("sorted_expert_idxs", sorted_expert_idxs, ("S",), INTEGERS)
    args.tensor("sorted_scattered_idxs", sorted_scattered_idxs, ("S",), INTEGERS)
    args.slots(sorted_scattered_idxs, sorted_expert_idxs)
    if args.size("rows") * (1 if grouped else k) != args.size("S"):
        inner = "K" if name == "X" else "N"
        got = f"{args.size('rows')} rows for k = {k} and S = {args.size('S')}"
        raise args.fail(name, f"[S, {inner}] if grouped else [S / k, {inner}]", got)
    if out is not None:
        args.tensor("out", out, ("S", width), (dtype,))
        if not out.is_contiguous():
            raise args.fail("out", "contiguous", f"strides {out.stride()}")


def _check_grouped(function: str, DY: Tensor, X: Tensor, expert_offsets: Tensor, E: int) -> Arguments:
    args = Arguments(function)
    args.bind("E", args.count("E", E), "the argument E")
    args.tensor("X", X, ("S", "K"), FLOATS)
    args.tensor("DY", DY, ("S", "N"), (X.dtype,))
    args.tensor("expert_offsets", expert_offsets, ("E",), INTEGERS)
    return args


def _grouped_routing(args: Arguments, X: Tensor, expert_offsets: Tensor) -> Routing:
    rows = torch.arange(X.shape[0], device=X.device)
    args.routing(rows, expert_offsets)
    return backend.routing(rows, expert_offsets)


def _gemm(
    X: Tensor,
    W: Tensor,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    k: int,
    lora: ExpertLoRA | None,
    b: Tensor | None,
    x_grouped: bool,
    y_grouped: bool,
    out: Tensor | None,
) -> Tensor:
    run = backend.of(X)
    experts = torch.arange(W.shape[0], device=X.device, dtype=sorted_expert_idxs.dtype)
    offsets = torch.searchsorted(sorted_expert_idxs.contiguous(), experts, right=True)
    routing = backend.routing(sorted_scattered_idxs, offsets, (W,))
    x_fan_out = 0 if x_grouped else k
    z = expand = None
    if lora is not None:
        ((A, B),) = run.in_factors(X.dtype, (lora.A, lora.B))
        z = run.shrink(X, A.mT, routing, x_fan_out=x_fan_out, scale=lora.scaling)
        expand = B.mT
    return run.grouped_gemm(
        X,
        W,
        routing,
        x_fan_out=x_fan_out,
        out_scattered=not y_grouped,
        z=z,
        expand=expand,
        bias=b,
        out=out,
        zero_tail=True,
    )
