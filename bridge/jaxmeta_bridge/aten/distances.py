"""Distances between all pairs of rows; their gradient at distance zero is zero, not NaN."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import absolute
from jaxmeta_bridge.aten.registry import lowers

aten: Any = torch.ops.aten


@lowers(aten._cdist_forward.default)
def _cdist(
    out: jax.ShapeDtypeStruct, x: jax.Array, y: jax.Array, p: float, mode: int | None
) -> jax.Array:
    return _norm(x[..., :, None, :] - y[..., None, :, :], p)


@lowers(aten._pdist_forward.default)
def _pdist(out: jax.ShapeDtypeStruct, x: jax.Array, p: float = 2) -> jax.Array:
    first, second = np.triu_indices(x.shape[0], k=1)
    return _norm(x[first] - x[second], p)


@lowers(aten._euclidean_dist.default)
def _euclidean_distance(out: jax.ShapeDtypeStruct, x: jax.Array, y: jax.Array) -> jax.Array:
    """By one matrix product, as torch does for many rows; the differences would not fit."""
    squares = jnp.sum(x * x, -1)[..., :, None] + jnp.sum(y * y, -1)[..., None, :]
    return _root(squares - 2 * jnp.matmul(x, jnp.swapaxes(y, -1, -2)), 2)


def _norm(difference: jax.Array, p: float) -> jax.Array:
    """The p-norm over the last axis, with torch's derivatives."""
    size = absolute(difference)
    if p == 0:
        return jnp.sum(size != 0, -1).astype(size.dtype)
    if p == 1:
        return jnp.sum(size, -1)
    if p == 2:
        return _root(jnp.sum(difference * difference, -1), 2)
    if np.isinf(p):
        return _maximum(size)
    nonzero = size != 0
    powers = jnp.where(nonzero, jnp.where(nonzero, size, 1) ** p, 0)
    return _root(jnp.sum(powers, -1), p)


def _root(x: jax.Array, p: float) -> jax.Array:
    """`x ** (1 / p)` for x > 0, else zero with zero derivatives."""
    positive = x > 0
    safe = jnp.where(positive, x, 1)
    return jnp.where(positive, jnp.sqrt(safe) if p == 2 else safe ** (1 / p), 0)


def _maximum(size: jax.Array) -> jax.Array:
    """The largest entry, whose gradient all entries that tie receive in full."""
    if size.shape[-1] == 0:
        return jnp.zeros(size.shape[:-1], size.dtype)
    largest = lax.stop_gradient(jnp.max(size, -1, keepdims=True))
    changes = jnp.where(size == largest, size - lax.stop_gradient(size), 0)
    return largest[..., 0] + jnp.sum(changes, -1)
