"""Calls that are not recorded: made by torch itself, on ordinary tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as torch_tree

from jaxmeta_bridge.errors import UnsupportedOpError
from jaxmeta_bridge.recorder.capture import capture
from jaxmeta_bridge.recorder.execute import read
from jaxmeta_bridge.recorder.real import real
from jaxmeta_bridge.recorder.tensor import HANDLERS, Recorded, refuse_transformations


def eager(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls `func` on the values of recorded tensors, with their gradients where these count."""
    refuse_transformations()
    taken: list[tuple[Recorded, torch.Tensor, int]] = []

    def ordinary(leaf: Any) -> Any:
        if type(leaf) is not Recorded:
            return leaf
        tensor = to_ordinary(leaf)
        taken.append((leaf, tensor, tensor._version))
        return tensor

    args, kwargs = torch_tree.tree_map(ordinary, (args, kwargs))
    results = func(*args, **kwargs)
    for recorded, tensor, version in taken:
        if tensor._version != version:
            HANDLERS["rebind"](recorded, capture(tensor))
    back = {id(tensor): recorded for recorded, tensor, _ in taken}
    return torch_tree.tree_map(
        lambda leaf: back.get(id(leaf), leaf) if isinstance(leaf, torch.Tensor) else leaf, results
    )


def to_ordinary(tensor: Recorded) -> torch.Tensor:
    """A recorded tensor as an ordinary one, for torch to go on from."""
    value = tensor._value
    if value.kind.grad and torch.is_grad_enabled():
        # A view: what torch does to it in place must not reach what others have.
        with torch.enable_grad():
            return real(value).clone()
    return read(value)


HANDLERS["eager"] = eager
_aten: Any = torch.ops.aten
_COPIES = {_aten.detach.default, _aten.alias.default, _aten._to_copy.default}


def below(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls an operation that C++ asks for, below torch's autograd, where no gradient is kept."""
    leaves = torch_tree.tree_leaves((args, kwargs))
    loses = any(type(leaf) is Recorded and leaf._value.kind.grad for leaf in leaves)
    if loses and torch.is_grad_enabled() and func not in _COPIES:
        raise UnsupportedOpError(
            f"{func} is called on a tensor of an inner loop by code that hides from recording and "
            "from torch's autograd (torch.vmap and other transformations, TorchScript, C++ "
            "extensions), so its gradient would be lost. Call it on tensor.detach(), or write it "
            "with torch functions."
        )
    return eager(func, args, kwargs)


HANDLERS["dispatch"] = below
HANDLERS["ordinary"] = to_ordinary
