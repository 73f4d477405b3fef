"""Activation functions, with torch's choice of derivative at every kink.

A constant branch of `where` has derivative zero, so `<=` or `<` decides what a kink gets.
"""

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import absolute, operands, with_partials
from jaxmeta_bridge.aten.registry import lowers

_aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct

# Both derivatives of log(1 + exp(x)) are exact and finite everywhere.
softplus = with_partials(lambda x: jnp.logaddexp(x, 0), lambda _, x: lax.logistic(x))


@lowers(_aten.relu.default)
def _relu(out: _Out, x: jax.Array) -> jax.Array:
    return jnp.where(x <= 0, 0, x)


@lowers(_aten.threshold.default)
def _threshold(out: _Out, x: jax.Array, threshold: Any, value: Any) -> jax.Array:
    return jnp.where(x <= threshold, jnp.asarray(value, x.dtype), x)


@lowers(_aten.hardtanh.default)
def _hardtanh(out: _Out, x: jax.Array, min_val: Any = -1, max_val: Any = 1) -> jax.Array:
    x, lower, upper = operands(out, x, min_val, max_val)
    return jnp.where(x <= lower, lower, jnp.where(x >= upper, upper, x))


@lowers(_aten.hardsigmoid.default)
def _hardsigmoid(out: _Out, x: jax.Array) -> jax.Array:
    (x,) = operands(out, x)
    return jnp.where(x <= -3, 0, jnp.where(x >= 3, 1, (x + 3) / 6))


@lowers(_aten.hardswish.default)
def _hardswish(out: _Out, x: jax.Array) -> jax.Array:
    (x,) = operands(out, x)
    return jnp.where(x <= -3, 0, jnp.where(x >= 3, x, x * (x + 3) / 6))


@lowers(_aten.leaky_relu.default)
def _leaky_relu(out: _Out, x: jax.Array, negative_slope: Any = 0.01) -> jax.Array:
    (x,) = operands(out, x)
    return jnp.where(x > 0, x, x * negative_slope)


@lowers(_aten._prelu_kernel.default)
def _prelu(out: _Out, x: jax.Array, weight: jax.Array) -> jax.Array:
    x, weight = operands(out, x, weight)
    # At zero torch takes the first derivative from the left and the second from the right.
    return jnp.where(x > 0, x, x * jnp.where(x == 0, lax.stop_gradient(weight), weight))


@lowers(_aten.elu.default)
def _elu(
    out: _Out,
    x: jax.Array,
    alpha: Any = 1,
    scale: Any = 1,
    input_scale: Any = 1,
) -> jax.Array:
    (x,) = operands(out, x)
    # `where` differentiates both branches: the exponential must not overflow in the other one.
    curve = jnp.expm1(jnp.where(x < 0, x, 0) * input_scale)
    # At zero torch takes the first derivative from the left and the second from the right.
    slope = jnp.where(x == 0, alpha * scale * input_scale, scale)
    return jnp.where(x < 0, alpha * scale * curve, x * slope)


@lowers(_aten.celu.default)
def _celu(out: _Out, x: jax.Array, alpha: Any = 1) -> jax.Array:
    return _elu(out, x, alpha, 1, 1 / alpha)


@lowers(_aten.softplus.default)
def _softplus(out: _Out, x: jax.Array, beta: Any = 1, threshold: Any = 20) -> jax.Array:
    (x,) = operands(out, x)
    return jnp.where(x * beta > threshold, x, softplus(x * beta) / beta)


@lowers(_aten.log_sigmoid_forward.default)
def _log_sigmoid(outs: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    (x,) = operands(outs[0], x)
    return -softplus(-x), jnp.exp(-absolute(x))  # the second is for torch's own backward pass


@lowers(_aten.softshrink.default)
def _softshrink(out: _Out, x: jax.Array, lambd: Any = 0.5) -> jax.Array:
    (x,) = operands(out, x)
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, _zero_or_nan(x)))


@lowers(_aten.hardshrink.default)
def _hardshrink(out: _Out, x: jax.Array, lambd: Any = 0.5) -> jax.Array:
    return jnp.where((x >= -lambd) & (x <= lambd), 0, x)


def _zero_or_nan(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isnan(x), x, 0)


@lowers(_aten.gelu.default)
def _gelu(out: _Out, x: jax.Array, *, approximate: str = "none") -> jax.Array:
    (x,) = operands(out, x)
    return jax.nn.gelu(x, approximate=approximate == "tanh")


@lowers(_aten.silu.default)
def _silu(out: _Out, x: jax.Array) -> jax.Array:
    (x,) = operands(out, x)
    return x * lax.logistic(x)


@lowers(_aten.mish.default)
def _mish(out: _Out, x: jax.Array) -> jax.Array:
    (x,) = operands(out, x)
    return x * jnp.tanh(softplus(x))


@lowers(_aten.glu.default)
def _glu(out: _Out, x: jax.Array, dim: int = -1) -> jax.Array:
    value, gate = jnp.split(x.astype(operands(out, 0)[0].dtype), 2, axis=dim)
    return value * lax.logistic(gate)


# Backward passes occur where the callable itself differentiates (torch.func.grad). torch takes
# the others apart into operations of the table.
@lowers(_aten.hardsigmoid_backward.default)
def _hardsigmoid_backward(out: _Out, gradient: jax.Array, x: jax.Array) -> jax.Array:
    gradient, x = operands(out, gradient, x)
    return jnp.where((x > -3) & (x < 3), gradient / 6, 0)


@lowers(_aten.hardshrink_backward.default, _aten.softshrink_backward.default)
def _shrink_backward(out: _Out, gradient: jax.Array, x: jax.Array, lambd: Any) -> jax.Array:
    return jnp.where((x >= -lambd) & (x <= lambd), 0, gradient)
