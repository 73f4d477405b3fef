"""Scripts: helpers and habits that many projects share."""

# Every loop of these scripts runs at least once.
# pyright: reportPossiblyUnboundVariable=false

import functools
import logging

import numpy as np
import torch
import torch.nn.functional as F
from scripts import batch, gradients, network, normal, script, sgd
from torch import nn
from torch.utils import _pytree as pytree

LABELS = torch.tensor([0, 2, 1, 2])


def maml(higher, model, **options):
    return higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **options)


class Meter:
    """A running average of whatever it is given."""

    def __init__(self):
        self.total, self.count = 0, 0

    def update(self, value, n=1):
        self.total += value * n
        self.count += n

    @property
    def average(self):
        return self.total / self.count


def accuracy(output, target, topk=(1,)):
    _, guess = output.topk(max(topk), 1, True, True)
    hits = guess.t().eq(target.view(1, -1).expand_as(guess.t()))
    return [hits[:k].reshape(-1).float().sum(0, keepdim=True) * (100 / len(target)) for k in topk]


@script
def test_meters_and_accuracies(higher, peek):
    model = network(3)
    losses, kept, first, second = Meter(), Meter(), Meter(), Meter()
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(2):
            logits = fmodel(normal(4, 3, seed=i))
            loss = F.cross_entropy(logits, LABELS)
            diffopt.step(loss)
            one, two = accuracy(logits, LABELS, topk=(1, 2))
            losses.update(loss.item(), 4)
            kept.update(loss, 4)  # with its graph
            first.update(one.item())
            second.update(two)
            peek(two)
            with torch.no_grad():
                guesses = fmodel(normal(4, 3)).argmax(-1).eq(LABELS).double().mean()
        confusion = np.zeros((3, 3), dtype=int)
        np.add.at(confusion, (LABELS.numpy(), logits.argmax(1).numpy()), 1)
        meta = kept.average + F.cross_entropy(fmodel(normal(4, 3)), LABELS)
    meta.backward()
    results = losses.average, first.average, second.average, guesses, confusion.tolist()
    return meta, results, gradients(model)


@script
def test_stored_activations(higher, peek):
    """Forward hooks on the patched model keep what the layers give, and a loss uses it."""
    model = network()
    stored = {}
    with maml(higher, model) as (fmodel, diffopt):
        handle = list(fmodel.children())[1].register_forward_hook(
            lambda module, inputs, output: stored.update(h=output, before=inputs[0])
        )
        x, y = batch()
        for _ in range(2):
            loss = F.mse_loss(fmodel(x), y) + stored["h"].pow(2).mean()
            peek(stored["before"])
            diffopt.step(loss)
        handle.remove()
        kept = stored["h"]
        meta = F.mse_loss(fmodel(x), y) + kept.abs().mean()
    meta.backward()
    return meta, kept, gradients(model)


@script
def test_a_gradient_scaler(higher, peek):
    model = network()
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    x, y = batch()
    for _ in range(2):
        outer.zero_grad()
        with maml(higher, model) as (fmodel, diffopt):
            loss = F.mse_loss(fmodel(x), y)
            peek(loss)
            diffopt.step(loss)
            meta = F.mse_loss(fmodel(x), y)
            scaler.scale(meta).backward()
        scaler.unscale_(outer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(outer)
        scaler.update()
    return meta, norm, list(model.parameters()), scaler.get_scale()


@script
def test_helpers_over_trees_and_lists(higher, peek):
    model = network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        tree = {"out": fmodel(x), "both": [fmodel(x) * 2, (fmodel(x).sum(), 3)]}
        leaves = pytree.tree_leaves(tree)
        assert [torch.is_tensor(leaf) for leaf in leaves] == [True, True, True, False]
        tree = pytree.tree_map(lambda t: t.detach() if torch.is_tensor(t) else t, tree)
        peek(tree["out"])
        loss = functools.reduce(torch.add, [leaf.mean() for leaf in leaves[:3]])
        flat = torch.hstack([p.ravel() for p in fmodel.parameters()])
        loss = loss + torch.linalg.vector_norm(flat)
        loss = loss + torch.cat([out.flatten() for out in leaves[:2]]).logsumexp(0)
        grid = torch.meshgrid(fmodel(x)[:, 0], torch.arange(2.0).double(), indexing="ij")
        diffopt.step(loss + (grid[0] * grid[1]).mean())
        meta = fmodel(x).mean()
    meta.backward()
    return meta, tree, gradients(model)


@script
def test_schedules_and_annealing(higher, peek):
    """Learning rates, temperatures and warm-ups that change with every step and epoch."""
    model = network(3)
    temperature = 2.0
    for epoch in range(2):
        with maml(higher, model) as (fmodel, diffopt):
            for step in range(3):
                logits = fmodel(normal(4, 3, seed=step)) / temperature
                loss = F.cross_entropy(logits, LABELS) * (0.5 + np.cos(step) / 2).item()
                peek(loss)
                diffopt.step(loss, override={"lr": [0.2 * 0.9**step]})
                temperature *= 0.9
            meta = F.cross_entropy(fmodel(normal(4, 3)), LABELS) / (epoch + 1)
            meta.backward()
    return meta, gradients(model)


@script
def test_flags_flipped_between_calls(higher, peek):
    """requires_grad of inputs and of the model changes while the loop runs."""
    model = network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        diffopt.step(F.mse_loss(fmodel(x), y))
        x.requires_grad_()
        loss = F.mse_loss(fmodel(x), y)
        diffopt.step(loss)
        peek(loss)
        for p in model.parameters():
            p.requires_grad_(False)
        meta = F.mse_loss(fmodel(x), y)
        y.requires_grad_()
        meta = meta + (fmodel(x) * y).mean()
        for p in model.parameters():
            p.requires_grad_(True)
    meta.backward()
    return meta, x.grad, y.grad, gradients(model)


@script
def test_logging_writes_numbers(higher, peek):
    model = network()
    x, y = batch()
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log = logging.Logger("loop")
    log.addHandler(handler)
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(2):
            loss = F.mse_loss(fmodel(x), y)
            log.info("step %d loss %.4f", i, loss.item())
            diffopt.step(loss)
            log.info("norms %s", [f"{p.norm():.3f}" for p in fmodel.parameters()])
            peek(loss)
        log.info("shape %s, %s", tuple(fmodel(x).shape), {"loss": round(loss.item(), 3)})
    return records


@script
def test_model_agnostic_interpolation(higher, peek):
    """Weights of several times averaged and put back, as in weight averaging and Reptile."""
    model = network()
    x, y = batch()
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(3):
            diffopt.step(F.mse_loss(fmodel(x), y) + 0.1 * i)
        times = [list(fmodel.parameters(time=t)) for t in range(4)]
        averaged = [torch.stack(ps).mean(0) for ps in zip(*times, strict=True)]
        peek(*averaged)
        out = fmodel(x, params=averaged)
        moved = [torch.lerp(a, b, 0.25) for a, b in zip(times[0], times[-1], strict=True)]
        fmodel.update_params(moved)
        diffopt.step(F.mse_loss(fmodel(x), y))
        meta = F.mse_loss(fmodel(x), y) + out.mean()
    meta.backward()
    return meta, gradients(model)
