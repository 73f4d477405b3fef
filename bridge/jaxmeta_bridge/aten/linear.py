"""Products of vectors and matrices, and what is added to them."""

import string
from typing import Any

import jax
import jax.numpy as jnp
import torch

from jaxmeta_bridge.aten.operands import working_dtype
from jaxmeta_bridge.aten.registry import lowers

aten: Any = torch.ops.aten


@lowers(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _product(out: jax.ShapeDtypeStruct, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=working_dtype(out.dtype))


@lowers(aten.vdot.default)
def _conjugate_product(out: jax.ShapeDtypeStruct, a: jax.Array, b: jax.Array) -> jax.Array:
    return _product(out, jnp.conj(a), b)


@lowers(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def _product_plus(
    out: jax.ShapeDtypeStruct,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    beta: complex = 1,
    alpha: complex = 1,
) -> jax.Array:
    return _weighted_sum(x, _product(out, a, b), beta, alpha)


@lowers(aten.addbmm.default)
def _summed_products_plus(
    out: jax.ShapeDtypeStruct,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    beta: complex = 1,
    alpha: complex = 1,
) -> jax.Array:
    product = jnp.einsum("bij,bjk->ik", a, b, preferred_element_type=working_dtype(out.dtype))
    return _weighted_sum(x, product, beta, alpha)


@lowers(aten.addr.default)
def _outer_product_plus(
    out: jax.ShapeDtypeStruct,
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    *,
    beta: complex = 1,
    alpha: complex = 1,
) -> jax.Array:
    a, b = (value.astype(working_dtype(out.dtype)) for value in (a, b))
    return _weighted_sum(x, a[:, None] * b[None, :], beta, alpha)


def _weighted_sum(x: jax.Array, product: jax.Array, beta: complex, alpha: complex) -> jax.Array:
    """`beta * x + alpha * product` in the dtype of the product, which is not yet rounded."""
    if alpha != 1:
        product = product * jnp.asarray(alpha, product.dtype)
    if beta == 0:  # as in torch, what is not finite in x plays no part then
        return product
    x = x.astype(product.dtype)
    return product + (x if beta == 1 else x * jnp.asarray(beta, product.dtype))


@lowers(aten._trilinear.default)
def _trilinear(
    out: jax.ShapeDtypeStruct,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    expand_a: list[int],
    expand_b: list[int],
    expand_c: list[int],
    summed: list[int],
    unroll_dim: int = 1,
) -> jax.Array:
    """The product of three tensors that lack some of the common dimensions, summed over others."""
    letters = string.ascii_letters[: a.ndim + len(expand_a)]

    def without(dims: list[int]) -> str:
        return "".join(letter for i, letter in enumerate(letters) if i not in dims)

    equation = f"{without(expand_a)},{without(expand_b)},{without(expand_c)}->{without(summed)}"
    return jnp.einsum(equation, a, b, c, preferred_element_type=working_dtype(out.dtype))
