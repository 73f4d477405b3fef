"""What `higher.explain` says of a recording, and of what made it run."""

import contextlib
import doctest
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from jaxmeta import ArgumentTypeError
from jaxmeta_bridge import higher
from jaxmeta_bridge.recorder import history
from jaxmeta_bridge.recorder.execute import STATISTICS


@pytest.fixture(autouse=True)
def own_history(monkeypatch: pytest.MonkeyPatch) -> dict[Any, history.Runs]:
    """The runs of one test alone."""
    runs: dict[Any, history.Runs] = {}
    monkeypatch.setattr(history, "RUNS", runs)
    monkeypatch.setattr("jaxmeta_bridge.recorder.explain.RUNS", runs)
    monkeypatch.setattr("jaxmeta_bridge.recorder.explain._WIDTH", 1000)  # so that no line is broken
    monkeypatch.setattr(STATISTICS, "compiled", 0)
    monkeypatch.setattr(STATISTICS, "run", 0)
    return runs


@contextlib.contextmanager
def inner_loop(width: int, steps: int, seed: int = 0) -> Iterator[tuple[Any, torch.Tensor]]:
    """After `steps` of SGD: the patched model, and the input that it was trained on."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.rand(4, 2, generator=generator)
    with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(steps):
            diffopt.step(F.mse_loss(fmodel(x), x.sum(1, keepdim=True)))
        yield fmodel, x


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines()]


def test_steps_are_one_scan():
    with inner_loop(3, steps=5) as (fmodel, x):
        found = lines(higher.explain(fmodel(x).sum()))
    assert found[0] == "float32[] with grad, from 7 segments"
    assert "once: clone" in found, "the weights that training starts from"
    assert "5 steps in a lax.scan: gradient of (Sequential, mse_loss), SGD" in found
    assert "once: Sequential, sum" in found
    assert STATISTICS.run == 0, "nothing is computed for it"


def test_what_a_loop_takes():
    lr = torch.tensor([0.1], requires_grad=True)
    model = nn.Linear(2, 1, bias=False).double()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = torch.rand(6, 4, 2, dtype=torch.float64)
    with higher.innerloop_ctx(model, sgd, override={"lr": [lr]}) as (fmodel, diffopt):
        for batch in batches.unbind():
            diffopt.step(fmodel(batch).square().mean())
    found = lines(higher.explain(fmodel.weight.sum()))
    assert found[1] == (
        "inputs: float64[1,2] with grad, float64[4,2] ×6, float32[1] with grad "
        f"({8 * (6 * 4 * 2 + 2) + 4} bytes), 1 Python number"
    )
    assert "carried from one to the next: float64[1,2] with grad (16 bytes)" in found
    assert "the same for all: float32[1] with grad (4 bytes), 1 Python number" in found
    assert "its own for each: float64[4,2] (64 bytes)" in found


def test_tasks_are_a_loop_over_the_loop_of_their_steps():
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for task in torch.rand(4, 5, 2).unbind():
        with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(3):
                diffopt.step(fmodel(task).square().mean())
            losses.append(fmodel(task).mean())
    text = higher.explain(torch.stack(losses).sum())
    outer = next(line for line in text.splitlines() if "side by side in a vmap, each of" in line)
    inner = next(line for line in text.splitlines() if "3 steps in a lax.scan" in line)
    # The last one is a segment of its own if more is recorded right behind it.
    assert re.match(r"  [34] times", outer)
    assert indent(inner) > indent(outer)
    assert text.index(outer) < text.index(inner)


def indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def test_long_segments_are_cut_short():
    with inner_loop(3, steps=1) as (fmodel, x):
        y = fmodel(x)
        for _ in range(20):
            y = y.sin().cos()
    found = " ".join(lines(higher.explain(y)))
    assert "sin, cos, sin" in found
    assert "and 17 more" in found  # of Sequential and 40 others, 24 are named


def test_equal_neighbours_are_counted():
    with inner_loop(3, steps=1) as (fmodel, x):
        y = fmodel(x).exp().exp().exp()
    assert "once: Sequential, exp ×3" in lines(higher.explain(y))


def test_lines_that_made_programs_run():
    with inner_loop(4, steps=2) as (fmodel, x):
        loss = fmodel(x).sum()
        for _ in range(3):
            (loss * 2).item()
        loss.backward()
        next(fmodel.parameters(time=0)).tolist()
    found = lines(higher.explain())
    ours = re.compile(rf"{re.escape(__file__)}:\d+: (.*)")
    runs = {m[1]: found[i + 1] for i, line in enumerate(found) if (m := ours.match(line))}
    assert "(loss * 2).item()" in runs
    assert runs["(loss * 2).item()"].startswith("item: 3 runs of ")
    assert [line for line in runs if line.startswith("next(")], "gradients are owed to a leaf"


def test_programs_are_counted(own_history: dict[Any, history.Runs]):
    for seed in range(3):
        with inner_loop(7, steps=2, seed=seed) as (fmodel, x):
            fmodel(x).sum().item()
    (runs,) = own_history.values()
    assert (runs.count, runs.compiled) == (3, 1)
    assert lines(higher.explain())[0] == "1 program compiled, 3 runs, since the start"


def test_an_optimizer_that_asks_for_owed_gradients_is_named(
    own_history: dict[Any, history.Runs],
):
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, sgd, copy_initial_weights=False) as (fmodel, diffopt):
        diffopt.step(fmodel(torch.ones(3, 2)).square().mean())
        fmodel(torch.ones(3, 2)).mean().backward()
    assert not own_history, "the gradients are computed when they are needed"
    torch.optim.Adam(model.parameters()).step()
    (runs,) = own_history.values()
    assert runs.cause == "step"
    assert runs.source.endswith("torch.optim.Adam(model.parameters()).step()")


def test_the_history_is_bounded(
    own_history: dict[Any, history.Runs], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(history, "LONGEST", 2)
    with inner_loop(3, steps=1) as (fmodel, x):
        loss = fmodel(x).sum()
    (loss * 1).item()
    (loss * 2).item()
    (loss * 3).item()
    assert len(own_history) == 2
    assert [runs.source.split(": ")[-1] for runs in own_history.values()] == [
        "(loss * 2).item()",
        "(loss * 3).item()",
    ]


def test_inputs_have_nothing_to_compute():
    with inner_loop(3, steps=1) as (fmodel, _):
        first = next(fmodel.parameters(time=0))
    assert first.requires_grad
    with torch.no_grad():
        value = first.sum()
        value.item()
    assert "an input" in lines(higher.explain(value))[0]


@pytest.mark.parametrize("value", [torch.ones(1), 3.0, nn.Linear(1, 1)])
def test_ordinary_values_are_refused(value: Any):
    with pytest.raises(ArgumentTypeError, match=f"tensor is a {type(value).__name__}; expected"):
        higher.explain(value)


def test_the_example_in_the_documentation():
    example = doctest.DocTestFinder().find(higher.explain, "explain")
    runner = doctest.DocTestRunner()
    assert all(runner.run(test).failed == 0 and test.examples for test in example)
