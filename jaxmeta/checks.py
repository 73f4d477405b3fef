"""Checks of meta_unroll's arguments before anything is traced."""

import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmeta.errors import ArgumentTypeError, ArgumentValueError
from jaxmeta.trees import PyTree, describe, dtype, is_array, named_leaves, outline


def check_params(params: PyTree) -> None:
    """Raise unless every leaf is a real floating-point array."""
    for name, leaf in named_leaves("params", params):
        if not (is_array(leaf) and jnp.issubdtype(dtype(leaf), jnp.floating)):
            raise ArgumentTypeError(
                f"{name} is {describe(leaf)}; meta_unroll differentiates params: pass floats, or "
                "close over it."
            )


def check_arrays(root: str, tree: PyTree) -> None:
    """Raise unless every leaf is something that JAX can compute with."""
    for name, leaf in named_leaves(root, tree):
        if not is_array(leaf):
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
    sizes = {name: _leading_axis(name, leaf) for name, leaf in named_leaves("batches", batches)}
    if not sizes:
        if steps is None:
            raise ArgumentValueError(
                "the number of inner steps is unknown: pass batches with a leading step axis, or "
                "num_steps."
            )
        return steps
    if len(set(sizes.values())) > 1:
        raise ArgumentValueError(
            "the leading axis of batches is the inner step, and it differs: "
            f"{', '.join(f'{name} has {size}' for name, size in sizes.items())}. Stack as many "
            "batches in every leaf; pass what all steps share by closing over it."
        )
    found = next(iter(sizes.values()))
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


def _leading_axis(name: str, leaf: Any) -> int:
    if not np.shape(leaf):
        raise ArgumentValueError(
            f"{name} is {describe(leaf)}; every leaf of batches needs a leading step axis. Pass "
            "one batch that every step uses as batch=, with num_steps."
        )
    return np.shape(leaf)[0]


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
