"""How torch prepares the operands of an elementwise operation, and derivatives given by formula."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.custom_derivatives import SymbolicZero

from jaxmeta_bridge.dtypes import NARROWED, TO_JAX, TO_TORCH, x64_enabled

_HALVES = (jnp.float16, jnp.bfloat16)


def working_dtype(dtype: Any) -> np.dtype[Any]:
    """The dtype in which torch computes: half precision is rounded only once, at the end."""
    return np.dtype(jnp.float32) if dtype in _HALVES else np.dtype(dtype)


def operands(out: jax.ShapeDtypeStruct, *values: Any, exact: bool = False) -> list[jax.Array]:
    """Arrays and Python numbers as arrays of the dtype in which the result is computed.

    Args:
      out: the result.
      values: arrays of any dtype, and numbers.
      exact: do not round numbers to half precision first, where the result has it; torch does so
        in some operations (`x + 0.1`) and not in others (`x * 0.1`).
    """
    dtype = working_dtype(out.dtype)
    number_dtype = dtype if exact else out.dtype
    return [
        jnp.asarray(value, dtype)
        if isinstance(value, jax.Array)
        else _as_array(value, number_dtype).astype(dtype)
        for value in values
    ]


def common(*values: Any) -> list[jax.Array]:
    """The two operands of a comparison in the dtype to which torch promotes them."""
    return [_as_array(value, result_dtype(*values)) for value in values]


def _as_array(value: Any, dtype: np.dtype[Any]) -> jax.Array:
    if isinstance(value, int):  # JAX refuses what torch wraps around: -3 as uint8
        value = np.asarray(value).astype(dtype)
    return jnp.asarray(value, dtype)


def result_dtype(*values: Any) -> np.dtype[Any]:
    """`torch.result_type`: Python numbers and 0-d tensors do not widen others of their kind."""
    first, second = (
        torch.empty((1,) * value.ndim, dtype=TO_TORCH[value.dtype], device="meta")
        if isinstance(value, jax.Array)
        else value
        for value in values
    )
    dtype = torch.result_type(first, second)
    return TO_JAX[dtype if x64_enabled() else NARROWED.get(dtype, dtype)]


def absolute(x: jax.Array) -> jax.Array:
    """The absolute value, whose gradient at zero is zero as in torch; JAX's is one."""
    if jnp.iscomplexobj(x):
        zero = x == 0
        return jnp.where(zero, 0, jnp.abs(jnp.where(zero, 1, x)))
    return jnp.where(x < 0, -x, jnp.where(x > 0, x, jnp.abs(jax.lax.stop_gradient(x))))


def with_partials(
    function: Callable[..., jax.Array], *partials: Callable[..., jax.Array] | None
) -> Callable[..., jax.Array]:
    """`function` with torch's own partial derivatives, themselves differentiable.

    For where JAX's rule differs from torch's at special points or loses accuracy.

    Args:
      function: elementwise, of float or complex arrays of one dtype; broadcasts its arguments.
      partials: for each argument `partial(result, *arguments)`, elementwise; None where torch
        defines the derivative as zero. A partial that uses `result` is differentiated through it.
    """

    @jax.custom_jvp
    def wrapped(*arguments: jax.Array) -> jax.Array:
        return function(*arguments)

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
        result = wrapped(*primals)
        terms = [
            partial(result, *primals) * tangent
            for partial, tangent in zip(partials, tangents, strict=True)
            # An absent tangent must not meet an infinite partial: 0 * inf is NaN.
            if partial is not None and not isinstance(tangent, SymbolicZero)
        ]
        return result, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(result)

    wrapped.defjvp(jvp, symbolic_zeros=True)

    def call(*arguments: jax.Array) -> jax.Array:
        return wrapped(*jnp.broadcast_arrays(*arguments))

    return call
