"""Changes in place, and views: tensors that share memory see each other's changes.

A recorded value never changes; a tensor that is changed in place stands for another value from
then on. If it is a view, so does the tensor that it is a view of, and all its other views.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils import _pytree as torch_tree

from jaxmeta_bridge.recorder.calls import CallOp, Outcome
from jaxmeta_bridge.recorder.capture import capture
from jaxmeta_bridge.recorder.eager import eager
from jaxmeta_bridge.recorder.graph import Value, add, add_op
from jaxmeta_bridge.recorder.tensor import HANDLERS, Recorded, leaf_of, record, value_of, wrap


class _Origin:
    """Where a view comes from."""

    __slots__ = ("base", "index", "inputs", "op", "slot")

    def __init__(
        self, base: Recorded, op: CallOp, inputs: tuple[Any, ...], slot: int, index: int
    ) -> None:
        self.base = base
        self.op = op
        self.inputs = inputs  # values; that of the base is at `slot`
        self.slot = slot
        self.index = index  # among the results of the operation


def note_view(view: Recorded, base: Any, outcome: Outcome, inputs: list[Value], index: int) -> None:
    """Remembers that `view` shares the memory of `base`."""
    if type(base) is not Recorded:
        return
    slot = outcome.views[index]
    assert slot is not None
    view._origin = _Origin(base, outcome.op, tuple(inputs), slot, index)
    if base._views is None:
        base._views = []
    elif len(base._views) > 16:
        base._views = [reference for reference in base._views if reference() is not None]
    base._views.append(weakref.ref(view))


def change(
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
    outcome: Outcome,
    tensors: list[torch.Tensor],
    values: list[Value],
    numbers: list[Value] | None,
) -> Any:
    """Records a call that changes some of its arguments."""
    op = outcome.op
    for slot in op.written:
        tensor = tensors[slot]
        if type(tensor) is not Recorded:
            if not _can_become_recorded(tensor):
                return eager(func, args, kwargs)
        elif leaf_of(tensor).leaf and tensor._value.kind.grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a leaf Variable that requires grad is being used in an in-place operation."
            )
    for slot in op.written:
        become_recorded(tensors[slot])
    inputs = values + (numbers or []) + [capture(draw()) for draw in op.draws]
    window, ref = add_op(op, inputs)
    for offset, slot in enumerate(op.written):
        index = outcome.count + offset
        new = Value(op.kinds[index], window, ref + index)
        if new.kind.shape != tensors[slot].shape:
            _reshape(tensors[slot], new)
        else:
            rebind(tensors[slot], new)
    results: list[Any] = []
    for index in range(outcome.count):
        same = outcome.same[index]
        new = Value(op.kinds[index], window, ref + index)
        results.append(wrap(new) if same is None else tensors[same])
    return outcome.rebuild(results)


def _can_become_recorded(tensor: torch.Tensor) -> bool:
    """Whether nothing but this object can see the tensor's memory."""
    if type(tensor) is not torch.Tensor or tensor._is_view() or tensor.requires_grad:
        return False
    storage = tensor.untyped_storage()
    shared: Any = torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]
    return shared <= _ALONE and storage.resizable() and tensor.is_cpu


def _count_alone() -> int:
    storage = torch.empty(1)
    found = storage.untyped_storage()
    return torch._C._storage_Use_Count(found._cdata)  # type: ignore[attr-defined]


_ALONE = _count_alone()


def _reshape(tensor: Any, value: Value) -> None:
    """Gives a tensor object another shape (unsqueeze_, t_, ...); its views keep theirs."""
    torch.utils.swap_tensors(tensor, wrap(value))


def become_recorded(tensor: Any) -> None:
    """Makes the very object of an ordinary tensor a recorded one."""
    if type(tensor) is Recorded:
        return
    value = capture(tensor)
    tensor.__class__ = Recorded
    tensor._value = value


def rebind(tensor: Any, value: Value, but: Any = None) -> None:
    """Lets a tensor, and all that share its memory, stand for what it was changed to.

    Args:
      tensor: what was changed.
      value: to what.
      but: a view of it that is right already.
    """
    old = tensor._value
    if old.leaf and old.kind.grad:  # autograd does not notice: it stays the leaf that it was
        tensor._root = old
    tensor._value = value
    origin = tensor._origin
    if origin is not None:
        rebind(origin.base, _write(origin, tensor), tensor)
    _refresh(tensor, but)


def _refresh(base: Any, but: Any) -> None:
    """Takes the views of `base` anew, except one that is right already."""
    for reference in base._views or ():
        view = reference()
        if view is None or view is but or view._origin is None:
            continue
        origin = view._origin
        inputs = list(origin.inputs)
        inputs[origin.slot] = base._value
        origin.inputs = tuple(inputs)
        new = add(origin.op, origin.inputs)[origin.index]
        old = view._value
        if old.leaf and old.kind.grad:  # made a leaf after it was detached: it stays that leaf
            view._root = old
            with torch.enable_grad():
                new = value_of(record(with_derivative_of, (wrap(new), wrap(old)), {}))
        view._value = new
        _refresh(view, None)


def _write(origin: _Origin, view: Recorded) -> Value:
    """The base with the view's new contents."""
    base = origin.base
    if origin.op.name in ("detach", "data"):
        return value_of(record(with_derivative_of, (view, base), {}))
    key = (origin.op, origin.slot, origin.index)
    if key not in _WRITERS:
        _WRITERS[key] = _Writer(*key)
    others = [wrap(value) for value in origin.inputs]
    others[origin.slot] = base
    with torch.enable_grad():
        written = record(_WRITERS[key], (*others, view), {})
    if not torch.is_grad_enabled() and base._value.kind.grad:
        written = record(with_derivative_of, (written, base), {})
    return value_of(written)


class _Writer:
    """Of the inputs of a view and its new contents: the base with these."""

    def __init__(self, op: CallOp, slot: int, index: int) -> None:
        self._op, self._slot, self._index = op, slot, index
        self.__name__ = f"{op.name}.write"

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        inputs = list(tensors[:-1])
        inputs[self._slot] = inputs[self._slot].clone()
        # A view that is taken under no_grad could not be written to with a gradient.
        results = torch_tree.tree_leaves(self._op.replay(inputs, grad=True))
        views = [result for result in results if isinstance(result, torch.Tensor)]
        views[self._index].copy_(tensors[-1])
        return inputs[self._slot]


_WRITERS: dict[Any, _Writer] = {}


def with_derivative_of(value: torch.Tensor, proxy: torch.Tensor) -> torch.Tensor:
    """`value`, differentiated as if it were `proxy`: what autograd does not notice."""
    with torch.enable_grad():
        if not isinstance(value, FakeTensor | FunctionalTensor):
            return value.detach() + (proxy - proxy.detach())
        return torch.ops.jaxmeta_bridge.with_derivative_of(value, proxy)


def _initialise(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`torch.nn.init` works under no_grad, and asks here before that."""
    with torch.no_grad():
        return record(func, args, kwargs)


for _name, _function in vars(torch.nn.init).items():
    if _name.endswith("_") and not _name.startswith("_") and callable(_function):
        HANDLERS[_function] = _initialise
HANDLERS["in-place"] = change
HANDLERS["view"] = note_view
HANDLERS["rebind"] = rebind
