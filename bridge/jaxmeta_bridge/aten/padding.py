"""Padding with reflected or repeated entries."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch

from jaxmeta_bridge.aten.registry import lowers

aten: Any = torch.ops.aten


def _pad(mode: str) -> Callable[..., jax.Array]:
    def lowering(out: jax.ShapeDtypeStruct, x: jax.Array, padding: Sequence[int]) -> jax.Array:
        pairs = list(zip(padding[::2], padding[1::2], strict=True))[::-1]  # the last axis is first
        axes = range(x.ndim - len(pairs), x.ndim)
        # A negative width takes entries away, from what was padded on the other side.
        widths = [(0, 0)] * axes.start + [(max(a, 0), max(b, 0)) for a, b in pairs]
        x = jnp.pad(x, widths, mode=mode)
        for axis, (before, _) in zip(axes, pairs, strict=True):
            start = max(-before, 0)
            x = jax.lax.slice_in_dim(x, start, start + out.shape[axis], axis=axis)
        return x

    return lowering


lowers(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)(
    _pad("reflect")
)
lowers(
    aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default
)(_pad("edge"))
