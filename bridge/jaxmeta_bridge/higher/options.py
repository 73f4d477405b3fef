"""Options of parameter groups, and values that override them."""

import numbers
from typing import Any

import torch


def copy_group(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group with containers of its own; tensors keep their graph."""
    return {name: _copy(value) for name, value in group.items()}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_copy(item) for item in value])
    return value


def apply_override(groups: list[dict[str, Any]], override: dict[str, Any]) -> None:
    """Sets options of the groups.

    Args:
      groups: the parameter groups; unchanged if anything is wrong.
      override: option -> a list, tuple, 1-D tensor or array with one value for all groups or one
        for each; or a single number.
    """
    found: list[tuple[str, list[Any]]] = []
    for name, values in override.items():
        if isinstance(values, numbers.Number) or (
            isinstance(values, torch.Tensor) and values.dim() == 0
        ):
            values = [values]
        if len(values) not in (1, len(groups)):
            raise ValueError(
                f"override has {len(values)} values of {name} for {len(groups)} parameter groups; "
                "expected one for all groups, or one for each."
            )
        found.append((name, [values[index] for index in range(len(values))]))
    for name, values in found:
        for index, group in enumerate(groups):
            group[name] = values[0] if len(values) == 1 else values[index]
