"""Adamax, as `torch.optim.Adamax` computes it."""

import jax
import jax.numpy as jnp

from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.rule import Flags, Options, Rule, State, average, decayed, like, slots


def _adamax(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    beta1, beta2 = options["betas"]
    grad = decayed(grad, param, options, flags)
    step = state["step"] + 1
    first = average(state["exp_avg"], grad, beta1)
    largest = safe.maximum(
        like(grad, beta2) * state["exp_inf"], jnp.abs(grad) + like(grad, options["eps"])
    )
    step_size = like(grad, options["lr"] / (1 - safe.power(beta1, step)))
    return -step_size * (first / largest), {"step": step, "exp_avg": first, "exp_inf": largest}


ADAMAX = Rule(
    name="Adamax",
    numeric=("lr", "betas", "eps"),
    switches=("weight_decay",),
    flags={"maximize": False},
    names=slots("step", "exp_avg", "exp_inf"),
    step=_adamax,
)
