"""torch's `dim` arguments as axes of JAX arrays.

To torch a 0-d tensor has a dimension 0 of length 1: lowerings along one axis take `at_least_1d`
of their operands, and give results the shape that torch has.
"""

from collections.abc import Sequence

import jax
import numpy as np

Dims = int | Sequence[int] | None
Subscript = tuple[slice | jax.Array | np.ndarray, ...]


def axis(dim: int, array: jax.Array) -> int:
    """The axis of `array` that `dim` means."""
    return dim % max(array.ndim, 1)


def axes(dim: Dims, array: jax.Array) -> tuple[int, ...]:
    """The axes of `array` that `dim` means; an absent or empty `dim` means all of them."""
    dims = [dim] if isinstance(dim, int) else dim
    if not dims or array.ndim == 0:
        return tuple(range(array.ndim))
    return tuple(axis(d, array) for d in dims)


def at(axis: int, index: slice | jax.Array | np.ndarray) -> Subscript:
    """The subscript that indexes `axis` and takes the axes before and after it whole."""
    return (*[slice(None)] * axis, index)
