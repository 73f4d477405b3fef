"""Ways for tensors into a recording, for the code that sets up inner loops."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from jaxmeta_bridge.autograd import execute
from jaxmeta_bridge.recorder.capture import capture
from jaxmeta_bridge.recorder.graph import Kind, Value, add, close_window
from jaxmeta_bridge.recorder.tensor import Recorded, wrap
from jaxmeta_bridge.recorder.update import Member, Settings, UpdateOp, start_op


def to_recorded(tensor: torch.Tensor) -> Recorded:
    """The tensor as a recorded one; gradients find the way to it."""
    return tensor if type(tensor) is Recorded else wrap(capture(tensor))


class _CopyOp:
    """Values of their own, equal to the inputs."""

    def __init__(self, kinds: tuple[Kind, ...]) -> None:
        self.kinds = kinds
        self.name = "clone"

    def depends(self, index: int) -> tuple[int, ...]:
        """The inputs on which an output depends."""
        return (index,)

    def lower(self, inputs: Sequence[Any], adjoint: Any) -> list[Any]:
        """See `Op.lower`."""
        return list(inputs)


_COPIES: dict[Any, _CopyOp] = {}


def to_copies(tensors: Sequence[torch.Tensor]) -> list[Recorded]:
    """Recorded tensors equal to the given ones; no two calls give the same values.

    Gradients lead through them to the tensors, but a gradient by one stops there: two inner loops
    that start from one model do not reach each other's weights.
    """
    values = [capture(t) if type(t) is not Recorded else t._value for t in tensors]
    if not values:
        return []
    kinds = tuple(value.kind for value in values)
    op = _COPIES.setdefault(kinds, _CopyOp(kinds))
    copies = [wrap(value) for value in add(op, values)]
    close_window()
    return copies


def to_leaf(tensor: torch.Tensor, requires_grad: bool) -> Recorded:
    """A recorded tensor of its own, where gradients accumulate; it takes over `tensor`."""
    if type(tensor) is Recorded:
        recorded: Any = tensor.detach().requires_grad_(requires_grad)
        return recorded
    tensor.requires_grad_(requires_grad)
    value = Value.input(Kind.like(tensor), tensor.detach(), leaf=requires_grad)
    value.origin, value.origin_key = weakref.ref(tensor), id(tensor)
    recorded = wrap(value)
    # Only what the script holds keeps the leaf and its gradient alive.
    recorded._leaf = tensor
    return recorded


def state_names(settings: Settings, param: Value, options: Sequence[Value]) -> tuple[str, ...]:
    """Names of what an optimizer keeps for a parameter."""
    return start_op(settings, param.kind, tuple(option.kind for option in options)).names


def start_state(
    settings: Settings, param: Value, options: Sequence[Value], depends: bool, tracked: bool
) -> dict[str, Value]:
    """The state of an optimizer for a parameter before its first step.

    Args:
      settings: of the parameter's group.
      param: the parameter.
      options: the values of the numeric options.
      depends: whether the state depends on these.
      tracked: whether gradients go through the steps.
    """
    kinds = tuple(option.kind for option in options)
    op = start_op(settings, param.kind, kinds)
    if depends and any(option.kind.grad or option.window is not None for option in options):
        return dict(zip(op.names, add(op, options), strict=True))
    grad = tracked and param.kind.grad
    key = (op, grad, tuple(_content(option) for option in options) if depends else None)
    if key not in _STATES:
        given = [option.data if option.window is None else option.array for option in options]
        arrays, _ = execute(lambda *operands: (op.lower(operands, None), None), given)
        _STATES[key] = {
            name: as_state(Value.input(kind, torch.from_dlpack(array).clone()), grad)
            for name, kind, array in zip(op.names, op.kinds, arrays, strict=True)
        }
    return {name: _another(value) for name, value in _STATES[key].items()}


def _another(value: Value) -> Value:
    """A value of its own with the same contents: the states of two parameters are two values."""
    other = Value.input(value.kind, value.data)
    other.same_as = value
    return other


def as_state(value: Value, grad: bool) -> Value:
    """A constant of the kind that the state has after a step, so that all steps are alike."""
    kind = value.kind
    if value.window is not None or kind.grad or not (grad and kind.dtype.is_floating_point):
        return value
    return Value.input(Kind.of(kind.shape, kind.dtype, True, kind.strides), value.data)


_STATES: dict[Any, dict[str, Value]] = {}


def _content(option: Value) -> Any:
    data = option.data
    return (tuple(data.shape), tuple(data.flatten().tolist())) if torch.is_tensor(data) else data


def add_update(
    groups: Sequence[Settings],
    options: Sequence[Value],
    members: Sequence[tuple[int, Value, Value, dict[str, Value]]],
    tracked: bool,
    adjoint: Any,
) -> list[tuple[Value, dict[str, Value]]]:
    """Records a step of an optimizer; for each member its new parameter and state.

    Args:
      groups: settings of each parameter group.
      options: the values of the numeric options of all groups in a row.
      members: of each parameter that has a gradient: group, parameter, gradient, state.
      tracked: whether gradients go back through the step; if not, the new parameters are leaves.
      adjoint: how a loop of such steps is differentiated.
    """
    inputs = list(options)
    names: list[Any] = []
    for group, p, g, state in members:
        inputs.append(p)
        inputs.append(g)
        inputs.extend(state.values())
        names.append(group)
        names.extend(state)
    key = (tuple(groups), tuple(names), tuple([v.kind for v in inputs]), tracked, adjoint)
    op = _UPDATES.get(key)
    if op is None:
        described = tuple(
            Member(group, p.kind, g.kind, tuple((name, v.kind) for name, v in state.items()))
            for group, p, g, state in members
        )
        kinds = tuple(option.kind for option in options)
        op = _UPDATES[key] = UpdateOp(tuple(groups), described, kinds, tracked, adjoint)
    outputs = iter(add(op, inputs))
    results = []
    for _, _, _, state in members:
        new = next(outputs)
        new.leaf = not tracked
        results.append((new, {name: next(outputs) for name in state}))
    return results


_UPDATES: dict[Any, UpdateOp] = {}
