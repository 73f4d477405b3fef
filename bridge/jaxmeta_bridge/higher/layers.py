"""Layers of `torch.nn` whose call is recorded as one operation, whatever happens inside.

They are pure functions of their parameters and inputs, so nothing is lost; a script's inner loop
spends most of its recording time in them.
"""

import threading
from typing import Any

import torch
from torch import nn

from jaxmeta_bridge import recorder
from jaxmeta_bridge.higher.copying import Binding, copy_module

_PURE: set[type[nn.Module]] = {
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Unflatten, nn.Linear, nn.Bilinear),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.LayerNorm),
    *(nn.GroupNorm, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU),
    *(nn.GELU, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.SiLU, nn.Mish, nn.Hardtanh, nn.Softmax),
    *(nn.LogSoftmax, nn.Softsign, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class Layer:
    """A tree of such layers as a function of an input and its distinct parameters."""

    def __init__(self, module: nn.Module) -> None:
        copied = copy_module(
            module, lambda base, _: getattr(base, "_original", base), lambda _: None
        )
        self._root = copied.root
        self._bindings = copied.bindings
        self._lock = threading.RLock()
        self.__name__ = type(self._root).__name__

    def __call__(self, x: torch.Tensor, *params: torch.Tensor) -> Any:
        with self._lock:
            for binding in self._bindings:
                binding.parameters[binding.name] = params[binding.index]
            try:
                return self._root(x)
            finally:
                for binding in self._bindings:
                    binding.parameters[binding.name] = None


_LAYERS: dict[Any, Layer] = {}


class LayerCall:
    """What a patched module's call is recorded as, while nothing about the module changes.

    Attributes:
      layer: the function.
    """

    __slots__ = ("_children", "_hooks", "_places", "layer")

    def __init__(
        self, layer: Layer, places: list[Any], hooks: list[Any], children: list[Any]
    ) -> None:
        self.layer = layer
        self._children = children  # dict of submodules, and what it held
        self._places = places  # dict and name of each of its parameters
        self._hooks = hooks

    def holds(self) -> bool:
        """Whether the tree of modules is what it was."""
        return all(tuple(found.values()) == known for found, known in self._children)

    def applies(self) -> bool:
        """Whether no hook has been put on the module or one inside it."""
        return not any(self._hooks) and not any(_GLOBAL_HOOKS)

    def __call__(self, x: Any) -> Any:
        parameters = [place[name] for place, name in self._places]
        return recorder.record_values(self.layer, [x, *parameters])


_GLOBAL_HOOKS: list[Any] = [
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
]


def layer_call(module: Any, bindings: list[Binding]) -> LayerCall | None:
    """How to record calls of a patched module as one operation; None where that cannot be done.

    Args:
      module: a module of a patched tree.
      bindings: where the fast weights are in that tree.
    """
    modules = list(module.modules())
    if not all(getattr(type(m), "_original", None) in _PURE for m in modules):
        return None
    if any(m._buffers for m in modules):
        return None
    if any(type(m)._original is nn.Sequential and not len(m) for m in modules):
        return None
    numbers = {(id(b.parameters), b.name): b.index for b in bindings}
    places = [
        (m._parameters, n) for m in modules for n, p in m._parameters.items() if p is not None
    ]
    found = [numbers.get((id(parameters), name)) for parameters, name in places]
    if None in found:
        return None  # one was registered after the module was patched
    distinct: dict[Any, Any] = {}  # number of a parameter -> where it is first
    for index, place in zip(found, places, strict=True):
        distinct.setdefault(index, place)
    order = list(distinct)
    key = (tuple(_settings(m) for m in modules), tuple(order.index(index) for index in found))
    try:
        layer = _LAYERS.get(key)
    except TypeError:  # an attribute that cannot be hashed
        return None
    if layer is None:
        layer = _LAYERS.setdefault(key, Layer(module))
    hooks = [getattr(m, name) for m in modules for name in _HOOKS]
    children = [(m._modules, tuple(m._modules.values())) for m in modules if m._modules]
    return LayerCall(layer, list(distinct.values()), hooks, children)


def _settings(module: Any) -> Any:
    """All that a call of the module itself depends on, besides tensors."""
    plain = tuple(
        (name, value if not isinstance(value, list) else tuple(value))
        for name, value in module.__dict__.items()
        if name == "training" or not name.startswith("_")
    )
    children = tuple(module._modules)
    present = tuple((name, p is not None) for name, p in module._parameters.items())
    return type(module)._original, plain, children, present
