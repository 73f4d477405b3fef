"""Scripts around the models of real projects, from convolutions to language models."""

# Every loop of these scripts runs at least once.
# pyright: reportPossiblyUnboundVariable=false

from collections import OrderedDict
from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from scripts import EAGER, assert_same, check, gradients, normal, quiet, read, run, script
from torch import nn
from torch.utils.checkpoint import checkpoint

from jaxmeta_bridge import higher as drop_in

BOTH = pytest.mark.parametrize("peek", [quiet, read], ids=["unread", "read"])


def seeded(model):
    model = model.double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.4 * normal(*p.shape, seed=i))
    return model


def maml(higher, model, lr=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return higher.innerloop_ctx(model, optimizer, copy_initial_weights=False)


def conv_net():
    block = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)
    return seeded(nn.Sequential(*block, nn.Flatten(), nn.Linear(8, 3)))


@script
def test_few_shot_classification(higher, peek):
    """Tasks in a loop, accuracies read each time, one backward a task, Adam outside."""
    model = conv_net()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = torch.optim.Adam(model.parameters(), lr=0.01)
    accuracies = []
    labels = torch.arange(3)
    outer.zero_grad()
    for task in range(2):
        support, query = normal(3, 1, 4, 4, seed=task), normal(3, 1, 4, 4, seed=task + 5)
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (fnet, diffopt):
            for _ in range(2):
                loss = F.cross_entropy(fnet(support), labels)
                peek(loss)
                diffopt.step(loss)
            logits = fnet(query)
            query_loss = F.cross_entropy(logits, labels)
            accuracies.append((logits.argmax(dim=1) == labels).sum().item() / 3)
            query_loss.backward()
    outer.step()
    return accuracies, query_loss.detach(), list(model.parameters()), list(model.buffers())


class ModelOutput(OrderedDict):
    """Keys, attributes and integer indices, like the outputs of language-model libraries."""

    def __post_init__(self):
        for field in fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self):
        return tuple(self.values())


