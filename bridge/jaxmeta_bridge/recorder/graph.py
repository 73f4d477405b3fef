"""What a recording consists of: values, and windows of operations that make them.

A window is a stretch of the recording, from one update of the weights to the next. While operations
are added to it, its structure is followed in a trie of states, so that two windows of equal
structure end in the very same `State` object: equal steps are recognised without being compared.
"""

import itertools
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import torch

from jaxmeta_bridge.program import Spec, strides_of


class Kind:
    """Shape, dtype, layout of a value, and whether it requires grad; equal ones are one object."""

    __slots__ = ("dtype", "grad", "shape", "strides")
    _all: dict[tuple[Any, ...], "Kind"] = {}  # noqa: RUF012

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool
    strides: tuple[int, ...] | None  # None if it is laid out row by row

    @classmethod
    def of(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        grad: bool,
        strides: tuple[int, ...] | None = None,
    ) -> "Kind":
        key = (shape, dtype, grad, strides)
        kind = cls._all.get(key)
        if kind is None:
            kind = cls()
            kind.shape, kind.dtype, kind.grad, kind.strides = key
            kind = cls._all.setdefault(key, kind)
        return kind

    @classmethod
    def like(cls, tensor: torch.Tensor) -> "Kind":
        """That of a tensor."""
        return cls.of(tuple(tensor.shape), tensor.dtype, tensor.requires_grad, strides_of(tensor))

    def empty(self) -> torch.Tensor:
        """Memory for such a value."""
        return Spec(self.shape, self.dtype, self.strides).empty()

    def __repr__(self) -> str:
        grad = ", grad" if self.grad else ""
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}{grad}"


class Op(Protocol):
    """What makes values; equal ones are one object, compared by identity."""

    kinds: tuple[Kind, ...]  # of the outputs
    name: str

    def lower(self, inputs: Sequence[jax.Array], adjoint: Any) -> list[jax.Array]:
        """The outputs, traceable by JAX."""
        ...


# Which value of a window: position << INDEX_BITS | index of an output, or ~number of an external.
INDEX_BITS = 12
INDEX_MASK = (1 << INDEX_BITS) - 1


class State:
    """The structure of a window so far: the last operation, and the state before it."""

    __slots__ = ("analyses", "following", "op", "parent", "refs")

    def __init__(self, parent: "State | None", op: Any, refs: tuple[int, ...]) -> None:
        self.parent = parent
        self.op = op
        self.refs = refs  # of the operation's inputs
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


class Window:
    """A stretch of the recording."""

    __slots__ = (
        "arrays",
        "closed",
        "externals",
        "hidden",
        "inside",
        "read",
        "reals",
        "serial",
        "slots",
        "state",
        "steps",
    )

    def __init__(self) -> None:
        self.serial = next(_SERIAL)
        self.state = ROOT
        self.steps: list[State] = []  # one for each operation
        self.externals: list[Value] = []  # what its operations take from elsewhere, by first use
        self.slots: dict[Any, int] = {}  # key of a value -> its place among these
        self.closed = False
        self.arrays: dict[int, Any] = {}  # values that were computed
        self.reals: dict[int, torch.Tensor] | None = None  # values in torch's own graph
        self.read = False  # whether a value was computed while operations were still added
        self.inside: set[int] = set()  # positions that a gradient repeats within itself
        self.hidden = False  # whether differentiable tensors of torch's come from inside a program


