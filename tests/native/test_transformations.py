"""meta_unroll is an ordinary JAX function: grad, jvp, vmap, jit, nesting and donation apply."""

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

ADJOINTS = pytest.mark.parametrize(
    "adjoint",
    [jaxmeta.ReverseMode(), jaxmeta.StepCheckpoint()],
    ids=lambda adjoint: type(adjoint).__name__,
)
BATCHES = np.random.default_rng(0).normal(size=(3, 2))
H = {"beta": np.float64(0.6), "lr": np.float64(0.3)}


def loss_fn(w: Any, x: Any) -> jax.Array:
    return jnp.mean(jnp.cos(x * w) + x * w)


def optimizer(h: Any) -> optax.GradientTransformation:
    return optax.sgd(h["lr"], h["beta"])


def trained(h: Any, w: Any, batches: Any, **options: Any) -> jax.Array:
    return jaxmeta.meta_unroll(loss_fn, optimizer, w, batches, hyperparams=h, **options).params


def trained_by_hand(h: Any, w: Any, batches: Any) -> jax.Array:
    return support.train_by_hand(lambda w, x, _: loss_fn(w, x), support.momentum, w, batches, h)[0]


@ADJOINTS
def test_vmap_over_tasks_is_a_loop_over_tasks(adjoint: jaxmeta.Adjoint) -> None:
    tasks = np.random.default_rng(1).normal(size=(4, *BATCHES.shape))
    starts = np.linspace(-1.0, 1.0, 4)
    slopes = jax.value_and_grad(functools.partial(trained, adjoint=adjoint))
    together = jax.vmap(slopes, in_axes=(None, 0, 0))(H, starts, tasks)
    by_hand = jax.jit(jax.value_and_grad(trained_by_hand))
    each = [by_hand(H, w, task) for w, task in zip(starts, tasks, strict=True)]
    support.assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each))


@ADJOINTS
def test_vmap_over_hyperparams_only(adjoint: jaxmeta.Adjoint) -> None:
    rates = np.array([0.1, 0.2, 0.4])
    slope = jax.grad(lambda lr: trained({**H, "lr": lr}, 0.5, BATCHES, adjoint=adjoint))
    slopes = jax.jit(jax.vmap(slope))(rates)
    by_hand = jax.jit(jax.grad(lambda lr: trained_by_hand({**H, "lr": lr}, 0.5, BATCHES)))
    support.assert_close(slopes, jnp.stack([by_hand(lr) for lr in rates]))


@ADJOINTS
def test_every_mode_gives_the_same_hessian(adjoint: jaxmeta.Adjoint) -> None:
    f = functools.partial(trained, w=0.5, batches=BATCHES, adjoint=adjoint)
    by_hand = jax.jit(jax.hessian(lambda h: trained_by_hand(h, 0.5, BATCHES)))(H)
    for outer in (jax.jacfwd, jax.jacrev):
        for inner in (jax.jacfwd, jax.jacrev):
            support.assert_close(jax.jit(outer(inner(f)))(H), by_hand)


@ADJOINTS
def test_jvp_outside_jit(adjoint: jaxmeta.Adjoint) -> None:
    direction = {"beta": 0.2, "lr": -0.4}
    f = functools.partial(trained, w=0.5, batches=BATCHES, adjoint=adjoint)
    by_hand = jax.jit(
        lambda h: jax.jvp(lambda h: trained_by_hand(h, 0.5, BATCHES), (h,), (direction,))
    )
    support.assert_close(jax.jvp(f, (H,), (direction,)), by_hand(H))


@ADJOINTS
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_closed_over_values_keep_their_gradients(wrap: Any, adjoint: jaxmeta.Adjoint) -> None:
    def meta_loss(given: Any) -> jax.Array:
        def scaled(w: Any, x: Any) -> jax.Array:
            return given["scale"] * loss_fn(w, x)

        out = jaxmeta.meta_unroll(
            scaled, optax.sgd(given["lr"]), given["w"], BATCHES, adjoint=adjoint
        )
        return out.params

    def by_hand(given: Any) -> jax.Array:
        def scaled(w: Any, x: Any, h: Any) -> jax.Array:
            return h["scale"] * loss_fn(w, x)

        return support.train_by_hand(scaled, support.sgd, given["w"], BATCHES, given)[0]

    given = {"lr": 0.3, "scale": 1.5, "w": 0.5}
    gradient = wrap(jax.grad(meta_loss))(given)
    support.assert_close(gradient, jax.jit(jax.grad(by_hand))(given))


