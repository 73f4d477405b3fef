"""Binomial checkpointing: the least recomputation for a given number of states kept."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmeta.adjoint.base import Adjoint, LossAndAux, Step
from jaxmeta.adjoint.custom import replace, take, with_choice, with_reverse
from jaxmeta.adjoint.flat import FlatLoop, flatten_loop
from jaxmeta.adjoint.linear import Arrays
from jaxmeta.adjoint.nested import NestedCheckpoint
from jaxmeta.adjoint.schedule import Schedule, binomial_schedule
from jaxmeta.errors import ArgumentTypeError, ArgumentValueError
from jaxmeta.manual_axes import vary, varying
from jaxmeta.trees import PyTree

Cotangents = list[jax.Array | None]


@dataclass(frozen=True)
class BinomialCheckpoint(Adjoint):
    r"""Reverse mode that keeps a given number of states, and computes steps again least often.

    With :math:`c` states beside the first, and each step computed at most :math:`r` times more,
    a loop of :math:`\binom{c + 1 + r}{r}` steps can be reversed; the schedule that does it is
    run as one compiled loop over a table, so that the program does not grow with T. The
    derivatives are those of :class:`ReverseMode`; those of second order use
    :class:`NestedCheckpoint`.

    Args:
        max_checkpoints: :math:`c`, how many states (parameters and optimizer state) are kept
            beside the first and the one at work.
        memory_budget: instead, the bytes that the reverse pass may take: the memory of one
            reversed step, as XLA's ``memory_analysis`` gives it, and as many states as there is
            room for. That one step is compiled for it.

    Raises:
        ArgumentValueError: the budget has no room for a step and three states.

    Example:
        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> def meta_loss(lr):
        ...     loss = lambda w, batch: (w - batch) ** 2
        ...     out = jaxmeta.meta_unroll(
        ...         loss, optax.sgd, jnp.float32(0.0), jnp.ones(3), hyperparams=lr,
        ...         adjoint=jaxmeta.BinomialCheckpoint(1))
        ...     return (out.params - 2.0) ** 2
        >>> print(f"{jax.grad(meta_loss)(0.25):.4f}")
        -3.3750

    References:
        Griewank and Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software
        26, 2000, https://doi.org/10.1145/347837.347846.
    """

    max_checkpoints: int | None = None
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        given = {"max_checkpoints": self.max_checkpoints, "memory_budget": self.memory_budget}
        named = {name: value for name, value in given.items() if value is not None}
        if len(named) != 1:
            raise ArgumentValueError(
                f"BinomialCheckpoint was given {' and '.join(named) or 'nothing'}; expected one of "
                "max_checkpoints and memory_budget."
            )
        for name, value in named.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentTypeError(f"{name} is {value!r}; expected a whole number.")
            if value < 1:
                raise ArgumentValueError(f"{name} is {value}; expected at least 1.")

    def value_and_grad(self, fn: LossAndAux) -> Callable[[PyTree], tuple[tuple[Any, Any], PyTree]]:
        """See :meth:`Adjoint.value_and_grad`."""
        return jax.value_and_grad(fn, has_aux=True)

    def loop(self, step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        """See :meth:`Adjoint.loop`."""
        if length == 0:
            return jax.lax.scan(step, carry, xs, length=0)
        loop, arrays = flatten_loop(step, carry, xs, length)
        checkpoints = self.max_checkpoints or _affordable(loop, arrays, self.memory_budget or 0)
        schedule = binomial_schedule(length, min(checkpoints, length - 1))

        def reverse(inputs: Arrays, wanted: tuple[int, ...], cotangents: Cotangents) -> Arrays:
            known = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
            count = len(inputs)

            def fast(everything: Arrays) -> Arrays:
                filled = replace([None] * len(cotangents), known, everything[count:])
                return _reverse(loop, schedule, everything[:count], wanted, filled)

            def reference(everything: Arrays) -> Arrays:
                filled = take(everything[count:], range(len(known)))
                return _reference(loop, everything[: len(arrays)], wanted, known, filled)

            chosen = with_choice(fast, lambda *_: reference)
            return chosen([*inputs, *take(cotangents, known)])

        ruled = with_reverse(loop.scan, reverse, functools.partial(_forward, loop, schedule))
        return jax.tree.unflatten(loop.results, ruled(arrays))


def _forward(loop: FlatLoop, schedule: Schedule, arrays: Arrays) -> tuple[Arrays, Arrays]:
    """Run the loop; return its results, and the slots with the states that are kept first."""
    constants, carry, xs = loop.split(arrays)
    number = int(schedule.advances[:, 1].max(initial=0))
    number = 1 + max(number, int(schedule.first.max()), int(schedule.rows[:, 1].max()))
    empty = [jnp.zeros((number, *leaf.shape), leaf.dtype) for leaf in carry]
    slots = [vary(s, varying(leaf)) for s, leaf in zip(empty, carry, strict=True)]
    slots = _keep(slots, carry, jnp.int32(0))

    def step(state: Any, x_and_slot: Any) -> tuple[Any, Arrays]:
        carry, slots = state
        x, slot = x_and_slot
        slots = _keep(slots, carry, slot)
        carry, y = loop.step(constants, carry, x)
        return (carry, slots), y

    (carry, slots), ys = jax.lax.scan(
        step, (carry, slots), (xs, jnp.asarray(schedule.first)), length=loop.length
    )
    return [*carry, *ys], slots


def _reverse(
    loop: FlatLoop,
    schedule: Schedule,
    inputs: Arrays,
    wanted: tuple[int, ...],
    cotangents: Cotangents,
) -> Arrays:
    """Reverse the steps in the order of the schedule.

    Args:
        loop: the loop.
        schedule: of its steps.
        inputs: the loop's arrays, and the slots.
        wanted: which of the arrays to differentiate in.
        cotangents: of the loop's results; None where there is none.
    """
    count = len(inputs) - loop.carry
    arrays, slots = inputs[:count], inputs[count:]
    constants, carry, xs = loop.split(arrays)
    first_x = loop.constants + loop.carry
    floats = [i for i, leaf in enumerate(carry) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    shared = [i for i in wanted if i < loop.constants]
    own = [i - first_x for i in wanted if i >= first_x]
    of_ys = cotangents[loop.carry :]
    kept_ys = [i for i, cotangent in enumerate(of_ys) if cotangent is not None]
    moves = [jnp.asarray(table) for table in schedule.advances.T]

    def advance(number: Any, state: Any) -> Any:
        carry, slots = state
        step, slot = (table[number] for table in moves)
        carry, _ = loop.step(constants, carry, _at(xs, step))
        return carry, _keep(slots, carry, slot)

    def row(state: Any, row: jax.Array) -> tuple[Any, None]:
        slots, of_carry, of_shared, of_own = state
        step, start, begin, end = row
        carry, slots = jax.lax.fori_loop(begin, end, advance, (_at(slots, start), slots))
        x = _at(xs, step)

        def moving(shared_values: Arrays, states: Arrays, own_values: Arrays) -> Any:
            new, y = loop.step(
                replace(constants, shared, shared_values),
                replace(carry, floats, states),
                replace(x, own, own_values),
            )
            return take(new, floats), take(y, kept_ys)

        _, pull = jax.vjp(moving, take(constants, shared), take(carry, floats), take(x, own))
        from_shared, of_carry, from_own = pull((of_carry, _at(take(of_ys, kept_ys), step)))
        of_shared = [a + b for a, b in zip(of_shared, from_shared, strict=True)]
        of_own = [
            jax.lax.dynamic_update_index_in_dim(a, b, step, 0)
            for a, b in zip(of_own, from_own, strict=True)
        ]
        return (slots, of_carry, of_shared, of_own), None

    start = (
        slots,
        [_zeros(carry[i]) if cotangents[i] is None else cotangents[i] for i in floats],
        list(map(_zeros, take(constants, shared))),
        list(map(_zeros, take(xs, own))),
    )
    (_, of_carry, of_shared, of_own), _ = jax.lax.scan(row, start, jnp.asarray(schedule.rows))
    found = dict(zip(shared, of_shared, strict=True))
    found |= {loop.constants + i: c for i, c in zip(floats, of_carry, strict=True)}
    found |= {first_x + i: c for i, c in zip(own, of_own, strict=True)}
    return [found[i] for i in wanted]


def _reference(
    loop: FlatLoop, arrays: Arrays, wanted: tuple[int, ...], known: list[int], cotangents: Arrays
) -> Arrays:
    """Compute the same by nested checkpoints, which can be differentiated again."""

    def moving(values: Arrays) -> Arrays:
        return take(loop.run(NestedCheckpoint(), replace(arrays, wanted, values)), known)

    _, pull = jax.vjp(moving, take(arrays, wanted))
    return pull(cotangents)[0]


def _affordable(loop: FlatLoop, arrays: Arrays, budget: int) -> int:
    """Return how many states fit into the budget beside what one reversed step takes."""
    constants, carry, xs = loop.split(arrays)
    floats = [i for i, leaf in enumerate(carry) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

    def reversed_step(constants: Arrays, carry: Arrays, x: Arrays, of_carry: Arrays) -> Any:
        everything = [*constants, *carry]
        places = [i for i, a in enumerate(everything) if jnp.issubdtype(a.dtype, jnp.inexact)]

        def moving(values: Arrays) -> Arrays:
            moved = replace(everything, places, values)
            new, _ = loop.step(moved[: loop.constants], moved[loop.constants :], x)
            return take(new, floats)

        return jax.vjp(moving, take(everything, places))[1](of_carry)

    shapes = [
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in group]
        for group in (constants, carry, [jax.eval_shape(lambda x: x[0], x) for x in xs])
    ]
    of_carry = take(shapes[1], floats)
    analysis = jax.jit(reversed_step).lower(*shapes, of_carry).compile().memory_analysis()
    if analysis is None:
        raise ArgumentValueError(
            "memory_budget needs XLA's memory_analysis, which this platform does not give: pass "
            "max_checkpoints."
        )
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in carry)
    step = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
    # The first state, the one at work and its cotangent are there in any case.
    number = (budget - step) // max(state, 1) - 3
    if number < 1:
        raise ArgumentValueError(
            f"memory_budget is {budget} bytes; one reversed step takes {step}, and a state "
            f"{state}, of which 4 are needed: give at least {step + 4 * state}."
        )
    return number


def _keep(slots: Arrays, carry: Arrays, slot: jax.Array) -> Arrays:
    """Put the state into a slot; into none where it is -1."""
    place = jnp.maximum(slot, 0)

    def put(stack: jax.Array, leaf: jax.Array) -> jax.Array:
        old = jax.lax.dynamic_index_in_dim(stack, place, keepdims=False)
        new = jnp.where(slot >= 0, leaf, old)
        return jax.lax.dynamic_update_index_in_dim(stack, new, place, 0)

    return [put(stack, leaf) for stack, leaf in zip(slots, carry, strict=True)]


def _at(stacks: Arrays, index: jax.Array) -> Arrays:
    return [jax.lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in stacks]


def _zeros(array: jax.Array) -> jax.Array:
    return vary(jnp.zeros_like(array), varying(array))
