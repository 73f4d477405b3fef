"""Elementwise functions of one tensor."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import absolute, operands, with_partials, working_dtype
from jaxmeta_bridge.aten.registry import lowers

aten: Any = torch.ops.aten


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1, jnp.where(x < 0, -1, jnp.zeros_like(x)))  # 0 for NaN, unlike JAX


# Computed in the dtype of the result: where torch makes floats of integers, before the function.
_FUNCTIONS: dict[Any, Callable[[jax.Array], jax.Array]] = {
    aten.acos: jnp.arccos,
    aten.acosh: jnp.arccosh,
    aten.asin: jnp.arcsin,
    aten.asinh: jnp.arcsinh,
    aten.atan: jnp.arctan,
    aten.atanh: with_partials(jnp.arctanh, lambda _, x: 1 / (1 - x * x)),
    aten.bitwise_not: jnp.invert,
    aten.ceil: jnp.ceil,
    aten.cos: jnp.cos,
    aten.cosh: jnp.cosh,
    aten.deg2rad: jnp.deg2rad,
    aten.exp: jnp.exp,
    aten.exp2: jnp.exp2,
    aten.expm1: jnp.expm1,
    aten.floor: jnp.floor,
    aten.frac: lambda x: x - jnp.trunc(x),
    aten.log: jnp.log,
    aten.log10: jnp.log10,
    aten.log1p: jnp.log1p,
    aten.log2: jnp.log2,
    aten.neg: jnp.negative,
    aten.rad2deg: jnp.rad2deg,
    aten.reciprocal: jnp.reciprocal,
    aten.round: jnp.round,
    aten.rsqrt: with_partials(lax.rsqrt, lambda y, _: -0.5 * y * y * y),
    aten.sigmoid: lax.logistic,
    aten.sign: _sign,
    aten.sin: jnp.sin,
    aten.sinh: jnp.sinh,
    aten.sqrt: jnp.sqrt,
    aten.tan: jnp.tan,
    aten.tanh: jnp.tanh,
    aten.trunc: jnp.trunc,
}

# Computed in the dtype of the input.
_PREDICATES: dict[Any, Callable[[jax.Array], jax.Array]] = {
    aten.isinf: jnp.isinf,
    aten.isnan: jnp.isnan,
    aten.isneginf: jnp.isneginf,
    aten.isposinf: jnp.isposinf,
    aten.logical_not: jnp.logical_not,
    aten.signbit: jnp.signbit,
}


def _lower_function(function: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    def lowering(out: jax.ShapeDtypeStruct, x: jax.Array) -> jax.Array:
        return function(*operands(out, x))

    return lowering


def _lower_predicate(function: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    def lowering(out: jax.ShapeDtypeStruct, x: jax.Array) -> jax.Array:
        return function(x)

    return lowering


for _op, _function in _FUNCTIONS.items():
    lowers(_op.default)(_lower_function(_function))
for _op, _function in _PREDICATES.items():
    lowers(_op.default)(_lower_predicate(_function))


@lowers(aten.abs.default)
def _abs(out: jax.ShapeDtypeStruct, x: jax.Array) -> jax.Array:
    return absolute(x)


@lowers(aten.angle.default)
def _angle(out: jax.ShapeDtypeStruct, x: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(x):
        x = lax.stop_gradient(x.astype(out.dtype))
        return jnp.where(jnp.isnan(x), x, jnp.where(x < 0, jnp.pi, 0))
    # Neither value nor gradient is defined at zero; torch gives zero for both.
    zero = x == 0
    safe = jnp.where(zero, 1, x)
    return jnp.where(zero, lax.stop_gradient(jnp.angle(x)), jnp.angle(safe))


@lowers(aten.sgn.default)
def _sgn(out: jax.ShapeDtypeStruct, x: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(x):
        return _sign(x)
    zero = x == 0
    safe = jnp.where(zero, 1, x)
    return jnp.where(zero, 0, safe / jnp.abs(safe))


@lowers(aten.round.decimals)
def _round_decimals(out: jax.ShapeDtypeStruct, x: jax.Array, *, decimals: int) -> jax.Array:
    (x,) = operands(out, x)
    scale = 10.0 ** abs(decimals)
    return jnp.round(x * scale) / scale if decimals >= 0 else jnp.round(x / scale) * scale


@lowers(aten.nan_to_num.default)
def _nan_to_num(
    out: jax.ShapeDtypeStruct,
    x: jax.Array,
    nan: float | None = None,
    posinf: float | None = None,
    neginf: float | None = None,
) -> jax.Array:
    if jnp.iscomplexobj(x):
        real = jax.ShapeDtypeStruct(out.shape, jnp.finfo(out.dtype).dtype)
        return lax.complex(
            _nan_to_num(real, jnp.real(x), nan, posinf, neginf),
            _nan_to_num(real, jnp.imag(x), nan, posinf, neginf),
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    limits = jnp.finfo(out.dtype)
    x = jnp.where(jnp.isposinf(x), limits.max if posinf is None else posinf, x)
    x = jnp.where(jnp.isneginf(x), limits.min if neginf is None else neginf, x)
    return jnp.where(jnp.isnan(x), 0.0 if nan is None else nan, x)


@lowers(aten.logit.default)
def _logit(out: jax.ShapeDtypeStruct, x: jax.Array, eps: float | None = None) -> jax.Array:
    (x,) = operands(out, x)
    if eps is not None:  # `where`, so that the gradient at the bounds is one-sided as in torch
        x = jnp.where(x < eps, eps, jnp.where(x > 1 - eps, 1 - eps, x))
    return _log_odds(x)


_log_odds = with_partials(lambda x: jnp.log(x / (1 - x)), lambda _, x: 1 / (x * (1 - x)))


@lowers(aten.frexp.Tensor)
def _frexp(outs: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(working_dtype(x.dtype))
    _, exponent = jnp.frexp(lax.stop_gradient(x))
    half = -exponent // 2  # in two factors, as one power of two may be too large or too small
    mantissa = x * jnp.exp2(half.astype(x.dtype)) * jnp.exp2((-exponent - half).astype(x.dtype))
    return jnp.where(jnp.isfinite(x), mantissa, x), exponent


@lowers(aten._conj.default, aten._conj_physical.default)
def _conj(out: jax.ShapeDtypeStruct, x: jax.Array) -> jax.Array:
    return jnp.conj(x)


@lowers(aten._neg_view.default)
def _neg_view(out: jax.ShapeDtypeStruct, x: jax.Array) -> jax.Array:
    return -x


@lowers(aten.view_as_real.default)
def _view_as_real(out: jax.ShapeDtypeStruct, x: jax.Array) -> jax.Array:
    return jnp.stack([jnp.real(x), jnp.imag(x)], axis=-1)


@lowers(aten.view_as_complex.default)
def _view_as_complex(out: jax.ShapeDtypeStruct, x: jax.Array) -> jax.Array:
    return lax.complex(x[..., 0], x[..., 1])
