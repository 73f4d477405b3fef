"""Elementwise functions of one tensor."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import absolute, operands, with_partials, working_dtype
from jaxmeta_bridge.aten.registry import lowers

_aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, 1, jnp.where(x < 0, -1, jnp.zeros_like(x)))  # 0 for NaN, unlike JAX


# Computed in the dtype of the result: where torch makes floats of integers, before the function.
_FUNCTIONS: dict[Any, Callable[[jax.Array], jax.Array]] = {
    _aten.acos: jnp.arccos,
    _aten.acosh: jnp.arccosh,
    _aten.asin: jnp.arcsin,
    _aten.asinh: jnp.arcsinh,
    _aten.atan: jnp.arctan,
    _aten.atanh: with_partials(jnp.arctanh, lambda _, x: 1 / (1 - x * x)),
    _aten.bitwise_not: jnp.invert,
    _aten.ceil: jnp.ceil,
    _aten.cos: jnp.cos,
    _aten.cosh: jnp.cosh,
    _aten.deg2rad: jnp.deg2rad,
    _aten.exp: jnp.exp,
    _aten.exp2: jnp.exp2,
    _aten.expm1: jnp.expm1,
    _aten.floor: jnp.floor,
    _aten.frac: lambda x: x - jnp.trunc(x),
    _aten.log: jnp.log,
    _aten.log10: jnp.log10,
    _aten.log1p: jnp.log1p,
    _aten.log2: jnp.log2,
    _aten.neg: jnp.negative,
    _aten.rad2deg: jnp.rad2deg,
    _aten.reciprocal: jnp.reciprocal,
    _aten.round: jnp.round,
    _aten.rsqrt: with_partials(lax.rsqrt, lambda y, _: -0.5 * y * y * y),
    _aten.sigmoid: lax.logistic,
    _aten.sign: _sign,
    _aten.sin: jnp.sin,
    _aten.sinh: jnp.sinh,
    _aten.sqrt: jnp.sqrt,
    _aten.tan: jnp.tan,
    _aten.tanh: jnp.tanh,
    _aten.trunc: jnp.trunc,
}

# Computed in the dtype of the input.
_PREDICATES: dict[Any, Callable[[jax.Array], jax.Array]] = {
    _aten.isinf: jnp.isinf,
    _aten.isnan: jnp.isnan,
    _aten.isneginf: jnp.isneginf,
    _aten.isposinf: jnp.isposinf,
    _aten.logical_not: jnp.logical_not,
    _aten.signbit: jnp.signbit,
}


def _lower_function(function: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    def lowering(out: _Out, x: jax.Array) -> jax.Array:
        return function(*operands(out, x))

    return lowering


def _lower_predicate(function: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    def lowering(out: _Out, x: jax.Array) -> jax.Array:
        return function(x)

    return lowering


for _op, _function in _FUNCTIONS.items():
    lowers(_op.default)(_lower_function(_function))
for _op, _function in _PREDICATES.items():
    lowers(_op.default)(_lower_predicate(_function))


@lowers(_aten.abs.default)
def _abs(out: _Out, x: jax.Array) -> jax.Array:
    return absolute(x)


@lowers(_aten.angle.default)
def _angle(out: _Out, x: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(x):
        x = lax.stop_gradient(x.astype(out.dtype))
        return jnp.where(jnp.isnan(x), x, jnp.where(x < 0, jnp.pi, 0))
    # Neither value nor gradient is defined at zero; torch gives zero for both.
    zero = x == 0
    safe = jnp.where(zero, 1, x)
    return jnp.where(zero, lax.stop_gradient(jnp.angle(x)), jnp.angle(safe))


@lowers(_aten.sgn.default)
def _sgn(out: _Out, x: jax.Array) -> jax.Array:
    if not jnp.iscomplexobj(x):
        return _sign(x)
    zero = x == 0
    safe = jnp.where(zero, 1, x)
    return jnp.where(zero, 0, safe / jnp.abs(safe))


@lowers(_aten.round.decimals)
def _round_decimals(out: _Out, x: jax.Array, *, decimals: int) -> jax.Array:
    (x,) = operands(out, x)
    scale = 10.0 ** abs(decimals)
    return jnp.round(x * scale) / scale if decimals >= 0 else jnp.round(x / scale) * scale


@lowers(_aten.nan_to_num.default)
def _nan_to_num(
    out: _Out,
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


@lowers(_aten.logit.default)
def _logit(out: _Out, x: jax.Array, eps: float | None = None) -> jax.Array:
    (x,) = operands(out, x)
    if eps is not None:  # `where`, so that the gradient at the bounds is one-sided as in torch
        x = jnp.where(x < eps, eps, jnp.where(x > 1 - eps, 1 - eps, x))
    return _log_odds(x)


_log_odds = with_partials(lambda x: jnp.log(x / (1 - x)), lambda _, x: 1 / (x * (1 - x)))


@lowers(_aten.frexp.Tensor)
def _frexp(outs: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(working_dtype(x.dtype))
    _, exponent = jnp.frexp(lax.stop_gradient(x))
    half = -exponent // 2  # in two factors, as one power of two may be too large or too small
    mantissa = x * jnp.exp2(half.astype(x.dtype)) * jnp.exp2((-exponent - half).astype(x.dtype))
    return jnp.where(jnp.isfinite(x), mantissa, x), exponent


@lowers(_aten._conj.default, _aten._conj_physical.default)
def _conj(out: _Out, x: jax.Array) -> jax.Array:
    return jnp.conj(x)


@lowers(_aten._neg_view.default)
def _neg_view(out: _Out, x: jax.Array) -> jax.Array:
    return -x


@lowers(_aten.view_as_real.default)
def _view_as_real(out: _Out, x: jax.Array) -> jax.Array:
    return jnp.stack([jnp.real(x), jnp.imag(x)], axis=-1)


@lowers(_aten.view_as_complex.default)
def _view_as_complex(out: _Out, x: jax.Array) -> jax.Array:
    return lax.complex(x[..., 0], x[..., 1])
