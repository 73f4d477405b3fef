"""Convolution and pooling against torch, to second order; zeros of a ReLU are ties in a window."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import check, run_in_jax


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.usefixtures("x64")
def test_convolutions() -> None:
    bias = _random(6)
    check(
        lambda x, w, b: F.conv2d(x, w, b, padding=1), _random(2, 4, 5, 6), _random(6, 4, 3, 3), bias
    )
    check(
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=(1, 2), dilation=2, groups=2),
        _random(2, 4, 9, 9),
        _random(6, 2, 3, 2),
        bias,
    )
    check(
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, output_padding=1, groups=2),
        _random(2, 4, 4, 5),
        _random(4, 3, 3, 3),
        bias,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": 2, "dilation": 2, "stride": 1},
    ],
)
def test_max_pool_gives_the_first_of_equal_entries_the_gradient(options: dict[str, Any]) -> None:
    x = _random(2, 3, 7, 8).relu()
    check(lambda x: F.max_pool2d(x, return_indices=True, **options), x)


@pytest.mark.usefixtures("x64")
def test_adaptive_pools_with_uneven_windows() -> None:
    x = _random(2, 3, 7, 8).relu()
    check(lambda x: F.adaptive_avg_pool2d(x, (3, 5)), x)
    check(lambda x: F.adaptive_max_pool2d(x, (3, 5), return_indices=True), x)


def test_half_precision_transposed_convolution_is_summed_in_float32() -> None:
    x, weight = _random(2, 16, 6, 6).half(), _random(16, 8, 3, 3).half()

    def convolve(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv_transpose2d(x, w, stride=1)

    (result,) = run_in_jax(convolve, x, weight)
    exact = convolve(x.double(), weight.double())
    # One rounding of the exact sum: half a unit in the last place, 2^-11 of the value.
    np.testing.assert_allclose(np.asarray(result, np.float64), exact, rtol=2**-11 * 1.01, atol=1e-4)
