"""Convolution, transposed or not, in any number of dimensions."""

from collections.abc import Sequence
from typing import Any

import jax
import torch

from jaxmeta_bridge.aten.registry import lowers
from jaxmeta_bridge.lowering.conv import convolution

aten: Any = torch.ops.aten


@lowers(aten.convolution.default)
def _convolution(
    out: jax.ShapeDtypeStruct,
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> jax.Array:
    def per_axis(numbers: Sequence[int]) -> Sequence[int]:  # one number stands for all axes
        return [*numbers] * (x.ndim - 2) if len(numbers) == 1 else numbers

    return convolution(
        x,
        weight,
        bias,
        per_axis(stride),
        per_axis(padding),
        per_axis(dilation),
        transposed,
        per_axis(output_padding),
        groups,
    )
