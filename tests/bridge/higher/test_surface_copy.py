"""fmodel as a module: calls of its parts, buffers, mode, attributes, hooks, and what leaves it."""

import copy
from typing import Any

import pytest
import torch
from oracle import Net, at, batches, close, leaves, normal, randomize, sgd, squared, train, unroll
from torch import nn

from jaxmeta_bridge import higher

_DATA = batches(2)
_X = _DATA[0][0]


def _sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _adapted(model):
    return unroll(model, leaves(model), _DATA, sgd(0.1))[-1]


def _loaded(make, params):
    """A plain model with these weights."""
    model = make()
    model.load_state_dict({**model.state_dict(), **{n: p.detach() for n, p in params.items()}})
    return model


def _sequential():
    return randomize(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)))


def _with_batch_norm():
    return randomize(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)))


def test_names_are_the_models():
    model = _with_batch_norm()
    fmodel = higher.monkeypatch(model)
    for names in ("named_parameters", "named_buffers", "named_modules", "named_children"):
        found, wanted = getattr(fmodel, names)(), getattr(model, names)()
        assert [name for name, _ in found] == [name for name, _ in wanted]
    assert list(fmodel.state_dict()) == list(model.state_dict())
    assert isinstance(fmodel, nn.Sequential) and isinstance(fmodel[1], nn.BatchNorm1d)
    assert "BatchNorm1d" in str(fmodel)


def test_methods_and_children_called_directly_use_the_latest_weights():
    model = Net()
    wanted = _loaded(Net, _adapted(model))
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(fmodel.features(_X), wanted.features(_X))
        close(fmodel.hidden(_X), wanted.hidden(_X))
        close(fmodel.head.weight, wanted.head.weight)
        close(nn.functional.linear(_X, fmodel.hidden.weight), _X @ wanted.hidden.weight.T)
        close(fmodel.head.forward(_X), wanted.head(_X))


def test_gradient_through_a_method():
    model = Net()
    start = leaves(model)
    end = unroll(model, start, _DATA, sgd(0.1))[-1]
    hidden = torch.tanh(_X @ end["hidden.weight"].T + end["hidden.bias"]).sum()
    wanted = torch.autograd.grad(hidden, list(start.values()))
    with higher.innerloop_ctx(model, _sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        found = torch.autograd.grad(fmodel.features(_X).sum(), list(model.parameters()))
    close(found, wanted)


def test_a_loop_that_trains_by_methods_and_children_alone():
    """The loss never calls the model itself."""

    def by_method(net, batch):
        x, y = batch
        return ((net.head(net.features(x)) * net.scale - y) ** 2).mean()

    model = Net()
    end = _adapted(model)
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA, by_method)
        close(fmodel.parameters(), list(end.values()))


def test_children_of_a_sequential():
    model = _sequential()
    wanted = _loaded(_sequential, _adapted(model))
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(fmodel[0](_X), wanted[0](_X))
        close(fmodel[-1].weight, wanted[-1].weight)
        assert len(fmodel) == 3
        hidden = _X
        for layer in fmodel:
            hidden = layer(hidden)
        close(hidden, wanted(_X))


def test_slice_of_a_sequential():
    model = _sequential()
    wanted = _loaded(_sequential, _adapted(model))
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(fmodel[:2](_X), wanted[:2](_X))


def test_batch_statistics_live_in_the_copy():
    model = _with_batch_norm()
    model(5 * normal(4, 2, seed=50))
    before = copy.deepcopy(dict(model.named_buffers()))
    reference = copy.deepcopy(model)
    end = unroll(reference, leaves(reference), _DATA, sgd(0.1))[-1]
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        close(dict(fmodel.named_buffers()), before)
        train(fmodel, diffopt, _DATA)
        close(dict(fmodel.named_buffers()), dict(reference.named_buffers()))
        assert fmodel[1].num_batches_tracked.item() == 3
        assert not fmodel[1].running_mean.requires_grad
        fmodel.eval()
        reference.eval()
        wanted = at(reference, end, _DATA[0])
        close(squared(fmodel, _DATA[0]), wanted)
    close(dict(model.named_buffers()), before)
    close(model[1].running_mean, before["1.running_mean"])


