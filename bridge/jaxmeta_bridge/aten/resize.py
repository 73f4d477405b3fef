"""Interpolation to another size, one spatial dimension after the other.

Along one dimension an interpolation is a product with a small matrix that is known in advance. As
a product it is fast in both directions, where gathering has a slow scatter for a derivative.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import working_dtype
from jaxmeta_bridge.aten.registry import lowers
from jaxmeta_bridge.errors import UnsupportedOpError

aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct


def _spatial(out: _Out, x: jax.Array, scales: Sequence[float | None]) -> list[tuple[int, float]]:
    """Each spatial axis, and how far apart in the input two neighbouring outputs are."""
    scales = (*scales, *[None] * (x.ndim - 2 - len(scales)))
    return [
        (axis, 1 / scale if scale is not None and scale > 0 else x.shape[axis] / out.shape[axis])
        for axis, scale in enumerate(scales, start=2)
    ]


# The nearest entry.


def _nearest(offset: float) -> Callable[..., jax.Array]:
    def lowering(
        out: _Out, x: jax.Array, output_size: Sequence[int], *scales: float | None
    ) -> jax.Array:
        for axis, step in _spatial(out, x, scales):
            size, factor = x.shape[axis], out.shape[axis] // x.shape[axis]
            # In float32 as torch, because rounding decides between neighbours.
            positions = (np.arange(out.shape[axis], dtype=np.float32) + np.float32(offset)) * (
                np.float32(step)
            )
            indices = np.minimum(np.floor(positions).astype(int), size - 1)
            if np.array_equal(indices, np.repeat(np.arange(size), factor)):
                x = jnp.repeat(x, factor, axis)
            else:
                x = jnp.take(x, indices, axis, mode="clip")
        return x

    return lowering


lowers(
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
)(_nearest(0.0))
lowers(
    aten._upsample_nearest_exact1d.default,
    aten._upsample_nearest_exact2d.default,
    aten._upsample_nearest_exact3d.default,
)(_nearest(0.5))


# Weighted sums of neighbours. A filter gives the weight of an entry by its distance.


def _triangle(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(distance), 0)


def _cubic(a: float) -> Callable[[np.ndarray], np.ndarray]:
    """The cubic convolution kernel of Keys (1981)."""

    def kernel(distance: np.ndarray) -> np.ndarray:
        d = np.abs(distance)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = a * (((d - 5) * d + 8) * d - 4)
        return np.where(d <= 1, near, np.where(d < 2, far, 0))

    return kernel


def _positions(size: int, count: int, step: float, align_corners: bool) -> np.ndarray:
    """Where in the input each output lies."""
    if align_corners:
        return np.arange(count) * ((size - 1) / (count - 1) if count > 1 else 0.0)
    return (np.arange(count) + 0.5) * step - 0.5


def _edge_weights(
    kernel: Callable[[np.ndarray], np.ndarray], reach: int, size: int, positions: np.ndarray
) -> np.ndarray:
    """Weights "output input"; entries beyond the edge are those of the edge."""
    weights = np.zeros((len(positions), size))
    first = np.floor(positions).astype(int)
    for tap in range(1 - reach, reach + 1):
        neighbour = np.clip(first + tap, 0, size - 1)
        np.add.at(weights, (np.arange(len(positions)), neighbour), kernel(positions - first - tap))
    return weights


def _antialiasing_weights(
    kernel: Callable[[np.ndarray], np.ndarray], reach: int, size: int, count: int, step: float
) -> np.ndarray:
    """Weights "output input" of a kernel as wide as the outputs are apart, cut at the edges."""
    width = max(step, 1.0)
    centers = (np.arange(count) + 0.5)[:, None] * step
    entries = np.arange(size)[None, :]
    inside = (entries >= np.trunc(centers - reach * width + 0.5)) & (
        entries < np.trunc(centers + reach * width + 0.5)
    )
    weights = np.where(inside, kernel((entries - centers + 0.5) / width), 0)
    return weights / weights.sum(1, keepdims=True)


def _apply(x: jax.Array, axis: int, weights: np.ndarray) -> jax.Array:
    # These are no layer's weights, which accelerators may round: the result would be coarse.
    product = jnp.tensordot(
        x, jnp.asarray(weights, x.dtype), [[axis], [1]], precision=lax.Precision.HIGHEST
    )
    return jnp.moveaxis(product, -1, axis)


def _interpolate(
    kernel: Callable[[np.ndarray], np.ndarray], reach: int, antialias: bool
) -> Callable[..., jax.Array]:
    def lowering(
        out: _Out,
        x: jax.Array,
        output_size: Sequence[int],
        align_corners: bool,
        *scales: float | None,
    ) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise UnsupportedOpError(
                f"interpolation between entries of {x.dtype}, which torch rounds in a way of its "
                "own. Convert to float before, or resize to the nearest."
            )
        x = x.astype(working_dtype(x.dtype))
        for axis, step in _spatial(out, x, scales):
            size, count = x.shape[axis], out.shape[axis]
            if size == count and not antialias:
                continue
            if antialias:
                if align_corners:
                    step = (size - 1) / (count - 1) if count > 1 else 0.0
                weights = _antialiasing_weights(kernel, reach, size, count, step)
            else:
                positions = _positions(size, count, step, align_corners)
                weights = _edge_weights(kernel, reach, size, positions)
            x = _apply(x, axis, weights)
        return x

    return lowering


lowers(
    aten.upsample_linear1d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_trilinear3d.default,
)(_interpolate(_triangle, 1, antialias=False))
lowers(aten.upsample_bicubic2d.default)(_interpolate(_cubic(-0.75), 2, antialias=False))
lowers(aten._upsample_bilinear2d_aa.default)(_interpolate(_triangle, 1, antialias=True))
lowers(aten._upsample_bicubic2d_aa.default)(_interpolate(_cubic(-0.5), 2, antialias=True))
