"""Views and rearrangements: the same entries in another shape or order.

What is a view in torch arrives here as a pure operation: the interpreter's arrays share nothing,
and writing to a view has become one of the `*_scatter` operations.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxmeta_bridge.aten.axes import at, axes, axis
from jaxmeta_bridge.aten.registry import decomposes, lowers
from jaxmeta_bridge.errors import UnsupportedOpError

_aten = torch.ops.aten
_Out = jax.ShapeDtypeStruct
_Outs = tuple[jax.ShapeDtypeStruct, ...]


# Same entries in the same order: the shape that torch computed says it all.
@lowers(
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten._reshape_alias.default,
    _aten.unsqueeze.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
)
def _reshape(out: _Out, x: jax.Array, *_: object) -> jax.Array:
    return x.reshape(out.shape)


@lowers(_aten.clone.default, _aten.alias.default)
def _identity(out: _Out, x: jax.Array) -> jax.Array:
    return x


@lowers(_aten.detach.default)
def _detach(out: _Out, x: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(x)


@lowers(_aten.expand.default)
def _expand(out: _Out, x: jax.Array, size: Sequence[int], implicit: bool = False) -> jax.Array:
    return jnp.broadcast_to(x, out.shape)


@lowers(_aten.copy.default)
def _copy(out: _Out, target: jax.Array, source: jax.Array) -> jax.Array:
    return jnp.broadcast_to(source, out.shape)


@lowers(_aten.view.dtype)
def _bitcast(out: _Out, x: jax.Array, dtype: torch.dtype) -> jax.Array:
    """The same bytes as another dtype; the last axis stretches or shrinks with the item size."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    if out.dtype == bool or "c" in (x.dtype.kind, out.dtype.kind):
        raise UnsupportedOpError(
            f"view({dtype}) of a tensor of {x.dtype}: JAX has no bit patterns of bool and complex. "
            "Use torch.view_as_real, torch.view_as_complex or a conversion with .to(dtype)."
        )
    ratio = out.dtype.itemsize // x.dtype.itemsize
    if ratio > 1:
        x = x.reshape((*x.shape[:-1], x.shape[-1] // ratio, ratio))
    return jax.lax.bitcast_convert_type(x, out.dtype).reshape(out.shape)


# Order of the axes.


@lowers(_aten.permute.default)
def _permute(out: _Out, x: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.transpose(x, dims)


@lowers(_aten.transpose.int)
def _transpose(out: _Out, x: jax.Array, dim0: int, dim1: int) -> jax.Array:
    return jnp.swapaxes(x, dim0, dim1) if x.ndim else x


@lowers(_aten.t.default)
def _t(out: _Out, x: jax.Array) -> jax.Array:
    return x.T


# Order along an axis.


@lowers(_aten.flip.default)
def _flip(out: _Out, x: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.flip(x, axes(dims, x)) if dims else x


@lowers(_aten.roll.default)
def _roll(out: _Out, x: jax.Array, shifts: Sequence[int], dims: Sequence[int] = ()) -> jax.Array:
    if x.ndim == 0 or x.size == 0:
        return x
    return jnp.roll(x, tuple(shifts), tuple(dims)) if dims else jnp.roll(x, shifts[0])


# Joining and repeating.


@lowers(_aten.cat.default)
def _cat(out: _Out, tensors: Sequence[jax.Array], dim: int = 0) -> jax.Array:
    """1-d tensors without entries are skipped whatever the shape of the others."""
    joined = [x.astype(out.dtype) for x in tensors if x.shape != (0,) or len(out.shape) == 1]
    return jnp.concatenate(joined, dim) if joined else jnp.zeros(out.shape, out.dtype)


@lowers(_aten.stack.default)
def _stack(out: _Out, tensors: Sequence[jax.Array], dim: int = 0) -> jax.Array:
    return jnp.stack([x.astype(out.dtype) for x in tensors], dim)


@lowers(_aten.repeat.default)
def _repeat(out: _Out, x: jax.Array, repeats: Sequence[int]) -> jax.Array:
    return jnp.tile(x, tuple(repeats)).reshape(out.shape)


@lowers(_aten.repeat_interleave.Tensor)
def _repeat_interleave(out: _Out, repeats: jax.Array, output_size: int | None = None) -> jax.Array:
    """The index of each of the repeated entries; torch has checked that `output_size` is given."""
    return jnp.repeat(jnp.arange(repeats.size), repeats, total_repeat_length=out.shape[0])


@lowers(_aten.constant_pad_nd.default)
def _constant_pad(out: _Out, x: jax.Array, pad: Sequence[int], value: complex = 0) -> jax.Array:
    """`pad` has pairs from the last axis on; a negative one cuts off."""
    pairs = [(low, high, 0) for low, high in zip(pad[::2], pad[1::2], strict=True)]
    config = [(0, 0, 0)] * (x.ndim - len(pairs)) + pairs[::-1]
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), config)


# Taking apart.


@lowers(
    _aten.split.Tensor,
    _aten.split_with_sizes.default,
    _aten.unsafe_split.Tensor,
    _aten.unsafe_split_with_sizes.default,
)
def _split(out: _Outs, x: jax.Array, size: object, dim: int = 0) -> list[jax.Array]:
    sizes = [part.shape[dim] for part in out]
    return jnp.split(x, np.cumsum(sizes)[:-1], dim)


@lowers(_aten.unbind.int)
def _unbind(out: _Outs, x: jax.Array, dim: int = 0) -> list[jax.Array]:
    return [jax.lax.index_in_dim(x, i, axis(dim, x), keepdims=False) for i in range(len(out))]


@lowers(_aten.slice.Tensor)
def _slice(
    out: _Out,
    x: jax.Array,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> jax.Array:
    return x[at(axis(dim, x), slice(start, end, step))]


@lowers(_aten.select.int)
def _select(out: _Out, x: jax.Array, dim: int, index: int) -> jax.Array:
    return jax.lax.index_in_dim(x, index, axis(dim, x), keepdims=False)


@lowers(_aten.unfold.default)
def _unfold(out: _Out, x: jax.Array, dim: int, size: int, step: int) -> jax.Array:
    """Windows along an axis, their entries along a new last one."""
    x = jnp.atleast_1d(x)
    along, count = axis(dim, x), out.shape[dim] if out.shape[:-1] else 1
    if size == step:  # windows side by side, as in cutting an image into patches
        x = jax.lax.slice_in_dim(x, 0, count * size, axis=along)
        windows = x.reshape((*x.shape[:along], count, size, *x.shape[along + 1 :]))
    else:
        index = step * np.arange(count)[:, None] + np.arange(size)
        windows = x[at(along, index)]
    return jnp.moveaxis(windows, along + 1, -1).reshape(out.shape)


@lowers(_aten.diagonal.default)
def _diagonal(out: _Out, x: jax.Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> jax.Array:
    return jnp.diagonal(x, offset, dim1, dim2)


@lowers(_aten.tril.default)
def _tril(out: _Out, x: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.tril(x, diagonal)


@lowers(_aten.triu.default)
def _triu(out: _Out, x: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.triu(x, diagonal)


# Writing to what would be a view of `x`.


@lowers(_aten.slice_scatter.default)
def _slice_scatter(
    out: _Out,
    x: jax.Array,
    source: jax.Array,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> jax.Array:
    along = axis(dim, x)
    begin, stop, _ = slice(start, end, step).indices(x.shape[along])
    source = source.astype(out.dtype)
    if step == 1:
        source = source if begin < stop else jax.lax.slice_in_dim(source, 0, 0, axis=along)
        return jax.lax.dynamic_update_slice_in_dim(x, source, begin, along)
    return x.at[at(along, slice(begin, stop, step))].set(source)


@lowers(_aten.select_scatter.default)
def _select_scatter(out: _Out, x: jax.Array, source: jax.Array, dim: int, index: int) -> jax.Array:
    along = axis(dim, x)
    source = jnp.broadcast_to(source, (*x.shape[:along], *x.shape[along + 1 :]))
    source = source.astype(out.dtype)
    return jax.lax.dynamic_update_index_in_dim(x, source, index % x.shape[along], along)


@lowers(_aten.diagonal_scatter.default)
def _diagonal_scatter(
    out: _Out, x: jax.Array, source: jax.Array, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> jax.Array:
    matrices = jnp.moveaxis(x, (dim1, dim2), (-2, -1))
    rows = np.arange(source.shape[-1]) + max(-offset, 0)
    columns = np.arange(source.shape[-1]) + max(offset, 0)
    written = matrices.at[..., rows, columns].set(source.astype(out.dtype), unique_indices=True)
    return jnp.moveaxis(written, (-2, -1), (dim1, dim2))


@lowers(_aten.diag_embed.default)
def _diag_embed(
    out: _Out, x: jax.Array, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> jax.Array:
    return _diagonal_scatter(out, jnp.zeros(out.shape, out.dtype), x, offset, dim1, dim2)


# `as_strided` reads and writes the memory behind a tensor. Only here, where torch's own tensor is
# at hand, is it known whether that memory is just the tensor; the interpreter's arrays have none.


@decomposes(_aten.as_strided.default)
def _as_strided(
    x: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> torch.Tensor:
    return torch.take(x, _positions(x, size, stride, offset))


@decomposes(_aten.as_strided_scatter.default)
def _as_strided_scatter(
    x: torch.Tensor,
    source: torch.Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int | None = None,
) -> torch.Tensor:
    return torch.put(x, _positions(x, size, stride, offset), source)


def _positions(
    x: torch.Tensor, size: Sequence[int], stride: Sequence[int], offset: int | None
) -> torch.Tensor:
    """The flat position in `x` of each entry of the strided view."""
    if not x.is_contiguous() or x.untyped_storage().nbytes() != x.numel() * x.element_size():
        raise UnsupportedOpError(
            f"as_strided of a view (shape {tuple(x.shape)}, strides {x.stride()}, offset "
            f"{x.storage_offset()}) reads memory outside it. Call .clone() on the tensor first, or "
            "write the view with unfold, slicing and permute."
        )
    position = torch.full([], offset or 0, dtype=torch.int64)
    for length, step in zip(size, stride, strict=True):
        position = position.unsqueeze(-1) + step * torch.arange(length)
    return position
