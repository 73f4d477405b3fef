"""Random draws have torch's distributions; their derivatives are torch's too."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import run_in_jax

from jaxmeta_bridge import from_torch

SIZE = 20_000
KEY = jax.random.key(0)


def draw(function, *tensors, seed=0):
    (values,) = run_in_jax(function, *tensors, rng=jax.random.key(seed))
    return np.asarray(values)


def assert_moments(values, mean, deviation, tolerance=0.03):
    """Within some five standard errors of the mean, and of the deviation."""
    values = np.asarray(values, np.float64)
    np.testing.assert_allclose(values.mean(), mean, atol=tolerance * deviation + 1e-12)
    np.testing.assert_allclose(values.std(), deviation, rtol=2 * tolerance)


def empty(dtype=torch.float32):
    return torch.empty(SIZE, dtype=dtype)


CONTINUOUS = {
    "rand": (lambda x: torch.rand(SIZE) + 0 * x, 0.5, 12**-0.5),
    "rand_like": (torch.rand_like, 0.5, 12**-0.5),
    "randn": (lambda x: torch.randn(SIZE) + 0 * x, 0.0, 1.0),
    "randn_like": (torch.randn_like, 0.0, 1.0),
    "uniform_": (lambda x: empty().uniform_(-1, 3), 1.0, 4 * 12**-0.5),
    "normal_": (lambda x: empty().normal_(2, 3), 2.0, 3.0),
    "normal": (lambda x: torch.normal(x + 2, 3.0), 2.0, 3.0),
    "normal_std": (lambda x: torch.normal(2.0, x + 3), 2.0, 3.0),
    "normal_both": (lambda x: torch.normal(x + 2, x + 3), 2.0, 3.0),
    "normal_size": (lambda x: torch.normal(2.0, 3.0, (SIZE,)) + 0 * x, 2.0, 3.0),
    "exponential_": (lambda x: empty().exponential_(2), 0.5, 0.5),
    "log_normal_": (lambda x: empty().log_normal_(1, 0.5).log(), 1.0, 0.5),
    "cauchy_": (lambda x: (empty().cauchy_(1, 2) - 1).div(2).atan(), 0.0, math.pi * 12**-0.5),
    "gumbel": (lambda x: -empty().exponential_().log(), np.euler_gamma, math.pi * 6**-0.5),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_continuous(name):
    function, mean, deviation = CONTINUOUS[name]
    values = draw(function, torch.zeros(SIZE))
    assert values.dtype == np.float32
    assert_moments(values, mean, deviation)
    assert len(np.unique(values)) > SIZE / 2


COUNTS = {
    "bernoulli": (lambda x: torch.bernoulli(x + 0.3), 0.3, 0.21**0.5),
    "bernoulli_p": (lambda x: torch.bernoulli(x, 0.3), 0.3, 0.21**0.5),
    "bernoulli_": (lambda x: empty().bernoulli_(x + 0.3), 0.3, 0.21**0.5),
    "geometric_": (lambda x: empty().geometric_(0.25), 4.0, 12**0.5),
    "poisson": (lambda x: torch.poisson(x + 4), 4.0, 2.0),
    "binomial": (lambda x: torch.binomial(x + 10, x + 0.3), 3.0, 2.1**0.5),
    "randint": (lambda x: torch.randint(10, (SIZE,)), 4.5, 8.25**0.5),
    "randint_low": (lambda x: torch.randint(-10, 0, (SIZE,)), -5.5, 8.25**0.5),
    "randint_like": (lambda x: torch.randint_like(x, 10), 4.5, 8.25**0.5),
    "randint_like_low": (lambda x: torch.randint_like(x, -10, 0), -5.5, 8.25**0.5),
    "random_to": (lambda x: empty().random_(10), 4.5, 8.25**0.5),
    "random_from": (lambda x: empty(torch.int64).random_(-10, 0), -5.5, 8.25**0.5),
    "random_int8": (lambda x: empty(torch.int8).random_().double(), 63.0, 127 * 12**-0.5),
    "random_half": (lambda x: empty(torch.float16).random_().double(), 1024.0, 2049 * 12**-0.5),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    function, mean, deviation = COUNTS[name]
    values = draw(function, torch.zeros(SIZE))
    assert (values == np.round(values)).all()
    assert_moments(values, mean, deviation)


def test_every_draw_has_a_key_of_its_own():
    def function(x):
        return torch.stack([torch.rand_like(x), torch.rand_like(x), F.dropout(x, 0.5)])

    values = draw(function, torch.ones(100))
    assert len(np.unique(values[:2])) == 200
    assert (values == draw(function, torch.ones(100))).all()
    assert (values != draw(function, torch.ones(100), seed=1)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    """A number below 1 must not be rounded to 1."""
    values = draw(lambda x: torch.rand(SIZE, dtype=dtype), torch.zeros(1))
    assert values.max() < 1
    assert_moments(values, 0.5, 12**-0.5)
    assert draw(lambda x: torch.randn(3, dtype=dtype), torch.zeros(1)).dtype == values.dtype


def test_complex():
    values = draw(lambda x: torch.randn(SIZE, dtype=torch.complex64), torch.zeros(1))
    assert_moments(np.real(values), 0.0, 0.5**0.5)
    assert_moments(np.imag(values), 0.0, 0.5**0.5)
    values = draw(lambda x: torch.rand(SIZE, dtype=torch.complex64), torch.zeros(1))
    assert_moments(np.imag(values), 0.5, 12**-0.5)


@pytest.mark.parametrize(
    "dropout",
    [lambda x: F.dropout(x, 0.25), lambda x: torch.native_dropout(x, 0.25, True)[0]],
)
def test_dropout(dropout):
    """What is kept is scaled; so is its gradient, by the same mask."""
    function = from_torch(dropout)
    x = jnp.linspace(1, 2, SIZE)
    values, pull_back = jax.vjp(lambda x: function(x, rng=KEY), x)
    (gradient,) = pull_back(jnp.ones_like(x))
    kept = values != 0
    assert_moments(kept, 0.75, 0.1875**0.5)
    np.testing.assert_allclose(values, jnp.where(kept, x / 0.75, 0), rtol=1e-6)
    np.testing.assert_allclose(gradient, jnp.where(kept, 1 / 0.75, 0), rtol=1e-6)


def test_dropout_of_channels_and_of_everything():
    values = draw(lambda x: F.dropout2d(x, 0.5), torch.ones(50, 20, 2, 3)).reshape(1000, 6)
    assert ((values == 0).all(1) | (values == 2).all(1)).all()
    assert (draw(lambda x: F.dropout(x, 1.0), torch.ones(100)) == 0).all()
    # alpha_dropout keeps mean and variance of standard normal values.
    normal = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    assert_moments(draw(lambda x: F.alpha_dropout(x, 0.3, training=True), normal), 0.0, 1.0)


def test_rrelu():
    function = from_torch(lambda x: F.rrelu(x, 0.1, 0.5, training=True))
    x = jnp.concatenate([-jnp.ones(SIZE), jnp.asarray([0.0, 2.0])])
    values, pull_back = jax.vjp(lambda x: function(x, rng=KEY), x)
    (gradient,) = pull_back(jnp.ones_like(x))
    assert_moments(values[:SIZE], -0.3, 0.4 * 12**-0.5)
    assert values[SIZE + 1] == 2
    np.testing.assert_allclose(gradient[:SIZE], -values[:SIZE], rtol=1e-6)
    assert 0.1 <= gradient[SIZE] <= 0.5  # at zero the random slope, as in torch
    assert gradient[SIZE + 1] == 1


def test_permutations():
    values = draw(lambda x: torch.stack([torch.randperm(50) for _ in range(3)]), torch.zeros(1))
    assert (np.sort(values, axis=1) == np.arange(50)).all()
    assert len({tuple(row) for row in values.tolist()}) == 3


def test_multinomial():
    weights = torch.tensor([1.0, 0.0, 3.0, 4.0])
    values = draw(lambda w: torch.multinomial(w, SIZE, replacement=True), weights)
    frequencies = np.bincount(values, minlength=4) / SIZE
    np.testing.assert_allclose(frequencies, [0.125, 0, 0.375, 0.5], atol=0.02)
    rows = draw(lambda w: torch.multinomial(w, 3), weights.expand(5000, 4))
    assert (np.sort(rows, axis=1) == [0, 2, 3]).all()
    first = np.bincount(rows[:, 0], minlength=4) / 5000
    np.testing.assert_allclose(first, [0.125, 0, 0.375, 0.5], atol=0.04)
    batched = draw(lambda w: torch.multinomial(w, 7, replacement=True), weights.expand(3, 4))
    assert batched.shape == (3, 7)


def test_parameters_of_a_draw_have_zero_gradient():
    """In torch a draw is a constant for its mean, deviation, rate or probability."""

    def function(p):
        draws = (
            torch.bernoulli(p),
            torch.poisson(p),
            torch.normal(p, p),
            torch.binomial(p * 0 + 9, p),
        )
        return sum(draw.sum() for draw in draws) + (p**2).sum()

    p = jnp.full(3, 0.4)
    gradient = jax.grad(lambda p: from_torch(function)(p, rng=KEY))(p)
    np.testing.assert_allclose(gradient, 2 * p, rtol=1e-6)


def test_gamma_and_dirichlet_have_pathwise_gradients():
    """The mean of a Gamma is its shape, so the gradient of the mean of draws is about one."""
    gamma = from_torch(lambda a: torch.ops.aten._standard_gamma(a.expand(SIZE)).mean())
    value, slope = jax.value_and_grad(lambda a: gamma(a, rng=KEY))(jnp.asarray(2.0))
    np.testing.assert_allclose(value, 2.0, atol=0.05)
    np.testing.assert_allclose(slope, 1.0, atol=0.05)
    dirichlet = from_torch(
        lambda a: torch.ops.aten._sample_dirichlet(a.expand(SIZE, 2))[:, 0].mean()
    )
    value, slope = jax.value_and_grad(lambda a: dirichlet(a, rng=KEY))(jnp.asarray([1.0, 3.0]))
    np.testing.assert_allclose(value, 0.25, atol=0.01)
    np.testing.assert_allclose(slope, [3 / 16, -1 / 16], atol=0.02)
