"""The table from aten operations to JAX functions, and the decorator that fills it.

A lowering is `fn(out, *args, **kwargs)`: `args` are torch's own, with JAX arrays for tensors, and
`out` is a `jax.ShapeDtypeStruct` (a tuple of them, None for absent ones, where the operation has
several results) with the shape and dtype that torch gives the result. The interpreter casts each
result to that dtype and refuses another shape, so a lowering only has to get the values right.
Keywords that say where or how a tensor is stored (`device`, `memory_format`, ...) and `dtype`,
which `out` has, are dropped. A lowering that draws random numbers is given its own `key`.

`DECOMPOSITIONS` are rules in torch operations that come before torch's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch._ops import OpOverload

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Lowering:
    """The JAX meaning of an operation."""

    function: Callable[..., Any]
    draws: bool  # takes random numbers from a `key=` of its own


LOWERINGS: dict[OpOverload, Lowering] = {}
DECOMPOSITIONS: dict[OpOverload, Callable[..., Any]] = {}


def lowers(*ops: OpOverload, draws: bool = False) -> Callable[[Function], Function]:
    """Registers the decorated function as the JAX meaning of `ops`."""

    def register(function: Function) -> Function:
        for op in ops:
            if op in LOWERINGS:
                raise ValueError(f"{op} is already lowered by {LOWERINGS[op].function}")
            LOWERINGS[op] = Lowering(function, draws)
        return function

    return register


def decomposes(op: OpOverload) -> Callable[[Function], Function]:
    """Registers the decorated function of torch operations as the meaning of `op`."""

    def register(function: Function) -> Function:
        DECOMPOSITIONS[op] = function
        return function

    return register
