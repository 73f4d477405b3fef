"""One compilation for each program and shape, and nothing stale or leaked."""

import functools
import gc
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta
from jaxmeta.static import Static, closes_over_tracer


class Counter:
    """A loss that counts how often it is traced."""

    def __init__(self) -> None:
        self.traces = 0

    def __call__(self, w: Any, x: Any) -> jax.Array:
        self.traces += 1
        return jnp.mean((w - x) ** 2)


def test_a_loss_is_traced_once_for_each_shape() -> None:
    loss, optimizer = Counter(), optax.adam(0.1)
    for _ in range(3):
        jaxmeta.meta_unroll(loss, optimizer, jnp.ones(2), jnp.ones((3, 2)))
    assert loss.traces == 1
    for _ in range(2):  # another number of steps, then another shape
        jaxmeta.meta_unroll(loss, optimizer, jnp.ones(2), jnp.ones((4, 2)))
    assert loss.traces == 2
    jaxmeta.meta_unroll(loss, optimizer, jnp.ones(5), jnp.ones((4, 5)))
    assert loss.traces == 3


def test_a_variable_that_the_loss_closes_over_may_be_bound_anew() -> None:
    target, traces = 1.0, []

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        traces.append(1)
        return (w - target * x) ** 2

    optimizer = optax.sgd(0.5)  # to the minimum in one step
    results = []
    for target in (1.0, 1.0, 3.0):  # noqa: B007 - the loss reads it
        results.append(float(jaxmeta.meta_unroll(loss, optimizer, 0.0, jnp.ones(1)).params))
    assert results == [1.0, 1.0, 3.0]
    assert len(traces) == 2


def test_variables_of_inner_functions_may_be_bound_anew() -> None:
    scale = 1.0

    def inner(w: jax.Array) -> jax.Array:
        return scale * w

    def loss(w: jax.Array, x: jax.Array) -> jax.Array:
        return inner(w) * x

    before = jaxmeta.meta_unroll(loss, optax.sgd(1.0), 0.0, jnp.ones(1)).params
    scale = 5.0
    after = jaxmeta.meta_unroll(loss, optax.sgd(1.0), 0.0, jnp.ones(1)).params
    assert (float(before), float(after)) == (-1.0, -5.0)


@pytest.mark.parametrize("adjoint", [jaxmeta.ReverseMode(), jaxmeta.StepCheckpoint()])
def test_a_loss_is_traced_once_under_eager_derivatives(adjoint: jaxmeta.Adjoint) -> None:
    loss = Counter()

    def optimizer(h: Any) -> optax.GradientTransformation:
        return optax.sgd(h)

    def final(h: Any) -> jax.Array:
        return jaxmeta.meta_unroll(
            loss, optimizer, 0.5, jnp.ones(3), hyperparams=h, adjoint=adjoint
        ).params

    for lr in jnp.array([0.1, 0.2, 0.3]):
        jax.grad(final)(lr)
        jax.jvp(final, (lr,), (lr,))
        jax.vmap(final)(jnp.stack([lr, lr]))
    assert loss.traces == 1


def test_debug_and_checks_do_not_trace_the_loss_again() -> None:
    loss = Counter()
    for _ in range(2):
        jaxmeta.meta_unroll(loss, optax.sgd(0.1), 0.5, jnp.ones(3), trajectory=True, debug=True)
    assert loss.traces == 1


def test_weakly_typed_parameters_do_not_make_another_program() -> None:
    loss, optimizer = Counter(), optax.sgd(0.1)
    out = jaxmeta.meta_unroll(loss, optimizer, 0.5, jnp.ones(3))
    out = jaxmeta.meta_unroll(loss, optimizer, out.params, jnp.ones(3), opt_state=out.opt_state)
    jaxmeta.meta_unroll(loss, optimizer, jnp.asarray(0.5), jnp.ones(3), opt_state=out.opt_state)
    assert loss.traces == 2  # with and without opt_state


def test_an_optax_optimizer_made_in_the_call_is_the_same_program() -> None:
    loss = Counter()
    for _ in range(3):
        jaxmeta.meta_unroll(loss, optax.chain(optax.clip(1.0), optax.adam(0.1)), 0.5, jnp.ones(3))
    assert loss.traces == 1
    end = jaxmeta.meta_unroll(
        loss, optax.chain(optax.clip(1.0), optax.adam(0.2)), 0.5, jnp.ones(3)
    ).params
    assert loss.traces == 2
    assert end == pytest.approx(0.5 + 3 * 0.2, abs=0.05)


def test_equal_adjoints_are_the_same_program() -> None:
    loss = Counter()
    for _ in range(3):
        jaxmeta.meta_unroll(
            loss, optax.sgd(0.1), 0.5, jnp.ones(3), adjoint=jaxmeta.StepCheckpoint()
        )
    assert loss.traces == 1


