"""Scripts that ask for gradients themselves, inside the loop and of the meta-loss."""

# Every loop of these scripts runs at least once.
# pyright: reportPossiblyUnboundVariable=false

import pytest
import torch
import torch.nn.functional as F
from scripts import (
    batch,
    check,
    gradients,
    network,
    normal,
    read,
    right_or_refused,
    script,
    sgd,
)
from torch import autograd, nn


def mse(fmodel, seed=0):
    x, y = batch(seed=seed)
    return F.mse_loss(fmodel(x), y)


def maml(higher, model, **options):
    return higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **options)


@script
def test_updates_by_hand(higher, peek):
    """The gradients of torch.autograd.grad, put back in all three ways."""
    model = network()
    lr = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    with maml(higher, model) as (fmodel, _):
        for i in range(2):
            loss = mse(fmodel, i)
            grads = autograd.grad(loss, fmodel.parameters(), create_graph=True)
            peek(loss, *grads)
            fmodel.update_params(
                [p - lr * g for p, g in zip(fmodel.parameters(), grads, strict=True)]
            )
        grads = autograd.grad(mse(fmodel), list(fmodel.fast_params), create_graph=True)
        fmodel.fast_params = [p - lr * g for p, g in zip(fmodel.fast_params, grads, strict=True)]
        weights = list(fmodel.parameters())
        for i in range(2):
            x, y = batch(seed=i)
            loss = F.mse_loss(fmodel(x, params=weights), y)
            grads = autograd.grad(loss, weights, create_graph=True)
            peek(*weights)
            weights = [p - lr * g.clamp(-0.3, 0.3) for p, g in zip(weights, grads, strict=True)]
        meta = F.mse_loss(fmodel(x, params=weights), y)
    meta.backward()
    return meta, lr.grad, gradients(model), weights


@script
def test_gradients_by_hand_beside_steps(higher, peek):
    """A step of the optimizer, an update by hand, and a step again, with momentum kept."""
    model = network()
    opt = sgd(model, momentum=0.9)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        grads = autograd.grad(mse(fmodel, 1), fmodel.parameters(), create_graph=True)
        pairs = zip(fmodel.parameters(), grads, strict=True)
        new = [p - 0.1 * g.sign() * g.abs().sqrt() for p, g in pairs]
        peek(*new)
        fmodel.update_params(new)
        diffopt.step(mse(fmodel, 2))
        meta = mse(fmodel, 3)
    meta.backward()
    return meta, gradients(model), list(fmodel.parameters(time=2))


@script
def test_a_gradient_penalty_in_the_inner_loss(higher, peek):
    model = network()
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(2):
            x = normal(4, 3, seed=i).requires_grad_()
            out = fmodel(x)
            (slope,) = autograd.grad(out.sum(), x, create_graph=True)
            peek(slope)
            penalty = (slope.norm(2, dim=1) - 1).pow(2).mean()
            diffopt.step(out.mean() + 0.5 * penalty)
        x = normal(4, 3, seed=5).requires_grad_()
        meta = fmodel(x).pow(2).mean()
    meta.backward()
    return meta, x.grad, gradients(model)


@script
def test_matching_of_two_gradients(higher, peek):
    """Data distillation: synthetic inputs whose gradient is to be that of the data."""
    model = network()
    x, y = batch()
    synthetic = normal(2, 3, seed=1).requires_grad_()
    targets = normal(2, 1, seed=2).requires_grad_()
    with maml(higher, model) as (fmodel, diffopt):
        distance = torch.zeros((), dtype=torch.float64)
        for _ in range(2):
            real = autograd.grad(F.mse_loss(fmodel(x), y), fmodel.parameters())
            assert not any(g.requires_grad for g in real)
            loss = F.mse_loss(fmodel(synthetic), targets)
            made = autograd.grad(loss, fmodel.parameters(), create_graph=True)
            peek(loss, *made)
            for a, b in zip(real, made, strict=True):
                distance = distance + (a - b).pow(2).sum()
                distance = distance + 1 - F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
            diffopt.step(loss)
    distance.backward()
    return distance, synthetic.grad, targets.grad, gradients(model)


