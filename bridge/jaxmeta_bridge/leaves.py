"""Torch functions that are traced in a way of their own, before torch takes them apart.

Recurrent layers would be unrolled over time; they become one operation each, a `lax.scan` in JAX.
Circular padding and indexing by an integer tensor are written with operations that can be traced.
`Tensor.data` is not dispatched at all, so the cut that it makes in the gradient would be lost.
Reading values (`numpy`, `tolist`) is impossible while tracing and is refused with the reason.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from jaxmeta_bridge.errors import ControlFlowError, UnsupportedOpError
from jaxmeta_bridge.location import locate

_LIBRARY = torch.library.Library("jaxmeta_bridge", "DEF")
_LIBRARY.define(
    "lstm(Tensor input, Tensor[] hx, Tensor[] weights, Tensor[] masks, bool has_biases, "
    "bool bidirectional, bool batch_first) -> (Tensor, Tensor, Tensor)"
)
for _name in ("gru", "rnn_tanh", "rnn_relu"):
    _LIBRARY.define(
        f"{_name}(Tensor input, Tensor hx, Tensor[] weights, Tensor[] masks, bool has_biases, "
        "bool bidirectional, bool batch_first) -> (Tensor, Tensor)"
    )
# `value`, differentiated as if it were `proxy`.
_LIBRARY.define("with_derivative_of(Tensor value, Tensor proxy) -> Tensor")


class Leaves(TorchFunctionMode):
    """While active, calls of the functions below take the way described in this file."""

    def __init__(self) -> None:
        super().__init__()
        self._detached: list[torch.Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        leaf = _LEAVES.get(func, func)
        if not (args and isinstance(args[0], torch.Tensor) and _changes_in_place(func)):
            result = leaf(*args, **kwargs)
            if leaf is torch.Tensor.detach:
                self._detached.append(result)
            return result
        if any(args[0] is tensor for tensor in self._detached):
            raise UnsupportedOpError(
                f"{locate({})} changes a detached tensor in place, which shares memory with the "
                "one that it was detached from. Write .detach().clone()."
            )
        if func is not torch.Tensor.__setitem__ or torch.is_grad_enabled():
            return leaf(*args, **kwargs)
        with torch.enable_grad():  # an entry changed under no_grad keeps the derivative it had
            target, old = args[0], args[0].clone()
            leaf(*args, **kwargs)
            if target.is_floating_point():
                target.copy_(torch.ops.jaxmeta_bridge.with_derivative_of(target, old))
        return None


def _changes_in_place(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name in _IN_PLACE or (
        name.endswith("_") and not name.startswith("_") and name not in _NOT_OF_VALUES
    )


_IN_PLACE = frozenset(
    ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__imod__")
)
_NOT_OF_VALUES = frozenset(
    ("requires_grad_", "detach_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_")
)


def _recurrent(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    operation = getattr(torch.ops.jaxmeta_bridge, name)

    def call(
        input: torch.Tensor,
        hx: Any,
        weights: Any,
        has_biases: Any,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: Any = None,
    ) -> Any:
        if batch_first is None:  # the overload for packed sequences has one argument less
            return function(
                input, hx, weights, has_biases, num_layers, dropout, train, bidirectional
            )
        masks = _dropout_masks(input, hx, num_layers - 1, dropout if train else 0.0, bidirectional)
        return operation(input, hx, weights, masks, has_biases, bidirectional, batch_first)

    return call


def _dropout_masks(
    input: torch.Tensor, hx: Any, count: int, dropout: float, bidirectional: bool
) -> list[torch.Tensor]:
    """Scaled masks between the layers, drawn in torch's order; none where nothing is dropped."""
    if dropout == 0.0:
        return []
    state = hx if isinstance(hx, torch.Tensor) else hx[0]
    width = state.shape[-1] * (2 if bidirectional else 1)
    ones = input.new_ones((*input.shape[:-1], width))
    return [torch.nn.functional.dropout(ones, dropout) for _ in range(count)]


