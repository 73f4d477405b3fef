"""Scripts at the limits: right, or refused with an error that says so; never silently wrong."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import (
    EAGER,
    batch,
    gradients,
    network,
    normal,
    quiet,
    read,
    right_or_refused,
    script,
    sgd,
)
from torch import autograd, nn

from jaxmeta_bridge import higher as drop_in

BOTH = pytest.mark.parametrize("peek", [quiet, read], ids=["unread", "read"])
LABELS = torch.tensor([0, 2, 1, 2])


def maml(higher, model, **options):
    return higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **options)


class Reversal(autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return -ctx.scale * grad, None


class Sign(autograd.Function):
    """Straight through: the sign, with the gradient of a clamped identity."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1) * (1 + x)


class Cube(autograd.Function):
    """In the newer form, through NumPy."""

    @staticmethod
    def forward(x):
        return torch.from_numpy(x.detach().numpy() ** 3)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad * 3 * ctx.saved_tensors[0] ** 2


AUTOGRAD_FUNCTIONS = {
    "reversal": lambda out: Reversal.apply(out, 0.5).pow(2).mean() + out.exp().mean(),
    "sign": lambda out: (Sign.apply(out) * out).mean(),
    "NumPy": lambda out: Cube.apply(out).mean(),
}


@BOTH
@pytest.mark.parametrize("cost", AUTOGRAD_FUNCTIONS.values(), ids=AUTOGRAD_FUNCTIONS.keys())
def test_autograd_functions(cost, peek):
    def function(higher, peek):
        model = network(3)
        with maml(higher, model) as (fmodel, diffopt):
            loss = cost(fmodel(normal(4, 3)))
            peek(loss)
            diffopt.step(loss)
            meta = cost(fmodel(normal(4, 3, seed=1)))
        meta.backward()
        return loss, meta, gradients(model)

    right_or_refused(function, peek)


# Each takes the outputs (4, 3) and gives a scalar.
RARE = {
    "fft": lambda out: torch.fft.rfft(out, dim=0).abs().square().sum(),
    "fft 2d": lambda out: torch.fft.ifft2(torch.fft.fft2(out) * (1 + 1j)).real.pow(3).sum(),
    "lstsq": lambda out: torch.linalg.lstsq(out, normal(4, 1)).solution.pow(2).sum(),
    "pinv": lambda out: torch.linalg.pinv(out + torch.eye(4, 3)).pow(2).sum(),
    "svdvals": lambda out: torch.linalg.svdvals(out).log().sum(),
    "qr": lambda out: torch.linalg.qr(out).R.pow(2).sum(),
    "eigh": lambda out: torch.linalg.eigvalsh(out.T @ out).exp().sum(),
    "matrix exp": lambda out: torch.matrix_exp(out[:3]).sum(),
    "bessel": lambda out: torch.special.i0(out).sum(),
    "polygamma": lambda out: torch.polygamma(1, out.exp()).sum(),
    "zeta": lambda out: torch.special.entr(out.sigmoid()).sum() + torch.sinc(out).sum(),
    "cummax": lambda out: out.cummax(0).values.pow(2).sum() + out.logcumsumexp(1).sum(),
    "kthvalue": lambda out: out.kthvalue(2, dim=0).values.pow(2).sum() + out.median().exp(),
    "renorm": lambda out: out.renorm(2, 0, 0.5).pow(3).sum(),
    "fold": lambda out: F.fold(out.view(1, 4, 3)[..., :1], (2, 2), (2, 2)).pow(2).sum(),
    "unpool": lambda out: (
        F.max_unpool1d(*F.max_pool1d(out[None, :, :2], 2, return_indices=True), [2]).pow(2).sum()
    ),
    "stft": lambda out: (
        torch.stft(out.flatten(), 4, window=torch.ones(4, dtype=out.dtype), return_complex=True)
        .abs()
        .square()
        .sum()
    ),
    "grid_sample": lambda out: F.grid_sample(
        normal(1, 1, 3, 3), out[:, :2].tanh().view(1, 2, 2, 2), align_corners=True
    ).sum(),
    "jagged": lambda out: (
        nn.utils.rnn.pack_padded_sequence(
            out[None].repeat(2, 1, 1), torch.tensor([4, 2]), batch_first=True
        )
        .data.pow(2)
        .sum()
    ),
    "sparse": lambda out: (
        torch.sparse.mm(torch.eye(4, dtype=out.dtype).to_sparse(), out).pow(2).sum()
    ),
    "to_sparse": lambda out: torch.sparse.sum(out.to_sparse() * 2).pow(2),
}


