"""Recorded values as ordinary tensors of torch's autograd, one operation after the other.

This is how torch itself would have come to them: every value of the stretch is a tensor of its
graph. Used where ordinary torch code has to find its way through a recording, which is slow but
right; nothing of it is used by a script that can be recorded whole.
"""

from typing import Any

import torch
from torch.utils import _pytree as torch_tree

from jaxmeta_bridge.autograd import Program, apply
from jaxmeta_bridge.dlpack import adopt
from jaxmeta_bridge.recorder.calls import CallOp
from jaxmeta_bridge.recorder.capture import linked
from jaxmeta_bridge.recorder.execute import compute, default_adjoint, make_leaf
from jaxmeta_bridge.recorder.graph import INDEX_BITS, Value, Window, operands


def real(value: Value) -> Any:
    """The value as an ordinary tensor (a Python number if it is one) with its graph."""
    if value.leaf:
        make_leaf(value)
    if value.window is None:
        value.exposed = True
        return linked(value)
    if not value.kind.grad:
        compute([value])
        return adopt([value.array])[0].clone()
    for window, position in _needed(value):
        _run(window, position)
    assert value.window.reals is not None
    return value.window.reals[value.ref]


def is_real(value: Value) -> bool:
    """Whether torch's own graph knows of the value, so that ordinary tensors may depend on it."""
    if value.window is None:
        return value.exposed
    return value.window.reals is not None and value.ref in value.window.reals


def _needed(last: Value) -> list[tuple[Window, int]]:
    """The operations on which the value depends by a gradient, if not real yet, in order."""
    found: set[tuple[Window, int]] = set()
    stack = [last]
    while stack:
        value = stack.pop()
        if value.window is None or value.leaf or not value.kind.grad or is_real(value):
            continue
        node = (value.window, value.ref >> INDEX_BITS)
        if node not in found:
            found.add(node)
            stack.extend(value.operands())
    return sorted(found, key=lambda node: (node[0].serial, node[1]))


_PROGRAMS: dict[Any, Program] = {}


def _run(window: Window, position: int) -> None:
    op = window.steps[position].op
    inputs = [real(value) for value in operands(window, position)]
    with torch.enable_grad():
        if isinstance(op, CallOp) and not op.draws and not op.written:
            leaves = torch_tree.tree_leaves(op.replay(inputs))
            outputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        else:
            if op not in _PROGRAMS:
                adjoint = default_adjoint()
                _PROGRAMS[op] = Program(lambda *arrays: op.lower(arrays, adjoint))
            outputs, _ = apply(_PROGRAMS[op], inputs)
    if window.reals is None:
        window.reals = {}
    for index, output in enumerate(outputs):
        window.reals[position << INDEX_BITS | index] = output