class Value:
    """A tensor of the recording: an input of it, or what one of its operations makes.

    Attributes:
      kind: shape, dtype and whether it requires grad.
      window: where it is made; None for an input.
      ref: which value of the window; of an input, the first window that may have taken it.
      data: of an input: a tensor of its own, or a Python number.
      leaf: whether torch's `backward` accumulates here.
      origin: weak reference to the leaf of torch's graph that an input is a copy of.
      origin_key: its `id`.
      linked: the input as an ordinary tensor with a gradient to that leaf, once it was needed.
      same_as: equal for inputs that are different values of a window, but may be given once.
      exposed: whether torch's own graph may have got to know this input.
    """

    __slots__ = (
        "__weakref__",
        "_key",
        "data",
        "exposed",
        "kind",
        "leaf",
        "linked",
        "origin",
        "origin_key",
        "ref",
        "same_as",
        "window",
    )

    def __init__(self, kind: Kind, window: Window, ref: int) -> None:
        self.kind = kind
        self.window: Window | None = window
        self.ref = ref
        self._key: Any = None
        self.data: Any = None
        self.leaf = False
        self.exposed = False
        self.origin: Any = None
        self.origin_key: int | None = None
        self.same_as: Any = None
        self.linked: torch.Tensor | None = None

    @classmethod
    def input(cls, kind: Kind, data: Any, leaf: bool = False) -> "Value":
        """A value that enters the recording."""
        value = cls.__new__(cls)
        value.kind = kind
        value.window = None
        value.ref = _TAPE.window.serial
        value._key = value
        value.data = data
        value.leaf = leaf
        value.exposed = False
        value.origin = value.linked = value.origin_key = value.same_as = None
        return value

    @property
    def key(self) -> Any:
        """Equal for Values that are the same value."""
        if self._key is None:
            self._key = (self.window, self.ref)
        return self._key

    def become_input(self, data: Any) -> None:
        """Forgets how it was made, now that `data` is known."""
        self._key = self.key
        assert self.window is not None
        self.ref = self.window.serial
        self.data = data
        self.window = None

    @property
    def array(self) -> Any:
        """The JAX array, if it was computed."""
        return None if self.window is None else self.window.arrays.get(self.ref)

    @property
    def op(self) -> Any:
        """What makes it."""
        assert self.window is not None
        return self.window.steps[self.ref >> INDEX_BITS].op

    def operands(self) -> list["Value"]:
        """What it is made from."""
        assert self.window is not None
        return operands(self.window, self.ref >> INDEX_BITS)


def value_at(window: Window, ref: int) -> Value:
    """A value of a window."""
    if ref < 0:
        return window.externals[~ref]
    kind = window.steps[ref >> INDEX_BITS].op.kinds[ref & INDEX_MASK]
    return Value(kind, window, ref)


def operands(window: Window, position: int) -> list[Value]:
    """What an operation of a window takes."""
    return [value_at(window, ref) for ref in window.steps[position].refs]


class _Tape(threading.local):
    def __init__(self) -> None:
        self.window = Window()


_TAPE = _Tape()


def close_window() -> None:
    """Ends the present stretch: the next operation begins another."""
    if _TAPE.window.state is not ROOT:
        _TAPE.window.closed = True


def note_read() -> None:
    """Ends the present stretch at the second read, so that later ones need not repeat it all."""
    window = _TAPE.window
    window.closed = window.closed or window.read
    window.read = window.state is not ROOT


def add_refs(window: Window, op: Any, refs: tuple[int, ...]) -> int:
    """Adds an operation to a window; returns the ref of its first output."""
    key = (op, refs)
    state = window.state.following.get(key)
    if state is None:
        state = window.state.following.setdefault(key, State(window.state, op, refs))
    window.state = state
    window.steps.append(state)
    return (len(window.steps) - 1) << INDEX_BITS


def add_op(op: Any, inputs: Sequence[Value]) -> tuple[Window, int]:
    """Records `op` of `inputs`: the window, and the ref of its first output."""
    window = _TAPE.window
    if window.closed:
        window = _TAPE.window = Window()
    refs = []
    slots = window.slots
    for value in inputs:
        home = value.window
        if home is window:
            refs.append(value.ref)
            continue
        slot = slots.get(value.key)
        if slot is None:
            if home is not None and not home.closed:
                # Windows are ordered: one cannot take values of another thread's that is open.
                home.closed = window.closed = True
                return add_op(op, inputs)
            slot = slots[value.key] = len(window.externals)
            window.externals.append(value)
            if home is None and value.ref > window.serial:
                value.ref = window.serial
        refs.append(~slot)
    return window, add_refs(window, op, tuple(refs))


def add(op: Any, inputs: Sequence[Value]) -> list[Value]:
    """Records `op` of `inputs`; its outputs."""
    window, ref = add_op(op, inputs)
    return [Value(kind, window, ref + index) for index, kind in enumerate(op.kinds)]
