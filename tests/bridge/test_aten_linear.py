"""Products, matrix functions and distances against torch; where torch has no second derivative,
against finite differences."""

import jax
import numpy as np
import pytest
import torch
from jax.test_util import check_grads
from support import check, run_in_jax, to_array

from jaxmeta_bridge import from_torch


def _x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _positive(*shape: int) -> torch.Tensor:
    x = _x(*shape)
    return x @ x.mT + torch.eye(shape[-1])


_PRODUCTS = {
    "mm": (torch.mm, _x(2, 3), _x(3, 4)),
    "bmm": (torch.bmm, _x(2, 2, 3), _x(2, 3, 4)),
    "mv": (torch.mv, _x(2, 3), _x(3)),
    "dot": (torch.dot, _x(3), _x(3, seed=1)),
    "vdot": (torch.vdot, torch.complex(_x(3), _x(3, seed=1)), torch.complex(_x(3), _x(3))),
    "matmul_broadcast": (torch.matmul, _x(2, 1, 2, 3), _x(4, 3, 2)),
    "einsum": (lambda a, b: torch.einsum("bij,bkj,k->ib", a, a, b), _x(2, 3, 4), _x(3)),
    "outer": (torch.outer, _x(2), _x(3)),
    "inner": (torch.inner, _x(2, 3), _x(4, 3)),
    "kron": (torch.kron, _x(2, 2), _x(2, 3)),
    "tensordot": (lambda a, b: torch.tensordot(a, b, 2), _x(2, 3, 4), _x(3, 4)),
    "addmm": (lambda x, a, b: torch.addmm(x, a, b, beta=0.5, alpha=2), _x(4), _x(2, 3), _x(3, 4)),
    "addmv": (lambda x, a, b: torch.addmv(x, a, b, alpha=2), _x(2), _x(2, 3), _x(3)),
    "addr": (lambda x, a, b: torch.addr(x, a, b, beta=2), _x(2, 3), _x(2), _x(3)),
    "baddbmm": (torch.baddbmm, _x(1, 2, 4), _x(2, 2, 3), _x(2, 3, 4)),
    "addbmm": (torch.addbmm, _x(2, 4), _x(3, 2, 3), _x(3, 3, 4)),
    "integers": (torch.mm, torch.arange(6).reshape(2, 3), torch.arange(6).reshape(3, 2)),
    "cross": (lambda a, b: torch.linalg.cross(a, b), _x(2, 3), _x(2, 3, seed=1)),
    "multi_dot": (lambda *m: torch.linalg.multi_dot(m), _x(2, 3), _x(3, 4), _x(4, 2)),
}


@pytest.mark.parametrize("name", _PRODUCTS)
def test_product(name):
    check(*_PRODUCTS[name])


def test_what_beta_zero_leaves_out_may_be_nan():
    check(
        lambda x, a: torch.addmm(x, a, a, beta=0), torch.full((2, 2), torch.nan), _x(2, 2).float()
    )


def test_half_precision_is_rounded_once():
    a, b = _x(1, 4096).bfloat16().abs(), torch.ones(4096, 1).bfloat16()
    (product,) = run_in_jax(torch.mm, a, b)
    exact = a.double().sum().item()
    assert abs(float(product[0, 0]) - exact) <= exact * 2**-9  # summed in bfloat16 it would stall