@dataclass
class CausalOutput(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class LanguageModel(nn.Module):
    """Tied embeddings, a causal block with dropout, labels shifted inside, -100 ignored."""

    def __init__(self, use_checkpoint=False):
        super().__init__()
        self.embed, self.position = nn.Embedding(5, 4), nn.Embedding(6, 4)
        self.qkv, self.out = nn.Linear(4, 12, bias=False), nn.Linear(4, 4)
        self.norm, self.drop = nn.LayerNorm(4), nn.Dropout(0.1)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.use_checkpoint = use_checkpoint

    def block(self, h, mask=None):
        q, k, v = (t.view(*h.shape[:2], 2, 2).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.drop(F.gelu(self.out(h.transpose(1, 2).flatten(2))))

    def forward(self, input_ids, attention_mask=None, labels=None, output_hidden_states=False):
        length = input_ids.shape[1]
        first = self.embed(input_ids) + self.position(torch.arange(length))
        mask = None
        if attention_mask is not None:
            mask = (
                torch.ones(length, length).tril().bool() & attention_mask[:, None, None, :].bool()
            )
        if self.use_checkpoint:
            h = first + checkpoint(self.block, self.norm(first), mask, use_reentrant=False)
        else:
            h = first + self.block(self.norm(first), mask)
        logits, loss = self.head(h), None
        if labels is not None:
            shifted = logits[..., :-1, :].contiguous().view(-1, 5)
            loss = F.cross_entropy(shifted, labels[..., 1:].reshape(-1), ignore_index=-100)
        hidden = (first, h) if output_hidden_states else None
        return CausalOutput(loss=loss, logits=logits, hidden_states=hidden)


IDS = torch.tensor([[1, 4, 2, 0, 3], [2, 2, 1, 0, 0]])
PADDING = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def plain_attention(q, k, v, attn_mask=None, is_causal=False):
    """Written out: the fused one has no second derivative in eager torch."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    allowed = torch.ones(scores.shape[-2:]).tril().bool() if attn_mask is None else attn_mask
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ v


@BOTH
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_editing_a_language_model(use_checkpoint, peek, monkeypatch):
    """Keyword arguments, a dict-like output, some layers only, a KL term that keeps the rest."""

    def function(higher, peek):
        # What eager torch computes again in a checkpoint is not to be compared with.
        model = seeded(LanguageModel(use_checkpoint and higher is not EAGER)).eval()
        labels = IDS.masked_fill(PADDING == 0, -100)
        base = model(input_ids=IDS, attention_mask=PADDING).logits.detach().softmax(-1)
        edited = [p for name, p in model.named_parameters() if "out" in name or "qkv" in name]
        optimizer = torch.optim.Adam(edited, lr=0.05)
        with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (f, diffopt):
            for _ in range(2):
                batch = {"input_ids": IDS, "attention_mask": PADDING, "labels": labels}
                output = f(**batch)
                peek(output.loss, output["logits"])
                diffopt.step(output[0])
            output = f(IDS, labels=IDS, output_hidden_states=True)
            drift = F.kl_div(f(IDS).logits.log_softmax(-1), base, reduction="batchmean")
            meta = output.loss + drift + output.hidden_states[-1].pow(2).mean()
        meta.backward()
        return meta, list(output.keys()), output.logits, gradients(model)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", plain_attention)
        expected = run(function, EAGER)
    got = run(function, drop_in, peek)
    assert_same(got[0], expected[0])


@script
def test_checkpointing_with_dropout(higher, peek):
    """use_reentrant=False draws the same mask when it computes again."""
    model = seeded(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)))

    def cost(f, x):
        h = f(x)
        kept = checkpoint(lambda t: F.dropout(t.tanh(), 0.5), h, use_reentrant=False)
        return kept.pow(2).mean()

    with maml(higher, model) as (fmodel, diffopt):
        loss = cost(fmodel, normal(4, 3))
        peek(loss)
        diffopt.step(loss)
        meta = cost(fmodel, normal(4, 3, seed=1))
    meta.backward()
    return loss, meta, gradients(model)


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 2, batch_first=True, bidirectional=kind is nn.GRU)
        self.head = nn.Linear(4 if kind is nn.GRU else 2, 1)

    def forward(self, x, state=None):
        out, state = self.rnn(x, state)
        return self.head(out), state


@BOTH
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_networks_with_carried_state(kind, peek):
    def function(higher, peek):
        model = seeded(Tagger(kind))
        x = normal(2, 3, 3)
        with maml(higher, model) as (fmodel, diffopt):
            state = None
            for _ in range(2):
                out, state = fmodel(x, state)
                loss = out[:, -1].pow(2).mean()
                peek(loss)
                diffopt.step(loss)
                state = (
                    tuple(s.detach() for s in state) if kind is nn.LSTM else 0.9 * state.detach()
                )
            meta = fmodel(x[:, :2], state)[0].mean()
        meta.backward()
        return meta, state, gradients(model)

    check(function, peek)


@script
def test_a_cell_in_a_python_loop(higher, peek):
    """A learned optimizer: an LSTM cell maps gradients to updates, its weights are meta-learned."""
    cell = seeded(nn.LSTMCell(1, 2))
    out = seeded(nn.Linear(2, 1))
    model = seeded(nn.Linear(2, 1))
    h = c = torch.zeros(3, 2, dtype=torch.float64)
    x, y = normal(4, 2), normal(4, 1)
    with maml(higher, model) as (fmodel, _):
        for _ in range(2):
            loss = F.mse_loss(fmodel(x), y)
            grads = torch.autograd.grad(loss, fmodel.parameters(), create_graph=True)
            flat = torch.cat([g.flatten() for g in grads])[:, None]
            peek(loss, flat)
            h, c = cell(flat, (h, c))
            update = (0.1 * out(h)).squeeze(1).split([2, 1])
            fmodel.update_params(
                [p + u.view_as(p) for p, u in zip(fmodel.parameters(), update, strict=True)]
            )
        meta = F.mse_loss(fmodel(x), y)
    meta.backward()
    return meta, gradients(cell), gradients(out), gradients(model)


@script
def test_a_transformer_layer(higher, peek):
    layer = nn.TransformerEncoderLayer(4, 2, 4, dropout=0.2, batch_first=True)
    model = seeded(nn.Sequential(layer, nn.Linear(4, 1)))
    x = normal(2, 3, 4)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        with maml(higher, model) as (fmodel, diffopt):
            loss = fmodel(x).pow(2).mean()
            peek(loss)
            diffopt.step(loss)
            meta = fmodel(x).mean()
        meta.backward()
    return meta, gradients(model)


@script
def test_a_mixture_of_experts(higher, peek):
    """Routing by values: each expert sees a number of rows that only the data decides."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(3, 2)
            self.experts = nn.ModuleList([nn.Linear(3, 2) for _ in range(2)])

        def forward(self, x):
            weight, chosen = self.gate(x).softmax(-1).max(-1)
            out = torch.zeros(len(x), 2, dtype=x.dtype)
            for i, expert in enumerate(self.experts):
                rows = torch.where(chosen == i)[0]
                if rows.numel():
                    out[rows] = expert(x[rows]) * weight[rows, None]
            return out

    model = seeded(Mixture())
    with maml(higher, model) as (fmodel, diffopt):
        for i in range(2):
            loss = fmodel(normal(5, 3, seed=i)).pow(2).mean()
            peek(loss)
            diffopt.step(loss)
        meta = fmodel(normal(5, 3, seed=3)).sum(1).exp().mean()
    meta.backward()
    return meta, gradients(model)
