"""The activations as device functions, and their derivatives; the same formulas as `reference.ACTIVATIONS`."""

import triton
import triton.language as tl

from .. import reference

_PASSES_AT_LIMIT = tl.constexpr(reference.PASSES_AT_LIMIT)


@triton.jit
def act(x, NAME: tl.constexpr):
    """``act(x)`` of a float32 tile."""
    if NAME == "silu":
        y = x * tl.sigmoid(x)
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2u) - 1, so gelu_tanh(x) = x * sigmoid(2u)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif NAME == "relu":
        y = tl.where(x <= 0, 0.0, x)  # NaN stays NaN
    elif NAME == "relu2":
        y = tl.where(x <= 0, 0.0, x * x)
    else:
        tl.static_assert(NAME == "identity", "unknown activation")
        y = x
    return y


@triton.jit
def act_grad(x, NAME: tl.constexpr):
    """``act'(x)`` of a float32 tile."""
    if NAME == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif NAME == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    elif NAME == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif NAME == "relu2":
        y = tl.where(x <= 0, 0.0, 2.0 * x)  # NaN stays NaN
    else:
        tl.static_assert(NAME == "identity", "unknown activation")
        y = tl.full(x.shape, 1.0, tl.float32)
    return y


@triton.jit
def gated(gate, up, NAME: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """``(value, factor)`` of a gated activation ``value(gate) * factor(up)``, float32 tiles."""
    if NAME == "clamped_glu":
        g = tl.where(gate > LIMIT, LIMIT, gate)  # NaN stays NaN
        value = g * tl.sigmoid(ALPHA * g)
        factor = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + SHIFT
    else:
        value = act(gate, NAME)
        factor = up
    return value, factor


@triton.jit
def gated_slopes(gate, up, NAME: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The derivatives of `gated`'s value and factor."""
    if NAME == "clamped_glu":
        g = tl.where(gate > LIMIT, LIMIT, gate)
        s = tl.sigmoid(ALPHA * g)
        if _PASSES_AT_LIMIT:
            gate_outside, up_outside = gate > LIMIT, (up > LIMIT) | (up < -LIMIT)
        else:
            gate_outside, up_outside = gate >= LIMIT, (up >= LIMIT) | (up <= -LIMIT)
        slope = tl.where(gate_outside, 0.0, s * (1.0 + ALPHA * g * (1.0 - s)))
        factor_slope = tl.where(up_outside, 0.0, 1.0)
    else:
        slope = act_grad(gate, NAME)
        factor_slope = 1.0
    return slope, factor_slope
