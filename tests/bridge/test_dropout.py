"""Dropout layers: off in eval mode; in train mode the right share, scale and shape of the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.test_util import check_grads
from module_support import check_module
from torch import nn

from jaxmeta_bridge import from_torch

_RATE = 0.25
# Shape of the input, and of the mask that torch draws for it.
_LAYERS = {
    nn.Dropout: ((64, 64), (64, 64)),
    nn.Dropout1d: ((64, 64, 3), (64, 64, 1)),
    nn.Dropout2d: ((64, 64, 2, 3), (64, 64, 1, 1)),
    nn.Dropout3d: ((64, 64, 1, 2, 2), (64, 64, 1, 1, 1)),
    nn.AlphaDropout: ((64, 64), (64, 64)),
    nn.FeatureAlphaDropout: ((64, 64, 3), (64, 64, 1)),
}


def _run(layer, x, seed):
    f = from_torch(layer(_RATE))
    return np.asarray(f({}, {}, x, rng=jax.random.key(seed))[0])


@pytest.mark.parametrize("layer", _LAYERS)
def test_eval_mode_is_the_identity(layer):
    x = torch.randn(_LAYERS[layer][0], dtype=torch.float64)[:2, :3]
    check_module(lambda: layer(_RATE).eval(), x)


@pytest.mark.parametrize("layer", _LAYERS)
def test_share_and_shape_of_what_is_dropped(layer):
    shape, mask_shape = _LAYERS[layer]
    y = _run(layer, jnp.ones(shape), seed=0)
    values = np.unique(y)
    assert len(values) == 2  # dropped and kept, each with one value for an input of ones
    dropped = np.isclose(y, values[0])
    per_mask = dropped.reshape(*mask_shape, -1)[..., 0].reshape(mask_shape)
    np.testing.assert_array_equal(dropped, np.broadcast_to(per_mask, shape))
    # 4096 draws: six standard deviations.
    deviation = (_RATE * (1 - _RATE) / per_mask.size) ** 0.5
    assert abs(per_mask.mean() - _RATE) < 6 * deviation


@pytest.mark.parametrize("layer", [nn.Dropout, nn.Dropout2d])
def test_what_is_kept_is_scaled(layer):
    y = _run(layer, jnp.ones(_LAYERS[layer][0]), seed=0)
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - _RATE)])


def test_alpha_dropout_keeps_mean_and_variance():
    x = jax.random.normal(jax.random.key(1), (400, 400))
    y = _run(nn.AlphaDropout, x, seed=0)
    assert abs(y.mean()) < 0.02
    assert abs(y.var() - 1) < 0.02


def test_the_mask_is_a_function_of_the_key():
    x = jnp.ones((64, 64))
    np.testing.assert_array_equal(_run(nn.Dropout, x, 0), _run(nn.Dropout, x, 0))
    assert np.any(_run(nn.Dropout, x, 0) != _run(nn.Dropout, x, 1))


def test_two_layers_draw_masks_of_their_own():
    f = from_torch(lambda x: (nn.Dropout(0.5)(x), nn.Dropout(0.5)(x)))
    first, second = f(jnp.ones((64, 64)), rng=jax.random.key(0))
    assert np.any(np.asarray(first) != np.asarray(second))


def test_value_and_gradients_use_the_same_mask():
    f = from_torch(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)))
    x = jax.random.normal(jax.random.key(0), (5, 4))

    def loss(params):
        return (f(params, {}, x, rng=jax.random.key(3))[0] ** 2).sum()

    # Finite differences evaluate the loss again and again: a new mask would spoil them.
    check_grads(loss, (f.params,), order=2, modes=["rev"], eps=1e-2, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 1.0), (1.0, 0.0)])
def test_rates_at_the_ends(rate, expected):
    f = from_torch(nn.Dropout(rate))
    outputs, _ = f({}, {}, jnp.ones((4, 4)), rng=jax.random.key(0))
    np.testing.assert_array_equal(outputs, expected)
