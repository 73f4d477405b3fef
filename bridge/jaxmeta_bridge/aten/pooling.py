"""Pooling, and its undoing; the spatial axes come last."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch

from jaxmeta_bridge.aten.registry import lowers
from jaxmeta_bridge.lowering.pool import (
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    max_pool,
)

aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct
_Outs = tuple[_Out, ...]


def _bind_pools(rank: int, max_op: Any, avg_op: Any) -> None:
    """Registers the pools over the last `rank` axes."""

    def per_axis(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(values) * rank if len(values) == 1 else tuple(values)

    @lowers(max_op)
    def _max(
        out: _Outs,
        x: jax.Array,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        ceil_mode: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        kernel, stride = per_axis(kernel_size), per_axis(stride or kernel_size)
        return max_pool(x, kernel, stride, per_axis(padding), per_axis(dilation), ceil_mode)

    @lowers(avg_op)
    def _avg(
        out: _Out,
        x: jax.Array,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> jax.Array:
        kernel, stride = per_axis(kernel_size), per_axis(stride or kernel_size)
        return avg_pool(
            x, kernel, stride, per_axis(padding), ceil_mode, count_include_pad, divisor_override
        )


# Pools over one axis arrive as pools over two.
_bind_pools(2, aten.max_pool2d_with_indices.default, aten.avg_pool2d.default)
_bind_pools(3, aten.max_pool3d_with_indices.default, aten.avg_pool3d.default)


@lowers(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)
def _adaptive_avg(out: _Out, x: jax.Array, output_size: Sequence[int]) -> jax.Array:
    return adaptive_avg_pool(x, tuple(output_size))


@lowers(aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def _adaptive_max(
    out: _Outs, x: jax.Array, output_size: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    return adaptive_max_pool(x, tuple(output_size))


@lowers(aten.max_unpool2d.default)
def _max_unpool2d(
    out: _Out, x: jax.Array, indices: jax.Array, output_size: Sequence[int]
) -> jax.Array:
    return _max_unpool(out, x, indices, rank=2)


@lowers(aten.max_unpool3d.default)
def _max_unpool3d(
    out: _Out,
    x: jax.Array,
    indices: jax.Array,
    output_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> jax.Array:
    return _max_unpool(out, x, indices, rank=3)


def _max_unpool(out: _Out, x: jax.Array, indices: jax.Array, rank: int) -> jax.Array:
    images = math.prod(x.shape[:-rank])
    pixels = math.prod(out.shape[-rank:])
    x, indices = x.reshape(images, -1), indices.reshape(images, -1)
    return _place(x, indices, jnp.zeros((images, pixels), x.dtype)).reshape(out.shape)


@jax.custom_jvp
def _place(x: jax.Array, indices: jax.Array, zeros: jax.Array) -> jax.Array:
    """Entries written at their index in each row; the last of those with one index stays."""
    return zeros.at[jnp.arange(len(zeros))[:, None], indices].set(x)


@_place.defjvp
def _place_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Every entry gets the gradient of its place, as in torch, also where another one stayed."""
    x, indices, zeros = primals
    rows = jnp.arange(len(zeros))[:, None]
    return _place(x, indices, zeros), zeros.at[rows, indices].add(tangents[0])
