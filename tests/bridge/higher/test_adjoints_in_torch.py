"""Each adjoint of jaxmeta in the drop-in, against an unroll in plain torch."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jaxmeta
from jaxmeta_bridge import higher

STEPS = 6
ADJOINTS = [
    "auto",
    jaxmeta.Auto(memory=1),
    jaxmeta.ReverseMode(),
    jaxmeta.StepCheckpoint(),
    jaxmeta.NestedCheckpoint((2, 3)),
    jaxmeta.MixedMode(),
    jaxmeta.MixedMode(jaxmeta.NestedCheckpoint()),
    jaxmeta.ForwardMode(),
]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(2, 3), nn.Tanh(), nn.Softplus(), nn.Linear(3, 1)
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (STEPS + 1, 5, 2), (STEPS + 1, 5, 1)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, y


def gradients(adjoint: Any, second: bool) -> list[Tensor]:
    model, (x, y) = network(), data()
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with higher.innerloop_ctx(
        model, opt, copy_initial_weights=False, override={"lr": [rate]}, adjoint=adjoint
    ) as (fmodel, diffopt):
        for step in range(STEPS):
            diffopt.step(F.mse_loss(fmodel(x[step]), y[step]))
        loss = F.mse_loss(fmodel(x[-1]), y[-1])
        return derivatives(loss, [rate, *model.parameters()], second)


def by_hand(second: bool) -> list[Tensor]:
    model, (x, y) = network(), data()
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    weights: dict[str, Tensor] = {**dict(model.named_parameters())}
    moments: dict[str, Tensor] = {}
    for step in range(STEPS):
        loss = F.mse_loss(torch.func.functional_call(model, weights, (x[step],)), y[step])
        slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        for name, slope in zip(weights, slopes, strict=True):
            moments[name] = 0.5 * moments[name] + slope if step else slope
        weights = {name: w - rate * moments[name] for name, w in weights.items()}
    loss = F.mse_loss(torch.func.functional_call(model, weights, (x[-1],)), y[-1])
    return derivatives(loss, [rate, *model.parameters()], second)


def derivatives(loss: Tensor, inputs: list[Tensor], second: bool) -> list[Tensor]:
    first = torch.autograd.grad(loss, inputs, create_graph=second)
    if not second:
        return list(first)
    squares = torch.stack([(slope**2).sum() for slope in first])
    return list(torch.autograd.grad(squares.sum(), inputs))


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_meta_gradients(adjoint: Any):
    torch.testing.assert_close(gradients(adjoint, False), by_hand(False), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("adjoint", ["auto", jaxmeta.MixedMode(jaxmeta.NestedCheckpoint())])
def test_second_derivatives(adjoint: Any):
    torch.testing.assert_close(gradients(adjoint, True), by_hand(True), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("adjoint", ["mixed", jaxmeta.MixedMode, 3])
def test_anything_else_is_refused(adjoint: Any):
    with pytest.raises(jaxmeta.ArgumentTypeError, match="expected 'auto' or one of jaxmeta's"):
        gradients(adjoint, False)
