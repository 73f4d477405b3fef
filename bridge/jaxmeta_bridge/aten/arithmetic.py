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

_aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct


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


def _logaddexp(x: jax.Array, y: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(x):
        return jnp.logaddexp(x, y)
    # On the branch of the larger one; JAX's takes the principal branch.
    larger, smaller = jnp.where(jnp.real(x) < jnp.real(y), jnp.stack([y, x]), jnp.stack([x, y]))
    return larger + jnp.log1p(jnp.exp(smaller - larger))


def _over_squared_radius(z: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """A partial derivative of the angle; torch takes it to be zero at the origin."""
    origin = (x == 0) & (y == 0)
    return jnp.where(origin, 0, z / jnp.where(origin, 1, x * x + y * y))


_FUNCTIONS: dict[Any, Callable[[jax.Array, jax.Array], jax.Array]] = {
    _aten.atan2.default: with_partials(
        jnp.arctan2,
        lambda _, y, x: _over_squared_radius(x, x, y),
        lambda _, y, x: _over_squared_radius(-y, x, y),
    ),
    _aten.copysign.Scalar: _copysign,
    _aten.copysign.Tensor: _copysign,
    _aten.fmax.default: _fmax,
    _aten.fmin.default: _fmin,
    _aten.fmod.Scalar: _fmod,
    _aten.fmod.Tensor: _fmod,
    _aten.gcd.default: jnp.gcd,
    _aten.heaviside.default: _heaviside,
    _aten.hypot.default: with_partials(jnp.hypot, lambda h, x, y: x / h, lambda h, x, y: y / h),
    _aten.lcm.default: jnp.lcm,
    _aten.logaddexp.default: with_partials(
        _logaddexp,
        lambda _, x, y: lax.logistic(x - y),
        lambda _, x, y: lax.logistic(y - x),
    ),
    _aten.logaddexp2.default: with_partials(
        jnp.logaddexp2,
        lambda _, x, y: lax.logistic(math.log(2) * (x - y)),
        lambda _, x, y: lax.logistic(math.log(2) * (y - x)),
    ),
    _aten.maximum.default: jnp.maximum,
    _aten.minimum.default: jnp.minimum,
    _aten.nextafter.default: with_partials(
        jnp.nextafter, lambda _, x, y: (x != y).astype(x.dtype), None
    ),
    _aten.remainder.Scalar: _remainder,
    _aten.remainder.Scalar_Tensor: _remainder,
    _aten.remainder.Tensor: _remainder,
    _aten.special_xlog1py.default: _xlog1py,
    _aten.special_xlog1py.other_scalar: _xlog1py,
    _aten.special_xlog1py.self_scalar: _xlog1py,
    _aten.xlogy.Scalar_Other: _xlogy,
    _aten.xlogy.Scalar_Self: _xlogy,
    _aten.xlogy.Tensor: _xlogy,
}


def _lower(function: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    def lowering(out: _Out, x: Any, y: Any) -> jax.Array:
        return function(*operands(out, x, y))

    return lowering


for _op, _function in _FUNCTIONS.items():
    lowers(_op)(_lower(_function))


@lowers(_aten.mul.Tensor, _aten.mul.Scalar)
def _mul(out: _Out, x: Any, y: Any) -> jax.Array:
    x, y = operands(out, x, y, exact=True)
    return x * y


@lowers(_aten.div.Tensor, _aten.div.Scalar)
def _div(out: _Out, x: Any, y: Any) -> jax.Array:
    x, y = operands(out, x, y, exact=True)
    return x / y


@lowers(_aten.add.Tensor, _aten.add.Scalar)
def _add(out: _Out, x: Any, y: Any, alpha: Any = 1) -> jax.Array:
    x, y = operands(out, x, _scaled(out, y, alpha))
    return x + y


def _scaled(out: _Out, x: Any, factor: Any, *, exact: bool = False) -> Any:
    """`factor * x`; most factors are 1."""
    if factor == 1:
        return x
    x, factor = operands(out, x, factor, exact=exact)
    return factor * x


@lowers(_aten.sub.Tensor, _aten.sub.Scalar)
def _sub(out: _Out, x: Any, y: Any, alpha: Any = 1) -> jax.Array:
    x, y = operands(out, x, _scaled(out, y, alpha))
    return x - y


@lowers(_aten.rsub.Tensor, _aten.rsub.Scalar)
def _rsub(out: _Out, x: Any, y: Any, alpha: Any = 1) -> jax.Array:
    return _sub(out, y, x, alpha)


@lowers(_aten.div.Tensor_mode, _aten.div.Scalar_mode)
def _div_mode(out: _Out, x: Any, y: Any, *, rounding_mode: str | None) -> jax.Array:
    x, y = jnp.broadcast_arrays(*operands(out, x, y, exact=True))
    if rounding_mode is None:
        return x / y
    if jnp.issubdtype(x.dtype, jnp.integer):
        return lax.div(x, y) if rounding_mode == "trunc" else x // y
    if rounding_mode == "trunc":
        quotient = jnp.trunc((x / y).astype(out.dtype))  # torch rounds to half precision first
    else:
        quotient = _floor_quotient(x, y)
    return lax.stop_gradient(quotient)


@lowers(_aten.floor_divide.default, _aten.floor_divide.Scalar)
def _floor_divide(out: _Out, x: Any, y: Any) -> jax.Array:
    return _div_mode(out, x, y, rounding_mode="floor")


def _floor_quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """Rounds the exact quotient down; the floor of the rounded one can be one too large."""
    remainder = lax.rem(x, y)
    quotient = (x - remainder) / y
    quotient = jnp.where((remainder != 0) & ((remainder < 0) != (y < 0)), quotient - 1, quotient)
    rounded = jnp.round(quotient)  # whole but for its rounding error
    return jnp.where(y == 0, x / y, jnp.where(quotient == 0, _copysign(quotient, x / y), rounded))


@lowers(_aten.pow.Tensor_Scalar)
def _pow_scalar(out: _Out, x: jax.Array, exponent: Any) -> jax.Array:
    if isinstance(exponent, float) and exponent.is_integer() and abs(exponent) <= 8:
        exponent = int(exponent)  # products: exact derivatives at zero, and faster
    (x,) = operands(out, x)
    if isinstance(exponent, int) and jnp.issubdtype(x.dtype, jnp.inexact):
        return lax.integer_pow(x, exponent)
    if exponent in (0.5, -0.5):
        return jnp.sqrt(x) if exponent == 0.5 else lax.rsqrt(x)
    return _power(x, *operands(out, exponent))


@lowers(_aten.pow.Tensor_Tensor, _aten.pow.Scalar)
def _pow(out: _Out, base: Any, exponent: jax.Array) -> jax.Array:
    return _power(*operands(out, base, exponent))


def _power(base: jax.Array, exponent: jax.Array) -> jax.Array:
    if jnp.issubdtype(base.dtype, jnp.inexact):
        return _inexact_power(base, exponent)
    # What is smaller than one is rounded to zero.
    reciprocal = jnp.where(jnp.abs(base) == 1, base ** (exponent & 1), 0)
    return jnp.where(exponent < 0, reciprocal, base ** jnp.maximum(exponent, 0))


def _log_of_base(x: jax.Array, y: jax.Array) -> jax.Array:
    """log(x), but 0 where a power of zero is zero or one: there torch's derivative is zero."""
    return jnp.log(jnp.where((x == 0) & (jnp.real(y) >= 0), 1, x))


_inexact_power = with_partials(
    jnp.power,
    lambda _, x, y: jnp.where(y == 0, 0, y * _inexact_power(x, jnp.where(y == 0, 1, y - 1))),
    lambda z, x, y: z * _log_of_base(x, y),
)


@lowers(_aten.ldexp.Tensor)
def _ldexp(out: _Out, x: jax.Array, exponent: jax.Array) -> jax.Array:
    x, exponent = operands(out, x, exponent)
    return x * jnp.exp2(exponent)


@lowers(_aten.addcmul.default)
def _addcmul(out: _Out, x: Any, y: Any, z: Any, *, value: Any = 1) -> jax.Array:
    x, y, z = operands(out, x, y, z, exact=True)
    return x + _scaled(out, y, value, exact=True) * z


@lowers(_aten.addcdiv.default)
def _addcdiv(out: _Out, x: Any, y: Any, z: Any, *, value: Any = 1) -> jax.Array:
    x, y, z = operands(out, x, y, z, exact=True)
    return x + _scaled(out, y, value, exact=True) / z


@lowers(_aten.lerp.Scalar, _aten.lerp.Tensor)
def _lerp(out: _Out, start: Any, end: Any, weight: Any) -> jax.Array:
    start, end, weight = operands(out, start, end, weight, exact=True)
    step = end - start
    # From the nearer end, so that weight 1 gives `end` exactly.
    return jnp.where(jnp.abs(weight) < 0.5, start + weight * step, end - step * (1 - weight))


@lowers(_aten.complex.default)
def _complex(out: _Out, real: jax.Array, imag: jax.Array) -> jax.Array:
    return lax.complex(*jnp.broadcast_arrays(real, imag))


@lowers(_aten.polar.default)
def _polar(out: _Out, absolute: jax.Array, angle: jax.Array) -> jax.Array:
    return lax.complex(absolute * jnp.cos(angle), absolute * jnp.sin(angle))
