"""Ways for tensors into a recording, for the code that sets up inner loops."""

from collections.abc import Sequence
from typing import Any

import torch

from jaxmeta_bridge.recorder.capture import capture
from jaxmeta_bridge.recorder.execute import compute
from jaxmeta_bridge.recorder.graph import Kind, Value, add
from jaxmeta_bridge.recorder.tensor import Recorded, wrap
from jaxmeta_bridge.recorder.update import Member, Settings, start_op, update_op


def to_recorded(tensor: torch.Tensor) -> Recorded:
    """The tensor as a recorded one; gradients find the way to it."""
    return tensor if type(tensor) is Recorded else wrap(capture(tensor))


def to_leaf(tensor: torch.Tensor, requires_grad: bool) -> Recorded:
    """A recorded tensor of its own, where gradients accumulate; it takes over `tensor`."""
    if type(tensor) is Recorded:
        return tensor.detach().requires_grad_(requires_grad)
    kind = Kind.of(tuple(tensor.shape), tensor.dtype, requires_grad)
    return wrap(Value.input(kind, tensor.requires_grad_(requires_grad), leaf=requires_grad))


def state_names(settings: Settings, param: Value, options: Sequence[Value]) -> tuple[str, ...]:
    """Names of what an optimizer keeps for a parameter."""
    return start_op(settings, param.kind, tuple(option.kind for option in options)).names


def start_state(
    settings: Settings, param: Value, options: Sequence[Value], depends: bool
) -> dict[str, Value]:
    """The state of an optimizer for a parameter before its first step.

    Args:
      settings: of the parameter's group.
      param: the parameter.
      options: the values of the numeric options.
      depends: whether the state depends on these.
    """
    kinds = tuple(option.kind for option in options)
    op = start_op(settings, param.kind, kinds)
    if depends and any(option.kind.grad or option.window is not None for option in options):
        return dict(zip(op.names, add(op, options), strict=True))
    key = (op, tuple(_content(option) for option in options) if depends else None)
    if key not in _STATES:
        values = add(op, options)
        compute(values)
        _STATES[key] = {
            name: Value.input(value.kind, torch.from_dlpack(value.array).clone())
            for name, value in zip(op.names, values, strict=True)
        }
    return _STATES[key]


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
    described = tuple(
        Member(group, p.kind, g.kind, tuple((name, v.kind) for name, v in state.items()))
        for group, p, g, state in members
    )
    op = update_op(
        tuple(groups), described, tuple(option.kind for option in options), tracked, adjoint
    )
    inputs = list(options)
    for _, p, g, state in members:
        inputs += [p, g, *state.values()]
    outputs = iter(add(op, inputs))
    results = []
    for _, _, _, state in members:
        new = next(outputs)
        new.leaf = not tracked
        results.append((new, {name: next(outputs) for name in state}))
    return results
