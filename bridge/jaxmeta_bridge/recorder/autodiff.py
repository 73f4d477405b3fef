"""torch's autograd on recorded tensors: `backward` and `torch.autograd.grad`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jaxmeta_bridge.errors import UnsupportedOpError
from jaxmeta_bridge.recorder.analysis import gradient_inputs
from jaxmeta_bridge.recorder.capture import leaf_tensor, linked
from jaxmeta_bridge.recorder.execute import gradients, make_leaf, with_graph
from jaxmeta_bridge.recorder.gradient import add_gradient
from jaxmeta_bridge.recorder.graph import Value
from jaxmeta_bridge.recorder.lazy import defer
from jaxmeta_bridge.recorder.real import is_real, real
from jaxmeta_bridge.recorder.tensor import HANDLERS, Recorded, leaf_of, value_of, wrap

_T: Any = torch.Tensor
_NO_GRAD = "element {} of tensors does not require grad and does not have a grad_fn"
_UNUSED = (
    "One of the differentiated Tensors appears to not have been used in the graph. Set "
    "allow_unused=True if this is the desired behavior."
)


def _as_tuple(tensors: Any) -> tuple[Any, ...]:
    return (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)


def grad(
    outputs: Any,
    inputs: Any,
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    only_inputs: bool = True,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """`torch.autograd.grad` where some of the tensors are recorded."""
    outs, ins = _as_tuple(outputs), _as_tuple(inputs)
    weights = None if grad_outputs is None else _as_tuple(grad_outputs)
    if is_grads_batched:
        raise UnsupportedOpError(
            "is_grads_batched=True is not supported for recorded tensors: call autograd.grad once "
            "for each cotangent, or use jax.vmap through to_torch."
        )
    for index, out in enumerate(outs):
        if not out.requires_grad:
            raise RuntimeError(_NO_GRAD.format(index))
        if weights is None and out.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    for tensor in ins:
        if not tensor.requires_grad:
            raise RuntimeError("One of the differentiated Tensors does not require grad")
    places = _recordable(outs, ins, create_graph)
    if places is None:
        found = _ordinary_grad(outs, ins, weights, create_graph, retain_graph)
    else:
        values = [value for place in places for value in place]
        each = iter(recorded_grad([value_of(out) for out in outs], values, weights, create_graph))
        found = [_total([next(each) for _ in place]) for place in places]
    if materialize_grads:
        found = [torch.zeros_like(t) if g is None else g for g, t in zip(found, ins, strict=True)]
    elif not allow_unused and any(gradient is None for gradient in found):
        raise RuntimeError(_UNUSED)
    return tuple(found)


def _recordable(
    outs: Sequence[Any], ins: Sequence[Any], create_graph: bool
) -> list[list[Value]] | None:
    """The values to differentiate by, for each tensor, if the recording knows all ways to them."""
    if not all(type(out) is Recorded for out in outs):
        return None
    ordinary = [tensor for tensor in ins if type(tensor) is not Recorded]
    recorded = [leaf_of(tensor) for tensor in ins if type(tensor) is Recorded]
    # What torch's own graph has seen may have gone through ordinary tensors.
    if any(is_real(value) for value in recorded):
        return None
    if not ordinary:
        return [[value] for value in recorded]
    if not create_graph and not recorded:
        return None  # numbers are wanted: torch's own graph is as good
    inputs = [v for v in gradient_inputs([out._value for out in outs]) if v.window is None]
    origins = [(_origin(value), value) for value in inputs]
    known = [_edge(tensor) for tensor in ordinary]
    if any(v.exposed for v in inputs) or not all(_is_end(o) or o in known for o, _ in origins):
        return None  # some inputs may depend on others, as far as the recording knows
    return [
        [leaf_of(tensor)]
        if type(tensor) is Recorded
        else [value for origin, value in origins if origin == _edge(tensor)]
        for tensor in ins
    ]


def _edge(tensor: torch.Tensor) -> Any:
    """The place of an ordinary tensor in torch's graph."""
    edge = torch.autograd.graph.get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _origin(value: Value) -> Any:
    """The place in torch's graph of what an input was copied from; None if that is gone."""
    leaf = leaf_tensor(value)
    if leaf is not None:
        return _edge(leaf)
    function = value.data.grad_fn
    return None if function is None else function.next_functions[0]


def _is_end(origin: Any) -> bool:
    """Whether it is a leaf, so that it depends on nothing else."""
    return origin is None or hasattr(origin[0], "variable")


def _total(gradients: list[Any]) -> Any:
    present = [gradient for gradient in gradients if gradient is not None]
    return sum(present[1:], present[0]) if present else None


