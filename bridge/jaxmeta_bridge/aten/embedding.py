"""Rows of a table picked by index, alone or reduced over bags."""

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import working_dtype
from jaxmeta_bridge.aten.registry import lowers
from jaxmeta_bridge.errors import UnsupportedOpError

aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct


@lowers(aten.embedding.default)
def _embedding(
    out: _Out,
    weight: jax.Array,
    indices: jax.Array,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> jax.Array:
    _refuse_options(scale_grad_by_freq, sparse)
    rows = _rows(weight, indices)
    padding = (indices == padding_idx)[..., None]
    return rows if padding_idx < 0 else jnp.where(padding, lax.stop_gradient(rows), rows)


def _rows(weight: jax.Array, indices: jax.Array) -> jax.Array:
    """Where torch raises for an index outside of the table, the row is NaN."""
    return weight.at[indices].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def _refuse_options(scale_grad_by_freq: bool, sparse: bool) -> None:
    for name, value in (("scale_grad_by_freq", scale_grad_by_freq), ("sparse", sparse)):
        if value:
            raise UnsupportedOpError(
                f"an embedding has {name}=True, which changes its gradient in a way that is no "
                f"derivative of what it computes. Construct it with {name}=False."
            )


_SUM, _MEAN = 0, 1


@lowers(aten._embedding_bag.default, aten._embedding_bag_forward_only.default)
def _embedding_bag(
    out: tuple[_Out, ...],
    weight: jax.Array,
    indices: jax.Array,
    offsets: jax.Array,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: jax.Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[jax.Array, None, None, None]:
    """Sums, means or maxima of rows; bag `i` has the indices from `offsets[i]` on."""
    _refuse_options(scale_grad_by_freq, sparse)
    bags = out[0].shape[0]
    bag = jnp.searchsorted(offsets[:bags], jnp.arange(len(indices)), side="right") - 1
    if include_last_offset:  # indices from the last offset on are in no bag
        bag = jnp.where(jnp.arange(len(indices)) < offsets[-1], bag, bags)
    if padding_idx >= 0:
        bag = jnp.where(indices == padding_idx, bags, bag)
    rows = _rows(weight, indices).astype(working_dtype(weight.dtype))
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None].astype(rows.dtype)
    if mode not in (_SUM, _MEAN):
        return _maximum(rows, bag, bags), None, None, None
    result = jax.ops.segment_sum(rows, bag, bags)
    if mode == _MEAN:
        counts = jax.ops.segment_sum(jnp.ones(len(indices), rows.dtype), bag, bags)
        result = result / jnp.maximum(counts, 1)[:, None]
    return result, None, None, None


def _maximum(rows: jax.Array, bag: jax.Array, bags: int) -> jax.Array:
    """The largest entries of each bag; the first of equal ones gets the gradient."""
    count = len(rows)
    fixed = lax.stop_gradient(rows)
    largest = jax.ops.segment_max(fixed, bag, bags)
    positions = jnp.arange(count)[:, None]
    is_largest = fixed == largest.at[bag].get(mode="fill", fill_value=0)
    first = jax.ops.segment_min(jnp.where(is_largest, positions, count), bag, bags)
    picked = jnp.take_along_axis(rows, jnp.minimum(first, count - 1), axis=0)
    return jnp.where(first < count, picked, 0)  # an empty bag is zero
