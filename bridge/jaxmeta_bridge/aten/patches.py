"""Sliding patches of images as columns (unfold), and columns added up to images (fold)."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch

from jaxmeta_bridge.aten.registry import lowers

aten: Any = torch.ops.aten


@lowers(aten.im2col.default)
def _unfold(
    out: jax.ShapeDtypeStruct,
    x: jax.Array,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> jax.Array:
    return _columns(x, kernel_size, dilation, padding, stride).reshape(out.shape)


@lowers(aten.col2im.default)
def _fold(
    out: jax.ShapeDtypeStruct,
    columns: jax.Array,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> jax.Array:
    """The transpose of unfolding."""

    def unfold(image: jax.Array) -> jax.Array:
        return _columns(image, kernel_size, dilation, padding, stride).reshape(columns.shape)

    (image,) = jax.linear_transpose(unfold, out)(columns)
    return image


def _columns(
    x: jax.Array,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> jax.Array:
    """One strided slice of the padded image for each entry of the kernel: "... C k H W"."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(width, width) for width in padding])
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, d, s in zip(x.shape[-2:], kernel_size, dilation, stride, strict=True)
    ]
    slices = [
        x[
            ...,
            row * dilation[0] : row * dilation[0] + (counts[0] - 1) * stride[0] + 1 : stride[0],
            column * dilation[1] : column * dilation[1] + (counts[1] - 1) * stride[1] + 1 : stride[
                1
            ],
        ]
        for row, column in itertools.product(range(kernel_size[0]), range(kernel_size[1]))
    ]
    return jnp.stack(slices, axis=-3)
