"""Backward passes that are differentiable no further, and say so wherever a second derivative is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """Decorates the backward of an autograd function, so that a derivative of what it returns is an error.

    Torch's own `once_differentiable` leaves the returned gradients unconnected with what they were made of: a second
    derivative by `torch.autograd.grad` of given inputs never comes by its error, and lacks a term. Here they are
    connected with the incoming gradients and with every saved tensor that needs a gradient.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them no second time, and `backward` may write over one
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():  # no create_graph
            return results
        sources = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
        made = [result for result in results if result is not None]
        if not sources or not made:
            return results
        connected = iter(_Refused.apply(made, *sources))
        return tuple(None if result is None else next(connected) for result in results)

    return wrapper


class _Refused(torch.autograd.Function):
    """Hands on what was made of the sources; its own derivative is the error."""

    @staticmethod
    def forward(ctx, made, *sources):
        return tuple(made)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("scattermoe-lora: experts are differentiable once; a gradient of their gradient is refused")
