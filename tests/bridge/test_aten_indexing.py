"""Reading and writing at positions given by tensors: torch's values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import check, run_in_jax

from jaxmeta_bridge import ControlFlowError, from_torch


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X = randn(3, 4, 5)
ROWS, COLUMNS = torch.tensor([2, 0, -1]), torch.tensor([1, -4, 1])


def test_index():
    def indexed(x, i, j):
        return (
            (
                x[i],
                x[:, j],
                x[i, j],
                x[i, :, j],
                x[:, i, j],
                x[..., i],
                x[i[:, None], j],
                x[i, None],
            ),
            (
                x[[0, -1]],
                x[i, 1],
                x[i, 1:3],
                x[None, i, ::2],
                x[i[:0]],
                x[i, j, j],
                x[:, :, 2, None],
            ),
        )

    check(lambda x, i, j: [v**2 for group in indexed(x, i, j) for v in group], X, ROWS, COLUMNS)


def test_index_put():
    """Positions that occur twice are only written to with one value: else torch is undefined."""

    def written(x, y, i, j):
        a, b, c, d, e = (x.clone() for _ in range(5))
        a[i[:2]] = y[0]
        b[:, j[:2]] = y[:, :2] ** 2
        c[i[:2], j[:2]] += y[0, 0]
        d.index_put_((i, j), y[0, :3], accumulate=True)
        e[i[:2, None], :, i[:2]] = y[0, 0, 0]
        return a**2, b**2, c**2, d**2, e**2

    check(written, X, randn(3, 4, 5, seed=1), ROWS, COLUMNS)


def test_assignment_through_a_mask():
    mask = torch.arange(12).reshape(3, 4) % 3 == 0

    def written(x, y, mask):
        a, b, c, d, e, f = (x.clone() for _ in range(6))
        a[mask] = 0.0
        b[mask] = y[0, 0]
        c[:, mask[0]] = y[:, :1]
        d.index_put_((mask,), y[0, 0, 0] ** 2, accumulate=True)
        e[mask] = y[0]  # the mask selects four rows
        f[x > 0] = y[0, 0, 0]
        return a**2, b**2, c**2, d**2, e**2, f**2

    check(written, X, randn(3, 4, 5, seed=1), mask)


def test_masks_that_need_values_are_refused():
    mask = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ControlFlowError, match="shape"):
        run_in_jax(lambda x, m: x[m], X, mask)
    with pytest.raises(ControlFlowError, match="mask as one of several indices"):
        run_in_jax(lambda x, m, i: x.index_put((m, i), x[0, 0]), X, mask, ROWS)


def test_masked_fill_and_scatter():
    mask = torch.arange(20).reshape(4, 5) % 3 == 0

    def masked(x, y, mask):
        fills = (
            x.masked_fill(mask, 2.0),
            x.masked_fill(mask, y[0, 0, 0]),
            x[0].masked_fill(x > 0, -1),
        )
        return *(fill**2 for fill in fills), x.masked_scatter(mask, y) ** 2

    check(masked, X, randn(3, 4, 5, seed=1), mask)


def test_take_and_put():
    positions = torch.tensor([[0, -1, 7], [7, 59, -60]])
    distinct = torch.tensor([[0, -1, 7], [8, 58, -50]])

    def flat(x, y, positions, distinct):
        values = y[0, :2, :3]
        return (
            x.take(positions) ** 2,
            x.put(distinct, values) ** 2,
            x.put(positions, values, accumulate=True) ** 2,
        )

    check(flat, X, randn(3, 4, 5, seed=1), positions, distinct)


def test_slices_along_an_axis():
    index = torch.tensor([3, 1, 3])

    def sliced(x, y, index):
        return (
            x.index_select(1, index) ** 2,
            x.index_add(-2, index, y, alpha=2.5) ** 2,
            x.index_copy(1, index[:2], y[:, :2]) ** 2,
            x.index_fill(1, index, 3.0) ** 2,
            x.index_fill(1, index, y[0, 0, 0]) ** 2,
        )

    check(sliced, X, randn(3, 3, 5, seed=1), index)


def test_gather_and_scatter():
    index = torch.tensor([[[1, 0, 3], [1, 2, 3]], [[0, 0, 0], [2, 1, 2]]])
    distinct = torch.tensor([[[1, 0, 3], [2, 3, 1]], [[0, 1, 2], [2, 3, 3]]])

    def moved(x, y, index, distinct):
        return (
            x.gather(1, index) ** 2,
            x.take_along_dim(index[:1, :1, :1], 1) ** 2,
            x.scatter(-2, distinct, y[:2, :2, :3]) ** 2,
            x.scatter(1, index, 2.0) ** 2,
            x.scatter_add(1, index, y[:2, :2, :3]) ** 2,
        )

    check(moved, X, randn(3, 3, 4, seed=1), index, distinct)


@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter")
def test_scatter_without_a_derivative_in_torch():
    """By multiplication, and where `index` is shorter than the source."""
    index = torch.tensor([[[1, 0, 3], [1, 2, 3]], [[0, 0, 0], [2, 1, 2]]])
    distinct = torch.tensor([[[1, 0], [2, 3]]])

    def scattered(x, y, index, distinct):
        return (
            (x.scatter(1, index, y, reduce="multiply"), x.scatter(1, index, 2, reduce="add")),
            (x.scatter(1, distinct, y), x.scatter_add(1, index, y)),
            [x.scatter_reduce(1, index, y, reduce) for reduce in ("sum", "mean", "prod", "amax")],
        )

    check(scattered, X, randn(3, 3, 4, seed=1), index, distinct, order=0)


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", ["sum", "mean", "prod", "amax", "amin"])
def test_scatter_reduce(reduce, include_self):
    """With equal entries and zeros; torch shares the gradient of an extremum among the equal."""
    x = torch.tensor([[2.0, 0.0, 1.0], [1.0, 3.0, 2.0]], dtype=torch.float64)
    y = torch.tensor([[0.0, 1.0, 2.0, 2.0], [1.0, 3.0, 0.5, 3.0]], dtype=torch.float64)
    index = torch.tensor([[0, 0, 2, 2], [1, 1, 1, 1]])

    def reduced(x, y, index):
        options = {"reduce": reduce, "include_self": include_self}
        return (
            x.scatter_reduce(1, index, y, **options) ** 2,
            x.T.scatter_reduce(0, index.T, y.T, **options) ** 2,
        )

    check(reduced, x, y, index)
    check(lambda x, y, i: reduced(x, y, i)[0], x.int(), y.int(), index)
    if reduce != "sum":
        check(
            lambda x, y, i: x.index_reduce(1, i, y, reduce, include_self=include_self) ** 2,
            *(x, y[:, :3], torch.tensor([2, 0, 2])),
        )


def test_overwritten_values_get_no_gradient(x64):
    """In torch all values written to one position get the gradient, which it calls incorrect."""
    index = jnp.array([1, 1, 0])

    def put(y):
        return from_torch(lambda y, i: y.new_zeros(2).index_put((i,), y))(y, index)

    y = jnp.array([3.0, 3.0, 5.0])
    np.testing.assert_array_equal(put(y), [5.0, 3.0])
    jacobian = jax.jacobian(put)(y)
    np.testing.assert_array_equal(jacobian[0], [0, 0, 1])
    np.testing.assert_array_equal(jacobian[1].sum(), 1)


def test_reads_out_of_range_are_nan(x64):
    """The other choice, the nearest entry, would look like a result."""
    far = jnp.array([5, 1])

    def reads(x, i):
        return x[i], x.take(i), x.index_select(0, i), x.gather(0, i)

    for read in from_torch(reads)(jnp.ones(3), far):
        np.testing.assert_array_equal(read, [np.nan, 1.0])


def test_bools():
    x, y, i = torch.tensor([True, False]), torch.tensor([False, True]), torch.tensor([1, 1])
    check(lambda x, y, i: (x.scatter_add(0, i, y), x.index_put((i,), y, accumulate=True)), x, y, i)
    check(lambda x, y, i: (x[i], x.gather(0, i), x.masked_fill(y, 0), x.scatter(0, i, 1)), x, y, i)


def test_nonzero_static():
    check(lambda x: x.nonzero_static(size=4), torch.tensor([[0, 2], [3, 0]]))


def test_scalars_and_empty_tensors():
    zero, x = torch.tensor(0), torch.tensor(2.0, dtype=torch.float64)
    check(
        lambda x, i: (x.gather(0, i), x.index_select(0, i), x.scatter(0, i, x * 3), x.take(i)),
        x,
        zero,
    )
    check(lambda x, i: (x.index_add(0, i, x * 3), x.index_fill(0, i, 4.0)), x, zero)
    none = torch.zeros(0, 5, dtype=torch.int64)
    check(
        lambda x, i: (x.gather(0, i), x.scatter(0, i, x[:0]), x[i], x.index_select(0, i[:, 0])),
        X[0],
        none,
    )
