"""Reductions and norms: torch's values and (sub)gradients, at special points too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import check

from jaxmeta_bridge import from_torch

INF, NAN = math.inf, math.nan


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_sums():
    def sums(x):
        return (
            (x.sum(), x.sum(0), x.sum((0, -1)), x.sum(-2, keepdim=True), x.sum([])),
            (x.mean(), x.mean((1, 2), keepdim=True), x.nansum(1), x[0].trace()),
            (x.prod(), x.prod(1), x.prod(-1, keepdim=True)),
        )

    check(sums, randn(2, 3, 4))


def test_nansum_passes_no_gradient_to_nan():
    check(lambda x: (x.nansum() ** 2, x.nansum(0) ** 2), f64([[1.0, NAN], [NAN, NAN]]))


@pytest.mark.parametrize("zeros", [1, 2, 3])
def test_prod_of_zeros(zeros):
    """The formula result / x would be NaN here."""
    x = f64([0.0] * zeros + [3.0, -2.0])
    check(lambda x: (x.prod(), x.prod(0, keepdim=True), x.view(1, -1).prod(1)), x)


def test_extrema():
    def extrema(x):
        return (
            (x.amax(), x.amax((0, 2)), x.amin(-1, keepdim=True), x.amin([])),
            (x.max(), x.min(), x.max(1), x.min(-1, keepdim=True)),
            (x.aminmax(), x.aminmax(dim=0)),
        )

    check(extrema, randn(2, 3, 4))


def test_equal_extrema_share_or_take_the_gradient():
    """It is shared by amax and the full max; max.dim gives it to the entry that it names."""
    x = f64([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    check(lambda x: x.amax() ** 2, x)
    check(lambda x: (x.amax(0) ** 2, x.amin((0, 1)) ** 2, x.max() ** 2, x.min() ** 2), x)
    check(lambda x: (x.max(1), x.min(0), x.aminmax(dim=1), x.aminmax()), x)


@pytest.mark.parametrize("name", ["amax", "amin", "max", "min", "aminmax", "argmax", "argmin"])
def test_nan_wins(name):
    check(lambda x: getattr(x, name)(), f64([1.0, NAN, INF, NAN]))
    check(lambda x: getattr(x, name)(dim=1), f64([[1.0, NAN, INF, NAN], [1.0, 2.0, 2.0, 0.0]]))


def test_moments():
    def moments(x):
        return (
            (x.var(), x.var(0), x.var((0, 2), correction=0), x.var(-1, keepdim=True, correction=2)),
            (x.std(), x.std(1, unbiased=False), x.std((0, 1), correction=0.5)),
            (torch.var_mean(x, 1), torch.std_mean(x, (0, 2), keepdim=True), torch.std_mean(x)),
        )

    check(moments, randn(2, 3, 4))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_moments_at_special_points():
    check(lambda x: (x.std(), x.std(1), torch.std_mean(x, 1)), f64([[2.0, 2.0], [2.0, 2.0]]))
    check(lambda x: (x.std(0), x.std(0, correction=0)), f64([[1.0, 2.0, 2.0], [1.0, 3.0, 2.0]]))
    check(lambda x: x.std(0, correction=0), f64([1.0]))
    check(lambda x: x.var(), f64([1.0]), order=1)
    check(lambda x: x.std(), f64([1.0]), order=1)
    check(lambda x: x.var(correction=3), f64([1.0, 2.0]), order=0)


@pytest.mark.parametrize(
    "values", [[0.5, 2.0, -1.0], [-INF, 1.0, 2.0], [-INF] * 3, [INF, 1.0, 2.0], [1e4, 1e4 + 1, 0.0]]
)
def test_logsumexp(values):
    check(lambda x: (x.logsumexp(0), x.view(1, 3).logsumexp((0, 1), keepdim=True)), f64(values))


@pytest.mark.parametrize("p", [0, 0.5, 1, 1.5, 2, 2.5, 3, INF, -INF, -1])
def test_norms(p):
    norm = torch.linalg.vector_norm

    def norms(x):
        return (norm(x, p), norm(x, p, dim=1), norm(x, p, dim=(0, 2), keepdim=True), x.norm(p, 0))

    # torch's second gradient of p = 0 and inf is a tensor without memory; it is zero.
    check(norms, randn(2, 3, 4), order=1 if p in (0, 1, INF, -INF) else 2)


@pytest.mark.parametrize("p", [0, 0.5, 1, 1.5, 2, 3, INF])
def test_norms_where_entries_are_zero_or_equal(p):
    x = f64([[0.0, 0.0, 0.0], [0.0, 2.0, -2.0]])
    check(lambda x: torch.linalg.vector_norm(x, p, dim=1), x, order=1)
    check(lambda x: x.renorm(2, 0, 1.0), x, order=1)


def test_second_gradient_of_a_zero_norm_is_zero(x64):
    """In torch it is NaN."""
    norm = from_torch(torch.linalg.vector_norm)
    np.testing.assert_array_equal(jax.hessian(norm)(jnp.zeros(2)), jnp.zeros((2, 2)))


def test_dist():
    check(lambda x, y: [torch.dist(x, y, p) for p in (1.5, 2, 3)], randn(2, 3), randn(3, seed=1))
    check(lambda x: torch.dist(x, x), randn(3), order=1)


def test_logical_reductions_and_counts():
    def logical(x):
        return (
            (x.all(), x.all(0), x.all((0, 1), keepdim=True), x.all([]), x.any(), x.any(-1)),
            (x.count_nonzero(), x.count_nonzero(0), x.count_nonzero((0, 1))),
            (x.argmax(), x.argmax(0), x.argmin(1, keepdim=True)),
        )

    check(logical, f64([[0.0, 1.0, 1.0], [2.0, 2.0, -0.0]]))
    check(logical, torch.tensor([[0, 3], [3, 1]], dtype=torch.uint8))


def test_dtypes_and_accumulation():
    """Integers are summed in int64, halves in float32."""
    ints = torch.tensor([[100, 100], [3, 0]], dtype=torch.int8)
    check(lambda x: (x.sum(), x.prod(0), x.sum(dtype=torch.float32), x.amax(0), x.max(1)), ints)
    check(lambda x: (x.sum(), x.sum(0), x.max(), x.any()), ints.bool())
    half = torch.full((5000,), 0.1, dtype=torch.bfloat16)
    check(
        lambda x: (x.sum(), x.mean(), x.var(), x.norm(), x.sum(dtype=torch.float64)), half, order=1
    )


def test_scalars_and_empty_tensors():
    def reductions(x):
        return (x.sum(0), x.mean(-1), x.amax(0), x.max(), x.max(0), x.argmax(0), x.logsumexp(0))

    check(reductions, f64(2.0))
    empty = torch.zeros(0, 3, dtype=torch.float64)
    check(lambda x: (x.sum(), x.sum(1), x.mean(), x.prod(0), x.amax(1), x.max(1), x.norm()), empty)
