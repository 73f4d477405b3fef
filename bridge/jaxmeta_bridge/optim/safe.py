"""Arithmetic whose derivatives stay finite where an optimizer meets an exact zero."""

import jax
import jax.numpy as jnp
from jax import lax


def sqrt(x: jax.Array) -> jax.Array:
    """The square root, with every derivative 0 at 0, where the true ones are infinite.

    A moment is 0 where every gradient so far was, and infinity times the zero derivative of the
    squared gradient would be NaN. Below zero it is NaN, as it is in torch.
    """
    nonzero = x != 0
    return jnp.where(nonzero, jnp.sqrt(jnp.where(nonzero, x, 1)), 0)


@jax.custom_jvp
def power(base: jax.Array, count: jax.Array) -> jax.Array:
    """`base` to the power of a count of steps, of which JAX's second derivative at 0 is NaN."""
    return base**count


@power.defjvp
def _(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    base, count = primals
    return power(base, count), count * power(base, jnp.maximum(count - 1, 0)) * tangents[0]


def maximum(a: jax.Array | float, b: jax.Array | float) -> jax.Array:
    """The larger of two values, with the derivative of the second where they are equal.

    The derivative of `jnp.maximum` asks which operand equals the result. XLA may compute an operand
    a second time with another last bit, and then it finds neither.
    """
    return jnp.where((a > b) | (a != a), a, b)


def minimum(a: jax.Array | float, b: jax.Array | float) -> jax.Array:
    """The smaller of two values, like `maximum`."""
    return jnp.where((a < b) | (a != a), a, b)


def rounded(x: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`x` with its value rounded to what `dtype` can hold, and the derivative of no rounding."""
    kept = jnp.finfo(dtype)
    # XLA may drop a cast there and back; reduce_precision it keeps.
    return x + lax.stop_gradient(lax.reduce_precision(x, kept.nexp, kept.nmant) - x)
