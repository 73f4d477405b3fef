"""Overrides, parameter groups, trainable options, callbacks, and options written along the way."""

from typing import Any

import numpy as np
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
    normal,
    sgd,
    squared,
    train,
    unroll,
)
from torch import nn

from jaxmeta_bridge import higher

_DATA = batches(3)


def _sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def _two_groups(model, **second):
    groups = [
        {"params": list(model.hidden.parameters()), "name": "body"},
        {"params": list(model.head.parameters()), "name": "head", **second},
    ]
    return torch.optim.SGD(groups, lr=0.1)


def _meta(rule, data=_DATA):
    """The meta-loss of plain torch with the rule or the rules by name."""
    model = Net()
    return at(model, unroll(model, leaves(model), data, rule)[-1], _DATA[0])


def _by_part(body, head):
    return {
        name: body if name.startswith("hidden") else head for name, _ in Net().named_parameters()
    }


def _found(optimizer_of, override, data=_DATA):
    model = Net()
    with higher.innerloop_ctx(model, optimizer_of(model), override=override) as (fmodel, diffopt):
        train(fmodel, diffopt, data)
        return squared(fmodel, _DATA[0])


def _double(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def test_hypergradients_of_lr_and_momentum():
    lr, momentum = _double(0.2), _double(0.4)
    found = _found(lambda m: _sgd(m, momentum=0.9), {"lr": [lr], "momentum": [momentum]})
    wanted = _meta(sgd(lr, momentum))
    close(found, wanted)
    grads = torch.autograd.grad(found, [lr, momentum])
    close(grads, torch.autograd.grad(wanted, [lr, momentum]))
    close(grads[0], fd(lambda v: _meta(sgd(v, 0.4)), lr), rtol=1e-8)
    close(grads[1], fd(lambda v: _meta(sgd(0.2, v)), momentum), rtol=1e-8)


def test_hypergradients_of_adam_through_a_tuple():
    values = [_double(v) for v in (0.1, 0.8, 0.9, 0.01)]
    lr, beta1, beta2, decay = values
    override = {"lr": [lr], "betas": [(beta1, beta2)], "weight_decay": [decay]}
    found = _found(lambda m: torch.optim.Adam(m.parameters(), eps=1e-3), override)
    wanted = _meta(adam(lr, (beta1, beta2), 1e-3, weight_decay=decay))
    close(found, wanted)
    grads = torch.autograd.grad(found, values)
    close(grads, torch.autograd.grad(wanted, values))
    close(grads[2], fd(lambda v: _meta(adam(0.1, (0.8, v), 1e-3, weight_decay=0.01)), beta2), 1e-8)


def test_second_derivative_of_a_hypergradient():
    lr = _double(0.2)
    found = _found(_sgd, {"lr": [lr]})
    (first,) = torch.autograd.grad(found, lr, create_graph=True)
    (second,) = torch.autograd.grad(first, lr)

    def slope(value):
        return torch.autograd.grad(_meta(sgd(value.requires_grad_())), value)[0]

    close(first, slope(lr))
    close(second, fd(slope, lr), rtol=1e-8)


@pytest.mark.parametrize(
    "option, rule",
    [("momentum", lambda v: sgd(0.1, v)), ("weight_decay", lambda v: sgd(0.1, weight_decay=v))],
)
def test_an_option_that_is_zero_keeps_its_gradient(option, rule):
    value = _double(0.0)
    found = _found(_sgd, {option: [value]})
    (grad,) = torch.autograd.grad(found, value)
    wanted = fd(lambda v: _meta(rule(v)), value)
    assert abs(wanted) > 1e-3
    close(grad, wanted, rtol=1e-8)


# float32 in a float64 model: the value differs from the nearest float64 number
_SINGLE = torch.tensor([0.3], dtype=torch.float32)
_FORMS = {
    "list of a scalar": lambda: [torch.tensor(0.3, dtype=torch.float64)],
    "list of one element": lambda: [torch.tensor([0.3], dtype=torch.float64)],
    "tuple": lambda: (torch.tensor(0.3, dtype=torch.float64),),
    "bare tensor": lambda: torch.tensor([0.3], dtype=torch.float64),
    "bare float32 tensor": lambda: _SINGLE.clone(),
    "list of a float32 tensor": lambda: [_SINGLE.clone()],
    "list of a number": lambda: [0.3],
    "array": lambda: np.array([0.3]),
    "list of an array": lambda: [np.array(0.3)],
    "parameters": lambda: nn.ParameterList([nn.Parameter(torch.tensor(0.3, dtype=torch.float64))]),
    "non-leaf": lambda: [_double(0.15) * 2],
    "one of each group": lambda: [0.3, torch.tensor(0.3, dtype=torch.float64)],
    "bare tensor, one of each group": lambda: torch.tensor([0.3, 0.3], dtype=torch.float64),
}


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("in_step", [False, True], ids=["given first", "given to step"])
def test_forms_of_an_override(form, in_step):
    value = _FORMS[form]()
    number = float(_SINGLE) if "float32" in form else 0.3
    model = Net()
    optimizer = _two_groups(model) if "group" in form else _sgd(model)
    end = unroll(model, leaves(model), _DATA, sgd(number))[-1]
    given: Any = {} if in_step else {"override": {"lr": value}}
    with higher.innerloop_ctx(model, optimizer, **given) as (fmodel, diffopt):
        later: Any = {"override": {"lr": value}} if in_step else {}
        diffopt.step(squared(fmodel, _DATA[0]), **later)
        train(fmodel, diffopt, _DATA[1:])  # an override given to step is kept
        close(fmodel.parameters(), list(end.values()))


@pytest.mark.parametrize("bare", [True, False])
def test_a_float32_override_takes_its_gradient_in_its_own_dtype_and_shape(bare):
    value = _SINGLE.clone().requires_grad_()
    found = _found(_sgd, {"lr": value if bare else [value]})
    found.backward()
    wanted = fd(lambda v: _meta(sgd(v)), torch.tensor([float(_SINGLE)]).double())
    grad = grad_of(value)
    assert grad.dtype == torch.float32 and grad.shape == (1,)
    close(grad.double(), wanted, rtol=1e-6)


@pytest.mark.parametrize("bad", [[0.1, 0.1, 0.1], [], torch.full((3,), 0.1)])
def test_override_of_another_length(bad):
    model = Net()
    with pytest.raises(ValueError, match="lr"):
        higher.get_diff_optim(_two_groups(model), model.parameters(), override={"lr": bad})
    with higher.innerloop_ctx(model, _two_groups(model)) as (fmodel, diffopt):
        with pytest.raises(ValueError, match="lr"):
            diffopt.step(squared(fmodel, _DATA[0]), override={"lr": bad})
        close(fmodel.parameters(), list(model.parameters()))


def test_override_of_each_group():
    one, two = _double(0.2), _double(0.05)
    found = _found(_two_groups, {"lr": [one, two]})
    wanted = _meta(_by_part(sgd(one), sgd(two)))
    close(found, wanted)
    close(torch.autograd.grad(found, [one, two]), torch.autograd.grad(wanted, [one, two]))


def test_groups_keep_their_own_options():
    found = _found(lambda m: _two_groups(m, lr=0.3, momentum=0.5, weight_decay=0.1), None)
    close(found, _meta(_by_part(sgd(0.1), sgd(0.3, 0.5, weight_decay=0.1))))


def test_one_learning_rate_for_each_element():
    model = Net()
    rates = {n: (0.1 + 0.05 * normal(*p.shape).abs()) for n, p in model.named_parameters()}
    rates = {name: rate.requires_grad_() for name, rate in rates.items()}

    def optimizer(model):
        return torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)

    found = _found(optimizer, {"lr": list(rates.values())})
    wanted = _meta({name: sgd(rate) for name, rate in rates.items()})
    close(found, wanted)
    inputs = list(rates.values())
    close(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs))
    with pytest.raises(ValueError, match="lr"):
        _found(_sgd, {"lr": inputs})


