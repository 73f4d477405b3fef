"""Scripts: any loss between the calls, built from any torch functions and Python."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scripts import batch, gradients, network, normal, script, sgd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LABELS = torch.tensor([0, 2, 1, 2])


@script
def test_several_forward_calls_a_step(higher, peek):
    model = network(3)
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        for i in range(2):
            left = F.normalize(fmodel(normal(4, 3, seed=i)), dim=1)
            right = F.normalize(fmodel(normal(4, 3, seed=i + 7)), dim=1)
            similar = left @ right.T / 0.5
            peek(left, similar)
            loss = (
                F.cross_entropy(similar, torch.arange(4))
                + F.cosine_similarity(left, right).mean().square()
            )
            diffopt.step(loss)
        meta = fmodel(normal(4, 3, seed=9)).pow(2).mean()
    meta.backward()
    return meta, gradients(model), list(fmodel.parameters())


@script
def test_regularisers_over_parameters(higher, peek):
    model = network()
    x, y = batch()
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(2):
            loss = F.mse_loss(fmodel(x), y)
            loss = loss + 0.01 * sum(p.pow(2).sum() for p in fmodel.parameters())
            start = fmodel.parameters(time=0)
            near = [(p - q).pow(2).sum() for p, q in zip(fmodel.parameters(), start, strict=True)]
            loss = loss + 0.5 * torch.stack(near).sum()
            for name, p in fmodel.named_parameters():
                if "bias" not in name:
                    loss = loss + 1e-3 * p.abs().sum()
            flat = nn.utils.parameters_to_vector(fmodel.parameters())
            peek(loss, flat)
            diffopt.step(loss + 1e-2 * torch.logsumexp(flat, 0))
        meta = F.mse_loss(fmodel(x), y)
    meta.backward()
    return meta, gradients(model)


@script
def test_indexing_sorting_and_selection_in_a_loss(higher, peek):
    model = network(3)
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        for i in range(2):
            out = fmodel(normal(4, 3, seed=i))
            smooth = F.one_hot(LABELS, 3).to(out.dtype) * 0.9 + 0.1 / 3
            loss = -(smooth * out.log_softmax(1)).sum(1)
            loss = loss + out.gather(1, LABELS[:, None]).squeeze(1).sigmoid()
            worst, where = loss.topk(3)
            peek(worst)
            ranked = out[where].sort(dim=1, descending=True).values
            margin = (ranked[:, 0] - ranked[:, 1]).clamp(min=0.1)
            upper = torch.triu(out.T @ out, diagonal=1)
            masked = out.masked_fill(out < 0, 0.0).cumsum(0)[-1]
            chosen = torch.where(out > 0.1, out, 0.1 * out).amax(1)
            product = torch.einsum("ij,kj->ik", out, ranked)
            total = worst.mean() + margin.mean() + upper.sum() + masked.prod() + chosen.mean()
            diffopt.step(total + product.tanh().mean())
        meta = fmodel(normal(4, 3, seed=5)).square().mean()
    meta.backward()
    return meta, gradients(model)


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 1)
        self.double()
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(normal(*p.shape, seed=i))

    def forward(self, x):
        h = F.elu(self.body(x))
        return self.actor(h), self.critic(h).squeeze(-1)


@script
def test_tuple_outputs_and_distributions(higher, peek):
    model = ActorCritic()
    x, returns = normal(4, 3), normal(4, seed=3)
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(2):
            logits, value = fmodel(x)
            policy = torch.distributions.Categorical(logits=logits)
            peek(policy.probs)
            advantage = (returns - value).detach()
            loss = -(policy.log_prob(LABELS) * advantage).mean() - 0.01 * policy.entropy().mean()
            diffopt.step(loss + F.smooth_l1_loss(value, returns))
        logits, value = fmodel(x)
        meta = torch.distributions.kl_divergence(
            torch.distributions.Categorical(logits=logits),
            torch.distributions.Categorical(logits=torch.zeros_like(logits)),
        ).mean()
        spread = value.std().exp()
        draw = torch.distributions.Normal(value, spread).rsample()
        meta = meta + draw.pow(2).mean()
    meta.backward()
    return meta, draw, gradients(model)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor
    loss: torch.Tensor | None = None

    @property
    def probabilities(self) -> torch.Tensor:
        return self.logits.softmax(-1)


class Pair(NamedTuple):
    first: torch.Tensor
    rest: dict[str, Any]


class Classifier(nn.Module):
    """Keyword arguments in; a dataclass, a dict or a named tuple out."""

    def __init__(self, kind="dataclass"):
        super().__init__()
        self.net, self.kind = network(3), kind

    def forward(self, inputs=None, *, labels=None, scale=1.0):
        hidden = torch.tanh(self.net[0](inputs))
        logits = self.net[2](hidden) * scale
        loss = None if labels is None else F.cross_entropy(logits, labels)
        if self.kind == "dict":
            return {"logits": logits, "loss": loss, "hidden": [hidden, (hidden, logits)]}
        if self.kind == "named tuple":
            return Pair(logits, {"loss": loss, "hidden": hidden})
        return Output(logits=logits, hidden=hidden, loss=loss)


@script
def test_dataclass_outputs_and_keyword_arguments(higher, peek):
    model = Classifier()
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        for i in range(2):
            out = fmodel(inputs=normal(4, 3, seed=i), labels=LABELS, scale=1.0 + i)
            peek(out.probabilities, out.loss)
            diffopt.step(out.loss + out.hidden.square().mean())
        out = fmodel(normal(4, 3, seed=5))
        assert out.loss is None and isinstance(out, Output)
        meta = out.probabilities[:, 0].mean()
    meta.backward()
    return meta, gradients(model)


@script
def test_dict_and_named_tuple_outputs(higher, peek):
    model, other = Classifier("dict"), Classifier("named tuple")
    with (
        higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (one, opt_one),
        higher.innerloop_ctx(other, sgd(other), copy_initial_weights=False) as (two, opt_two),
    ):
        for i in range(2):
            out = one(normal(4, 3, seed=i), labels=LABELS)
            first, rest = two(normal(4, 3, seed=i), labels=LABELS)
            peek(first, out["loss"])
            opt_one.step(out["loss"] + (out["hidden"][1][0] - rest["hidden"].detach()).pow(2).sum())
            opt_two.step(rest["loss"])
        meta = one(normal(4, 3))["logits"].mean() + two(normal(4, 3)).first.mean()
    meta.backward()
    return meta, gradients(model), gradients(other)


@script
def test_sum_of_losses_of_all_steps(higher, peek):
    model = network()
    lr = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    with higher.innerloop_ctx(
        model, sgd(model), copy_initial_weights=False, override={"lr": lr}
    ) as (fmodel, diffopt):
        losses, outputs = [], []
        for i in range(3):
            x, y = batch(seed=i)
            out = fmodel(x)
            loss = F.mse_loss(out, y)
            peek(loss)
            diffopt.step(loss)
            losses.append(loss)
            outputs.append(out)
        stacked = torch.stack(losses)
        meta = stacked.mean() + sum(losses) + torch.cat(outputs).var() + 0.1 * stacked[-1]
        meta = meta + math.fsum([0.5, 1.0]) * max(losses) - min(losses)
    meta.backward()
    return meta, stacked, gradients(model), lr.grad


@script
def test_numbers_shapes_and_losses_that_change_from_step_to_step(higher, peek):
    model = network()
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        for i in range(5):
            x, y = batch(rows=2 + i % 3, seed=i)
            out = fmodel(x)
            beta = min(1.0, 0.2 * i)
            loss = (1 - beta) * F.mse_loss(out, y)
            if i % 2:
                loss = loss + beta * F.l1_loss(out, y, reduction="sum") / len(x)
            if i == 3:
                loss = loss * np.float64(0.5) + np.sqrt(2.0) * out.mean() ** (i - 1)
            peek(loss)
            diffopt.step(loss / math.sqrt(i + 1))
        meta = fmodel(batch()[0]).pow(2).mean()
    meta.backward()
    return meta, gradients(model)


@script
def test_batches_of_a_data_loader(higher, peek):
    model = network()
    data = TensorDataset(*batch(10))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    opt = torch.optim.Adam(model.parameters(), lr=0.05)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
        for _ in range(2):
            for x, y in loader:
                loss = F.mse_loss(fmodel(x), y)
                peek(loss)
                diffopt.step(loss)
        total = [F.mse_loss(fmodel(x), y) * len(x) for x, y in loader]
        meta = torch.stack(total).sum() / len(data)
    meta.backward()
    return meta, gradients(model)


@script
def test_python_over_tensors(higher, peek):
    model = network(3)
    x = normal(4, 3)
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        out = fmodel(x)
        first, *_, last = out
        a, b, c = out.unbind(1)
        rows = [row.sum() for row in out]
        assert len(out) == 4 and out.shape == (4, 3) and out.size(-1) == 3 and out.ndim == 2
        peek(first, rows[0])
        loss = abs(a - b).mean() + 2 ** c.mean() + (1 - last).pow(2).sum() + sum(rows) / len(rows)
        loss = loss + (-first) @ normal(3) + (normal(4).numpy() @ normal(4, seed=1).numpy()).item()
        loss = loss + (1 / (1 + out[1:3, ..., None] ** 2)).sum() + out[[0, 2], [1, 1]].prod()
        loss += torch.tensor(normal(4, 3).numpy()).mul(out).flatten()[::2].sum()
        diffopt.step(loss)
        meta = fmodel(x)[-1, :2].sum()
    meta.backward()
    return meta, gradients(model)


@script
def test_a_loss_that_mixes_in_modules_and_weights_of_its_own(higher, peek):
    model = network(3)
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    norm = nn.LayerNorm(3, dtype=torch.float64)
    criterion = nn.CrossEntropyLoss(weight=weights.detach(), label_smoothing=0.1)
    with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False) as (fmodel, diffopt):
        for i in range(2):
            logits = norm(fmodel(normal(4, 3, seed=i)))
            loss = criterion(logits, LABELS) + F.nll_loss(logits.log_softmax(-1) * weights, LABELS)
            peek(loss)
            diffopt.step(loss)
        meta = nn.KLDivLoss(reduction="batchmean")(
            fmodel(normal(4, 3)).log_softmax(1), normal(4, 3).softmax(1)
        )
    meta.backward()
    return meta, gradients(model), weights.grad, gradients(norm)
