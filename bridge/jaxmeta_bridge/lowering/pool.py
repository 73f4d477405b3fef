"""Pooling over windows, with torch's choice of the first maximum.

`lax.reduce_window` and `jnp.max` share the gradient among equal maxima; torch sends it to the
first one, and after a ReLU equal zeros are common. Selecting tap by tap does the same, and XLA's
CPU backend runs it, and its derivatives, as plain elementwise code.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmeta_bridge.lowering.windows import Windows, plane_indices

Taps = Iterable[tuple[jax.Array, np.ndarray, np.ndarray]]


def max_pool(
    x: jax.Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[jax.Array, jax.Array]:
    """The first maximum of each window, and its flat index in the plane.

    Args:
      x: (..., *spatial), as many spatial axes as `kernel` has entries.
      kernel: the size of a window, one number for each spatial axis.
      stride: from window to window, likewise.
      padding: on both sides, likewise; never chosen.
      dilation: from element to element of a window, likewise.
      ceil_mode: round the number of windows up.
    """
    windows = _windows(x, kernel, stride, padding, dilation, ceil_mode)
    taps = zip(windows.taps(x, 0), windows.positions(), strict=True)
    return _first_maximum((tap, flat, inside) for tap, (flat, inside) in taps)


def avg_pool(
    x: jax.Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> jax.Array:
    """The sum of each window over its size, or over `divisor_override`.

    Args:
      x: (..., *spatial), as many spatial axes as `kernel` has entries.
      kernel: the size of a window, one number for each spatial axis.
      stride: from window to window, likewise.
      padding: zeros on both sides, likewise.
      ceil_mode: round the number of windows up.
      count_include_pad: count the padding as part of the window.
      divisor_override: divides instead of the window's size.
    """
    windows = _windows(x, kernel, stride, padding, [1] * len(kernel), ceil_mode)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total = functools.reduce(jnp.add, (tap.astype(wide) for tap in windows.taps(x, 0)))
    if divisor_override is not None:
        return (total / divisor_override).astype(x.dtype)
    sizes = jnp.asarray(_window_sizes(windows, count_include_pad), wide)
    return (total / sizes).astype(x.dtype)


def adaptive_avg_pool(x: jax.Array, output_size: Sequence[int]) -> jax.Array:
    """Averages over windows that divide each axis into `output_size` parts, as even as can be."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    result = x.astype(wide)
    for axis, count in zip(range(-len(output_size), 0), output_size, strict=True):
        first, last = _parts(x.shape[axis], count)
        position = np.arange(x.shape[axis])
        inside = (position >= first[:, None]) & (position < last[:, None])
        share = (inside / np.maximum(last - first, 1)[:, None]).astype(wide)
        result = jnp.moveaxis(jnp.moveaxis(result, axis, -1) @ share.T, -1, axis)
    return result.astype(x.dtype)


def adaptive_max_pool(x: jax.Array, output_size: Sequence[int]) -> tuple[jax.Array, jax.Array]:
    """The first maximum of windows that divide each axis into `output_size` parts."""
    axes = range(x.ndim - len(output_size), x.ndim)
    size = [x.shape[axis] for axis in axes]
    parts = [_parts(length, count) for length, count in zip(size, output_size, strict=True)]
    widths = [int((last - first).max(initial=0)) for first, last in parts]

    def taps() -> Taps:
        for offset in itertools.product(*map(range, widths)):
            coordinates = [first + o for (first, _), o in zip(parts, offset, strict=True)]
            within = [c < last for c, (_, last) in zip(coordinates, parts, strict=True)]
            flat, inside = plane_indices(coordinates, size)
            tap = x
            for axis, c, length in zip(axes, coordinates, size, strict=True):
                tap = jnp.take(tap, np.minimum(c, length - 1), axis=axis)
            yield tap, flat, inside & functools.reduce(np.logical_and.outer, within)

    return _first_maximum(taps())


def _first_maximum(taps: Taps) -> tuple[jax.Array, jax.Array]:
    value, index, found = None, None, None
    for tap, flat, inside in taps:
        if value is None or index is None or found is None:
            value, index, found = tap, jnp.broadcast_to(flat, tap.shape), inside
            continue
        better = ((tap > value) | jnp.isnan(tap) | ~found) & inside
        value = jnp.where(better, tap, value)
        index = jnp.where(better, flat, index)
        found = found | inside
    assert value is not None and index is not None
    return value, index


def _windows(
    x: jax.Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Windows:
    size = x.shape[x.ndim - len(kernel) :]
    return Windows(size, (*kernel,), (*stride,), (*padding,), (*dilation,), ceil_mode)


def _window_sizes(windows: Windows, count_include_pad: bool) -> np.ndarray:
    """How many elements each window counts: torch counts padding, but nothing beyond it."""
    sizes = np.ones(())
    for size, count, kernel, stride, padding in zip(
        windows.size, windows.output, windows.kernel, windows.stride, windows.padding, strict=True
    ):
        first = np.arange(count) * stride - padding
        last = np.minimum(first + kernel, size + padding)
        if not count_include_pad:
            first, last = np.maximum(first, 0), np.minimum(last, size)
        sizes = np.multiply.outer(sizes, last - first)
    return sizes


def _parts(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each of `count` parts of an axis begins and ends; they may share an element."""
    index = np.arange(count)
    return index * length // count, -(-(index + 1) * length // count)