def step_gradients(
    loss: torch.Tensor, params: Sequence[torch.Tensor], own: set[int], create_graph: bool
) -> list[Value | None] | None:
    """The gradients of a loss as values of the recording; None where it does not know all ways.

    The usual inner step, without a tensor object for each gradient.
    """
    if type(loss) is not Recorded or not loss._value.kind.grad:
        return None
    targets = []
    asked = []
    for index, tensor in enumerate(params):
        if type(tensor) is not Recorded:
            return None
        value = leaf_of(tensor)
        wanted = value.kind.grad and index in own
        if wanted and is_real(value):
            return None
        asked.append(wanted)
        if wanted:
            targets.append(value)
    if not targets:
        return [None for _ in params]
    gradients = add_gradient([loss._value], targets, None, create_graph)
    if len(targets) == len(params):
        return gradients
    found = iter(gradients)
    return [next(found) if wanted else None for wanted in asked]


def recorded_grad(
    outs: Sequence[Value], ins: Sequence[Value], weights: Any, create_graph: bool
) -> list[Any]:
    """The gradients as recorded tensors."""
    if weights is not None:
        weights = [
            value_of(torch.ones_like(wrap(o)) if w is None else w)
            for w, o in zip(weights, outs, strict=True)
        ]
    gradients = add_gradient(outs, ins, weights, create_graph)
    return [None if gradient is None else wrap(gradient) for gradient in gradients]


def _ordinary_grad(
    outs: Sequence[Any], ins: Sequence[Any], weights: Any, create: bool, retain: bool | None
) -> list[Any]:
    """The gradients by torch's own graph."""
    inside = [leaf_of(t) for t in ins if type(t) is Recorded and not _is_input(t)]
    if not inside and all(type(out) is Recorded for out in outs):
        values = [out._value for out in outs]
        if create or weights is not None:
            reals = with_graph(values, hide=create)
        else:
            reals, weights = _pull(values)
    else:
        if any(v.window is not None and v.window.hidden and not is_real(v) for v in inside):
            raise UnsupportedOpError(
                "A gradient by values of the inner loop is asked of tensors that come from an "
                "earlier torch.autograd.grad(..., create_graph=True) by tensors outside of the "
                "loop, which does not know these values. Ask for all gradients in one call."
            )
        reals = [real(out._value) if type(out) is Recorded else out for out in outs]
    sources = [real(leaf_of(t)) if type(t) is Recorded else t for t in ins]
    weights = _ordinary(weights)
    if not reals:
        return [None for _ in ins]
    return list(
        torch.autograd.grad(
            reals, sources, weights, retain_graph=retain, create_graph=create, allow_unused=True
        )
    )


def _ordinary(weights: Any) -> list[Any] | None:
    if weights is None:
        return None
    return [HANDLERS["ordinary"](w) if type(w) is Recorded else w for w in weights]


def _pull(values: Sequence[Value]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What the sum of scalars depends on in torch's graph, and its gradient by each."""
    active = {value.key: value for value in gradient_inputs(values)}
    pairs = [(linked(value), gradient) for value, gradient in gradients(values, active)]
    pairs = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
    return [tensor for tensor, _ in pairs], [gradient for _, gradient in pairs]


def _is_input(tensor: Recorded) -> bool:
    value = leaf_of(tensor)
    if value.leaf:
        make_leaf(value)
    return value.window is None


def _grad_handler(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return grad(*args, **kwargs)


def backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    """`torch.autograd.backward` where some of the tensors are recorded."""
    outs = _as_tuple(tensors)
    weights = None if grad_tensors is None else _as_tuple(grad_tensors)
    for index, out in enumerate(outs):
        if not out.requires_grad:
            raise RuntimeError(_NO_GRAD.format(index))
        if (weights is None or weights[index] is None) and out.numel() != 1:
            raise RuntimeError("grad can be implicitly created only for scalar outputs")
    weights = _ordinary(weights)
    if weights is None and not create_graph and inputs is None and _defer(outs):
        return
    values = [out._value for out in outs if type(out) is Recorded]
    if weights is None and not create_graph:
        roots, weights = _pull(values)
        roots += [out for out in outs if type(out) is not Recorded]
        weights += [None for out in outs if type(out) is not Recorded]
    else:
        reals = iter(with_graph(values))
        roots = [next(reals) if type(out) is Recorded else out for out in outs]
    if inputs is not None:
        inputs = [real(leaf_of(t)) if type(t) is Recorded else t for t in _as_tuple(inputs)]
    torch.autograd.backward(roots, weights, retain_graph, create_graph, inputs=inputs)


def _defer(outs: Sequence[Any]) -> bool:
    """Owes the gradients, where nothing but the accumulation into leaves would happen."""
    if not all(type(out) is Recorded for out in outs):
        return False
    values = [out._value for out in outs]
    inputs = gradient_inputs(values)
    targets = []
    for value in inputs:
        make_leaf(value)
        leaf = leaf_tensor(value)
        if leaf is None:
            return False
        targets.append(leaf)
    return defer(values, inputs, targets)


def _backward_handler(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    backward(*args, **kwargs)


def _backward_method(func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    names = ("gradient", "retain_graph", "create_graph", "inputs")
    given = dict(zip(names, args[1:], strict=False)) | kwargs
    weight = given.pop("gradient", None)
    backward(args[0], None if weight is None else (weight,), **given)


HANDLERS |= {
    torch.autograd.grad: _grad_handler,
    torch.autograd.backward: _backward_handler,
    _T.backward: _backward_method,
}
