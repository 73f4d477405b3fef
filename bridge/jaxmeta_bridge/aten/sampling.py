"""Sampling images at given points (grid_sample).

Derivatives follow torch at the special points: none by the coordinate where it is clipped, and none
by rounding.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import working_dtype
from jaxmeta_bridge.aten.registry import lowers

aten: Any = torch.ops.aten
_BILINEAR, _NEAREST, _BICUBIC = range(3)
_ZEROS, _BORDER, _REFLECTION = range(3)


@lowers(aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def _grid_sample(
    out: jax.ShapeDtypeStruct,
    x: jax.Array,
    grid: jax.Array,
    interpolation: int,
    padding: int,
    align_corners: bool,
) -> jax.Array:
    """`x` "batch channel *size" at `grid` "batch *points dimension", which lists x before y."""
    x, grid = x.astype(working_dtype(x.dtype)), grid.astype(working_dtype(grid.dtype))
    sizes = x.shape[2:]
    points = grid.reshape(grid.shape[0], -1, len(sizes))[..., ::-1]
    coordinates = [_to_pixels(points[..., d], size, align_corners) for d, size in enumerate(sizes)]
    if interpolation == _BICUBIC:
        taps = [
            _cubic_taps(c, size, padding, align_corners)
            for c, size in zip(coordinates, sizes, strict=True)
        ]
    else:
        coordinates = [
            _inside(c, size, padding, align_corners)
            for c, size in zip(coordinates, sizes, strict=True)
        ]
        find = _nearest_tap if interpolation == _NEAREST else _linear_taps
        taps = [find(c) for c in coordinates]
    total = jnp.zeros((*x.shape[:2], points.shape[1]), x.dtype)
    for corner in itertools.product(*taps):
        weight = jnp.ones_like(coordinates[0])
        for _, tap_weight in corner:
            weight = weight * tap_weight
        total = total + _entries(x, [index for index, _ in corner]) * weight[:, None]
    return total.reshape(out.shape)


_Tap = tuple[jax.Array, jax.Array]  # coordinates that are whole numbers, and their weight


def _linear_taps(coordinate: jax.Array) -> list[_Tap]:
    below = lax.stop_gradient(jnp.floor(coordinate))
    part = coordinate - below
    return [(below, 1 - part), (below + 1, part)]


def _nearest_tap(coordinate: jax.Array) -> list[_Tap]:
    return [(lax.stop_gradient(jnp.round(coordinate)), jnp.ones_like(coordinate))]


def _cubic_taps(
    coordinate: jax.Array, size: int, padding: int, align_corners: bool, a: float = -0.75
) -> list[_Tap]:
    """Four neighbours, each brought inside by itself, weighted by Keys' kernel (1981)."""
    below = lax.stop_gradient(jnp.floor(coordinate))
    part = coordinate - below

    def near(d: jax.Array) -> jax.Array:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: jax.Array) -> jax.Array:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    weights = [far(part + 1), near(part), near(1 - part), far(2 - part)]
    return [
        (_inside(below + step, size, padding, align_corners), weight)
        for step, weight in zip((-1, 0, 1, 2), weights, strict=True)
    ]


def _entries(x: jax.Array, indices: list[jax.Array]) -> jax.Array:
    """The entries "batch channel point" at whole coordinates; zero outside of the image."""
    flat, exists = jnp.zeros(indices[0].shape, jnp.int32), jnp.ones(indices[0].shape, bool)
    for index, size in zip(indices, x.shape[2:], strict=True):
        exists &= (index >= 0) & (index < size)
        flat = flat * size + jnp.clip(index, 0, size - 1).astype(jnp.int32)
    picked = jnp.take_along_axis(
        x.reshape(*x.shape[:2], -1), flat[:, None], axis=-1, mode="promise_in_bounds"
    )
    return jnp.where(exists[:, None], picked, 0)


def _to_pixels(coordinate: jax.Array, size: int, align_corners: bool) -> jax.Array:
    """From -1 ... 1 to 0 ... size - 1, at the centers of the outer pixels or at their edges."""
    if align_corners:
        return (coordinate + 1) / 2 * (size - 1)
    return ((coordinate + 1) * size - 1) / 2


def _inside(coordinate: jax.Array, size: int, padding: int, align_corners: bool) -> jax.Array:
    """What the padding mode makes of a coordinate outside of the image."""
    if padding == _ZEROS:
        return coordinate
    if padding == _REFLECTION:
        low, span = (0.0, size - 1.0) if align_corners else (-0.5, float(size))
        coordinate = _reflect(coordinate, low, span)
    clipped = lax.stop_gradient(jnp.clip(coordinate, 0, size - 1))
    return jnp.where((coordinate > 0) & (coordinate < size - 1), coordinate, clipped)


def _reflect(coordinate: jax.Array, low: float, span: float) -> jax.Array:
    """The coordinate folded into the interval from `low` on, of length `span`."""
    if span == 0:
        return jnp.zeros_like(coordinate)
    distance = jnp.where(coordinate < low, low - coordinate, coordinate - low)
    flips = lax.stop_gradient(jnp.floor(distance / span))
    rest = distance - flips * span
    return jnp.where(flips % 2 == 0, rest, span - rest) + low