def scaled(grads):
    return [g * 2.0 for g in grads]


def clipped(grads):
    norm = torch.norm(torch.stack([torch.norm(g.detach(), 2) for g in grads]), 2)
    scale = 0.3 / (norm + 1e-6)
    return [g.mul(scale) if scale < 1 else g for g in grads]


def with_none(grads):
    return [None if i == 1 else g for i, g in enumerate(grads)]


def centred(grads):
    return tuple(g - g.mean(0, keepdim=True) if g.dim() > 1 else g.detach() for g in grads)


@pytest.mark.parametrize("callback", [scaled, clipped, with_none, centred])
def test_gradient_callbacks(callback):
    def function(higher, peek):
        model = network()
        with maml(higher, model) as (fmodel, diffopt):
            for i in range(2):
                diffopt.step(mse(fmodel, i), grad_callback=callback)
                peek(*fmodel.parameters())
            meta = mse(fmodel, 3)
        meta.backward()
        return meta, gradients(model)

    check(function)
    check(function, read)


@script
def test_second_derivatives_of_the_meta_loss(higher, peek):
    model = network()
    weights = list(model.parameters())
    lr = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    with maml(higher, model, override={"lr": lr}) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        meta = mse(fmodel, 1)
    wanted = [*weights, lr]
    first = autograd.grad(meta, wanted, create_graph=True)
    peek(meta, *first)
    direction = [normal(*p.shape, seed=i) for i, p in enumerate(wanted)]
    product = autograd.grad(first, wanted, grad_outputs=direction, retain_graph=True)
    torch.stack([g.pow(2).sum() for g in first]).sum().backward()
    return meta, first, product, gradients(model), lr.grad


@script
def test_many_tasks_into_one_gradient(higher, peek):
    """Backward once a task, clipping, and Adam outside; two outer steps."""
    model = network()
    outer = torch.optim.Adam(model.parameters(), lr=0.01)
    seen = []
    for outer_step in range(2):
        outer.zero_grad(set_to_none=bool(outer_step))
        for task in range(3):
            with maml(higher, model) as (fmodel, diffopt):
                for _ in range(2):
                    loss = mse(fmodel, task)
                    peek(loss)
                    diffopt.step(loss)
                (mse(fmodel, 10 + task) / 3).backward()
        peek(*gradients(model))
        seen.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05))
        outer.step()
    return seen, list(model.parameters()), gradients(model)


@script
def test_the_outer_optimizer_inside_the_block(higher, peek):
    model = network()
    outer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i in range(2):
        with maml(higher, model) as (fmodel, diffopt):
            diffopt.step(mse(fmodel, i))
            outer.zero_grad()
            meta = mse(fmodel, i + 1)
            meta.backward()
            outer.step()
            peek(*model.parameters())
            after = mse(fmodel, i + 1)  # of the fast weights, which the outer step leaves alone
    return meta, after, list(model.parameters())