def test_override_of_step_wins_and_stays():
    first, second = _double(0.2), _double(0.05)
    model = Net()
    start = leaves(model)
    state = {}
    middle = unroll(model, start, _DATA[:1], sgd(first, 0.5), state=state)[-1]
    end = unroll(model, middle, _DATA[1:], sgd(second, 0.5), state=state)[-1]
    wanted = at(model, end, _DATA[0])
    optimizer = _sgd(model, momentum=0.5)
    with higher.innerloop_ctx(model, optimizer, override={"lr": [first]}) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA[:1])
        diffopt.step(squared(fmodel, _DATA[1]), override={"lr": [second]})
        train(fmodel, diffopt, _DATA[2:])
        found = squared(fmodel, _DATA[0])
    close(found, wanted)
    close(torch.autograd.grad(found, [first, second]), torch.autograd.grad(wanted, [first, second]))


def test_options_written_into_the_groups_count_from_the_next_step():
    """A schedule, first of numbers, then of a tensor that takes a gradient."""
    rates = [0.1, 0.3, _double(0.05)]
    model = Net()
    start, current = leaves(model), None
    current = start
    for batch, rate in zip(_DATA, rates, strict=True):
        current = unroll(model, current, [batch], sgd(rate))[-1]
    wanted = at(model, current, _DATA[0])
    with higher.innerloop_ctx(model, _two_groups(model)) as (fmodel, diffopt):
        assert [group["name"] for group in diffopt.param_groups] == ["body", "head"]
        assert [group["lr"] for group in diffopt.param_groups] == [0.1, 0.1]
        for batch, rate in zip(_DATA, rates, strict=True):
            for group in diffopt.param_groups:
                group["lr"] = rate
            diffopt.step(squared(fmodel, batch))
        found = squared(fmodel, _DATA[0])
    close(found, wanted)
    close(torch.autograd.grad(found, rates[2]), torch.autograd.grad(wanted, rates[2]))