def test_buffer_sync_in_both_directions():
    model = _with_batch_norm()
    fmodel = higher.monkeypatch(model)
    fmodel(_X)
    trained = {name: buffer.clone() for name, buffer in fmodel.named_buffers()}
    higher.patch.buffer_sync(fmodel, model)
    close(dict(model.named_buffers()), trained)
    assert type(model[1].running_mean) is torch.Tensor
    model(normal(4, 2, seed=9))
    close(dict(fmodel.named_buffers()), trained)  # a copy, no alias
    close(fmodel[1].num_batches_tracked, torch.tensor(1))
    higher.patch.buffer_sync(model, fmodel)
    close(dict(fmodel.named_buffers()), dict(model.named_buffers()))
    with pytest.raises(KeyError):
        higher.patch.buffer_sync(model, _sequential()[0])


def test_mode_is_copied_and_stays_in_the_copy():
    model = _with_batch_norm()
    model[1].eval()
    fmodel = higher.monkeypatch(model)
    assert [module.training for module in fmodel.modules()] == [True, True, False, True]
    assert fmodel.eval() is fmodel
    assert not any(module.training for module in fmodel.modules())
    assert [module.training for module in model.modules()] == [True, True, False, True]
    fmodel.train()
    assert all(module.training for module in fmodel.modules())
    assert not model[1].training
    assert not higher.monkeypatch(model.eval()).training


def test_attributes_are_shared_and_those_set_later_are_not():
    model: Any = Net()
    model.notes = {"seen": 0}
    model.hidden.tag = ["old"]
    fmodel = higher.monkeypatch(model)
    assert fmodel.notes is model.notes and fmodel.hidden.tag is model.hidden.tag
    assert fmodel.scale == 0.5
    fmodel.scale = 2.0
    fmodel.hidden.extra = 1
    assert model.scale == 0.5 and not hasattr(model.hidden, "extra")
    assert fmodel.hidden.extra == 1
    close(fmodel(_X), 4 * model(_X))
    fmodel.added = nn.Tanh()
    assert "added" in dict(fmodel.named_modules()) and not hasattr(model, "added")


def test_hooks_that_were_on_the_model_fire():
    model = Net()
    calls = []

    def hook(module, inputs, output):
        calls.append(type(module))
        return output * 2

    model.hidden.register_forward_hook(hook)

    def lower(module, inputs, output):
        return output - 3

    model.head.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    model.register_forward_hook(lower)
    end = _adapted(model)
    wanted = at(model, end, _DATA[0])
    calls.clear()
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), list(end.values()))
        close(squared(fmodel, _DATA[0]), wanted)
    assert len(calls) == 3 and all(issubclass(kind, nn.Linear) for kind in calls)


def test_hooks_put_on_the_copy_fire_there_only():
    model = Net()
    start = leaves(model)
    end = unroll(model, start, _DATA, sgd(0.1))[-1]
    stored = []
    with higher.innerloop_ctx(model, _sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        handle = fmodel.hidden.register_forward_hook(lambda m, args, output: stored.append(output))
        train(fmodel, diffopt, _DATA)
        fmodel(_X)
        assert len(stored) == 3
        found = torch.autograd.grad(stored[-1].sum(), list(model.parameters())[:2])
        handle.remove()
        fmodel(_X)
        model(_X)
        assert len(stored) == 3
    hidden = (_X @ end["hidden.weight"].T + end["hidden.bias"]).sum()
    close(stored[-1].sum(), hidden)
    close(found, torch.autograd.grad(hidden, list(start.values())[:2]))


def test_state_dict_keeps_the_adapted_weights():
    model = _with_batch_norm()
    reference = copy.deepcopy(model)
    end = unroll(reference, leaves(reference), _DATA, sgd(0.1))[-1]
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        state = fmodel.state_dict()
    assert all(not value.requires_grad for value in state.values())
    model.load_state_dict(state)
    close(list(model.parameters()), list(end.values()))
    close(dict(model.named_buffers()), dict(reference.named_buffers()))
    assert all(type(p) is nn.Parameter and p.requires_grad for p in model.parameters())


def test_load_state_dict():
    model, other = Net(0), Net(1)
    start = leaves(other)
    end = unroll(other, start, _DATA, sgd(0.1))[-1]
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        fmodel.load_state_dict(other.state_dict())
        close(fmodel(_X), other(_X))
        close(fmodel.parameters(), list(other.parameters()))
        assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), list(end.values()))
        squared(fmodel, _DATA[0]).backward()
    wanted = torch.autograd.grad(at(other, end, _DATA[0]), list(start.values()))
    close([p.grad for p in fmodel.parameters(time=0)], wanted)
    close(list(model.parameters()), list(Net(0).parameters()))