@script
def test_gradients_written_by_hand(higher, peek):
    """First-order MAML and its relatives: fast-weight gradients put into the model's `grad`."""
    model = network()
    outer = torch.optim.SGD(model.parameters(), lr=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for task in range(2):
        with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
            diffopt.step(mse(fmodel, task))
            found = autograd.grad(mse(fmodel, task + 5), fmodel.parameters(), allow_unused=True)
            peek(*found)
            for p, g in zip(model.parameters(), found, strict=True):
                p.grad += g
            for p, fast in zip(model.parameters(), fmodel.parameters(), strict=True):
                p.grad.data.add_(p.data - fast.data, alpha=0.1)  # Reptile
    kept = [p.grad.clone() for p in model.parameters()]
    outer.step()
    return kept, list(model.parameters())


@script
def test_kept_graphs_and_several_outer_losses(higher, peek):
    model = network()
    with maml(higher, model) as (fmodel, diffopt):
        inner = mse(fmodel)
        diffopt.step(inner)
        one, two = mse(fmodel, 1), fmodel(batch()[0]).mean()
    first = autograd.grad(one, model.parameters(), retain_graph=True)
    peek(*first)
    second = autograd.grad([one, two], list(model.parameters()), retain_graph=True)
    one.backward(retain_graph=True)
    two.backward(torch.tensor(2.0, dtype=torch.float64), retain_graph=True)
    torch.autograd.backward([one, inner], inputs=[model[0].weight])
    return first, second, gradients(model)


@script
def test_retained_gradients_of_fast_weights(higher, peek):
    model = network()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        weights = list(fmodel.parameters())
        for p in weights:
            p.retain_grad()
        x, y = batch(seed=1)
        hidden = fmodel(x)
        hidden.retain_grad()
        meta = F.mse_loss(hidden, y)
        peek(meta)
    meta.backward()
    return [p.grad for p in weights], hidden.grad, gradients(model)


@script
def test_gradients_on_copied_initial_weights(higher, peek):
    model = network()
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        start = list(fmodel.parameters(time=0))
        diffopt.step(mse(fmodel))
        peek(*fmodel.parameters())
        meta = mse(fmodel, 1)
    (through,) = autograd.grad(meta, start[0], retain_graph=True)
    meta.backward()
    return through, [p.grad for p in start], gradients(model)


@script
def test_gradient_hooks_on_parameters(higher, peek):
    model = network()
    seen = []
    handles = [p.register_hook(lambda g: seen.append(g) or 2 * g) for p in model.parameters()]
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(mse(fmodel))
        meta = mse(fmodel, 1)
        peek(meta)
    meta.backward()
    for handle in handles:
        handle.remove()
    return seen, gradients(model)


def test_gradient_hooks_on_values_in_the_loop():
    def function(higher, peek):
        model = network()
        seen = []
        with maml(higher, model) as (fmodel, diffopt):
            diffopt.step(mse(fmodel))
            out = fmodel(batch()[0])
            out.register_hook(lambda g: seen.append(g) or g.clamp(max=0.1))
            meta = out.pow(2).mean()
        meta.backward()
        return seen, gradients(model)

    right_or_refused(function)


@script
def test_unused_and_unreached(higher, peek):
    """None where nothing is reached; grad_outputs; a value that needs no gradient."""
    model, other = network(), network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        out = fmodel(x)
        peek(out)
    found = autograd.grad(
        out,
        [*model.parameters(), other[0].weight],
        grad_outputs=normal(4, 1),
        allow_unused=True,
        retain_graph=True,
    )
    zeros = autograd.grad(
        out.sum(), [other[0].weight], allow_unused=True, materialize_grads=True, retain_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        out.detach().sum().backward()
    with pytest.raises(RuntimeError, match="scalar outputs"):
        out.backward()
    with pytest.raises(RuntimeError):
        autograd.grad(out.sum(), other[0].weight, retain_graph=True)
    return found, zeros


@script
def test_implicit_hypergradient_by_hand(higher, peek):
    """Neumann series over Hessian-vector products at the adapted weights."""
    model = network()
    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        weights = list(fmodel.parameters())

        def inner():
            return mse(fmodel) + decay * sum(p.pow(2).sum() for p in fmodel.parameters())

        for _ in range(2):
            diffopt.step(inner())
        weights = list(fmodel.parameters())
        vector = autograd.grad(mse(fmodel, 1), weights, retain_graph=True)
        slopes = autograd.grad(inner(), weights, create_graph=True)
        total = [v.clone() for v in vector]
        for _ in range(2):
            product = autograd.grad(slopes, weights, grad_outputs=vector, retain_graph=True)
            vector = [v - 0.1 * h for v, h in zip(vector, product, strict=True)]
            total = [t + v for t, v in zip(total, vector, strict=True)]
            peek(*total)
        (answer,) = autograd.grad(slopes, decay, grad_outputs=[-0.1 * t for t in total])
    return answer
