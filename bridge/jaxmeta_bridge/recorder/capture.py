"""Ordinary tensors that enter a recording.

They are copied when they enter, as torch's own operations read them then: what a script does to
them afterwards, in place, through NumPy or by an optimizer, changes nothing that was recorded.
The copy of a tensor that requires grad is an operation of torch's autograd, so gradients find the
tensor, and whatever made it. One that comes again unchanged is the same input again.
"""

import threading
import weakref
from typing import Any

import torch

from jaxmeta_bridge.dlpack import check_tensor, is_wrapped
from jaxmeta_bridge.errors import ConversionError
from jaxmeta_bridge.program import strides_of
from jaxmeta_bridge.recorder.graph import Kind, Value


class _Seen(threading.local):
    def __init__(self) -> None:
        self.by_id: dict[int, tuple[Any, int, bool, Any]] = {}


_SEEN = _Seen()
_ORDINARY = (torch.Tensor, torch.nn.Parameter)


def capture(tensor: torch.Tensor) -> Value:
    """The input that stands for the present contents of an ordinary tensor."""
    if type(tensor) not in _ORDINARY and hasattr(type(tensor), "settled"):
        tensor = tensor.settled()  # pyright: ignore[reportAttributeAccessIssue]
    key = id(tensor)
    found = _SEEN.by_id.get(key)
    grad = tensor.requires_grad
    version = 0 if tensor.is_inference() else tensor._version
    if (
        found is not None
        and found[0]() is tensor
        and found[1] == version
        and found[2] == grad
        and (value := found[3]()) is not None
        and tensor.dtype is value.kind.dtype
        and tensor.shape == value.kind.shape
        and torch.equal(tensor.detach(), value.data)
    ):
        return value
    if not is_wrapped(tensor):
        check_tensor(tensor, "a tensor in the inner loop")
        if not tensor.is_cpu:
            raise ConversionError(
                f"a tensor in the inner loop is on {tensor.device}; the drop-in records tensors on "
                "the CPU only so far. Use jaxmeta.meta_unroll with from_torch on other devices."
            )
    data = _copy(tensor)
    value = Value.input(Kind.of(tuple(data.shape), data.dtype, grad, strides_of(data)), data)
    if grad and tensor.is_leaf:
        value.origin, value.origin_key = weakref.ref(tensor), id(tensor)
    if not is_wrapped(tensor):
        reference = weakref.ref(tensor, lambda _: _SEEN.by_id.pop(key, None))
        _SEEN.by_id[key] = (reference, version, grad, weakref.ref(value))
    return value


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.requires_grad and not tensor.is_leaf:
        with torch.inference_mode(False), torch.enable_grad():
            return tensor.clone()
    return tensor.detach().clone()


class _Link(torch.autograd.Function):
    """The values of the second tensor, with gradients that go to the first."""

    @staticmethod
    def forward(ctx: Any, leaf: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def linked(value: Value) -> Any:
    """What an input is in torch's graph.

    The recording itself does not hold on to the leaves that it has copied: what is owed to their
    `.grad` would keep them alive for ever.
    """
    leaf = None if value.origin is None else value.origin()
    if leaf is None:
        return value.data
    if value.leaf:
        return leaf
    if value.linked is None:
        with torch.inference_mode(False), torch.enable_grad():
            value.linked = _Link.apply(leaf, value.data)
    return value.linked


def leaf_tensor(value: Value) -> torch.Tensor | None:
    """The leaf of torch's graph that an input is, or is a copy of; None if it is no leaf's copy."""
    if value.origin is not None:
        return value.origin()
    return value.data if value.leaf else None


def leaf_key(value: Value) -> int | None:
    """The `id` of that leaf, which may be gone by now."""
    return value.origin_key if value.origin_key is not None else id(value.data)


def number(value: complex) -> Value:
    """A Python number as an input, so that another one compiles nothing."""
    return Value.input(_NUMBER, value)


_NUMBER = Kind.of((), torch.float64, False)
