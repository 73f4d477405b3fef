"""What autograd says of a recorded tensor, and what a script may set: requires_grad, grad, data."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from jaxmeta_bridge.errors import UnsupportedOpError
from jaxmeta_bridge.recorder.execute import make_leaf
from jaxmeta_bridge.recorder.graph import Kind, Value, add, close_window
from jaxmeta_bridge.recorder.inplace import rebind, with_derivative_of
from jaxmeta_bridge.recorder.tensor import HANDLERS, Recorded, leaf_of, record, value_of

_T: Any = torch.Tensor


def _requires_grad(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    return args[0]._value.kind.grad


def _is_leaf(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    value = leaf_of(args[0])
    return value.leaf or not value.kind.grad


class RecordedFunction:
    """What `grad_fn` of a recorded tensor is."""

    def __init__(self, value: Value) -> None:
        self._value = value

    def name(self) -> str:
        return "InputRecorded" if self._value.window is None else f"{self._value.op.name}Recorded"

    @property
    def next_functions(self) -> tuple[tuple["RecordedFunction", int], ...]:
        if self._value.window is None:
            return ()
        return tuple((RecordedFunction(v), 0) for v in self._value.operands() if v.kind.grad)

    def __repr__(self) -> str:
        return f"<{self.name()}>"


def _grad_fn(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    value = leaf_of(args[0])
    return RecordedFunction(value) if value.kind.grad and not value.leaf else None


def _set_requires_grad(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    tensor, flag = args[0], args[1] if len(args) > 1 else kwargs.get("requires_grad", True)
    value = tensor._value
    if flag == value.kind.grad:
        return tensor
    if not flag and not value.leaf:
        raise RuntimeError(
            "you can only change requires_grad flags of leaf variables. If you want to use a "
            "computed variable in a subgraph that doesn't require differentiation use "
            "var_no_grad = var.detach()."
        )
    if flag and not (value.kind.dtype.is_floating_point or value.kind.dtype.is_complex):
        raise RuntimeError("only Tensors of floating point dtype can require gradients")
    new = _flagged(value, flag)
    tensor._value = new
    return tensor


class _FlagOp:
    """The same value with another flag."""

    def __init__(self, kind: Kind) -> None:
        self.kinds = (kind,)
        self.name = "requires_grad_"

    def lower(self, inputs: Sequence[Any], adjoint: Any) -> list[Any]:
        return [inputs[0]]


_FLAGS: dict[Kind, _FlagOp] = {}


def _flagged(value: Value, flag: bool) -> Value:
    kind = Kind.of(value.kind.shape, value.kind.dtype, flag)
    if value.window is None:
        new = Value.input(kind, value.data.detach().requires_grad_(flag))
    else:
        op = _FLAGS.setdefault(kind, _FlagOp(kind))
        close_window()
        new = add(op, (value,))[0]
        close_window()
    new.leaf = flag
    return new


def _get_grad(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    value = leaf_of(args[0])
    if args[0]._retained is not None:
        return args[0]._retained.grad
    if value.leaf and value.window is None:
        return make_leaf(value).grad
    return args[0]._own_grad


def _set_grad(func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    tensor, new = args
    if type(tensor) is not Recorded:
        with torch._C.DisableTorchFunctionSubclass():
            func(tensor, HANDLERS["ordinary"](new))
        return
    value = leaf_of(tensor)
    if type(new) is Recorded:
        new = HANDLERS["ordinary"](new)
    if value.leaf and value.kind.grad:
        make_leaf(value).grad = new
    else:
        tensor._own_grad = new


def _retain_grad(func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    tensor = args[0]
    value = leaf_of(tensor)
    if not value.kind.grad:
        raise RuntimeError("can't retain_grad on Tensor that has requires_grad=False")
    if value.leaf or tensor._retained is not None:
        return
    # Zeros that are added here collect the gradient that arrives here.
    zeros = torch.zeros(value.kind.shape, dtype=value.kind.dtype, requires_grad=True)
    tensor._retained = zeros
    with torch.enable_grad():
        tensor._value = record(_T.add, (tensor, zeros), {})._value


def _retains_grad(func: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    return args[0]._retained is not None


def _get_data(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with torch.no_grad():
        return record(_T.detach, args, {})


def _set_data(func: Callable[..., Any], args: Any, kwargs: Any) -> None:
    tensor, new = args
    if type(tensor) is not Recorded:
        with torch._C.DisableTorchFunctionSubclass():
            func(tensor, HANDLERS["ordinary"](new).detach())
        return
    value = tensor._value
    if value.leaf and value.kind.grad:
        data = HANDLERS["ordinary"](new).detach().clone().requires_grad_()
        data.grad = None if value.window is not None else make_leaf(value).grad
        tensor._value = Value.input(value.kind, data, leaf=True)
        return
    if value.kind.grad:
        rebind(tensor, value_of(record(with_derivative_of, (new, tensor), {})))
    else:
        rebind(tensor, value_of(new.detach()))


def _hook(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    value = leaf_of(args[0])
    if value.leaf:
        return func(make_leaf(value), *args[1:], **kwargs)
    raise UnsupportedOpError(
        "A gradient hook on a recorded tensor is not supported: the gradient passes through a "
        "compiled program. Use grad_callback of the optimizer, torch.autograd.grad with "
        "create_graph=True, or retain_grad()."
    )


def _detach_(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    args[0]._value = value_of(args[0].detach())
    return args[0]


HANDLERS |= {
    _T.requires_grad.__get__: _requires_grad,
    _T.requires_grad.__set__: _set_requires_grad,
    _T.requires_grad_: _set_requires_grad,
    _T.is_leaf.__get__: _is_leaf,
    _T.grad_fn.__get__: _grad_fn,
    _T.grad.__get__: _get_grad,
    _T.grad.__set__: _set_grad,
    _T.retain_grad: _retain_grad,
    _T.retains_grad.__get__: _retains_grad,
    _T.data.__get__: _get_data,
    _T.data.__set__: _set_data,
    _T.register_hook: _hook,
    _T.detach_: _detach_,
    torch.detach_: _detach_,
}
