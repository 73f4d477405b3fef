"""Kinds of modules: adapted weights, meta-gradients and buffers are those of plain torch."""

import pytest
import torch
from oracle import at, close, fd, leaves, normal, randomize, sgd, train, unroll
from torch import nn
from torch.nn.utils import parametrizations, parametrize, weight_norm
from torch.utils.checkpoint import checkpoint

from jaxmeta_bridge import higher


class _Tied(nn.Module):
    """One weight under two names, in two modules."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


class _Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.ones(3)) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.ones(3))})
        self.register_parameter("absent", None)

    def forward(self, x):
        assert self.absent is None
        for weight in self.weights:
            x = torch.tanh(x * weight)
        return x * self.weights[0] + self.named["shift"]


class _Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class _Cell(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for row in x.unbind(1):
            state = self.cell(row, state)
        return state[0] if isinstance(state, tuple) else state


class _Twice(nn.Module):
    """One batch norm in two places: its weights and its statistics are one."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 3)
        self.again = self.first

    def forward(self, x):
        return self.again(torch.tanh(self.linear(self.first(x))))


class _OwnCalls(nn.Module):
    """Reads parameters without calling their module, and calls a method of a child."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.tied = _Tied()

    def forward(self, x):
        x = nn.functional.linear(x, self.linear.weight * 2, self.linear.bias)
        return self.tied.forward(torch.sin(x)) @ self.tied.one.weight.T


class _Attention(nn.Module):
    def __init__(self, fused=True):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(3, 4) for _ in range(3))
        self.fused = fused

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, k, v)
        return torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v


class _Checkpointed(nn.Module):
    def __init__(self, reentrant=None):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.head = nn.Linear(3, 1)
        self.reentrant = reentrant

    def _block(self, x):
        return torch.tanh(self.linear(x))

    def forward(self, x):
        if self.reentrant is None:
            return self.head(self._block(x))
        return self.head(checkpoint(self._block, x, use_reentrant=self.reentrant))


class _Distances(nn.Module):
    def __init__(self, ready_made=True):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.ready_made = ready_made

    def forward(self, x):
        y = self.linear(x)
        if self.ready_made:
            return torch.cdist(y[:2], y[2:])
        return (y[:2, None] - y[None, 2:]).square().sum(-1).sqrt()


class _Norm(nn.Module):
    """Weight norm written out: the second derivative of torch's own kernel is wrong."""

    def forward(self, length, direction):
        return direction * (length / direction.square().sum(1, keepdim=True).sqrt())

    def right_inverse(self, weight):
        return weight.square().sum(1, keepdim=True).sqrt(), weight


def _written_out(layer):
    parametrize.register_parametrization(layer, "weight", _Norm())
    return layer


def _parametrized(function):
    return nn.Sequential(function(nn.Linear(3, 2)), nn.Tanh(), nn.Linear(2, 1))


def _frozen():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


_FLAT, _SEQUENCE = normal(4, 3), normal(2, 3, 2)
_MODULES = {
    "no bias": (lambda: nn.Linear(3, 1, bias=False), _FLAT),
    "sequential": (lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)), _FLAT),
    "tied": (_Tied, _FLAT),
    "frozen": (_frozen, _FLAT),
    "lists": (_Lists, _FLAT),
    "own calls": (_OwnCalls, _FLAT),
    "batch norm": (lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Tanh()), _FLAT),
    "batch norm, eval": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()).eval(), _FLAT),
    "used twice": (_Twice, _FLAT),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 1)), _FLAT),
    "convolution": (lambda: nn.Sequential(nn.Conv1d(3, 2, 2), nn.Tanh()), _SEQUENCE),
    "rnn": (lambda: _Recurrent(nn.RNN(2, 2, batch_first=True)), _SEQUENCE),
    "lstm": (lambda: _Recurrent(nn.LSTM(2, 2, batch_first=True)), _SEQUENCE),
    "gru": (lambda: _Recurrent(nn.GRU(2, 2, batch_first=True)), _SEQUENCE),
    "rnn cell": (lambda: _Cell(nn.RNNCell(2, 2)), _SEQUENCE),
    "lstm cell": (lambda: _Cell(nn.LSTMCell(2, 2)), _SEQUENCE),
    "gru cell": (lambda: _Cell(nn.GRUCell(2, 2)), _SEQUENCE),
    "orthogonal": (lambda: _parametrized(parametrizations.orthogonal), _FLAT),
    "spectral norm, eval": (lambda: _parametrized(parametrizations.spectral_norm).eval(), _FLAT),
    "spectral norm, train": (lambda: _parametrized(parametrizations.spectral_norm), _FLAT),
}


def _loss(call, x):
    return (call(x) - 0.5).square().mean()


