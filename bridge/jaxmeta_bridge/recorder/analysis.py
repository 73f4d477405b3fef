"""What of a recording some values depend on."""

import dataclasses
import heapq
from collections.abc import Sequence
from typing import Any

from jaxmeta_bridge.recorder.graph import INDEX_BITS, INDEX_MASK, State, Value, Window


def gradient_inputs(values: Sequence[Value]) -> list[Value]:
    """The inputs and leaves to which gradients of the values lead."""
    found: dict[Any, Value] = {}
    needs: dict[Window, set[int]] = {}
    heap: list[tuple[int, Window]] = []

    def need(value: Value) -> None:
        if not value.kind.grad:
            return
        window = value.window
        if window is None or value.leaf:
            # An optimizer's first state is constant, though later ones are not.
            if value.leaf or value.origin is not None or value.data.grad_fn is not None:
                found.setdefault(value.key, value)
            return
        if window not in needs:
            needs[window] = set()
            heapq.heappush(heap, (-window.serial, window))
        needs[window].add(value.ref)

    for value in values:
        need(value)
    while heap:
        window = heapq.heappop(heap)[1]
        for external in _gradient_externals(window.state, frozenset(needs[window])):
            need(window.externals[external])
    return list(found.values())


def _gradient_externals(state: State, needed: frozenset[int]) -> tuple[int, ...]:
    """The externals of a window to which gradients of `needed` may lead."""
    key = ("gradient", needed)
    found = state.analyses.get(key)
    if found is None:
        steps = state.steps()
        seen: set[int] = set()
        stack = list(needed)
        while stack:
            ref = stack.pop()
            if ref in seen:
                continue
            seen.add(ref)
            if ref < 0:
                continue
            step, index = steps[ref >> INDEX_BITS], ref & INDEX_MASK
            if step.op.kinds[index].grad:
                # An output of an operation that does not say otherwise may depend on all inputs.
                depends = getattr(step.op, "depends", None)
                stack += [step.refs[p] for p in depends(index)] if depends else step.refs
        found = state.analyses[key] = tuple(sorted(~ref for ref in seen if ref < 0))
    return found


class Shape:
    """What of a window is needed for some of its values; equal ones are one object.

    Windows that differ only in what nobody needs have the same shape.

    Attributes:
      steps: operations in order, and the refs of their inputs, where positions are those in the
        shape, and ~number is that of an external.
    """

    __slots__ = ("steps",)

    def __init__(self, steps: tuple[tuple[Any, tuple[int, ...]], ...]) -> None:
        self.steps = steps


_SHAPES: dict[Any, Shape] = {}


@dataclasses.dataclass(frozen=True)
class Analysis:
    """How a window has a shape.

    Attributes:
      shape: the operations that are needed.
      externals: for each external of the shape, which one of the window it is.
      places: position in the window -> position in the shape.
    """

    shape: Shape
    externals: tuple[int, ...]
    places: dict[int, int]

    def ref(self, ref: int) -> int:
        """A ref in the window as one in the shape."""
        return self.places[ref >> INDEX_BITS] << INDEX_BITS | ref & INDEX_MASK


def analyse(state: State, needed: frozenset[int]) -> Analysis:
    """The shape of a window of which the values `needed` are needed."""
    found = state.analyses.get(needed)
    if found is None:
        found = state.analyses[needed] = _analyse(state.steps(), needed)
    return found


def _analyse(steps: list[State], needed: frozenset[int]) -> Analysis:
    positions: set[int] = set()
    stack = list(needed)
    while stack:
        ref = stack.pop()
        if ref >= 0 and ref >> INDEX_BITS not in positions:
            positions.add(ref >> INDEX_BITS)
            stack.extend(steps[ref >> INDEX_BITS].refs)
    places = {position: place for place, position in enumerate(sorted(positions))}
    externals: dict[int, int] = {}

    def translate(ref: int) -> int:
        if ref < 0:
            return ~externals.setdefault(~ref, len(externals))
        return places[ref >> INDEX_BITS] << INDEX_BITS | ref & INDEX_MASK

    shaped = tuple(
        [(steps[p].op, tuple([translate(ref) for ref in steps[p].refs])) for p in places]
    )
    shape = _SHAPES.get(shaped) or _SHAPES.setdefault(shaped, Shape(shaped))
    return Analysis(shape, tuple(externals), places)
