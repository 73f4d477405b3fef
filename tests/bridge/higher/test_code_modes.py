"""Scripts with no_grad, detach, train and eval, seeds, autocast and every dtype."""

# Every loop of these scripts runs at least once.
# pyright: reportPossiblyUnboundVariable=false

import pytest
import torch
import torch.nn.functional as F
from scripts import batch, check, gradients, network, normal, quiet, read, script, sgd
from torch import autograd, nn

BOTH = pytest.mark.parametrize("peek", [quiet, read], ids=["unread", "read"])


def maml(higher, model, **options):
    return higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **options)


@script
def test_detached_targets(higher, peek):
    """Bootstrapping: the same values, once with and once without a gradient."""
    model = network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(2):
            out = fmodel(x)
            target = y + 0.9 * fmodel(normal(4, 3, seed=i)).detach()
            loss = F.mse_loss(out, target) + (out * out.detach().sign()).mean()
            loss = loss + (out - out.data).exp().mean()  # straight through
            peek(target, loss)
            diffopt.step(loss)
        meta = F.mse_loss(fmodel(x), fmodel(x).detach() + y)
        frozen = [p.detach() for p in fmodel.parameters()]
        pairs = zip(fmodel.parameters(), frozen, strict=True)
        meta = meta + sum((p - q).sum() + (p * q).sum() for p, q in pairs)
    meta.backward()
    assert not any(p.requires_grad for p in frozen) and frozen[0].is_leaf
    return meta, gradients(model)


@script
def test_no_grad_and_enable_grad(higher, peek):
    model = network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        for _ in range(2):
            with torch.no_grad():
                out = fmodel(x)
                scores = out.abs().mean()
                with torch.enable_grad():
                    inner = fmodel(x).pow(2).mean()
            assert not out.requires_grad and not scores.requires_grad and inner.requires_grad
            peek(out, inner)
            diffopt.step(F.mse_loss(fmodel(x), y) + inner * scores)
        torch.set_grad_enabled(False)
        quiet_loss = F.mse_loss(fmodel(x), y)
        torch.set_grad_enabled(True)
        meta = F.mse_loss(fmodel(x), y) * quiet_loss
    meta.backward()

    @torch.no_grad()
    def evaluate():
        return fmodel(x).mean(), (fmodel(x) > 0).double().mean()

    return meta, quiet_loss, evaluate(), gradients(model)


@script
def test_inference_mode(higher, peek):
    model = network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        with torch.inference_mode():
            value = fmodel(x).mean().item()
        meta = F.mse_loss(fmodel(x), y)
        peek(meta)
    meta.backward()
    return value, meta, gradients(model)


@script
def test_a_loop_in_no_grad(higher, peek):
    """A loss made in no_grad has no gradient: step raises, as autograd does."""
    model = network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        with torch.no_grad():
            loss = F.mse_loss(fmodel(x), y)
        with pytest.raises(RuntimeError):
            diffopt.step(loss)
        with torch.no_grad():
            diffopt_loss = F.mse_loss(fmodel(x), y)
            peek(diffopt_loss)
        diffopt.step(F.mse_loss(fmodel(x), y))
    return diffopt_loss, fmodel(x)


def stochastic():
    return nn.Sequential(
        network()[0], nn.BatchNorm1d(4).double(), nn.ReLU(), nn.Dropout(0.5), network()[2]
    )


@script
def test_train_and_eval_with_dropout_and_batch_norm(higher, peek):
    model = stochastic()
    x, y = batch(6)
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(3):
            fmodel.train(i != 1)
            loss = F.mse_loss(fmodel(x), y)
            peek(loss)
            diffopt.step(loss)
            fmodel.eval()
            evaluated = fmodel(x).mean()
        fmodel.train()
        meta = F.mse_loss(fmodel(x), y) + evaluated
    meta.backward()
    statistics = [b.detach() for b in fmodel.buffers()]
    return meta, evaluated, statistics, list(model.buffers()), model.training, gradients(model)


@script
def test_noise_of_every_kind(higher, peek):
    """The draws, and their order, are those of eager torch, whatever is read when."""
    model = network(3)
    own = torch.Generator().manual_seed(5)
    with maml(higher, model) as (fmodel, diffopt):
        for _ in range(2):
            out = fmodel(torch.randn(4, 3, dtype=torch.float64))
            noisy = out + 0.1 * torch.randn_like(out) + 0.1 * torch.rand(out.shape)
            peek(noisy)
            noisy = F.dropout(noisy, 0.3) + torch.randn(4, 1, generator=own)
            order = torch.randperm(len(noisy))
            cut = torch.bernoulli(torch.full_like(noisy, 0.7))
            hard = F.gumbel_softmax(noisy, tau=0.8, hard=True)
            mixed = torch.distributions.Beta(2.0, 2.0).sample()
            uniform = torch.empty_like(noisy).uniform_(-1, 1)
            loss = (noisy[order] * cut).pow(2).mean() * mixed + (hard * noisy * uniform).sum()
            diffopt.step(loss + F.alpha_dropout(noisy, 0.2, training=True).mean())
        sample = torch.multinomial(fmodel(normal(4, 3)).softmax(1), 1)
        meta = F.rrelu(noisy, training=True).gather(1, sample).mean()
    meta.backward()
    return meta, sample, torch.rand(2), own.get_state(), gradients(model)


