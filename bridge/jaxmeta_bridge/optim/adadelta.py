"""Adadelta, as `torch.optim.Adadelta` computes it."""

import jax

from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.rule import Flags, Options, Rule, State, average, decayed, like, slots


def _adadelta(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    grad = decayed(grad, param, options, flags)
    eps = like(grad, options["eps"])
    square = average(state["square_avg"], grad * grad, options["rho"])
    delta = safe.sqrt(state["acc_delta"] + eps) / safe.sqrt(square + eps) * grad
    deltas = average(state["acc_delta"], delta * delta, options["rho"])
    return -like(grad, options["lr"]) * delta, {"square_avg": square, "acc_delta": deltas}


ADADELTA = Rule(
    name="Adadelta",
    numeric=("lr", "rho", "eps"),
    switches=("weight_decay",),
    flags={"maximize": False},
    names=slots("square_avg", "acc_delta"),
    step=_adadelta,
)
