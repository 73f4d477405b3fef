"""Tensors and trees of tensors across the border, both ways, values and dtypes unchanged."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch._C._functorch import is_legacy_batchedtensor

from jaxmeta_bridge.dtypes import NARROWED, TO_JAX, TO_TORCH, x64_enabled
from jaxmeta_bridge.errors import ConversionError

# Elements of an array that is faster to copy than to share.
_SMALL = 4096

_PLAIN = (torch.Tensor, torch.nn.Parameter)

# NumPy lacks these: their bits travel as integers of the same size.
_BITS = {
    dtype: {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
    for dtype in TO_JAX
    if dtype is torch.bfloat16 or "float8" in str(dtype)
}


def tensor_to_jax(
    tensor: torch.Tensor,
    *,
    share: bool = False,
    int64: Literal["error", "int32"] = "error",
    name: str = "tensor",
) -> jax.Array:
    """The JAX array with the values, shape and dtype of `tensor`, detached from torch's graph.

    A copy of a CPU tensor lies on JAX's default device, everything else on the tensor's own.

    Args:
        tensor: any dense tensor; views, whatever their strides, and parameters included.
        share: give the array the tensor's own memory, which both then keep alive, instead of a
            copy. JAX takes arrays to be immutable, so do not change such a tensor in place.
        int64: ``"int32"`` makes int64 int32, and uint64 uint32, if every value fits.
        name: what error messages call the tensor.

    Raises:
        ConversionError: the tensor has no dense values, or a dtype that JAX lacks or, while its
            x64 mode is off, would narrow; or its memory cannot be shared.

    Example:
        >>> tensor_to_jax(torch.tensor([1.0, 2.0]))
        Array([1., 2.], dtype=float32)
    """
    check_tensor(tensor, name)
    tensor = _narrowed(tensor, int64, share, name)
    if share:
        return _shared(tensor, name)
    if tensor.is_cpu:
        # Not from_dlpack(copy=True): that one copies later, and sees what changed meanwhile.
        return jnp.array(_numpy_view(tensor))
    return jnp.from_dlpack(_compact(tensor).clone())


def tensor_to_torch(array: jax.Array, *, share: bool = False, name: str = "array") -> torch.Tensor:
    """The tensor with the values, shape and dtype of `array`, on the same device.

    Args:
        array: any JAX array that lies on one device.
        share: give the tensor the array's own memory, which both then keep alive, instead of a
            copy. Changing such a tensor in place changes the array, which JAX does not expect.
        name: what error messages call the array.

    Raises:
        ConversionError: the array is a tracer, deleted or on several devices, or torch lacks its
            dtype or device.

    Example:
        >>> tensor_to_torch(jnp.arange(2.0))
        tensor([0., 1.])
    """
    check_array(array, name)
    tensor = torch.from_dlpack(array)
    return tensor if share else tensor.clone()


def tree_to_jax(
    tree: Any,
    *,
    share: bool = False,
    int64: Literal["error", "int32"] = "error",
    name: str = "tree",
) -> Any:
    """`tree` with `tensor_to_jax` of each tensor and NumPy array in it.

    JAX arrays, Python numbers and None stay as they are. A tree is what `jax.tree` takes for
    one: dicts, lists, tuples, named tuples and registered classes, in any nesting.

    Raises:
        ConversionError: some leaf cannot cross; the message has its path.

    Example:
        >>> tree_to_jax({"x": torch.ones(2), "steps": 3})
        {'steps': 3, 'x': Array([1., 1.], dtype=float32)}
    """

    def convert(path: Any, leaf: Any) -> Any:
        where = name + jax.tree_util.keystr(path)
        if isinstance(leaf, (np.ndarray, np.generic)):
            leaf = _numpy_to_tensor(leaf, share, where)
        if isinstance(leaf, torch.Tensor):
            return tensor_to_jax(leaf, share=share, int64=int64, name=where)
        return _untouched(leaf, jax.Array, where)

    return jax.tree_util.tree_map_with_path(convert, tree)


def tree_to_torch(tree: Any, *, share: bool = False, name: str = "tree") -> Any:
    """`tree` with `tensor_to_torch` of each JAX array, and a tensor for each NumPy array, in it.

    Tensors, Python numbers and None stay as they are; trees are those of `tree_to_jax`.

    Raises:
        ConversionError: some leaf cannot cross; the message has its path.

    Example:
        >>> tree_to_torch({"x": jnp.ones(2), "steps": 3})
        {'steps': 3, 'x': tensor([1., 1.])}
    """

    def convert(path: Any, leaf: Any) -> Any:
        where = name + jax.tree_util.keystr(path)
        if isinstance(leaf, (np.ndarray, np.generic)):
            return _numpy_to_tensor(leaf, share, where)
        if isinstance(leaf, jax.Array):
            return tensor_to_torch(leaf, share=share, name=where)
        return _untouched(leaf, torch.Tensor, where)

    return jax.tree_util.tree_map_with_path(convert, tree)


def lend(tensor: torch.Tensor) -> np.ndarray[Any, Any] | jax.Array:
    """What a compiled function may read as `tensor`, one that passes `check_tensor`.

    A NumPy view passed straight to a compiled function is the fastest way in: 2 to 5 µs for a
    small tensor, where making a JAX array of it first takes 20 to 40.
    """
    if is_legacy_batchedtensor(tensor):
        raise ConversionError(
            "A tensor is batched by is_grads_batched=True or vectorize=True of torch.autograd, "
            "which show no values to code outside torch: use torch.func.vmap, jacrev or jacfwd."
        )
    return _numpy_view(tensor) if tensor.is_cpu else jnp.from_dlpack(_compact(tensor))


def adopt(arrays: Sequence[jax.Array]) -> tuple[torch.Tensor, ...]:
    """Tensors that take over `arrays`, once computed, from one program and held by nobody else."""
    # Without jit, a result may be a constant that the user holds.
    if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
        return tuple(torch.from_dlpack(array).clone() for array in arrays)
    if arrays and next(iter(arrays[0].devices())).platform != "cpu":
        return tuple(torch.from_dlpack(array) for array in arrays)
    return tuple(
        # Copying a few kilobytes takes less time than __dlpack__ does (3 and 10 µs).
        torch.from_numpy(np.array(array))
        if array.size <= _SMALL and array.dtype.isbuiltin == 1
        # A bare capsule skips the negotiation of streams.
        else torch.from_dlpack(array.__dlpack__())
        for array in arrays
    )


def check_tensor(tensor: torch.Tensor, name: str) -> None:
    """Raise `ConversionError` unless `tensor` has dense values of a dtype that JAX knows."""
    usual = type(tensor) in _PLAIN and tensor.is_cpu and tensor.layout is torch.strided
    if usual and tensor.dtype in TO_JAX and not tensor.is_nested and not is_wrapped(tensor):
        return
    if not isinstance(tensor, torch.Tensor):
        raise ConversionError(
            f"{name} is a {type(tensor).__name__}; expected a torch.Tensor. "
            "For a dict, list or tuple of tensors call tree_to_jax."
        )
    obstacle = _obstacle(tensor) or _foreign_device(tensor.device)
    if obstacle:
        raise ConversionError(f"{name} {obstacle}.")


def check_array(array: jax.Array, name: str) -> None:
    """Raise `ConversionError` unless `array` has values, on one device, of a dtype of torch's."""
    if isinstance(array, Tracer):
        raise ConversionError(
            f"{name} is a tracer, {array.aval}: inside jit, grad or vmap it has no values yet. "
            "Convert outside the transformed function, or bring the torch code into JAX with "
            "from_torch."
        )
    if not isinstance(array, jax.Array):
        raise ConversionError(
            f"{name} is a {type(array).__name__}; expected a jax.Array. "
            "For a dict, list or tuple of arrays call tree_to_torch."
        )
    check_array_dtype(array, name)
    if array.is_deleted():
        raise ConversionError(
            f"{name}, {array.aval}, has been deleted or donated to a compiled function: convert "
            "it before that call, or do not donate it."
        )
    devices = array.sharding.device_set
    if len(devices) > 1:
        raise ConversionError(
            f"{name} lies on {len(devices)} devices and a tensor on one: gather it first with "
            "jax.device_put(array, jax.devices()[0])."
        )
    (device,) = devices
    if device.platform != "cpu" and not (device.platform in _GPUS and torch.cuda.is_available()):
        raise ConversionError(
            f"{name} lies on {device}, which this torch cannot use: move it first with "
            "jax.device_put(array, jax.devices('cpu')[0])."
        )


