"""Copies of modules whose parameters are the fast weights of an inner loop."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from jaxmeta_bridge.higher.copying import Binding, copy_module
from jaxmeta_bridge.higher.layers import LayerCall, layer_call
from jaxmeta_bridge.recorder import (
    Recorded,
    begin_stretch,
    to_copies,
    to_leaf,
    to_ordinary,
    to_recorded,
    watch_torch,
)

_Module = nn.Module


class _MonkeyPatchBase(nn.Module):
    """What every module of a patched tree is an instance of; the root holds the fast weights."""

    _weights: "list[list[Any]] | None"
    _bindings: list[Binding]
    _track_higher_grads: bool
    _root: Any = None  # the root; None in the root itself
    _bound = False  # whether a patched tree belongs to this root; not one made by slicing another

    @property
    def is_root(self) -> bool:
        """Whether this is the module that was patched, rather than one of its submodules."""
        return self._root is None

    @property
    def root(self) -> "_MonkeyPatchBase":
        """The module that was patched."""
        return self if self._root is None else self._root

    @property
    def init_fast_params(self) -> list[torch.Tensor]:
        """The initial fast weights."""
        root = self.root
        if not root.track_higher_grads:
            raise RuntimeError(
                "The initial parameters are not kept, because track_higher_grads is False."
            )
        assert root._weights is not None
        return root._weights[0]

    @property
    def _fast_params(self) -> list[list[torch.Tensor]] | None:
        return self.root._weights

    @_fast_params.setter
    def _fast_params(self, value: Any) -> None:
        root = self.root
        if value is None:
            object.__setattr__(root, "_weights", None)
            return
        weights = [[to_recorded(tensor) for tensor in params] for params in value]
        object.__setattr__(root, "_weights", weights)
        if weights:
            root._bind(weights[-1])

    @property
    def fast_params(self) -> list[torch.Tensor] | None:
        """The present fast weights, one for each distinct parameter; settable."""
        weights = self.root._weights
        return None if weights is None else weights[-1]

    @fast_params.setter
    def fast_params(self, value: Iterable[torch.Tensor]) -> None:
        self.root._set_weights(value)

    @property
    def track_higher_grads(self) -> bool:
        """Whether the fast weights of earlier steps are kept, with their gradients."""
        return self.root._track_higher_grads

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"track_higher_grads is {value!r}; expected a bool.")
        root = self.root
        object.__setattr__(root, "_track_higher_grads", value)
        if not value and root._weights is not None:
            object.__setattr__(root, "_weights", root._weights[-1:])

    def update_params(self, params: Iterable[torch.Tensor]) -> None:
        """Makes `params`, one for each distinct parameter, the present fast weights."""
        self.root._set_weights(params)

    def _set_weights(self, params: Iterable[torch.Tensor]) -> None:
        new = [to_recorded(tensor) for tensor in params]
        if self._weights is None:
            object.__setattr__(self, "_weights", [])
        assert self._weights is not None
        if self._track_higher_grads:
            self._weights.append(new)
        else:
            self._weights[:] = [new]
        self._bind(new)

    def _bind(self, params: list[Any]) -> None:
        """Puts the weights where the modules of the tree look for their parameters."""
        for binding in self._bindings:
            binding.parameters[binding.name] = params[binding.index]

    def _layer_call(self) -> LayerCall | None:
        state = self.__dict__
        root = self.root.__dict__
        known = state.get("_layer")
        if state.get("_layer_version") != root["_version"] or (known and not known.holds()):
            known = state["_layer"] = layer_call(self, root["_bindings"])
            state["_layer_version"] = root["_version"]
        return known

    def _take(self, params: Iterable[torch.Tensor] | None) -> None:
        root = self.root
        if params is not None:
            root._set_weights(params)
        elif not root._bound:  # made from patched modules by a method of theirs, such as slicing
            return
        elif root._weights is None:
            raise ValueError(
                "This module has no weights of its own: pass params=, a list with one tensor for "
                "each parameter of the module that it was made from."
            )

    def _replace(self, name: str, value: Any) -> None:
        """Assigns a fast weight, as `module.weight = value` does."""
        if not isinstance(value, torch.Tensor):
            raise TypeError(
                f"cannot assign {torch.typename(value)} to the fast weight '{name}'; expected a "
                "tensor."
            )
        root = self.root
        if root._weights is None:
            raise RuntimeError(
                f"cannot assign '{name}': this module has no weights of its own. Call it with "
                "params=."
            )
        new = list(root._weights[-1])
        for binding in root._bindings:
            if binding.parameters is self._parameters and binding.name == name:
                new[binding.index] = value
        root._set_weights(new)


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    def forward(
        self: Any, *args: Any, params: Iterable[torch.Tensor] | None = None, **kwargs: Any
    ) -> Any:
        self._take(params)
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor):
            call = self._layer_call() if self.root._bound else None
            if call is not None and call.applies():
                result = call(args[0])
                if result is not None:
                    return result
        if "_flat_weights_names" in self.__dict__:
            self.__dict__["_flat_weights"] = [getattr(self, n) for n in self._flat_weights_names]
        return base.forward(self, *args, **kwargs)

    return forward


def _set(self: Any, name: str, value: Any) -> None:
    root = self.root.__dict__
    parameters = self.__dict__.get("_parameters", {})
    if self.root._bound and name in parameters:
        if parameters[name] is not None or value is not None:
            self._replace(name, value)
        return
    root["_version"] = root.get("_version", 0) + 1
    buffers = self.__dict__.get("_buffers")
    if buffers is not None and name in buffers and isinstance(value, torch.Tensor):
        value = to_recorded(value)
    self._original.__setattr__(self, name, value)


def _parameters(self: Any, recurse: bool = True, time: int | None = None) -> Iterator[torch.Tensor]:
    """The fast weights, each distinct one once.

    Args:
      self: the patched module.
      recurse: there for nn.Module's sake; submodules are always included.
      time: after which update; 0 for the initial ones, None or -1 for the latest.
    """
    if self._weights is None:
        raise RuntimeError("This module has no weights of its own: they are passed as params=.")
    if not recurse:
        warnings.warn(
            "parameters(recurse=False) of a patched module returns those of submodules, too.",
            stacklevel=2,
        )
    time = -1 if time is None else time
    if not self._track_higher_grads and time not in (-1, 0):
        raise ValueError(
            f"time is {time}, but only the latest parameters are kept, because track_higher_grads "
            "is False."
        )
    return iter(self._weights[time])


def _apply_to_all(
    self: Any, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
) -> Any:
    """nn.Module's way of `to`, `float` and the like, for fast weights."""
    root = self.root
    mine = {
        id(binding.parameters[binding.name])
        for binding in root._bindings
        if any(binding.parameters is module._parameters for module in self.modules())
    }
    if root._weights is not None:
        latest = root._weights[-1]
        root._weights[-1] = [to_recorded(fn(t)) if id(t) in mine else t for t in latest]
        root._bind(root._weights[-1])
    for module in self.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = to_recorded(fn(buffer))
    return self


