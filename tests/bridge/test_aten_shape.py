"""Views, rearrangements and writes to views: torch's values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import check, run_in_jax
from torch.utils._pytree import tree_leaves

from jaxmeta_bridge import UnsupportedOpError, from_torch


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_same_entries_in_the_same_order():
    def views(x):
        return (
            (x.view(6, 4), x.reshape(-1), x.flatten(1), x.unsqueeze(-2), x.ravel(), x.clone()),
            (x[:1].squeeze(), x[:1].squeeze(0), x[:, :1].squeeze((1, 2)), x.unflatten(2, (2, 2))),
            (x.expand(2, -1, -1, -1), x[:, :1].expand(-1, 5, 4), x[0, 0, 0].expand(3)),
            (x.contiguous(), x.mT, x.squeeze(0)),
        )

    check(lambda x: [view**2 for group in views(x) for view in group], randn(2, 3, 4))


def test_order_of_axes_and_entries():
    def rearranged(x):
        return (
            (x.permute(2, 0, -2), x.transpose(0, -1), x[0].t(), x[0, 0].t(), x.movedim(0, 2)),
            (
                x.flip(0),
                x.flip(-1, 0),
                x.flip([]),
                x[0].rot90(),
                x.roll(2),
                x.roll((1, -1), (0, 2)),
            ),
            (x.repeat(2, 1, 3), x.repeat(2, 1, 1, 2), x[0, 0].tile(2, 2), x.repeat(0, 1, 1)),
            (x.repeat_interleave(2), x.repeat_interleave(2, dim=1)),
            (x.tril(), x.triu(1), x.tril(-1), x[0].diagonal(), x.diagonal(1, -1, 0)),
            (x.diag_embed(), x[0].diag_embed(-1, 0, 2), x[0, 0].diag(1), torch.diagflat(x[0])),
        )

    check(lambda x: [value**2 for group in rearranged(x) for value in group], randn(2, 3, 4))


def test_joining_and_taking_apart():
    def parts(x, y):
        return (
            (torch.cat([x, y]), torch.cat([x, y, x.new_empty(0)], -2), torch.stack([x, y], -1)),
            (x.split(2, -1), x.split([1, 3], 2), x.chunk(2, 1), x.unbind(), x.tensor_split(3, 2)),
            (x[1], x[:, -1], x[..., 1:-1], x[:, ::2, 1::2], x[:, 5:], x[None, :, 0], x[-1, :, 2]),
            torch.meshgrid(x[0, 0], y[0, :, 0], indexing="ij"),
        )

    check(
        lambda x, y: [p**2 for p in tree_leaves(parts(x, y))],
        randn(2, 3, 4),
        randn(2, 3, 4, seed=1),
    )


def test_joining_promotes():
    ints, halves = torch.arange(3), torch.ones(3, dtype=torch.bfloat16)
    check(lambda x, y: (torch.cat([x, y]), torch.stack([x, y])), ints, halves, order=1)
    check(lambda x, y: torch.cat([x, y]), torch.zeros(0), torch.zeros(0))


def test_pad_cuts_off_where_negative():
    def padded(x):
        pad = torch.nn.functional.pad
        return pad(x, (1, 2)), pad(x, (0, -1, 2, 0), value=2.5), pad(x, (-1, 1, -2, 0, 1, 1))

    check(padded, randn(2, 3, 4))
    check(lambda x: torch.nn.functional.pad(x, (1, 1), value=True), torch.tensor([False]))


def test_unfold():
    def windows(x):
        return x.unfold(1, 2, 1) ** 2, x.unfold(-1, 2, 2) ** 2, x.unfold(2, 3, 2), x.unfold(0, 1, 5)

    check(windows, randn(2, 3, 5))
    check(lambda x: x.unfold(0, 1, 1), torch.tensor(3.0))


def test_writes_to_views():
    def written(x, y):
        a, b, c, d = x.clone(), x.clone(), x.clone(), x.clone()
        a[1:, ::2] = y[0, :2]
        a[:, -1] *= y[:, 0]
        b.diagonal(1, 1, 2).add_(y[0, :, :2].T)
        b[..., 3:1].fill_(7.0)
        c.mT[0].copy_(y[0].T)
        c[0][1][2] = 0.5
        d.view(-1)[::5] = y.view(-1)[:5]
        d.select(0, -1).mul_(2.0)
        return a**2, b**2, c**2, d**2

    check(written, randn(2, 3, 4), randn(2, 3, 4, seed=1))


def test_scatter_to_what_would_be_a_view():
    def scattered(x, y):
        return (
            torch.slice_scatter(x, y[:, 1:], 1, 0, 2),
            torch.slice_scatter(x, y[:, :, :2], 2, step=2),
            torch.slice_scatter(x, y[:, :, :0], 2, 3, 1),
            torch.select_scatter(x, y[:, :, 0], 2, -1),
            torch.diagonal_scatter(x, y[:, 1:, 0], -1, 1, 2),
            torch.diagonal_scatter(x, y[0, :, :2], 1, 0, 2),
        )

    check(lambda x, y: [s**2 for s in scattered(x, y)], randn(2, 3, 4), randn(2, 3, 4, seed=1))


def test_detach_cuts_the_gradient():
    x = randn(3)
    check(lambda x: (x.detach() * x, x.data * x**2, x.detach() ** 2), x)


def test_as_strided_of_a_whole_tensor(x64):
    def strided(x):
        return x.as_strided((2, 2, 3), (1, 4, 2), 1) ** 2, x.as_strided((3,), (0,))

    def scattered(x, y):
        return torch.as_strided_scatter(x, y, (2, 2), (1, 4), 1) ** 2

    x, y = randn(3, 4), randn(2, 2, seed=1)
    check(strided, x)
    check(scattered, x, y, wrt=[1])
    # torch's gradient by x is that of the entries written over, which is wrong.
    written = np.isin(np.arange(12).reshape(3, 4), [1, 2, 5, 6])
    gradient = jax.grad(lambda x: from_torch(scattered)(x, jnp.asarray(y)).sum())(jnp.asarray(x))
    np.testing.assert_allclose(gradient, np.where(written, 0, 2 * x))


def test_as_strided_of_a_view_is_refused():
    with pytest.raises(UnsupportedOpError, match=r"as_strided of a view .*clone"):
        run_in_jax(lambda x: x.t().as_strided((2,), (1,)), randn(3, 4))
    with pytest.raises(UnsupportedOpError, match=r"as_strided of a view .*clone"):
        run_in_jax(lambda x: x[1:].as_strided((2,), (1,), 0), randn(3, 4))


def test_bit_patterns():
    def bits(x):
        return x.view(torch.int64), x.view(torch.int16), x.view(torch.int32).view(torch.float64)

    check(bits, randn(2, 3), order=0)
    check(lambda x: x.view(torch.uint8), torch.tensor([True, False]))
    with pytest.raises(UnsupportedOpError, match="bit patterns of bool and complex"):
        run_in_jax(lambda x: x.view(torch.complex64), torch.zeros(2, dtype=torch.float64))


def test_repeats_that_are_a_tensor_need_the_length(x64):
    repeat = from_torch(lambda x, n: torch.repeat_interleave(x, n, dim=0, output_size=4))
    x, repeats = jnp.arange(6.0).reshape(3, 2), jnp.array([1, 0, 3])
    expected = np.repeat(x, repeats, axis=0)
    np.testing.assert_array_equal(repeat(x, repeats), expected)
    np.testing.assert_array_equal(jax.jit(repeat)(x, repeats), expected)


def test_scalars_and_empty_tensors():
    def views(x):
        return x.view(1), x.squeeze(), x.unsqueeze(0), x.expand(2, 3), x.transpose(0, -1), x.flip(0)

    check(views, torch.tensor(2.0, dtype=torch.float64))
    check(
        lambda x: (x.view(3, 0), x.roll(1, 0), x.flip(0), x.T, x[:, 1:], x.repeat(2, 1), x.tril()),
        torch.zeros(0, 3, dtype=torch.float64),
    )
