"""Special functions: error, gamma, Bessel and related functions."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from jax.scipy import special

from jaxmeta_bridge.aten.operands import operands, with_partials
from jaxmeta_bridge.aten.registry import lowers
from jaxmeta_bridge.errors import UnsupportedOpError

_aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct


def _digamma(x: jax.Array) -> jax.Array:
    # torch gives the pole at zero the sign of the side it is approached from.
    return jnp.where(x == 0, jnp.copysign(jnp.inf, -x), lax.digamma(x))


def _polygamma(order: int) -> Callable[[jax.Array], jax.Array]:
    def function(x: jax.Array) -> jax.Array:
        if order == 0:
            return _digamma(x)
        # lax.zeta is right for positive arguments only. The others are reflected at 1/2:
        # polygamma(n, x) = (-1)**n polygamma(n, 1 - x) - pi (d/dx)**n cot(pi x)
        reflected = x <= 0
        y = jnp.where(reflected, 1 - x, x)
        sign = 1 if order % 2 else -1
        values = sign * math.factorial(order) * lax.zeta(jnp.full_like(y, order + 1), y)
        cotangent = 1 / jnp.tan(jnp.pi * (x - jnp.round(x)))
        curve = functools.reduce(lambda sum, c: sum * cotangent + c, _cotangent_derivative(order))
        return jnp.where(reflected, -sign * values - math.pi * curve, values)

    return with_partials(function, lambda _, x: _polygamma(order + 1)(x))


def _cotangent_derivative(order: int) -> list[float]:
    """The `order`-th derivative of cot(pi x) by x, as a polynomial in cot(pi x): coefficients."""
    polynomial = np.polynomial.Polynomial([0, 1])
    for _ in range(order):
        polynomial = -math.pi * np.polynomial.Polynomial([1, 0, 1]) * polynomial.deriv()
    return polynomial.coef[::-1].tolist()


def _bessel_i1_over_x(y: jax.Array, x: jax.Array) -> jax.Array:
    zero = x == 0
    return jnp.where(zero, 0.5, y / jnp.where(zero, 1, x))


_i0 = with_partials(special.i0, lambda _, x: _i1(x))
_i1 = with_partials(special.i1, lambda y, x: _i0(x) - _bessel_i1_over_x(y, x))
_i0e = with_partials(special.i0e, lambda y, x: _i1e(x) - jnp.sign(x) * y)
_i1e = with_partials(special.i1e, lambda y, x: _i0e(x) - jnp.sign(x) * y - _bessel_i1_over_x(y, x))


def _entr(x: jax.Array) -> jax.Array:
    positive = x > 0
    return jnp.where(
        positive,
        -x * jnp.log(jnp.where(positive, x, 1)),
        jnp.where(x == 0, 0, jnp.where(jnp.isnan(x), x, -jnp.inf)),
    )


_lgamma = with_partials(lax.lgamma, lambda _, x: _polygamma(0)(x))

_FUNCTIONS: dict[Any, Callable[[jax.Array], jax.Array]] = {
    _aten.digamma: _polygamma(0),
    _aten.erf: lax.erf,
    _aten.erfc: lax.erfc,
    _aten.erfinv: lax.erf_inv,
    _aten.i0: _i0,
    _aten.lgamma: _lgamma,
    _aten.sinc: jnp.sinc,
    _aten.special_entr: with_partials(_entr, lambda _, x: -1 - jnp.log(x)),
    _aten.special_erfcx: with_partials(
        special.erfcx, lambda y, x: 2 * x * y - 2 / math.sqrt(math.pi)
    ),
    _aten.special_i0e: _i0e,
    _aten.special_i1: _i1,
    _aten.special_i1e: _i1e,
    _aten.special_log_ndtr: with_partials(
        special.log_ndtr, lambda y, x: jnp.exp(-y - x * x / 2) / math.sqrt(2 * math.pi)
    ),
    _aten.special_ndtri: with_partials(
        special.ndtri, lambda y, _: math.sqrt(2 * math.pi) * jnp.exp(y * y / 2)
    ),
}


def _lower(function: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    def lowering(out: _Out, x: jax.Array) -> jax.Array:
        return function(*operands(out, x))

    return lowering


for _op, _function in _FUNCTIONS.items():
    lowers(_op.default)(_lower(_function))


@lowers(_aten.polygamma.default)
def _lower_polygamma(out: _Out, order: int, x: jax.Array) -> jax.Array:
    return _polygamma(order)(*operands(out, x))


@lowers(_aten.mvlgamma.default)
def _mvlgamma(out: _Out, x: jax.Array, p: int) -> jax.Array:
    (x,) = operands(out, x)
    terms = [_lgamma(x - i / 2) for i in range(p)]
    return sum(terms, jnp.asarray(p * (p - 1) / 4 * math.log(math.pi), x.dtype))


@lowers(_aten.igamma.default)
def _igamma(out: _Out, a: jax.Array, x: jax.Array) -> jax.Array:
    return lax.igamma(*jnp.broadcast_arrays(*operands(out, a, x)))


@lowers(_aten.igammac.default)
def _igammac(out: _Out, a: jax.Array, x: jax.Array) -> jax.Array:
    return lax.igammac(*jnp.broadcast_arrays(*operands(out, a, x)))


@lowers(_aten.special_zeta.default, _aten.special_zeta.other_scalar, _aten.special_zeta.self_scalar)
def _lower_zeta(out: _Out, x: Any, q: Any) -> jax.Array:
    return _zeta(*operands(out, x, q))


def _no_derivative(*_: jax.Array) -> jax.Array:
    raise UnsupportedOpError(
        "torch.special.zeta(x, q) is differentiated by x, for which neither torch nor JAX has a "
        "formula. Detach x."
    )


def _positive_zeta(x: jax.Array, q: jax.Array) -> jax.Array:
    """NaN for x < 1, and between the poles of negative q, where JAX's series is inaccurate."""
    series = jnp.where(x < 1, jnp.nan, lax.zeta(x, q))
    outside = jnp.where(q == jnp.floor(q), jnp.inf, jnp.nan)
    return jnp.where((x > 1) & (q <= 0), outside, series)


_zeta = with_partials(_positive_zeta, _no_derivative, lambda _, x, q: -x * _zeta(x + 1, q))
