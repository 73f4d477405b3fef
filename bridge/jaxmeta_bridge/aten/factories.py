"""Tensors made from nothing, filled or copied, and conversions of dtype."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from jaxmeta_bridge.aten.registry import lowers
from jaxmeta_bridge.dtypes import TO_TORCH

_aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct


# What torch leaves uninitialised is zero here.
@lowers(
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_permuted.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
    _aten.new_zeros.default,
    _aten.zero.default,
    _aten.zeros.default,
    _aten.zeros_like.default,
)
def _zeros(out: _Out, *args: Any) -> jax.Array:
    return jnp.zeros(out.shape, out.dtype)


@lowers(_aten.new_ones.default, _aten.ones.default, _aten.ones_like.default)
def _ones(out: _Out, *args: Any) -> jax.Array:
    return jnp.ones(out.shape, out.dtype)


@lowers(_aten.full.default, _aten.full_like.default, _aten.fill.Scalar, _aten.fill.Tensor)
def _full(out: _Out, _: Any, value: Any) -> jax.Array:
    return jnp.full(out.shape, value, out.dtype)


@lowers(_aten.new_full.default)
def _new_full(out: _Out, _: Any, size: Any, value: Any) -> jax.Array:
    return jnp.full(out.shape, value, out.dtype)


@lowers(_aten.scalar_tensor.default)
def _scalar_tensor(out: _Out, value: Any) -> jax.Array:
    return jnp.asarray(value, out.dtype)


@lowers(_aten.eye.default, _aten.eye.m)
def _eye(out: _Out, *args: Any) -> jax.Array:
    return jnp.eye(*out.shape, dtype=out.dtype)


@lowers(_aten._to_copy.default, _aten.lift_fresh.default)
def _to_copy(out: _Out, x: jax.Array) -> jax.Array:
    # The interpreter casts, but JAX refuses to drop an imaginary part, as torch does.
    real = jnp.iscomplexobj(x) and not jnp.issubdtype(out.dtype, jnp.complexfloating)
    return jnp.real(x) if real else x


def _from_torch(op: Any) -> Callable[..., jax.Array]:
    """Sequences that do not depend on a tensor: torch itself computes them, to the last bit."""

    def lowering(out: _Out, *args: Any) -> jax.Array:
        values = op(*args, dtype=TO_TORCH[out.dtype])
        widened = values.double() if values.is_floating_point() else values  # for bfloat16
        return jnp.asarray(widened.numpy(), out.dtype)

    return lowering


for _op in (
    _aten.arange.default,
    _aten.arange.start,
    _aten.arange.start_step,
    _aten.bartlett_window.default,
    _aten.bartlett_window.periodic,
    _aten.blackman_window.default,
    _aten.blackman_window.periodic,
    _aten.hamming_window.default,
    _aten.hamming_window.periodic,
    _aten.hamming_window.periodic_alpha,
    _aten.hamming_window.periodic_alpha_beta,
    _aten.hann_window.default,
    _aten.hann_window.periodic,
    _aten.kaiser_window.beta,
    _aten.kaiser_window.default,
    _aten.kaiser_window.periodic,
    _aten.linspace.default,
    _aten.logspace.default,
    _aten.range.default,
    _aten.range.step,
    _aten.tril_indices.default,
    _aten.triu_indices.default,
):
    lowers(_op)(_from_torch(_op))
