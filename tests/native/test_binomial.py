"""Binomial checkpointing: its schedule against the definition, what it keeps and computes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta
from jaxmeta import ArgumentTypeError, ArgumentValueError, BinomialCheckpoint, ReverseMode
from jaxmeta.adjoint.schedule import binomial_schedule, fewest_advances
from tests.native import support


@functools.cache
def fewest(steps: int, free: int) -> int:
    """By trying every place for the next state that is kept."""
    if steps == 1:
        return 0
    if free == 0:
        return steps * (steps - 1) // 2
    return min(
        ahead + fewest(steps - ahead, free - 1) + fewest(ahead, free) for ahead in range(1, steps)
    )


def play(length: int, checkpoints: int) -> int:
    """Follow a schedule: steps reversed last to first, from states that are there; count."""
    schedule = binomial_schedule(length, checkpoints)
    slots = {0: 0} | {int(s): t for t, s in enumerate(schedule.first) if s >= 0}
    count = max((t for t, s in enumerate(schedule.first) if s >= 0), default=0)
    assert [row[0] for row in schedule.rows] == list(reversed(range(length)))
    for step, start, begin, end in schedule.rows:
        position = slots[start]
        for advanced, slot in schedule.advances[begin:end]:
            assert advanced == position
            position, count = position + 1, count + 1
            if slot >= 0:
                slots[int(slot)] = position
        assert position == step
    assert set(slots) <= set(range(checkpoints + 1))
    return count


@pytest.mark.parametrize("checkpoints", range(1, 7))
def test_no_schedule_is_better(checkpoints: int) -> None:
    for length in range(1, 40):
        best = fewest(length, checkpoints)
        assert play(length, checkpoints) == best == fewest_advances(length, checkpoints)


@pytest.mark.parametrize("length, checkpoints", [(10_000, 3), (1000, 999), (512, 40)])
def test_long_loops(length: int, checkpoints: int) -> None:
    assert play(length, checkpoints) == fewest_advances(length, checkpoints)


def loss_fn(w: Any, x: Any) -> jax.Array:
    return jnp.mean(jnp.tanh(x @ w) ** 2)


def gradient(adjoint: Any, steps: int, loss: Any = loss_fn) -> Any:
    def meta_loss(lr: Any, w: Any, xs: Any) -> jax.Array:
        out = jaxmeta.meta_unroll(loss, optax.adam, w, xs, hyperparams=lr, adjoint=adjoint)
        return jnp.sum(out.params**3) + jnp.sum(out.losses)

    return jax.grad(meta_loss, argnums=(0, 1, 2))


def problem(steps: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    w, xs = rng.normal(size=(4, 4)), rng.normal(size=(steps, 3, 4))
    return jnp.asarray(0.1), jnp.asarray(w), jnp.asarray(xs)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("checkpoints", [1, 3, 50])
@pytest.mark.parametrize("steps", [0, 1, 2, 13])
def test_gradients(steps: int, checkpoints: int) -> None:
    arguments = problem(steps)
    actual = jax.jit(gradient(BinomialCheckpoint(checkpoints), steps))(*arguments)
    support.assert_close(actual, jax.jit(gradient(ReverseMode(), steps))(*arguments), 1e-12)


def test_how_often_a_step_is_computed() -> None:
    """Once forward, as often as the schedule says, once in reverse; the first pass keeps states."""
    seen: list[int] = []
    steps, checkpoints = 20, 3

    def counted(w: Any, x: Any) -> jax.Array:
        jax.debug.callback(lambda: seen.append(1))
        return loss_fn(w, x)

    jax.block_until_ready(
        gradient(BinomialCheckpoint(checkpoints), steps, counted)(*problem(steps))
    )
    jax.effects_barrier()
    kept = binomial_schedule(steps, checkpoints).first
    in_first_pass = max(t for t, slot in enumerate(kept) if slot >= 0)
    again = fewest_advances(steps, checkpoints) - in_first_pass
    assert len(seen) == steps + again + steps


def compiled(adjoint: Any, steps: int) -> Any:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((), (64, 64), (steps, 2, 64))]
    return jax.jit(gradient(adjoint, steps)).lower(*shapes).compile()


def temporary_bytes(adjoint: Any, steps: int) -> int:
    analysis = compiled(adjoint, steps).memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_memory_does_not_grow_with_the_steps() -> None:
    more = temporary_bytes(BinomialCheckpoint(4), 512) - temporary_bytes(BinomialCheckpoint(4), 128)
    batches = 384 * 2 * 64 * 4  # batches have gradients, too
    assert more < 3 * batches
    state = 3 * 64 * 64 * 4
    a_slot = (
        temporary_bytes(BinomialCheckpoint(12), 128) - temporary_bytes(BinomialCheckpoint(4), 128)
    ) / 8
    assert a_slot == pytest.approx(state, rel=0.1)


def test_the_program_does_not_grow_with_the_steps() -> None:
    sizes = [len(compiled(BinomialCheckpoint(4), steps).as_text()) for steps in (128, 512)]
    tables = 16 * binomial_schedule(512, 4).advances.size  # constants, as text
    assert sizes[1] - sizes[0] < tables


def test_a_budget_is_kept() -> None:
    budget = temporary_bytes(BinomialCheckpoint(6), 128) + 100_000
    used = temporary_bytes(BinomialCheckpoint(memory_budget=budget), 128)
    assert 0.5 * budget < used <= budget


def test_a_budget_without_room() -> None:
    with pytest.raises(ArgumentValueError, match=r"memory_budget is 1000 bytes; one reversed step"):
        compiled(BinomialCheckpoint(memory_budget=1000), 8)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ArgumentValueError, "was given nothing"),
        ({"max_checkpoints": 1, "memory_budget": 9}, ArgumentValueError, "expected one of"),
        ({"max_checkpoints": 0}, ArgumentValueError, "max_checkpoints is 0; expected at least 1"),
        ({"max_checkpoints": 2.0}, ArgumentTypeError, "max_checkpoints is 2.0; expected a whole"),
        ({"memory_budget": "1GB"}, ArgumentTypeError, "memory_budget is '1GB'"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BinomialCheckpoint(**arguments)