def test_a_schedule_of_the_given_optimizer():
    """Its learning rate is read when the differentiable optimizer is made."""
    model = Net()
    optimizer = _sgd(model)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for power in range(2):
        end = unroll(model, leaves(model), _DATA, sgd(0.1 * 0.5**power))[-1]
        with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
            train(fmodel, diffopt, _DATA)
            close(fmodel.parameters(), list(end.values()))
        optimizer.step()
        schedule.step()


def test_a_learning_rate_tensor_of_the_given_optimizer_keeps_its_graph():
    raw = _double(-2.0)
    found = _found(lambda m: _sgd(m, lr=torch.exp(raw)), None)
    wanted = _meta(sgd(torch.exp(raw)))
    close(found, wanted)
    close(torch.autograd.grad(found, raw), torch.autograd.grad(wanted, raw))


def test_state_can_be_read_and_attributes_set():
    model = Net()
    state = {}
    unroll(model, leaves(model), _DATA, sgd(0.1, 0.5), state=state)
    with higher.innerloop_ctx(model, _sgd(model, momentum=0.5)) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        for index, name in enumerate(state):
            buffer = diffopt.state[0][index]["momentum_buffer"]
            close(buffer, state[name]["momentum_buffer"])
        mine: Any = diffopt
        mine.note = "mine"
        assert mine.note == "mine"
        close(diffopt.param_groups[0]["params"], list(fmodel.parameters()))


def test_state_of_adam_by_group():
    model = Net()
    groups = [{"params": list(model.head.parameters())}, {"params": [model.hidden.weight]}]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    state = {}
    names: list[str] = ["head.weight", "head.bias", "hidden.weight"]
    rules = dict.fromkeys(names, adam(0.1))
    unroll(model, leaves(model), _DATA, rules, state=state)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        for name in ("exp_avg", "exp_avg_sq"):
            close(diffopt.state[0][1][name], state["head.bias"][name])
            close(diffopt.state[1][0][name], state["hidden.weight"][name])
        assert float(diffopt.state[1][0]["step"]) == 3


@pytest.mark.parametrize("kind", ["list", "ParameterList"])
def test_trainable_options_of_a_stepped_meta_optimizer(kind):
    """Learning rates learned by an outer optimizer: two meta-steps."""
    rate = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    wanted = torch.tensor(0.2, dtype=torch.float64)
    outer = torch.optim.SGD([rate], lr=0.01)
    for _ in range(2):
        override = {"lr": [rate] if kind == "list" else nn.ParameterList([rate])}
        outer.zero_grad()
        _found(_sgd, override).backward()
        outer.step()
        wanted = wanted - 0.01 * fd(lambda v: _meta(sgd(v)), wanted)
    close(rate, wanted, rtol=1e-8)
