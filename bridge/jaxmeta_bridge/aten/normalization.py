"""Normalisation: softmax, and layer, group and batch norm.

Half precision is normalised in float32 and rounded once, as torch's kernels do. The mean and scale
that torch returns beside the output are for its own use and have no derivative.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import working_dtype
from jaxmeta_bridge.aten.registry import lowers

aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct
_Outs = tuple[_Out, ...]


def _working(x: jax.Array) -> jax.Array:
    return x.astype(working_dtype(x.dtype))


# Softmax. torch gives a 0-d tensor one dimension, of length 1.


@lowers(aten._softmax.default)
def _softmax(out: _Out, x: jax.Array, dim: int, half_to_float: bool) -> jax.Array:
    return jax.nn.softmax(jnp.atleast_1d(_working(x)), axis=dim).reshape(out.shape)


@lowers(aten._log_softmax.default)
def _log_softmax(out: _Out, x: jax.Array, dim: int, half_to_float: bool) -> jax.Array:
    return jax.nn.log_softmax(jnp.atleast_1d(_working(x)), axis=dim).reshape(out.shape)


@lowers(aten._safe_softmax.default)
def _safe_softmax(out: _Out, x: jax.Array, dim: int, dtype: Any = None) -> jax.Array:
    x = x.astype(working_dtype(out.dtype))
    return safe_softmax(jnp.atleast_1d(x), dim).reshape(out.shape)


def safe_softmax(x: jax.Array, axis: int) -> jax.Array:
    """Softmax, with zeros where all is minus infinity (attention that may look nowhere)."""
    nowhere = jnp.all(x == -jnp.inf, axis=axis, keepdims=True)
    return jnp.where(nowhere, 0, jax.nn.softmax(jnp.where(nowhere, 0, x), axis=axis))


# Layers. `axes` are those over which the statistics go.


def _statistics(x: jax.Array, axes: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance, with the axes kept."""
    mean = jnp.mean(x, axis=axes, keepdims=True)
    return mean, jnp.mean(jnp.square(x - mean), axis=axes, keepdims=True)


def _affine(x: jax.Array, weight: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    if weight is not None:
        x = x * _working(weight)
    return x if bias is None else x + _working(bias)


def _per_channel(vector: jax.Array, ndim: int) -> jax.Array:
    """The vector along axis 1 of so many."""
    return _working(vector).reshape([-1 if axis == 1 else 1 for axis in range(ndim)])


def _channel_affine(x: jax.Array, weight: jax.Array | None, bias: jax.Array | None) -> jax.Array:
    return _affine(x, *(None if v is None else _per_channel(v, x.ndim) for v in (weight, bias)))


@lowers(aten.native_layer_norm.default)
def _layer_norm(
    out: _Outs,
    x: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None,
    bias: jax.Array | None,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x = _working(x)
    mean, variance = _statistics(x, range(x.ndim - len(normalized_shape), x.ndim))
    scale = lax.rsqrt(variance + eps)
    return _affine((x - mean) * scale, weight, bias), *lax.stop_gradient((mean, scale))


@lowers(aten.native_group_norm.default)
def _group_norm(
    out: _Outs,
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    batch: int,
    channels: int,
    positions: int,
    groups: int,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    grouped = _working(x).reshape(batch, groups, channels // groups * positions)
    mean, variance = _statistics(grouped, [2])
    scale = lax.rsqrt(variance + eps)
    normalized = ((grouped - mean) * scale).reshape(x.shape)
    y = _channel_affine(normalized, weight, bias)
    return y, *lax.stop_gradient((mean[..., 0], scale[..., 0]))


def _batch_norm_training(
    x: jax.Array, weight: jax.Array | None, bias: jax.Array | None, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Output, mean, inverse deviation, and the unbiased variance."""
    x = _working(x)
    axes = [axis for axis in range(x.ndim) if axis != 1]
    mean, variance = _statistics(x, axes)
    scale = lax.rsqrt(variance + eps)
    y = _channel_affine((x - mean) * scale, weight, bias)
    count = math.prod(x.shape[axis] for axis in axes)
    unbiased = variance * (count / max(count - 1, 1))
    return y, *lax.stop_gradient((mean.ravel(), scale.ravel(), unbiased.ravel()))


@lowers(aten._native_batch_norm_legit_no_training.default)
def _batch_norm_inference(
    out: _Outs,
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    running_mean: jax.Array,
    running_var: jax.Array,
    momentum: float,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    mean, variance = (_per_channel(vector, x.ndim) for vector in (running_mean, running_var))
    y = _channel_affine((_working(x) - mean) * lax.rsqrt(variance + eps), weight, bias)
    return y, jnp.zeros(out[1].shape), jnp.zeros(out[2].shape)


@lowers(aten._native_batch_norm_legit.no_stats)
def _batch_norm_without_running(
    out: _Outs,
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[jax.Array, ...]:
    return _batch_norm_training(x, weight, bias, eps)[:3]


@lowers(aten._native_batch_norm_legit_functional.default)
def _batch_norm(
    out: _Outs,
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    running_mean: jax.Array | None,
    running_var: jax.Array | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[jax.Array | None, ...]:
    """The last two results are the new running statistics."""
    if not training:
        assert running_mean is not None and running_var is not None
        results = _batch_norm_inference(
            out, x, weight, bias, running_mean, running_var, momentum, eps
        )
        return *results, running_mean, running_var
    y, mean, scale, variance = _batch_norm_training(x, weight, bias, eps)
    means = _moved(running_mean, mean, momentum)
    return y, mean, scale, means, _moved(running_var, variance, momentum)


def _moved(old: jax.Array | None, new: jax.Array, momentum: float) -> jax.Array | None:
    """The running average; like torch's, it has no derivative."""
    if old is None:
        return None
    return lax.stop_gradient((1 - momentum) * _working(old) + momentum * new)
