"""Attention: fused and with weights, masks, dropout, and the transformer layers."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
from module_support import check_module
from support import check
from torch import nn
from torch.nn import functional as F

from jaxmeta_bridge import from_torch, tensor_to_jax


def _x(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


class _Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


_LOWER = torch.ones(4, 5).tril(1).bool()


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {}),
        (None, {"is_causal": True, "scale": 0.3}),
        (_x(4, 5), {}),  # added to the scores, and differentiated by
        (_LOWER, {}),
        (_LOWER[None, None].expand(2, 1, 4, 5), {}),
    ],
)
def test_fused_attention(mask, options):
    inputs = [_x(2, 2, 4, 3), _x(2, 2, 5, 3), _x(2, 2, 5, 3)]
    check_module(lambda: _Attention(**options), *inputs, *([] if mask is None else [mask]))


def test_query_heads_share_key_heads():
    inputs = [_x(1, 4, 3, 2), _x(1, 2, 3, 2), _x(1, 2, 3, 2)]
    check_module(lambda: _Attention(enable_gqa=True), *inputs)


def test_a_row_that_may_look_nowhere_gives_what_torch_gives():
    mask = torch.ones(4, 4).tril(-1).bool()  # the first row sees nothing
    inputs = [_x(1, 1, 4, 3), _x(1, 1, 4, 3), _x(1, 1, 4, 3)]
    check(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask), *inputs, order=1)


def test_attention_in_half_precision_accumulates_in_float32():
    q, k, v = (_x(1, 1, 8, 16).to(torch.bfloat16) for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    f = from_torch(_Attention())
    actual, _ = f({}, {}, *(tensor_to_jax(t) for t in (q, k, v)))
    assert str(actual.dtype) == "bfloat16"
    np.testing.assert_allclose(np.asarray(actual, np.float64), exact, rtol=2**-7)


# nn.MultiheadAttention.

_PADDING = torch.tensor([[False, False, True], [False, True, True]])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"key_padding_mask": _PADDING},
        {"attn_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True},
        {"attn_mask": torch.ones(4, 3, 3).triu(1).bool(), "key_padding_mask": _PADDING},
    ],
    ids=["plain", "padding", "causal", "both"],
)
def test_multihead_attention(need_weights, options):
    x = _x(2, 3, 4)
    check_module(
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        x, x + 1, x - 1,
        order=1, need_weights=need_weights, **options,
    )  # fmt: skip


def test_multihead_attention_options():
    check_module(
        lambda: nn.MultiheadAttention(
            4, 2, kdim=3, vdim=5, add_bias_kv=True, add_zero_attn=True, bias=False
        ),
        _x(2, 4), _x(3, 3), _x(3, 5),
        average_attn_weights=False,
    )  # fmt: skip


# Transformers. In eval mode torch has fast paths without gradients; they must not be taken.


@pytest.mark.parametrize(("training", "norm_first"), [(True, False), (False, True)])
def test_encoder_layer(training, norm_first):
    check_module(
        lambda: nn.TransformerEncoderLayer(
            4, 2, 5, dropout=0.0, norm_first=norm_first, activation="gelu", batch_first=True
        ).train(training),
        _x(2, 3, 4),
        order=1 if training else 2,
        src_key_padding_mask=_PADDING,
    )


def test_encoder_of_padded_sequences_in_eval_mode():
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True)
        return nn.TransformerEncoder(layer, 2).eval()

    check_module(make, _x(2, 3, 4), order=1, src_key_padding_mask=_PADDING)


def test_decoder_layer():
    check_module(
        lambda: nn.TransformerDecoderLayer(4, 2, 5, dropout=0.0, norm_first=True),
        _x(3, 1, 4), _x(2, 1, 4),
        order=1, tgt_is_causal=True, tgt_mask=nn.Transformer.generate_square_subsequent_mask(3),
    )  # fmt: skip


def test_transformer():
    check_module(
        lambda: nn.Transformer(4, 2, 1, 1, 5, dropout=0.0, batch_first=True),
        _x(2, 3, 4), _x(2, 2, 4),
        order=1,
    )  # fmt: skip


# Dropout of the attention weights.


def test_dropout_of_weights_follows_the_key_and_keeps_the_mean():
    f = from_torch(_Attention(dropout_p=0.25))
    q, k = (tensor_to_jax(torch.zeros(1, 1, 64, 8)) for _ in range(2))
    v = tensor_to_jax(torch.eye(256)[None, None, :64].float())

    def weights(seed):  # all equal before dropout, and read off the value, which is the identity
        return np.asarray(f({}, {}, q, k, v, rng=jax.random.key(seed))[0][0, 0, :, :64])

    np.testing.assert_array_equal(weights(0), weights(0))
    assert np.any(weights(0) != weights(1))
    kept = 1 / 64 / 0.75
    assert np.all(np.isclose(weights(0), kept, rtol=1e-5) | (weights(0) == 0))
    # 4096 draws: six standard deviations of the share that is dropped.
    assert abs((weights(0) == 0).mean() - 0.25) < 6 * (0.25 * 0.75 / 4096) ** 0.5


def test_encoder_layer_with_dropout_is_a_function_of_the_key():
    f = from_torch(nn.TransformerEncoderLayer(8, 2, 8, dropout=0.5))
    x = tensor_to_jax(_x(3, 2, 8).float())

    def loss(params, seed):
        return (f(params, {}, x, rng=jax.random.key(seed))[0] ** 2 * x).sum()

    gradients = [jax.jit(jax.grad(loss))(f.params, seed) for seed in (0, 0, 1)]
    for name, gradient in gradients[0].items():
        np.testing.assert_array_equal(gradient, gradients[1][name])
    assert np.any(gradients[0]["linear1.weight"] != gradients[2]["linear1.weight"])
