"""Gradients of `backward()` that are computed when somebody looks at them.

A script that trains on several tasks calls `backward()` after each, and its optimizer once at the
end. Until then the gradients of all tasks are owed, and tasks of equal structure are computed
together, as one batched program.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as torch_tree

from jaxmeta_bridge.recorder.capture import leaf_key
from jaxmeta_bridge.recorder.execute import gradients
from jaxmeta_bridge.recorder.graph import Value

_make: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]


class _Pending:
    """Losses whose gradients are owed to leaves."""

    def __init__(self) -> None:
        self.losses: list[Value] = []
        self.inputs: dict[Any, Value] = {}  # by key, all to which gradients of the losses lead
        self.owed: dict[int, Any] = {}  # id of a leaf -> weak reference to what stands in its .grad
        self.dropped: set[int] = set()  # leaves whose owed gradient was thrown away

    def drop(self, key: int) -> None:
        """Nobody can look at the gradient of a leaf any more."""
        if self.owed.pop(key, None) is not None:
            self.dropped.add(key)
        if not self.owed:
            self.losses, self.dropped, self.inputs = [], set(), {}

    def compute(self) -> None:
        """Pays all."""
        owed, losses, inputs = self.owed, self.losses, self.inputs
        self.owed, self.losses, self.dropped, self.inputs = {}, [], set(), {}
        if _OPEN.pending is self:
            _OPEN.pending = None
        waiting = {key: lazy for key, ref in owed.items() if (lazy := ref()) is not None}
        if not waiting:
            return
        try:
            found = gradients(losses, inputs)
        except BaseException:
            self.owed, self.losses, self.inputs = owed, losses, inputs
            _OPEN.pending = self
            raise
        for value, gradient in found:
            key = leaf_key(value)
            lazy = None if key is None else waiting.get(key)
            if lazy is not None:
                lazy._real = gradient if lazy._real is None else lazy._real + gradient
        for lazy in waiting.values():
            if lazy._real is None:
                lazy._real = torch.zeros(lazy._leaf_shape, dtype=lazy._leaf_dtype)
            lazy._pending = None


_MOST = 256  # losses that may wait: nobody may ever look at the gradients


class _Open(threading.local):
    pending: _Pending | None = None


_OPEN = _Open()


class LazyGradient(torch.Tensor):
    """The `.grad` of a leaf, computed when it is used."""

    _pending: _Pending | None  # what it waits for; None if it is there
    _real: torch.Tensor | None
    _leaf_shape: Any
    _leaf_dtype: Any

    def settled(self) -> torch.Tensor:
        """The gradient itself."""
        return _settle(self)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _call(func, args, kwargs or {})


_T: Any = torch.Tensor
_METADATA = {
    *(_T.shape.__get__, _T.dtype.__get__, _T.device.__get__, _T.layout.__get__, _T.ndim.__get__),
    *(_T.requires_grad.__get__, _T.is_leaf.__get__, _T.grad_fn.__get__, _T.is_sparse.__get__),
    *(_T.is_cuda.__get__, _T.size, _T.dim, _T.numel, _T.is_complex, _T.is_floating_point),
}


def _call(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    args, kwargs = torch_tree.tree_map(_settle, (args, kwargs))
    return func(*args, **kwargs)


def _settle(leaf: Any) -> Any:
    """The real gradient in place of an owed one."""
    if type(leaf) is not LazyGradient:
        return leaf
    if leaf._pending is not None:
        leaf._pending.compute()
    return leaf._real


def defer(losses: Sequence[Value], inputs: Sequence[Value], leaves: Sequence[torch.Tensor]) -> bool:
    """Owes the gradients of the losses to the leaves; False if they must be paid at once.

    Args:
      losses: scalars.
      inputs: all values that they lead gradients to.
      leaves: the tensors which these are, or are copies of.
    """
    pending = _OPEN.pending or _Pending()
    if any(
        id(leaf) in pending.dropped or (leaf.grad is None and id(leaf) in pending.owed)
        for leaf in leaves
    ):
        # What was owed there was thrown away, as by zero_grad(): it must not come back.
        pending.compute()
        pending = _Pending()
    for leaf in leaves:
        grad = leaf.grad
        known = pending.owed.get(id(leaf))
        if grad is not None and (known is None or known() is not grad):
            return False
        if leaf._backward_hooks or getattr(leaf, "_post_accumulate_grad_hooks", None):
            return False
    _OPEN.pending = pending
    pending.losses.extend(losses)
    pending.inputs.update((value.key, value) for value in inputs)
    for leaf in leaves:
        if leaf.grad is None:
            lazy = _make(LazyGradient, leaf.shape, dtype=leaf.dtype, device=leaf.device)
            lazy._pending, lazy._real = pending, None
            lazy._leaf_shape, lazy._leaf_dtype = leaf.shape, leaf.dtype
            leaf.grad = lazy
            key = id(leaf)
            pending.owed[key] = weakref.ref(lazy, lambda _, key=key: pending.drop(key))
    if len(pending.losses) >= _MOST:
        pending.compute()
    return True
