"""When two calls may share one trace: keys for what Python code reads beside its arguments.

A traced program is right only for the attributes and variables that it was traced with. Plain
values and containers are compared by content, everything else by identity; an object in a key is
kept alive, so that its identity is not used again.
"""

import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# What `modules` and `parameters` tell, or torch's own bookkeeping.
_SEPARATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


class Identity:
    """Equal to nothing but the same object, which it keeps alive."""

    __slots__ = ("it",)

    def __init__(self, it: Any) -> None:
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


def value_key(value: Any) -> Hashable:
    """Of a Python value: plain ones by type and content (0.0 is not -0.0, 1 is not True)."""
    if isinstance(value, _PLAIN):
        return (type(value), repr(value))
    if isinstance(value, list | tuple):
        return (type(value), *map(value_key, value))
    if isinstance(value, dict):
        return (type(value), *((value_key(k), value_key(v)) for k, v in value.items()))
    if isinstance(value, set | frozenset):
        return (type(value), frozenset(map(value_key, value)))
    if hasattr(type(value), "__jaxmeta_key__"):
        return value.__jaxmeta_key__()
    return Identity(value)


def module_key(module: nn.Module) -> Hashable:
    """Of a module: all attributes of all submodules, training flags, hooks, which are tied."""
    children = tuple(
        (
            Identity(child),
            tuple((k, value_key(v)) for k, v in vars(child).items() if k not in _SEPARATE),
            tuple(child._modules),
        )
        for child in module.modules()
    )
    return (children, _ties(module.named_parameters), _ties(module.named_buffers))


def _ties(named: Callable[..., Any]) -> Hashable:
    """For each name of a tensor, the first name of the same tensor."""
    first: dict[int, str] = {}
    names = named(remove_duplicate=False)
    return tuple((name, first.setdefault(id(tensor), name)) for name, tensor in names)


def function_key(function: Callable[..., Any]) -> Hashable:
    """Of a function: the values in its closure, the modules and tensors among the globals it uses.

    Functions that it calls in turn, if they are of the same file, are looked into as well.
    """
    return _function_key(function, set())


def _function_key(function: Any, seen: set[int]) -> Hashable:
    if isinstance(function, nn.Module):
        return module_key(function)
    if isinstance(function, types.MethodType):
        return (_function_key(function.__self__, seen), _function_key(function.__func__, seen))
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return value_key(function)
    seen.add(id(function))
    variables = [_content(cell) for cell in function.__closure__ or ()]
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        same_file = getattr(value, "__module__", None) == function.__module__
        if (
            isinstance(value, nn.Module | torch.Tensor)
            or hasattr(type(value), "__jaxmeta_key__")
            or (isinstance(value, types.FunctionType) and same_file)
        ):
            variables.append(value)
    return (Identity(function), *(_variable_key(value, seen) for value in variables))


def _variable_key(value: Any, seen: set[int]) -> Hashable:
    if isinstance(value, nn.Module | types.FunctionType | types.MethodType):
        return _function_key(value, seen)
    return value_key(value)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that is not assigned yet
        return None
