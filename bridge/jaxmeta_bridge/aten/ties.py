"""Whose derivative it is when several entries are equal."""

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

import jaxmeta_bridge.leaves  # noqa: F401  (defines the operation)
from jaxmeta_bridge.aten.registry import lowers

_ops: Any = torch.ops.jaxmeta_bridge


@jax.custom_jvp
def _nothing(proxy: jax.Array) -> jax.Array:
    """Zeros, differentiated as if they were `proxy`."""
    return jnp.zeros_like(proxy)


@_nothing.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _nothing(*primals), tangents[0]


def with_derivative_of(value: jax.Array, proxy: jax.Array) -> jax.Array:
    """`value`, differentiated as if it were `proxy` (same shape and dtype).

    `_nothing` alone would say it, but inside of `lax.scan` JAX forgets the rule of a `custom_jvp`
    when derivatives are differentiated again. The difference needs no rule, and finite numbers.
    """
    fixed = lax.stop_gradient(proxy)
    nothing = jnp.where(jnp.isfinite(fixed), proxy - fixed, _nothing(proxy))
    return lax.stop_gradient(value) + nothing


@lowers(_ops.with_derivative_of.default)
def _lower_with_derivative_of(
    out: jax.ShapeDtypeStruct, value: jax.Array, proxy: jax.Array
) -> jax.Array:
    return with_derivative_of(value, proxy)


def shared(
    value: jax.Array, x: jax.Array, axes: tuple[int, ...], nan_shares: bool = False
) -> jax.Array:
    """`value`, picked from `x` along `axes`; its derivative is shared by all entries equal to it.

    If it is NaN, `nan_shares` decides whether all NaNs share it; else it is NaN, as in torch.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return value
    expanded = jnp.expand_dims(value, axes)
    equal = x == expanded
    if nan_shares:
        equal = equal | (jnp.isnan(x) & jnp.isnan(expanded))
    count = equal.sum(axes, keepdims=True)
    # Said outright, since XLA computes `equal * ...` as a choice, which hides the NaN of 0 / 0.
    weights = jnp.where(count == 0, jnp.nan, equal / count).astype(x.dtype)
    return with_derivative_of(value, (x * weights).sum(axes))


def picked(
    out: tuple[jax.ShapeDtypeStruct, ...], x: jax.Array, index: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    """Entries of `x` at positions `index` along `axis`, and `index`, in the shapes of `out`.

    The derivative goes to these entries alone, whatever else is equal to them.
    """
    values = jnp.take_along_axis(x, index, axis, mode="promise_in_bounds")
    return values.reshape(out[0].shape), index.reshape(out[1].shape)