@script
def test_a_seed_in_the_middle(higher, peek):
    model = stochastic()
    x, y = batch(6)
    results = []
    with maml(higher, model) as (fmodel, diffopt):
        for _ in range(2):
            torch.manual_seed(3)
            out = fmodel(x)
            state = torch.get_rng_state()
            peek(out)
            diffopt.step(F.mse_loss(out, y) + F.mse_loss(fmodel(x), out))
            torch.set_rng_state(state)
            with torch.random.fork_rng():
                results.append(fmodel(x))
            results.append(fmodel(x))
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@BOTH
def test_floating_dtypes(dtype, peek):
    def function(higher, peek):
        model = network(dtype=dtype)
        x, y = (t.to(dtype) for t in batch())
        with maml(higher, model) as (fmodel, diffopt):
            loss = F.mse_loss(fmodel(x), y)
            peek(loss)
            diffopt.step(loss)
            half = fmodel(x) * 0.5 + torch.arange(4)[:, None] + 2**-3
            wide = half.double() + torch.tensor(1.5, dtype=torch.float32)
            meta = wide.mean() + half.float().sum() + half.mean() * torch.tensor(2.0).double()
        meta.backward()
        assert wide.dtype is meta.dtype is torch.float64 and half.dtype is dtype
        narrow = wide.to(dtype), meta.to(dtype)
        return half, narrow, loss, gradients(model), list(fmodel.parameters())

    check(function, peek)


@script
def test_integers_booleans_and_complex_numbers(higher, peek):
    model = network(3)
    with maml(higher, model) as (fmodel, diffopt):
        out = fmodel(normal(4, 3))
        z = torch.complex(out, out.flip(1)) * (1 + 2j)
        diffopt.step(z.abs().square().mean() + (z * z.conj()).real.mean() + z.angle().sin().mean())
        out = fmodel(normal(4, 3))
        label = out.argmax(1)
        positive = out > 0
        count = positive.sum(0) + label.bincount(minlength=3)
        average = count / 4
        byte = positive.to(torch.uint8) * 200 + (out * 10).to(torch.int8) + label[:, None].int()
        peek(label, positive, count, byte, z)
        both = (positive & ~(out > 0.1)) | (label[:, None] == torch.arange(3))
    return label, positive, count, average, byte, both, z, (out * 1e3).long() // 7, -label % 3


@script
def test_promotion_between_recorded_and_ordinary_values(higher, peek):
    """Zero-dimensional tensors and numbers do not promote; vectors do."""
    model = network(dtype=torch.float32)
    x, y = (t.float() for t in batch())
    with maml(higher, model) as (fmodel, diffopt):
        out = fmodel(x)
        loss = F.mse_loss(out, y) * torch.tensor(0.5, dtype=torch.float64)
        assert loss.dtype is torch.float64 and out.dtype is torch.float32
        peek(loss)
        diffopt.step(loss)
        kept = out * torch.tensor(2.0, dtype=torch.float64)
        wider = out * torch.ones(1, dtype=torch.float64)
        meta = wider.mean() * 3
    meta.backward()
    assert wider.dtype is torch.float64 and (out * 2).dtype is torch.float32
    others = out / 3, out * 2, torch.where(out > 0, out, 0.5)
    return loss.float(), kept, wider.float(), others, gradients(model)


@script
def test_the_default_dtype(higher, peek):
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.Sequential(nn.Linear(3, 1))
        x, y = batch()
        with maml(higher, model) as (fmodel, diffopt):
            diffopt.step(F.mse_loss(fmodel(x), y) + torch.tensor(0.5))
            table = fmodel(x).new_tensor([1, 2.5]) + torch.ones(2)
            loss = fmodel(x).mean() + (fmodel(x) > 0).sum() / 3
            peek(loss)
    finally:
        torch.set_default_dtype(torch.float32)
    return table, loss, autograd.grad(loss, list(model.parameters()))


@BOTH
def test_autocast(peek):
    """Matrix products in bfloat16, the rest and the weights in float32."""

    def function(higher, peek):
        model = network(dtype=torch.float32)
        x, y = (t.float() for t in batch())
        with maml(higher, model) as (fmodel, diffopt):
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    out = fmodel(x)
                    product = out @ out.T
                    loss = F.mse_loss(out.float(), y)
                assert out.dtype is torch.bfloat16 and product.dtype is torch.bfloat16
                peek(loss)
                diffopt.step(loss)
            with torch.autocast("cpu", enabled=False):
                meta = F.mse_loss(fmodel(x), y)
        meta.backward()
        # bfloat16 rounds at about 1e-2, and not everyone rounds at the same places
        return [t.detach().bfloat16() for t in (meta, out, *fmodel.parameters())]

    check(function, peek)


@script
def test_noise_in_the_layout_of_a_transposed_value(higher, peek):
    """torch draws `like` a tensor in the order of its memory."""
    model = network(3)
    with maml(higher, model) as (fmodel, diffopt):
        turned = fmodel(normal(4, 3)).t()
        noisy = F.dropout(turned, 0.5) + torch.randn_like(turned) * torch.rand_like(turned)
        noisy = noisy + torch.empty_like(turned).uniform_() + turned.clone().normal_()
        image = turned.reshape(1, 3, 2, 2).to(memory_format=torch.channels_last)
        diffopt.step(noisy.pow(2).mean() + F.dropout(image, 0.5).mean())
        peek(noisy)
    return noisy, turned.stride(), turned.is_contiguous(), fmodel(normal(4, 3))
