"""Which windows of a recording some values need, and how they hang together.

A plan is all that a compiled program depends on: two recordings with equal plans run the same
program on different inputs.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxmeta_bridge.recorder.analysis import Shape, analyse
from jaxmeta_bridge.recorder.graph import State, Value, Window

# Where a window takes a value from: an input, as ~number; or (window number, ref in it).
Ref = Any


@dataclass(frozen=True)
class Leaf:
    """A window in a plan."""

    shape: Shape
    needed: tuple[int, ...]  # of its values, as refs in the shape
    sources: tuple[Ref, ...]  # where each external of the shape comes from


@dataclass(frozen=True)
class Plan:
    """Windows in order, where the wanted values are found, and which inputs can be differentiated.

    Hashable: the key of the compiled program.
    """

    leaves: tuple[Leaf, ...]
    wanted: tuple[Ref, ...]
    inputs: tuple[tuple[Any, type], ...]  # kind, and what sort of data, of each input


def make_plan(
    wanted: Sequence[Value], is_input: Callable[[Value], bool]
) -> tuple[Plan, list[Value]]:
    """The plan for `wanted`, and its inputs.

    Args:
      wanted: values to compute.
      is_input: whether a value that an operation made is taken as given.
    """
    needs = _needs(wanted, is_input)
    order = sorted(needs, key=lambda window: window.serial)
    number = {window: index for index, window in enumerate(order)}
    analyses = {window: analyse(window.state, needed) for window, needed in needs.items()}
    inputs: list[Value] = []
    slots: dict[Any, int] = {}

    def source(value: Value) -> Ref:
        if value.window is not None and not is_input(value):
            return number[value.window], analyses[value.window].ref(value.ref)
        key = value.key if value.same_as is None else value.same_as
        slot = slots.get(key)
        if slot is None:
            slot = slots[key] = len(inputs)
            inputs.append(value)
        return ~slot

    leaves = []
    for window in order:
        analysis = analyses[window]
        found = window.externals
        sources = tuple([source(found[external]) for external in analysis.externals])
        needed = tuple(sorted([analysis.ref(ref) for ref in needs[window]]))
        leaves.append(Leaf(analysis.shape, needed, sources))
    targets = tuple([source(value) for value in wanted])
    sorts = tuple([(value.kind, type(value.data)) for value in inputs])
    return Plan(tuple(leaves), targets, sorts), inputs


def needed_windows(wanted: Sequence[Value], is_input: Callable[[Value], bool]) -> Iterable[Window]:
    """The windows that `wanted` need."""
    return _needs(wanted, is_input).keys()


def _needs(
    wanted: Iterable[Value], is_input: Callable[[Value], bool]
) -> dict[Window, frozenset[int]]:
    """Which values of which windows are needed.

    Windows of equal structure are asked for the same values, so that they stay equal.
    """
    unions: dict[State, set[int]] = {}
    while True:
        needs, grown = _pass(wanted, is_input, unions)
        if not grown:
            return {window: frozenset(unions[window.state]) for window in needs}


def _pass(
    wanted: Iterable[Value], is_input: Callable[[Value], bool], unions: dict[State, set[int]]
) -> tuple[set[Window], bool]:
    heap: list[tuple[int, Window]] = []
    found: set[Window] = set()
    visited: set[State] = set()
    grown = False

    def need(value: Value) -> None:
        nonlocal grown
        window = value.window
        if window is None or is_input(value):
            return
        if window not in found:
            found.add(window)
            heapq.heappush(heap, (-window.serial, window))
        union = unions.setdefault(window.state, set())
        if value.ref not in union:
            union.add(value.ref)
            grown = grown or window.state in visited

    for value in wanted:
        need(value)
    while heap:
        window = heapq.heappop(heap)[1]
        visited.add(window.state)
        externals = window.externals
        for external in analyse(window.state, frozenset(unions[window.state])).externals:
            need(externals[external])
    return found, grown
