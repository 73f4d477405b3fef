"""Checks of meta_unroll's arguments before anything is traced."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmeta.errors import ArgumentTypeError, ArgumentValueError
from jaxmeta.trees import (
    PyTree,
    describe,
    first_misfit,
    is_array,
    is_float,
    named_leaves,
    outline,
)


def check_params(params: PyTree) -> None:
    """Raise unless every leaf is a real floating-point array."""
    found = first_misfit("params", params, is_float)
    if found is not None:
        name, leaf = found
        raise ArgumentTypeError(
            f"{name} is {describe(leaf)}; meta_unroll differentiates params: pass floats, or "
            "close over it."
        )


def check_arrays(root: str, tree: PyTree) -> None:
    """Raise unless every leaf is something that JAX can compute with."""
    found = first_misfit(root, tree, is_array)
    if found is not None:
        name, leaf = found
        raise ArgumentTypeError(
            f"{name} is {describe(leaf)}; expected an array or a number: convert it, or close "
            "over it."
        )


def count_steps(batches: PyTree, batch: PyTree, num_steps: Any) -> int:
    """Return the number of inner steps that the three arguments agree on."""
    steps = None if num_steps is None else _check_num_steps(num_steps)
    if batches is not None and batch is not None:
        raise ArgumentValueError(
            "batches and batch are both given; pass batches for a batch a step, or batch for one "
            "batch that every step uses."
        )
    if not jax.tree.leaves(batches):
        if steps is None:
            raise ArgumentValueError(
                "the number of inner steps is unknown: pass batches with a leading step axis, or "
                "num_steps."
            )
        return steps
    found = _leading_axis(batches)
    if steps is not None and steps != found:
        raise ArgumentValueError(
            f"num_steps is {steps}, but batches have a leading axis of {found}, one batch a step. "
            "Leave num_steps out, or pass one batch that every step uses as batch=."
        )
    return found


def _check_num_steps(num_steps: Any) -> int:
    try:
        if isinstance(num_steps, bool):
            raise TypeError
        steps = operator.index(num_steps)
    except (TypeError, jax.errors.JAXTypeError):
        raise ArgumentTypeError(
            f"num_steps is {outline(num_steps)}; expected a Python int, known while tracing."
        ) from None
    if steps < 0:
        raise ArgumentValueError(f"num_steps is {steps}; expected zero or more.")
    return steps


def _leading_axis(batches: PyTree) -> int:
    found = first_misfit("batches", batches, lambda leaf: np.ndim(leaf) > 0)
    if found is not None:
        name, leaf = found
        raise ArgumentValueError(
            f"{name} is {describe(leaf)}; every leaf of batches needs a leading step axis. Pass "
            "one batch that every step uses as batch=, with num_steps."
        )
    sizes = [np.shape(leaf)[0] for leaf in jax.tree.leaves(batches)]
    if len(set(sizes)) > 1:
        names = [name for name, _ in named_leaves("batches", batches)]
        listed = ", ".join(f"{name} has {size}" for name, size in zip(names, sizes, strict=True))
        raise ArgumentValueError(
            f"the leading axis of batches is the inner step, and it differs: {listed}. Stack as "
            "many batches in every leaf; pass what all steps share by closing over it."
        )
    return sizes[0]


def check_key(key: Any) -> None:
    """Raise unless ``key`` is one random key, new style or old."""
    if key is None:
        return
    if isinstance(key, (jax.Array, np.ndarray)):
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ():
            return
        if key.dtype == np.uint32 and key.ndim == 1:
            return
    raise ArgumentTypeError(
        f"key is {outline(key)}; expected one random key, such as jax.random.key(0)."
    )
