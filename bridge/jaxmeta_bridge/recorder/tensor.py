"""`Recorded`: a tensor without a value yet, and what happens to the torch calls that meet it."""

import threading
from collections.abc import Callable
from typing import Any

import torch

from jaxmeta_bridge.errors import UnsupportedOpError
from jaxmeta_bridge.recorder import calls
from jaxmeta_bridge.recorder.calls import Outcome, Slot
from jaxmeta_bridge.recorder.capture import capture, number
from jaxmeta_bridge.recorder.graph import Value, Window, add_op

# What answers a torch function in another way than by recording it; filled by other files.
HANDLERS: dict[Any, Callable[..., Any]] = {}


class _Related(type(torch.Tensor)):
    """Relates every tensor to recorded ones: torch.testing compares related types only."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, torch.Tensor)


class Recorded(torch.Tensor, metaclass=_Related):
    """A tensor of a recording: shape and dtype are known, the value is computed when needed."""

    _value: Value
    _views: list[Any] | None = None  # weak references to its views
    _root: Value | None = None  # the leaf that it still is, after changes under no_grad
    _leaf: torch.Tensor | None = None  # the tensor of torch's own where gradients accumulate
    _own_grad: torch.Tensor | None = None  # what a script has set as the grad of a non-leaf
    _retained: torch.Tensor | None = None  # zeros whose gradient is the one to be retained
    _origin: Any = None  # of a view: how it came from its base

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(func, args, kwargs or {})
        return record(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Reached from C++ that passes by __torch_function__.
        return HANDLERS["dispatch"](func, args, kwargs or {})


_make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
_CPU = torch.device("cpu")


def wrap(value: Value) -> Recorded:
    """A new tensor object for a value."""
    kind = value.kind
    tensor = _make(Recorded, kind.shape, kind.strides, dtype=kind.dtype, device=_CPU)
    tensor._value = value
    return tensor


def value_of(tensor: torch.Tensor) -> Value:
    """The value that a tensor stands for, captured if it is an ordinary one."""
    if type(tensor) is Recorded:
        return tensor._value
    return capture(tensor)


def leaf_of(tensor: Any) -> Value:
    """What gradients by a recorded tensor are gradients by."""
    return tensor._value if tensor._root is None else tensor._root


def refuse_transformations() -> None:
    """Raises inside of torch.func's transformations."""
    if _transforming():
        raise UnsupportedOpError(
            "A tensor of an inner loop meets a transformation of torch.func (grad, vmap, jvp), "
            "which has no values to record. Use torch.autograd.grad(..., create_graph=True), or a "
            "Python loop in place of vmap."
        )


class RecordsInCheckpoint(BaseException):
    """A call on recorded tensors inside of a reentrant checkpoint."""


class _Inside(threading.local):
    checkpoint = False


INSIDE = _Inside()
_OUTCOMES: dict[Any, Outcome | None] = {}
_MISSING: Any = object()
_transforming: Any = torch._C._are_functorch_transforms_active  # type: ignore[attr-defined]
_is_autocast: Any = torch.is_autocast_enabled