def test_unhashable_losses_and_optimizers_are_known_by_identity() -> None:
    class Unhashable(Counter):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    class Descent:
        def __init__(self, lr: float):
            self.lr = lr

        def init(self, params: Any) -> dict[str, Any]:
            return {}

        def update(self, gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
            return jax.tree.map(lambda g: -self.lr * g, gradient), state

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    first, second, descent = Unhashable(), Unhashable(), Descent(0.5)
    for _ in range(2):
        jaxmeta.meta_unroll(first, descent, 0.5, jnp.ones(1))
        jaxmeta.meta_unroll(second, descent, 0.5, jnp.ones(1))
    assert (first.traces, second.traces) == (1, 1)
    slow = jaxmeta.meta_unroll(first, Descent(0.0), 0.5, jnp.ones(1))
    assert first.traces == 2 and slow.params == 0.5


def test_a_loss_over_other_values_is_another_program() -> None:
    def final(shift: float) -> float:
        return float(
            jaxmeta.meta_unroll(
                lambda w, x: (w - x - shift) ** 2, optax.sgd(0.5), 0.0, jnp.ones(1)
            ).params
        )

    assert [final(0.0), final(1.0), final(2.0)] == [1.0, 2.0, 3.0]


def test_a_traced_value_that_a_loss_closes_over_is_not_kept() -> None:
    seen = []

    def final(scale: Any) -> jax.Array:
        def loss(w: Any, x: Any) -> jax.Array:
            return scale * (w - x) ** 2

        seen.append(weakref.ref(loss))
        return jaxmeta.meta_unroll(loss, optax.sgd(0.1), 0.5, jnp.ones(2)).params

    with jax.checking_leaks():
        jax.grad(final)(1.0)
    gc.collect()
    assert seen[0]() is None


class TestStatic:
    """What makes two objects the same part of a program."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
            lambda: optax.adamw(optax.cosine_decay_schedule(0.1, 10), weight_decay=1e-3),
            lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1)),
            lambda: optax.sgd(0.1)._replace(),
        ],
    )
    def test_optax_by_its_arguments(self, make: Any) -> None:
        assert Static(make()) == Static(make()) and hash(Static(make())) == hash(Static(make()))

    @pytest.mark.parametrize(
        "one, other",
        [
            (lambda: optax.sgd(0.1), lambda: optax.sgd(0.2)),
            (lambda: optax.sgd(0.1), lambda: optax.sgd(0.1, momentum=0.9)),
            (lambda: optax.sgd(0.0), lambda: optax.sgd(-0.0)),
            (lambda: optax.clip(1), lambda: optax.clip(True)),
            (lambda: optax.sgd(0.1), lambda: optax.adam(0.1)),
            # A mask is a dict, which may change between the calls.
            (lambda: optax.masked(optax.sgd(0.1), {"w": True}),) * 2,
            # A function of the user's is known by its identity.
            (lambda: optax.sgd(lambda count: 0.1),) * 2,
            (lambda: optax.sgd(jnp.asarray(0.1)),) * 2,
            (lambda: optax.clip(np.array([0.1])),) * 2,
        ],
    )
    def test_different(self, one: Any, other: Any) -> None:
        assert Static(one()) != Static(other())

    def test_methods_by_their_object(self) -> None:
        counter = Counter()
        assert Static(counter.__call__) == Static(counter.__call__)
        assert Static(counter.__call__) != Static(Counter().__call__)

    def test_nothing_else_than_a_static(self) -> None:
        assert Static(None) != None  # noqa: E711

    def test_tracers_are_found_in_closures(self) -> None:
        found = []

        def plain_sum(x: Any) -> Any:
            return x + x

        def outer(x: Any) -> Any:
            def direct() -> Any:
                return x

            def nested() -> Any:
                return direct()

            def in_a_tree() -> Any:
                return tree

            def recursive() -> Any:
                return recursive() + plain

            class Task:
                def __init__(self, held: Any):
                    self.held = held

                def __call__(self) -> Any:
                    return self.held

                method = __call__

            tree, plain = {"x": [x]}, 1.0
            functions = [direct, nested, in_a_tree, optax.sgd(x), functools.partial(plain_sum, x)]
            functions += [Task(x), Task({"x": x}).method, jax.jit(direct)]
            functions += [recursive, Task(1.0), Task(1.0).method, functools.partial(plain_sum, 1.0)]
            found.extend(closes_over_tracer(function) for function in functions)
            return x

        jax.grad(outer)(1.0)
        assert found == [True] * 8 + [False] * 4
