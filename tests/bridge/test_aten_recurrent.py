"""Recurrent layers and cells: directions, layers, projections, states, dropout, half precision."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from module_support import check_module
from torch import nn

from jaxmeta_bridge import from_torch, tensor_to_jax


def _x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True},
        {"batch_first": True, "bidirectional": True, "bias": False},
    ],
    ids=str,
)
def test_recurrent_layer(layer, options):
    order = 1 if options else 2  # the variants differ in what is fed where, not in the cell
    check_module(lambda: layer(2, 3, **options), _x(4, 3, 2), order=order)


def test_relu():
    check_module(lambda: nn.RNN(2, 3, nonlinearity="relu"), _x(4, 3, 2))


def test_projection():
    check_module(lambda: nn.LSTM(2, 4, 2, proj_size=3, bidirectional=True), _x(3, 2, 2), order=1)
    check_module(lambda: nn.LSTM(2, 4, proj_size=3, bias=False), _x(3, 2))


class _WithState(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, h: torch.Tensor, *c: torch.Tensor) -> Any:
        return self.layer(x, (h, *c) if c else h)


def test_initial_states():
    check_module(lambda: _WithState(nn.LSTM(2, 3)), _x(4, 2, 2), _x(1, 2, 3), _x(1, 2, 3), order=1)
    check_module(lambda: _WithState(nn.GRU(2, 3, 2)), _x(4, 2, 2), _x(2, 2, 3), order=1)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cell(cell):
    check_module(lambda: cell(2, 3), _x(4, 2))
    check_module(
        lambda: _WithState(cell(2, 3, bias=False)),
        _x(2),
        *[_x(3)] * (2 if cell is nn.LSTMCell else 1),
    )


def test_dropout_lies_between_layers_and_follows_the_key():
    layer = nn.GRU(2, 8, num_layers=2, dropout=0.5)
    f, x = from_torch(layer), tensor_to_jax(_x(3, 4, 2).float())

    def run(seed):
        return np.asarray(f(f.params, {}, x, rng=jax.random.key(seed))[0][0])

    np.testing.assert_array_equal(run(0), run(0))
    assert np.abs(run(0) - run(1)).max() > 1e-3
    # The first layer's last state comes before any dropout.
    expected = layer.eval()(_x(3, 4, 2).float())[1][0]
    actual = f(f.params, {}, x, rng=jax.random.key(0))[0][1][0]
    np.testing.assert_allclose(actual, expected.detach(), atol=1e-6)


def test_no_dropout_after_the_last_layer():
    f = from_torch(nn.LSTM(2, 16, num_layers=2, dropout=0.9))
    x = tensor_to_jax(_x(3, 4, 2).float())
    outputs, _ = f(f.params, {}, x, rng=jax.random.key(0))[0]
    assert np.all(np.asarray(outputs) != 0)


def test_half_precision_accumulates_in_float32():
    layer = nn.LSTM(16, 16).bfloat16()
    x = _x(6, 2, 16).bfloat16()
    exact = layer.double()(x.double())[0].detach()
    f = from_torch(layer.bfloat16())
    outputs = f(f.params, {}, tensor_to_jax(x))[0][0]
    assert str(outputs.dtype) == "bfloat16"
    # Half a unit in the last place of values below 1: rounded once, at the end.
    np.testing.assert_allclose(np.asarray(outputs, np.float64), exact, atol=2e-3)
