"""Options of parameter groups, and values that override them."""

import numbers
from typing import Any

import torch

from jaxmeta_bridge.higher import utils


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


def get_trainable_opt_params(
    opt: torch.optim.Optimizer, device: torch.device | None = None
) -> dict[str, list[Any]]:
    """Each numeric option of an optimizer as tensors that require grad, fit for `override`.

    Args:
      opt: whose options to take.
      device: where to put the tensors.
    """
    override: dict[str, list[Any]] = {}

    def to_tensor(x: Any) -> torch.Tensor:
        if isinstance(x, torch.Tensor):
            return x.detach().clone().requires_grad_()
        return torch.tensor(float(x), device=device, requires_grad=True)

    for group in opt.param_groups:
        for name, value in group.items():
            items = utils.flatten(value)
            if name != "params" and all(isinstance(x, (int, float, torch.Tensor)) for x in items):
                override.setdefault(name, []).append(utils._recursive_map(value, to_tensor))
    return override


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: dict[str, Any]) -> None:
    """Writes learned options back into an optimizer, as Python numbers where it had such.

    Args:
      opt: what to change.
      override: as `get_trainable_opt_params` gives it.
    """
    for name, value in override.items():
        if len(value) not in (1, len(opt.param_groups)):
            raise ValueError(
                f"override has {len(value)} values of {name} for {len(opt.param_groups)} parameter "
                "groups; expected one, or one for each."
            )
    for name, value in override.items():
        for index, group in enumerate(opt.param_groups):
            group[name] = _recursive_apply(value[0 if len(value) == 1 else index], group[name])


def _recursive_apply(replacement: Any, target: Any) -> Any:
    """`target` with the numbers of `replacement`."""
    if isinstance(target, dict):
        return type(target)({k: _recursive_apply(replacement[k], v) for k, v in target.items()})
    if isinstance(target, (list, tuple)) and isinstance(replacement, (list, tuple)):
        pairs = zip(replacement, target, strict=True)
        return type(target)([_recursive_apply(r, t) for r, t in pairs])
    if isinstance(target, torch.Tensor):
        return torch.as_tensor(replacement).detach().clone().to(target)
    if utils._is_container(target) or utils._is_container(replacement):
        raise ValueError(
            f"override has a {type(replacement).__name__} where the optimizer has a "
            f"{type(target).__name__}."
        )
    number = replacement.item() if hasattr(replacement, "item") else replacement
    # The default of an option may be the integer 0, and what was learned 0.5.
    if isinstance(target, bool) or float(number).is_integer():
        return type(target)(number)
    return float(number)