def _check(make, make_reference, x, steps=2):
    """The drop-in on one model against plain torch on another with the same parameters."""
    data = [x * (1 + 0.5 * i) for i in range(steps)]
    torch.manual_seed(0)
    model = randomize(make())
    torch.manual_seed(0)
    reference = randomize(make_reference())
    start = dict(reference.named_parameters())
    end = unroll(reference, start, data, sgd(0.1, 0.5), _loss)[-1]
    wanted = at(reference, end, x, _loss)
    wanted_grads = _gradients(wanted, start.values())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        train(fmodel, diffopt, data, _loss)
        names = [name for name, _ in model.named_parameters()]
        assert [name for name, _ in fmodel.named_parameters()] == names
        close(fmodel.parameters(), list(end.values()))
        found = _loss(fmodel, x)
        close(found, wanted)
        close(_gradients(found, model.parameters()), wanted_grads)
        close(dict(fmodel.named_buffers()), dict(reference.named_buffers()))


def _gradients(value, parameters):
    return torch.autograd.grad(value, [p for p in parameters if p.requires_grad])


@pytest.mark.parametrize("name", _MODULES)
def test_module(name):
    make, x = _MODULES[name]
    _check(make, make, x)


# torch's hook-based weight norm says that it is deprecated
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, weight_norm], ids=["new", "hook"])
def test_weight_norm(norm):
    _check(lambda: _parametrized(norm), lambda: _parametrized(_written_out), _FLAT)


def test_fused_attention_has_a_second_derivative():
    _check(_Attention, lambda: _Attention(fused=False), normal(2, 1, 3, 3))


def test_small_distances_have_a_second_derivative():
    _check(_Distances, lambda: _Distances(ready_made=False), _FLAT)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    x = _FLAT.clone().requires_grad_()  # torch warns when no input of a checkpoint needs gradients
    _check(lambda: _Checkpointed(reentrant), _Checkpointed, x)


def test_meta_gradient_of_a_tied_and_a_normed_weight_by_finite_differences():
    model = randomize(nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), _Tied()))
    x = _FLAT

    def meta(name):
        def value(weight):
            params = leaves(model) | {name: weight.requires_grad_()}
            return at(model, unroll(model, params, [x, x], sgd(0.1), _loss)[-1], x, _loss)

        return value

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        train(fmodel, diffopt, [x, x], _loss)
        _loss(fmodel, x).backward()
    for name in ("1.one.weight", "0.parametrizations.weight.original0"):
        parameter = model.get_parameter(name)
        close(parameter.grad, fd(meta(name), parameter), rtol=1e-8)


def test_tied_weights_are_one_fast_weight():
    model = randomize(_Tied())
    fmodel = higher.monkeypatch(model)
    assert len(list(fmodel.parameters())) == 3
    assert fmodel.one.weight is fmodel.two.weight
    fmodel.update_params([2 * p for p in fmodel.parameters()])
    close(fmodel.two.weight, 2 * model.one.weight)
    close(fmodel.one.weight, 2 * model.one.weight)


def test_a_module_used_twice_is_one_module():
    fmodel = higher.monkeypatch(randomize(_Twice()))
    assert fmodel.first is fmodel.again
    fmodel(_FLAT)
    assert fmodel.first.num_batches_tracked.item() == 2
    close(fmodel.first.running_mean, fmodel.again.running_mean)


def test_frozen_parameters_stay_frozen_and_as_they_are():
    model = randomize(_frozen())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        train(fmodel, diffopt, [_FLAT, _FLAT], _loss)
        assert [p.requires_grad for p in fmodel.parameters()] == [False, True, True, False]
        close(fmodel[0].weight, model[0].weight)
        close(fmodel[2].bias, model[2].bias)


def test_lists_and_dicts_of_parameters():
    model = randomize(_Lists())
    fmodel = higher.monkeypatch(model)
    new = [p + 1 for p in fmodel.parameters()]
    fmodel.update_params(new)
    assert len(fmodel.weights) == 2 and list(fmodel.named) == ["shift"]
    close(list(fmodel.weights), [model.weights[0] + 1, model.weights[1] + 1])
    close(fmodel.named["shift"], model.named["shift"] + 1)
    assert fmodel.absent is None


class _Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 8)
        self.drop = nn.Dropout(0.4)

    def forward(self, x):
        x = self.drop(torch.tanh(self.linear(x)))
        return nn.functional.dropout(x, 0.3, training=self.training) + torch.randn_like(x)


def test_dropout_draws_the_masks_that_torch_draws():
    model, data = randomize(_Noisy()), [_FLAT, 2 * _FLAT]
    start = leaves(model)
    torch.manual_seed(7)
    end = unroll(model, start, data, sgd(0.1), _loss)[-1]
    wanted = at(model, end, _FLAT, _loss)
    drawn = torch.rand(3)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(7)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False) as (fmodel, diffopt):
        train(fmodel, diffopt, data, _loss)
        found = _loss(fmodel, _FLAT)
    # before any value is read: the generator stands where the eager loop leaves it
    assert torch.equal(torch.rand(3), drawn)
    close(found, wanted)
    close(
        torch.autograd.grad(found, list(model.parameters())),
        torch.autograd.grad(wanted, list(start.values())),
    )


def test_dropout_is_off_in_eval_mode():
    model = randomize(_Noisy())
    model.drop.eval()
    fmodel = higher.monkeypatch(model)
    assert fmodel.training and not fmodel.drop.training
    torch.manual_seed(3)
    wanted = model(_FLAT)
    torch.manual_seed(3)
    close(fmodel(_FLAT), wanted)
