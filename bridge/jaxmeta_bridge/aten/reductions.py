"""Sums, products, extrema, moments and logical reductions.

Along several axes or all of them; what picks one entry along one axis is in `ordering`.
Sums of half precision are taken in float32, as in torch.
"""

import math

import jax
import jax.numpy as jnp
import torch

from jaxmeta_bridge.aten.axes import Dims, axes, axis
from jaxmeta_bridge.aten.operands import working_dtype
from jaxmeta_bridge.aten.registry import lowers
from jaxmeta_bridge.aten.ties import picked, shared

_aten = torch.ops.aten
_Out = jax.ShapeDtypeStruct
_Outs = tuple[jax.ShapeDtypeStruct, ...]


def _wide(out: _Out, x: jax.Array) -> jax.Array:
    """`x` in the dtype in which torch adds up."""
    return x.astype(working_dtype(out.dtype))


@lowers(_aten.sum.default, _aten.sum.dim_IntList)
def _sum(out: _Out, x: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
    return jnp.sum(_wide(out, x), axes(dim, x)).reshape(out.shape)


@lowers(_aten.nansum.default)
def _nansum(out: _Out, x: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
    return _sum(out, jnp.where(jnp.isnan(x), 0, x), dim)


@lowers(_aten.mean.default, _aten.mean.dim)
def _mean(out: _Out, x: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
    return jnp.mean(_wide(out, x), axes(dim, x)).reshape(out.shape)


# The derivative of JAX's product is itself made of products, hence exact where entries are zero.
@lowers(_aten.prod.default, _aten.prod.dim_int)
def _prod(out: _Out, x: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
    return jnp.prod(_wide(out, x), axes(dim, x)).reshape(out.shape)


@lowers(_aten.trace.default)
def _trace(out: _Out, x: jax.Array) -> jax.Array:
    return jnp.trace(_wide(out, x))


# Extrema. amax and amin share the derivative among equal entries, and so do the full max and min;
# max.dim and min.dim give it to the one entry that they pick.


@lowers(_aten.amax.default)
def _amax(out: _Out, x: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
    return shared(jnp.max(x, axes(dim, x)), x, axes(dim, x)).reshape(out.shape)


@lowers(_aten.amin.default)
def _amin(out: _Out, x: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
    return shared(jnp.min(x, axes(dim, x)), x, axes(dim, x)).reshape(out.shape)


@lowers(_aten.aminmax.default)
def _aminmax(
    out: _Outs, x: jax.Array, dim: int | None = None, keepdim: bool = False
) -> tuple[jax.Array, jax.Array]:
    return _amin(out[0], x, dim), _amax(out[1], x, dim)


@lowers(_aten.max.default)
def _full_max(out: _Out, x: jax.Array) -> jax.Array:
    return shared(jnp.max(x), x, axes(None, x), nan_shares=True)


@lowers(_aten.min.default)
def _full_min(out: _Out, x: jax.Array) -> jax.Array:
    return shared(jnp.min(x), x, axes(None, x), nan_shares=True)


@lowers(_aten.max.dim)
def _max(out: _Outs, x: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    x = jnp.atleast_1d(x)
    return picked(out, x, jnp.argmax(x, axis(dim, x), keepdims=True), axis(dim, x))


@lowers(_aten.min.dim)
def _min(out: _Outs, x: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    x = jnp.atleast_1d(x)
    return picked(out, x, jnp.argmin(x, axis(dim, x), keepdims=True), axis(dim, x))


@lowers(_aten.argmax.default)
def _argmax(out: _Out, x: jax.Array, dim: int | None = None, keepdim: bool = False) -> jax.Array:
    x = x.ravel() if dim is None else jnp.atleast_1d(x)
    return jnp.argmax(x, axis(dim or 0, x)).reshape(out.shape)


@lowers(_aten.argmin.default)
def _argmin(out: _Out, x: jax.Array, dim: int | None = None, keepdim: bool = False) -> jax.Array:
    x = x.ravel() if dim is None else jnp.atleast_1d(x)
    return jnp.argmin(x, axis(dim or 0, x)).reshape(out.shape)


# Moments.


def square_root(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 instead of infinity where `x` is zero."""
    zero = x == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, x)))


def _var_mean(x: jax.Array, dim: Dims, correction: float | None) -> tuple[jax.Array, jax.Array]:
    """Variance and mean with the reduced axes kept."""
    over = axes(dim, x)
    x = x.astype(working_dtype(x.dtype))
    count = math.prod(x.shape[a] for a in over)
    freedom = max(count - (1 if correction is None else correction), 0)
    mean = jnp.mean(x, over, keepdims=True)
    squares = jnp.square(jnp.real(x - mean))
    if jnp.iscomplexobj(x):
        squares = squares + jnp.square(jnp.imag(x - mean))
    return jnp.sum(squares, over, keepdims=True) / freedom, mean


@lowers(_aten.var.correction)
def _var(
    out: _Out,
    x: jax.Array,
    dim: Dims = None,
    correction: float | None = None,
    keepdim: bool = False,
) -> jax.Array:
    return _var_mean(x, dim, correction)[0].reshape(out.shape)


@lowers(_aten.std.correction)
def _std(
    out: _Out,
    x: jax.Array,
    dim: Dims = None,
    correction: float | None = None,
    keepdim: bool = False,
) -> jax.Array:
    return square_root(_var_mean(x, dim, correction)[0]).reshape(out.shape)


@lowers(_aten.var_mean.correction)
def _var_and_mean(
    out: _Outs,
    x: jax.Array,
    dim: Dims = None,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[jax.Array, jax.Array]:
    var, mean = _var_mean(x, dim, correction)
    return var.reshape(out[0].shape), mean.reshape(out[1].shape)


@lowers(_aten.std_mean.correction)
def _std_and_mean(
    out: _Outs,
    x: jax.Array,
    dim: Dims = None,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[jax.Array, jax.Array]:
    var, mean = _var_and_mean(out, x, dim, correction)
    return square_root(var), mean


@lowers(_aten.logsumexp.default)
def _logsumexp(out: _Out, x: jax.Array, dim: Dims, keepdim: bool = False) -> jax.Array:
    x, over = _wide(out, x), axes(dim, x)
    top = jax.lax.stop_gradient(jnp.max(x.real, over, keepdims=True, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0)  # else inf - inf
    total = jnp.sum(jnp.exp(x - top), over, keepdims=True)
    return (jnp.log(total) + top).reshape(out.shape)


# Logical reductions. Along an empty list of dims they reduce nothing.


@lowers(_aten.all.default, _aten.all.dim, _aten.all.dims)
def _all(out: _Out, x: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
    over = () if dim == [] else axes(dim, x)
    return jnp.all(x != 0, over).reshape(out.shape)


@lowers(_aten.any.default, _aten.any.dim, _aten.any.dims)
def _any(out: _Out, x: jax.Array, dim: Dims = None, keepdim: bool = False) -> jax.Array:
    over = () if dim == [] else axes(dim, x)
    return jnp.any(x != 0, over).reshape(out.shape)


@lowers(_aten.count_nonzero.default, _aten.count_nonzero.dim_IntList)
def _count_nonzero(out: _Out, x: jax.Array, dim: Dims = None) -> jax.Array:
    return jnp.sum(x != 0, axes(dim, x), dtype=out.dtype)