def _no_op(self: Any) -> None:
    return None


def _class_of(base: type[nn.Module], prefix: str) -> type[Any]:
    key = (base, prefix)
    if key not in _CLASSES:
        body = {
            "forward": _forward(base),
            "__setattr__": _set,
            "_apply": _apply_to_all,
            "_original": base,
            "__module__": base.__module__,
            "__doc__": base.__doc__,
        }
        if prefix == "Functional":
            body["parameters"] = _parameters
        if hasattr(base, "flatten_parameters"):
            body["flatten_parameters"] = _no_op
        bases: Any = (base, _MonkeyPatchBase)
        _CLASSES[key] = type(prefix + base.__name__, bases, body)
    return _CLASSES[key]


_CLASSES: dict[Any, type[Any]] = {}


class _Placeholder:
    """Stands for a parameter of a module that is given its weights with each call."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f'Parameter placeholder ("{self._name}")'


def make_functional(
    module: nn.Module,
    encapsulator: Callable[[Any, nn.Module], None] | None = None,
) -> Any:
    """A copy of a module that has no weights: it is called with `params=`.

    Args:
      module: what to copy; it is not changed.
      encapsulator: called with the copy and the module, for instance to give it weights.
    """
    watch_torch()
    if isinstance(module, _MonkeyPatchBase):
        raise ValueError(
            "module is a patched module already. Patch the module that it was made from; its "
            "present weights can be given with params=."
        )
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}; expected a torch.nn.Module.")
    copied = copy_module(module, _class_of, _Placeholder)
    root = copied.root
    state = root.__dict__
    state["_bindings"] = copied.bindings
    state["_bound"] = True
    state["_version"] = 0  # counts changes of attributes anywhere in the tree
    state["_weights"] = None
    state["_track_higher_grads"] = True
    for each in copied.modules:
        each.__dict__["_root"] = None if each is root else root
    if encapsulator is not None:
        encapsulator(root, module)
    return root


def monkeypatch(
    module: nn.Module,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> Any:
    """A copy of a module whose weights an inner loop can change, with gradients.

    Args:
      module: what to copy; it is not changed, and neither are its buffers.
      device: where to put weights and buffers; by default where they are.
      copy_initial_weights: whether the initial fast weights are leaves of their own, rather than
        lead gradients to the module's parameters (MAML).
      track_higher_grads: whether to keep the weights of all steps and their gradients.
    """

    def encapsulator(fmodule: Any, original: nn.Module) -> None:
        begin_stretch()
        params: list[Any] = list(original.parameters())
        if device is not None:
            params = [parameter.to(device) for parameter in params]
        if copy_initial_weights:
            params = [to_leaf(p.detach().clone(), p.requires_grad) for p in params]
        else:
            params = to_copies(params)
        buffer_sync(original, fmodule, device)
        fmodule.update_params(params)

    fmodule = make_functional(module, encapsulator)
    fmodule.track_higher_grads = track_higher_grads
    return fmodule


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | None = None) -> None:
    """Copies the buffers of one module to the other, of which either may be the patched one.

    Args:
      module: from where.
      fmodule: to where; of the same structure.
      device: where to put them.
    """
    patched = isinstance(fmodule, _MonkeyPatchBase)
    for name, buffer in module._buffers.items():
        if buffer is None:
            fmodule._buffers[name] = None
            continue
        moved = buffer.detach().clone() if device is None else buffer.detach().clone().to(device)
        if patched:
            moved = to_recorded(moved)
        elif type(moved) is Recorded:
            with torch.no_grad():
                moved = to_ordinary(moved)
        fmodule._buffers[name] = moved
    for name, child in module._modules.items():
        if name not in fmodule._modules:
            raise KeyError(f"The patched module {type(fmodule).__name__} has no submodule {name}.")
        other = fmodule._modules[name]
        if child is not None and other is not None:
            buffer_sync(child, other, device)