def record(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Records a call, or has it computed by ordinary means where it cannot be recorded."""
    tensors: list[torch.Tensor] = []
    values: list[Value] = []
    numbers: list[Value] | None = [] if func in _ARITHMETIC else None
    grad = torch.is_grad_enabled()
    if not grad and INSIDE.checkpoint:
        raise RecordsInCheckpoint
    if _transforming():
        refuse_transformations()
    try:
        key = [func, grad, _autocast(), torch.get_default_dtype()]
        for arg in args:
            key.append(_key(arg, tensors, values, numbers))
        if kwargs:
            for name, arg in kwargs.items():
                key.append((name, _key(arg, tensors, values, None)))
        key = tuple(key)
        outcome = _OUTCOMES.get(key, _MISSING)
    except TypeError:  # not hashable
        return HANDLERS["eager"](func, args, kwargs)
    if outcome is _MISSING:
        outcome = _OUTCOMES[key] = _study(func, args, kwargs, values, numbers)
    if outcome is None:
        return HANDLERS["eager"](func, args, kwargs)
    if outcome.op.written:
        return HANDLERS["in-place"](func, args, kwargs, outcome, tensors, values, numbers)
    return _add(outcome, tensors, values + numbers if numbers else values)


def record_values(func: Callable[..., Any], args: list[torch.Tensor]) -> Any:
    """Records a pure function of tensors; None if it cannot be recorded.

    Args:
      func: returns one new tensor.
      args: its arguments.
    """
    if _transforming():
        refuse_transformations()
    values = [a._value if type(a) is Recorded else capture(a) for a in args]
    grad = torch.is_grad_enabled()
    key = (func, grad, _autocast(), torch.get_default_dtype(), *[v.kind for v in values])
    outcome = _OUTCOMES.get(key, _MISSING)
    if outcome is _MISSING:
        outcome = _OUTCOMES[key] = _study(func, tuple(args), {}, values, None)
    if outcome is None or not outcome.single or outcome.same[0] is not None or outcome.op.written:
        return None
    return _add(outcome, args, values)


def _add(outcome: Outcome, tensors: list[torch.Tensor], inputs: list[Value]) -> Any:
    """Records a call that changes nothing, with the random numbers that it draws; its result."""
    op = outcome.op
    if op.draws:
        inputs = inputs + [capture(draw()) for draw in op.draws]
    window, ref = add_op(op, inputs)
    if not outcome.single:
        return _wrap_all(outcome, window, ref, tensors, inputs)
    if outcome.same[0] is not None:
        return tensors[outcome.same[0]]
    result = wrap(Value(op.kinds[0], window, ref))
    if outcome.views[0] is not None:
        HANDLERS["view"](result, tensors[outcome.views[0]], outcome, inputs, 0)
    return result


def _wrap_all(
    outcome: Outcome,
    window: Window,
    ref: int,
    tensors: list[torch.Tensor],
    inputs: list[Value],
) -> Any:
    results = []
    for index in range(outcome.count):
        same, base = outcome.same[index], outcome.views[index]
        if same is not None:
            results.append(tensors[same])
            continue
        result = wrap(Value(outcome.op.kinds[index], window, ref + index))
        if base is not None:
            HANDLERS["view"](result, tensors[base], outcome, inputs, index)
        results.append(result)
    return outcome.rebuild(results)


def _study(func: Any, args: Any, kwargs: Any, values: list[Value], numbers: Any) -> Outcome | None:
    count = 0

    def slot(arg: Any, numeric: bool) -> Any:
        nonlocal count
        if isinstance(arg, torch.Tensor):
            count += 1
            return Slot(count - 1)
        if numeric and type(arg) in (float, int):
            return Slot(next(remaining))
        if isinstance(arg, tuple | list):
            items = [slot(item, False) for item in arg]
            return type(arg)(*items) if hasattr(arg, "_fields") else type(arg)(items)
        if isinstance(arg, dict):
            return {name: slot(item, False) for name, item in arg.items()}
        if isinstance(arg, slice):
            return slice(slot(arg.start, False), slot(arg.stop, False), slot(arg.step, False))
        return arg

    numeric = bool(numbers)
    total = len(values) + len(numbers or ())
    remaining = iter(range(len(values), total))
    template = tuple(slot(arg, numeric) for arg in args)
    keywords = {name: slot(arg, False) for name, arg in kwargs.items()}
    kinds = [value.kind for value in [*values, *(numbers or ())]]
    return calls.study(func, template, keywords, kinds, len(numbers or ()), _autocast())


def _key(arg: Any, tensors: list[torch.Tensor], values: list[Value], numbers: Any) -> Any:
    kind = type(arg)
    if kind is Recorded:
        tensors.append(arg)
        values.append(arg._value)
        return arg._value.kind
    if isinstance(arg, torch.Tensor):
        tensors.append(arg)
        value = capture(arg)
        values.append(value)
        return value.kind
    if kind is float or kind is int:
        if numbers is not None and _is_traceable(arg, values):
            numbers.append(number(arg))
            return kind
        return kind, arg, str(arg) if arg == 0 else None
    if kind is tuple or kind is list or kind is torch.Size:
        return (kind, *[_key(item, tensors, values, None) for item in arg])
    if kind is slice:
        parts = (arg.start, arg.stop, arg.step)
        return (kind, *[_key(item, tensors, values, None) for item in parts])
    if kind is dict:
        return (kind, *[(k, _key(item, tensors, values, None)) for k, item in arg.items()])
    if isinstance(arg, _STATIC):
        return kind, arg
    raise TypeError(f"cannot tell two {kind.__name__}s apart")


_STATIC = (
    bool,
    complex,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    type(Ellipsis),
)


def _autocast() -> torch.dtype | None:
    return torch.get_autocast_dtype("cpu") if _is_autocast("cpu") else None


_T = torch.Tensor
# Arithmetic with a Python number, which becomes an input of the program.
_ARITHMETIC = {
    *(_T.add, _T.sub, _T.mul, _T.div, _T.true_divide, _T.multiply, _T.subtract, _T.divide),
    *(_T.__add__, _T.__sub__, _T.__mul__, _T.__truediv__, _T.__radd__, _T.__rsub__, _T.__rmul__),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.true_divide, torch.multiply, torch.divide),
    *(_T.__rtruediv__, _T.__rdiv__, _T.__div__),
    *(_T.__iadd__, _T.__isub__, _T.__imul__, _T.__itruediv__, _T.add_, _T.sub_, _T.mul_, _T.div_),
}


def _is_traceable(arg: float, values: list[Value]) -> bool:
    """Whether a number may become a tensor without changing the result's dtype or value."""
    dtypes = {value.kind.dtype for value in values}
    return bool(values) and dtypes <= _WIDE


_WIDE = {torch.float32, torch.float64}
