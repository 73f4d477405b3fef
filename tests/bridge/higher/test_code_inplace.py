"""Scripts that change tensors in place: recorded ones, ordinary ones, and what was passed in."""

# Every loop of these scripts runs at least once.
# pyright: reportPossiblyUnboundVariable=false

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import EAGER, batch, check, gradients, network, normal, quiet, read, script, sgd
from torch import autograd, nn


def maml(higher, model, **options):
    return higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **options)


def zeros(*shape):
    return torch.zeros(*shape, dtype=torch.float64)


MASK = torch.tensor([[True, False], [False, True], [True, True]])


def through_a_flat_view(t):
    flat = t.view(-1)
    flat += 1
    flat[2:4] *= 3
    return t


def base_under_a_view(t):
    row = t[0]
    t.mul_(2)
    return row


def through_nested_views(t):
    t.T[1].narrow(0, 1, 2).mul_(5)
    return t


def a_view_made_before(t):
    column = t[:, 0]
    t[1:] += column[0]
    column.neg_()
    return t + column[:, None]


def a_diagonal(t):
    t[:2].diagonal().fill_(0.5)
    return t


def swapped_rows(t):
    t[[0, 1]] = t[[1, 0]]
    return t


def outside_autograd(t):
    with torch.no_grad():
        t.mul_(2)
    return t


def through_data(t):
    t.data.mul_(2)
    return t


def through_detach(t):
    t.detach().add_(1)
    return t


def assigned_values(t):
    t[0, 0], t[1], t[MASK] = 2.0, t[2] * 3, t[0, 1]
    return t


def shapes_in_place(t):
    return t.unsqueeze_(0).squeeze_(0).t_()


CHANGES = {
    "arithmetic": lambda t: t.add_(1).mul_(t.detach() * 2).sub_(0.5).div_(3),
    "operators": lambda t: t.__iadd__(1).__imul__(2).__itruediv__(3),
    "clamp": lambda t: t.clamp_(min=-0.1),
    "relu": lambda t: F.relu(t, inplace=True),
    "leaky module": lambda t: nn.LeakyReLU(0.2, inplace=True)(t),
    "unary": lambda t: t.neg_().tanh_(),
    "zero": lambda t: t.zero_() + 1,
    "copy": lambda t: t.copy_(normal(3, 2)) * t,
    "fill masked": lambda t: t.masked_fill_(MASK, 0.5),
    "scatter": lambda t: t.scatter_(1, torch.tensor([[0], [1], [0]]), 7.0),
    "index add": lambda t: t.index_add_(0, torch.tensor([0, 2, 0]), 2 * t.detach()),
    "index put": lambda t: t.index_put_((torch.tensor([0, 0]),), t[1] * 2, accumulate=True),
    "lerp, addcmul": lambda t: t.lerp_(normal(3, 2), 0.3).addcmul_(normal(3, 2), normal(3, 2)),
    "noise": lambda t: t.add_(torch.zeros_like(t).normal_()),
    "flat view": through_a_flat_view,
    "base": base_under_a_view,
    "nested views": through_nested_views,
    "view made before": a_view_made_before,
    "diagonal": a_diagonal,
    "swapped rows": swapped_rows,
    "assigned": assigned_values,
    "shapes": shapes_in_place,
    "no_grad": outside_autograd,
    "data": through_data,
    "detach": through_detach,
}


