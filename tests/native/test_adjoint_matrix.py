"""Every exact adjoint against plain reverse mode, and that against finite differences.

One inner problem has all that a loop can have: meta-parameters in the loss, one for all weights
and one for each weight in the optimizer, batches, a model state, random keys, aux, an optimizer
state that is given. Its gradient is taken in all of them at once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta
from jaxmeta import (
    Auto,
    BinomialCheckpoint,
    ForwardMode,
    MixedMode,
    NestedCheckpoint,
    ReverseMode,
    StepCheckpoint,
)
from tests.native import support

pytestmark = pytest.mark.usefixtures("x64")

STEPS = 5
ADJOINTS = [
    StepCheckpoint(),
    NestedCheckpoint((2, 3)),
    BinomialCheckpoint(2),
    MixedMode(),
    MixedMode(save_gradients=False),
    MixedMode(NestedCheckpoint((2, 2, 2))),
    MixedMode(BinomialCheckpoint(1)),
    ForwardMode(),
    Auto(),
    Auto(memory=1),
]


def scaled(rates: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda u, _: jax.tree.map(lambda r, u: r * u, rates, u))


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda h: optax.chain(optax.sgd(h["lr"]), scaled(h["rates"])),
    "momentum": lambda h: optax.chain(optax.sgd(h["lr"], h["beta"]), scaled(h["rates"])),
    "adam": lambda h: optax.chain(optax.adam(h["lr"], h["beta"]), scaled(h["rates"])),
    "adamw": lambda h: optax.chain(
        optax.adamw(h["lr"], h["beta"], weight_decay=h["decay"]), scaled(h["rates"])
    ),
    "clipping": lambda h: optax.chain(
        optax.clip_by_global_norm(0.3), optax.adam(h["lr"]), scaled(h["rates"])
    ),
    "schedule": lambda h: optax.chain(
        optax.sgd(lambda count: h["lr"] * h["beta"] ** count), scaled(h["rates"])
    ),
}


def loss_fn(params: Any, batch: Any, hyperparams: Any, *, state: Any, key: Any) -> Any:
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    hidden = jnp.tanh(x @ params["w"] + params["b"] - state)
    loss = jnp.mean((hidden - batch["y"]) ** 2) + hyperparams["decay"] * jnp.sum(params["w"] ** 4)
    state = 0.9 * state + 0.1 * jnp.mean(hidden, 0)
    return loss, (state, {"hidden": jnp.mean(hidden**2), "index": batch["index"]})


def problem(optimizer: str, seed: int = 0) -> Any:
    """All that the meta-loss is differentiated in."""
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(3, 2)), "b": rng.normal(size=2)}
    rates = jax.tree.map(lambda w: rng.uniform(0.5, 1.5, size=w.shape), params)
    hyperparams = {"lr": 0.2, "beta": 0.7, "decay": 0.02, "rates": rates}
    batches = {"x": rng.normal(size=(STEPS, 4, 3)), "y": rng.normal(size=(STEPS, 4, 2))}
    opt_state = OPTIMIZERS[optimizer](hyperparams).init(params)
    floats = [leaf for leaf in jax.tree.leaves(opt_state) if support.is_float(leaf)]
    moments = [rng.uniform(0.1, 0.3, size=np.shape(leaf)) for leaf in floats]
    inputs = (params, hyperparams, batches, moments, rng.normal(size=2))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), inputs)


def meta_loss(adjoint: Any, optimizer: str, inputs: Any) -> jax.Array:
    params, hyperparams, batches, moments, state = inputs
    make = OPTIMIZERS[optimizer]
    leaves, structure = jax.tree.flatten(make(hyperparams).init(params))
    given = iter(moments)
    leaves = [next(given) if support.is_float(leaf) else leaf for leaf in leaves]
    out = jaxmeta.meta_unroll(
        loss_fn,
        make,
        params,
        batches | {"index": jnp.arange(STEPS)},
        hyperparams=hyperparams,
        opt_state=jax.tree.unflatten(structure, leaves),
        state=state,
        key=jax.random.key(0),
        has_aux=True,
        adjoint=adjoint,
    )
    last = [leaf for leaf in jax.tree.leaves(out.opt_state) if support.is_float(leaf)]
    return (
        sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves((out.params, last, out.state)))
        + jnp.sum(jnp.sin(out.losses))
        + jnp.sum(out.aux["hidden"] ** 2)
    )


@functools.cache
def derivatives(adjoint: Any, optimizer: str) -> Callable[[Any, Any], tuple[Any, Any, Any]]:
    return support.second_order(functools.partial(meta_loss, adjoint, optimizer))


@functools.cache
def expected(optimizer: str) -> tuple[Any, Any, Any]:
    inputs = problem(optimizer)
    return derivatives(ReverseMode(), optimizer)(inputs, support.random_like(inputs))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_plain_reverse_agrees_with_finite_differences(optimizer: str) -> None:
    inputs = problem(optimizer)
    support.assert_finite_differences_agree(
        derivatives(ReverseMode(), optimizer), inputs, support.random_like(inputs)
    )


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_first_and_second_derivatives(adjoint: Any, optimizer: str) -> None:
    inputs = problem(optimizer)
    actual = derivatives(adjoint, optimizer)(inputs, support.random_like(inputs))
    support.assert_close(actual, expected(optimizer), 1e-9)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_reverse_over_reverse_and_reverse_over_forward(adjoint: Any) -> None:
    inputs = problem("adam")
    direction = support.random_like(inputs)
    f = functools.partial(meta_loss, adjoint, "adam")

    def slope(inputs: Any) -> Any:
        products = jax.tree.map(lambda g, d: jnp.vdot(g, d), jax.grad(f)(inputs), direction)
        return sum(jax.tree.leaves(products))

    def pushed(inputs: Any) -> jax.Array:
        return jax.jvp(f, (inputs,), (direction,))[1]

    products = jax.jit(lambda x: (jax.grad(slope)(x), jax.grad(pushed)(x)))(inputs)
    support.assert_close(products, (expected("adam")[2],) * 2, 1e-9)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_under_vmap(adjoint: Any) -> None:
    """Tasks with their own weights and data, hyperparameters in common."""
    tasks = [problem("adam", seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tasks)

    def of_all(adjoint: Any, hyperparams: Any) -> jax.Array:
        def of_one(inputs: Any) -> jax.Array:
            return meta_loss(adjoint, "adam", (inputs[0], hyperparams, *inputs[2:]))

        return jnp.sum(jax.vmap(of_one)(stacked))

    def one_by_one(hyperparams: Any) -> Any:
        losses = [
            meta_loss(ReverseMode(), "adam", (task[0], hyperparams, *task[2:])) for task in tasks
        ]
        return sum(losses)

    actual = jax.jit(jax.grad(functools.partial(of_all, adjoint)))(tasks[0][1])
    support.assert_close(actual, jax.jit(jax.grad(one_by_one))(tasks[0][1]), 1e-9)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_in_one_hyperparameter_with_the_rest_constant(adjoint: Any) -> None:
    inputs = problem("momentum")

    def of_rate(adjoint: Any, lr: Any) -> jax.Array:
        return meta_loss(adjoint, "momentum", (inputs[0], inputs[1] | {"lr": lr}, *inputs[2:]))

    second = support.second_order(functools.partial(of_rate, adjoint))
    support.assert_finite_differences_agree(second, jnp.float64(0.2), jnp.float64(1.0))
