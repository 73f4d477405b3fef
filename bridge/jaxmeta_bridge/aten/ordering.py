"""Sorting, order statistics, cumulative operations and search.

Operations that pick entries give all of the derivative to the ones picked. Which of several equal
entries torch picks is undefined, except for stable sorts; here it is the first, and the order of
equal entries is kept. NaN counts as larger than any number.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch

from jaxmeta_bridge.aten.axes import at, axes, axis
from jaxmeta_bridge.aten.operands import with_partials, working_dtype
from jaxmeta_bridge.aten.registry import lowers
from jaxmeta_bridge.aten.ties import picked, shared
from jaxmeta_bridge.errors import UnsupportedOpError

_aten = torch.ops.aten
_Out = jax.ShapeDtypeStruct
_Outs = tuple[jax.ShapeDtypeStruct, ...]
_Pair = tuple[jax.Array, jax.Array]


@lowers(_aten.sort.default)
def _sort(out: _Outs, x: jax.Array, dim: int = -1, descending: bool = False) -> _Pair:
    x = jnp.atleast_1d(x)
    along = axis(dim, x)
    return picked(out, x, jnp.argsort(x, along, stable=True, descending=descending), along)


@lowers(_aten.sort.stable)
def _sort_stable(
    out: _Outs,
    x: jax.Array,
    *,
    stable: bool | None = None,
    dim: int = -1,
    descending: bool = False,
) -> _Pair:
    return _sort(out, x, dim, descending)


@lowers(_aten.topk.default)
def _topk(
    out: _Outs, x: jax.Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> _Pair:
    x = jnp.atleast_1d(x)
    along = axis(dim, x)
    if largest and x.dtype != bool:
        index = jnp.moveaxis(jax.lax.top_k(jnp.moveaxis(x, along, -1), k)[1], -1, along)
    else:
        index = jnp.argsort(x, along, stable=True, descending=largest)[at(along, slice(k))]
    return picked(out, x, index, along)


# Order statistics.


@lowers(_aten.kthvalue.default)
def _kthvalue(out: _Outs, x: jax.Array, k: int, dim: int = -1, keepdim: bool = False) -> _Pair:
    x = jnp.atleast_1d(x)
    along = axis(dim, x)
    index = jnp.argsort(x, along, stable=True)[at(along, slice(k - 1, k))]
    return picked(out, x, index, along)


def _median_index(x: jax.Array, along: int, skip_nan: bool) -> jax.Array:
    """Where the lower median is; unless they are skipped, a NaN is the median."""
    order = jnp.argsort(x, along, stable=True)
    numbers = jnp.sum(~jnp.isnan(x), along, keepdims=True)
    if not skip_nan:
        place = jnp.where(numbers == x.shape[along], (x.shape[along] - 1) // 2, numbers)
    else:
        place = jnp.maximum(numbers - 1, 0) // 2
    return jnp.take_along_axis(order, place, along)


@lowers(_aten.median.dim)
def _median_dim(out: _Outs, x: jax.Array, dim: int = -1, keepdim: bool = False) -> _Pair:
    x = jnp.atleast_1d(x)
    return picked(out, x, _median_index(x, axis(dim, x), skip_nan=False), axis(dim, x))


@lowers(_aten.nanmedian.dim)
def _nanmedian_dim(out: _Outs, x: jax.Array, dim: int = -1, keepdim: bool = False) -> _Pair:
    x = jnp.atleast_1d(x)
    return picked(out, x, _median_index(x, axis(dim, x), skip_nan=True), axis(dim, x))


def _full_median(x: jax.Array, skip_nan: bool) -> jax.Array:
    """Over all entries; the derivative is shared by those equal to it."""
    if x.size == 0:
        return jnp.full((), jnp.nan)
    flat = x.ravel()
    value = flat[_median_index(flat, 0, skip_nan)[0]]
    return shared(value, x, axes(None, x), nan_shares=True)


@lowers(_aten.median.default)
def _median(out: _Out, x: jax.Array) -> jax.Array:
    return _full_median(x, skip_nan=False)


@lowers(_aten.nanmedian.default)
def _nanmedian(out: _Out, x: jax.Array) -> jax.Array:
    return _full_median(x, skip_nan=True)


@lowers(_aten.mode.default)
def _mode(out: _Outs, x: jax.Array, dim: int = -1, keepdim: bool = False) -> _Pair:
    """The smallest of the most frequent values, at its last place."""
    x = jnp.atleast_1d(x)
    along = axis(dim, x)
    order = jnp.argsort(x, along, stable=True)
    values = jnp.moveaxis(jnp.take_along_axis(x, order, along), along, 0)
    place = jnp.arange(len(values)).reshape((-1,) + (1,) * (x.ndim - 1))
    starts = jnp.concatenate([jnp.ones_like(values[:1], bool), values[1:] != values[:-1]])
    run = place - jax.lax.cummax(jnp.where(starts, place, 0), 0)
    last = jnp.moveaxis(jnp.argmax(run, 0, keepdims=True), 0, along)
    return picked(out, x, jnp.take_along_axis(order, last, along), along)


# Cumulative operations. JAX takes the derivative of the products through products, hence exactly
# where entries are zero.


@lowers(_aten.cumsum.default)
def _cumsum(out: _Out, x: jax.Array, dim: int) -> jax.Array:
    x = jnp.atleast_1d(x).astype(working_dtype(out.dtype))
    return jax.lax.cumsum(x, axis(dim, x)).reshape(out.shape)


@lowers(_aten.cumprod.default)
def _cumprod(out: _Out, x: jax.Array, dim: int) -> jax.Array:
    x = jnp.atleast_1d(x).astype(working_dtype(out.dtype))
    return jax.lax.cumprod(x, axis(dim, x)).reshape(out.shape)


# JAX's derivative is wrong where an entry is infinite.
_logaddexp = with_partials(
    jnp.logaddexp,
    lambda _, x, y: jax.lax.logistic(x - y),
    lambda _, x, y: jax.lax.logistic(y - x),
)


@lowers(_aten.logcumsumexp.default)
def _logcumsumexp(out: _Out, x: jax.Array, dim: int) -> jax.Array:
    if jnp.iscomplexobj(x):
        raise UnsupportedOpError(
            f"logcumsumexp of {x.dtype}: the branch of the complex logarithm would differ from "
            "torch's. Use x.exp().cumsum(dim).log(), which takes the principal branch."
        )
    x = jnp.atleast_1d(x).astype(working_dtype(out.dtype))
    return jax.lax.associative_scan(_logaddexp, x, axis=axis(dim, x)).reshape(out.shape)


def _cumulative_extremum(
    out: _Outs, x: jax.Array, dim: int, extremum: Callable[[jax.Array, int], jax.Array]
) -> _Pair:
    """Of equal entries the latest is picked, of NaNs too."""
    x = jnp.atleast_1d(x)
    along = axis(dim, x)
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    running = extremum(x, along)
    place = jax.lax.broadcasted_iota(int, x.shape, along)
    newest = jnp.where((x == running) | jnp.isnan(x), place, 0)
    return picked(out, x, jax.lax.cummax(newest, along), along)


@lowers(_aten.cummax.default)
def _cummax(out: _Outs, x: jax.Array, dim: int) -> _Pair:
    return _cumulative_extremum(out, x, dim, jax.lax.cummax)


@lowers(_aten.cummin.default)
def _cummin(out: _Outs, x: jax.Array, dim: int) -> _Pair:
    return _cumulative_extremum(out, x, dim, jax.lax.cummin)


# Search in sorted boundaries.


@lowers(_aten.searchsorted.Tensor, _aten.searchsorted.Scalar)
def _searchsorted(
    out: _Out,
    boundaries: jax.Array,
    values: jax.Array | complex,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: jax.Array | None = None,
) -> jax.Array:
    """The last axis of `boundaries` is sorted; its other axes, if any, are those of `values`."""
    values = jnp.asarray(values)
    if sorter is not None:
        boundaries = jnp.take_along_axis(boundaries, sorter, -1)
    side = side or ("right" if right else "left")
    if boundaries.ndim == 1:
        return jnp.searchsorted(boundaries, values, side=side)
    search = functools.partial(jnp.searchsorted, side=side)
    for _ in range(boundaries.ndim - 1):
        search = jax.vmap(search)
    return search(boundaries, values)


@lowers(_aten.bucketize.Tensor, _aten.bucketize.Scalar)
def _bucketize(
    out: _Out,
    values: jax.Array | complex,
    boundaries: jax.Array,
    *,
    out_int32: bool = False,
    right: bool = False,
) -> jax.Array:
    return _searchsorted(out, boundaries, values, right=right)


@lowers(_aten.histc.default)
def _histc(out: _Out, x: jax.Array, bins: int = 100, min: float = 0, max: float = 0) -> jax.Array:
    """Counts in `bins` equal intervals; entries outside are not counted."""
    x = jax.lax.stop_gradient(x.ravel())
    low, high = jnp.asarray(min, x.dtype), jnp.asarray(max, x.dtype)
    if min == max and x.size:
        low, high = jnp.min(x), jnp.max(x)
    flat = low == high
    low, high = jnp.where(flat, low - 1, low), jnp.where(flat, high + 1, high)
    place = jnp.floor((x - low) * bins / (high - low)).astype(int)
    place = jnp.where(x == high, bins - 1, place)
    counted = (x >= low) & (x <= high)
    return jnp.zeros(bins, out.dtype).at[place].add(counted.astype(out.dtype))
