"""What `from_torch` needs to know of an `nn.Module`, and the guard that leaves it as it was."""

import contextlib
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from jaxmeta_bridge.dlpack import check_tensor
from jaxmeta_bridge.errors import ConversionError

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_TORCH_FIELDS = ("_parameters", "_buffers", "_modules")


def check_convertible(module: nn.Module) -> None:
    """Refuses modules whose code or tensors cannot be traced, naming what to do instead."""
    for name, child in module.named_modules():
        where = f"module '{name}'" if name else "the module"
        if isinstance(child, torch.jit.ScriptModule):
            raise ConversionError(
                f"{where} is a compiled TorchScript module, whose operations cannot be traced. "
                "Pass the nn.Module it was made from."
            )
        if hasattr(child, "_orig_mod"):
            raise ConversionError(
                f"{where} is wrapped by torch.compile. Pass the original module (its `_orig_mod`); "
                "JAX compiles it."
            )
    for kind, tensors in (
        ("parameter", module.named_parameters()),
        ("buffer", module.named_buffers()),
    ):
        for name, tensor in tensors:
            if is_lazy(tensor):
                raise ConversionError(
                    f"{kind} '{name}' has no shape yet (a lazy module). Call the module once on an "
                    "example in torch before from_torch."
                )
            check_tensor(tensor, f"{kind} '{name}'")


def fingerprint(module: nn.Module) -> Hashable:
    """Changes whenever a plain attribute of any submodule does, its training flag included.

    A traced program is right only for the attributes it was traced with: `train()`, a changed
    dropout rate, a replaced child or hook must trace anew.
    """
    return tuple(
        (
            id(child),
            tuple(child._forward_hooks),
            tuple(child._forward_pre_hooks),
            tuple((k, type(v), v) for k, v in vars(child).items() if _is_plain(v)),
        )
        for child in module.modules()
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Undoes what a traced forward leaves on the module: stored activations, counters, buffers."""
    before = [
        (child, dict(vars(child)), [dict(getattr(child, field)) for field in _TORCH_FIELDS])
        for child in module.modules()
    ]
    try:
        yield
    finally:
        for child, attributes, fields in before:
            vars(child).clear()
            vars(child).update(attributes)
            for field, content in zip(_TORCH_FIELDS, fields, strict=True):
                current = getattr(child, field)
                current.clear()
                current.update(content)
