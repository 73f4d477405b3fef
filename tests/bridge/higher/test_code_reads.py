"""Scripts that read values in the middle: they get what eager torch gives, and nothing changes."""

# Every loop of these scripts runs at least once.
# pyright: reportPossiblyUnboundVariable=false

import contextlib
import io
import math
import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import batch, check, gradients, network, normal, script, sgd
from torch import nn

READERS = {
    "item": lambda t: t[0].item(),
    "float": lambda t: float(t[0].detach()),
    "int": lambda t: int(t[0].detach() * 100),
    "bool": lambda t: bool(t[0] > 0),
    "not": lambda t: not (t > 0).any(),
    "complex": lambda t: complex(t[0].detach()),
    "index": lambda t: operator.index((t.detach() * 10).long()[0]),
    "str": lambda t: str(t.detach()),
    "repr with grad": lambda t: "requires_grad" in repr(t) or "grad_fn" in repr(t),
    "format": lambda t: f"{t[0]:.4f} {t[0].item():8.3e}",
    "percent": lambda t: "%.4f" % t[0].item(),  # noqa: UP031  (as scripts do)
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.detach().numpy().tolist(),
    "cpu, numpy": lambda t: t.detach().cpu().numpy().sum().item(),
    "data": lambda t: t.data.numpy().tolist(),
    "asarray": lambda t: np.asarray(t.detach()).tolist(),
    "np function": lambda t: float(np.mean(t.detach().numpy())) + float(np.max(t.tolist())),
    "array of items": lambda t: np.array([v.item() for v in t]).tolist(),
    "len": lambda t: len(t),
    "max": lambda t: max(t).item(),
    "sorted": lambda t: [v.item() for v in sorted(t, key=lambda v: -v)],
    "in": lambda t: (t[0].item() in t, 12345.0 in t),
    "comparison chain": lambda t: bool(-1e3 < t[0] < 1e3),
    "allclose": lambda t: torch.allclose(t, t + 1e-12),
    "equal": lambda t: (torch.equal(t, t.clone()), torch.equal(t, t + 1)),
    "isnan": lambda t: (math.isnan(t[0].item()), bool(torch.isnan(t).any())),
    "math": lambda t: math.exp(t[0].detach()),
    "round": lambda t: round(t[0].item(), 6),
    "argmax as key": lambda t: {0: "a", 1: "b", 2: "c", 3: "d"}[t.argmax().item()],
    "list index": lambda t: [10, 11, 12, 13][t.argmax()],
    "range": lambda t: list(range((t > -100).sum())),
    "unique": lambda t: torch.unique((t > 0).long()).tolist(),
    "nonzero": lambda t: torch.nonzero(t > 0).tolist(),
    "where": lambda t: [w.tolist() for w in torch.where(t > 0)],
    "masked": lambda t: t[t > 0].tolist(),
    "masked_select": lambda t: torch.masked_select(t, t < 0).detach().numpy().tolist(),
    "properties": lambda t: (
        [t.shape, t.dim(), t.size(0), t.numel(), t.nelement(), t.dtype, t.device.type],
        [t.requires_grad, t.is_leaf, t.grad_fn is None, t.is_cuda, t.layout, t.stride()],
        [t.is_contiguous(), t.element_size(), t.itemsize, t.nbytes, t.is_floating_point()],
        [t.storage_offset(), t.is_sparse, t.is_complex(), torch.is_tensor(t)],
    ),
    "detached properties": lambda t: (
        t.detach().requires_grad,
        t.detach().is_leaf,
        t.detach().grad_fn is None,
        t.data.requires_grad,
        (t > 0).requires_grad,
        t.argmax().requires_grad,
    ),
    "type": lambda t: (t.type(), isinstance(t, torch.Tensor), isinstance(t, nn.Parameter)),
    "identity": lambda t: (hash(t) == hash(t), t in {t}, {t: 1}[t], id(t) == id(t)),
    "to list of numpy": lambda t: [a.item() for a in np.split(t.detach().numpy(), 4)],
    "random choice": lambda t: int(
        np.random.choice(4, p=t.softmax(0).detach().numpy())  # noqa: NPY002
    ),
    "multinomial": lambda t: torch.multinomial(t.softmax(0), 2).tolist(),
    "sampled": lambda t: torch.distributions.Categorical(logits=t).sample().item(),
    "bernoulli": lambda t: torch.bernoulli(t.sigmoid()).tolist(),
    "randint": lambda t: torch.randint(0, 5, t.shape).tolist(),
    "copied": lambda t: torch.tensor(t.tolist()).tolist() + t.detach().clone().tolist(),
    "new tensors": lambda t: (t.new_zeros(2).tolist(), torch.ones_like(t).tolist()),
    "histogram": lambda t: torch.histc(t.detach(), bins=4).tolist(),
    "quantile": lambda t: t.quantile(0.5).item(),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_reading_gives_what_eager_torch_gives(reader):
    def function(higher, peek):
        model = network()
        x, y = batch()
        with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
            diffopt.step(F.mse_loss(fmodel(x), y))
            out = fmodel(x).squeeze(1)
            return reader(out - out.mean())  # of both signs

    check(function)


@script
def test_print_writes_numbers(higher, peek):
    model = network()
    x, y = batch()
    text = io.StringIO()
    with (
        contextlib.redirect_stdout(text),
        higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt),
    ):
        for step in range(2):
            loss = F.mse_loss(fmodel(x), y)
            diffopt.step(loss)
            print(step, loss.detach(), round(loss.item(), 6), fmodel(x).detach().T, sep="\n")
            print(f"{step}: {loss:.5f}", [round(p.norm().item(), 5) for p in fmodel.parameters()])
    return text.getvalue()


