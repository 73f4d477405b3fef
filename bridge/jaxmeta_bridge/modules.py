"""What `from_torch` needs to know of an `nn.Module`, and the guard that leaves it as it was."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from jaxmeta_bridge.dlpack import check_tensor
from jaxmeta_bridge.errors import ConversionError, UnsupportedOpError


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


def check_without_gradient_hooks(module: nn.Module) -> None:
    """Refuses hooks on gradients: in JAX they would silently not be called."""
    hooked = [name for name, p in module.named_parameters() if p._backward_hooks]
    hooked += [
        name
        for name, child in module.named_modules()
        if child._backward_hooks or child._backward_pre_hooks
    ]
    if hooked:
        raise UnsupportedOpError(
            f"{hooked} have hooks on their gradients, which JAX would not call. Remove the hooks, "
            "and transform the gradients in JAX."
        )


def make_traceable(module: nn.Module) -> None:
    """Replaces, on the instances, forwards that ask for values; call it inside `unchanged`."""
    for child in module.modules():
        is_plain = type(child).forward is _BatchNorm.forward  # not a subclass with its own
        if is_plain and child.training and child.momentum is None and child.track_running_stats:
            vars(child)["forward"] = functools.partial(_cumulative_batch_norm, child)


def _cumulative_batch_norm(module: Any, input: torch.Tensor) -> torch.Tensor:
    """Batch norm with `momentum=None`: running statistics are the mean over all batches.

    torch's own turns the number of batches into a Python float.
    """
    module._check_input_dim(input)
    mean, var = torch.zeros_like(module.running_mean), torch.zeros_like(module.running_var)
    output = nn.functional.batch_norm(
        input, mean, var, module.weight, module.bias, True, 1.0, module.eps
    )
    with torch.no_grad():
        module.num_batches_tracked.add_(1)
        count = module.num_batches_tracked.to(mean.dtype)
        module.running_mean.add_((mean - module.running_mean) / count)
        module.running_var.add_((var - module.running_var) / count)
    return output


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Undoes what a traced forward leaves on the module: stored activations, counters, buffers."""
    containers: dict[int, tuple[Any, Any]] = {}
    for child in module.modules():
        _remember(vars(child), containers)
    try:
        yield
    finally:
        for container, content in containers.values():
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


def _remember(container: Any, containers: dict[int, tuple[Any, Any]]) -> None:
    """Notes the content of a list, dict or set, and of those inside it."""
    if isinstance(container, list | dict | set) and id(container) not in containers:
        containers[id(container)] = (container, container.copy())
        for value in container.values() if isinstance(container, dict) else container:
            _remember(value, containers)
