"""Vector norms and distances made of them.

The derivative of a norm is 0 where it does not exist: at the zero vector, and for p < 2 where an
entry is zero.
"""

import math

import jax
import jax.numpy as jnp
import torch

from jaxmeta_bridge.aten.axes import Dims, axes, axis
from jaxmeta_bridge.aten.operands import absolute, working_dtype
from jaxmeta_bridge.aten.reductions import square_root
from jaxmeta_bridge.aten.registry import lowers
from jaxmeta_bridge.aten.ties import shared

_aten = torch.ops.aten
_Out = jax.ShapeDtypeStruct


def _norm(x: jax.Array, p: float, over: tuple[int, ...]) -> jax.Array:
    """The p-norm of a float or complex array along the axes `over`."""
    if p == 2:
        squares = jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)
        return square_root(jnp.sum(squares, over))
    if p == 0:
        return jnp.sum(x != 0, over).astype(x.real.dtype)
    size = absolute(x)
    if math.isinf(p):
        value = jnp.max(size, over, initial=0) if p > 0 else jnp.min(size, over)
        return shared(value, size, over, nan_shares=True)
    if p == 1:
        return jnp.sum(size, over)
    absent = size == 0
    powers = jnp.where(absent, 0 if p > 0 else jnp.inf, jnp.where(absent, 1, size) ** p)
    total = jnp.sum(powers, over)
    absent = total == (0 if p > 0 else jnp.inf)
    return jnp.where(absent, 0, jnp.where(absent, 1, total) ** (1 / p))


@lowers(_aten.linalg_vector_norm.default)
def _vector_norm(
    out: _Out, x: jax.Array, p: float = 2, dim: Dims = None, keepdim: bool = False
) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, working_dtype(out.dtype))
    return _norm(x.astype(dtype), p, axes(dim, x)).reshape(out.shape)


@lowers(
    _aten.norm.Scalar,
    _aten.norm.ScalarOpt_dtype,
    _aten.norm.ScalarOpt_dim,
    _aten.norm.ScalarOpt_dim_dtype,
)
def _legacy_norm(
    out: _Out, x: jax.Array, p: float | None = None, dim: Dims = None, keepdim: bool = False
) -> jax.Array:
    return _vector_norm(out, x, 2 if p is None else p, dim)


@lowers(_aten.dist.default)
def _dist(out: _Out, x: jax.Array, y: jax.Array, p: float = 2) -> jax.Array:
    return _vector_norm(out, x - y, p)


@lowers(_aten.renorm.default)
def _renorm(out: _Out, x: jax.Array, p: float, dim: int, maxnorm: float) -> jax.Array:
    """Slices along `dim` of larger norm are scaled down to `maxnorm`."""
    others = tuple(a for a in range(x.ndim) if a != axis(dim, x))
    size = jnp.expand_dims(_norm(x.astype(working_dtype(x.dtype)), p, others), others)
    return x * jnp.where(size > maxnorm, maxnorm / (size + 1e-7), 1)
