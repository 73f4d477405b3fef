"""fmodel's parameters: where they start, the list at each time, and the ways to replace them."""

import pytest
import torch
from oracle import Net, at, batches, close, fd, leaves, normal, sgd, squared, stepped, train, unroll
from torch import nn

from jaxmeta_bridge import higher

_DATA = batches(3)


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def _reference(model):
    start = leaves(model)
    history = unroll(model, start, _DATA, sgd(0.1, 0.5))
    return start, history, at(model, history[-1], _DATA[0])


def _lists(history):
    return [list(params.values()) for params in history]


def test_copied_weights_are_leaves_and_take_the_gradient():
    model = Net()
    start, history, value = _reference(model)
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        initial = list(fmodel.parameters())
        assert all(p.is_leaf and p.requires_grad for p in initial)
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), list(history[-1].values()))
        squared(fmodel, _DATA[0]).backward()
    wanted = torch.autograd.grad(value, list(start.values()))
    close([p.grad for p in initial], wanted)
    close([p.grad for p in fmodel.parameters(time=0)], wanted)
    assert all(p.grad is None for p in model.parameters())


def test_the_models_own_weights_take_the_gradient():
    model = Net()
    start, _, value = _reference(model)
    with higher.innerloop_ctx(model, _sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        squared(fmodel, _DATA[0]).backward()
    close([p.grad for p in model.parameters()], torch.autograd.grad(value, list(start.values())))

    def meta(weight):
        params = leaves(model) | {"hidden.weight": weight.requires_grad_()}
        return at(model, unroll(model, params, _DATA, sgd(0.1, 0.5))[-1], _DATA[0])

    close(model.hidden.weight.grad, fd(meta, model.hidden.weight), rtol=1e-8)


def test_gradients_of_several_tasks_add_up():
    model, wanted = Net(), None
    optimizer = _sgd(model)
    for task in range(2):
        data = [_DATA[task], _DATA[2]]
        start = leaves(model)
        end = unroll(model, start, data, sgd(0.1, 0.5))[-1]
        grads = torch.autograd.grad(at(model, end, data[0]), list(start.values()))
        wanted = grads if wanted is None else [a + b for a, b in zip(wanted, grads, strict=True)]
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (f, d):
            train(f, d, data)
            squared(f, data[0]).backward()
    close([p.grad for p in model.parameters()], wanted)


@pytest.mark.parametrize("copied", [True, False])
def test_changing_the_model_afterwards_does_not_change_the_copy(copied):
    model = Net()
    before = list(leaves(model).values())
    fmodel = higher.monkeypatch(model, copy_initial_weights=copied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    close(fmodel.parameters(), before)
    close(fmodel(_DATA[0][0]), at(Net(), {}, _DATA[0], lambda call, batch: call(batch[0])))


def test_parameters_at_each_time():
    model = Net()
    _, history, _ = _reference(model)
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        first = list(fmodel.parameters())
        train(fmodel, diffopt, _DATA)
        for time, params in enumerate(_lists(history)):
            close(fmodel.parameters(time=time), params)
        close(fmodel.parameters(time=-1), _lists(history)[-1])
        close(fmodel.parameters(time=None), _lists(history)[-1])
        close(fmodel.fast_params, _lists(history)[-1])
        # recurse is the first argument by position, time the second
        close(fmodel.parameters(True), _lists(history)[-1])
        close(fmodel.parameters(True, 1), _lists(history)[1])
        close(fmodel.init_fast_params, _lists(history)[0])
        for found in (fmodel.parameters(time=0), fmodel.init_fast_params):
            assert all(a is b for a, b in zip(found, first, strict=True))
        assert len(fmodel._fast_params) == 4
        with pytest.raises(IndexError):
            fmodel.parameters(time=4)
        iterator = fmodel.parameters()
        assert iter(iterator) is iterator
        close(next(iterator), history[-1]["hidden.weight"])


def test_gradient_between_two_times():
    model = Net()
    _, history, value = _reference(model)
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        outer = squared(fmodel, _DATA[0])
        for time in range(4):
            params = list(fmodel.parameters(time=time))
            found = torch.autograd.grad(outer, params, retain_graph=True)
            wanted = torch.autograd.grad(value, list(history[time].values()), retain_graph=True)
            close(found, wanted)


def _by_update(fmodel, new):
    fmodel.update_params(new)


def _by_assignment(fmodel, new):
    fmodel.fast_params = new


def _by_call(fmodel, new):
    fmodel(_DATA[0][0], params=new)


def _by_iterator(fmodel, new):
    fmodel(_DATA[0][0], params=iter(new))


@pytest.mark.parametrize("replace", [_by_update, _by_assignment, _by_call, _by_iterator])
def test_replacing_all_weights(replace):
    model = Net()
    seed = normal(2, seed=5).requires_grad_()
    made = {name: p * seed[0] + seed[1] for name, p in leaves(model).items()}
    wanted = at(model, made, _DATA[0])
    end = unroll(model, made, _DATA[:2], sgd(0.1))[-1]
    wanted_later = at(model, end, _DATA[0])

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        replace(fmodel, list(made.values()))
        assert len(fmodel._fast_params) == 2
        close(fmodel.parameters(), list(made.values()))
        close(fmodel.parameters(time=0), list(leaves(model).values()))
        value = squared(fmodel, _DATA[0])  # without params=: they persist
        close(value, wanted)
        found = torch.autograd.grad(value, seed, retain_graph=True)
        close(found, torch.autograd.grad(wanted, seed, retain_graph=True))
        train(fmodel, diffopt, _DATA[:2])
        assert len(fmodel._fast_params) == 4
        later = squared(fmodel, _DATA[0])
        close(later, wanted_later)
        found = torch.autograd.grad(later, seed, retain_graph=True)
    close(found, torch.autograd.grad(wanted_later, seed))


def test_call_with_weights_of_an_earlier_time():
    model = Net()
    _, history, _ = _reference(model)
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        value = squared(lambda x: fmodel(x, params=fmodel.parameters(time=1)), _DATA[0])
        close(value, at(model, history[1], _DATA[0]))
        assert len(fmodel._fast_params) == 5
        close(fmodel.parameters(), _lists(history)[1])


def test_assigning_one_weight():
    model = nn.Linear(2, 1).double()
    tensor = normal(1, 2, seed=3).requires_grad_()
    fmodel = higher.monkeypatch(model)
    fmodel.weight = tensor * 2
    assert len(fmodel._fast_params) == 2
    close(fmodel.parameters(), [tensor * 2, model.bias])
    close(fmodel.parameters(time=0), [model.weight, model.bias])
    wanted = at(model, {"weight": tensor * 2}, _DATA[0])
    value = squared(fmodel, _DATA[0])
    close(value, wanted)
    close(torch.autograd.grad(value, tensor), torch.autograd.grad(wanted, tensor))


def test_assigning_one_weight_of_a_child():
    model = Net()
    tensor = normal(1, 2, seed=3).requires_grad_()
    start = leaves(model) | {"head.weight": tensor * 2}
    end = unroll(model, start, _DATA[:1], sgd(0.1))[-1]
    wanted = at(model, end, _DATA[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        fmodel.head.weight = tensor * 2
        assert len(fmodel._fast_params) == 2
        close(fmodel.head.weight, tensor * 2)
        close(fmodel.parameters(), list(start.values()))
        train(fmodel, diffopt, _DATA[:1])
        value = squared(fmodel, _DATA[0])
    close(value, wanted)
    close(torch.autograd.grad(value, tensor), torch.autograd.grad(wanted, tensor))
    close(model.head.weight, leaves(Net())["head.weight"])


def test_the_list_of_lists_can_be_assigned():
    model = Net()
    new = [2 * p for p in leaves(model).values()]
    fmodel = higher.monkeypatch(model)
    fmodel._fast_params = [new]
    assert len(fmodel._fast_params) == 1
    close(fmodel.parameters(time=0), new)
    named = dict(zip(leaves(model), new, strict=True))
    close(squared(fmodel, _DATA[0]), at(model, named, _DATA[0]))


def test_first_order_gradient_at_the_latest_weights():
    """First-order MAML: the meta-gradient is taken at the adapted weights."""
    model = Net()
    _, history, _ = _reference(model)
    last = {name: p.detach().requires_grad_() for name, p in history[-1].items()}
    wanted = torch.autograd.grad(at(model, last, _DATA[0]), list(last.values()))
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(torch.autograd.grad(squared(fmodel, _DATA[0]), list(fmodel.parameters())), wanted)


def test_truncated_backpropagation():
    """Detached in the middle: what comes before takes no gradient."""
    model = Net()
    history = unroll(model, leaves(model), _DATA[:2], sgd(0.1))
    middle = {name: p.detach().requires_grad_() for name, p in history[-1].items()}
    end = unroll(model, middle, _DATA[2:], sgd(0.1))[-1]
    wanted = torch.autograd.grad(at(model, end, _DATA[0]), list(middle.values()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA[:2])
        fmodel.update_params([p.detach().requires_grad_() for p in fmodel.parameters()])
        cut = list(fmodel.parameters())
        train(fmodel, diffopt, _DATA[2:])
        close(fmodel.parameters(), list(end.values()))
        squared(fmodel, _DATA[0]).backward()
    close([p.grad for p in cut], wanted)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("copied", [True, False])
def test_without_tracking(copied):
    model = Net()
    wanted, after, _ = stepped(model, _sgd(model), _DATA)
    with higher.innerloop_ctx(
        model, _sgd(model), copy_initial_weights=copied, track_higher_grads=False
    ) as (fmodel, diffopt):
        for batch, params in zip(_DATA, wanted[1:], strict=True):
            diffopt.step(squared(fmodel, batch))
            close(fmodel.parameters(), params)
            assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
            assert len(fmodel._fast_params) == 1
        close(fmodel.parameters(time=-1), wanted[-1])
        close(fmodel.parameters(time=0), wanted[-1])
        with pytest.raises(ValueError, match="(?i)track"):
            fmodel.parameters(time=1)
        with pytest.raises(Exception, match="(?i)track"):
            _ = fmodel.init_fast_params
        squared(fmodel, _DATA[0]).backward()
        after.zero_grad()
        squared(after, _DATA[0]).backward()
        close([p.grad for p in fmodel.parameters()], [p.grad for p in after.parameters()])
    assert all(p.grad is None for p in model.parameters())


def test_without_tracking_frozen_weights_stay_frozen():
    model = Net()
    model.hidden.requires_grad_(False)
    wanted, _, _ = stepped(model, _sgd(model), _DATA)
    with higher.innerloop_ctx(model, _sgd(model), track_higher_grads=False) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), wanted[-1])
        assert [p.requires_grad for p in fmodel.parameters()] == [False, False, True, True]


def test_tracking_switched_off_midway():
    model = Net()
    wanted, after, _ = stepped(model, _sgd(model), _DATA)
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA[:1])
        fmodel.track_higher_grads = False
        assert fmodel.track_higher_grads is False
        train(fmodel, diffopt, _DATA[1:])
        close(fmodel.parameters(), wanted[-1])
        close(fmodel.fast_params, wanted[-1])
        close(squared(fmodel, _DATA[0]), squared(after, _DATA[0]))
        with pytest.raises(ValueError, match="(?i)track"):
            fmodel.parameters(time=1)


def test_contexts_nest_interleave_and_outlive_their_block():
    one, two = Net(0), Net(1)
    start, _, value = _reference(one)
    other, _, other_value = _reference(two)
    with higher.innerloop_ctx(one, _sgd(one)) as (fone, done):
        with higher.innerloop_ctx(two, _sgd(two)) as (ftwo, dtwo):
            train(fone, done, _DATA[:1])
            train(ftwo, dtwo, _DATA[:2])
        train(fone, done, _DATA[1:2])
    train(fone, done, _DATA[2:])
    train(ftwo, dtwo, _DATA[2:])
    total = squared(fone, _DATA[0]) + squared(ftwo, _DATA[0])
    total.backward()
    for fmodel, params, wanted in ((fone, start, value), (ftwo, other, other_value)):
        grads = torch.autograd.grad(wanted, list(params.values()))
        close([p.grad for p in fmodel.parameters(time=0)], grads)


def test_the_loop_of_a_loop():
    """The adapted model is the start of a second loop with another optimizer."""
    model = Net()
    start = leaves(model)
    middle = unroll(model, start, _DATA[:2], sgd(0.1, 0.5))[-1]
    end = unroll(model, middle, _DATA[2:], sgd(0.05))[-1]
    wanted = torch.autograd.grad(at(model, end, _DATA[0]), list(start.values()))
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA[:2])
        second = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.05}, fmodel=fmodel)
        train(fmodel, second, _DATA[2:])
        close(fmodel.parameters(), list(end.values()))
        squared(fmodel, _DATA[0]).backward()
    close([p.grad for p in fmodel.parameters(time=0)], wanted)
