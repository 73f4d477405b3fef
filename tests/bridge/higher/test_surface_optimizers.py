"""Each optimizer against torch.optim: trained weights, and finite differences of torch's own loop.

With plain weights, torch's optimizer steps a copy of the model; the derivative of what it reaches
with respect to a weight or to one of its options is a difference of two such runs.
"""

from typing import Any

import pytest
import torch
from oracle import (
    Net,
    adam,
    at,
    batches,
    close,
    fd,
    grad_of,
    leaves,
    randomize,
    sgd,
    squared,
    stepped,
    train,
    unroll,
)
from torch import nn

from jaxmeta_bridge import higher

_DATA = batches(3)
_LR = {"lr": 0.1}
# class, all options, those to differentiate (a path into the options)
_CASES = {
    "SGD": (
        torch.optim.SGD,
        {**_LR, "momentum": 0.4, "dampening": 0.1, "weight_decay": 0.2},
        ["lr", "momentum", "dampening", "weight_decay"],
    ),
    "SGD, Nesterov": (
        torch.optim.SGD,
        {**_LR, "momentum": 0.4, "nesterov": True},
        ["lr", "momentum"],
    ),
    "Adam": (
        torch.optim.Adam,
        {**_LR, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.2},
        ["lr", ("betas", 0), ("betas", 1), "eps", "weight_decay"],
    ),
    "Adam, amsgrad": (
        torch.optim.Adam,
        {**_LR, "betas": (0.7, 0.6), "eps": 1e-2, "amsgrad": True},
        ["lr", ("betas", 1)],
    ),
    "Adam, decoupled": (
        torch.optim.Adam,
        {**_LR, "eps": 1e-2, "weight_decay": 0.5, "decoupled_weight_decay": True},
        ["lr", "weight_decay"],
    ),
    "AdamW": (
        torch.optim.AdamW,
        {**_LR, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.5},
        ["lr", ("betas", 0), ("betas", 1), "eps", "weight_decay"],
    ),
    "Adagrad": (
        torch.optim.Adagrad,
        {
            **_LR,
            "lr_decay": 0.2,
            "weight_decay": 0.2,
            "initial_accumulator_value": 0.1,
            "eps": 1e-2,
        },
        ["lr", "lr_decay", "weight_decay", "eps"],
    ),
    "Adadelta": (
        torch.optim.Adadelta,
        {"lr": 0.5, "rho": 0.8, "eps": 1e-2, "weight_decay": 0.2},
        ["lr", "rho", "eps", "weight_decay"],
    ),
    "Adamax": (
        torch.optim.Adamax,
        {**_LR, "betas": (0.7, 0.9), "eps": 1e-2, "weight_decay": 0.2},
        ["lr", ("betas", 0), ("betas", 1), "eps", "weight_decay"],
    ),
    "RMSprop": (
        torch.optim.RMSprop,
        {**_LR, "alpha": 0.8, "eps": 1e-2, "weight_decay": 0.2, "momentum": 0.4},
        ["lr", "alpha", "eps", "weight_decay", "momentum"],
    ),
    "RMSprop, centered": (
        torch.optim.RMSprop,
        {**_LR, "alpha": 0.8, "eps": 1e-2, "centered": True},
        ["lr", "alpha", "eps"],
    ),
    "Rprop": (
        torch.optim.Rprop,
        {"lr": 0.1, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)},
        ["lr", ("etas", 0), ("etas", 1)],
    ),
    "ASGD": (
        torch.optim.ASGD,
        {**_LR, "lambd": 0.1, "alpha": 0.75, "t0": 2.0, "weight_decay": 0.2},
        ["lr", "lambd", "alpha", "weight_decay"],
    ),
    "maximize": (torch.optim.SGD, {"lr": 0.01, "maximize": True}, ["lr"]),
    "maximize, Adam": (torch.optim.Adam, {**_LR, "eps": 1e-2, "maximize": True}, ["lr"]),
}


# torch holds ASGD's step sizes, like NAdam's product of momenta, in its default dtype, float32:
# stairs of 1e-8.
_TOLERANCES = {"ASGD": {"rtol": 1e-6, "atol": 1e-7}}


def _line():
    return randomize(nn.Linear(2, 1, bias=False))


def _loss(call, batch):
    x, y = batch
    return ((torch.tanh(call(x)) - y) ** 2).mean()


def _by_torch(kind, options, weight=None):
    """torch's own loop, from the given weight on; the meta-loss."""
    model = _line()
    if weight is not None:
        model.weight.data = weight
    torch.set_default_dtype(torch.float64)
    try:
        _, trained, _ = stepped(model, kind(model.parameters(), **options), _DATA, _loss)
    finally:
        torch.set_default_dtype(torch.float32)
    return _loss(trained, _DATA[0])


def _replaced(options, path, value):
    if isinstance(path, str):
        return options | {path: value}
    name, index = path
    values = list(options[name])
    values[index] = value
    return options | {name: tuple(values)}


@pytest.mark.filterwarnings("ignore:Differentiable R")
@pytest.mark.parametrize("name", _CASES)
def test_weights_and_gradients(name):
    kind, options, paths = _CASES[name]
    model, override = _line(), dict(options)
    tensors = []
    for path in paths:
        number = options[path] if isinstance(path, str) else options[path[0]][path[1]]
        tensors.append(torch.tensor(number, dtype=torch.float64, requires_grad=True))
        override = _replaced(override, path, tensors[-1])
    names = {path if isinstance(path, str) else path[0] for path in paths}
    override = {name: [override[name]] for name in names}
    optimizer = kind(model.parameters(), **options)
    wanted, _, _ = stepped(model, optimizer, _DATA, _loss)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, override=override) as (
        fmodel,
        diffopt,
    ):
        train(fmodel, diffopt, _DATA, _loss)
        close(fmodel.parameters(), wanted[-1], **_TOLERANCES.get(name, {}))
        _loss(fmodel, _DATA[0]).backward()
    tolerances = _TOLERANCES.get(name, {"rtol": 1e-7, "atol": 1e-9})
    difference = fd(lambda w: _by_torch(kind, options, w), model.weight)
    close(model.weight.grad, difference, **tolerances)
    for path, tensor in zip(paths, tensors, strict=True):
        difference = fd(
            lambda v, path=path: _by_torch(kind, _replaced(options, path, v.item())), tensor
        )
        close(tensor.grad, difference, **tolerances)