def test_closed_over_values_keep_their_gradients_in_methods_and_partials() -> None:
    class Task:
        def __init__(self, scale: Any):
            self.scale = scale

        def loss(self, w: Any, x: Any) -> jax.Array:
            return self.scale * loss_fn(w, x)

    def scaled(scale: Any, w: Any, x: Any) -> jax.Array:
        return scale * loss_fn(w, x)

    def unroll(loss: Any) -> jax.Array:
        return jaxmeta.meta_unroll(loss, optax.sgd(0.3), 0.5, BATCHES).params

    by_method = jax.grad(lambda scale: unroll(Task(scale).loss))
    by_partial = jax.grad(lambda scale: unroll(functools.partial(scaled, scale)))
    by_hand = jax.jit(
        jax.grad(
            lambda scale: support.train_by_hand(
                lambda w, x, h: scaled(scale, w, x), support.sgd, 0.5, BATCHES, {"lr": 0.3}
            )[0]
        )
    )
    for scale in (1.5, 0.7):  # the second time, nothing of the first may be left
        support.assert_close(by_method(scale), by_hand(scale))
        support.assert_close(by_partial(scale), by_hand(scale))


@ADJOINTS
def test_nested_in_its_own_loss(adjoint: jaxmeta.Adjoint) -> None:
    def adapted_loss(w: Any, x: Any, h: Any) -> jax.Array:
        inner = trained(h, w, jnp.stack([x, x + 1]), adjoint=adjoint)
        return loss_fn(inner, x)

    def adapted_loss_by_hand(w: Any, x: Any, h: Any) -> jax.Array:
        return loss_fn(trained_by_hand(h, w, jnp.stack([x, x + 1])), x)

    def meta_loss(h: Any) -> jax.Array:
        return jaxmeta.meta_unroll(
            adapted_loss, optimizer, 0.5, BATCHES[:2], hyperparams=h, adjoint=adjoint
        ).params

    def by_hand(h: Any) -> jax.Array:
        return support.train_by_hand(adapted_loss_by_hand, support.momentum, 0.5, BATCHES[:2], h)[0]

    support.assert_close(jax.jit(jax.grad(meta_loss))(H), jax.jit(jax.grad(by_hand))(H))


def test_inside_a_scan_and_a_cond() -> None:
    def adapt(w: Any, x: Any) -> tuple[Any, Any]:
        w = jax.lax.cond(w > 0, lambda w: trained(H, w, jnp.stack([x, x])), lambda w: w, w)
        return w, w

    scanned = jax.jit(jax.grad(lambda w: jax.lax.scan(adapt, w, BATCHES)[0]))(0.5)

    def by_hand(w: Any) -> jax.Array:
        for x in BATCHES:
            assert w > 0  # so that cond takes the first branch
            w = trained_by_hand(H, w, jnp.stack([x, x]))
        return w

    support.assert_close(scanned, jax.grad(by_hand)(0.5))


def test_donated_buffers() -> None:
    optimizer = optax.sgd(0.3, 0.6)

    def train(w: Any, state: Any) -> tuple[Any, Any]:
        out = jaxmeta.meta_unroll(loss_fn, optimizer, w, BATCHES, opt_state=state)
        return out.params, out.opt_state

    w = jnp.full(2, 0.5)
    state = optimizer.init(w)
    expected = train(w, state)
    support.assert_close(jax.jit(train, donate_argnums=(0, 1))(w, state), expected)
    assert w.is_deleted() and all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_without_jit() -> None:
    with jax.disable_jit():
        gradient = jax.grad(lambda h: trained(h, 0.5, BATCHES))(H)
    support.assert_close(gradient, jax.jit(jax.grad(lambda h: trained_by_hand(h, 0.5, BATCHES)))(H))
