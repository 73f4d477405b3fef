"""The interface of `higher` in plain eager torch: the reference that scripts are checked against.

Nothing here records or compiles: a forward pass is `torch.func.functional_call`, a step is
`torch.autograd.grad(create_graph=True)` and the update of `oracle`. Only what scripts of the tests
use is here: SGD with momentum and weight decay, and Adam.
"""

import copy
from contextlib import contextmanager
from typing import Any

import oracle
import torch
from torch.func import functional_call


class EagerModel:
    """A copy of the model whose weights are the latest entry of a list of lists."""

    def __init__(self, model, copy_initial_weights, track_higher_grads):
        self._module = copy.deepcopy(model)
        self._names = [name for name, _ in model.named_parameters()]
        self._track = track_higher_grads
        weights = list(model.parameters())
        self.times = [
            [p.detach().clone().requires_grad_(p.requires_grad) for p in weights]
            if copy_initial_weights
            else [p.clone() for p in weights]
        ]

    def __call__(self, *args, params=None, **kwargs):
        if params is not None:
            self.update_params(params)
        for module in self._module.modules():
            # Batch norm in train mode writes into its statistics without telling autograd: what an
            # earlier forward pass in eval mode has saved for its gradient would change silently.
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.clone()
        weights = dict(zip(self._names, self.times[-1], strict=True))
        return functional_call(self._module, weights, args, kwargs)

    def __getattr__(self, name):
        return getattr(self._module, name)

    def parameters(self, recurse=True, time=None):
        return iter(self.times[-1 if time is None else time])

    def named_parameters(self):
        return zip(self._names, self.times[-1], strict=True)

    def update_params(self, params):
        self.times = [*self.times, list(params)] if self._track else [list(params)]

    @property
    def fast_params(self):
        return self.times[-1]

    @fast_params.setter
    def fast_params(self, params):
        self.update_params(params)


class EagerOptimizer:
    """The update rules, differentiable in everything."""

    def __init__(self, optimizer, reference, model, override, track, callback):
        index = {id(p): i for i, p in enumerate(reference)}
        self._adam = isinstance(optimizer, torch.optim.Adam)
        self._groups = [
            {**group, "params": [index[id(p)] for p in group["params"]]}
            for group in optimizer.param_groups
        ]
        self._state = {
            index[id(p)]: dict(optimizer.state[p])
            for group in optimizer.param_groups
            for p in group["params"]
        }
        self._model, self._track, self._callback = model, track, callback
        self._override(override)

    def _override(self, override):
        for name, values in (override or {}).items():
            for i, group in enumerate(self._groups):
                group[name] = values[0] if len(values) == 1 else values[i]

    def step(self, loss, params=None, override=None, grad_callback=None):
        self._override(override)
        params = list(self._model.fast_params if params is None else params)
        wanted = [i for i, p in enumerate(params) if p.requires_grad]
        found = torch.autograd.grad(
            loss, [params[i] for i in wanted], create_graph=self._track, allow_unused=True
        )
        gradients: list[Any] = [None] * len(params)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        callback = grad_callback or self._callback
        if callback is not None:
            gradients = list(callback(gradients))
        for group in self._groups:
            rule = self._rule(group)
            for i in group["params"]:
                if gradients[i] is not None:
                    new = rule(params[i], gradients[i], self._state.setdefault(i, {}))
                    params[i] = new if self._track else new.detach().requires_grad_()
        if self._model is not None:
            self._model.update_params(params)
        return params

    def _rule(self, group):
        decay = group["weight_decay"]
        if self._adam:
            return oracle.adam(group["lr"], group["betas"], group["eps"], weight_decay=decay)
        return oracle.sgd(group["lr"], group["momentum"], weight_decay=decay)


def monkeypatch(model, device=None, copy_initial_weights=True, track_higher_grads=True):
    return EagerModel(model, copy_initial_weights, track_higher_grads)


def get_diff_optim(
    opt,
    reference_params,
    fmodel=None,
    device=None,
    override=None,
    track_higher_grads=True,
    grad_callback=None,
):
    reference = list(reference_params)
    return EagerOptimizer(opt, reference, fmodel, override, track_higher_grads, grad_callback)


@contextmanager
def innerloop_ctx(
    model, opt, device=None, copy_initial_weights=True, override=None, track_higher_grads=True
):
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    reference = list(model.parameters())
    yield (
        fmodel,
        get_diff_optim(opt, reference, fmodel, device, override, track_higher_grads),
    )
