"""The gradient of recorded values by others, as an operation of the recording.

It holds the stretch of the recording between them. What that stretch takes from elsewhere is an
input of the operation, so gradients of gradients find their way.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxmeta_bridge.recorder.graph import Kind, Node, Value, add_node, outputs_of


class GradientOp:
    """By the first `wanted` inputs: what `steps` make of all inputs, pulled back.

    Args:
      steps: operations in order with the place of each operand: an input, as ~number, or
        (step, output).
      sources: where the values to differentiate are found, likewise.
      wanted: how many of the inputs to differentiate by.
      weighted: whether the last inputs are cotangents, one for each of the sources.
      keep: whether the gradients can be differentiated again.
      kinds: of the gradients.
    """

    __slots__ = ("_inputs", "keep", "kinds", "name", "sources", "steps", "wanted", "weighted")

    def __init__(
        self,
        steps: tuple[Any, ...],
        sources: tuple[Any, ...],
        wanted: int,
        weighted: bool,
        keep: bool,
        kinds: tuple[Kind, ...],
    ) -> None:
        self.name = "gradient"
        self.steps = steps
        self.sources = sources
        self.wanted = wanted
        self.weighted = weighted
        self.keep = keep
        self.kinds = kinds

    def lower(self, inputs: Sequence[jax.Array], adjoint: Any) -> list[jax.Array]:
        """See `Op.lower`."""
        end = len(inputs) - (len(self.sources) if self.weighted else 0)
        rest, cotangents = list(inputs[self.wanted : end]), list(inputs[end:])

        def function(variables: list[jax.Array]) -> list[jax.Array]:
            given = [*variables, *rest]
            made: list[list[jax.Array]] = []

            def read(place: Any) -> jax.Array:
                return given[~place] if type(place) is int else made[place[0]][place[1]]

            for op, places in self.steps:
                made.append(op.lower([read(place) for place in places], adjoint))
            return [read(place) for place in self.sources]

        variables = list(inputs[: self.wanted])
        simple = len(self.sources) == 1 and not self.weighted
        if simple and all(jnp.isrealobj(v) for v in variables):
            _, gradients = adjoint.value_and_grad(lambda v: (function(v)[0].reshape(()), None))(
                variables
            )
        else:
            outputs, pullback = jax.vjp(function, variables)
            if not self.weighted:
                cotangents = [jnp.ones_like(output) for output in outputs]
            cotangents = [
                jnp.conj(c.astype(o.dtype)) for c, o in zip(cotangents, outputs, strict=True)
            ]
            gradients = [jnp.conj(gradient) for gradient in pullback(cotangents)[0]]
        return gradients if self.keep else [jax.lax.stop_gradient(g) for g in gradients]


_OPS: dict[Any, GradientOp] = {}


def add_gradient(
    outputs: Sequence[Value],
    wanted: Sequence[Value],
    cotangents: Sequence[Value] | None,
    keep: bool,
    place: Any = None,
) -> list[Value | None]:
    """Records the gradient of the outputs by the wanted values; None where there is no path.

    Args:
      outputs: values that require grad.
      wanted: values of the recording.
      cotangents: one for each output; ones if None.
      keep: whether the gradients shall be differentiable (torch's `create_graph`).
      place: where in the user's code this is asked for.
    """
    nodes = _between(outputs, wanted)
    targets = {id(value) for value in wanted}
    reached = {id(v) for node in nodes for v in node.inputs if id(v) in targets}
    reached |= {id(value) for value in outputs if id(value) in targets}
    used = [value for value in wanted if id(value) in reached]
    if not used:
        return [None] * len(wanted)
    inputs, steps, sources = _stretch(nodes, used, outputs)
    weighted = cotangents is not None
    kinds = tuple(Kind.of(v.kind.shape, v.kind.dtype, keep) for v in used)
    key = (steps, sources, len(used), weighted, keep, kinds)
    op = _OPS.get(key)
    if op is None:
        op = _OPS.setdefault(key, GradientOp(*key))
    node = add_node(op, (*inputs, *(cotangents or ())), place)
    gradients = {id(v): gradient for v, gradient in zip(used, outputs_of(node), strict=True)}
    return [gradients.get(id(value)) for value in wanted]


def _between(outputs: Sequence[Value], wanted: Sequence[Value]) -> list[Node]:
    """The nodes on the ways from the wanted values to the outputs, in order."""
    stop = {id(value) for value in wanted}
    found: dict[int, Node] = {}
    stack = [v.node for v in outputs if v.node is not None and id(v) not in stop]
    while stack:
        node = stack.pop()
        if id(node) in found:
            continue
        found[id(node)] = node
        for value in node.inputs:
            if value.kind.grad and value.node is not None and not value.leaf:
                stack.append(value.node)
    order = sorted(found.values(), key=lambda node: (node.window.serial, node.position))
    dependent: set[int] = set()
    kept = []
    for node in order:
        if any(id(v) in stop or (v.node is not None and id(v.node) in dependent and v.kind.grad
                                 and not v.leaf)
               for v in node.inputs):
            dependent.add(id(node))
            kept.append(node)
    return kept


def _stretch(
    nodes: list[Node], used: Sequence[Value], outputs: Sequence[Value]
) -> tuple[list[Value], tuple[Any, ...], tuple[Any, ...]]:
    """The inputs of a stretch, its steps, and where the outputs are."""
    inputs: list[Value] = list(used)
    slots = {id(value): ~index for index, value in enumerate(used)}
    numbers = {id(node): index for index, node in enumerate(nodes)}

    def place(value: Value) -> Any:
        slot = slots.get(id(value))
        if slot is not None:
            return slot
        if value.node is not None and id(value.node) in numbers and not value.leaf:
            return numbers[id(value.node)], value.index
        slots[id(value)] = ~len(inputs)
        inputs.append(value)
        return slots[id(value)]

    steps = tuple([(node.op, tuple([place(v) for v in node.inputs])) for node in nodes])
    return inputs, steps, tuple([place(value) for value in outputs])
