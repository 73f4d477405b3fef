"""The helpers that `higher.utils` has."""

from collections.abc import Callable
from typing import Any

import torch


def flatten(x: Any) -> list[Any]:
    """The items of nested dicts, lists, tuples and sets in a row."""
    if isinstance(x, dict):
        return [leaf for item in x.values() for leaf in flatten(item)]
    if isinstance(x, list | tuple | set):
        return [leaf for item in x for leaf in flatten(item)]
    return [x]


def get_func_params(
    module: torch.nn.Module, device: torch.device | None = None, safe_copy: bool = True
) -> list[torch.Tensor]:
    """Detached copies of a module's parameters, which require grad where the parameters do.

    Args:
      module: whose parameters to take.
      device: where to put them; by default where they are.
      safe_copy: whether to copy the values, too, rather than to share memory.
    """
    return [_copy_tensor(parameter, safe_copy, device) for parameter in module.parameters()]


def _copy_tensor(
    t: torch.Tensor, safe_copy: bool, device: torch.device | None = None
) -> torch.Tensor:
    copied = t.detach().clone() if safe_copy else t.detach()
    if device is not None:
        copied = copied.to(device)
    return copied.requires_grad_(t.requires_grad)


def _recursive_copy_and_cast(target: Any, device: torch.device | None) -> Any:
    return _recursive_map(
        target, lambda x: _copy_tensor(x, True, device) if isinstance(x, torch.Tensor) else x
    )


def _recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """`target` with `map_fn` applied to what its nested containers hold."""
    if isinstance(target, dict):
        return type(target)({key: _recursive_map(item, map_fn) for key, item in target.items()})
    if isinstance(target, list | tuple | set):
        items = [_recursive_map(item, map_fn) for item in target]
        return type(target)(*items) if hasattr(target, "_fields") else type(target)(items)
    return map_fn(target)


def _is_container(target: Any) -> bool:
    return isinstance(target, list | tuple | dict | set)