@pytest.mark.parametrize("peek", [quiet, read], ids=["unread", "read"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_recorded_values_changed_in_place(change, peek):
    def function(higher, peek):
        model = network(2)
        x = normal(3, 3)
        with maml(higher, model) as (fmodel, diffopt):
            out = fmodel(x) * 1.0
            before = out * 3  # keeps what out was
            peek(out)
            changed = change(out)
            peek(out, changed)
            loss = (changed * normal(*changed.shape, seed=1)).sum() + out.sum() + before.mean()
            diffopt.step(loss)
            meta = fmodel(x).pow(2).mean()
        meta.backward()
        return loss, out, changed, before, gradients(model)

    check(function, peek)


@script
def test_sums_in_ordinary_tensors(higher, peek):
    model = network()
    total, running, count = zeros(()), zeros(1), torch.tensor(0)
    single = torch.zeros(())  # float32 beside float64
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(3):
            x, y = batch(seed=i)
            loss = F.mse_loss(fmodel(x), y)
            diffopt.step(loss)
            total += loss
            running.add_(loss.detach(), alpha=0.5)
            single += loss.detach()
            count += (fmodel(x) > 0).sum()
            peek(total, running, count)
    (total / 3).backward()
    return total, running, single, count, gradients(model)


@script
def test_recorded_values_written_into_ordinary_tensors(higher, peek):
    model = network()
    outputs, losses, square = zeros(4, 3), zeros(3), zeros(4, 3)
    weights = zeros(4, 3)
    row = square[1]
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(3):
            x, y = batch(seed=i)
            out = fmodel(x)
            outputs[:, i] = out.squeeze(1)
            loss = F.mse_loss(out, y)
            losses[i] = loss
            square.view(-1)[i] = loss**2
            square[1] += out[0]
            peek(outputs, losses, square)
            diffopt.step(losses[i])
        weights.copy_(next(fmodel.parameters()))
        meta = outputs.var() + losses.sum() + square.sum() + weights.pow(2).sum()
    meta.backward()
    return meta, outputs, losses, square, row.detach(), weights, gradients(model)


@script
def test_moving_averages_and_memory_in_place(higher, peek):
    """A target network and a bank of outputs, kept in ordinary tensors outside the graph."""
    model, target = network(), network()
    average = [p.detach().clone() for p in model.parameters()]
    bank = zeros(2, 4)
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(3):
            x, y = batch(seed=i)
            out = fmodel(x)
            loss = F.mse_loss(out, y) + (out.squeeze(1) - bank.mean(0)).pow(2).sum()
            loss = loss + F.mse_loss(out, target(x).detach())
            diffopt.step(loss)
            for mean, p in zip(average, fmodel.parameters(), strict=True):
                mean.mul_(0.9).add_(p.detach(), alpha=0.1)
            with torch.no_grad():
                for q, p in zip(target.parameters(), fmodel.parameters(), strict=True):
                    q.mul_(0.5).add_(p, alpha=0.5)
            bank[i % 2] = out.detach().squeeze(1)
            peek(bank, *average)
        meta = fmodel(x).pow(2).mean()
    meta.backward()
    return meta, average, bank, gradients(model), list(target.parameters())


@script
def test_reused_input_buffers_in_test_mode(higher, peek):
    """One buffer for all batches, overwritten by torch, by NumPy and through `data`."""
    model = network()
    x, y = zeros(4, 3), zeros(4, 1)
    array = np.zeros((4, 3))
    shared = torch.from_numpy(array)
    with higher.innerloop_ctx(model, sgd(model), track_higher_grads=False) as (fmodel, diffopt):
        outputs = []
        for i in range(3):
            x.copy_(normal(4, 3, seed=i))
            y.data.copy_(normal(4, 1, seed=i))
            array[:] = normal(4, 3, seed=i + 5).numpy()
            loss = F.mse_loss(fmodel(x), y) + fmodel(shared).pow(2).mean()
            outputs.append((fmodel(x) + fmodel(shared)).detach())
            peek(loss)
            diffopt.step(loss)
        x.zero_()
        y.data.zero_()
        array[:] = 0
    return outputs, list(fmodel.parameters())


@pytest.mark.parametrize("peek", [quiet, read], ids=["unread", "read"])
@pytest.mark.parametrize("how", ["torch", "data", "numpy"])
def test_reused_input_buffers_under_tracking(how, peek):
    """Eager torch refuses (or, with `data`, is wrong): the reference is given clones."""

    def function(higher, peek):
        model = network()
        array = np.zeros((4, 3))
        x = torch.from_numpy(array)
        with maml(higher, model) as (fmodel, diffopt):
            for i in range(3):
                values = normal(4, 3, seed=i)
                if how == "numpy":
                    array[:] = values.numpy()
                else:
                    (x if how == "torch" else x.data).copy_(values)
                given = x.clone() if higher is EAGER else x
                loss = F.mse_loss(fmodel(given), normal(4, 1, seed=i))
                peek(loss)
                diffopt.step(loss)
            x.data.zero_()
            meta = F.mse_loss(fmodel(normal(4, 3)), normal(4, 1))
        meta.backward()
        return meta, gradients(model)

    check(function, peek)


@script
def test_the_model_changed_in_place_after_patching(higher, peek):
    """The fast weights are those of the time of patching, whenever they are read."""
    results = []
    for copied in (True, False):
        model = network()
        x, y = batch()
        with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=copied) as (f, opt):
            opt.step(F.mse_loss(f(x), y))
            peek(*f.parameters())
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(1.0)
            model[0].weight.data.zero_()
            opt.step(F.mse_loss(f(x), y))
            meta = F.mse_loss(f(x), y)
        leaves = list(f.parameters(time=0)) if copied else list(model.parameters())
        results.append([autograd.grad(meta, leaves), f(x), list(f.parameters(time=0))])
    return results


@script
def test_options_changed_in_place_after_a_step(higher, peek):
    model = network()
    x, y = batch()
    lr = torch.tensor([0.3], dtype=torch.float64)
    with higher.innerloop_ctx(model, sgd(model), override={"lr": lr}) as (fmodel, diffopt):
        for i in range(3):
            diffopt.step(F.mse_loss(fmodel(x), y))
            if i == 1:
                peek(*fmodel.parameters())
            lr.mul_(0.5)
    return fmodel(x).detach(), [p.detach() for p in fmodel.parameters()]


@script
def test_fast_weights_changed_in_place(higher, peek):
    """Their values change, and their gradients pass as if nothing had."""
    model = network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        first, bias, last, _ = fmodel.parameters()
        first.data.mul_(0.5)
        last.data = last.data.clamp(-0.2, 0.2)
        with torch.no_grad():
            bias += 0.1 * normal(4)
        peek(first, bias)
        out = fmodel(x)
        diffopt.step(F.mse_loss(out, y))
        nn.init.constant_(list(fmodel.parameters())[3], 0.25)
        meta = F.mse_loss(fmodel(x), y)
    meta.backward()
    return meta, out, list(fmodel.parameters(time=1)), gradients(model)


@script
def test_results_written_with_out_and_data(higher, peek):
    model = network()
    x, y = batch()
    room, kept = zeros(4, 1), nn.Parameter(zeros(4, 3))
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        with torch.no_grad():
            torch.mul(fmodel(x), 2.0, out=room)
        kept.data = next(fmodel.parameters()).detach().clone()
        model[0].weight.data.copy_(next(fmodel.parameters()).data)
        peek(kept)
        nn.init.zeros_(kept[0].data)
    return room, kept, model[0].weight
