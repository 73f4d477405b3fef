"""Factorisations, inverses and functions of matrices.

Where torch raises for a singular or indefinite matrix, compiled JAX cannot: the result is not
finite. Factors that torch returns beside the result for its own gradients are left out.
"""

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.registry import lowers

aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct
_Outs = tuple[_Out, ...]


def _adjoint(a: jax.Array) -> jax.Array:
    return jnp.conj(jnp.swapaxes(a, -1, -2))


def _transpose(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, -1, -2)


def _from_triangle(a: jax.Array, upper: bool) -> jax.Array:
    """The hermitian matrix of which `a` holds one triangle."""
    triangle, strict = (jnp.triu(a), jnp.triu(a, 1)) if upper else (jnp.tril(a), jnp.tril(a, -1))
    return triangle + _adjoint(strict)


def _with_gradient_of(value: jax.Array, a: jax.Array) -> jax.Array:
    """`value`, differentiated as if it were `a`; exact where the two are equal."""
    return a + lax.stop_gradient(value - a)


def _symmetric(a: jax.Array, upper: bool) -> jax.Array:
    """What torch reads where it expects a symmetric matrix: one triangle.

    The gradient is that of the symmetric part of the whole, so that steps keep symmetry.
    """
    return _with_gradient_of(_from_triangle(a, upper), (a + _adjoint(a)) / 2)


# Cholesky factors.


@lowers(aten.cholesky.default)
def _cholesky(out: _Out, a: jax.Array, upper: bool = False) -> jax.Array:
    factor = jnp.linalg.cholesky(_symmetric(a, upper), symmetrize_input=False)
    return _adjoint(factor) if upper else factor


