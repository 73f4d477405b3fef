"""A plan as a JAX function: its windows' operations, and one `lax.scan` or `vmap` for each loop."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmeta_bridge.recorder.analysis import Shape
from jaxmeta_bridge.recorder.graph import INDEX_BITS
from jaxmeta_bridge.recorder.loops import CARRIED, FIXED, OWN, Loop, Part
from jaxmeta_bridge.recorder.plan import Plan

# Of a window in the plan and one of its externals: the array.
Lookup = Callable[[int, int], Any]
# Window and ref in it: where a value is made.
Address = tuple[int, int]
_ROLES = (CARRIED, FIXED, OWN)


class Emitter:
    """Evaluates the windows of a plan while JAX traces.

    Args:
      plan: what to evaluate.
      parts: its loops.
      adjoint: how loops over steps are differentiated.
    """

    def __init__(self, plan: Plan, parts: Sequence[Part], adjoint: Any) -> None:
        self._leaves = plan.leaves
        self._parts = parts
        self._plan = plan
        self._adjoint = adjoint

    def evaluate(self, inputs: Callable[[int], Any], stacked: dict[Any, Any]) -> list[Any]:
        """The wanted values.

        Args:
          inputs: gives each input by its number.
          stacked: what each iteration of a loop takes for itself, where that is stacked already:
            by start and period of the loop, and place in the first iteration.
        """
        self._stacked = stacked

        def lookup(leaf: int, external: int) -> Any:
            return inputs(~self._leaves[leaf].sources[external])

        required = {ref for ref in self._plan.wanted if type(ref) is tuple}
        made = self._sequence(self._parts, required, lookup)
        return [made[r] if type(r) is tuple else inputs(~r) for r in self._plan.wanted]

    def _sequence(
        self, parts: Sequence[Part], required: Iterable[Address], outer: Lookup
    ) -> dict[Address, Any]:
        """Evaluates parts one after the other; returns what they make."""
        made: dict[Address, Any] = {}

        def lookup(leaf: int, external: int) -> Any:
            source = self._leaves[leaf].sources[external]
            return made[source] if source in made else outer(leaf, external)

        uses = set(required)
        needs: list[set[Address]] = []
        for part in reversed(parts):
            low, high = _range(part)
            needs.append({address for address in uses if low <= address[0] < high})
            for leaf in range(low, high):
                uses.update(s for s in self._leaves[leaf].sources if type(s) is tuple)
        for part, need in zip(parts, reversed(needs), strict=True):
            if isinstance(part, Loop):
                made |= self._loop(part, need, lookup)
            else:
                made |= self._leaf(part, lookup)
        return made

    def _leaf(self, index: int, lookup: Lookup) -> dict[Address, Any]:
        leaf = self._leaves[index]
        values = run_shape(leaf.shape, lambda external: lookup(index, external), self._adjoint)
        return {(index, ref): values[ref] for ref in leaf.needed}

    def _loop(self, loop: Loop, need: set[Address], outer: Lookup) -> dict[Address, Any]:
        before, self._adjoint = self._adjoint, self._chosen(loop) or self._adjoint
        try:
            return self._loop_inside(loop, need, outer)
        finally:
            self._adjoint = before

    def _chosen(self, loop: Loop) -> Any:
        """The adjoint that was asked for, where the loop's steps were made."""
        for leaf in range(loop.start, loop.start + loop.period):
            for op, _ in self._leaves[leaf].shape.steps:
                if getattr(op, "adjoint", None) is not None:
                    return op.adjoint
        return None

    def _loop_inside(self, loop: Loop, need: set[Address], outer: Lookup) -> dict[Address, Any]:
        start, period, count = loop.start, loop.period, loop.count
        wanted: dict[Address, set[int]] = {}  # what of an iteration, of which iterations
        for leaf, ref in need:
            iteration, offset = divmod(leaf - start, period)
            wanted.setdefault((offset, ref), set()).add(iteration)
        places = {role: [p for p, r in loop.roles.items() if r[0] == role] for role in _ROLES}
        targets = {place: loop.roles[place][1:] for place in places[CARRIED]}
        fixed = {place: outer(start + place[0], place[1]) for place in places[FIXED]}
        own = {place: self._own(loop, place, outer) for place in places[OWN]}
        carry = {place: outer(start + place[0], place[1]) for place in places[CARRIED]}

        def step(carry: dict[Address, Any], mine: dict[Address, Any]) -> tuple[Any, Any]:
            given = fixed | carry | mine
            required = {*wanted, *targets.values()}
            made = self._sequence(
                loop.body,
                [(start + offset, ref) for offset, ref in required],
                lambda leaf, external: given[leaf - start, external],
            )
            found = {place: made[start + place[0], place[1]] for place in required}
            return {place: found[target] for place, target in targets.items()}, {
                place: found[place] for place in wanted
            }

        if loop.independent:
            stacks = jax.vmap(lambda mine: step({}, mine)[1], axis_size=count)(own)
            final = {}
        else:
            last = [place for place, iterations in wanted.items() if iterations == {count - 1}]
            final, stacks = self._run(step, carry, own, count, last)
        results: dict[Address, Any] = {}
        for place, iterations in wanted.items():
            for iteration in iterations:
                address = (start + iteration * period + place[0], place[1])
                results[address] = final[place] if place in final else stacks[place][iteration]
        return results

    def _run(
        self, step: Any, carry: Any, own: Any, count: int, last: Sequence[Address]
    ) -> tuple[dict[Address, Any], dict[Address, Any]]:
        """Runs the steps; what only the last one has to show is handed on, not stacked."""
        first = jax.tree.map(lambda stack: stack[0], own)
        shapes = jax.eval_shape(step, carry, first)[1]
        shown = {place: jnp.zeros(shapes[place].shape, shapes[place].dtype) for place in last}

        def both(state: Any, mine: Any) -> tuple[Any, Any]:
            carry, found = step(state[0], mine)
            return (carry, {p: found.pop(p) for p in last}), found

        (_, final), stacks = self._adjoint.loop(both, (carry, shown), own, count)
        return final, stacks

    def _own(self, loop: Loop, place: Address, outer: Lookup) -> Any:
        """What each iteration has for itself, stacked."""
        stacked = self._stacked.get((loop.start, loop.period, place))
        if stacked is not None:
            return stacked
        leaves = range(loop.start + place[0], loop.stop, loop.period)
        return jnp.stack([outer(leaf, place[1]) for leaf in leaves])


def _range(part: Part) -> tuple[int, int]:
    return (part.start, part.stop) if isinstance(part, Loop) else (part, part + 1)


def run_shape(shape: Shape, external: Callable[[int], Any], adjoint: Any) -> dict[int, Any]:
    """Evaluates the operations of a window: by ref, what they are."""
    values: dict[int, Any] = {}
    for position, (op, refs) in enumerate(shape.steps):
        inputs = [external(~ref) if ref < 0 else values[ref] for ref in refs]
        for index, output in enumerate(op.lower(inputs, adjoint)):
            values[position << INDEX_BITS | index] = output
    return values
