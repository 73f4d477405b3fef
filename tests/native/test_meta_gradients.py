"""Meta-gradients against loops written out by hand and against finite differences, twice."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta
from tests.native import support

ADJOINTS = [jaxmeta.ReverseMode(), jaxmeta.StepCheckpoint()]
STEPS = 3

pytestmark = pytest.mark.usefixtures("x64")


class Case(NamedTuple):
    """An optimizer of optax as a function of hyperparams, and its formula."""

    optimizer: Callable[[Any], optax.GradientTransformation]
    rule: Callable[..., Any]
    hyperparams: dict[str, Any]


def per_parameter(h: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda g, _: jax.tree.map(lambda lr, g: -lr * g, h["lr"], g))


def clipped(h: Any) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(h["limit"]), optax.sgd(h["lr"], h["beta"]))


CASES = {
    "sgd": Case(lambda h: optax.sgd(h["lr"]), support.sgd, {"lr": 0.3}),
    "nesterov": Case(
        lambda h: optax.sgd(h["lr"], h["beta"], nesterov=True),
        support.nesterov,
        {"lr": 0.3, "beta": 0.6},
    ),
    "adamw": Case(
        lambda h: optax.adamw(h["lr"], h["b1"], h["b2"], weight_decay=h["decay"]),
        support.adamw,
        {"lr": 0.1, "b1": 0.8, "b2": 0.95, "decay": 0.2},
    ),
    "a rate for each parameter": Case(
        per_parameter, support.sgd_per_parameter, {"lr": {"b": 0.2, "w": np.array([0.3, 0.1])}}
    ),
    "a schedule with parameters": Case(
        lambda h: optax.sgd(lambda count: h["lr"] * h["rate"] ** count),
        support.sgd_decaying,
        {"lr": 0.3, "rate": 0.7},
    ),
    "clipping, then momentum": Case(
        clipped, support.clipped_momentum, {"lr": 0.3, "beta": 0.6, "limit": 0.8}
    ),
}


def loss_fn(params: Any, batch: Any, h: Any) -> jax.Array:
    """Weighted squares of a small nonlinear model, with a penalty; all of `h` is learnable."""
    x, y = batch
    errors = jnp.tanh(x @ params["w"] + params["b"]) - y
    penalty = h["penalty"] * jnp.sum(params["w"] ** 2)
    return h["weights"] @ errors**2 + penalty


def inputs(case: Case) -> dict[str, Any]:
    """Everything that the meta-loss is differentiated in."""
    rng = np.random.default_rng(0)
    h = {"weights": rng.normal(size=4), "penalty": 0.1, **case.hyperparams}
    return {
        "params": {"w": rng.normal(size=2), "b": 0.5},
        "batches": (rng.normal(size=(STEPS, 4, 2)), rng.normal(size=(STEPS, 4))),
        "h": h,
    }


def meta_loss(params: Any, losses: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(params["w"])) + params["b"] ** 2 + losses @ jnp.arange(1.0, STEPS + 1)


def unrolled(case: Case, adjoint: jaxmeta.Adjoint, given: Any) -> jax.Array:
    out = jaxmeta.meta_unroll(
        loss_fn,
        case.optimizer,
        given["params"],
        given["batches"],
        hyperparams=given["h"],
        adjoint=adjoint,
    )
    return meta_loss(out.params, out.losses)


def by_hand(case: Case, given: Any) -> jax.Array:
    return meta_loss(
        *support.train_by_hand(loss_fn, case.rule, given["params"], given["batches"], given["h"])
    )


@functools.cache
def expected(name: str) -> tuple[Any, Any, Any]:
    given = inputs(CASES[name])
    at = support.second_order(functools.partial(by_hand, CASES[name]))
    return at(given, support.random_like(given, seed=1))


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
@pytest.mark.parametrize("name", CASES)
def test_derivatives_in_everything_to_second_order(name: str, adjoint: jaxmeta.Adjoint) -> None:
    given = inputs(CASES[name])
    direction = support.random_like(given, seed=1)
    at = support.second_order(functools.partial(unrolled, CASES[name], adjoint))
    support.assert_close(at(given, direction), expected(name))
    support.assert_finite_differences_agree(at, given, direction)
