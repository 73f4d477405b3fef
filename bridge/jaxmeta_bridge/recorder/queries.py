"""What a recorded tensor answers without being computed, and what makes it be computed."""

from collections.abc import Callable
from typing import Any

import torch

from jaxmeta_bridge.recorder.execute import read
from jaxmeta_bridge.recorder.tensor import HANDLERS, Recorded

_T: Any = torch.Tensor

_STATIC = [
    *(_T.shape, _T.dtype, _T.device, _T.layout, _T.ndim, _T.is_sparse, _T.is_cuda, _T.is_meta),
    *(_T.is_cpu, _T.is_quantized, _T.is_mps, _T.is_xpu, _T.is_nested, _T.itemsize),
    *(_T.nbytes, _T.is_sparse_csr, _T.is_mkldnn, _T.is_ipu, _T.is_maia, _T.is_mtia, _T.is_vulkan),
]
_STATIC_METHODS = [
    *(_T.size, _T.dim, _T.ndimension, _T.numel, _T.nelement, _T.stride, _T.is_contiguous),
    *(_T.element_size, _T.is_floating_point, _T.is_complex, _T.get_device, _T.storage_offset),
    *(_T.is_signed, _T.is_inference, _T.is_neg, _T.is_conj, _T.__len__, _T.is_pinned),
    *(_T.is_shared, _T.type, _T.dim_order, _T.__hash__, torch.numel, torch.is_floating_point),
    *(torch.is_complex, torch.is_same_size, torch.is_signed, torch.result_type),
]


def _static(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _on_value(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Calls `func` on present values, without gradient: for what reads."""
    args = [read(a._value) if type(a) is Recorded else a for a in args]
    kwargs = {k: read(a._value) if type(a) is Recorded else a for k, a in kwargs.items()}
    with torch.no_grad():
        return func(*args, **kwargs)


_READS = [
    *(_T.item, _T.tolist, _T.__bool__, _T.__int__, _T.__float__, _T.__index__, _T.__complex__),
    *(_T.__contains__, _T.equal, torch.equal, _T.allclose, torch.allclose, torch.is_nonzero),
    *(_T.is_nonzero, _T.__dlpack__, _T.__dlpack_device__, torch.from_dlpack),
]


def _memory(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Of the value's memory, which lives as long as the recorded tensor."""
    shown = args[0].__dict__["_shown"] = read(args[0]._value)
    return func(shown, *args[1:], **kwargs)


def _numpy(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if args[0]._value.kind.grad and func is _T.numpy and not kwargs.get("force"):
        raise RuntimeError(
            "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead."
        )
    return func(read(args[0]._value), *args[1:], **kwargs)


def _show(func: Callable[..., Any], args: Any, kwargs: Any) -> str:
    value = args[0]._value
    tensor = read(value)
    if value.kind.grad:
        text = func(tensor.requires_grad_() if value.leaf else tensor)
        return text if value.leaf else f"{text[:-1]}, grad_fn=<{_name(args[0])}>)"
    return func(tensor, *args[1:], **kwargs)


def _name(tensor: Recorded) -> str:
    value = tensor._value
    return "Recorded" if value.window is None else f"{value.op.name}Recorded"


def _format(func: Callable[..., Any], args: Any, kwargs: Any) -> str:
    if args[0].dim() == 0:
        return read(args[0]._value).item().__format__(args[1])
    return _show(_T.__repr__, args[:1], {})


def _new_like(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A tensor that has only shape and dtype of a recorded one."""
    kind = args[0]._value.kind
    return func(kind.empty(), *args[1:], **kwargs)


_LIKES = [
    *(torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like),
    *(torch.randn_like, torch.randint_like, _T.new_zeros, _T.new_ones, _T.new_full, _T.new_empty),
    *(_T.new_empty_strided, _T.new),
]


def _new_tensor(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    kind = args[0]._value.kind if type(args[0]) is Recorded else None
    data = args[1]
    if type(data) is Recorded:
        data = read(data._value)
    base = args[0] if kind is None else kind.empty()
    return func(base, data, *args[2:], **kwargs)


def _iterate(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if args[0].dim() == 0:
        raise TypeError("iteration over a 0-d tensor")
    return iter(torch.unbind(args[0], 0))


def _reduce(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    value = args[0]._value
    tensor = read(value)
    return tensor.requires_grad_(value.kind.grad).__reduce_ex__(*args[1:])


def _deepcopy(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    value = args[0]._value
    if value.kind.grad and not value.leaf:
        raise RuntimeError(
            "Only Tensors created explicitly by the user (graph leaves) support the deepcopy "
            "protocol at the moment. Copy tensor.detach(), or torch's .clone()."
        )
    copy = read(value).requires_grad_(value.kind.grad)
    args[1][id(args[0])] = copy
    return copy


for _function in _STATIC:
    HANDLERS[_function.__get__] = _static
for _function in _STATIC_METHODS:
    HANDLERS[_function] = _static
for _function in _READS:
    HANDLERS[_function] = _on_value
for _function in (_T.untyped_storage, _T.storage, _T.data_ptr, _T.storage_type):
    HANDLERS[_function] = _memory
for _function in _LIKES:
    HANDLERS[_function] = _new_like
HANDLERS |= {
    _T.numpy: _numpy,
    _T.__array__: _numpy,
    _T.__repr__: _show,
    _T.__format__: _format,
    _T.__iter__: _iterate,
    _T.new_tensor: _new_tensor,
    _T.__reduce_ex__: _reduce,
    _T.__deepcopy__: _deepcopy,
}
