"""Reading and writing entries at positions given by tensors.

At a position out of range torch raises, which compiled code cannot do: here such a read gives NaN
(the smallest integer, the largest unsigned one) and such a write is dropped. Negative positions
count from the end.

Of several values written to one position, which one stays is undefined, in torch too. Here it alone
gets the gradient. In torch all of them do, which torch's documentation calls incorrect.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxmeta_bridge.aten.axes import Subscript, at, axis
from jaxmeta_bridge.aten.registry import lowers
from jaxmeta_bridge.aten.ties import with_derivative_of
from jaxmeta_bridge.errors import ControlFlowError

_aten = torch.ops.aten
_Out = jax.ShapeDtypeStruct
_Segment = tuple[jax.Array, jax.Array]
_Indices = Sequence[jax.Array | None]


# x[i, :, j] and x[i, :, j] = values


@lowers(_aten.index.Tensor, _aten._unsafe_index.Tensor)
def _index(out: _Out, x: jax.Array, indices: _Indices) -> jax.Array:
    return x.at[_subscript(indices)].get(mode="fill").reshape(out.shape)


@lowers(_aten.index_put.default, _aten._unsafe_index_put.default)
def _index_put(
    out: _Out, x: jax.Array, indices: _Indices, values: jax.Array, accumulate: bool = False
) -> jax.Array:
    values = values.astype(out.dtype)
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    if len(given) == 1 and given[0][1].dtype in (jnp.bool_, jnp.uint8):
        ((before, mask),) = given
        return _mask_put(x, mask != 0, before, values, accumulate)
    target = x.at[_subscript(indices)]
    return _add(target, values) if accumulate else target.set(values)


def _add(target: Any, values: jax.Array) -> jax.Array:
    """Adds at `x.at[...]`; the sum of bools is "any of them"."""
    return target.max(values) if values.dtype == bool else target.add(values)


def _subscript(indices: _Indices) -> Subscript:
    if any(i is not None and i.dtype in (jnp.bool_, jnp.uint8) for i in indices):
        raise ControlFlowError(
            "a mask as one of several indices selects a number of entries that depends on values, "
            "and from_torch traces shapes only. Use torch.where, or index tensors of fixed length."
        )
    return tuple(slice(None) if index is None else index for index in indices)


def _mask_put(
    x: jax.Array, mask: jax.Array, before: int, values: jax.Array, accumulate: bool
) -> jax.Array:
    """Writes to the entries that `mask`, which covers axes from `before` on, selects.

    Shapes stay fixed although their number is unknown: each entry of `x` looks up the value that
    it would get. Too few values give NaN and too many are left over, where torch raises.
    """
    after = x.ndim - before - mask.ndim
    values = values.reshape((1,) * (before + 1 + after - values.ndim) + values.shape)
    if values.shape[before] == 1:  # one value for all
        values = jnp.expand_dims(values, tuple(range(before + 1, before + mask.ndim)))
    else:
        values = values.at[at(before, _rank(mask))].get(mode="fill")
    mask = mask.reshape((1,) * before + mask.shape + (1,) * after)
    return jnp.where(mask, jnp.add(x, values) if accumulate else values, x)


def _rank(mask: jax.Array) -> jax.Array:
    """How many entries are selected before each one."""
    return (jnp.cumsum(mask.ravel()) - 1).reshape(mask.shape)


# Masks of the shape of the result.


@lowers(_aten.masked_fill.Scalar, _aten.masked_fill.Tensor)
def _masked_fill(out: _Out, x: jax.Array, mask: jax.Array, value: complex | jax.Array) -> jax.Array:
    return jnp.where(mask, jnp.asarray(value, out.dtype), x)


@lowers(_aten.masked_scatter.default)
def _masked_scatter(out: _Out, x: jax.Array, mask: jax.Array, source: jax.Array) -> jax.Array:
    mask = jnp.broadcast_to(mask, out.shape)
    return jnp.where(mask, source.ravel().at[_rank(mask)].get(mode="fill"), x)


@lowers(_aten.nonzero_static.default)
def _nonzero_static(out: _Out, x: jax.Array, *, size: int, fill_value: int = -1) -> jax.Array:
    if 0 in out.shape or x.size == 0:
        return jnp.full(out.shape, fill_value)
    return jnp.stack(jnp.nonzero(x, size=size, fill_value=fill_value), -1)


# Flat positions.


@lowers(_aten.take.default)
def _take(out: _Out, x: jax.Array, index: jax.Array) -> jax.Array:
    return x.ravel().at[index].get(mode="fill")


@lowers(_aten.put.default)
def _put(
    out: _Out, x: jax.Array, index: jax.Array, source: jax.Array, accumulate: bool = False
) -> jax.Array:
    target, source = x.ravel().at[index.ravel()], source.ravel()
    return (_add(target, source) if accumulate else target.set(source)).reshape(out.shape)


# Slices along one axis.


def _along(x: jax.Array, dim: int, index: jax.Array) -> Subscript:
    return at(axis(dim, x), index.ravel())


@lowers(_aten.index_select.default)
def _index_select(out: _Out, x: jax.Array, dim: int, index: jax.Array) -> jax.Array:
    x = jnp.atleast_1d(x)
    return x.at[_along(x, dim, index)].get(mode="fill").reshape(out.shape)


@lowers(_aten.index_add.default)
def _index_add(
    out: _Out, x: jax.Array, dim: int, index: jax.Array, source: jax.Array, alpha: complex = 1
) -> jax.Array:
    x, source = jnp.atleast_1d(x, source)
    source = source * jnp.asarray(alpha, out.dtype)
    return _add(x.at[_along(x, dim, index)], source).reshape(out.shape)


@lowers(_aten.index_copy.default)
def _index_copy(
    out: _Out, x: jax.Array, dim: int, index: jax.Array, source: jax.Array
) -> jax.Array:
    x, source = jnp.atleast_1d(x, source)
    return x.at[_along(x, dim, index)].set(source).reshape(out.shape)


@lowers(_aten.index_fill.int_Scalar, _aten.index_fill.int_Tensor)
def _index_fill(
    out: _Out, x: jax.Array, dim: int, index: jax.Array, value: complex | jax.Array
) -> jax.Array:
    x = jnp.atleast_1d(x)
    hit = jnp.zeros(x.shape[axis(dim, x)], bool).at[index.ravel()].set(True)
    hit = hit.reshape((-1,) + (1,) * (x.ndim - axis(dim, x) - 1))
    return jnp.where(hit, jnp.asarray(value, out.dtype), x).reshape(out.shape)


@lowers(_aten.index_reduce.default)
def _index_reduce(
    out: _Out,
    x: jax.Array,
    dim: int,
    index: jax.Array,
    source: jax.Array,
    reduce: str,
    include_self: bool = True,
) -> jax.Array:
    x, source = jnp.atleast_1d(x, source)
    along = axis(dim, x)
    index = index.reshape((-1,) + (1,) * (x.ndim - along - 1))
    return _scatter_reduce(
        out, x, along, jnp.broadcast_to(index, source.shape), source, reduce, include_self
    )


# One position along one axis for each entry: out[i, j] = x[index[i, j], j] and the like. Along the
# other axes `index` may be shorter than `x` and `source`; what is beyond takes no part.


@lowers(_aten.gather.default)
def _gather(
    out: _Out, x: jax.Array, dim: int, index: jax.Array, sparse_grad: bool = False
) -> jax.Array:
    x, index = jnp.atleast_1d(x, index)
    if index.size == 0:
        return jnp.zeros(out.shape, out.dtype)
    along = axis(dim, x)
    part = tuple(slice(None) if a == along else slice(n) for a, n in enumerate(index.shape))
    return jnp.take_along_axis(x[part], index, along, mode="fill").reshape(out.shape)


def _grid(dim: int, index: jax.Array) -> Subscript:
    """The subscript of the entries that `index` names."""
    grid: list[jax.Array] = list(jnp.ogrid[tuple(slice(n) for n in index.shape)])
    grid[dim] = index
    return tuple(grid)


def _part(source: jax.Array, index: jax.Array) -> jax.Array:
    return source[tuple(slice(n) for n in index.shape)]


@lowers(_aten.scatter.src, _aten.scatter.reduce)
def _scatter(
    out: _Out,
    x: jax.Array,
    dim: int,
    index: jax.Array,
    source: jax.Array,
    reduce: str | None = None,
) -> jax.Array:
    if index.size == 0:
        return x
    x, index, source = jnp.atleast_1d(x, index, source)
    target, source = x.at[_grid(axis(dim, x), index)], _part(source, index)
    if reduce == "add":
        return _add(target, source).reshape(out.shape)
    return (target.multiply if reduce else target.set)(source).reshape(out.shape)


@lowers(_aten.scatter.value, _aten.scatter.value_reduce)
def _scatter_value(
    out: _Out,
    x: jax.Array,
    dim: int,
    index: jax.Array,
    value: complex,
    reduce: str | None = None,
) -> jax.Array:
    source = jnp.full(index.shape, value, out.dtype)
    return _scatter(out, x, dim, index, source, reduce=reduce)


@lowers(_aten.scatter_add.default)
def _scatter_add(
    out: _Out, x: jax.Array, dim: int, index: jax.Array, source: jax.Array
) -> jax.Array:
    return _scatter(out, x, dim, index, source, reduce="add")


@lowers(_aten.scatter_reduce.two)
def _scatter_reduce(
    out: _Out,
    x: jax.Array,
    dim: int,
    index: jax.Array,
    source: jax.Array,
    reduce: str,
    include_self: bool = True,
) -> jax.Array:
    if index.size == 0:
        return x
    x, index, source = jnp.atleast_1d(x, index, source)
    grid, source = _grid(axis(dim, x), index), _part(source, index)
    touched = jnp.zeros(x.shape, bool).at[grid].set(True)
    base = x if include_self else jnp.where(touched, _neutral(reduce, x.dtype), x)
    if reduce == "sum":
        result = _add(base.at[grid], source)
    elif reduce == "mean":
        count = jnp.where(touched, int(include_self), 1).at[grid].add(1)
        total = base.at[grid].add(source)
        result = total / count if jnp.issubdtype(x.dtype, jnp.inexact) else total // count
    elif reduce == "prod":
        result = base * _products(x.shape, axis(dim, x), index, source)
    else:
        result = _extremum(x, base, grid, source, reduce)
    return result.reshape(out.shape)


def _neutral(reduce: str, dtype: np.dtype) -> float | int:
    if reduce in ("sum", "mean"):
        return 0
    if reduce == "prod":
        return 1
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).min if reduce == "amax" else jnp.iinfo(dtype).max
    return -jnp.inf if reduce == "amax" else jnp.inf


def _extremum(
    x: jax.Array, base: jax.Array, grid: Subscript, source: jax.Array, reduce: str
) -> jax.Array:
    """Differentiated as in torch: shared by all that equal the result.

    Entries of `x` are counted among these even where `base` leaves them out.
    """
    value = base.at[grid].max(source) if reduce == "amax" else base.at[grid].min(source)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return value
    value = jax.lax.stop_gradient(value)
    chosen_x, chosen = x == value, source == value[grid]
    count = chosen_x.astype(int).at[grid].add(chosen.astype(int))
    total = jnp.where(chosen_x, base, 0).at[grid].add(jnp.where(chosen, source, 0))
    return with_derivative_of(value, total / count)


def _products(shape: tuple[int, ...], along: int, index: jax.Array, source: jax.Array) -> jax.Array:
    """The product of the entries of `source` that go to each position, 1 where none does.

    Sorted by position, a segmented scan multiplies those of each. Being made of products only, it
    has exact derivatives where entries are zero.
    """

    def multiply(left: _Segment, right: _Segment) -> _Segment:
        starts, product = right
        return left[0] | starts, jnp.where(starts, product, left[1] * product)

    order = jnp.argsort(index, along, stable=True)
    index = jnp.moveaxis(jnp.take_along_axis(index, order, along), along, 0)
    source = jnp.moveaxis(jnp.take_along_axis(source, order, along), along, 0)
    differs = index[1:] != index[:-1]
    edge = jnp.ones((1, *index.shape[1:]), bool)
    _, products = jax.lax.associative_scan(multiply, (jnp.concatenate([edge, differs]), source))
    # Only the last product of a segment is complete; the others go to no position.
    index = jnp.where(jnp.concatenate([differs, edge]), index, shape[along])
    ones = jnp.ones(shape, source.dtype)
    index, products = jnp.moveaxis(index, 0, along), jnp.moveaxis(products, 0, along)
    return ones.at[_grid(along, index)].set(products)
