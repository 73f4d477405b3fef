"""Truncated reverse mode: closed forms, a loop by hand whose first part is constant, outputs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta
from jaxmeta.adjoint.checkpoint import StepCheckpoint
from jaxmeta.adjoint.mixed import MixedMode
from jaxmeta.adjoint.reverse import ReverseMode
from jaxmeta.adjoint.truncated import TruncatedReverse
from tests.native import support

STEPS = 7
A, B, RATE, START = 1.5, 0.6, 0.2, 2.0


def quadratic(w: Any, batch: Any, h: Any) -> jax.Array:
    return h["a"] * w**2 / 2 - h["b"] * w


def end_of_quadratic(steps: int, h: Any, w: Any) -> jax.Array:
    return jaxmeta.meta_unroll(
        quadratic,
        lambda h: optax.sgd(h["lr"]),
        w,
        num_steps=STEPS,
        hyperparams=h,
        adjoint=TruncatedReverse(steps),
    ).params


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("k", [1, 2, 5, STEPS, STEPS + 1])
def test_closed_form(k: int) -> None:
    """With rho = 1 - lr a, w_T = b/a + rho^k (w_{T-k} - b/a), and w_{T-k} is constant."""
    h = {"lr": jnp.float64(RATE), "a": jnp.float64(A), "b": jnp.float64(B)}
    by_h, by_w = jax.grad(functools.partial(end_of_quadratic, k), (0, 1))(h, jnp.float64(START))
    rho = 1 - RATE * A
    k, exact = min(k, STEPS), k >= STEPS
    before = B / A + rho ** (STEPS - k) * (START - B / A)
    assert by_h["lr"] == pytest.approx(-A * k * rho ** (k - 1) * (before - B / A), rel=1e-12)
    assert by_h["b"] == pytest.approx((1 - rho**k) / A, rel=1e-12)
    assert by_w == pytest.approx(rho**STEPS if exact else 0.0, rel=1e-12)


@pytest.mark.usefixtures("x64")
def test_the_error_falls_like_the_contraction_of_k_steps() -> None:
    h = {"lr": jnp.float64(RATE), "a": jnp.float64(A), "b": jnp.float64(B)}
    at_optimum = jnp.float64(B / A)
    slopes = [
        jax.grad(functools.partial(end_of_quadratic, k))(h, at_optimum)["b"] for k in range(1, 6)
    ]
    errors = 1 / A - np.asarray(slopes)
    np.testing.assert_allclose(errors[1:] / errors[:-1], 1 - RATE * A, rtol=1e-10)


def loss_fn(w: Any, batch: Any, h: Any) -> jax.Array:
    score = jnp.tanh(batch["x"] @ w["kernel"] + w["bias"])
    weights = jax.nn.softmax(h["weights"])[batch["index"]]
    return jnp.sum(weights * (score - batch["y"]) ** 2) + h["decay"] * jnp.sum(w["kernel"] ** 4)


def problem() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    w = {"kernel": rng.normal(size=3), "bias": rng.normal()}
    h = {"lr": 0.3, "beta": 0.8, "decay": 0.1, "weights": rng.normal(size=4)}
    batches = {"x": rng.normal(size=(STEPS, 2, 3)), "y": rng.normal(size=(STEPS, 2))}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (w, h, batches))


INDEX = np.random.default_rng(1).integers(0, 4, size=(STEPS, 2))


def truncated(adjoint: Any, inputs: Any) -> jax.Array:
    w, h, batches = inputs
    out = jaxmeta.meta_unroll(
        loss_fn,
        lambda h: optax.sgd(h["lr"], h["beta"]),
        w,
        batches | {"index": jnp.asarray(INDEX)},
        hyperparams=h,
        adjoint=adjoint,
    )
    return jnp.sum(jnp.sin(out.params["kernel"])) + out.params["bias"] ** 2 + jnp.sum(out.losses**2)


def by_hand(k: int, inputs: Any) -> jax.Array:
    """A Python loop, the first steps of which are given constants only."""
    w, h, batches = inputs
    given = jax.lax.stop_gradient((w, h, batches))
    memory, losses = None, []
    for t in range(STEPS):
        if t == STEPS - k:
            w, memory = jax.lax.stop_gradient((w, memory)) if k < STEPS else (w, memory)
        own_w, own_h, own = (w, h, batches) if t >= STEPS - k else (w, given[1], given[2])
        own_w = jax.lax.stop_gradient(own_w) if t < STEPS - k else own_w
        batch = jax.tree.map(lambda leaf, t=t: leaf[t], own) | {"index": INDEX[t]}
        loss, g = jax.value_and_grad(loss_fn)(own_w, batch, own_h)
        w, memory = support.momentum(t, own_h, own_w, g, memory)
        losses.append(loss)
    losses = jnp.stack(losses)
    return jnp.sum(jnp.sin(w["kernel"])) + w["bias"] ** 2 + jnp.sum(losses**2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("k", [1, 3, STEPS])
def test_first_and_second_derivatives_of_a_loop_by_hand(k: int) -> None:
    inputs = problem()
    direction = support.random_like(inputs)
    actual = support.second_order(functools.partial(truncated, TruncatedReverse(k)))
    expected = support.second_order(functools.partial(by_hand, k))
    support.assert_close(actual(inputs, direction), expected(inputs, direction), 1e-12)


@pytest.mark.usefixtures("x64")
def test_all_orders_of_second_derivatives() -> None:
    w, h, batches = problem()

    def of(f: Any, outer: Any, inner: Any) -> Any:
        return jax.jit(outer(inner(lambda h: f((w, h, batches)))))(h)

    expected = of(functools.partial(by_hand, 3), jax.jacfwd, jax.jacrev)
    for outer in (jax.jacfwd, jax.jacrev):
        for inner in (jax.jacfwd, jax.jacrev):
            actual = of(functools.partial(truncated, TruncatedReverse(3)), outer, inner)
            support.assert_close(actual, expected, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("adjoint", [ReverseMode(), StepCheckpoint(), MixedMode()], ids=repr)
def test_any_way_of_differentiating_the_last_steps(adjoint: Any) -> None:
    inputs = problem()
    expected = jax.jit(jax.grad(functools.partial(by_hand, 3)))(inputs)
    for combined in (TruncatedReverse(3, adjoint), MixedMode(TruncatedReverse(3, adjoint))):
        actual = jax.jit(jax.grad(functools.partial(truncated, combined)))(inputs)
        support.assert_close(actual, expected, 1e-12)


@pytest.mark.usefixtures("x64")
def test_under_vmap() -> None:
    w, h, batches = problem()
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), w)
    gradient = jax.grad(lambda h, w: truncated(TruncatedReverse(2), (w, h, batches)))
    expected = jax.grad(lambda h, w: by_hand(2, (w, h, batches)))
    actual = jax.jit(jax.vmap(gradient, (None, 0)))(h, stacked)
    for i in range(2):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        support.assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], actual), expected(h, own))


@pytest.mark.usefixtures("x64")
def test_what_a_loss_closes_over() -> None:
    w, h, batches = problem()

    def of(shift: Any, adjoint: Any) -> jax.Array:
        def shifted(w: Any, batch: Any, h: Any) -> jax.Array:
            return loss_fn(jax.tree.map(lambda leaf: leaf - shift, w), batch, h)

        out = jaxmeta.meta_unroll(
            shifted,
            lambda h: optax.sgd(h["lr"] * (1 + shift)),
            w,
            batches | {"index": jnp.asarray(INDEX)},
            hyperparams=h,
            adjoint=adjoint,
        )
        return out.params["bias"]

    def continued(shift: Any) -> jax.Array:
        """The same by two loops, of which the first is constant."""
        first = jax.tree.map(lambda leaf: leaf[:-2], batches)
        last = jax.tree.map(lambda leaf: leaf[-2:], batches)

        def run(shift: Any, w: Any, batches: Any, index: Any) -> Any:
            def shifted(w: Any, batch: Any, h: Any) -> jax.Array:
                return loss_fn(jax.tree.map(lambda leaf: leaf - shift, w), batch, h)

            rates = h | {"lr": h["lr"] * (1 + shift)}
            return support.train_by_hand(
                shifted, support.sgd, w, batches | {"index": index}, rates
            )[0]

        middle = run(0.1, w, first, INDEX[:-2])
        return run(shift, middle, last, INDEX[-2:])["bias"]

    actual = jax.value_and_grad(lambda shift: of(shift, TruncatedReverse(2)))(0.1)
    support.assert_close(actual, jax.value_and_grad(continued)(0.1))


@pytest.mark.usefixtures("x64")
def test_outputs_of_constant_steps_are_constant() -> None:
    def outputs(w: Any) -> Any:
        out = jaxmeta.meta_unroll(
            lambda w, x: (jnp.sum((w - x) ** 2), {"w": w, "x": x}),
            optax.sgd(0.1),
            w,
            jnp.arange(5.0),
            has_aux=True,
            trajectory=True,
            adjoint=TruncatedReverse(2),
        )
        return out.losses, out.aux["w"], out.trajectory, out.params

    w = jnp.float64(0.7)
    slopes = jax.jacrev(outputs)(w)
    assert all(not np.any(slope) for slope in slopes)  # what they share is w, given

    def of_batches(x: Any) -> Any:
        out = jaxmeta.meta_unroll(
            lambda w, x: jnp.sum((w - x) ** 2), optax.sgd(0.1), w, x, adjoint=TruncatedReverse(2)
        )
        return out.losses

    by_batch = np.asarray(jax.jacrev(of_batches)(jnp.arange(5.0)))
    expected = np.asarray(
        jax.jacrev(
            lambda x: (
                jaxmeta.meta_unroll(
                    lambda w, x: jnp.sum((w - x) ** 2), optax.sgd(0.1), w, x, adjoint=ReverseMode()
                ).losses
            )
        )(jnp.arange(5.0))
    )
    assert np.count_nonzero(expected[3:, 3:]) == 3
    np.testing.assert_allclose(by_batch[3:, 3:], expected[3:, 3:], rtol=1e-12)
    assert not by_batch[:3].any()
    assert not by_batch[:, :3].any()


def test_memory_is_that_of_the_last_steps() -> None:
    def temporary_bytes(adjoint: Any, steps: int) -> int:
        def end(lr: Any, w: Any, x: Any) -> jax.Array:
            out = jaxmeta.meta_unroll(
                lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2),
                optax.sgd,
                w,
                batch=x,
                num_steps=steps,
                hyperparams=lr,
                adjoint=adjoint,
            )
            return jnp.sum(out.params)

        shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (16, 16), (64, 16))]
        analysis = jax.jit(jax.grad(end)).lower(*shapes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    few, many = (temporary_bytes(TruncatedReverse(4), steps) for steps in (16, 256))
    assert many - few <= 2 * 4 * 240  # losses
    assert temporary_bytes(TruncatedReverse(16), 256) > many


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "steps is 0; expected at least 1"),
        ((2.0,), "steps is 2.0; expected how many"),
        ((True,), "steps is True; expected how many"),
        ((2, ReverseMode), "class ReverseMode; expected an instance"),
    ],
)
def test_options_are_checked(arguments: Any, message: str) -> None:
    with pytest.raises(jaxmeta.JaxmetaError, match=message):
        TruncatedReverse(*arguments)


def test_it_says_that_it_approximates() -> None:
    out = jaxmeta.meta_unroll(
        lambda w, x: (w - x) ** 2,
        optax.sgd(0.1),
        jnp.float32(0),
        jnp.ones(5),
        adjoint=TruncatedReverse(2),
    )
    assert "last 2 of 5 steps" in out.adjoint
    assert "approximation" in out.adjoint
