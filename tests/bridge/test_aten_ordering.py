"""Sorting, order statistics, cumulative operations and search: torch's values and gradients."""

import math

import jax
import numpy as np
import pytest
import torch
from support import check
from torch.utils._pytree import tree_leaves

from jaxmeta_bridge import from_torch

INF, NAN = math.inf, math.nan


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def test_sort_and_topk():
    def ordered(x):
        return (
            (
                x.sort(),
                x.sort(0, descending=True),
                x.sort(stable=True, dim=1),
                x.argsort(-2),
                x.msort(),
            ),
            (x.topk(2), x.topk(3, 1, largest=False), x.topk(1, 0), x.quantile(0.3, dim=0)),
        )

    check(lambda x: [(value, value**2) for value in tree_leaves(ordered(x))], randn(2, 4, 3))


def test_stable_sort_keeps_the_order_of_equal_entries():
    x = f64([[2.0, 1.0, 2.0, 1.0, 2.0], [0.0, -0.0, 0.0, -0.0, 0.0]])
    check(lambda x: (x.sort(stable=True), x.sort(stable=True, descending=True)), x)
    check(lambda x: (x.sort(stable=True), x.sort(stable=True, descending=True)), x.to(torch.int8))


@pytest.mark.parametrize("name", ["sort", "median", "nanmedian", "mode", "cummax", "cummin"])
def test_nan_is_the_largest(name):
    x = f64([2.0, NAN, INF, 1.0])
    check(lambda x: getattr(x, name)(0), x)
    if name == "sort":
        check(lambda x: (x.sort(descending=True), x.topk(3), x.topk(3, largest=False)), x)
        check(lambda x: (x.kthvalue(3), x.kthvalue(4)), x)


def test_order_statistics():
    def statistics(x):
        return (
            (x.kthvalue(2), x.kthvalue(1, 0), x.kthvalue(3, -2, keepdim=True)),
            (x.median(), x.median(0), x.median(1, keepdim=True), x.nanmedian(), x.nanmedian(-1)),
            x.mode(1),
        )

    check(lambda x: [(value, value**2) for value in tree_leaves(statistics(x))], randn(2, 4, 3))


def test_full_median_shares_the_gradient():
    check(lambda x: (x.median() ** 2, x.nanmedian() ** 2), f64([[1.0, 1.0], [1.0, 2.0]]))
    check(lambda x: x.median(), f64([1.0, NAN, 2.0, NAN]))
    check(lambda x: x.nanmedian() ** 2, f64([1.0, NAN, 2.0, NAN]))
    check(lambda x: x.nanmedian(), f64([NAN, NAN]))
    check(lambda x: x.median(), torch.zeros(0))


def test_mode_is_the_smallest_of_the_most_frequent():
    check(
        lambda x: (x.mode(), x.mode(0)), f64([[2.0, 1.0, 1.0, 2.0, 3.0], [3.0, 3.0, 1.0, 1.0, 3.0]])
    )


def test_cumulative():
    def cumulated(x):
        return (
            (x.cumsum(0), x.cumsum(-1), x.cumprod(1), x.logcumsumexp(-2)),
            (x.cummax(0), x.cummin(1), x.diff(), x.diff(n=2, dim=1)),
        )

    check(lambda x: [(value, value**2) for value in tree_leaves(cumulated(x))], randn(2, 4, 3))


@pytest.mark.parametrize("zeros", [1, 2, 3])
def test_cumprod_of_zeros(zeros):
    """The formula result / x would be NaN here."""
    check(lambda x: x.cumprod(0), f64([2.0] + [0.0] * zeros + [3.0, -1.0]))


def test_cumulative_extrema_give_the_gradient_to_the_latest():
    x = f64([2.0, 2.0, 1.0, 1.0, 3.0, 2.0, 3.0])
    check(lambda x: [(v, v**2) for v in (*x.cummax(0), *x.cummin(0))], x)
    check(lambda x: (x.cummax(0), x.cummin(0)), f64([2.0, 3.0, NAN, 1.0, NAN]))


def test_logcumsumexp_of_infinities(x64):
    check(lambda x: x.logcumsumexp(0), f64([1.0, -INF, 2.0]), order=1)
    values = f64([[-INF, 1.0, 2.0], [INF, 1.0, 2.0]])
    check(lambda x: x.logcumsumexp(1), values, order=0)
    # NaN in torch at the leading infinity.
    gradient = jax.grad(lambda x: from_torch(torch.logcumsumexp)(x, 1)[:, 0].sum())(values.numpy())
    np.testing.assert_array_equal(gradient, [[1, 0, 0], [1, 0, 0]])


def test_search():
    boundaries = f64([[1.0, 2.0, 2.0, 3.0], [0.0, 0.5, 4.0, 9.0]])
    values = f64([[2.0, 0.0, NAN], [4.0, 10.0, 2.5]])

    def found(boundaries, values, order):
        return (
            torch.searchsorted(boundaries, values),
            torch.searchsorted(boundaries, values, right=True, out_int32=True),
            torch.searchsorted(boundaries[0], values, side="right"),
            torch.searchsorted(boundaries[0], 2.0),
            torch.searchsorted(boundaries[0].flip(0), values, sorter=order),
            torch.bucketize(values, boundaries[1]),
            torch.bucketize(values, boundaries[1], right=True, out_int32=True),
        )

    check(found, boundaries, values, torch.tensor([3, 2, 1, 0]), order=0)


def test_histc():
    def counts(x):
        return x.histc(4, 0, 2), x.histc(3), x.histc(2, -10, 0), x[:1].histc(3)

    check(counts, f64([0.0, 0.5, 2.0, 1.99, 3.0, -1.0]))


def test_dtypes():
    """Integers are summed in int64, halves in float32."""

    def cumulated(x):
        return x.cumsum(0), x.cumprod(0), x.cummax(0), x.sort(stable=True, dim=0)

    check(cumulated, torch.tensor([[100, 100], [100, 0]], dtype=torch.int8))
    check(cumulated, torch.tensor([True, False, True]))
    check(lambda x: x.cumsum(0), torch.full((3000,), 0.1, dtype=torch.bfloat16), order=1)


def test_scalars_and_empty_tensors():
    def ordered(x):
        return (
            (x.sort(), x.topk(1), x.kthvalue(1), x.median(0), x.mode(0), x.cumsum(0), x.cummax(-1)),
            (x.cumprod(0), x.logcumsumexp(0), x.argsort()),
        )

    check(ordered, f64(2.0))
    check(lambda x: (x.sort(), x.topk(0), x.cumsum(1), x.median(1)), torch.zeros(0, 3))
