"""One weight, five steps: known weights, meta-loss and gradients."""

import numpy as np
import pytest
import torch
from oracle import close, fd, grad_of
from torch import nn

from jaxmeta_bridge import higher

_WEIGHTS = [-0.9915, -0.1217, 1.0145, 2.0640, 2.8668, 3.3908]


def _inputs():
    torch.manual_seed(3)
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.from_numpy(np.random.RandomState(1).random_sample((100, 1)))
    lr, momentum = (torch.tensor([value], requires_grad=True) for value in (0.3, 0.5))
    return model, x, lr, momentum


def _by_hand(weight, x, lr, momentum):
    """The meta-loss as a float: the loss is a parabola of the one weight."""
    curvature, velocity = x.square().mean().item(), None
    for _ in range(5):
        slope = 2 * curvature * (weight - 3.5)
        velocity = slope if velocity is None else momentum * velocity + slope
        weight = weight - lr * velocity
    return (weight - 3.5) ** 2


@pytest.mark.parametrize("copied", [True, False])
def test_worked_example(copied):
    model, x, lr, momentum = _inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    override = {"lr": lr, "momentum": momentum}
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=copied, override=override) as (
        fmodel,
        diffopt,
    ):
        for _ in range(5):
            diffopt.step(((fmodel(x) - 3.5 * x) ** 2).mean())
        weights = [next(fmodel.parameters(time=time)).item() for time in range(6)]
        meta_loss = ((fmodel.weight - 3.5) ** 2).sum()
        meta_loss.backward()
    assert weights == pytest.approx(_WEIGHTS, abs=5e-5)
    assert meta_loss.item() == pytest.approx(0.0119279879829, rel=1e-11)
    start = model.weight.detach().reshape(())
    rate, decay = lr.item(), momentum.item()
    assert meta_loss.item() == pytest.approx(_by_hand(start.item(), x, rate, decay), rel=1e-12)

    lr_wanted = fd(
        lambda v: _by_hand(start.item(), x, v.item(), decay), torch.tensor([rate]).double()
    )
    momentum_wanted = fd(
        lambda v: _by_hand(start.item(), x, rate, v.item()), torch.tensor([decay]).double()
    )
    lr_grad, momentum_grad = grad_of(lr), grad_of(momentum)
    assert lr_grad.dtype == momentum_grad.dtype == torch.float32
    close(lr_grad.double(), lr_wanted, rtol=1e-6)
    close(momentum_grad.double(), momentum_wanted, rtol=1e-6)
    assert lr_grad.item() == pytest.approx(-1.6295, abs=5e-5)
    assert momentum_grad.item() == pytest.approx(-0.9496, abs=5e-5)
    if copied:
        assert model.weight.grad is None
    else:
        wanted = fd(lambda w: _by_hand(w.item(), x, rate, decay), start)
        close(grad_of(model.weight).reshape(()), wanted, rtol=1e-8)
        assert grad_of(model.weight).item() == pytest.approx(-0.005311, abs=5e-7)