@pytest.mark.parametrize("cost", RARE.values(), ids=RARE.keys())
def test_rare_operations(cost):
    def function(higher, peek):
        model = network(3)
        with maml(higher, model) as (fmodel, diffopt):
            loss = cost(fmodel(normal(4, 3)))
            peek(loss)
            diffopt.step(0.1 * loss)
            meta = fmodel(normal(4, 3)).pow(2).mean() + 0.1 * cost(fmodel(normal(4, 3)))
        meta.backward()
        return loss, meta, gradients(model)

    right_or_refused(function)


def margins(out):
    rest = (1 - out.gather(1, LABELS[:, None]) + out).clamp(min=0)
    return rest.masked_fill(F.one_hot(LABELS, 3) > 0, 0).sum(1).mean() / 3


def distances(one, other):
    return (one[:, None] - other).pow(2).sum(-1).sqrt()


# What torch differentiates only once, and the same written out.
ONCE_ONLY = {
    "cdist": (
        lambda out: torch.cdist(out, normal(3, 3)).sum(),
        lambda out: distances(out, normal(3, 3)).sum(),
    ),
    "pdist": (
        lambda out: torch.pdist(out).sum(),
        lambda out: sum(distances(out[i : i + 1], out[i + 1 :]).sum() for i in range(3)),
    ),
    "multi margin": (lambda out: F.multi_margin_loss(out, LABELS), margins),
    "bag": (
        lambda out: F.embedding_bag(LABELS[None], out, mode="mean").pow(2).sum(),
        lambda out: out[LABELS].mean(0).pow(2).sum(),
    ),
    "attention": (
        lambda out: F.scaled_dot_product_attention(*3 * [out[None, None]]).pow(2).sum(),
        lambda out: ((out @ out.T / 3**0.5).softmax(-1) @ out).pow(2).sum(),
    ),
}


@pytest.mark.parametrize("used, written_out", ONCE_ONLY.values(), ids=ONCE_ONLY.keys())
def test_operations_that_torch_differentiates_only_once(used, written_out):
    def function(higher, peek):
        cost = written_out if higher is EAGER else used
        model = network(3)
        with maml(higher, model) as (fmodel, diffopt):
            loss = cost(fmodel(normal(4, 3)))
            diffopt.step(0.1 * loss)
            meta = fmodel(normal(4, 3)).pow(2).mean() + 0.1 * cost(fmodel(normal(4, 3)))
        meta.backward()
        return loss, meta, gradients(model)

    right_or_refused(function)


def grad_of_a_function(fmodel, x):
    return torch.func.grad(lambda t: fmodel(t).pow(2).sum())(x).pow(2).sum()


def vmap_over_rows(fmodel, x):
    return torch.func.vmap(lambda row: fmodel(row[None]).tanh().sum())(x).prod()


def vmap_over_weights(fmodel, x):
    """Per-example gradients of the fast weights."""
    weights = dict(fmodel.named_parameters())
    apart = network(3)

    def cost(weights, row):
        return torch.func.functional_call(apart, weights, (row[None],)).pow(2).sum()

    found = torch.func.vmap(torch.func.grad(cost), in_dims=(None, 0))(weights, x)
    return sum(g.pow(2).mean() for g in found.values())


def jacobian(fmodel, x):
    rows = autograd.functional.jacobian(lambda t: fmodel(t).sum(0), x, create_graph=True)
    return rows.abs().sum()


def jvp(fmodel, x):
    return torch.func.jvp(fmodel, (x,), (torch.ones_like(x),))[1].pow(2).sum()


def batched_gradients(fmodel, x):
    out = fmodel(x).sum(0)
    weight = next(fmodel.parameters())
    (rows,) = autograd.grad(
        out, weight, torch.eye(3, dtype=x.dtype), is_grads_batched=True, create_graph=True
    )
    return rows.pow(2).sum()


def checked_for_anomalies(fmodel, x):
    with autograd.set_detect_anomaly(True, check_nan=False):
        return fmodel(x).pow(2).sum()


FUNCTIONAL = [
    grad_of_a_function,
    vmap_over_rows,
    vmap_over_weights,
    jacobian,
    jvp,
    batched_gradients,
    checked_for_anomalies,
]


