"""Softmax, normalisation and embeddings against torch, at their special points too."""

import jax
import numpy as np
import pytest
import torch
from jax.test_util import check_grads
from support import check, run_in_jax, to_array
from torch import nn
from torch.nn import functional as F

from jaxmeta_bridge import UnsupportedOpError, from_torch, tensor_to_jax


def _x(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _with_infinities() -> torch.Tensor:
    """The first row has one entry of minus infinity, the second nothing else."""
    x = _x(3, 4)
    x[0, 1] = -torch.inf
    x[1] = -torch.inf
    return x


@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_softmax(function):
    check(lambda x: function(x, 0), _x(3, 2, 2))
    check(lambda x: function(x, -1), _with_infinities()[::2])
    check(lambda x: function(x, -1), _with_infinities(), order=1)
    check(lambda x: function(x, 0), _x())
    check(lambda x: function(x, 1), _x(2, 0))


def test_softmax_that_may_see_nothing():
    check(lambda x: torch.ops.aten._safe_softmax(x, 1), _with_infinities())


def test_softmax_in_half_precision():
    x = _x(3, 5).bfloat16()
    check(lambda x: F.softmax(x, 1), x, order=1)
    check(lambda x: F.log_softmax(x, 1, dtype=torch.float32), x, order=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_in_half_precision(dtype):
    # Far from zero the mean, if rounded to half precision, would spoil the differences to it;
    # torch's own gradient suffers from that, so the reference is float64.
    x = (_x(2, 8) + 64).to(dtype)
    exact = x.double().requires_grad_()
    (expected,) = torch.autograd.grad((F.layer_norm(exact, (8,)) ** 3).sum(), exact)

    function = from_torch(lambda x: F.layer_norm(x, (8,)))
    gradient = jax.grad(lambda x: (function(x).astype("float32") ** 3).sum())(to_array(x))
    assert gradient.dtype == to_array(x).dtype
    np.testing.assert_allclose(gradient.astype("float32"), expected, rtol=0.02, atol=0.02)


def test_rows_without_variance():
    constant = torch.full((2, 3, 4), 2.0, dtype=torch.float64)
    check(lambda x: F.layer_norm(x, (4,), eps=0.1), constant)
    check(lambda x: F.group_norm(x, 3, eps=0.1), constant)
    check(lambda x: F.rms_norm(x, (4,), eps=0.1), 0 * constant)
    check(lambda x: F.normalize(x, dim=-1), torch.cat([_x(2, 1, 4), 0 * constant], 1), order=1)


def test_layer_norm_statistics_have_no_gradient():
    check(lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5), _x(3, 4), order=1)


# Batch norm.


def _batch_norm(x, mean, var):
    mean, var = mean.clone(), var.clone()  # changed in place
    return F.batch_norm(x, mean, var, training=True, momentum=0.3), mean, var


def test_running_variance_is_unbiased_and_a_single_value_has_none():
    mean, var = _x(2), _x(2) ** 2
    check(_batch_norm, _x(3, 2, 2), mean, var, wrt=[0])
    check(_batch_norm, _x(2, 2), mean, var, wrt=[0])


def test_running_statistics_of_half_precision_stay_in_float32():
    f = from_torch(nn.BatchNorm1d(2))
    x = tensor_to_jax((_x(64, 2) + 100).bfloat16())
    outputs, buffers = f(f.params, f.buffers, x)
    assert str(outputs.dtype) == "bfloat16"
    assert str(buffers["running_mean"].dtype) == "float32"
    exact = 0.1 * np.asarray(x, np.float64).mean(0)
    np.testing.assert_allclose(buffers["running_mean"], exact, rtol=1e-5)


def test_batch_norm_carried_over_steps():
    module = nn.BatchNorm2d(2, momentum=0.5)
    f = from_torch(module)
    buffers = f.buffers
    for seed in range(3):
        x = _x(2, 2, 3, 3, seed=seed).float()
        module(x)
        _, buffers = f(f.params, buffers, tensor_to_jax(x))
    for name, buffer in module.named_buffers():
        np.testing.assert_allclose(buffers[name], buffer, rtol=1e-5)


# Weight norm: torch's second derivative takes the norm for a constant and is wrong.


def test_second_gradient_of_weight_norm():
    with jax.enable_x64(True):
        function = from_torch(lambda v, g: torch.ops.aten._weight_norm(v, g, 0))
        check_grads(function, (to_array(_x(2, 3)), to_array(_x(2, 1))), order=2, modes=["rev"])


# Embeddings.

_INDICES = torch.tensor([[0, 1], [1, 4]])


def test_padding_row_gets_no_gradient():
    check(lambda w: F.embedding(_INDICES, w, padding_idx=1) ** 2, _x(5, 3))
    check(lambda w: F.embedding(_INDICES, w, padding_idx=-1) ** 2, _x(5, 3))


def test_an_index_outside_of_the_table_gives_nan():
    for index in (5, -1):  # torch raises for both
        (rows,) = run_in_jax(F.embedding, torch.tensor([index, 0]), _x(5, 3))
        assert np.isnan(rows[0]).all()
        assert np.isfinite(rows[1]).all()


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse"])
def test_options_that_change_the_gradient_are_refused(option):
    layer = nn.Embedding(5, 3)
    setattr(layer, option, True)
    f = from_torch(layer)
    with pytest.raises(UnsupportedOpError, match=f"{option}=True.*{option}=False"):
        f(f.params, f.buffers, tensor_to_jax(_INDICES, int64="int32"))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bag(mode):
    # Equal rows, so that the maximum is reached twice; an empty bag; a padding index.
    weight = torch.cat([_x(3, 2), _x(3, 2)])
    indices, offsets = torch.tensor([0, 3, 1, 5, 2, 2]), torch.tensor([0, 2, 2, 5, 6])

    def bag(weight, **options):
        return F.embedding_bag(indices, weight, offsets, mode=mode, **options)

    check(lambda w: bag(w, padding_idx=1), weight, order=1)
    check(lambda w: bag(w, include_last_offset=True), weight, order=1)
    check(lambda w: F.embedding_bag(_INDICES, w, mode=mode), weight, order=1)


def test_weighted_embedding_bag():
    indices, offsets = torch.tensor([0, 1, 1]), torch.tensor([0, 1])

    def bag(weight, scale):
        return F.embedding_bag(indices, weight, offsets, per_sample_weights=scale, mode="sum")

    check(bag, _x(5, 3), _x(3), order=1)
    with jax.enable_x64(True):
        check_grads(from_torch(bag), (to_array(_x(5, 3)), to_array(_x(3))), order=2, modes=["rev"])
