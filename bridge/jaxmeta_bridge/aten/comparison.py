"""Comparisons, logic, bits, and choice between two values (`where`, `clamp`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import common, operands
from jaxmeta_bridge.aten.registry import lowers

_aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct

_COMPARISONS: dict[Any, Callable[[jax.Array, jax.Array], jax.Array]] = {
    _aten.eq: jnp.equal,
    _aten.ge: jnp.greater_equal,
    _aten.gt: jnp.greater,
    _aten.le: jnp.less_equal,
    _aten.lt: jnp.less,
    _aten.ne: jnp.not_equal,
}

_LOGIC: dict[Any, Callable[[jax.Array, jax.Array], jax.Array]] = {
    _aten.logical_and: jnp.logical_and,
    _aten.logical_or: jnp.logical_or,
    _aten.logical_xor: jnp.logical_xor,
}

_BITWISE: dict[Any, Callable[[jax.Array, jax.Array], jax.Array]] = {
    _aten.bitwise_and: jnp.bitwise_and,
    _aten.bitwise_or: jnp.bitwise_or,
    _aten.bitwise_xor: jnp.bitwise_xor,
}


def _lower_comparison(
    function: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[..., jax.Array]:
    def lowering(out: _Out, x: jax.Array, y: Any) -> jax.Array:
        return function(*common(x, y))

    return lowering


def _lower_logic(
    function: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[..., jax.Array]:
    def lowering(out: _Out, x: jax.Array, y: jax.Array) -> jax.Array:
        return function(x, y)

    return lowering


def _lower_bitwise(
    function: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[..., jax.Array]:
    def lowering(out: _Out, x: Any, y: Any) -> jax.Array:
        return function(*operands(out, x, y))

    return lowering


for _op, _function in _COMPARISONS.items():
    lowers(_op.Tensor, _op.Scalar)(_lower_comparison(_function))
for _op, _function in _LOGIC.items():
    lowers(_op.default)(_lower_logic(_function))
for _op, _function in _BITWISE.items():
    lowers(_op.Tensor, _op.Scalar, _op.Scalar_Tensor)(_lower_bitwise(_function))


@lowers(
    _aten.__lshift__.Scalar,
    _aten.__lshift__.Tensor,
    _aten.bitwise_left_shift.Scalar_Tensor,
    _aten.bitwise_left_shift.Tensor,
    _aten.bitwise_left_shift.Tensor_Scalar,
)
def _left_shift(out: _Out, x: Any, y: Any) -> jax.Array:
    x, y = jnp.broadcast_arrays(*operands(out, x, y))
    return jnp.where(_in_range(y), jnp.left_shift(x, y), 0)


@lowers(
    _aten.__rshift__.Scalar,
    _aten.__rshift__.Tensor,
    _aten.bitwise_right_shift.Scalar_Tensor,
    _aten.bitwise_right_shift.Tensor,
    _aten.bitwise_right_shift.Tensor_Scalar,
)
def _right_shift(out: _Out, x: Any, y: Any) -> jax.Array:
    x, y = jnp.broadcast_arrays(*operands(out, x, y))
    return jnp.where(_in_range(y), jnp.right_shift(x, y), jnp.where(x < 0, -1, 0).astype(x.dtype))


def _in_range(shift: jax.Array) -> jax.Array:
    """Where a shift is smaller than the number of bits; torch shifts all bits out beyond."""
    return (shift >= 0) & (shift < jnp.iinfo(shift.dtype).bits)


@lowers(_aten.isclose.default)
def _isclose(
    out: _Out, x: Any, y: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> jax.Array:
    x, y = common(x, y)
    return jnp.isclose(x, y, rtol, atol, equal_nan)


@lowers(_aten.where.self)
def _where(out: _Out, condition: jax.Array, x: Any, y: Any) -> jax.Array:
    return jnp.where(condition.astype(jnp.bool_), *operands(out, x, y))


@lowers(_aten.clamp.default, _aten.clamp.Tensor)
def _clamp(out: _Out, x: Any, lower: Any = None, upper: Any = None) -> jax.Array:
    if isinstance(lower, jax.Array) and upper is not None:
        # Where the lower bound is not below the upper one, the upper one counts alone.
        lower, upper = operands(out, lower, upper)
        lower = jnp.where(lower < upper, lower, lax.stop_gradient(lower))
    if lower is not None:
        x = _clamp_min(out, x, lower)
    return x if upper is None else _clamp_max(out, x, upper)


# By `where`: a value at its bound passes the gradient.
@lowers(_aten.clamp_min.default, _aten.clamp_min.Tensor)
def _clamp_min(out: _Out, x: Any, lower: Any) -> jax.Array:
    x, bound = operands(out, x, lower)
    return jnp.where((x < bound) | _is_nan(lower), bound, x)


@lowers(_aten.clamp_max.default, _aten.clamp_max.Tensor)
def _clamp_max(out: _Out, x: Any, upper: Any) -> jax.Array:
    x, bound = operands(out, x, upper)
    return jnp.where((x > bound) | _is_nan(upper), bound, x)


def _is_nan(bound: Any) -> Any:
    return jnp.isnan(bound) if isinstance(bound, jax.Array) else bound != bound