_MATRIX_FUNCTIONS = {
    "cholesky": (torch.linalg.cholesky, _positive(2, 3, 3)),
    "cholesky_of_one_triangle": (torch.linalg.cholesky, _positive(3, 3) + _x(3, 3).triu(1)),
    "cholesky_upper": (
        lambda a: torch.linalg.cholesky(a, upper=True),
        _positive(3, 3) + _x(3, 3).tril(-1),
    ),
    "cholesky_solve": (torch.cholesky_solve, _x(3, 2), _positive(3, 3)),
    "cholesky_inverse": (lambda a: torch.cholesky_inverse(a, upper=True), _positive(3, 3)),
    "inv": (torch.linalg.inv, _x(2, 3, 3)),
    "solve": (torch.linalg.solve, _x(3, 3), _x(2, 3, 2)),
    "solve_vector": (torch.linalg.solve, _x(2, 3, 3), _x(2, 3)),
    "solve_right": (lambda a, b: torch.linalg.solve(a, b, left=False), _x(3, 3), _x(2, 3)),
    "solve_triangular": (
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=True, unitriangular=True),
        _x(3, 3),
        _x(2, 3, 2),
    ),
    "solve_triangular_right": (
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=False, left=False),
        _x(3, 3),
        _x(2, 3),
    ),
    "triangular_solve": (
        lambda b, a: torch.triangular_solve(b, a, transpose=True),
        _x(3, 2),
        _x(3, 3),
    ),
    "det": (torch.linalg.det, _x(2, 3, 3)),
    "slogdet": (torch.linalg.slogdet, _x(2, 3, 3)),
    "logdet": (torch.logdet, _positive(3, 3)),
    "pinv": (torch.linalg.pinv, _x(2, 4, 3)),
    "pinv_of_low_rank": (torch.linalg.pinv, _x(4, 2) @ _x(2, 3)),
    "pinv_hermitian": (lambda a: torch.linalg.pinv(a, hermitian=True), _positive(3, 3)),
    "qr": (torch.linalg.qr, _x(2, 4, 3)),
    "qr_wide": (torch.linalg.qr, _x(3, 4)),
    "svd": (lambda a: [f.abs() for f in torch.linalg.svd(a, full_matrices=False)], _x(4, 3)),
    "svd_full": (lambda a: [f.abs() for f in torch.linalg.svd(a)], _x(2, 4, 3)),
    "svdvals": (torch.linalg.svdvals, _x(2, 3, 4)),
    "nuclear_norm": (lambda a: torch.linalg.matrix_norm(a, "nuc"), _x(3, 4)),
    "spectral_norm": (lambda a: torch.linalg.matrix_norm(a, 2), _x(3, 4)),
    "eigh": (lambda a: [f.abs() for f in torch.linalg.eigh(a, "U")], _x(2, 3, 3)),
    "eigvalsh": (torch.linalg.eigvalsh, _x(3, 3)),
    "matrix_exp": (torch.linalg.matrix_exp, _x(2, 2)),
    "matrix_power": (lambda a: torch.linalg.matrix_power(a, 3), _x(3, 3)),
    "householder_product": (torch.linalg.householder_product, _x(4, 3), _x(2)),
    "no_rows": (lambda a: (torch.linalg.det(a), torch.linalg.inv(a)), _x(0, 0)),
}


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("name", _MATRIX_FUNCTIONS)
def test_matrix_function(name):
    check(*_MATRIX_FUNCTIONS[name])


def test_qr_without_its_first_factor():
    check(lambda a: torch.linalg.qr(a, mode="r").R, _x(3, 2), order=0)


def test_what_torch_raises_for_is_not_finite():
    zero = torch.zeros(2, 2)
    (inverse,) = run_in_jax(torch.linalg.inv, zero)
    (factor,) = run_in_jax(torch.linalg.cholesky, -torch.eye(2))
    assert not np.isfinite(inverse).any()
    assert np.isnan(np.diag(factor)).all()
    for function in (torch.linalg.cholesky_ex, torch.linalg.inv_ex):
        assert [run_in_jax(function, a)[1] != 0 for a in (torch.eye(2), -zero)] == [False, True]


# Distances.

_WITH_EQUAL_ROWS = torch.cat([_x(3, 3), torch.zeros(1, 3)])


def _distance(kind: str, p: float):
    if kind == "pdist":
        return lambda x: torch.nn.functional.pdist(x, p)
    return lambda x: torch.cdist(x, x.detach(), p)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("kind", ["cdist", "pdist"])
def test_distances_and_their_gradient_at_zero_distance(kind, p):
    x = torch.cat([_WITH_EQUAL_ROWS, _WITH_EQUAL_ROWS[:1]])
    check(_distance(kind, p), x, order=1)


@pytest.mark.parametrize("p", [0.0, 1.0, 1.5, 2.0, float("inf")])
@pytest.mark.parametrize("kind", ["cdist", "pdist"])
def test_second_gradient_of_distances_is_zero_at_zero_distance(kind, p):
    function = from_torch(_distance(kind, p))
    with jax.enable_x64(True):
        rows = to_array(torch.cat([_x(1, 3), _x(1, 3)]))
        second = jax.hessian(lambda x: function(x).sum())(rows)
    assert np.isfinite(second).all()


@pytest.mark.parametrize("p", [1.5, 2.0, float("inf")])
def test_second_gradient_of_distances_elsewhere(p):
    function = from_torch(lambda x, y: torch.cdist(x, y, p))
    with jax.enable_x64(True):
        check_grads(
            function, (to_array(_x(3, 2)), to_array(_x(2, 2, seed=1))), order=2, modes=["rev"]
        )


def test_distances_of_many_rows_go_by_a_product():
    check(torch.cdist, _x(26, 3), _x(27, 3, seed=1), tolerance=1e-7)