@pytest.mark.filterwarnings("ignore:.*(torch.jit.script|Anomaly Detection)")
@pytest.mark.parametrize("cost", FUNCTIONAL)
def test_functional_transformations(cost):
    def function(higher, peek):
        model = network(3)
        x = normal(4, 3)
        with maml(higher, model) as (fmodel, diffopt):
            diffopt.step(fmodel(x).pow(2).mean())
            diffopt.step(0.1 * cost(fmodel, x))
            meta = fmodel(x).pow(2).mean() + 0.1 * cost(fmodel, x)
        meta.backward()
        return meta, gradients(model)

    right_or_refused(function)


@script
def test_gradients_at_kinks_and_ties(higher, peek):
    """All outputs of the first step are exactly zero and equal."""
    model = network(3)
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    with maml(higher, model) as (fmodel, diffopt):
        out = fmodel(normal(4, 3))
        loss = out.relu().sum() + out.abs().sum() + out.clamp(0, 1).sum() + out.amax(0).sum()
        loss = loss + out.max() + out.max(1).values.sum() + out.sort(0).values[0].sum()
        loss = loss + (out**2).sum() + (out + 1).prod() + out.prod() + F.hardtanh(out, 0, 1).sum()
        loss = loss + torch.maximum(out, out.detach()).sum() + F.smooth_l1_loss(out, 0 * out)
        loss = loss + torch.where(out > 0, out, out * 0.1).sum() + out.median() + out.min()
        peek(loss)
        diffopt.step(loss)
        meta = fmodel(normal(4, 3)).pow(2).mean()
    meta.backward()
    return loss, meta, gradients(model)


@script
def test_nan_and_infinity_arrive_as_in_torch(higher, peek):
    model = network(3)
    with maml(higher, model) as (fmodel, diffopt):
        out = fmodel(normal(4, 3))
        safe = torch.where(out > 0, out.clamp(min=1e-3).log(), 0.0).sum()
        diffopt.step(safe)
        out = fmodel(normal(4, 3))
        values = (
            out.log(),
            1 / (out * 0),
            (out * 1e308 * 1e10),
            out.sqrt().nansum(),
            out.exp() ** 999,
        )
        meta = torch.nan_to_num(values[0]).sum()
        peek(*values)
    meta.backward()
    return [v.detach() for v in values], meta, gradients(model)


WRONG_CODE = {
    "shapes": (lambda out: out @ out, RuntimeError),
    "label": (lambda out: F.cross_entropy(out, LABELS + 1), (IndexError, RuntimeError)),
    "index": (lambda out: out[torch.tensor([4])].sum(), (IndexError, RuntimeError)),
    "python index": (lambda out: out[5].sum(), IndexError),
    "gather": (lambda out: out.gather(1, LABELS[:, None] + 1).sum(), (IndexError, RuntimeError)),
    "embedding": (lambda out: F.embedding(LABELS + 3, out).sum(), (IndexError, RuntimeError)),
    "ambiguous": (lambda out: out if out > 0 else -out, RuntimeError),
    "item of many": (lambda out: out.item(), RuntimeError),
    "numpy with grad": (lambda out: out.numpy(), RuntimeError),
    "attribute": (lambda out: out.no_such_thing, AttributeError),
}


@pytest.mark.parametrize("code, errors", WRONG_CODE.values(), ids=WRONG_CODE.keys())
def test_an_error_of_torch_is_still_an_error(code, errors):
    """Raised at the latest when the value is read; afterwards the loop goes on."""
    model = network(3)
    with maml(drop_in, model) as (fmodel, diffopt):
        diffopt.step(fmodel(normal(4, 3)).pow(2).mean())
        with pytest.raises(errors):
            float(code(fmodel(normal(4, 3))).sum().detach())
        diffopt.step(fmodel(normal(4, 3)).pow(2).mean())
        fmodel(batch()[0]).mean().backward()
    assert all(isinstance(g, torch.Tensor) for g in gradients(model))
    assert np.isfinite(sum(float(g.sum()) for g in gradients(model)))


def test_a_norm_at_zero_has_finite_derivatives():
    """Eager torch gives NaN for the second one, in the first step of every proximal term."""
    model = network()
    x, y = batch()
    with maml(drop_in, model) as (fmodel, diffopt):
        start = fmodel.parameters(time=0)
        distance = sum((p - q).norm() for p, q in zip(fmodel.parameters(), start, strict=True))
        diffopt.step(F.mse_loss(fmodel(x), y) + distance)
        F.mse_loss(fmodel(x), y).backward()
    with maml(EAGER, network()) as (without, other):
        other.step(F.mse_loss(without(x), y))
        expected = torch.autograd.grad(F.mse_loss(without(x), y), list(without.parameters(time=0)))
    for got, want in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(got.detach().clone(), want.detach().clone())
