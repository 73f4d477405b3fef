"""Losses. Reductions are numbered as in torch: 0 none, 1 mean, 2 sum."""

from typing import Any

import jax
import jax.numpy as jnp
import torch

from jaxmeta_bridge.aten.activations import softplus
from jaxmeta_bridge.aten.operands import absolute, operands, with_partials
from jaxmeta_bridge.aten.registry import lowers

_aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct
_MEAN, _SUM = 1, 2


def _reduce(losses: jax.Array, reduction: int) -> jax.Array:
    if reduction == _MEAN:
        return jnp.mean(losses)
    return jnp.sum(losses) if reduction == _SUM else losses


@lowers(_aten.mse_loss.default)
def _mse_loss(out: _Out, x: jax.Array, target: jax.Array, reduction: int = _MEAN) -> jax.Array:
    x, target = operands(out, x, target)
    return _reduce(jnp.square(x - target), reduction)


@lowers(_aten.smooth_l1_loss.default)
def _smooth_l1_loss(
    out: _Out, x: jax.Array, target: jax.Array, reduction: int = _MEAN, beta: float = 1.0
) -> jax.Array:
    x, target = operands(out, x, target)
    difference = x - target
    distance = absolute(difference)
    if beta == 0:
        return _reduce(distance, reduction)
    curve = 0.5 * difference * difference / beta
    return _reduce(jnp.where(distance < beta, curve, distance - 0.5 * beta), reduction)


@lowers(_aten.huber_loss.default)
def _huber_loss(
    out: _Out, x: jax.Array, target: jax.Array, reduction: int = _MEAN, delta: float = 1.0
) -> jax.Array:
    x, target = operands(out, x, target)
    difference = x - target
    distance = absolute(difference)
    curve, line = 0.5 * difference * difference, delta * (distance - 0.5 * delta)
    return _reduce(jnp.where(distance < delta, curve, line), reduction)


@lowers(_aten.soft_margin_loss.default)
def _soft_margin_loss(
    out: _Out, x: jax.Array, target: jax.Array, reduction: int = _MEAN
) -> jax.Array:
    x, target = operands(out, x, target)
    return _reduce(softplus(-target * x), reduction)


# torch bounds the logarithms of the loss by -100 and the denominators of its derivatives by 1e-12.
_bce_slope = with_partials(
    lambda x, t: (x - t) / jnp.maximum(x * (1 - x), 1e-12),
    lambda _, x, t: (x * x - 2 * x * t + t) / jnp.square((x + 1e-12) * (1 - x + 1e-12)),
    lambda _, x, t: -1 / jnp.maximum(x * (1 - x), 1e-12),
)
_bce = with_partials(
    lambda x, t: (t - 1) * jnp.maximum(jnp.log1p(-x), -100) - t * jnp.maximum(jnp.log(x), -100),
    lambda _, x, t: _bce_slope(x, t),
    lambda _, x, t: jnp.log(1 - x) - jnp.log(x),
)


@lowers(_aten.binary_cross_entropy.default)
def _binary_cross_entropy(
    out: _Out, x: jax.Array, target: jax.Array, weight: Any = None, reduction: int = _MEAN
) -> jax.Array:
    x, target = operands(out, x, target)
    losses = _bce(x, target)
    return _reduce(losses if weight is None else losses * weight, reduction)


@lowers(_aten.binary_cross_entropy_with_logits.default)
def _binary_cross_entropy_with_logits(
    out: _Out,
    x: jax.Array,
    target: jax.Array,
    weight: Any = None,
    pos_weight: Any = None,
    reduction: int = _MEAN,
) -> jax.Array:
    x, target = operands(out, x, target)
    positive = 1 if pos_weight is None else 1 + (pos_weight - 1) * target
    losses = (1 - target) * x + positive * softplus(-x)
    return _reduce(losses if weight is None else losses * weight, reduction)


def _picked(x: jax.Array, target: jax.Array, axis: int) -> jax.Array:
    """`x` at the target class of each position. A mask: its derivatives need no scatter."""
    classes = jnp.arange(x.shape[axis])
    classes = classes.reshape((-1,) + (1,) * (x.ndim - 1 - axis % x.ndim))
    chosen = jnp.sum(jnp.where(jnp.expand_dims(target, axis) == classes, x, 0), axis)
    # torch raises for a class that does not exist; compiled code can only return NaN.
    return jnp.where((target >= 0) & (target < x.shape[axis]), chosen, jnp.nan)


@lowers(_aten.nll_loss_forward.default, _aten.nll_loss2d_forward.default)
def _nll_loss(
    outs: Any,
    x: jax.Array,
    target: jax.Array,
    weight: Any,
    reduction: int,
    ignore_index: int,
) -> tuple[jax.Array, jax.Array]:
    (x,) = operands(outs[0], x)
    axis = 0 if x.ndim == 1 else 1
    ignored = target == ignore_index
    losses = jnp.where(ignored, 0, -_picked(x, jnp.where(ignored, 0, target), axis))
    weights = jnp.where(ignored, 0, jnp.ones_like(losses))
    if weight is not None:
        weights = weights * jnp.take(weight, target, mode="clip").astype(x.dtype)
        losses = losses * weights
    if reduction not in (_MEAN, _SUM):
        return losses, jnp.zeros(())
    total, total_weight = jnp.sum(losses), jnp.sum(weights)
    return (total / total_weight if reduction == _MEAN else total), total_weight


@lowers(_aten.multi_margin_loss.default)
def _multi_margin_loss(
    out: _Out,
    x: jax.Array,
    target: jax.Array,
    p: Any = 1,
    margin: Any = 1,
    weight: Any = None,
    reduction: int = _MEAN,
) -> jax.Array:
    (x,) = operands(out, jnp.atleast_1d(x))
    # A single sample comes without its axis.
    violation = margin - _picked(x, target.reshape(x.shape[:-1]), -1)[..., None] + x
    violation = jnp.where(violation > 0, violation if p == 1 else violation * violation, 0)
    classes = jnp.arange(x.shape[-1])
    losses = jnp.where(classes == target.reshape(*x.shape[:-1], 1), 0, violation)
    if weight is not None:
        losses = losses * weight[target].reshape(*x.shape[:-1], 1)
    return _reduce(jnp.mean(losses, -1), reduction)


@lowers(_aten.multilabel_margin_loss_forward.default)
def _multilabel_margin_loss(
    outs: Any, x: jax.Array, target: jax.Array, reduction: int
) -> tuple[jax.Array, jax.Array]:
    (x,), target = operands(outs[0], jnp.atleast_1d(x)), jnp.atleast_1d(target)
    counts = jnp.cumprod(target >= 0, axis=-1).astype(bool)  # labels end at the first -1
    labels = (target[..., None] == jnp.arange(x.shape[-1])) & counts[..., None]  # ... label class
    is_target = labels.any(-2)
    own = jnp.sum(jnp.where(labels, x[..., None, :], 0), -1)
    violation = 1 - own[..., None] + x[..., None, :]
    counted = counts[..., None] & ~is_target[..., None, :] & (violation > 0)
    losses = jnp.sum(jnp.where(counted, violation, 0), (-2, -1)) / x.shape[-1]
    return _reduce(losses, reduction), is_target