@script
def test_early_stopping(higher, peek):
    model = network()
    x, y = batch()
    with higher.innerloop_ctx(model, sgd(model, lr=0.3), copy_initial_weights=False) as (f, opt):
        best, waited, steps = float("inf"), 0, 0
        while steps < 11:
            steps += 1
            loss = F.mse_loss(f(x), y)
            opt.step(loss)
            if loss.item() < best - 0.05:
                best, waited = loss.item(), 0
            else:
                waited += 1
            if waited > 1 or loss < 0.01:
                break
        meta = F.mse_loss(f(x), y)
        while meta > 0.9 * best:
            opt.step(meta)
            peek(meta)
            meta = F.mse_loss(f(x), y)
            steps += 1
    meta.backward()
    return steps, best, meta, gradients(model)


class Branching(nn.Module):
    """Looks at its values in forward, in three ways."""

    def __init__(self):
        super().__init__()
        self.net, self.seen, self.kept = network(), [], None

    def forward(self, x):
        h = torch.tanh(self.net[0](x))
        self.kept = h
        if h.norm() > 1.5:
            h = h / h.norm()
        if x.shape[0] > 3 and h.sum().item() > 0:
            h = h * 2
        self.seen.append(round(float(h.detach().mean()), 6))
        return self.net[2](h)


@script
def test_branches_on_values_in_forward(higher, peek):
    model = Branching()
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        for i in range(4):
            x, y = batch(rows=2 + i, seed=i)
            loss = F.mse_loss(fmodel(x), y) + 0.1 * fmodel.kept.pow(2).mean()
            peek(loss)
            diffopt.step(loss)
        meta = fmodel(x).mean()
    meta.backward()
    return meta, fmodel.seen, gradients(model)


@script
def test_branches_on_values_in_a_gradient_callback(higher, peek):
    model = network()
    x, y = batch()
    norms = []

    def clip(grads):
        norm = torch.stack([g.norm() for g in grads]).norm()
        norms.append(norm.item())
        if norm > 0.5:
            return [g * 0.5 / norm for g in grads]
        return [g.clamp(-0.1, 0.1) for g in grads]

    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(3):
            loss = F.mse_loss(fmodel(x), y)
            diffopt.step(loss, grad_callback=clip)
            peek(*fmodel.parameters())
        meta = fmodel(x).pow(2).mean()
    meta.backward()
    return meta, norms, gradients(model)


@script
def test_masks_of_data_dependent_shape(higher, peek):
    model = network(3)
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        for i in range(3):
            x = normal(6, 3, seed=i)
            logits = fmodel(x)
            confidence, label = logits.softmax(1).max(1)
            mask = confidence > confidence.mean()
            peek(mask.sum(), label)
            sure, unsure = logits[mask], x[~mask]
            loss = F.cross_entropy(sure, label[mask].detach()) + sure.shape[0] * 0.1
            if len(unsure):
                loss = loss + fmodel(unsure).square().mean()
            keep = torch.argsort(logits[:, 0])[:2].tolist()
            loss = loss + logits[keep].sum() + logits[logits > 0].sum()
            for c in torch.unique(label):
                loss = loss + (logits[label == c] - logits[label == c].mean(0)).pow(2).sum()
            diffopt.step(loss)
        meta = fmodel(normal(6, 3)).pow(2).mean()
    meta.backward()
    return meta, gradients(model)


@script
def test_an_environment_in_the_loop(higher, peek):
    """Actions are read, the environment answers in NumPy, returns are Python floats."""
    model = network(3)
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (policy, diffopt):
        rewards = []
        for episode in range(2):
            state, log_probs = np.array([0.1, -0.2, 0.3 * episode]), []
            for _ in range(3):
                chances = policy(torch.from_numpy(state)[None]).softmax(-1)
                draw = torch.distributions.Categorical(chances)
                action = draw.sample()
                log_probs.append(draw.log_prob(action))
                state = np.roll(state, int(action.item())) + 0.1 * chances.detach().numpy()[0]
                rewards.append(float(state[0]))
            peek(*log_probs)
            diffopt.step(-(torch.cat(log_probs) * torch.tensor(rewards[-3:])).sum())
        meta = policy(normal(4, 3)).log_softmax(-1)[:, 0].mean()
    meta.backward()
    return meta, rewards, gradients(model)


@script
def test_results_read_before_and_after_the_outer_gradient(higher, peek):
    model = network()
    x, y = batch()
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        losses = []
        for _ in range(2):
            loss = F.mse_loss(fmodel(x), y)
            diffopt.step(loss)
            losses.append(loss)
            peek(loss)
        meta = F.mse_loss(fmodel(x), y)
        before = meta.item()
        meta.backward()
        peek(*[p.grad for p in model.parameters()], meta, *fmodel.parameters(time=1))
        after = meta.item()
    assert before == after == meta.item()
    return before, [v.item() for v in losses], gradients(model), fmodel(x)


@script
def test_the_best_weights_are_kept(higher, peek):
    model = network()
    x, y = batch()
    best, kept = math.inf, None
    with higher.innerloop_ctx(model, sgd(model, lr=1.5)) as (fmodel, diffopt):
        for _ in range(4):
            loss = F.mse_loss(fmodel(x), y)
            if loss < best:
                best, kept = loss, [p.detach().clone() for p in fmodel.parameters()]
            diffopt.step(loss)
            peek(loss)
    for p, value in zip(model.parameters(), kept or [], strict=True):
        p.data.copy_(value)
    return best, kept, list(model.parameters()), model(x)
