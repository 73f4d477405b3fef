"""An inner loop as a function of flat arrays, which adjoints can give rules of their own."""

import functools
from dataclasses import dataclass
from typing import Any

import jax

from jaxmeta.adjoint.base import Adjoint, Step
from jaxmeta.adjoint.custom import Flat, close
from jaxmeta.adjoint.linear import Arrays
from jaxmeta.trees import PyTree


@dataclass(frozen=True)
class FlatLoop:
    """``length`` steps, closing over no traced value.

    Attributes:
        function: ``[*constants, *carry, *x] -> [*carry, *y]``.
        constants: number of arrays that all steps share.
        carry: number of arrays that one step hands to the next.
        length: number of steps.
        results: tree of what the loop returns.
    """

    function: Flat
    constants: int
    carry: int
    length: int
    results: Any

    def step(self, constants: Arrays, carry: Arrays, x: Arrays) -> tuple[Arrays, Arrays]:
        """Return the next carry, and y."""
        outputs = self.function([*constants, *carry, *x])
        return outputs[: self.carry], outputs[self.carry :]

    def split(self, items: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Split what belongs to all inputs: of the constants, the carry, the xs."""
        start = self.constants + self.carry
        return items[: self.constants], items[self.constants : start], items[start:]

    def run(self, adjoint: Adjoint, arrays: Arrays) -> Arrays:
        """Run the loop as an adjoint does: ``[*constants, *carry, *xs] -> [*carry, *ys]``."""
        constants, carry, xs = self.split(arrays)
        step = functools.partial(self.step, constants)
        carry, ys = adjoint.loop(step, carry, xs, self.length)
        return [*carry, *ys]

    def scan(self, arrays: Arrays) -> Arrays:
        """Run the loop: ``[*constants, *carry, *xs] -> [*carry, *ys]``."""
        constants, carry, xs = self.split(arrays)
        step = functools.partial(self.step, constants)
        carry, ys = jax.lax.scan(step, carry, xs, length=self.length)
        return [*carry, *ys]


def flatten_loop(step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[FlatLoop, Arrays]:
    """Return a loop and the arrays to run it on."""
    first = jax.eval_shape(lambda xs: jax.tree.map(lambda x: x[0], xs), xs)
    closed = close(step, carry, first)
    leaves = jax.tree.leaves(carry)
    loop = FlatLoop(closed.function, len(closed.constants), len(leaves), length, closed.structure)
    return loop, [*closed.constants, *leaves, *jax.tree.leaves(xs)]
