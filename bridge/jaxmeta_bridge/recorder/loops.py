"""Finds the loops in a plan: stretches of windows that repeat, with values handed from one to next.

A loop of `count` iterations over `period` windows stands for `count * period` windows. What an
iteration takes from outside itself is, place by place, either the same value each time, a value of
its own each time, or what the iteration before it made. Loops stand inside of loops: tasks that
repeat are a loop over the loop of their steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxmeta_bridge.recorder.plan import Leaf

INSIDE, FIXED, OWN, CARRIED = "inside", "fixed", "own", "carried"


@dataclass
class Loop:
    """Windows `start` to `start + count * period` as iterations of the first `period` of them."""

    start: int
    period: int
    count: int
    # (window of the first iteration, external) -> which of the four, with a slot if CARRIED
    roles: dict[tuple[int, int], Any]
    body: list["Part"] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.start + self.period * self.count

    @property
    def independent(self) -> bool:
        """Whether no iteration needs another's results."""
        return not any(role[0] == CARRIED for role in self.roles.values())


Part = int | Loop


@dataclass(frozen=True)
class _Outer:
    """Stands for what a place in the body of a loop takes from outside of an iteration."""

    what: Any


def find_loops(leaves: Sequence[Leaf], low: int, high: int) -> list[Part]:
    """Divides windows `low` to `high` into single ones and loops."""
    return _find(leaves, [leaf.sources for leaf in leaves], low, high)


def _find(leaves: Sequence[Leaf], sources: Sequence[Any], low: int, high: int) -> list[Part]:
    parts: list[Part] = []
    index = low
    while index < high:
        best: Loop | None = None
        shape = (leaves[index].shape, leaves[index].needed)
        for period in range(1, min((high - index) // 2, _LONGEST) + 1):
            if best is not None and index + period < best.stop:
                continue  # it would begin in the middle of the loop that is found already
            following = leaves[index + period]
            if (following.shape, following.needed) != shape:
                continue
            found = _grow(leaves, sources, index, period, high)
            if found is not None and (best is None or found.stop > best.stop):
                best = found
        if best is None:
            parts.append(index)
            index += 1
            continue
        inside = _body_sources(best, sources)
        best.body = _find(leaves, inside, best.start, best.start + best.period)
        parts.append(best)
        index = best.stop
    return parts


_LONGEST = 512


def _body_sources(loop: Loop, sources: Sequence[Any]) -> list[Any]:
    """Where the windows of the body take values from, in any iteration.

    Two places that take the same value in the first iteration need not do so in the next.
    """
    inside = list(sources)
    for offset in range(loop.period):
        found = []
        for external, source in enumerate(sources[loop.start + offset]):
            role = loop.roles[offset, external]
            if role[0] == OWN:
                source = _Outer((OWN, offset, external))
            elif role[0] == CARRIED:
                source = _Outer((role, source))
            found.append(source)
        inside[loop.start + offset] = tuple(found)
    return inside


def _grow(
    leaves: Sequence[Leaf], sources: Sequence[Any], start: int, period: int, high: int
) -> Loop | None:
    """The longest loop from `start` with this period, if there are two iterations at least."""
    roles: dict[tuple[int, int], Any] = {}
    for offset in range(period):
        for external, source in enumerate(sources[start + offset]):
            roles[offset, external] = _first_role(source, start)
    count = 1
    while start + (count + 1) * period <= high:
        extended = _extend(leaves, sources, start, period, count, roles)
        if extended is None:
            break
        roles = extended
        count += 1
    return Loop(start, period, count, roles) if count > 1 else None


def _first_role(source: Any, start: int) -> tuple[Any, ...]:
    if type(source) is tuple and source[0] >= start:
        return INSIDE, source[0] - start, source[1]
    return FIXED, source


def _extend(
    leaves: Sequence[Leaf],
    sources: Sequence[Any],
    start: int,
    period: int,
    count: int,
    roles: dict[tuple[int, int], Any],
) -> dict[tuple[int, int], Any] | None:
    """The roles with one more iteration, or None where it does not repeat the others."""
    base = start + count * period
    extended = dict(roles)
    for offset in range(period):
        first, leaf = leaves[start + offset], leaves[base + offset]
        if leaf.shape is not first.shape or leaf.needed != first.needed:
            return None
        for external, source in enumerate(sources[base + offset]):
            role = _role(source, roles[offset, external], start, base, period, count)
            if role is None:
                return None
            extended[offset, external] = role
    return extended


def _role(
    source: Any, role: tuple[Any, ...], start: int, base: int, period: int, count: int
) -> tuple[Any, ...] | None:
    if type(source) is tuple and source[0] >= base:
        inside = (INSIDE, source[0] - base, source[1])
        return role if role == inside else None
    if type(source) is tuple and source[0] >= start:  # of an earlier iteration
        if source[0] < base - period:
            return None
        carried = (CARRIED, source[0] - (base - period), source[1])
        # The first iteration takes what is there before the loop.
        return carried if (count == 1 and role[0] == FIXED) or role == carried else None
    if role[0] == FIXED:
        return role if role[1] == source else (OWN,)
    return role if role[0] == OWN else None
