"""grad_callback, optimizers registered by the user, and options that are learned."""

from typing import Any

import pytest
import torch
from oracle import Net, adam, at, batches, close, fd, leaves, sgd, squared, train, unroll

from jaxmeta_bridge import higher

_DATA = batches(3)


def _sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def _clip(grads):
    norm = torch.stack([g.square().sum() for g in grads if g is not None]).sum().sqrt()
    return [None if g is None else g / (1 + norm) for g in grads]


def _clip_by_value(grads):
    """Branches on a value."""
    norm = torch.stack([g.detach().square().sum() for g in grads]).sum().sqrt()
    return [g * 0.1 / norm for g in grads] if norm.item() > 0.1 else grads


def _detach(grads):
    return [g.detach() for g in grads]


def _head_only(grads):
    return [None, None, *grads[2:]]


@pytest.mark.parametrize("edit", [_clip, _clip_by_value, _detach, _head_only])
@pytest.mark.parametrize("in_step", [False, True], ids=["default", "in step"])
def test_callback(edit, in_step):
    model = Net()
    start = leaves(model)
    end = unroll(model, start, _DATA, sgd(0.1, 0.5), edit=edit)[-1]
    wanted = at(model, end, _DATA[0])
    fmodel = higher.monkeypatch(model)
    default: Any = {"grad_callback": (lambda grads: 1 / 0) if in_step else edit}
    optimizer = _sgd(model, momentum=0.5)
    diffopt = higher.get_diff_optim(optimizer, model.parameters(), fmodel, **default)
    for batch in _DATA:
        # that of step wins over the default
        diffopt.step(squared(fmodel, batch), **({"grad_callback": edit} if in_step else {}))
    close(fmodel.parameters(), list(end.values()))
    found = squared(fmodel, _DATA[0])
    close(
        torch.autograd.grad(found, list(fmodel.parameters(time=0))),
        torch.autograd.grad(wanted, list(start.values())),
    )


def test_callback_sees_all_gradients_in_order():
    """Also those of parameters outside the optimizer; None where there is none."""
    model = Net()
    model.hidden.weight.requires_grad_(False)
    wanted = torch.autograd.grad(squared(model, _DATA[0]), list(model.parameters())[1:])
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    seen = []

    def look(grads):
        seen.append(list(grads))
        return grads

    for loss in (lambda f: squared(f, _DATA[0]), lambda f: f.head.weight.square().sum()):
        with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
            diffopt.step(loss(fmodel), grad_callback=look)
    close(seen[0], [None, *wanted])
    close(seen[1], [None, None, 2 * model.head.weight, None])


def test_learned_gradient_transformation():
    """The callback's own tensors take a gradient."""
    scale = torch.tensor([0.5, 1.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def edit(grads):
        return [s * g + 0.1 * g**2 for s, g in zip(scale, grads, strict=True)]

    model = Net()
    wanted = at(model, unroll(model, leaves(model), _DATA, sgd(0.1), edit=edit)[-1], _DATA[0])
    with higher.innerloop_ctx(model, _sgd(model)) as (fmodel, diffopt):
        for batch in _DATA:
            diffopt.step(squared(fmodel, batch), grad_callback=edit)
        found = squared(fmodel, _DATA[0])
    close(found, wanted)
    close(torch.autograd.grad(found, scale), torch.autograd.grad(wanted, scale))


class _Signed(torch.optim.Optimizer):
    """Steps along the cubed gradient, with a running mean."""

    def __init__(self, params, lr=0.1, mean=0.5):
        super().__init__(params, {"lr": lr, "mean": mean})

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                old = self.state[p].get("average", torch.zeros_like(p))
                new = group["mean"] * old + (1 - group["mean"]) * p.grad
                self.state[p]["average"] = new
                p.sub_(group["lr"] * torch.tanh(new))


class _DifferentiableSigned(higher.optim.DifferentiableOptimizer):
    def _update(self, grouped_grads, **kwargs):
        for number, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
            for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                if g is None:
                    continue
                state = self.state[number][i]
                if len(state) == 0:
                    state["average"] = torch.zeros_like(p.data)
                new = state["average"] * group["mean"] + (1 - group["mean"]) * g
                state["average"] = new
                group["params"][i] = higher.optim._add(p, -group["lr"], torch.tanh(new))


def _signed(lr, mean):
    def rule(parameter, grad, state):
        state["average"] = mean * state.get("average", 0) + (1 - mean) * grad
        return parameter - lr * torch.tanh(state["average"])

    return rule


def test_a_registered_optimizer():
    higher.register_optim(_Signed, _DifferentiableSigned)
    mean = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    model = Net()
    groups = [
        {"params": list(model.hidden.parameters()), "lr": 0.2},
        {"params": [model.head.weight]},
    ]
    start = leaves(model)
    rules = {name: _signed(0.2, mean) for name in ("hidden.weight", "hidden.bias")}
    rules["head.weight"] = _signed(0.1, mean)
    state = {}
    end = unroll(model, start, _DATA, rules, state=state)[-1]
    wanted = at(model, end, _DATA[0])
    inputs = [mean, *start.values()]
    wanted_grads = torch.autograd.grad(wanted, inputs)
    optimizer = _Signed(groups)
    with higher.innerloop_ctx(
        model, optimizer, copy_initial_weights=False, override={"mean": [mean]}
    ) as (fmodel, diffopt):
        assert type(diffopt) is _DifferentiableSigned
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), list(end.values()))
        close(diffopt.state[1][0]["average"], state["head.weight"]["average"])
        found = squared(fmodel, _DATA[0])
    close(torch.autograd.grad(found, [mean, *model.parameters()]), wanted_grads)
    made = higher.create_diff_optim(_Signed, {"lr": 0.3}, params=model.parameters())
    assert type(made) is _DifferentiableSigned


