"""Where NaN or infinity first appears in an inner loop (``debug=True``)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmeta.errors import NonFiniteError
from jaxmeta.trees import PyTree, named_leaves


def flag_step(loss: jax.Array, gradient: PyTree, new_params: PyTree) -> jax.Array:
    """Say for each thing in :func:`labels` whether any entry of it is NaN or infinite."""
    watched = [loss, *jax.tree.leaves(gradient), *jax.tree.leaves(new_params)]
    return jnp.stack([~jnp.all(jnp.isfinite(values)) for values in watched])


def labels(params: PyTree) -> tuple[str, ...]:
    """Names of what :func:`flag_step` watches, in the order in which a step computes it."""
    names = [name for name, _ in named_leaves("params", params)]
    return (
        "the loss",
        *(f"the gradient of {name}" for name in names),
        *(f"{name} after its update" for name in names),
    )


def raise_first(flags: jax.Array, watched: tuple[str, ...]) -> None:
    """Raise NonFiniteError for the first flag that is set, now or when the flags are known.

    Under ``jit`` the flags are known only while the compiled program runs. A callback raises
    there, and JAX hands it on as ``jax.errors.JaxRuntimeError`` with our message in its text.

    Args:
        flags: bool[step, watched].
        watched: the names from :func:`labels`.
    """
    check = functools.partial(_raise_first, watched)
    if isinstance(flags, Tracer):
        jax.debug.callback(check, flags)
    else:
        check(flags)


def _raise_first(watched: tuple[str, ...], flags: jax.Array) -> None:
    steps, columns = np.nonzero(np.asarray(flags))
    if len(steps):
        raise NonFiniteError(
            f"inner step {steps[0]} of {len(flags)} (counted from 0): "
            f"{watched[columns[0]]} is the first value that is NaN or infinite. Look there for a "
            "division by zero, the square root or logarithm of zero, an overflow, or a learning "
            "rate that is too large."
        )
