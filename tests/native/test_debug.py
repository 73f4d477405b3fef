"""debug=True names the first inner step and the first value that is not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta

W = {"a": jnp.ones(2), "b": {"c": jnp.ones(())}}
XS = np.ones(6, np.float32)


def loss_fn(params: Any, x: Any) -> jax.Array:
    return jnp.sum(params["a"] ** 2) + x * params["b"]["c"]


def bad_gradient(params: Any, x: Any) -> jax.Array:
    """The square root's slope is infinite where x is 0; the loss is finite."""
    return loss_fn(params, 1.0) + jnp.sqrt(x * params["b"]["c"] ** 2)


def unroll(loss: Any, xs: Any, optimizer: Any = optax.sgd(0.1), debug: bool = True) -> Any:  # noqa: B008
    return jaxmeta.meta_unroll(loss, optimizer, W, xs, debug=debug)


def with_value(step: int, value: float) -> np.ndarray:
    xs = XS.copy()
    xs[step] = value
    return xs


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss(value: float) -> None:
    with pytest.raises(jaxmeta.NonFiniteError, match="inner step 4 of 6 .*: the loss is the first"):
        unroll(loss_fn, with_value(4, value))


def test_a_gradient() -> None:
    message = r"inner step 2 of 6 .*: the gradient of params\['b'\]\['c'\] is the first"
    with pytest.raises(jaxmeta.NonFiniteError, match=message):
        unroll(bad_gradient, with_value(2, 0.0))


def test_an_update() -> None:
    broken = optax.sgd(lambda count: jnp.where(count == 5, jnp.inf, 0.1))
    message = r"inner step 5 of 6 .*: params\['a'\] after its update is the first"
    with pytest.raises(jaxmeta.NonFiniteError, match=message):
        unroll(loss_fn, XS, broken)


def test_all_finite() -> None:
    plain, watched = (unroll(loss_fn, XS, debug=debug) for debug in (False, True))
    np.testing.assert_array_equal(plain.losses, watched.losses)


def test_without_debug_nan_comes_through() -> None:
    losses = unroll(loss_fn, with_value(4, np.nan), debug=False).losses
    np.testing.assert_array_equal(np.isnan(losses), [False] * 4 + [True, True])


def last_loss(xs: Any) -> jax.Array:
    return unroll(loss_fn, xs).losses[-1]


EAGER = {
    "grad": jax.grad(last_loss),
    "jvp": lambda xs: jax.jvp(last_loss, (xs,), (xs,)),
    "vmap": lambda xs: jax.vmap(last_loss)(jnp.stack([XS, xs])),
    "vmap of grad": lambda xs: jax.vmap(jax.grad(last_loss))(jnp.stack([XS, xs])),
}
COMPILED = {
    "jit": jax.jit(last_loss),
    "jit of grad": jax.jit(jax.grad(last_loss)),
    "jit of vmap": lambda xs: jax.jit(jax.vmap(last_loss))(jnp.stack([XS, xs])),
    "hessian": jax.jit(jax.hessian(last_loss)),
}


@pytest.mark.parametrize("name", EAGER)
def test_outside_jit_the_error_is_ours(name: str) -> None:
    jax.block_until_ready(EAGER[name](XS))
    with pytest.raises(jaxmeta.NonFiniteError, match="inner step 3 of 6 .*: the loss"):
        EAGER[name](with_value(3, np.nan))


@pytest.mark.parametrize("name", COMPILED)
def test_inside_jit_jax_hands_our_error_on(name: str) -> None:
    jax.block_until_ready(COMPILED[name](XS))
    message = r"(?s)NonFiniteError: inner step 3 of 6 .*: the loss is the first"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        jax.block_until_ready(COMPILED[name](with_value(3, np.nan)))
    jax.effects_barrier()
