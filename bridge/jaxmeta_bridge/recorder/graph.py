"""What a recording consists of: values, the nodes that make them, and windows of nodes.

A window is a stretch of the recording, from one update of the weights to the next. While nodes are
added to it, its structure is followed in a trie of states, so that two windows of equal structure
end in the very same `State` object: equal steps are recognised without being compared.
"""

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import torch


class Kind:
    """Shape and dtype of a value, and whether it requires grad; equal ones are one object."""

    __slots__ = ("dtype", "grad", "shape")
    _all: dict[tuple[Any, ...], "Kind"] = {}  # noqa: RUF012

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool

    @classmethod
    def of(cls, shape: tuple[int, ...], dtype: torch.dtype, grad: bool) -> "Kind":
        key = (shape, dtype, grad)
        kind = cls._all.get(key)
        if kind is None:
            kind = cls()
            kind.shape, kind.dtype, kind.grad = key
            kind = cls._all.setdefault(key, kind)
        return kind

    def __repr__(self) -> str:
        grad = ", grad" if self.grad else ""
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}{grad}"


class Op(Protocol):
    """What a node computes; equal ones are one object, compared by identity."""

    kinds: tuple[Kind, ...]  # of the outputs
    name: str

    def lower(self, inputs: Sequence[jax.Array], adjoint: Any) -> list[jax.Array]:
        """The outputs, traceable by JAX."""
        ...


class Value:
    """A tensor of the recording: an input of it, or an output of one of its nodes."""

    __slots__ = (
        "__weakref__",
        "array",
        "data",
        "exposed",
        "index",
        "kind",
        "leaf",
        "node",
    )

    def __init__(self, kind: Kind, node: "Node | None", index: int, data: Any = None) -> None:
        self.kind = kind
        self.node = node
        self.index = index
        self.data = data  # of an input: a tensor of its own, or a Python number
        self.array: Any = None  # what it was once computed to be
        self.leaf: bool = False  # where torch's backward() accumulates
        self.exposed: bool = False  # an input that torch's own graph may have got to know


class Node:
    """One operation of the recording."""

    __slots__ = ("__weakref__", "inputs", "op", "place", "position", "reals", "window")

    def __init__(self, op: Any, inputs: tuple[Value, ...], window: "Window", place: Any) -> None:
        self.op = op
        self.inputs = inputs
        self.window = window
        self.position = window.state.depth
        self.place = place
        self.reals: list[torch.Tensor] | None = None  # the outputs, in torch's own graph


class State:
    """The structure of a window so far: the last operation, and the state before it."""

    __slots__ = ("analyses", "depth", "following", "op", "parent", "refs")

    def __init__(self, parent: "State | None", op: Any, refs: tuple[int, ...]) -> None:
        self.parent = parent
        self.op = op
        self.refs = refs  # per input: (position << 12 | index) in the window, or ~external
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.following: dict[Any, State] = {}
        self.analyses: dict[Any, Any] = {}

    def steps(self) -> list["State"]:
        """The states from the first operation to this one."""
        path: list[State] = []
        state: State | None = self
        while state is not None and state.parent is not None:
            path.append(state)
            state = state.parent
        return path[::-1]


ROOT = State(None, None, ())
_SERIAL = itertools.count()
INDEX_BITS = 12


class Window:
    """A stretch of the recording."""

    __slots__ = ("closed", "externals", "serial", "slots", "state")

    def __init__(self) -> None:
        self.serial = next(_SERIAL)
        self.state = ROOT
        self.externals: list[Value] = []  # what its nodes take from elsewhere, by first use
        self.slots: dict[int, int] = {}  # id of a value -> its place among these
        self.closed = False


class _Tape(threading.local):
    def __init__(self) -> None:
        self.window = Window()


_TAPE = _Tape()


def close_window() -> None:
    """Ends the present stretch: the next node begins another."""
    if _TAPE.window.state is not ROOT:
        _TAPE.window.closed = True


def add_node(op: Any, inputs: tuple[Value, ...], place: Any = None) -> Node:
    """Records `op` of `inputs`."""
    window = _TAPE.window
    if window.closed:
        window = _TAPE.window = Window()
    refs = []
    slots = window.slots
    for value in inputs:
        node = value.node
        if node is not None and node.window is window:
            refs.append(node.position << INDEX_BITS | value.index)
            continue
        slot = slots.get(id(value))
        if slot is None:
            if node is not None and not node.window.closed:
                return _add_to_new_window(op, inputs, place, node.window)
            slot = slots[id(value)] = len(window.externals)
            window.externals.append(value)
        refs.append(~slot)
    key = (op, *refs)
    state = window.state.following.get(key)
    if state is None:
        state = window.state.following.setdefault(key, State(window.state, op, tuple(refs)))
    node = Node(op, inputs, window, place)
    window.state = state
    return node


def _add_to_new_window(op: Any, inputs: tuple[Value, ...], place: Any, other: Window) -> Node:
    """Windows are ordered: one cannot take values of another thread's that is still open."""
    other.closed = True
    _TAPE.window.closed = True
    _TAPE.window = Window()
    return add_node(op, inputs, place)


def outputs_of(node: Node) -> list[Value]:
    """New values for what a node computes."""
    return [Value(kind, node, index) for index, kind in enumerate(node.op.kinds)]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What of a window is needed for some of its values."""

    positions: tuple[int, ...]
    externals: tuple[int, ...]


def analyse(state: State, needed: frozenset[int]) -> Analysis:
    """Which operations and externals the values `needed` (as in `State.refs`) depend on."""
    found = state.analyses.get(needed)
    if found is None:
        steps = state.steps()
        positions: set[int] = set()
        externals: set[int] = set()
        stack = list(needed)
        while stack:
            ref = stack.pop()
            if ref < 0:
                externals.add(~ref)
                continue
            position = ref >> INDEX_BITS
            if position not in positions:
                positions.add(position)
                stack.extend(steps[position].refs)
        found = Analysis(tuple(sorted(positions)), tuple(sorted(externals)))
        state.analyses[needed] = found
    return found