def _recurrent_shapes(
    input: torch.Tensor,
    hx: Any,
    weights: Any,
    masks: Any,
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    states: Sequence[torch.Tensor] = [hx] if isinstance(hx, torch.Tensor) else hx
    width = states[0].shape[-1] * (2 if bidirectional else 1)
    output = input.new_empty((*input.shape[:-1], width))
    return (output, *(state.new_empty(state.shape) for state in states))


for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    torch.library.register_fake(f"jaxmeta_bridge::{_name}", _recurrent_shapes, lib=_LIBRARY)


def _pad(
    input: torch.Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> torch.Tensor:
    """Circular padding as concatenation: torch writes it into views of an empty tensor."""
    if mode != "circular":
        return torch.nn.functional.pad(input, list(pad), mode, value)
    for axis, (before, after) in enumerate(zip(pad[0::2], pad[1::2], strict=True)):
        dim = input.dim() - 1 - axis
        size = input.shape[dim]
        if max(before, after) > size or min(before, after) < -size:
            raise RuntimeError(f"circular padding {(before, after)} of an axis of size {size}")
        kept = input.narrow(dim, max(-before, 0), size - max(-before, 0) - max(-after, 0))
        ends = kept.narrow(dim, kept.shape[dim] - max(before, 0), max(before, 0))
        starts = kept.narrow(dim, 0, max(after, 0))
        input = torch.cat([ends, kept, starts], dim)
    return input


def _getitem(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    """`tensor[key]`, where torch would read an integer tensor in `key` as a Python number."""
    parts = key if isinstance(key, tuple) else (key,)
    if not any(_is_scalar_index(part) for part in parts):
        return tensor[key]
    if not all(isinstance(part, slice) or _is_scalar_index(part) for part in parts):
        return tensor[key]  # refused for its value; rare, and the message says what to do
    kept = tuple(part if isinstance(part, slice) else slice(None) for part in parts)
    indices = [None if isinstance(part, slice) else part for part in parts]
    return torch.ops.aten.index.Tensor(tensor[kept], indices)


def _setitem(tensor: torch.Tensor, key: Any, value: Any) -> None:
    """`tensor[key] = value` for keys of integer tensors, likewise."""
    parts = key if isinstance(key, tuple) else (key,)
    if any(_is_scalar_index(part) for part in parts) and all(
        isinstance(part, torch.Tensor) for part in parts
    ):
        value = torch.as_tensor(value, dtype=tensor.dtype, device=tensor.device)
        tensor.index_put_(parts, value)
    else:
        tensor[key] = value


def _is_scalar_index(part: Any) -> bool:
    return (
        isinstance(part, torch.Tensor)
        and part.dim() == 0
        and part.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)
    )


def _refuse_hook(*args: Any, **kwargs: Any) -> Any:
    raise UnsupportedOpError(
        f"{locate({})} puts a hook on a gradient, which JAX would not call. Transform the gradient "
        "in JAX, with jax.custom_vjp."
    )


@torch.library.register_fake("jaxmeta_bridge::with_derivative_of", lib=_LIBRARY)
def _with_derivative_of_shape(value: torch.Tensor, proxy: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value)


def _gaussian_nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    var: torch.Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    """torch's own asks whether a variance is negative; here that is clamped as small ones are."""
    if not isinstance(var, torch.Tensor):
        var = var * torch.ones_like(input)
    elif var.shape != input.shape and var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    var = var + (var.clamp(min=eps) - var).detach()  # the clamp is no part of torch's gradient
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss.mean() if reduction == "mean" else loss.sum() if reduction == "sum" else loss


def _refuse_value(*args: Any, **kwargs: Any) -> Any:
    raise ControlFlowError(
        f"{locate({})} asks for the values of a tensor (numpy, tolist) while it is traced, when "
        "there are shapes only. Compute that part outside, or write it with torch operations."
    )


def _refuse_assignment(*args: Any, **kwargs: Any) -> Any:
    raise UnsupportedOpError(
        f"{locate({})} assigns to `tensor.data`, which bypasses autograd. Use torch.no_grad() and "
        "an in-place operation such as copy_ instead."
    )


_LEAVES: dict[Any, Callable[..., Any]] = {
    torch.nn.functional.pad: _pad,
    torch.Tensor.__getitem__: _getitem,
    torch.Tensor.__setitem__: _setitem,
    torch.lstm: _recurrent("lstm", torch.lstm),
    torch.gru: _recurrent("gru", torch.gru),
    torch.rnn_tanh: _recurrent("rnn_tanh", torch.rnn_tanh),
    torch.rnn_relu: _recurrent("rnn_relu", torch.rnn_relu),
    torch.nn.functional.gaussian_nll_loss: _gaussian_nll_loss,
    torch.Tensor.data.__get__: torch.Tensor.detach,  # type: ignore[attr-defined]
    torch.Tensor.data.__set__: _refuse_assignment,  # type: ignore[attr-defined]
    torch.Tensor.register_hook: _refuse_hook,
    torch.Tensor.numpy: _refuse_value,
    torch.Tensor.tolist: _refuse_value,
    torch.Tensor.__array__: _refuse_value,
}
