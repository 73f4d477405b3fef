"""Resizing, padding, sampling, folding and unpooling against torch."""

import jax
import pytest
import torch
from jax.test_util import check_grads
from support import check, run_in_jax, to_array
from torch.nn import functional as F

from jaxmeta_bridge import UnsupportedOpError, from_torch


def _x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


_IMAGES = {1: (2, 1, 5), 2: (1, 2, 3, 5), 3: (1, 1, 2, 3, 4)}
# Larger, smaller, by a scale that does not give whole sizes, by a whole factor, to one entry.
_SIZES = [{"size": 7}, {"size": 2}, {"scale_factor": 1.7}, {"scale_factor": 2.0}, {"size": 1}]


def _to_all_sizes(x, **options):
    return [F.interpolate(x, **size, **options) for size in _SIZES]


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "area"])
def test_resize_to_the_nearest(mode):
    for shape in _IMAGES.values():
        check(lambda x: _to_all_sizes(x, mode=mode), _x(*shape), order=1)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("mode", "dimensions"), [("linear", 1), ("bilinear", 2), ("bicubic", 2), ("trilinear", 3)]
)
def test_interpolate(mode, dimensions, align_corners):
    def resize(x):
        return _to_all_sizes(x, mode=mode, align_corners=align_corners)

    check(resize, _x(*_IMAGES[dimensions]), order=1)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_antialias(mode, align_corners):
    def resize(x):
        return _to_all_sizes(x, mode=mode, align_corners=align_corners, antialias=True)

    check(resize, _x(1, 2, 6, 5), order=1)


def test_resize_where_float32_rounding_decides_the_neighbour():
    check(lambda x: F.interpolate(x, size=300), _x(1, 1, 31), order=0)
    check(lambda x: F.interpolate(x, scale_factor=3.3), _x(1, 1, 97), order=0)


def test_interpolation_between_integers_is_refused():
    image = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(UnsupportedOpError, match="uint8"):
        run_in_jax(lambda x: F.interpolate(x, size=3, mode="bilinear"), image)
    check(lambda x: F.interpolate(x, size=3), image + 3)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_pad(mode):
    for shape in _IMAGES.values():
        width = (1, 2, 0, 1, 1, 1)[: 2 * (len(shape) - 2)]
        check(lambda x, width=width: F.pad(x, width, mode=mode) ** 2, _x(*shape), order=1)
    check(lambda x: F.pad(x, (2, 1), mode=mode), _x(2, 5), order=1)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_pad_that_cuts(mode):
    check(lambda x: F.pad(x, (-1, 2, 1, -2), mode=mode), _x(1, 2, 4, 5), order=1)


def test_unfold_and_fold():
    def unfold(x):
        return F.unfold(x, (2, 3), dilation=(1, 2), padding=(1, 0), stride=(2, 1)) ** 2

    def fold(x):
        return F.fold(x, (4, 5), (2, 3), dilation=(1, 2), padding=(1, 2), stride=(2, 1)) ** 2

    check(unfold, _x(2, 2, 4, 6))
    check(unfold, _x(2, 4, 6))
    check(fold, _x(2, 12, 15))
    check(fold, _x(12, 15))


# Sampling. Torch has no second derivative of it.


@pytest.mark.parametrize(
    ("mode", "padding", "align_corners"),
    [
        ("bilinear", "zeros", True),
        ("bilinear", "border", False),
        ("bilinear", "reflection", True),
        ("bilinear", "reflection", False),
        ("nearest", "zeros", False),
        ("nearest", "reflection", True),
        ("bicubic", "zeros", False),
        ("bicubic", "reflection", True),
    ],
)
def test_grid_sample(mode, padding, align_corners):
    def sample(x, grid):
        return F.grid_sample(x, grid, mode, padding, align_corners)

    check(sample, _x(2, 2, 3, 4), 1.5 * _x(2, 3, 5, 2), order=1)
    if mode != "bicubic":
        check(sample, _x(1, 1, 2, 3, 4), 1.5 * _x(1, 2, 3, 1, 3), order=1)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_sample_at_the_corners_of_the_image(padding):
    grid = torch.tensor([-1.0, 0.0, 1.0]).double()
    grid = torch.stack(torch.meshgrid(grid, grid, indexing="xy"), -1)[None]
    check(
        lambda x, g: F.grid_sample(x, g, "bilinear", padding, True), _x(1, 1, 4, 3), grid, order=1
    )


def test_second_gradient_of_grid_sample():
    sample = jax.jit(from_torch(lambda x, g: F.grid_sample(x, g, "bilinear", "border", False)))
    with jax.enable_x64(True):
        inputs = (to_array(_x(1, 1, 3, 4)), to_array(0.5 * _x(1, 2, 2, 2)))
        check_grads(sample, inputs, order=2, modes=["rev"], eps=1e-5, rtol=1e-3)


def test_affine_grid():
    check(lambda theta: F.affine_grid(theta, [2, 1, 3, 4], align_corners=False), _x(2, 2, 3))
    check(lambda theta: F.affine_grid(theta, [1, 1, 2, 2, 3], align_corners=True), _x(1, 3, 4))


def test_shuffles():
    check(lambda x: F.pixel_shuffle(x, 2) ** 2, _x(1, 4, 2, 3))
    check(lambda x: F.pixel_unshuffle(x, 2) ** 2, _x(1, 1, 4, 6))
    check(lambda x: F.channel_shuffle(x, 2) ** 2, _x(1, 4, 2, 1))
