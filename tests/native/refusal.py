"""A good call of meta_unroll, and the assertion that a changed one is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta

W = {"dense": {"kernel": jnp.ones(2)}}
XS = np.ones((3, 2), np.float32)
SGD = optax.sgd(0.1)


def loss_fn(params: Any, x: Any) -> jax.Array:
    return jnp.mean((params["dense"]["kernel"] - x) ** 2)


def refused(error: type[Exception], *fragments: str, **changed: Any) -> None:
    """meta_unroll with the `changed` arguments raises `error`, and says all of `fragments`."""
    arguments = {"loss_fn": loss_fn, "optimizer": SGD, "params": W, "batches": XS, **changed}
    for run in (jaxmeta.meta_unroll, _under_jit):
        with pytest.raises(error) as caught:
            run(**arguments)
        assert isinstance(caught.value, jaxmeta.JaxmetaError)
        for fragment in fragments:
            assert fragment in str(caught.value)


def _under_jit(**arguments: Any) -> None:
    jax.jit(lambda: jaxmeta.meta_unroll(**arguments).losses)()
