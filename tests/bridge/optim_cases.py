"""The optimizers of torch.optim with their options, for the tests that run each of them."""

from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from jaxmeta_bridge.optim import Rule, rule_for
from jaxmeta_bridge.optim.rule import Static


class Case(NamedTuple):
    """An optimizer class and options with which each of them has an effect within a few steps."""

    optimizer: type[torch.optim.Optimizer]
    options: dict[str, Any]

    @property
    def rule(self) -> Rule:
        return rule_for(self.optimizer)

    def split(self) -> tuple[dict[str, Any], Static]:
        """The split options of a group of torch's own making."""
        return self.rule.split(self.make([torch.zeros(2, 3)]).param_groups[0])

    def make(self, params: Any) -> torch.optim.Optimizer:
        return self.optimizer(params, **self.options)


def _case(optimizer: type[torch.optim.Optimizer], **options: Any) -> Case:
    return Case(optimizer, options)


_O = torch.optim
_BETAS = (0.6, 0.8)

CASES = {
    "sgd": _case(_O.SGD, lr=0.1),
    "sgd-decay-maximize": _case(_O.SGD, lr=0.1, weight_decay=0.2, maximize=True),
    "sgd-momentum": _case(_O.SGD, lr=0.1, momentum=0.7, dampening=0.3, weight_decay=0.2),
    "sgd-nesterov": _case(_O.SGD, lr=0.1, momentum=0.7, nesterov=True, maximize=True),
    "adam": _case(_O.Adam, lr=0.1, betas=_BETAS, eps=0.1),
    "adam-amsgrad": _case(
        _O.Adam, lr=0.1, betas=_BETAS, eps=0.1, weight_decay=0.2, amsgrad=True, maximize=True
    ),
    "adam-decoupled": _case(
        _O.Adam, lr=0.1, betas=_BETAS, eps=0.1, weight_decay=0.2, decoupled_weight_decay=True
    ),
    "adamw": _case(_O.AdamW, lr=0.1, betas=_BETAS, eps=0.1, weight_decay=0.2, maximize=True),
    "adamw-amsgrad": _case(_O.AdamW, lr=0.1, betas=_BETAS, eps=0.1, amsgrad=True),
    "nadam": _case(
        _O.NAdam, lr=0.1, betas=_BETAS, eps=0.1, weight_decay=0.2, momentum_decay=0.5, maximize=True
    ),
    "nadam-decoupled": _case(
        _O.NAdam,
        lr=0.1,
        betas=_BETAS,
        eps=0.1,
        weight_decay=0.2,
        momentum_decay=0.5,
        decoupled_weight_decay=True,
    ),
    # With a short memory no step is rectified; with this one, the sixth is the first.
    "radam": _case(_O.RAdam, lr=0.1, betas=(0.6, 0.99), eps=0.1, weight_decay=0.2, maximize=True),
    "radam-unrectified": _case(_O.RAdam, lr=0.1, betas=(0.6, 0.5)),
    "radam-decoupled": _case(
        _O.RAdam,
        lr=0.1,
        betas=(0.6, 0.99),
        eps=0.1,
        weight_decay=0.2,
        decoupled_weight_decay=True,
    ),
    "adadelta": _case(_O.Adadelta, lr=0.9, rho=0.7, eps=0.01, weight_decay=0.2, maximize=True),
    "adagrad": _case(
        _O.Adagrad,
        lr=0.1,
        lr_decay=0.2,
        eps=0.1,
        weight_decay=0.2,
        initial_accumulator_value=0.3,
        maximize=True,
    ),
    "adamax": _case(_O.Adamax, lr=0.1, betas=_BETAS, eps=0.1, weight_decay=0.2, maximize=True),
    "asgd": _case(_O.ASGD, lr=0.1, lambd=0.3, alpha=0.6, t0=2.5, weight_decay=0.2, maximize=True),
    "rmsprop": _case(_O.RMSprop, lr=0.1, alpha=0.7, eps=0.1, weight_decay=0.2, maximize=True),
    "rmsprop-momentum": _case(_O.RMSprop, lr=0.1, alpha=0.7, eps=0.1, momentum=0.6),
    "rmsprop-centered": _case(_O.RMSprop, lr=0.1, alpha=0.7, eps=0.1, momentum=0.6, centered=True),
    "rprop": _case(_O.Rprop, lr=0.1, etas=(0.45, 1.3), step_sizes=(0.06, 0.15), maximize=True),
    # Of the two eps, the first is a floor of the squares and the second one of the parameters.
    "adafactor": _case(_O.Adafactor, lr=0.1, beta2_decay=-0.6, d=1.1, weight_decay=0.2),
    "adafactor-floors": _case(_O.Adafactor, lr=0.1, eps=(1.2, 2.0), d=1.0, maximize=True),
    "muon": _case(_O.Muon, lr=0.1, weight_decay=0.2, momentum=0.6),
    "muon-plain": _case(
        _O.Muon, lr=0.1, momentum=0.6, nesterov=False, adjust_lr_fn="match_rms_adamw", ns_steps=2
    ),
}

# One case for each optimizer.
FULLEST = (
    "sgd-momentum",
    "adam-amsgrad",
    "adamw",
    "nadam",
    "radam",
    "adadelta",
    "adagrad",
    "adamax",
    "asgd",
    "rmsprop-centered",
    "rprop",
    "adafactor",
    "muon",
)


def gradients(steps: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray[Any, Any]:
    """Gradients that grow, change sign and stay clear of zero."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((steps, *shape))
    growth = np.linspace(0.7, 2.0, steps).reshape(-1, *[1] * len(shape))
    return growth * (values + 0.3 * np.sign(values))


def unrolled(case: Case, param: Any, grads: Any, numeric: Any, state: Any = None) -> Any:
    """(last parameter, last state) after the rule's steps, with these numeric options."""
    rule, (_, static) = case.rule, case.split()
    if state is None:
        state = rule.init(jax.typeof(param), numeric, static)

    def step(carry: Any, grad: Any) -> Any:
        return rule.update(carry[0], grad, carry[1], numeric, static), None

    return jax.lax.scan(step, (param, state), grads)[0]
