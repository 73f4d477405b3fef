"""Training loops written out in plain torch, in float64: what the drop-in is compared with."""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

Params = dict[str, torch.Tensor]
# One parameter's update: (parameter, gradient, that parameter's own state) → new parameter.
Rule = Callable[[torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
# (call, batch) → scalar, where call(*args, **kwargs) is the model with the present weights.
Loss = Callable[[Callable[..., Any], Any], torch.Tensor]


class Net(nn.Module):
    """Two layers of nine parameters, with methods and attributes of its own."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, 2)
        self.head = nn.Linear(2, 1)
        self.scale = 0.5
        randomize(self, seed)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.hidden(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x)) * self.scale


def randomize(model: Any, seed: int = 0) -> Any:
    """The model in float64, its parameters drawn from `seed` without torch's global generator."""
    model.double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """float64 draws that leave torch's global generator alone."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def batches(steps: int, size: int = 4, inputs: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One (x, y) for each step."""
    return [
        (normal(size, inputs, seed=2 * i), normal(size, 1, seed=2 * i + 1)) for i in range(steps)
    ]


def squared(call: Callable[..., torch.Tensor], batch: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """Mean squared error."""
    x, y = batch
    return ((call(x) - y) ** 2).mean()


def leaves(model: nn.Module) -> Params:
    """Detached copies of the parameters, that require gradients where the parameters do."""
    return {
        name: parameter.detach().clone().requires_grad_(parameter.requires_grad)
        for name, parameter in model.named_parameters()
    }


def unroll(
    model: nn.Module,
    start: Mapping[str, torch.Tensor],
    data: Iterable[Any],
    rule: Rule | Mapping[str, Rule],
    loss: Loss = squared,
    *,
    edit: Callable[[list[Any]], Sequence[Any]] | None = None,
    state: dict[str, dict[str, Any]] | None = None,
) -> list[Params]:
    """The parameters before the first step, after it, and so on, all connected to `start`.

    Args:
        model: called with each set of parameters in turn; not changed, except for its buffers.
        start: name → tensor, in the order of `model.named_parameters()`.
        data: one batch for each step.
        rule: the update of every parameter, or of each by its name (the others stay).
        loss: of the model's call and a batch.
        edit: takes and gives the gradients of all parameters in order, None where there is none.
        state: the optimizer's state by parameter name; changed.
    """
    history = [dict(start)]
    state = {} if state is None else state
    for batch in data:
        params = history[-1]
        value = at(model, params, batch, loss)
        wanted = [name for name, parameter in params.items() if parameter.requires_grad]
        found = torch.autograd.grad(
            value, [params[name] for name in wanted], create_graph=True, allow_unused=True
        )
        by_name = dict(zip(wanted, found, strict=True))
        grads: Sequence[Any] = [by_name.get(name) for name in params]
        grads = grads if edit is None else edit(list(grads))
        new = dict(params)
        for name, grad in zip(params, grads, strict=True):
            update = rule.get(name) if isinstance(rule, Mapping) else rule
            if update is not None and grad is not None:
                new[name] = update(params[name], grad, state.setdefault(name, {}))
        history.append(new)
    return history


def at(
    model: nn.Module, params: Mapping[str, torch.Tensor], batch: Any, loss: Loss = squared
) -> Any:
    """The loss of the model with these parameters."""
    return loss(functools.partial(_call, model, params), batch)


def train(fmodel: Any, diffopt: Any, data: Iterable[Any], loss: Loss = squared) -> None:
    """The same loop with the drop-in."""
    for batch in data:
        diffopt.step(loss(fmodel, batch))


def _call(model: nn.Module, params: Mapping[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(model, dict(params), args, kwargs)


def sgd(
    lr: Any,
    momentum: Any = None,
    *,
    dampening: Any = 0.0,
    weight_decay: Any = None,
    nesterov: bool = False,
    maximize: bool = False,
) -> Rule:
    """torch.optim.SGD written out; numbers or tensors, None is off."""

    def update(parameter: torch.Tensor, grad: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        if maximize:
            grad = -grad
        if weight_decay is not None:
            grad = grad + weight_decay * parameter
        if momentum is not None:
            old = state.get("momentum_buffer")
            buffer = grad if old is None else momentum * old + (1 - dampening) * grad
            state["momentum_buffer"] = buffer
            grad = grad + momentum * buffer if nesterov else buffer
        return parameter - lr * grad

    return update


def adam(
    lr: Any,
    betas: tuple[Any, Any] = (0.9, 0.999),
    eps: Any = 1e-8,
    *,
    weight_decay: Any = None,
    decoupled: bool = False,
    amsgrad: bool = False,
) -> Rule:
    """torch.optim.Adam, or AdamW (decoupled), written out; numbers or tensors, None is off."""
    beta1, beta2 = betas

    def update(parameter: torch.Tensor, grad: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        if weight_decay is not None and decoupled:
            parameter = parameter * (1 - lr * weight_decay)
        elif weight_decay is not None:
            grad = grad + weight_decay * parameter
        step = state["step"] = int(state.get("step", 0)) + 1
        mean = state["exp_avg"] = beta1 * state.get("exp_avg", 0) + (1 - beta1) * grad
        square = beta2 * state.get("exp_avg_sq", 0) + (1 - beta2) * grad * grad
        state["exp_avg_sq"] = square
        if amsgrad:
            largest = state.get("max_exp_avg_sq", torch.zeros_like(square))
            square = state["max_exp_avg_sq"] = torch.maximum(largest, square)
        root = (square / (1 - beta2**step)).sqrt()
        return parameter - lr / (1 - beta1**step) * mean / (root + eps)

    return update


def stepped(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Iterable[Any], loss: Loss = squared
) -> tuple[list[list[torch.Tensor]], nn.Module, torch.optim.Optimizer]:
    """Copies of model and optimizer, trained by torch itself.

    Returns:
        The parameters before the first step, after it, and so on, then the two copies.
    """
    model, optimizer = copy.deepcopy((model, optimizer))
    history = [_snapshot(model)]
    for batch in data:
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        history.append(_snapshot(model))
    return history, model, optimizer


def _snapshot(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def grad_of(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor.grad`, which has to be there."""
    assert tensor.grad is not None
    return tensor.grad


def fd(
    function: Callable[[torch.Tensor], Any], at: torch.Tensor, width: float = 3e-5
) -> torch.Tensor:
    """The gradient of a scalar function by central differences of fourth order, about 1e-10 off.

    `function` takes a detached tensor like `at` and gives a scalar tensor or a float.
    """
    at = at.detach()
    gradient = torch.zeros(at.numel(), dtype=torch.float64)

    def moved(i: int, by: float) -> float:
        there = at.clone().reshape(-1)
        there[i] += by
        value = function(there.reshape(at.shape))
        return value.item() if isinstance(value, torch.Tensor) else value

    for i in range(at.numel()):
        near = moved(i, width) - moved(i, -width)
        far = moved(i, 2 * width) - moved(i, -2 * width)
        gradient[i] = (8 * near - far) / (12 * width)
    return gradient.reshape(at.shape)


def close(actual: Any, expected: Any, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    """Asserts equal None-ness, shape, dtype and value; of lists and dicts, item by item."""
    pairs = list(_pairs(actual, expected))
    if len(pairs) > 1 and len({found.dtype for found, _ in pairs}) == 1:
        # one read, so that one program has to be compiled
        found, wanted = (
            torch.cat([tensor.detach().reshape(-1) for tensor in side]).numpy()
            for side in zip(*pairs, strict=True)
        )
        if np.allclose(found, wanted, rtol, atol):
            return
    for found, wanted in pairs:
        np.testing.assert_allclose(
            found.detach().numpy(), wanted.detach().numpy(), rtol=rtol, atol=atol
        )


def _pairs(actual: Any, expected: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if isinstance(expected, Mapping):
        assert list(actual) == list(expected)
        actual, expected = list(actual.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        actual = list(actual)
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            yield from _pairs(one, other)
    elif expected is None or actual is None:
        assert actual is None and expected is None
    else:
        found, wanted = (
            value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)
            for value in (actual, expected)
        )
        assert found.shape == wanted.shape
        assert found.dtype == wanted.dtype
        yield found, wanted
