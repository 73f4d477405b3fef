"""diffopt.step: what it returns, which parameters it moves, its losses, state and callbacks."""

import copy

import pytest
import torch
from oracle import (
    Net,
    adam,
    at,
    batches,
    close,
    fd,
    leaves,
    normal,
    sgd,
    squared,
    stepped,
    train,
    unroll,
)
from torch import nn

from jaxmeta_bridge import higher

_DATA = batches(3)


def _sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def test_step_returns_all_new_parameters():
    model = Net()
    model.hidden.bias.requires_grad_(False)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    wanted, _, _ = stepped(model, optimizer, _DATA[:1])
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        found = diffopt.step(squared(fmodel, _DATA[0]))
        assert isinstance(found, list)
        close(found, wanted[-1])
        assert all(a is b for a, b in zip(found, fmodel.parameters(), strict=True))


def test_unknown_keywords_are_let_through():
    model = Net()
    wanted, _, _ = stepped(model, _sgd(model), _DATA[:1])
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        close(diffopt.step(squared(fmodel, _DATA[0]), closure=None, epoch=3), wanted[-1])


def test_arguments_of_step_by_position():
    model = Net()
    end = unroll(model, leaves(model), _DATA[:1], sgd(0.3), edit=lambda gs: [2 * g for g in gs])
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        loss, params = squared(fmodel, _DATA[0]), fmodel.parameters()
        found = diffopt.step(loss, params, {"lr": [0.3]}, lambda gs: [2 * g for g in gs])
        close(found, list(end[-1].values()))


def test_plain_tensors_are_the_variables():
    """Steps over label tensors, as energy-based models take them."""
    model, x = Net(), _DATA[0][0]
    energy = nn.Linear(2, 1).double()
    start = {"label": normal(4, 1).requires_grad_()}

    def loss(label):
        return (model(x) * label + label**3 / 9 + energy.weight.sum() * label**2).mean()

    def reference(start):
        for _ in range(2):
            (grad,) = torch.autograd.grad(loss(start), start, create_graph=True)
            start = start - 0.2 * grad
        return start

    label = start["label"]
    wanted = reference(label).square().sum()
    inputs = [label, energy.weight, model.head.weight]
    wanted_grads = torch.autograd.grad(wanted, inputs)

    optimizer = torch.optim.SGD([label], lr=0.2)
    diffopt = higher.get_diff_optim(optimizer, [label])
    with pytest.raises(ValueError, match="params"):
        diffopt.step(loss(label))
    params = [label]
    for _ in range(2):
        params = diffopt.step(loss(params[0]), params=params)
        assert isinstance(params, list) and len(params) == 1
    found = params[0].square().sum()
    close(found, wanted)
    close(torch.autograd.grad(found, inputs), wanted_grads)
    wanted_label = fd(lambda y: reference(y.requires_grad_()).square().sum(), label)
    close(wanted_grads[0], wanted_label, rtol=1e-8)


def test_params_overwrite_those_of_the_model():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = {name: 2 * p for name, p in leaves(model).items()}
    end = unroll(model, made, _DATA[:1], sgd(0.1))[-1]
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        new = list(made.values())
        loss = squared(lambda x: fmodel(x, params=new), _DATA[0])
        close(diffopt.step(loss, params=new), list(end.values()))
        close(fmodel.parameters(), list(end.values()))


def test_the_loss_may_be_any_graph():
    """It reads data that needs gradients, the base weights and another network."""
    model, other = Net(0), Net(1)
    x, y = _DATA[0][0].requires_grad_(), _DATA[0][1]
    inputs = [x, *model.parameters(), *other.parameters()]

    def loss(call, batch):
        penalty = (model.hidden.weight.square().sum() + other(x).abs().mean()) * call(x).sum()
        return ((call(x) - y) ** 2).mean() + penalty / 50

    start = {name: p.clone() for name, p in model.named_parameters()}
    end = unroll(Net(), start, [0, 1], sgd(0.1), loss)[-1]
    wanted = torch.autograd.grad(at(Net(), end, (x, y)), inputs)
    with higher.innerloop_ctx(model, _sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        train(fmodel, diffopt, [0, 1], loss)
        found = torch.autograd.grad(squared(fmodel, (x, y)), inputs)
    x.requires_grad_(False)
    close(found, wanted)


class _Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)
        self.spare = nn.Linear(1, 1)
        self.double()

    def forward(self, x):
        return self.a(x)


def _in_turns(call, batch):
    """The second layer is reached by every second batch only."""
    number, x = batch
    module = getattr(call, "args", [call])[0]
    weight = module.b.weight if number % 2 else 0
    return (call(x) ** 2).mean() + (weight * x).square().mean()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.2),
        lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.2),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    ],
    ids=["SGD", "Adam", "AdamW"],
)
def test_parameters_that_the_loss_does_not_reach_are_skipped(make):
    """No decay, no momentum, no step counted."""
    torch.manual_seed(0)
    model = _Branches()
    data = [(i, normal(3, 2, seed=i)) for i in range(4)]
    optimizer = make(model.parameters())
    wanted, _, _ = stepped(model, optimizer, data, _in_turns)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        for batch, params in zip(data, wanted[1:], strict=True):
            diffopt.step(_in_turns(fmodel, batch))
            close(fmodel.parameters(), params)


