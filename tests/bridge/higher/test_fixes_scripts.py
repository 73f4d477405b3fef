"""What scripts in use have come across: each a short script, checked against plain eager torch."""

# Every loop of these scripts runs at least once.
# pyright: reportPossiblyUnboundVariable=false

import torch
import torch.nn.functional as F
from oracle import randomize
from scripts import batch, gradients, network, script, sgd
from torch import autograd, nn

from jaxmeta_bridge import higher
from jaxmeta_bridge.recorder.execute import STATISTICS


def test_momentum_that_is_switched_on_later_goes_on_from_the_given_buffers():
    """The optimizer has buffers and momentum 0; the loop sets momentum before its first step."""
    weight = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.5)
    (3 * weight).sum().backward()
    optimizer.step()  # the buffer is 3
    optimizer.param_groups[0]["momentum"] = 0.0
    start = weight.detach().clone().requires_grad_()
    diffopt = higher.get_diff_optim(optimizer, [weight])
    diffopt.param_groups[0]["momentum"] = 0.5
    (new,) = diffopt.step((start**2).sum(), params=[start])
    expected = start - 0.1 * (0.5 * 3 + 2 * start)
    torch.testing.assert_close(new.detach(), expected.detach(), rtol=1e-12, atol=0)


def test_parameters_compare_with_fast_weights_in_torch_testing():
    model = randomize(nn.Linear(2, 1))
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, _):
        for parameter, fast in zip(model.parameters(), fmodel.parameters(), strict=True):
            torch.testing.assert_close(parameter, fast)
            torch.testing.assert_close(fast, parameter)
            assert isinstance(fast, torch.Tensor) and not isinstance(fast, nn.Parameter)


@script
def test_a_simulation_that_branches_on_its_state(higher, peek):
    """A controlled particle between walls; the script reads where it is several times a step."""
    policy = network()
    x, y = batch()
    hits = []
    with higher.innerloop_ctx(policy, sgd(policy), copy_initial_weights=False) as (
        fpolicy,
        diffopt,
    ):
        diffopt.step(F.mse_loss(fpolicy(x), y))
        place, speed = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.3).double()
        for _ in range(6):
            force = fpolicy(torch.stack([place, speed, place * speed])).squeeze()
            speed = speed + 0.2 * force
            place = place + speed
            if speed > 0.4:
                speed = speed * 0.5
                hits.append("fast")
            if place > 1.0 or place < -1.0:
                place, speed = place.clamp(-1, 1), -speed
                hits.append("wall")
            peek(place)
        place.backward()
    return hits, place, speed, gradients(policy)


def test_reads_in_a_long_stretch_compile_a_fixed_number_of_programs():
    """Each step of a simulation is read as it goes: no program grows with the steps before."""

    def simulate(steps):
        model = network()
        with higher.innerloop_ctx(model, sgd(model)) as (fmodel, _):
            state = torch.ones(3, dtype=torch.float64)
            for _ in range(steps):
                new = torch.cat([fmodel(state), state[:2]])
                if new[0] > 100:
                    new = -new
                if new[1] > 100:
                    new = -new
                state = new
        return state.tolist()

    simulate(8)
    before = STATISTICS.compiled
    long = simulate(30)
    assert STATISTICS.compiled == before
    model, state = network(), torch.ones(3, dtype=torch.float64)
    for _ in range(30):
        state = torch.cat([model(state), state[:2]])
    torch.testing.assert_close(torch.tensor(long).double(), state.detach(), rtol=1e-9, atol=1e-9)


@script
def test_reading_one_gradient_after_the_other(higher, peek):
    model = network()
    x, y = batch()
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        found = autograd.grad(fmodel(x).pow(2).sum(), list(fmodel.parameters()), create_graph=True)
        norms = []
        for gradient in found:
            peek(gradient)
            norms.append(gradient.norm())
            peek(norms[-1])
        torch.stack(norms).sum().backward()
    return norms, gradients(model)


@script
def test_gradients_of_new_and_old_loss_make_a_gradient_of_the_learning_rate(higher, peek):
    """Written by hand into `.grad` of an ordinary tensor, which an ordinary optimizer steps."""
    model = network()
    rate = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.Adam([rate], lr=0.05)
    x, y = batch()
    seen = []
    for _ in range(3):
        with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
            old = F.mse_loss(fmodel(x), y)
            diffopt.step(old, override={"lr": [10**rate]})
            new = F.mse_loss(fmodel(x), y)
            news = autograd.grad(new, list(fmodel.parameters(time=-1)))
            olds = autograd.grad(old, list(fmodel.parameters(time=-2)), retain_graph=True)
            rate.grad = torch.stack([(n * -o).sum() for n, o in zip(news, olds, strict=True)]).sum()
            peek(rate.grad)
            outer.step()
            seen.append(rate.detach().clone())
    return seen, rate


@script
def test_implicit_gradients_by_a_neumann_series(higher, peek):
    """The graph of the last step is gone through several times, in each outer iteration anew."""
    model = network()
    rate = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.Adam([rate], lr=0.05)
    x, y = batch()
    seen = []
    for _ in range(3):
        with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
            for _ in range(2):
                diffopt.step(F.mse_loss(fmodel(x), y), override={"lr": [10**rate]})
            loss = fmodel(x).pow(2).mean()
            last, new = list(fmodel.parameters(time=-2)), list(fmodel.parameters())
            change = [a - b for a, b in zip(last, new, strict=True)]
            term = total = autograd.grad(loss, new, retain_graph=True)
            for _ in range(2):
                products = autograd.grad(change, last, grad_outputs=term, retain_graph=True)
                term = [t - p for t, p in zip(term, products, strict=True)]
                total = [a + t for a, t in zip(total, term, strict=True)]
            (rate.grad,) = autograd.grad(change, [rate], grad_outputs=total)
            peek(rate.grad)
            seen.append(rate.grad.detach().clone())
            outer.step()
            with torch.no_grad():
                for parameter, fast in zip(model.parameters(), new, strict=True):
                    parameter.copy_(fast)
    return seen, rate, list(model.parameters())
