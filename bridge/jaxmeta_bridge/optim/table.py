"""Which rule belongs to which torch optimizer."""

import inspect

import torch

from jaxmeta import ArgumentTypeError, ArgumentValueError
from jaxmeta_bridge.optim.adadelta import ADADELTA
from jaxmeta_bridge.optim.adafactor import ADAFACTOR
from jaxmeta_bridge.optim.adagrad import ADAGRAD
from jaxmeta_bridge.optim.adam import ADAM, ADAMW
from jaxmeta_bridge.optim.adamax import ADAMAX
from jaxmeta_bridge.optim.asgd import ASGD
from jaxmeta_bridge.optim.muon import MUON
from jaxmeta_bridge.optim.nadam import NADAM
from jaxmeta_bridge.optim.radam import RADAM
from jaxmeta_bridge.optim.rmsprop import RMSPROP
from jaxmeta_bridge.optim.rprop import RPROP
from jaxmeta_bridge.optim.rule import Rule
from jaxmeta_bridge.optim.sgd import SGD

RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.Adadelta: ADADELTA,
    torch.optim.Adafactor: ADAFACTOR,
    torch.optim.Adagrad: ADAGRAD,
    torch.optim.Adam: ADAM,
    torch.optim.Adamax: ADAMAX,
    torch.optim.AdamW: ADAMW,
    torch.optim.ASGD: ASGD,
    torch.optim.Muon: MUON,
    torch.optim.NAdam: NADAM,
    torch.optim.RAdam: RADAM,
    torch.optim.RMSprop: RMSPROP,
    torch.optim.Rprop: RPROP,
    torch.optim.SGD: SGD,
}

_REASONS: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: "evaluates its closure as often as the loss's values ask for",
    torch.optim.SparseAdam: "updates only the entries that a sparse gradient names",
}


def rule_for(optimizer_type: type[torch.optim.Optimizer]) -> Rule:
    """The rule of a class in `torch.optim`, or of a subclass that inherits its `step`.

    Raises:
        ArgumentTypeError: not a torch optimizer class.
        ArgumentValueError: one without a rule, or with a `step` of its own.
    """
    if not (isinstance(optimizer_type, type) and issubclass(optimizer_type, torch.optim.Optimizer)):
        raise ArgumentTypeError(
            f"optimizer_type is {optimizer_type!r}; expected a subclass of torch.optim.Optimizer."
        )
    name = optimizer_type.__name__
    known = ", ".join(sorted(rule.name for rule in RULES.values()))
    base = next((c for c in optimizer_type.__mro__ if c in RULES or c in _REASONS), None)
    if base is None:
        raise ArgumentValueError(
            f"{name} is no optimizer of torch.optim, so its formulas are not known here. Known, "
            f"with the subclasses that inherit their step: {known}."
        )
    if base in _REASONS:
        raise ArgumentValueError(
            f"{name} {_REASONS[base]}, which is no fixed function of the gradient. Use one of "
            f"{known}."
        )
    # The first optimizer that is made leaves a profiling wrapper around step on its own class.
    if inspect.unwrap(optimizer_type.step) is not inspect.unwrap(base.step):
        raise ArgumentValueError(
            f"{name} has a step of its own, whose formulas are not known here: use "
            f"torch.optim.{base.__name__}, or inherit its step."
        )
    return RULES[base]
