"""What can be imported, called by position, and asked with isinstance."""

import importlib
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Net, batches, close, squared, stepped
from torch import nn

from jaxmeta_bridge import higher

_OPTIMIZERS = ["SGD", "Adam", "AdamW", "Adadelta", "Adagrad", "Adamax", "ASGD", "RMSprop", "Rprop"]
_NAMES = {
    "": [
        *("innerloop_ctx", "monkeypatch", "get_diff_optim", "create_diff_optim"),
        *("register_optim", "patch", "optim", "utils"),
    ],
    ".patch": ["monkeypatch", "make_functional", "buffer_sync", "_MonkeyPatchBase"],
    ".utils": ["flatten", "get_func_params", "_recursive_map"],
    ".optim": [
        *("DifferentiableOptimizer", "get_diff_optim", "create_diff_optim", "register_optim"),
        *("get_trainable_opt_params", "apply_trainable_opt_params", "_add"),
        *(f"Differentiable{name}" for name in _OPTIMIZERS),
    ],
}


@pytest.mark.parametrize("module", _NAMES)
def test_names(module):
    found = importlib.import_module("jaxmeta_bridge.higher" + module)
    assert not [name for name in _NAMES[module] if not hasattr(found, name)]


def test_the_same_functions_by_their_short_names():
    assert higher.monkeypatch is higher.patch.monkeypatch
    assert higher.get_diff_optim is higher.optim.get_diff_optim
    assert higher.create_diff_optim is higher.optim.create_diff_optim
    assert higher.register_optim is higher.optim.register_optim


_SIGNATURES = {
    "innerloop_ctx": "model opt device copy_initial_weights override track_higher_grads",
    "monkeypatch": "module device copy_initial_weights track_higher_grads",
    "get_diff_optim": "opt reference_params fmodel device override track_higher_grads",
    "create_diff_optim": "opt_type opt_kwargs params fmodel device override track_higher_grads",
    "register_optim": "optim_type diff_optim_type",
    "patch.make_functional": "module encapsulator",
    "patch.buffer_sync": "module fmodule device",
    "utils.flatten": "x",
    "utils.get_func_params": "module device safe_copy",
    "optim.get_trainable_opt_params": "opt device",
    "optim.apply_trainable_opt_params": "opt override",
    "optim.DifferentiableOptimizer": (
        "other reference_params fmodel device override grad_callback track_higher_grads"
    ),
}


@pytest.mark.parametrize("name", _SIGNATURES)
def test_arguments_by_position_and_by_name(name):
    function: Any = higher
    for part in name.split("."):
        function = getattr(function, part)
    wanted = _SIGNATURES[name].split()
    assert list(inspect.signature(function).parameters)[: len(wanted)] == wanted


def test_defaults():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(higher.innerloop_ctx).parameters.items()
    }
    assert defaults["copy_initial_weights"] is True
    assert defaults["track_higher_grads"] is True
    assert defaults["device"] is None and defaults["override"] is None


@pytest.mark.parametrize("name", _OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Differentiable R")
def test_each_optimizer_has_its_class(name):
    model = Net()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1)
    kind = getattr(higher.optim, f"Differentiable{name}")
    assert issubclass(kind, higher.optim.DifferentiableOptimizer)
    assert isinstance(higher.get_diff_optim(optimizer, model.parameters()), kind)
    with higher.innerloop_ctx(model, optimizer) as (fmodel, diffopt):
        assert isinstance(diffopt, kind)
        assert isinstance(fmodel, Net)
        assert isinstance(fmodel, higher.patch._MonkeyPatchBase)
    made = higher.create_diff_optim(
        getattr(torch.optim, name), {"lr": 0.1}, params=model.parameters()
    )
    assert isinstance(made, kind)


@pytest.mark.filterwarnings("ignore:Differentiable R")
def test_a_differentiable_class_called_by_itself():
    model, data = Net(), batches(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    wanted, _, _ = stepped(model, optimizer, data)
    fmodel = higher.monkeypatch(model)
    diffopt = higher.optim.DifferentiableSGD(optimizer, model.parameters(), fmodel)
    for batch in data:
        diffopt.step(squared(fmodel, batch))
    close(fmodel.parameters(), wanted[-1])


def test_unknown_optimizers_are_refused():
    class Mine(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None) -> Any:
            return None

    model = Net()
    with pytest.raises(ValueError, match="Mine"):
        higher.get_diff_optim(Mine(model.parameters()), model.parameters())
    with pytest.raises(ValueError, match="Mine"):
        higher.create_diff_optim(Mine, params=model.parameters())


def test_flatten():
    a, b = torch.ones(1), torch.zeros(2)
    flat = higher.utils.flatten({"x": [a, (1, {"y": 2})], "z": {3}, "w": b})
    assert flat[0] is a and flat[1:4] == [1, 2, 3] and flat[4] is b
    assert higher.utils.flatten(7) == [7]
    assert higher.utils.flatten([]) == []


def test_recursive_map():
    tree = {"x": [1, (2, 3)], "y": {4}, "z": 5}
    wanted = {"x": [2, (4, 6)], "y": {8}, "z": 10}
    assert higher.utils._recursive_map(tree, lambda number: 2 * number) == wanted


def test_get_func_params():
    model = Net()
    model.head.bias.requires_grad_(False)
    copies = higher.utils.get_func_params(model)
    close(copies, list(model.parameters()))
    assert [copy.requires_grad for copy in copies] == [True, True, True, False]
    assert all(copy.is_leaf for copy in copies)
    before = copies[0].clone()
    with torch.no_grad():
        model.hidden.weight.add_(1)
    close(copies[0], before)


def test_add():
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    close(higher.optim._add(x, 3.0), x + 3)
    close(higher.optim._add(x, torch.tensor(2.0), x), 3 * x)
    close(higher.optim._add(x, -0.5, x), 0.5 * x)


@pytest.mark.parametrize(
    "bad", [1, None, "yes", np.True_], ids=["int", "None", "string", "numpy bool"]
)
def test_track_higher_grads_takes_a_bool(bad):
    fmodel = higher.monkeypatch(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="bool"):
        fmodel.track_higher_grads = bad
    assert fmodel.track_higher_grads is True
