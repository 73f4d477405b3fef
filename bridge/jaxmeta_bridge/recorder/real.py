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
from jaxmeta_bridge.recorder.execute import compute, default_adjoint
from jaxmeta_bridge.recorder.graph import Node, Value


def real(value: Value) -> Any:
    """The value as an ordinary tensor (a Python number if it is one) with its graph."""
    node = value.node
    if node is None:
        value.exposed = True
        return value.data
    if value.leaf:
        value.exposed = True
        return make_leaf(value)
    if not value.kind.grad:
        compute([value])
        return adopt([value.array.copy()])[0]
    for needed in _needed(node):
        needed.reals = _run(needed)
    assert node.reals is not None
    return node.reals[value.index]


def is_real(value: Value) -> bool:
    """Whether torch's own graph knows of the value, so that ordinary tensors may depend on it."""
    return value.exposed if value.node is None else value.node.reals is not None


def make_leaf(value: Value) -> torch.Tensor:
    """Turns a leaf that the recording computes into an input of it."""
    compute([value])
    value.data = adopt([value.array.copy()])[0].requires_grad_()
    value.node = None
    return value.data


def _needed(last: Node) -> list[Node]:
    """The nodes whose outputs the last one's depend on by a gradient, if not real yet, in order."""
    found: dict[int, Node] = {}
    stack = [last]
    while stack:
        node = stack.pop()
        if id(node) in found or node.reals is not None:
            continue
        found[id(node)] = node
        for value in node.inputs:
            if value.node is not None and value.kind.grad and not value.leaf:
                stack.append(value.node)
    return sorted(found.values(), key=lambda node: (node.window.serial, node.position))


_PROGRAMS: dict[Any, Program] = {}


def _run(node: Node) -> list[torch.Tensor]:
    inputs = [real(value) for value in node.inputs]
    op = node.op
    with torch.enable_grad():
        if isinstance(op, CallOp) and not op.draws and not op.written:
            leaves = torch_tree.tree_leaves(op.replay(inputs))
            return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if op not in _PROGRAMS:
            adjoint = default_adjoint()
            _PROGRAMS[op] = Program(lambda *arrays: op.lower(arrays, adjoint))
        outputs, _ = apply(_PROGRAMS[op], inputs)
    return list(outputs)
