"""Sliding windows: where each output position of a convolution or a pooling looks."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclass(frozen=True)
class Windows:
    """The geometry of windows over `size`, one entry for each spatial axis."""

    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False

    @property
    def output(self) -> tuple[int, ...]:
        """How many windows there are along each axis, by torch's rule."""
        return tuple(self._count(axis) for axis in range(len(self.size)))

    def _count(self, axis: int) -> int:
        size, stride, padding = self.size[axis], self.stride[axis], self.padding[axis]
        room = size + 2 * padding - self.dilation[axis] * (self.kernel[axis] - 1) - 1
        count = (-(-room // stride) if self.ceil_mode else room // stride) + 1
        # A last window that starts in the right padding is dropped.
        return count - 1 if self.ceil_mode and (count - 1) * stride >= size + padding else count

    def taps(self, x: jax.Array, fill: float | int) -> Iterator[jax.Array]:
        """For each kernel position, the elements `(..., *output)` of `x` that stand under it."""
        lead = x.ndim - len(self.size)
        spans = self._spans()
        edges = [
            (padding, span - size - padding, 0)
            for padding, span, size in zip(self.padding, spans, self.size, strict=True)
        ]
        padded = lax.pad(x, jnp.asarray(fill, x.dtype), [(0, 0, 0)] * lead + edges)
        for position in itertools.product(*map(range, self.kernel)):
            start = [k * d for k, d in zip(position, self.dilation, strict=True)]
            stop = [
                first + (count - 1) * stride + 1
                for first, count, stride in zip(start, self.output, self.stride, strict=True)
            ]
            yield lax.slice(
                padded, [0] * lead + start, [*x.shape[:lead], *stop], [1] * lead + [*self.stride]
            )

    def _spans(self) -> list[int]:
        axes = zip(self.output, self.stride, self.kernel, self.dilation, strict=True)
        return [(count - 1) * s + (k - 1) * d + 1 for count, s, k, d in axes]

    def positions(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each kernel position: flat indices into the plane, and where they lie inside."""
        starts = [
            np.arange(count) * stride - padding
            for count, stride, padding in zip(self.output, self.stride, self.padding, strict=True)
        ]
        for position in itertools.product(*map(range, self.kernel)):
            yield plane_indices(
                [s + k * d for s, k, d in zip(starts, position, self.dilation, strict=True)],
                self.size,
            )


def plane_indices(
    coordinates: Sequence[np.ndarray], size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices into a plane of `size` of the grid of coordinates, and which are inside."""
    grid = np.meshgrid(*coordinates, indexing="ij")
    inside = np.ones(grid[0].shape, bool)
    flat = np.zeros(grid[0].shape, np.int64)
    for axis, length in zip(grid, size, strict=True):
        inside &= (axis >= 0) & (axis < length)
        flat = flat * length + np.clip(axis, 0, max(length - 1, 0))
    return flat, inside
