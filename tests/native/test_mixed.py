"""Mixed mode where it must refuse, and where the default must take another way."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta
from jaxmeta import ArgumentValueError, MixedMode, ReverseMode, StepCheckpoint
from tests.native import support

pytestmark = pytest.mark.usefixtures("x64")

X = np.random.default_rng(0).normal(size=(4, 3))
W = {"inner": np.random.default_rng(1).normal(size=3), "outer": np.float64(0.7)}


@jax.custom_vjp
def reversal(x: Any) -> Any:
    return x


reversal.defvjp(lambda x: (x, None), lambda _, g: (-g,))


@jax.custom_vjp
def straight_through(x: Any) -> Any:
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@jax.custom_vjp
def clipped_gradient(x: Any) -> Any:
    return x


clipped_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.01, 0.01),))


@jax.custom_jvp
def curl(x: Any) -> Any:
    """Its rule is the derivative of no function."""
    return jnp.sum(x)


curl.defjvp(lambda x, dx: (curl(*x), jnp.sum(dx[0] * jnp.roll(x[0], 1) * jnp.arange(3.0))))


@jax.custom_vjp
def true_sine(x: Any) -> Any:
    return jnp.sin(x)


true_sine.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, g: (g * cos,))


@jax.custom_vjp
def logarithm(x: Any) -> Any:
    """True, and not defined everywhere."""
    return jnp.log(x)


logarithm.defvjp(lambda x: (jnp.log(x), x), lambda x, g: (g / x,))


@jax.custom_jvp
def constant_rule(x: Any) -> Any:
    """Straight-through as a custom_jvp: second derivatives stay symmetric."""
    return jnp.round(x)


constant_rule.defjvp(lambda x, dx: (constant_rule(*x), dx[0]))


def stopped(x: Any) -> Any:
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def in_scan(x: Any) -> Any:
    return jax.lax.scan(lambda carry, _: (reversal(carry), None), x, length=3)[0]


UNTRUE = [
    reversal,
    straight_through,
    clipped_gradient,
    curl,
    in_scan,
    jax.jit(reversal),
    functools.partial(optax.scale_gradient, scale=-1.0),
]
TRUE = [true_sine, lambda x: logarithm(x**2 + 1), constant_rule, stopped, jax.nn.relu, jnp.tanh]


def final(adjoint: Any, between: Callable[[Any], Any], rate: Any, params: Any, data: Any) -> Any:
    """Parameters on both sides of `between`."""

    def loss(w: Any, x: Any) -> jax.Array:
        hidden = between(x * w["inner"])
        return (jnp.mean(hidden) * w["outer"] - 1.0) ** 2 + 0.1 * jnp.sum(w["inner"] ** 4)

    out = jaxmeta.meta_unroll(loss, optax.sgd, params, data, hyperparams=rate, adjoint=adjoint)
    return jnp.sum(out.params["inner"] ** 3) + out.params["outer"] + jnp.sum(out.losses)


def gradients(adjoint: Any, between: Callable[[Any], Any]) -> Any:
    of_all = jax.grad(functools.partial(final, adjoint, between), argnums=(0, 1, 2))
    return jax.jit(of_all)(jnp.float64(0.3), jax.tree.map(jnp.asarray, W), jnp.asarray(X))


@pytest.mark.parametrize("between", UNTRUE)
def test_a_rule_that_is_no_derivative_is_refused(between: Callable[[Any], Any]) -> None:
    with pytest.raises(ArgumentValueError, match="MixedMode, which needs true derivatives"):
        gradients(MixedMode(), between)


def test_the_refusal_says_where_and_what_to_do() -> None:
    with pytest.raises(ArgumentValueError) as caught:
        gradients(MixedMode(), reversal)
    message = str(caught.value)
    for part in ("reversal at ", "test_mixed.py:", "is not the derivative", "stop_gradient"):
        assert part in message


@pytest.mark.parametrize("between", UNTRUE)
def test_the_default_takes_plain_reverse_there(between: Callable[[Any], Any]) -> None:
    support.assert_close(gradients("auto", between), gradients(ReverseMode(), between), 1e-12)


def test_it_would_have_been_wrong() -> None:
    forced = gradients(MixedMode(assume_symmetric=True), reversal)[1]["inner"]
    right = gradients(ReverseMode(), reversal)[1]["inner"]
    assert np.abs(forced - right).max() > 0.01


@pytest.mark.parametrize("between", TRUE)
def test_a_true_rule_is_taken(between: Callable[[Any], Any]) -> None:
    support.assert_close(gradients(MixedMode(), between), gradients(ReverseMode(), between), 1e-10)


def test_a_rule_that_cannot_be_tried_out_is_refused() -> None:
    """It closes over a traced value."""

    def meta_loss(sign: Any) -> Any:
        @jax.custom_vjp
        def rule(x: Any) -> Any:
            return x

        rule.defvjp(lambda x: (x, None), lambda _, g: (sign * g,))
        return final(MixedMode(), rule, 0.3, W, X)

    with pytest.raises(ArgumentValueError, match="could not be tried out"):
        jax.jit(meta_loss)(1.0)


def test_the_default_says_why() -> None:
    def explained(between: Callable[[Any], Any]) -> str:
        return jaxmeta.meta_unroll(
            lambda w, x: jnp.sum(between(x * w) * w), optax.sgd(0.1), jnp.ones(3), jnp.asarray(X)
        ).adjoint

    assert "plain reverse mode, as the derivative rule of reversal" in explained(reversal)
    assert "plain reverse" not in explained(jnp.sin)


def test_what_the_loss_closes_over_keeps_its_gradient() -> None:
    def meta_loss(adjoint: Any, scale: Any, shift: Any) -> Any:
        @jax.jit
        def inside(w: Any) -> Any:
            return jnp.sin(scale * w)

        return final(adjoint, lambda x: inside(x) + shift, 0.3, W, X)

    actual = jax.grad(meta_loss, (1, 2))(MixedMode(), 1.3, 0.2)
    support.assert_close(actual, jax.grad(meta_loss, (1, 2))(ReverseMode(), 1.3, 0.2))


def test_complex_data_has_its_gradient() -> None:
    def meta_loss(adjoint: Any, data: Any) -> Any:
        def loss(w: Any, x: Any) -> jax.Array:
            return jnp.mean(jnp.abs(jnp.exp(1j * w) * x - 1.0) ** 2)

        out = jaxmeta.meta_unroll(loss, optax.sgd(0.3), jnp.full(3, 0.1), data, adjoint=adjoint)
        return jnp.sum(out.params**3)

    data = jnp.asarray(X + 1j * X[::-1])
    actual = jax.grad(functools.partial(meta_loss, MixedMode()))(data)
    expected = jax.grad(functools.partial(meta_loss, ReverseMode()))(data)
    np.testing.assert_allclose(actual, expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision(dtype: Any) -> None:
    def meta_loss(adjoint: Any, rate: Any) -> Any:
        params, data = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (W, X))
        return final(adjoint, jnp.tanh, rate, params, data)

    actual = jax.grad(functools.partial(meta_loss, MixedMode()))(jnp.asarray(0.3, dtype))
    expected = jax.grad(functools.partial(meta_loss, ReverseMode()))(jnp.float64(0.3))
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        float(actual), float(expected), rtol=40 * float(jnp.finfo(dtype).eps)
    )


def test_a_loop_inside_the_loss() -> None:
    """Meta-gradients of a loss that trains something itself, mixed mode in both loops."""

    def meta_loss(adjoint: Any, rate: Any) -> Any:
        def loss(w: Any, x: Any) -> jax.Array:
            def inner(v: Any, x: Any) -> jax.Array:
                return jnp.mean((jnp.sin(v * w) - x) ** 2)

            data = jnp.stack([x, 2 * x])
            out = jaxmeta.meta_unroll(inner, optax.sgd(0.2), w, data, adjoint=adjoint)
            return jnp.sum(out.params**2)

        out = jaxmeta.meta_unroll(
            loss, optax.adam, jnp.full(3, 0.5), X, hyperparams=rate, adjoint=adjoint
        )
        return jnp.sum(out.params)

    actual = jax.grad(functools.partial(meta_loss, MixedMode()))(0.1)
    support.assert_close(actual, jax.grad(functools.partial(meta_loss, StepCheckpoint()))(0.1))
