"""The derivative of a stretch of the recording as an operation of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmeta_bridge.recorder.emit import Emitter
from jaxmeta_bridge.recorder.graph import Kind
from jaxmeta_bridge.recorder.loops import find_loops
from jaxmeta_bridge.recorder.plan import Plan


@dataclass(frozen=True)
class Stretch:
    """A part of a recording as a function.

    Attributes:
      steps: operations in order, with the place of each operand: an input, as ~number, or
        (step, output).
      sources: places of the results.
    """

    steps: tuple[Any, ...]
    sources: tuple[Any, ...]

    def run(self, inputs: Sequence[jax.Array], adjoint: Any) -> list[jax.Array]:
        """The results."""
        made: list[list[jax.Array]] = []

        def read(place: Any) -> jax.Array:
            return inputs[~place] if type(place) is int else made[place[0]][place[1]]

        for op, places in self.steps:
            made.append(op.lower([read(place) for place in places], adjoint))
        return [read(place) for place in self.sources]


class LongStretch:
    """A part of a recording as a function, with its loops; equal where plan and order are.

    Args:
      plan: what to compute.
      order: for each input of the plan, its number among the function's inputs.
    """

    def __init__(self, plan: Plan, order: tuple[int, ...]) -> None:
        self._key = (plan, order)
        self._plan = plan
        self._order = order
        self._parts = find_loops(plan.leaves, 0, len(plan.leaves))
        self.sources = plan.wanted

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LongStretch) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def run(self, inputs: Sequence[Any], adjoint: Any) -> list[jax.Array]:
        """The results."""
        emitter = Emitter(self._plan, self._parts, adjoint)
        return emitter.evaluate(lambda index: jnp.asarray(inputs[self._order[index]]), {})


class GradientOp:
    """The derivative of what a stretch makes by its first `wanted` inputs.

    Args:
      stretch: the function; the operation's inputs are those of the function.
      wanted: how many of the inputs to differentiate by.
      weighted: whether further inputs follow, a cotangent for each result; else they are ones.
      kinds: of the gradients. One that does not require grad is cut off.
    """

    __slots__ = ("_stretch", "_wanted", "_weighted", "kinds", "name")

    def __init__(
        self, stretch: Stretch | LongStretch, wanted: int, weighted: bool, kinds: tuple[Kind, ...]
    ) -> None:
        self.name = "gradient"
        self._stretch = stretch
        self._wanted = wanted
        self._weighted = weighted
        self.kinds = kinds

    def lower(self, inputs: Sequence[jax.Array], adjoint: Any) -> list[jax.Array]:
        """See `Op.lower`."""
        end = len(inputs) - (len(self._stretch.sources) if self._weighted else 0)
        variables, rest = list(inputs[: self._wanted]), list(inputs[self._wanted : end])

        def function(variables: list[jax.Array]) -> list[jax.Array]:
            return self._stretch.run([*variables, *rest], adjoint)

        if self._is_plain(variables):
            value_and_grad = adjoint.value_and_grad(lambda v: (function(v)[0].reshape(()), None))
            _, gradients = value_and_grad(variables)
        else:
            outputs, pullback = jax.vjp(function, variables)
            cotangents = inputs[end:] if self._weighted else map(jnp.ones_like, outputs)
            # A complex cotangent of torch's is the conjugate of JAX's.
            conjugate = [
                jnp.conj(c.astype(o.dtype)) for c, o in zip(cotangents, outputs, strict=True)
            ]
            gradients = [jnp.conj(gradient) for gradient in pullback(conjugate)[0]]
        return [
            gradient if kind.grad else jax.lax.stop_gradient(gradient)
            for gradient, kind in zip(gradients, self.kinds, strict=True)
        ]

    def _is_plain(self, variables: Sequence[jax.Array]) -> bool:
        single = len(self._stretch.sources) == 1 and not self._weighted
        return single and all(jnp.isrealobj(variable) for variable in variables)


_OPS: dict[Any, GradientOp] = {}


def gradient_op(
    stretch: Stretch | LongStretch, used: Sequence[Kind], weighted: bool, keep: bool
) -> GradientOp:
    """The one such operation."""
    kinds = tuple(Kind.of(kind.shape, kind.dtype, keep) for kind in used)
    key = (stretch, len(used), weighted, kinds)
    if key not in _OPS:
        _OPS.setdefault(key, GradientOp(*key))
    return _OPS[key]
