"""First-order derivatives: closed forms, and a loop by hand with its gradients constant."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta
from jaxmeta.adjoint.first_order import FirstOrder
from tests.native import support

pytestmark = pytest.mark.usefixtures("x64")
STEPS = 5
A, B = 1.5, 0.6


def quadratic(w: Any, batch: Any, h: Any) -> jax.Array:
    return A * w**2 / 2 - h["b"] * w


def unrolled(h: Any, w: Any) -> Any:
    return jaxmeta.meta_unroll(
        quadratic,
        lambda h: optax.sgd(h["lr"], h["beta"]),
        w,
        num_steps=STEPS,
        hyperparams=h,
        adjoint=FirstOrder(),
    )


def test_closed_form() -> None:
    """m' = beta m + g and w' = w - lr m', with g constant: all derivatives by hand."""
    h = {name: jnp.float64(value) for name, value in (("lr", 0.1), ("beta", 0.7), ("b", B))}
    w, m, m_beta = 2.0, 0.0, 0.0
    w_lr = w_beta = 0.0
    losses_w, losses_lr, losses_b = [], [], []
    for _ in range(STEPS):
        g = A * w - B
        losses_w.append(g)
        losses_lr.append(g * w_lr)
        losses_b.append(-w)
        m, m_beta = 0.7 * m + g, m + 0.7 * m_beta
        w, w_lr, w_beta = w - 0.1 * m, w_lr - m, w_beta - 0.1 * m_beta
    by_h, by_w = jax.grad(lambda h, w: unrolled(h, w).params, (0, 1))(h, jnp.float64(2.0))
    assert by_w == 1.0
    expected = {"lr": w_lr, "beta": w_beta, "b": 0.0}
    support.assert_close(by_h, expected, 1e-12)
    by_h, by_w = jax.jacrev(lambda h, w: unrolled(h, w).losses, (0, 1))(h, jnp.float64(2.0))
    np.testing.assert_allclose(by_w, losses_w, rtol=1e-12)
    np.testing.assert_allclose(by_h["lr"], losses_lr, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(by_h["b"], losses_b, rtol=1e-12)


def loss_fn(w: Any, x: Any, h: Any) -> jax.Array:
    return jnp.mean((jnp.tanh(x @ w["kernel"] + w["bias"]) - 0.3) ** 2)


def problem() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    w = {"kernel": rng.normal(size=3), "bias": rng.normal()}
    h = {"lr": 0.1, "b1": 0.8, "b2": 0.9, "decay": 0.1}
    inputs = (w, h, rng.normal(size=(STEPS, 4, 3)))
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), inputs)


def meta_loss(w: Any, losses: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(w["kernel"])) + w["bias"] ** 2 + jnp.sum(losses**2)


def first_order(inputs: Any) -> jax.Array:
    w, h, batches = inputs
    out = jaxmeta.meta_unroll(
        loss_fn,
        lambda h: optax.adamw(h["lr"], h["b1"], h["b2"], weight_decay=h["decay"]),
        w,
        batches,
        hyperparams=h,
        adjoint=FirstOrder(),
    )
    return meta_loss(out.params, out.losses)


def by_hand(inputs: Any) -> jax.Array:
    def rule(step: int, h: Any, w: Any, g: Any, memory: Any) -> Any:
        return support.adamw(step, h, w, jax.lax.stop_gradient(g), memory)

    w, h, batches = inputs
    return meta_loss(*support.train_by_hand(loss_fn, rule, w, batches, h))


def test_first_and_second_derivatives_of_a_loop_by_hand() -> None:
    inputs = problem()
    direction = support.random_like(inputs)
    actual = support.second_order(first_order)(inputs, direction)
    support.assert_close(actual, support.second_order(by_hand)(inputs, direction), 1e-10)


def test_maml_under_vmap_and_jit() -> None:
    """Tasks with their own data: the meta-gradient is that of the loss after adaptation."""
    w, h, batches = problem()
    tasks = jnp.stack([batches, 2 * batches])

    def adapted(w: Any, xs: Any) -> Any:
        sgd = optax.sgd(0.3)
        bound = functools.partial(loss_fn, h=None)
        return jaxmeta.meta_unroll(bound, sgd, w, xs[:-1], adjoint=FirstOrder()).params

    def of_all(w: Any) -> jax.Array:
        return jnp.sum(jax.vmap(lambda xs: loss_fn(adapted(w, xs), xs[-1], h))(tasks))

    def by_hand(xs: Any) -> Any:
        rates = {"lr": 0.3}
        end, _ = support.train_by_hand(loss_fn, support.sgd, w, xs[:-1], rates)
        return jax.grad(loss_fn)(end, xs[-1], h)

    expected = jax.tree.map(jnp.add, by_hand(tasks[0]), by_hand(tasks[1]))
    support.assert_close(jax.jit(jax.grad(of_all))(w), expected, 1e-12)


def test_memory_of_a_step_is_its_gradient() -> None:
    def temporary_bytes(steps: int) -> int:
        def end(lr: Any, w: Any, x: Any) -> jax.Array:
            out = jaxmeta.meta_unroll(
                lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2),
                optax.sgd,
                w,
                batch=x,
                num_steps=steps,
                hyperparams=lr,
                adjoint=FirstOrder(),
            )
            return jnp.sum(out.params**2)

        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (8, 8), (256, 8))]
        analysis = jax.jit(jax.grad(end)).lower(*shapes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    per_step = (temporary_bytes(48) - temporary_bytes(16)) / 32
    assert per_step <= 4 * 8 * 8 + 16


def test_it_says_that_it_approximates() -> None:
    h = {"lr": 0.1, "beta": 0.7, "b": B}
    assert "constants, an approximation" in unrolled(h, jnp.float64(0)).adjoint
