"""The loop itself: batches, numbers of steps, keys, state, continuation, extra arguments."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta

XS = np.linspace(0.5, 2.0, 7)
SGD = optax.sgd(0.1)

pytestmark = pytest.mark.usefixtures("x64")


def loss_fn(w: Any, x: Any) -> jax.Array:
    return (w - x) ** 2


def noisy_loss(w: Any, x: Any, *, state: Any, key: Any) -> Any:
    noise = jax.random.normal(key, dtype=jnp.float64)
    mean = 0.8 * state["mean"] + 0.2 * x
    return (w - mean - noise) ** 2, ({"mean": mean}, noise)


def assert_same_key(one: Any, other: Any) -> None:
    np.testing.assert_array_equal(jax.random.key_data(one), jax.random.key_data(other))


def test_losses_are_those_before_each_update() -> None:
    out = jaxmeta.meta_unroll(loss_fn, SGD, 0.0, XS, trajectory=True)
    w = 0.0
    for step, x in enumerate(XS):
        assert out.losses[step] == pytest.approx((w - x) ** 2)
        assert out.trajectory[step] == pytest.approx(w)
        w -= 0.1 * 2 * (w - x)
    assert out.params == pytest.approx(w) and out.trajectory[-1] == out.params
    assert out.trajectory.shape == (8,)
    assert out.aux is None and out.state is None and out.key is None


def test_nothing_is_returned_that_was_not_asked_for() -> None:
    assert jaxmeta.meta_unroll(loss_fn, SGD, 0.0, XS).trajectory is None


def test_one_batch_for_every_step() -> None:
    batch = np.array([1.0, 2.0])

    def once(w: Any, x: Any) -> jax.Array:
        return jnp.mean(loss_fn(w, x))

    repeated = jaxmeta.meta_unroll(once, SGD, 0.0, np.stack([batch] * 2))
    shared = jaxmeta.meta_unroll(once, SGD, 0.0, batch=batch, num_steps=2)
    np.testing.assert_allclose(shared.losses, repeated.losses)


def test_a_loss_without_data() -> None:
    def loss(w: Any, batch: Any) -> Any:
        assert batch is None
        return w**2

    assert jaxmeta.meta_unroll(loss, SGD, 1.0, num_steps=2).params == pytest.approx(0.64)


def test_num_steps_may_repeat_what_batches_say() -> None:
    for steps in (7, np.int64(7)):
        assert jaxmeta.meta_unroll(loss_fn, SGD, 0.0, XS, num_steps=steps).losses.shape == (7,)


def test_batches_without_leaves() -> None:
    out = jaxmeta.meta_unroll(lambda w, batch: w**2 + len(batch), SGD, 1.0, {}, num_steps=2)
    assert out.losses[0] == 1


@pytest.mark.parametrize("adjoint", [jaxmeta.ReverseMode(), jaxmeta.StepCheckpoint()])
def test_no_steps(adjoint: jaxmeta.Adjoint) -> None:
    def final(w: Any) -> Any:
        out = jaxmeta.meta_unroll(
            noisy_loss,
            optax.adam(0.1),
            w,
            XS[:0],
            state={"mean": 0.0},
            key=jax.random.key(0),
            has_aux=True,
            trajectory=True,
            debug=True,
            adjoint=adjoint,
        )
        return out.params, out

    slope, out = jax.grad(final, has_aux=True)(0.5)
    assert slope == 1 and out.params == 0.5
    assert out.losses.shape == out.aux.shape == (0,) and out.trajectory.shape == (1,)
    assert_same_key(out.key, jax.random.key(0))


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_three_steps_and_four_are_seven(make_key: Any) -> None:
    def train(xs: Any, **start: Any) -> jaxmeta.Unrolled:
        return jaxmeta.meta_unroll(noisy_loss, optax.adam(0.1), batches=xs, has_aux=True, **start)

    start = {"params": 0.3, "state": {"mean": 0.0}, "key": make_key(1)}
    whole = train(XS, **start)
    first = train(XS[:3], **start)
    second = train(
        XS[3:], params=first.params, state=first.state, key=first.key, opt_state=first.opt_state
    )
    for name in ("params", "state", "opt_state"):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12),
            getattr(second, name),
            getattr(whole, name),
        )
    np.testing.assert_allclose([*first.losses, *second.losses], whole.losses, rtol=1e-12)
    np.testing.assert_allclose([*first.aux, *second.aux], whole.aux, rtol=1e-12)


def test_each_step_is_given_its_own_key() -> None:
    out = jaxmeta.meta_unroll(
        noisy_loss, SGD, 0.0, XS, state={"mean": 0.0}, key=jax.random.key(3), has_aux=True
    )
    key, draws = jax.random.key(3), []
    for _ in XS:
        key, subkey = jax.random.split(key)
        draws.append(jax.random.normal(subkey, dtype=jnp.float64))
    np.testing.assert_allclose(out.aux, draws, rtol=1e-12)
    assert_same_key(out.key, key)


def test_gradients_through_state_and_optimizer_state() -> None:
    def final(given: Any) -> jax.Array:
        out = jaxmeta.meta_unroll(
            lambda w, x, state: ((w - x - state) ** 2, 0.5 * state),
            optax.trace(decay=0.5),
            0.0,
            XS[:2],
            state=given["state"],
            opt_state=optax.TraceState(given["memory"]),
        )
        return out.params

    # m1 = 2 (w0 - x - s) + m0/2, w1 = w0 + m1, m2 = 2 (w1 - x' - s/2) + m1/2, w2 = w1 + m2
    gradient = jax.grad(final)({"state": 0.7, "memory": 0.2})
    assert gradient["memory"] == pytest.approx(0.5 + 2 * 0.5 + 0.5 * 0.5)
    assert gradient["state"] == pytest.approx(-2 + 2 * (-2 - 0.5) + 0.5 * -2)


def test_final_state_is_differentiable() -> None:
    def final(x: Any) -> jax.Array:
        return jaxmeta.meta_unroll(
            lambda w, x, state: ((w - x) ** 2, state * x), SGD, 0.0, x, state=1.0
        ).state

    np.testing.assert_allclose(jax.grad(final)(jnp.array([2.0, 3.0])), [3.0, 2.0])


class TestHowHyperparamsArrive:
    """As third argument or by name, and only where they are meant."""

    H = 2.0

    def end(self, loss: Any, **options: Any) -> Any:
        return jaxmeta.meta_unroll(loss, SGD, 0.0, XS[:1], hyperparams=self.H, **options).losses[0]

    def test_third(self) -> None:
        assert self.end(lambda w, x, anything: w + anything) == 2

    def test_variadic(self) -> None:
        assert self.end(lambda *arguments: arguments[0] + arguments[2]) == 2

    def test_positional_only(self) -> None:
        def loss(w: Any, x: Any, h: Any, /) -> Any:
            return w + h

        assert self.end(loss) == 2

    def test_by_name_with_a_default(self) -> None:
        def loss(w: Any, x: Any, hyperparams: Any = 0.0) -> Any:
            return w + hyperparams

        assert self.end(loss) == 2

    def test_by_name_after_a_key(self) -> None:
        def loss(w: Any, x: Any, key: Any, hyperparams: Any) -> Any:
            return w + hyperparams + 0.0 * jax.random.normal(key)

        assert self.end(loss, key=jax.random.key(0)) == 2

    def test_a_partial_binds_the_third(self) -> None:
        def loss(w: Any, x: Any, scale: Any, h: Any) -> Any:
            return w + 10.0 * scale + h

        assert self.end(lambda w, x, h: loss(w, x, 1.0, h)) == 12
        bound = functools.partial(loss, scale=1.0, h=3.0)
        given = jaxmeta.meta_unroll(bound, optax.sgd, 0.0, XS[:1], hyperparams=self.H)
        assert given.losses[0] == 13 and given.params == -2

    def test_to_the_optimizer_only(self) -> None:
        assert jaxmeta.meta_unroll(loss_fn, optax.sgd, 0.0, XS[:1], hyperparams=0.5).params == 0.5

    def test_a_jitted_loss_and_a_method(self) -> None:
        class Task:
            def loss(self, w: Any, x: Any, h: Any) -> Any:
                return w + h

        assert self.end(jax.jit(lambda w, x, h: w + h)) == 2
        assert self.end(Task().loss) == 2
