"""Convolution: matrix products over patches where XLA's own is slow, else XLA's own.

XLA's CPU convolution is slow where weights differ by example (`vmap` over tasks makes it a grouped
convolution) and in its second derivatives. `benchmarks/convolution.py` measures both.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxmeta_bridge.lowering.windows import Windows

# Beyond that many kernel positions, patches are too large a copy of the image.
_MOST_TAPS = 64


def convolution(
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
    """y[n, o, i] = bias[o] + sum over c and k of weight[o, c, k] x[n, c, s i + d k - p].

    Args:
      x: (N, C, *spatial), one to three spatial axes.
      weight: (O, C / groups, *kernel); transposed: (C, O / groups, *kernel).
      bias: (O,) or None.
      stride: s, one number for each spatial axis.
      padding: p, likewise.
      dilation: d, likewise.
      transposed: compute the transpose in x of the convolution with these numbers.
      output_padding: rows added at the end of a transposed convolution's output.
      groups: how many blocks of channels do not mix.
    """
    if transposed:
        y = _transposed(x, weight, stride, padding, dilation, output_padding, groups)
    else:
        size, kernel = x.shape[2:], weight.shape[2:]
        windows = Windows(size, kernel, (*stride,), (*padding,), (*dilation,))
        y = _direct(windows, groups, x, weight)
    if bias is not None:
        y = y + bias.reshape(1, -1, *[1] * (y.ndim - 2))
    return y


def _transposed(
    x: jax.Array,
    weight: jax.Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> jax.Array:
    """The linear transpose, in its input, of the convolution from the output's shape to x's."""
    axes = zip(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True
    )
    size = tuple((i - 1) * s - 2 * p + d * (k - 1) + o + 1 for i, k, s, p, d, o in axes)
    windows = Windows(size, weight.shape[2:], (*stride,), (*padding,), (*dilation,))
    output = jax.ShapeDtypeStruct((x.shape[0], weight.shape[1] * groups, *size), x.dtype)
    # An output padding of a whole stride lets further windows fit in, which x has nothing for.
    missing = [(0, full - i) for full, i in zip(windows.output, x.shape[2:], strict=True)]
    x = jnp.pad(x, [(0, 0), (0, 0), *missing])
    (y,) = jax.linear_transpose(lambda y: _direct(windows, groups, y, weight), output)(x)
    return y


def _direct(windows: Windows, groups: int, x: jax.Array, weight: jax.Array) -> jax.Array:
    own = functools.partial(_by_patches, windows, groups)
    xla = functools.partial(_by_xla, windows, groups)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):  # XLA has no complex convolution
        return own(x, weight)
    if math.prod(windows.kernel) > _MOST_TAPS:
        return xla(x, weight)
    # Without checkpoint the patches, as large as all taps together, would be kept for the reverse
    # pass, and so would the residuals of the branch that is not taken.
    by_platform = functools.partial(lax.platform_dependent, cpu=own, default=xla)
    return jax.checkpoint(by_platform)(x, weight)


def _by_xla(windows: Windows, groups: int, x: jax.Array, weight: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        weight,
        windows.stride,
        [(p, p) for p in windows.padding],
        rhs_dilation=windows.dilation,
        feature_group_count=groups,
    )


def _by_patches(windows: Windows, groups: int, x: jax.Array, weight: jax.Array) -> jax.Array:
    n, outputs = x.shape[0], weight.shape[0]
    # Half precision is summed in float32, in the transpose as well, which adds up the taps.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    taps = list(windows.taps(x.astype(wide), 0))
    patches = jnp.stack(taps, 2) if len(taps) > 1 else taps[0]
    patches = patches.reshape(n, groups, weight.shape[1] * len(taps), -1)
    kernels = weight.astype(wide).reshape(groups, outputs // groups, -1)
    y = jnp.einsum("ngkl,gok->ngol", patches, kernels)
    return y.reshape(n, outputs, *windows.output).astype(x.dtype)