def _dead(call, batch):
    """The second weight has no effect yet: its gradient is exactly zero."""
    x, y = batch
    return ((torch.relu(call(x)) + call(x) - y) ** 2).mean()


@pytest.mark.parametrize("kind", ["Adam", "AdamW", "Adamax", "Adagrad", "RMSprop", "centered"])
@pytest.mark.filterwarnings("ignore:Differentiable R")
def test_no_nan_where_a_gradient_is_zero(kind):
    def optimizer(parameters):
        if kind == "centered":
            return torch.optim.RMSprop(parameters, lr=0.1, centered=True)
        if kind == "AdamW":
            return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0)
        return getattr(torch.optim, kind)(parameters, lr=0.1)

    model = nn.Linear(2, 1).double()
    data = [(x * torch.tensor([1.0, 0.0]), y) for x, y in _DATA]
    wanted, trained, _ = stepped(model, optimizer(model.parameters()), data, _dead)
    with higher.innerloop_ctx(model, optimizer(model.parameters()), copy_initial_weights=False) as (
        fmodel,
        diffopt,
    ):
        train(fmodel, diffopt, data, _dead)
        close(fmodel.parameters(), wanted[-1])
        found = _dead(fmodel, _DATA[1])
        close(found, _dead(trained, _DATA[1]))
        found.backward()
    assert all(grad_of(p).isfinite().all() for p in model.parameters())
    # The second weight never moves, and what it adds does not depend on the rest of the loop.
    with torch.no_grad():
        x, y = _DATA[1]
        output = trained(x)
        outer = 2 * (output.relu() + output - y) * (1 + (output > 0)) * x[:, 1:]
    close(grad_of(model.weight)[0, 1], outer.mean())


def test_a_subclass_that_changes_nothing_is_its_parent():
    class Mine(torch.optim.SGD):
        """A name of its own, the same steps."""

    model = Net()
    wanted, _, _ = stepped(model, torch.optim.SGD(model.parameters(), lr=0.1), _DATA)
    optimizer = Mine(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), wanted[-1])


@pytest.mark.parametrize("given", ["fmodel", "params", "groups", "generators in groups", "both"])
def test_create_diff_optim(given):
    model = Net()
    fmodel = higher.monkeypatch(model)
    rules = dict.fromkeys(leaves(model), sgd(0.1, 0.5))
    kwargs: dict[str, Any] = {"fmodel": fmodel}
    if given == "params":
        kwargs = {"params": model.parameters()}
    elif given == "both":
        kwargs = {"params": list(model.parameters()), "fmodel": fmodel}
    elif given != "fmodel":
        groups = [
            {"params": list(model.hidden.parameters())},
            {"params": list(model.head.parameters()), "lr": 0.3},
        ]
        if "generators" in given:
            groups = [group | {"params": iter(group["params"])} for group in groups]
        kwargs = {"params": groups, "fmodel": fmodel}
        rules |= {"head.weight": sgd(0.3, 0.5), "head.bias": sgd(0.3, 0.5)}
    diffopt = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1, "momentum": 0.5}, **kwargs)
    end = unroll(model, leaves(model), _DATA, rules)[-1]
    for batch in _DATA:
        loss = squared(fmodel, batch)
        if given == "params":
            fmodel.update_params(diffopt.step(loss, params=fmodel.parameters()))
        else:
            diffopt.step(loss)
    close(fmodel.parameters(), list(end.values()))


def test_create_diff_optim_needs_parameters():
    with pytest.raises(ValueError, match="(?i)fmodel"):
        higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1})


def test_create_diff_optim_with_override_and_callback():
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    model = Net()
    start = leaves(model)
    end = unroll(model, start, _DATA, adam(lr), edit=lambda gs: [g / 2 for g in gs])[-1]
    wanted = at(model, end, _DATA[0])
    fmodel = higher.monkeypatch(model)
    diffopt = higher.create_diff_optim(
        torch.optim.Adam,
        fmodel=fmodel,
        override={"lr": [lr]},
        grad_callback=lambda gs: [g / 2 for g in gs],
    )
    train(fmodel, diffopt, _DATA)
    found = squared(fmodel, _DATA[0])
    close(found, wanted)
    close(torch.autograd.grad(found, lr), torch.autograd.grad(wanted, lr))


@pytest.mark.parametrize("name", ["NAdam", "RAdam"])
def test_optimizers_newer_than_higher(name):
    kind = getattr(torch.optim, name)
    options = {"lr": 0.1, "eps": 1e-2}
    model = _line()
    optimizer = kind(model.parameters(), **options)
    wanted, _, _ = stepped(model, optimizer, _DATA, _loss)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA, _loss)
        close(fmodel.parameters(), wanted[-1], rtol=1e-6, atol=1e-7)
        _loss(fmodel, _DATA[0]).backward()
    wanted = fd(lambda w: _by_torch(kind, options, w), model.weight)
    close(model.weight.grad, wanted, rtol=1e-6, atol=1e-7)
