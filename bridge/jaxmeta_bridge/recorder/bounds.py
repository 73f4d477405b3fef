"""Labels and indices out of range: an error when they are recorded, as torch raises it.

A compiled program would read some other element without a word. Indices that are ordinary tensors
have their values already; those that are recorded themselves are not checked.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from jaxmeta_bridge.recorder.tensor import HANDLERS, Recorded, record

_T: Any = torch.Tensor


def _check(index: Any, size: int, low: int, what: str, ignored: int | None = None) -> None:
    if type(index) is Recorded or not isinstance(index, torch.Tensor) or index.is_floating_point():
        return
    if index.dtype in (torch.bool, torch.uint8) or index.is_complex() or not index.numel():
        return
    if ignored is not None:
        index = index[index != ignored]
        if not index.numel():
            return
    least, most = (int(bound) for bound in torch.aminmax(index.detach()))
    if least < low or most >= size:
        wrong = most if most >= size else least
        raise IndexError(f"{what} {wrong} is out of bounds with size {size}")


def _argument(args: Any, kwargs: Any, position: int, *names: str, default: Any = None) -> Any:
    if len(args) > position:
        return args[position]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _labels(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    scores = _argument(args, kwargs, 0, "input")
    ignored = _argument(args, kwargs, 4, "ignore_index", default=-100)
    classes = scores.shape[1 if scores.dim() > 1 else 0] if scores.dim() else 1
    _check(_argument(args, kwargs, 1, "target"), classes, 0, "Target", ignored)
    return record(func, args, kwargs)


def _embedding(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    rows = _argument(args, kwargs, 1, "weight").shape[0]
    _check(_argument(args, kwargs, 0, "input"), rows, 0, "index")
    return record(func, args, kwargs)


def _along(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """gather, index_select and the like: (input, dim, index)."""
    tensor, dim = args[0], _argument(args, kwargs, 1, "dim", default=0)
    if isinstance(dim, int) and tensor.dim():
        size = tensor.shape[dim] if -tensor.dim() <= dim < tensor.dim() else 0
        _check(_argument(args, kwargs, 2, "index"), size, 0, "index")
    return record(func, args, kwargs)


def _item(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    index = args[1]
    if isinstance(index, torch.Tensor):
        if args[0].dim():
            _check(index, args[0].shape[0], -args[0].shape[0], "index")
    elif type(index) is tuple:
        dim = 0
        for each in index:
            if each is Ellipsis:
                break
            if isinstance(each, torch.Tensor) and dim < args[0].dim():
                _check(each, args[0].shape[dim], -args[0].shape[dim], "index")
                dim += each.dim() if each.dtype is torch.bool else 1
            elif each is not None:
                dim += 1
    return record(func, args, kwargs)


HANDLERS |= {
    F.cross_entropy: _labels,
    F.nll_loss: _labels,
    F.embedding: _embedding,
    torch.gather: _along,
    _T.gather: _along,
    torch.index_select: _along,
    _T.index_select: _along,
    _T.__getitem__: _item,
    _T.__setitem__: _item,
}
