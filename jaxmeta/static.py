"""When two calls of meta_unroll are the same program, so that it is compiled once.

Functions are compared as ``jax.jit`` compares them, by identity, and by the identity of what they
close over, so that a variable bound anew is not missed. What optax makes is an exception.
``optax.adam(1e-3)`` is a pair of new closures each time it is called, and it is natural to write
it inside the call; library code does not change while it runs, so two closures of the same code
over the same numbers are the same program.
"""

import types
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

# An object that a loss calls may say what its behaviour depends on: the bridge's modules do.
_KEY = "__jaxmeta_key__"
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, np.generic, np.dtype)


class Static:
    """A Python object that a compiled program depends on, equal where the program is."""

    __slots__ = ("_key", "value")

    def __init__(self, value: Any):
        self.value = value
        try:
            self._key = _structure(value)
        except _NotComparable:
            self._key = _Identity(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


class _NotComparable(Exception):
    """Something may change in place, so that only the object itself is known to be the same."""


class _Identity:
    """Equal to nothing but the same object, which it keeps alive: an id is not used again."""

    __slots__ = ("it",)

    def __init__(self, it: Any):
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


def _structure(value: Any) -> Hashable:
    if isinstance(value, types.FunctionType):
        if _is_optax(value):
            return _closure(value)
        return _function(value, set())
    if isinstance(value, types.MethodType):
        return ("method", _Identity(value.__self__), _Identity(value.__func__))
    if isinstance(value, partial):
        keywords = tuple(sorted(value.keywords.items()))
        return ("partial", *map(_structure, (value.func, value.args, keywords)))
    if isinstance(value, tuple):
        return (type(value), *map(_structure, value))
    if isinstance(value, _CONSTANTS):
        # The repr keeps apart what == does not: 0.0 and -0.0, 1 and True.
        return (type(value), repr(value))
    if isinstance(value, (jax.Array, type, types.BuiltinFunctionType)):
        return _Identity(value)
    raise _NotComparable


def _function(function: types.FunctionType, seen: set[int]) -> Hashable:
    """The function may be the same, and a variable that it closes over bound anew."""
    seen.add(id(function))
    return ("function", _Identity(function), *(_variable(v, seen) for v in _read_by(function)))


def _read_by(function: types.FunctionType) -> Iterator[Any]:
    """What it closes over, and those globals that can tell their own changes or close over more."""
    yield from cells(function)
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        same_file = getattr(value, "__module__", None) == function.__module__
        if hasattr(type(value), _KEY) or (isinstance(value, types.FunctionType) and same_file):
            yield value


def _variable(value: Any, seen: set[int]) -> Hashable:
    if isinstance(value, types.FunctionType) and id(value) not in seen and not _is_optax(value):
        return _function(value, seen)
    if hasattr(type(value), _KEY):
        return getattr(value, _KEY)()
    return _Identity(value)


def _is_optax(function: types.FunctionType) -> bool:
    return (function.__module__ or "").partition(".")[0] == "optax"


def _closure(function: types.FunctionType) -> Hashable:
    inside = (*cells(function), *(function.__defaults__ or ()))
    inside += tuple(sorted((function.__kwdefaults__ or {}).items()))
    return ("optax", _Identity(function.__code__), *map(_structure, inside))


def cells(function: types.FunctionType) -> Iterator[Any]:
    """Yield the values that a function closes over."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that is not assigned yet
            yield None


def closes_over_tracer(function: Any) -> bool:
    """Whether a function holds a value that JAX is tracing, in its closure or as an attribute.

    Such a function means something only inside that trace, so nothing must keep it.
    """
    owner = function.__self__ if isinstance(function, types.MethodType) else function
    return _finds_tracer((function, list(getattr(owner, "__dict__", {}).values())), set())


def _finds_tracer(value: Any, seen: set[int]) -> bool:
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        inside = (*cells(value), *(value.__defaults__ or ()))
    elif isinstance(value, partial):
        inside = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, (tuple, list, dict)):
        inside = tuple(jax.tree.leaves(value))
    else:
        return isinstance(value, Tracer)
    return any(_finds_tracer(item, seen) for item in inside)
