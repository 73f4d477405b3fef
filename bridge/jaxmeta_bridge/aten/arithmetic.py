"""Arithmetic of two and three tensors, broadcast and promoted as in torch."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import absolute, operands, with_partials
from jaxmeta_bridge.aten.registry import lowers

aten: Any = torch.ops.aten


def _fmod(x: jax.Array, y: jax.Array) -> jax.Array:
    return lax.rem(*jnp.broadcast_arrays(x, y))


def _remainder(x: jax.Array, y: jax.Array) -> jax.Array:
    remainder = _fmod(x, y)
    return jnp.where((remainder != 0) & ((remainder < 0) != (y < 0)), remainder + y, remainder)


def _copysign(magnitude: jax.Array, sign: jax.Array) -> jax.Array:
    size = absolute(magnitude)
    return jnp.where(jnp.signbit(sign), -size, size)


def _fmax(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where((x >= y) | jnp.isnan(y), x, y)  # a tie belongs to the first


def _fmin(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where((x <= y) | jnp.isnan(y), x, y)


def _heaviside(x: jax.Array, at_zero: jax.Array) -> jax.Array:
    return jnp.where(x == 0, lax.stop_gradient(at_zero), (x > 0).astype(x.dtype))


_xlogy = with_partials(
    lambda x, y: jnp.where(jnp.isnan(y), y, jnp.where(x == 0, 0, x * jnp.log(y))),
    lambda _, x, y: _log_unless(y, (x == 0) & (y <= 0)),
    lambda _, x, y: x / y,
)
_xlog1py = with_partials(
    lambda x, y: jnp.where(jnp.isnan(y), y, jnp.where(x == 0, 0, x * jnp.log1p(y))),
    lambda _, x, y: _log_unless(1 + y, (x == 0) & (y <= -1)),
    lambda _, x, y: x / (y + 1),
)


def _log_unless(x: jax.Array, excluded: jax.Array) -> jax.Array:
    return jnp.log(jnp.where(excluded, 1, x))


def _over_squared_radius(z: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """A partial derivative of the angle; torch takes it to be zero at the origin."""
    origin = (x == 0) & (y == 0)
    return jnp.where(origin, 0, z / jnp.where(origin, 1, x * x + y * y))


_FUNCTIONS: dict[Any, Callable[[jax.Array, jax.Array], jax.Array]] = {
    aten.atan2.default: with_partials(
        jnp.arctan2,
        lambda _, y, x: _over_squared_radius(x, x, y),
        lambda _, y, x: _over_squared_radius(-y, x, y),
    ),
    aten.copysign.Scalar: _copysign,
    aten.copysign.Tensor: _copysign,
    aten.div.Scalar: jnp.divide,
    aten.div.Tensor: jnp.divide,
    aten.fmax.default: _fmax,
    aten.fmin.default: _fmin,
    aten.fmod.Scalar: _fmod,
    aten.fmod.Tensor: _fmod,
    aten.gcd.default: jnp.gcd,
    aten.heaviside.default: _heaviside,
    aten.hypot.default: with_partials(
        jnp.hypot, lambda h, x, y: x / h, lambda h, x, y: y / h
    ),
    aten.lcm.default: jnp.lcm,
    aten.logaddexp.default: with_partials(
        jnp.logaddexp,
        lambda _, x, y: lax.logistic(x - y),
        lambda _, x, y: lax.logistic(y - x),
    ),
    aten.logaddexp2.default: with_partials(
        jnp.logaddexp2,
        lambda _, x, y: lax.logistic(math.log(2) * (x - y)),
        lambda _, x, y: lax.logistic(math.log(2) * (y - x)),
    ),
    aten.maximum.default: jnp.maximum,
    aten.minimum.default: jnp.minimum,
    aten.mul.Scalar: jnp.multiply,
    aten.mul.Tensor: jnp.multiply,
    aten.nextafter.default: with_partials(
        jnp.nextafter, lambda _, x, y: (x != y).astype(x.dtype), None
    ),
    aten.remainder.Scalar: _remainder,
    aten.remainder.Scalar_Tensor: _remainder,
    aten.remainder.Tensor: _remainder,
    aten.special_xlog1py.default: _xlog1py,
    aten.special_xlog1py.other_scalar: _xlog1py,
    aten.special_xlog1py.self_scalar: _xlog1py,
    aten.xlogy.Scalar_Other: _xlogy,
    aten.xlogy.Scalar_Self: _xlogy,
    aten.xlogy.Tensor: _xlogy,
}


def _lower(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    def lowering(out: jax.ShapeDtypeStruct, x: Any, y: Any) -> jax.Array:
        return function(*operands(out, x, y))

    return lowering


for _op, _function in _FUNCTIONS.items():
    lowers(_op)(_lower(_function))


@lowers(aten.add.Tensor, aten.add.Scalar)
def _add(out: jax.ShapeDtypeStruct, x: Any, y: Any, alpha: Any = 1) -> jax.Array:
    x, y, alpha = operands(out, x, y, alpha)
    return x + y * alpha


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def _sub(out: jax.ShapeDtypeStruct, x: Any, y: Any, alpha: Any = 1) -> jax.Array:
    x, y, alpha = operands(out, x, y, alpha)
    return x - y * alpha


@lowers(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(out: jax.ShapeDtypeStruct, x: Any, y: Any, alpha: Any = 1) -> jax.Array:
    return _sub(out, y, x, alpha)


@lowers(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(
    out: jax.ShapeDtypeStruct, x: Any, y: Any, *, rounding_mode: str | None
) -> jax.Array:
    x, y = jnp.broadcast_arrays(*operands(out, x, y))
    if rounding_mode is None:
        return x / y
    if jnp.issubdtype(x.dtype, jnp.integer):
        return lax.div(x, y) if rounding_mode == "trunc" else x // y
    quotient = jnp.trunc(x / y) if rounding_mode == "trunc" else _floor_quotient(x, y)
    return lax.stop_gradient(quotient)


@lowers(aten.floor_divide.default, aten.floor_divide.Scalar)
def _floor_divide(out: jax.ShapeDtypeStruct, x: Any, y: Any) -> jax.Array:
    return _div_mode(out, x, y, rounding_mode="floor")


def _floor_quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """Rounds the exact quotient down; the floor of the rounded one can be one too large."""
    remainder = lax.rem(x, y)
    quotient = (x - remainder) / y
    quotient = jnp.where((remainder != 0) & ((remainder < 0) != (y < 0)), quotient - 1, quotient)
    rounded = jnp.round(quotient)  # whole but for its rounding error
    return jnp.where(y == 0, x / y, jnp.where(quotient == 0, _copysign(quotient, x / y), rounded))


@lowers(aten.pow.Tensor_Scalar)
def _pow_scalar(out: jax.ShapeDtypeStruct, x: jax.Array, exponent: Any) -> jax.Array:
    if isinstance(exponent, float) and exponent.is_integer() and abs(exponent) <= 8:
        exponent = int(exponent)  # products: exact derivatives at zero, and faster
    (x,) = operands(out, x)
    if isinstance(exponent, int):
        return lax.integer_pow(x, exponent)
    if exponent in (0.5, -0.5):
        return jnp.sqrt(x) if exponent == 0.5 else lax.rsqrt(x)
    return _power(x, *operands(out, exponent))


@lowers(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _pow(out: jax.ShapeDtypeStruct, base: Any, exponent: jax.Array) -> jax.Array:
    return _power(*operands(out, base, exponent))


def _power(base: jax.Array, exponent: jax.Array) -> jax.Array:
    if not jnp.issubdtype(base.dtype, jnp.inexact):
        return jnp.power(base, exponent)
    return _inexact_power(base, exponent)


_inexact_power = with_partials(
    jnp.power,
    lambda _, x, y: jnp.where(y == 0, 0, y * _inexact_power(x, jnp.where(y == 0, 1, y - 1))),
    # The limit of a power of zero is zero: it must not meet the logarithm.
    lambda z, x, y: jnp.where(
        (x == 0) & (jnp.real(y) >= 0), 0, z * jnp.log(jnp.where((x == 0) & (jnp.real(y) >= 0), 1, x))
    ),
)


@lowers(aten.ldexp.Tensor)
def _ldexp(out: jax.ShapeDtypeStruct, x: jax.Array, exponent: jax.Array) -> jax.Array:
    x, exponent = operands(out, x, exponent)
    return x * jnp.exp2(exponent)


@lowers(aten.addcmul.default)
def _addcmul(out: jax.ShapeDtypeStruct, x: Any, y: Any, z: Any, *, value: Any = 1) -> jax.Array:
    x, y, z, value = operands(out, x, y, z, value)
    return x + value * y * z


@lowers(aten.addcdiv.default)
def _addcdiv(out: jax.ShapeDtypeStruct, x: Any, y: Any, z: Any, *, value: Any = 1) -> jax.Array:
    x, y, z, value = operands(out, x, y, z, value)
    return x + value * y / z


@lowers(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(out: jax.ShapeDtypeStruct, start: Any, end: Any, weight: Any) -> jax.Array:
    start, end, weight = operands(out, start, end, weight)
    step = end - start
    # From the nearer end, so that weight 1 gives `end` exactly.
    return jnp.where(jnp.abs(weight) < 0.5, start + weight * step, end - step * (1 - weight))


@lowers(aten.complex.default)
def _complex(out: jax.ShapeDtypeStruct, real: jax.Array, imag: jax.Array) -> jax.Array:
    return lax.complex(*jnp.broadcast_arrays(real, imag))


@lowers(aten.polar.default)
def _polar(out: jax.ShapeDtypeStruct, absolute: jax.Array, angle: jax.Array) -> jax.Array:
    return lax.complex(absolute * jnp.cos(angle), absolute * jnp.sin(angle))