def check_array_dtype(array: Any, name: str) -> None:
    """Raise `ConversionError` unless torch has the dtype of `array`, which may be a tracer."""
    if array.dtype in TO_TORCH:
        return
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        remedy = "jax.random.key_data gives its numbers"
    else:
        remedy = "convert it with .astype to a dtype that both have"
    raise ConversionError(f"{name} has dtype {array.dtype}, which torch lacks: {remedy}.")


_GPUS = ("cuda", "rocm", "gpu")


def _obstacle(tensor: torch.Tensor) -> str | None:
    """Why JAX cannot read `tensor`, and what to do."""
    kind: Any = type(tensor)
    if is_wrapped(tensor):
        return (
            "is inside torch.func.grad, vmap or another transformation, where it has no values "
            "of its own: convert it outside, or call the JAX function through to_torch"
        )
    if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl and not (
        tensor.is_nested
    ):
        return (
            f"is a {kind.__name__}, a tensor subclass whose values only its own code knows: pass "
            "a plain torch.Tensor with real values"
        )
    if torch.nn.parameter.is_lazy(tensor):
        return f"is a {kind.__name__}: run the lazy module once, so that it has a shape and values"
    if tensor.is_nested:
        return "is nested: make it dense with torch.nested.to_padded_tensor(tensor, 0.0)"
    if tensor.is_meta:
        return (
            "is on the meta device and has no values: make the module real with "
            ".to_empty(device='cpu') and load its weights"
        )
    if tensor.is_quantized:
        return f"is quantized ({tensor.dtype}): pass tensor.dequantize()"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}, and JAX arrays are dense: pass tensor.to_dense()"
    if tensor.dtype not in TO_JAX:
        return f"has dtype {tensor.dtype}, which has no JAX counterpart here: convert it with .to()"
    return None


