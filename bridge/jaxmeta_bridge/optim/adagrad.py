"""Adagrad, as `torch.optim.Adagrad` computes it."""

import jax
import jax.numpy as jnp

from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.rule import Flags, Options, Rule, Spec, State, decayed, like, slots


def _initial_sum(param: Spec, options: Options, flags: Flags) -> jax.Array:
    value = options["initial_accumulator_value"].astype(param.dtype)
    return jnp.broadcast_to(value, param.shape)


def _adagrad(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    grad = decayed(grad, param, options, flags)
    total = state["sum"] + grad * grad
    lr = options["lr"] / (1 + state["step"] * options["lr_decay"])
    scale = safe.sqrt(total) + like(total, options["eps"])
    return -like(grad, lr) * (grad / scale), {"step": state["step"] + 1, "sum": total}


ADAGRAD = Rule(
    name="Adagrad",
    numeric=("lr", "lr_decay", "eps", "initial_accumulator_value"),
    switches=("weight_decay",),
    flags={"maximize": False},
    names=slots("step", "sum"),
    step=_adagrad,
    start={"sum": _initial_sum},
)