@pytest.mark.parametrize("copied", [True, False])
def test_no_gradient_is_none_and_not_zero(copied):
    """An outer optimizer with weight decay would move a weight that has a gradient of zero."""
    torch.manual_seed(0)
    model = _Branches()
    data = [(i, normal(3, 2, seed=i)) for i in (0, 2)]
    with higher.innerloop_ctx(model, _sgd(model), copy_initial_weights=copied) as (f, diffopt):
        train(f, diffopt, data, _in_turns)
        loss = _in_turns(f, data[0])
        targets = list(f.parameters(time=0)) if copied else list(model.parameters())
        reached = [True, True, False, False, False, False]
        found = torch.autograd.grad(loss, targets, allow_unused=True, retain_graph=True)
        assert [grad is not None for grad in found] == reached
        with pytest.raises(RuntimeError):
            torch.autograd.grad(loss, targets, retain_graph=True)
        loss.backward()
        assert [target.grad is not None for target in targets] == reached


def test_loss_that_reaches_no_parameter():
    model = Net()
    wanted, _, _ = stepped(model, _sgd(model, momentum=0.5), _DATA[:2])
    free = torch.ones((), dtype=torch.float64, requires_grad=True)
    with higher.innerloop_ctx(model, _sgd(model, momentum=0.5)) as (fmodel, diffopt):
        diffopt.step(squared(fmodel, _DATA[0]))
        loss = squared(fmodel, _DATA[1])
        before = list(fmodel.parameters())
        after = diffopt.step(free * 2)
        assert len(fmodel._fast_params) == 3
        assert all(a is b for a, b in zip(after, before, strict=True))
        assert all(a is b for a, b in zip(fmodel.parameters(), before, strict=True))
        diffopt.step(loss)  # made before, still good
        close(fmodel.parameters(), wanted[-1])


def test_loss_that_needs_no_gradient():
    model = Net()
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        for loss in (torch.tensor(1.0), squared(fmodel, _DATA[0]).detach()):
            with pytest.raises(RuntimeError):
                diffopt.step(loss)
        close(fmodel.parameters(), list(model.parameters()))


def test_one_loss_for_two_optimizers():
    model = Net()
    optimizers = [torch.optim.SGD(half.parameters(), lr=0.1) for half in (model.hidden, model.head)]
    wanted, _, _ = stepped(model, _sgd(model), _DATA[:1])
    fmodel = higher.monkeypatch(model)
    first, second = (
        higher.get_diff_optim(optimizer, model.parameters(), fmodel) for optimizer in optimizers
    )
    loss = squared(fmodel, _DATA[0])
    start = list(fmodel.parameters())
    first.step(loss)
    close(fmodel.parameters(), [*wanted[-1][:2], *start[2:]])
    new = second.step(loss, params=start)
    close(new, [*start[:2], *wanted[-1][2:]])


def test_one_loss_for_two_models():
    one, two = Net(0), Net(1)
    ends = {}
    for number, other in ((0, Net(1)), (1, Net(0))):
        ends[number] = unroll(
            Net(number),
            leaves(Net(number)),
            [_DATA[0]],
            sgd(0.1),
            lambda call, batch, other=other: ((call(batch[0]) - other(batch[0])) ** 2).mean(),
        )[-1]
    with (
        higher.innerloop_ctx(one, _sgd(one)) as (fone, done),
        higher.innerloop_ctx(two, _sgd(two)) as (ftwo, dtwo),
    ):
        loss = ((fone(_DATA[0][0]) - ftwo(_DATA[0][0])) ** 2).mean()
        done.step(loss)
        dtwo.step(loss)
        close(fone.parameters(), list(ends[0].values()))
        close(ftwo.parameters(), list(ends[1].values()))


def test_state_is_resumed_and_the_given_optimizer_stays_as_it_is():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True)
    for batch in _DATA[:2]:
        optimizer.zero_grad()
        squared(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    before = copy.deepcopy(optimizer.state_dict())
    wanted, _, _ = stepped(model, optimizer, _DATA)

    state = {
        name: {k: v.clone() for k, v in optimizer.state[p].items()}
        for name, p in model.named_parameters()
    }
    start = leaves(model)
    end = unroll(model, start, _DATA, adam(0.1, amsgrad=True), state=state)[-1]
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), wanted[-1], rtol=1e-12, atol=1e-13)
        squared(fmodel, _DATA[0]).backward()
    wanted_grads = torch.autograd.grad(at(model, end, _DATA[0]), list(start.values()))
    close([p.grad for p in model.parameters()], wanted_grads)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, values in before["state"].items():
        close(after["state"][index], values, rtol=0, atol=0)


def test_a_fresh_optimizer_stays_fresh():
    model = Net()
    optimizer = _sgd(model, momentum=0.5)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        diffopt.param_groups[0]["lr"] = 7.0
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["params"][0] is model.hidden.weight


def test_momentum_of_a_stepped_sgd():
    model = Net()
    optimizer = _sgd(model, momentum=0.5)
    squared(model, _DATA[2]).backward()
    optimizer.step()
    wanted, _, _ = stepped(model, optimizer, _DATA)
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), wanted[-1])


def test_adapting_the_head_alone():
    model = Net()
    start = leaves(model)
    rules = {"head.weight": sgd(0.1), "head.bias": sgd(0.1)}
    end = unroll(model, start, _DATA, rules)[-1]
    wanted = torch.autograd.grad(at(model, end, _DATA[0]), list(start.values()))
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        body = list(fmodel.parameters())[:2]
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), list(end.values()))
        assert all(a is b for a, b in zip(body, fmodel.parameters(), strict=False))
        close(torch.autograd.grad(squared(fmodel, _DATA[0]), list(model.parameters())), wanted)


def test_reference_parameters_must_hold_the_optimizers():
    model = Net()
    with pytest.raises(ValueError, match="reference"):
        higher.get_diff_optim(_sgd(model), model.head.parameters())