def _foreign_device(device: torch.device) -> str | None:
    """Why JAX cannot use `device`, and what to do."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"is on {device}, which JAX cannot share with torch: pass tensor.cpu()"
    try:
        jax.devices("gpu")
    except RuntimeError:
        return (
            f"is on {device}, and this JAX has no GPU, only {jax.devices()}: install JAX for "
            "CUDA (pip install 'jax[cuda13]'), or pass tensor.cpu()"
        )
    return None


def _narrowed(
    tensor: torch.Tensor, int64: Literal["error", "int32"], share: bool, name: str
) -> torch.Tensor:
    """`tensor` in a dtype that JAX keeps; an error where that would change what it holds."""
    if int64 not in ("error", "int32"):
        raise ConversionError(f"int64={int64!r}; expected 'error' or 'int32'.")
    dtype = tensor.dtype
    is_int = dtype in (torch.int64, torch.uint64)
    if is_int and int64 == "int32":
        if share:
            raise ConversionError(
                f"{name} is {dtype}: share=True cannot narrow it. Pass one of share and int64."
            )
        return _as_32_bit(tensor, name)
    if dtype in NARROWED and not x64_enabled():
        narrow = str(NARROWED[dtype]).removeprefix("torch.")
        other = f'pass int64="int32" to make it {narrow}' if is_int else f"pass tensor.to({narrow})"
        raise ConversionError(
            f"{name} is {dtype}, and JAX's x64 mode is off, so JAX would make it {narrow}: convert "
            f"and use it inside `with jax.enable_x64(True):`, or {other}."
        )
    return tensor


def _as_32_bit(tensor: torch.Tensor, name: str) -> torch.Tensor:
    narrow = NARROWED[tensor.dtype]
    values = tensor.numpy(force=True)
    limits = np.iinfo(TO_JAX[narrow])
    outside = (values < limits.min) | (values > limits.max)
    if outside.any():
        raise ConversionError(
            f"{name} holds {values[outside][0]}, which {narrow} cannot: convert and use it inside "
            "`with jax.enable_x64(True):`."
        )
    return torch.from_numpy(values.astype(limits.dtype)).to(tensor.device)


def _shared(tensor: torch.Tensor, name: str) -> jax.Array:
    if not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg() or tensor._is_zerotensor():
        raise ConversionError(
            f"{name} is a view that JAX cannot share as it lies in memory (shape "
            f"{tuple(tensor.shape)}, strides {tensor.stride()}): pass a contiguous tensor, or drop "
            "share=True."
        )
    try:
        return jnp.from_dlpack(_compact(tensor), copy=False)
    except ValueError as error:
        raise ConversionError(
            f"{name} starts at an address that XLA cannot use in place, {tensor.data_ptr():#x}, "
            "because it is a view into a larger tensor: pass tensor.clone(), or drop share=True."
        ) from error


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, or a copy of it if its memory does not hold just its values in order."""
    return tensor.detach().as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous()


def _numpy_view(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype in _BITS:
        bits = tensor.detach().resolve_neg().view(_BITS[tensor.dtype])
        return bits.numpy().view(TO_JAX[tensor.dtype])
    return tensor.numpy(force=True)


def _numpy_to_tensor(array: Any, share: bool, name: str) -> torch.Tensor:
    array = np.asarray(array)
    if array.dtype not in TO_TORCH:
        raise ConversionError(
            f"{name} is a NumPy array of dtype {array.dtype}, which is not one of JAX's and "
            "torch's: convert it with .astype first."
        )
    dtype = TO_TORCH[array.dtype]
    if not share:
        array = np.array(array, order="C")
    elif not array.flags.writeable or not array.flags.c_contiguous:
        raise ConversionError(
            f"{name} is a read-only or strided NumPy array, which share=True cannot share: pass "
            "a copy, or drop share=True."
        )
    if dtype in _BITS:
        return torch.from_numpy(array.view(f"i{array.itemsize}")).view(dtype)
    return torch.from_numpy(array)


def _untouched(leaf: Any, kind: type, name: str) -> Any:
    if isinstance(leaf, (kind, bool, int, float, complex)):
        return leaf
    raise ConversionError(
        f"{name} is a {type(leaf).__name__}; expected a tensor, an array, a number or None, in "
        "dicts, lists, tuples or classes registered with jax.tree_util."
    )
