"""Optimizers of optax: their meta-gradients, and the extra arguments that some of them take."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta
from tests.native import support

pytestmark = pytest.mark.usefixtures("x64")

XS = np.random.default_rng(0).normal(size=(3, 4, 2))


def loss_fn(w: Any, x: Any) -> jax.Array:
    return jnp.mean(jnp.sin(x @ w["w"] + 0.3) ** 2) + 0.1 * jnp.sum(w["w"] ** 2)


# Each is a function of one hyperparameter.
OPTIMIZERS = {
    "adabelief": optax.adabelief,
    "amsgrad": optax.amsgrad,
    "lamb": optax.lamb,
    "lion": optax.lion,
    "novograd": optax.novograd,
    "rmsprop": lambda h: optax.rmsprop(h, momentum=0.5, centered=True, eps=1e-3),
    "warmup": lambda h: optax.sgd(lambda count: h * (count + 1.0) / 3.0),
    "inject_hyperparams": lambda h: optax.inject_hyperparams(optax.adam)(h),
    "partition": lambda h: optax.partition(
        {"fast": optax.sgd(h), "slow": optax.adam(h / 10)}, {"w": "fast"}
    ),
    "masked": lambda h: optax.masked(optax.sgd(h), {"w": True}),
    "polyak_sgd": lambda h: optax.polyak_sgd(max_learning_rate=10.0, scaling=h),
    "reduce_on_plateau": lambda h: optax.chain(
        optax.sgd(h), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "momo": optax.contrib.momo,
    "schedule_free": lambda h: optax.contrib.schedule_free_sgd(h),
    "backtracking": lambda h: optax.chain(
        optax.sgd(50 * h), optax.scale_by_backtracking_linesearch(5)
    ),
    "sam": lambda h: optax.contrib.sam(
        optax.sgd(h), optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    ),
}


def meta_loss(optimizer: Any, given: Any) -> jax.Array:
    out = jaxmeta.meta_unroll(loss_fn, optimizer, given["params"], XS, hyperparams=given["h"])
    return jnp.sum(jnp.cos(out.params["w"])) + out.losses.sum()


GIVEN = {"params": {"w": np.array([0.4, -0.7])}, "h": np.asarray(0.1)}
DIRECTION = {"params": {"w": np.array([1.0, 0.5])}, "h": np.asarray(-0.3)}


def slope(f: Any) -> float:
    """Central difference of `f` at GIVEN along DIRECTION."""

    def shifted(eps: float) -> Any:
        return f(jax.tree.map(lambda x, d: x + eps * d, GIVEN, DIRECTION))

    return float(shifted(1e-5) - shifted(-1e-5)) / 2e-5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradients_are_the_slopes_of_the_meta_loss(name: str) -> None:
    at = jax.jit(jax.value_and_grad(functools.partial(meta_loss, OPTIMIZERS[name])))
    along = np.vdot(support.flatten(at(GIVEN)[1]), support.flatten(DIRECTION))
    np.testing.assert_allclose(along, slope(lambda given: at(given)[0]), rtol=1e-6, atol=1e-8)


def test_a_loop_of_unknown_length_in_an_optimizer_is_refused_in_reverse() -> None:
    search = optax.scale_by_zoom_linesearch(5)
    f = functools.partial(meta_loss, lambda h: optax.chain(optax.sgd(h), search))
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        jax.eval_shape(jax.grad(f), GIVEN)


def test_extra_arguments_are_those_of_the_step() -> None:
    def update(g: Any, state: Any, params: Any, *, value: Any, grad: Any, value_fn: Any) -> Any:
        state = {"value": value, "again": value_fn(params), "grad": grad}
        return jax.tree.map(lambda g: -0.1 * g, g), state

    start = {"value": 0.0, "again": 0.0, "grad": GIVEN["params"]}
    optimizer = support.transformation(lambda params: start, update)
    out = jaxmeta.meta_unroll(loss_fn, optimizer, GIVEN["params"], XS, trajectory=True)
    before_last = jax.tree.map(lambda leaf: leaf[-2], out.trajectory)
    loss, gradient = jax.value_and_grad(loss_fn)(before_last, XS[-1])
    expected = {"value": loss, "again": loss, "grad": gradient}
    support.assert_close(out.opt_state, expected)


def test_extra_arguments_go_only_where_they_are_taken() -> None:
    received = []

    def move(g: Any) -> Any:
        return jax.tree.map(lambda g: -0.1 * g, g)

    def plain(grad: Any, value: Any, value_fn: Any = None) -> Any:  # (gradient, state, params)
        return move(grad), value

    def one(g: Any, state: Any, params: Any, value_fn: Any = None) -> Any:
        received.append({"value_fn"} if callable(value_fn) else set())
        return move(g), state

    def any_of_them(g: Any, state: Any, params: Any, **extra: Any) -> Any:
        received.append(set(extra))
        return move(g), state

    for update in (plain, one, any_of_them):
        optimizer = support.transformation(lambda params: (), update)
        jaxmeta.meta_unroll(loss_fn, optimizer, GIVEN["params"], XS)
    assert received == [{"value_fn"}, {"value", "grad", "value_fn"}]


def test_an_optimizer_that_needs_another_argument_says_how_it_gets_it() -> None:
    sophia = optax.contrib.sophia(0.1, update_interval=1)
    with pytest.raises(ValueError, match="obj_fn must be provided") as caught:
        jaxmeta.meta_unroll(loss_fn, sophia, GIVEN["params"], XS)
    assert "optax.GradientTransformationExtraArgs(opt.init" in caught.value.__notes__[0]
    wrapped = support.transformation(
        sophia.init, lambda g, s, p, *, value_fn, **_: sophia.update(g, s, p, obj_fn=value_fn)
    )
    out = jaxmeta.meta_unroll(loss_fn, wrapped, GIVEN["params"], XS)
    assert np.isfinite(out.losses).all() and out.losses[-1] != out.losses[0]


def test_eps_root_keeps_adam_finite_at_a_gradient_of_zero() -> None:
    def idle(params: Any, x: Any) -> jax.Array:
        return loss_fn(params, x) + 0.0 * params["idle"]

    def final(lr: Any, optimizer: Any) -> jax.Array:
        params = {**GIVEN["params"], "idle": 1.0}
        out = jaxmeta.meta_unroll(idle, optimizer, params, XS, hyperparams=lr)
        return jnp.sum(jnp.cos(out.params["w"])) + out.params["idle"]

    f = jax.jit(lambda lr: final(lr, lambda lr: optax.adam(lr, eps_root=1e-8)))
    expected = float(f(0.1 + 1e-5) - f(0.1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(f)(0.1), expected, rtol=1e-6)