def test_a_registered_optimizer_resumes_and_runs_untracked():
    higher.register_optim(_Signed, _DifferentiableSigned)
    model = Net()
    optimizer = _Signed(model.parameters(), lr=0.2)
    squared(model, _DATA[2]).backward()
    optimizer.step()
    state = {
        name: {"average": optimizer.state[p]["average"].clone()}
        for name, p in model.named_parameters()
    }
    end = unroll(model, leaves(model), _DATA, _signed(0.2, 0.5), state=state)[-1]
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), list(end.values()))
        assert all(p.is_leaf for p in fmodel.parameters())


def test_a_subclass_that_calls_its_parents_update():
    class Halved(higher.optim.DifferentiableSGD):
        def _update(self, grouped_grads, **kwargs):
            super()._update([[g / 2 for g in grads] for grads in grouped_grads], **kwargs)

    model = Net()
    end = unroll(model, leaves(model), _DATA, sgd(0.05))[-1]
    fmodel = higher.monkeypatch(model)
    train(fmodel, Halved(_sgd(model), model.parameters(), fmodel=fmodel), _DATA)
    close(fmodel.parameters(), list(end.values()))


def test_trainable_options_of_an_optimizer():
    model = Net()
    groups = [
        {"params": list(model.hidden.parameters()), "name": "body"},
        {"params": list(model.head.parameters()), "name": "head", "lr": 0.2},
    ]
    optimizer = torch.optim.Adam(groups, lr=0.1, betas=(0.8, 0.9), amsgrad=False)
    options = higher.optim.get_trainable_opt_params(optimizer)
    assert "params" not in options and "name" not in options
    assert [value.item() for value in options["lr"]] == pytest.approx([0.1, 0.2])
    assert len(options["betas"]) == 2 and len(options["betas"][0]) == 2
    assert isinstance(options["betas"][0], tuple)
    flat = [value for name in ("lr", "eps", "weight_decay") for value in options[name]]
    for value in [*flat, *options["betas"][1], options["amsgrad"][0]]:
        assert isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf
        assert value.dtype == torch.float32 and value.shape == ()


def test_trainable_options_as_override_and_back():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-2)
    options = higher.optim.get_trainable_opt_params(optimizer)
    exact = {name: options[name][0] for name in ("lr", "eps")}
    lr, eps = (value.detach().double() for value in exact.values())
    beta1, beta2 = (value.detach().double() for value in options["betas"][0])
    end = unroll(model, leaves(model), _DATA, adam(lr, (beta1, beta2), eps))[-1]
    wanted = fd(
        lambda v: at(
            Net(), unroll(Net(), leaves(model), _DATA, adam(v, (beta1, beta2), eps))[-1], _DATA[0]
        ),
        lr,
    )
    with higher.innerloop_ctx(model, optimizer, override=options) as (fmodel, diffopt):
        train(fmodel, diffopt, _DATA)
        close(fmodel.parameters(), list(end.values()), rtol=1e-6, atol=1e-7)
        squared(fmodel, _DATA[0]).backward()
    close(options["lr"][0].grad.double(), wanted, rtol=1e-5)
    with torch.no_grad():
        options["lr"][0].fill_(0.25)
        options["betas"][0][1].fill_(0.5)
    higher.optim.apply_trainable_opt_params(optimizer, options)
    group = optimizer.param_groups[0]
    assert group["lr"] == 0.25 and type(group["lr"]) is float
    assert group["betas"][1] == 0.5 and type(group["betas"]) is tuple
    assert type(group["betas"][1]) is float
    assert group["params"][0] is model.hidden.weight and not group["amsgrad"]
    with pytest.raises(ValueError, match="lr"):
        higher.optim.apply_trainable_opt_params(optimizer, {"lr": [torch.tensor(0.1)] * 3})


def test_applied_options_by_group():
    model = Net()
    groups = [{"params": list(part.parameters())} for part in (model.hidden, model.head)]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    one, two = torch.tensor(0.25), torch.tensor(0.5)
    higher.optim.apply_trainable_opt_params(optimizer, {"lr": [one, two], "momentum": [two]})
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.5]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5, 0.5]