def test_apply_changes_the_fast_weights():
    def init(module):
        if isinstance(module, nn.Linear):
            nn.init.constant_(module.weight, 0.25)

    model, wanted = Net(), Net().apply(init)
    start = leaves(wanted)
    end = unroll(wanted, start, _DATA, sgd(0.1))[-1]
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        assert fmodel.apply(init) is fmodel
        close(fmodel(_X), wanted(_X))
        assert all(p.is_leaf and p.requires_grad for p in fmodel.parameters())
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), list(end.values()))
        squared(fmodel, _DATA[0]).backward()
    wanted = torch.autograd.grad(at(wanted, end, _DATA[0]), list(start.values()))
    close([p.grad for p in fmodel.parameters(time=0)], wanted)
    close(list(model.parameters()), list(Net().parameters()))


def test_to_and_float():
    model = Net()
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        assert fmodel.to(torch.device("cpu")) is fmodel
        assert fmodel.to(torch.float64) is fmodel
        close(fmodel(_X), model(_X))
        assert fmodel.float() is fmodel
        assert all(p.dtype == torch.float32 for p in fmodel.parameters())
        assert all(p.dtype == torch.float64 for p in model.parameters())
        single = copy.deepcopy(model).float()
        data = [(x.float(), y.float()) for x, y in _DATA]
        end = unroll(single, leaves(single), data, sgd(0.1))[-1]
        close(fmodel(_X.float()), single(_X.float()), rtol=1e-5, atol=1e-6)
        train(fmodel, diffopt, data)
        close(fmodel.parameters(), list(end.values()), rtol=1e-5, atol=1e-6)


def test_zero_grad():
    fmodel = higher.monkeypatch(Net())
    squared(fmodel, _DATA[0]).backward()
    assert all(p.grad is not None for p in fmodel.parameters())
    fmodel.zero_grad()
    assert all(p.grad is None or not p.grad.any() for p in fmodel.parameters())


def test_make_functional_needs_weights_once():
    model = Net()
    fmodel = higher.patch.make_functional(model)
    assert isinstance(fmodel, Net)
    with pytest.raises(ValueError, match="params"):
        fmodel(_X)
    weights = leaves(model)
    wanted = at(model, weights, _DATA[0])
    found = squared(lambda x: fmodel(x, params=list(weights.values())), _DATA[0])
    close(found, wanted)
    close(squared(fmodel, _DATA[0]), wanted)
    close(
        torch.autograd.grad(found, list(weights.values())),
        torch.autograd.grad(wanted, list(weights.values())),
    )


def test_make_functional_hands_over_to_its_encapsulator():
    model, calls = Net(), []
    fmodel = higher.patch.make_functional(model, lambda *both: calls.append(both))
    assert len(calls) == 1 and calls[0][0] is fmodel and calls[0][1] is model


def test_device():
    model = Net()
    end = _adapted(model)
    cpu = torch.device("cpu")
    with higher.innerloop_ctx(model, _sgd(model), cpu, False) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        assert all(p.device == cpu for p in fmodel.parameters())
        close(fmodel.parameters(), list(end.values()))


def test_weights_made_by_another_network():
    """A generator's output, which is no leaf, is the start of the loop."""
    model = Net()
    code = normal(3, seed=4).requires_grad_()
    weights = {
        name: torch.tanh(code.sum() * normal(*p.shape, seed=6) + code[0])
        for name, p in leaves(model).items()
    }
    end = unroll(model, weights, _DATA, sgd(0.1))[-1]
    wanted = at(model, end, _DATA[0])
    fmodel = higher.patch.make_functional(model)
    diffopt = higher.get_diff_optim(_sgd(model), model.parameters(), fmodel)
    fmodel.fast_params = list(weights.values())
    train(fmodel, diffopt, _DATA)
    found = squared(fmodel, _DATA[0])
    close(found, wanted)
    close(
        torch.autograd.grad(found, code, retain_graph=True),
        torch.autograd.grad(wanted, code),
    )
