"""Calls that are not recorded: made by torch itself, on ordinary tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as torch_tree

from jaxmeta_bridge.recorder.capture import capture
from jaxmeta_bridge.recorder.execute import read
from jaxmeta_bridge.recorder.real import real
from jaxmeta_bridge.recorder.tensor import HANDLERS, Recorded


def eager(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls `func` on the values of recorded tensors, with their gradients where these count."""
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
HANDLERS["dispatch"] = eager
HANDLERS["ordinary"] = to_ordinary
