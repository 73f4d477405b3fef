"""Copies a module tree so that the copy has parameters, buffers, hooks and flags of its own.

Other attributes are shared with the original, except that what refers to its modules, parameters
or buffers (lists of layers, bound methods) refers to the copy's instead.
"""

import functools
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Binding:
    """A place in the tree where a parameter is."""

    parameters: dict[str, Any]  # of the module
    name: str
    index: int  # among the distinct parameters


@dataclass(frozen=True)
class Copied:
    """A copied tree."""

    root: Any
    modules: list[Any]
    bindings: list[Binding]


def copy_module(
    module: nn.Module,
    class_of: Callable[[type[nn.Module], str], type[Any]],
    placeholder: Callable[[str], Any],
) -> Copied:
    """Copies `module`.

    Args:
      module: the root of the tree.
      class_of: gives the class of the copy, from that of the original and a prefix for its name.
      placeholder: stands where a parameter is, by its name.
    """
    copies: dict[int, Any] = {}
    originals = list(module.modules())
    for original in originals:
        prefix = "Functional" if original is module else "InnerFunctional"
        cls: Any = class_of(type(original), prefix)
        copies[id(original)] = cls.__new__(cls)
    numbers = {id(parameter): index for index, parameter in enumerate(module.parameters())}
    bindings: list[Binding] = []
    for original in originals:
        state = copies[id(original)].__dict__
        state.update(original.__dict__)
        for name, attribute in original.__dict__.items():
            if type(attribute) not in _PLAIN and name not in _OWN:
                state[name] = _translate(name, attribute, copies)
        parameters: dict[str, Any] = OrderedDict()
        for name, parameter in original._parameters.items():
            parameters[name] = None if parameter is None else placeholder(name)
            if parameter is not None:
                bindings.append(Binding(parameters, name, numbers[id(parameter)]))
        state["_parameters"] = parameters
        state["_buffers"] = OrderedDict(original._buffers)
        state["_modules"] = OrderedDict(
            (name, None if child is None else copies[id(child)])
            for name, child in original._modules.items()
        )
        _drop_backward_hooks(original, state)
    return Copied(copies[id(module)], list(copies.values()), bindings)


_OWN = {"_parameters", "_buffers", "_modules"}
_PLAIN = {bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size}


def _drop_backward_hooks(original: nn.Module, state: dict[str, Any]) -> None:
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        warnings.warn(
            f"The backward hooks of {type(original).__name__} do not run in the inner loop, whose "
            "gradients are computed by compiled programs.",
            stacklevel=2,
        )
    state["_backward_hooks"], state["_backward_pre_hooks"] = OrderedDict(), OrderedDict()


def _translate(name: str, value: Any, copies: dict[int, Any]) -> Any:
    if name.startswith("_") and name.endswith(("hooks", "hooks_with_kwargs", "always_called")):
        return value.copy() if value else type(value)()
    return _map(value, copies, 0)


def _map(value: Any, copies: dict[int, Any], depth: int) -> Any:
    """`value` with the copies in place of the modules that it holds; itself if it holds none."""
    if isinstance(value, nn.Module):
        return copies.get(id(value), value)
    if depth > 4:
        return value
    kind = type(value)
    if kind in (list, tuple):
        items = [_map(item, copies, depth + 1) for item in value]
        return kind(items) if _differs(items, value) else value
    if kind in (dict, OrderedDict):
        items = {key: _map(item, copies, depth + 1) for key, item in value.items()}
        return kind(items) if _differs(items.values(), value.values()) else value
    if kind is types.MethodType:
        owner = _map(value.__self__, copies, depth + 1)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if kind is functools.partial:
        inside = [_map(item, copies, depth + 1) for item in (value.func, *value.args)]
        keywords = {key: _map(item, copies, depth + 1) for key, item in value.keywords.items()}
        if _differs(inside, (value.func, *value.args)) or _differs(
            keywords.values(), value.keywords.values()
        ):
            return functools.partial(*inside, **keywords)
    return value


def _differs(items: Any, others: Any) -> bool:
    return any(item is not other for item, other in zip(items, others, strict=True))