@lowers(aten.linalg_cholesky_ex.default)
def _cholesky_ex(
    out: _Outs, a: jax.Array, *, upper: bool = False, check_errors: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The second result is not 0 where the matrix is not positive definite."""
    factor = _cholesky(out[0], a, upper)
    return factor, jnp.isnan(jnp.real(factor)).any((-1, -2))


@lowers(aten.cholesky_solve.default)
def _cholesky_solve(out: _Out, b: jax.Array, factor: jax.Array, upper: bool = False) -> jax.Array:
    """Reads one triangle of the factor; the gradient is, as in torch, that by the whole."""
    factor = _adjoint(factor) if upper else factor

    def solve(_: Any, b: jax.Array) -> jax.Array:
        return _triangular(_triangular(b, factor, lower=True), factor, lower=True, adjoint=True)

    return lax.custom_linear_solve(
        lambda x: factor @ (_adjoint(factor) @ x),
        jnp.broadcast_to(b, out.shape),
        solve,
        lambda _, b: jnp.conj(solve(_, jnp.conj(b))),
    )


@lowers(aten.cholesky_inverse.default)
def _cholesky_inverse(out: _Out, factor: jax.Array, upper: bool = False) -> jax.Array:
    return _cholesky_solve(out, jnp.eye(factor.shape[-1], dtype=factor.dtype), factor, upper)


# Linear systems.


def _triangular(
    b: jax.Array,
    a: jax.Array,
    *,
    lower: bool,
    left: bool = True,
    adjoint: bool = False,
    transpose: bool = False,
    unit: bool = False,
) -> jax.Array:
    """Solves `op(a) x = b`, or `x op(a) = b`, with broadcast leading dimensions."""
    batch = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return lax.linalg.triangular_solve(
        jnp.broadcast_to(a, batch + a.shape[-2:]),
        jnp.broadcast_to(b, batch + b.shape[-2:]),
        left_side=left,
        lower=lower,
        transpose_a=adjoint or transpose,
        conjugate_a=adjoint,
        unit_diagonal=unit,
    )


@lowers(aten.linalg_solve_triangular.default)
def _solve_triangular(
    out: _Out,
    a: jax.Array,
    b: jax.Array,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> jax.Array:
    return _triangular(b, a, lower=not upper, left=left, unit=unitriangular)


@lowers(aten.triangular_solve.default)
def _triangular_solve(
    out: _Outs,
    b: jax.Array,
    a: jax.Array,
    upper: bool = True,
    transpose: bool = False,
    unitriangular: bool = False,
) -> tuple[jax.Array, jax.Array]:
    solution = _triangular(b, a, lower=not upper, transpose=transpose, unit=unitriangular)
    return solution, jnp.broadcast_to(a, out[1].shape)


@lowers(aten._linalg_solve_ex.default)
def _solve(
    out: _Outs, a: jax.Array, b: jax.Array, *, left: bool = True, check_errors: bool = False
) -> tuple[jax.Array, None, None, jax.Array]:
    vectors = b.ndim == 1 or b.shape == a.shape[:-1]
    b = b[..., None] if vectors else b
    if left:
        x = jnp.linalg.solve(a, b)
    else:
        x = _transpose(jnp.linalg.solve(_transpose(a), _transpose(b)))
    return (x[..., 0] if vectors else x), None, None, _is_singular(a)


@lowers(aten.linalg_inv_ex.default)
def _inverse(
    out: _Outs, a: jax.Array, *, check_errors: bool = False
) -> tuple[jax.Array, jax.Array]:
    return jnp.linalg.inv(a), _is_singular(a)


def _is_singular(a: jax.Array) -> jax.Array:
    """What torch calls info: any number but 0 is failure."""
    lu, _, _ = lax.linalg.lu(lax.stop_gradient(a))
    return jnp.any(jnp.diagonal(lu, axis1=-2, axis2=-1) == 0, -1)


@lowers(aten._linalg_det.default)
def _determinant(out: _Outs, a: jax.Array) -> tuple[jax.Array, None, None]:
    determinant = jnp.linalg.det(a) if a.size else jnp.ones(out[0].shape)
    return determinant, None, None


@lowers(aten._linalg_slogdet.default)
def _log_determinant(out: _Outs, a: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    sign, logarithm = jnp.linalg.slogdet(a)
    return sign, logarithm, None, None


@lowers(aten.linalg_pinv.atol_rtol_tensor)
def _pseudo_inverse(
    out: _Out,
    a: jax.Array,
    *,
    atol: jax.Array | None = None,
    rtol: jax.Array | None = None,
    hermitian: bool = False,
) -> jax.Array:
    if rtol is None:
        epsilon = jnp.finfo(a.dtype).eps * max(a.shape[-2:])
        rtol = jnp.where(0 if atol is None else atol > 0, 0, epsilon)
    atol = jnp.zeros(()) if atol is None else atol
    a = _with_gradient_of(_from_triangle(a, upper=False), a) if hermitian else a
    return _pinv(a, atol, rtol)


@jax.custom_jvp
def _pinv(a: jax.Array, atol: jax.Array, rtol: jax.Array) -> jax.Array:
    u, s, v = jnp.linalg.svd(a, full_matrices=False)
    cutoff = jnp.maximum(atol, rtol * jnp.max(s, -1, initial=0))[..., None]
    kept = s > cutoff
    inverse = jnp.where(kept, 1 / jnp.where(kept, s, 1), 0)
    return _adjoint(v) @ (inverse[..., None] * _adjoint(u))


@_pinv.defjvp
def _pinv_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Golub and Pereyra (1973): in terms of the result, hence safe with equal singular values."""
    a, da = primals[0], tangents[0]
    p = _pinv(*primals)
    ph, dah = _adjoint(p), _adjoint(da)
    rows, columns = dah - dah @ a @ p, dah - p @ a @ dah
    return p, -p @ da @ p + p @ ph @ rows + columns @ ph @ p


# Factorisations by orthogonal matrices.


@lowers(aten.linalg_qr.default)
def _qr(out: _Outs, a: jax.Array, mode: str = "reduced") -> tuple[jax.Array, jax.Array]:
    rows, columns = a.shape[-2:]
    if rows < columns:  # JAX has no derivative of this shape; its first columns decide
        q, r = jnp.linalg.qr(a[..., :rows])
        r = jnp.concatenate([r, _adjoint(q) @ a[..., rows:]], -1)
    else:
        q, r = jnp.linalg.qr(a, mode="complete" if mode == "complete" else "reduced")
    return jnp.zeros(out[0].shape, a.dtype) if mode == "r" else q, r


@lowers(aten.linalg_householder_product.default)
def _householder_product(out: _Out, a: jax.Array, tau: jax.Array) -> jax.Array:
    rows, columns = a.shape[-2:]
    count = tau.shape[-1]
    identity = jnp.eye(rows, dtype=a.dtype)
    vectors = jnp.tril(a, -1) + identity[:, :columns]

    def reflect(q: jax.Array, reflection: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        v, factor = reflection[0][..., :, None], reflection[1][..., None, None]
        return q - factor * v @ (_adjoint(v) @ q), None

    reflections = (jnp.moveaxis(vectors, -1, 0)[:count], jnp.moveaxis(tau, -1, 0))
    start = jnp.broadcast_to(identity[:, :columns], a.shape)
    return lax.scan(reflect, start, reflections, reverse=True)[0]


@lowers(aten._linalg_svd.default)
def _svd(
    out: _Outs,
    a: jax.Array,
    full_matrices: bool = False,
    compute_uv: bool = True,
    *,
    driver: str | None = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array | None]:
    if not compute_uv:
        return None, jnp.linalg.svd(a, compute_uv=False), None
    u, s, vh = jnp.linalg.svd(a, full_matrices=False)
    count = s.shape[-1]
    if full_matrices and a.shape[-2] != a.shape[-1]:
        # As in torch, the vectors that complete the basis have no derivative.
        whole_u, _, whole_vh = jnp.linalg.svd(lax.stop_gradient(a), full_matrices=True)
        u = jnp.concatenate([u, whole_u[..., count:]], -1)
        vh = jnp.concatenate([vh, whole_vh[..., count:, :]], -2)
    return u, s, vh


@lowers(aten._linalg_eigh.default)
def _eigh(
    out: _Outs, a: jax.Array, UPLO: str = "L", compute_v: bool = True
) -> tuple[jax.Array, jax.Array | None]:
    a = _symmetric(a, upper=UPLO.upper() == "U")
    vectors, values = lax.linalg.eigh(a, symmetrize_input=False)
    return values, vectors if compute_v else None


@lowers(aten.linalg_matrix_exp.default)
def _matrix_exponential(out: _Out, a: jax.Array) -> jax.Array:
    return jax.scipy.linalg.expm(a)
