"""Every layer of torch.nn, converted: outputs, new buffers, first and second gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_support import check_module
from torch import nn

_CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {}


def _case(name: str, factory: Callable[[], nn.Module], *inputs: Any) -> None:
    assert name not in _CASES
    _CASES[name] = (factory, inputs)


def _x(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


class _Applied(nn.Module):
    """A layer whose call needs other than plain tensors, or a chain of two."""

    def __init__(self, call: Callable[..., Any], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self._call = nn.ModuleList(layers), call

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self._call(*self.layers, *inputs)


# Linear layers, and those that only move entries.

_case("linear", lambda: nn.Linear(3, 2), _x(4, 3))
_case("linear_no_bias", lambda: nn.Linear(3, 2, bias=False), _x(3))
_case("bilinear", lambda: nn.Bilinear(3, 4, 2), _x(5, 3), _x(5, 4))
_case("identity", nn.Identity, _x(2, 3))
_case("flatten", nn.Flatten, _x(2, 3, 4))
_case("unflatten", lambda: nn.Unflatten(1, (2, 3)), _x(2, 6))
_case("pixel_shuffle", lambda: nn.PixelShuffle(2), _x(1, 8, 2, 3))
_case("pixel_unshuffle", lambda: nn.PixelUnshuffle(2), _x(1, 2, 4, 6))
_case("channel_shuffle", lambda: nn.ChannelShuffle(2), _x(1, 4, 2, 2))
_case("unfold", lambda: nn.Unfold((2, 3), dilation=(1, 2), padding=1, stride=2), _x(2, 2, 5, 7))
_case("fold", lambda: nn.Fold((4, 5), 2, padding=1, stride=(2, 1)), _x(2, 8, 18))

# Convolutions.

for _mode in ("zeros", "reflect", "replicate", "circular"):
    _case(
        f"conv1d_{_mode}",
        lambda mode=_mode: nn.Conv1d(2, 3, 3, padding=2, padding_mode=mode),
        _x(2, 2, 6),
    )
    _case(
        f"conv2d_{_mode}",
        lambda mode=_mode: nn.Conv2d(2, 3, (3, 2), padding=(1, 2), padding_mode=mode, stride=2),
        _x(2, 2, 5, 6),
    )
_case(
    "conv3d_circular",
    lambda: nn.Conv3d(1, 2, 2, padding=1, padding_mode="circular"),
    _x(1, 1, 3, 2, 3),
)
_case("conv3d", lambda: nn.Conv3d(1, 2, 2, padding=1, stride=(1, 2, 2)), _x(1, 1, 3, 4, 3))
_case("conv1d_dilated_groups", lambda: nn.Conv1d(4, 6, 2, dilation=2, groups=2), _x(2, 4, 7))
_case("conv2d_depthwise", lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False), _x(2, 3, 5, 5))
_case("conv2d_same", lambda: nn.Conv2d(2, 2, (2, 3), padding="same", dilation=2), _x(1, 2, 5, 5))
_case("conv2d_valid", lambda: nn.Conv2d(2, 2, 2, padding="valid", stride=2), _x(1, 2, 4, 5))
_case("conv2d_one_by_one", lambda: nn.Conv2d(2, 4, 1), _x(2, 2, 3, 3))
_case("conv2d_unbatched", lambda: nn.Conv2d(2, 3, 3), _x(2, 5, 5))
_case("transposed1d", lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=1), _x(2, 2, 4))
_case(
    "transposed2d",
    lambda: nn.ConvTranspose2d(2, 3, (3, 2), stride=(2, 3), padding=1, output_padding=(1, 2)),
    _x(1, 2, 3, 3),
)
_case(
    "transposed2d_groups_dilated",
    lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2, bias=False),
    _x(1, 4, 3, 3),
)
_case("transposed3d", lambda: nn.ConvTranspose3d(2, 1, 2, stride=2), _x(1, 2, 2, 2, 2))

# Pooling.

_case("max_pool1d", lambda: nn.MaxPool1d(3, 2, padding=1, dilation=2), _x(2, 2, 9))
_case("max_pool2d", lambda: nn.MaxPool2d((2, 3), ceil_mode=True), _x(1, 2, 5, 7))
_case("max_pool2d_overlap", lambda: nn.MaxPool2d(3, 1, return_indices=True), _x(1, 1, 5, 5))
_case("max_pool3d", lambda: nn.MaxPool3d(2), _x(1, 1, 4, 4, 4))
for _d, _unpool, _pool in (
    (1, nn.MaxUnpool1d, nn.MaxPool1d),
    (2, nn.MaxUnpool2d, nn.MaxPool2d),
    (3, nn.MaxUnpool3d, nn.MaxPool3d),
):
    _case(
        f"max_unpool{_d}d",
        lambda pool=_pool, unpool=_unpool: _Applied(
            lambda pool, unpool, x: unpool(*pool(x)), pool(2, return_indices=True), unpool(2)
        ),
        _x(1, 2, *[4] * _d),
    )
_case("avg_pool1d", lambda: nn.AvgPool1d(3, 2, padding=1), _x(2, 2, 8))
_case(
    "avg_pool2d",
    lambda: nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False),
    _x(1, 2, 6, 5),
)
_case("avg_pool2d_divisor", lambda: nn.AvgPool2d(2, divisor_override=3), _x(1, 2, 5, 4))
_case("avg_pool3d", lambda: nn.AvgPool3d(2, 1), _x(1, 1, 3, 3, 3))
_case("lp_pool1d", lambda: nn.LPPool1d(2, 3), _x(2, 2, 6))
_case("lp_pool2d", lambda: nn.LPPool2d(3, 2), _x(1, 2, 4, 4).abs())
_case("lp_pool3d", lambda: nn.LPPool3d(2, 2), _x(1, 1, 4, 4, 4))
_case("adaptive_avg1d", lambda: nn.AdaptiveAvgPool1d(3), _x(2, 2, 7))
_case("adaptive_avg2d", lambda: nn.AdaptiveAvgPool2d((2, 3)), _x(1, 2, 5, 6))
_case("adaptive_avg2d_to_1", lambda: nn.AdaptiveAvgPool2d(1), _x(1, 2, 5, 6))
_case("adaptive_avg3d", lambda: nn.AdaptiveAvgPool3d((2, None, 1)), _x(1, 1, 4, 3, 5))
_case("adaptive_max1d", lambda: nn.AdaptiveMaxPool1d(3), _x(2, 2, 7))
_case("adaptive_max2d", lambda: nn.AdaptiveMaxPool2d((2, 3), return_indices=True), _x(1, 2, 5, 6))
_case("adaptive_max3d", lambda: nn.AdaptiveMaxPool3d(2), _x(1, 1, 4, 3, 5))

# Padding.

for _d, _size in ((1, (2, 3, 6)), (2, (1, 2, 5, 6)), (3, (1, 1, 4, 3, 4))):
    _width = (1, 2, 0, 1, 2, 1)[: 2 * _d]
    for _layer in ("Constant", "Zero", "Reflection", "Replication", "Circular"):
        _type = getattr(nn, f"{_layer}Pad{_d}d")
        _extra = (1.5,) if _layer == "Constant" else ()
        _case(
            f"{_layer.lower()}_pad{_d}d",
            lambda type=_type, width=_width, extra=_extra: type(width, *extra),
            _x(*_size),
        )

# Normalisation. In train mode the running statistics come back as new buffers.


def _used(norm: nn.Module, *size: int) -> nn.Module:
    """The layer after a batch, so that its running statistics are not the initial ones."""
    norm.double()(_x(*size) * 2 + 1)
    return norm


for _d, _size in ((1, (4, 3)), (2, (2, 3, 2, 2)), (3, (2, 3, 2, 1, 2))):
    _type, _instance = getattr(nn, f"BatchNorm{_d}d"), getattr(nn, f"InstanceNorm{_d}d")
    _case(f"batch_norm{_d}d", lambda t=_type, s=_size: _used(t(3), *s), _x(*_size))
    _case(f"batch_norm{_d}d_eval", lambda t=_type, s=_size: _used(t(3), *s).eval(), _x(*_size))
    _size = (2, 3, 4, *_size[3:])
    _case(
        f"instance_norm{_d}d",
        lambda t=_instance, s=_size: _used(t(3, affine=True, track_running_stats=True), *s),
        _x(*_size),
    )
_case("batch_norm_sequence", lambda: nn.BatchNorm1d(3, momentum=0.3), _x(2, 3, 4))
_case("batch_norm_plain", lambda: nn.BatchNorm1d(3, affine=False), _x(4, 3))
_case("batch_norm_no_running", lambda: nn.BatchNorm1d(3, track_running_stats=False), _x(4, 3))
_case(
    "batch_norm_no_running_eval",
    lambda: nn.BatchNorm1d(3, track_running_stats=False).eval(),
    _x(4, 3),
)
_case(
    "batch_norm_cumulative_eval",
    lambda: _used(nn.BatchNorm1d(3, momentum=None), 4, 3).eval(),
    _x(4, 3),
)
_case("instance_norm_plain", lambda: nn.InstanceNorm1d(3), _x(2, 3, 4))
_case(
    "instance_norm_eval",
    lambda: _used(nn.InstanceNorm1d(3, track_running_stats=True), 2, 3, 4).eval(),
    _x(2, 3, 4),
)
_case("layer_norm", lambda: nn.LayerNorm([3, 4]), _x(2, 3, 4))
_case("layer_norm_no_bias", lambda: nn.LayerNorm(4, bias=False), _x(2, 3, 4))
_case("layer_norm_plain", lambda: nn.LayerNorm(4, elementwise_affine=False), _x(2, 4))
_case("layer_norm_constant_row", lambda: nn.LayerNorm(3, eps=0.01), torch.ones(2, 3).double())
_case("group_norm", lambda: nn.GroupNorm(2, 4), _x(2, 4, 3))
_case("group_norm_plain", lambda: nn.GroupNorm(1, 4, affine=False), _x(2, 4, 2, 2))
_case("rms_norm", lambda: nn.RMSNorm(4), _x(2, 3, 4))
_case("rms_norm_plain", lambda: nn.RMSNorm([3, 4], 0.1, elementwise_affine=False), _x(2, 3, 4))
_case("local_response_norm", lambda: nn.LocalResponseNorm(3), _x(1, 4, 3, 2))

# Activations.

for _activation in (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.GLU,
):  # fmt: skip
    _case(_activation.__name__, _activation, _x(3, 4))
_case("GELU_tanh", lambda: nn.GELU("tanh"), _x(3, 4))
_case("ReLU_inplace", lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), _x(3, 4))
_case("PReLU_channels", lambda: nn.PReLU(3), _x(2, 3, 2))
_case("RReLU_eval", lambda: nn.RReLU().eval(), _x(3, 4))
_case("Threshold", lambda: nn.Threshold(0.1, 20), _x(3, 4))
_case("Softmax", lambda: nn.Softmax(1), _x(3, 4))
_case("Softmin", lambda: nn.Softmin(0), _x(3, 4))
_case("LogSoftmax", lambda: nn.LogSoftmax(1), _x(3, 4))
_case("Softmax2d", nn.Softmax2d, _x(1, 3, 2, 2))

# Resizing.

for _mode, _size in (
    ("nearest", (1, 2, 3)), ("nearest", (1, 2, 3, 4)), ("nearest-exact", (1, 1, 2, 3, 2)),
    ("linear", (1, 2, 5)), ("bilinear", (1, 2, 3, 4)), ("bicubic", (1, 1, 4, 3)),
    ("trilinear", (1, 1, 2, 3, 2)),
):  # fmt: skip
    _case(
        f"upsample_{_mode}_{len(_size) - 2}d",
        lambda mode=_mode: nn.Upsample(scale_factor=1.7, mode=mode),
        _x(*_size),
    )
_case(
    "upsample_corners",
    lambda: nn.Upsample((5, 2), mode="bilinear", align_corners=True),
    _x(1, 2, 3, 4),
)
_case("upsample_twice", lambda: nn.UpsamplingNearest2d(scale_factor=2), _x(1, 2, 3, 2))

# Embeddings and distances.

_INDICES = torch.tensor([[0, 1, 1], [4, 2, 1]])
_case("embedding", lambda: nn.Embedding(5, 3), _INDICES)
_case("embedding_padding", lambda: nn.Embedding(5, 3, padding_idx=1), _INDICES)
for _mode in ("sum", "mean", "max"):
    _case(
        f"embedding_bag_{_mode}",
        lambda mode=_mode: nn.EmbeddingBag(5, 3, mode=mode, padding_idx=2),
        _INDICES.flatten(),
        torch.tensor([0, 2, 2]),
    )
_case("cosine_similarity", lambda: nn.CosineSimilarity(dim=0), _x(3, 4), _x(3, 1))
_case("pairwise_distance", lambda: nn.PairwiseDistance(3, keepdim=True), _x(3, 4), _x(4))

# Parametrisations; spectral norm's vectors are buffers that a call in train mode changes.

_parametrize = nn.utils.parametrizations
_case("weight_norm", lambda: _parametrize.weight_norm(nn.Linear(3, 2)), _x(4, 3))
_case("weight_norm_conv", lambda: _parametrize.weight_norm(nn.Conv1d(2, 2, 2), dim=1), _x(1, 2, 4))
_case("spectral_norm", lambda: _parametrize.spectral_norm(nn.Linear(3, 2)), _x(4, 3))
_case("spectral_norm_eval", lambda: _parametrize.spectral_norm(nn.Linear(3, 2)).eval(), _x(4, 3))
_case(
    "orthogonal",
    lambda: _parametrize.orthogonal(nn.Linear(3, 2), orthogonal_map="householder"),
    _x(4, 3),
)
_case(
    "orthogonal_exp",
    lambda: _parametrize.orthogonal(nn.Linear(3, 3), orthogonal_map="matrix_exp"),
    _x(4, 3),
)
_case(
    "orthogonal_cayley",
    lambda: _parametrize.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley"),
    _x(4, 3),
)


# torch has no second derivative of hardsigmoid, and that of its fused weight norm is wrong: it
# takes the norm for a constant.
_FIRST_ORDER = {"Hardsigmoid", "weight_norm", "weight_norm_conv"}
_FIRST_ORDER |= {"orthogonal_exp"}  # slow to compile; the exponential has a test of its own
# Layers that are linear in their only input have no second derivatives.
_LINEAR = ("_pad", "upsample", "shuffle", "avg", "fold", "flatten", "identity", "max_unpool")
_FIRST_ORDER |= {name for name in _CASES if any(part in name for part in _LINEAR)}


@pytest.mark.parametrize("name", _CASES)
def test_layer(name):
    factory, inputs = _CASES[name]
    check_module(factory, *inputs, order=1 if name in _FIRST_ORDER else 2)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_weight_norm_by_a_hook():
    check_module(lambda: nn.utils.weight_norm(nn.Linear(3, 2)), _x(4, 3), order=1)


def test_spectral_norm_by_a_hook():
    check_module(lambda: nn.utils.spectral_norm(nn.Linear(3, 2)), _x(4, 3))


def test_tied_parameters_get_the_sum_of_their_gradients():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(3, 3), nn.Linear(3, 3)
            self.decode.weight = self.encode.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.decode(torch.tanh(self.encode(x)))

    check_module(Tied, _x(2, 3))
