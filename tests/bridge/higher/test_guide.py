"""What docs/coming_from_higher.md says of differences from `higher`, adjoints and speed is so."""

import re
import warnings
from typing import Any

import pytest
import torch
from eager_higher import innerloop_ctx as eager_innerloop_ctx
from oracle import batches, close, squared
from scripts import network
from torch import nn

import jaxmeta
from jaxmeta_bridge import UnsupportedOpError, higher
from jaxmeta_bridge.recorder.execute import STATISTICS

X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def adapted(model: Any, steps: int = 3, scale: float = 1.0, x: torch.Tensor = X, **options: Any):
    """The copy after some steps, still connected to the model."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    context = higher.innerloop_ctx(model, sgd, copy_initial_weights=False, **options)
    with context as (fmodel, diffopt):
        for _ in range(steps):
            diffopt.step((fmodel(x) * scale).square().mean())
    return fmodel


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


def test_wrong_shapes_and_labels_raise_where_they_are_wrong():
    fmodel = adapted(network(3))
    with pytest.raises(RuntimeError, match="4x2 and 3x4"):
        fmodel(X[:, :2])
    with pytest.raises(IndexError, match="Target 5"):
        nn.functional.cross_entropy(fmodel(X), torch.tensor([0, 1, 5, 2]))


def test_a_singular_matrix_is_no_error():
    weight = next(adapted(network()).parameters())[:3] * 0
    assert not torch.linalg.inv(weight).isfinite().any()
    with pytest.raises(RuntimeError, match="singular"):
        torch.linalg.inv(torch.zeros(3, 3))


def test_anomaly_detection_notices_nothing():
    model = network()
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly():
        (adapted(model)(X) * 0).sqrt().sum().backward()
        assert gradients(model)[0].isnan().any()


def test_classes_of_tensors():
    model = network()
    result = adapted(model)(X)
    assert isinstance(result, torch.Tensor)
    assert type(result) is not torch.Tensor
    before = STATISTICS.run
    result.sum().backward()
    assert isinstance(model[0].weight.grad, torch.Tensor)
    assert STATISTICS.run == before, "the gradient is owed"
    assert model[0].weight.grad.abs().sum() > 0
    assert STATISTICS.run == before + 1


def test_no_graph_is_freed():
    model = network()
    loss = adapted(model)(X).sum()
    loss.backward()
    once = gradients(model)
    loss.backward()
    close(gradients(model), [2 * gradient for gradient in once])


def test_gradient_hooks():
    model, seen = network(), []
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, sgd) as (fmodel, diffopt):
        start = next(fmodel.parameters())
        start.register_hook(seen.append)
        diffopt.step(fmodel(X).square().mean())
        fmodel(X).sum().backward()
        (gradient,) = seen
        assert start.grad is not None
        close(gradient, start.grad)
        with pytest.raises(UnsupportedOpError, match="grad_callback"):
            fmodel(X).register_hook(seen.append)


def test_backward_hooks_of_the_model_do_not_run():
    model, seen = network(), []
    model.register_full_backward_hook(lambda *_: seen.append(None))
    with pytest.warns(UserWarning, match="backward hooks of Sequential do not run"):
        adapted(model)(X).sum().backward()
    assert model[0].weight.grad is not None
    assert not seen


def head_only(innerloop_ctx: Any) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """The gradients that a callback sees in two steps, the weights then, and meta-gradients."""
    model, seen, weights = network(), [], []
    head = torch.optim.SGD(model[2].parameters(), lr=0.1)

    def callback(found: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.append([gradient.detach() for gradient in found])
        return found

    with innerloop_ctx(model, head, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(2):
            weights = [p.detach() for p in fmodel.parameters()]
            diffopt.step(fmodel(X).square().mean(), grad_callback=callback)
        fmodel(X).square().mean().backward()
    return [*seen, weights], gradients(model)


def test_a_callback_sees_total_derivatives():
    """Also by parameters that the optimizer does not have, through the steps so far."""
    (_, second, _), meta = head_only(higher.innerloop_ctx)
    (_, totals, _), wanted = head_only(eager_innerloop_ctx)
    close(second, totals)
    close(meta, wanted)


def test_transformations_of_torch_are_refused():
    fmodel = adapted(network())
    with pytest.raises(UnsupportedOpError, match=r"torch\.func"):
        torch.func.vmap(fmodel)(X)
    with pytest.raises(UnsupportedOpError, match=r"torch\.func"):
        torch.func.grad(lambda x: fmodel(x).sum())(X)
    with pytest.raises(UnsupportedOpError, match="is_grads_batched"):
        torch.autograd.grad(
            fmodel(X), list(fmodel.parameters()), torch.ones(2, 4, 1), is_grads_batched=True
        )
    weights = dict(fmodel.named_parameters())
    close(torch.func.functional_call(network(), weights, (X,)), fmodel(X))


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_optimizers_without_a_differentiable_version(kind: Any):
    model = network()
    with pytest.raises(ValueError, match="register_optim"):
        higher.get_diff_optim(kind(model.parameters()), model.parameters())


def test_contents_count_from_when_they_are_used():
    fmodel, x = adapted(network()), X.clone()
    loss = fmodel(x).sum()
    x.zero_()
    close(loss, fmodel(X).sum())


class Counting(jaxmeta.StepCheckpoint):
    """Notes that it was asked."""

    loops = 0

    def loop(self, *args: Any, **kwargs: Any) -> Any:
        Counting.loops += 1
        return super().loop(*args, **kwargs)


def test_the_adjoint_is_used_and_changes_no_gradient():
    expected, model = network(), network()
    adapted(expected, steps=6)(X).sum().backward()
    adapted(model, steps=6, adjoint=Counting())(X).sum().backward()
    close(gradients(model), gradients(expected), rtol=1e-12)
    assert Counting.loops > 0


def test_first_order_gradients():
    model = network()
    fmodel = adapted(model)
    weights = list(fmodel.parameters())
    found = torch.autograd.grad(fmodel(X).sum(), weights)
    start = [torch.tensor(w.tolist(), dtype=w.dtype, requires_grad=True) for w in weights]
    names = [name for name, _ in model.named_parameters()]
    output = torch.func.functional_call(network(), dict(zip(names, start, strict=True)), (X,))
    close(found, torch.autograd.grad(output.sum(), start))


def test_a_loop_that_is_cut():
    model = network()
    fmodel = adapted(model)
    fmodel.update_params([p.detach().requires_grad_() for p in fmodel.parameters()])
    fmodel(X).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in fmodel.parameters())


def test_steps_of_a_part_of_the_model_are_a_loop():
    model = network()
    head = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with higher.innerloop_ctx(model, head, copy_initial_weights=False) as (fmodel, diffopt):
        for batch in batches(8, inputs=3):
            diffopt.step(squared(fmodel, batch))
    assert "8 steps in a lax.scan" in higher.explain(fmodel(X).sum())


def runs_of(function: Any, *args: Any) -> tuple[int, int]:
    """How many programs a call compiles and how many it runs."""
    compiled, run = STATISTICS.compiled, STATISTICS.run
    function(*args)
    return STATISTICS.compiled - compiled, STATISTICS.run - run


def test_numbers_compile_nothing_and_shapes_do():
    def train(rate: float, scale: float, x: torch.Tensor) -> None:
        model = network(5)
        sgd = torch.optim.SGD(model.parameters(), lr=rate)
        with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (fmodel, diffopt):
            diffopt.step((fmodel(x) * scale).square().mean())
            fmodel(x).sum().backward()
        assert model[0].weight.grad is not None
        model[0].weight.grad.sum().item()

    for _ in range(2):  # the first may pay what is owed elsewhere
        train(0.1, 1.0, X)
    assert runs_of(train, 0.2, 3.0, X) == (0, 1)
    assert runs_of(train, 0.1, 1.0, X[:3]) == (1, 1)


def test_a_read_is_a_run():
    def train(read: bool) -> None:
        model = network(6)
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        with higher.innerloop_ctx(model, sgd) as (fmodel, diffopt):
            for _ in range(5):
                losses.append(fmodel(X).square().mean())
                diffopt.step(losses[-1])
                if read:
                    losses[-1].item()
        torch.stack(losses).tolist()

    assert runs_of(train, False)[1] == 1
    assert runs_of(train, True)[1] >= 5


def test_owed_gradients_of_tasks_run_together():
    model = network(7)
    outer = torch.optim.Adam(model.parameters())

    def train() -> None:
        for task in range(4):
            fmodel = adapted(model, scale=1.0 + task)
            fmodel(X).sum().backward()

    assert runs_of(train) == (0, 0)
    assert runs_of(outer.step) == (1, 1)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inside(x).exp().sin()


def test_how_layers_are_recorded():
    def operations(model: nn.Module) -> str:
        found = re.search(r"once: (.*)", higher.explain(higher.monkeypatch(model)(X)))
        assert found
        return found[1]

    assert operations(network()) == "Sequential"
    assert operations(Plain()) == "Sequential, exp, sin"
    hooked = network()
    hooked[1].register_forward_hook(lambda *_: None)
    assert operations(hooked).startswith("Linear, ")
    assert operations(hooked).endswith(", Linear")
