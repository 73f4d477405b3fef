"""Averaged SGD, as `torch.optim.ASGD` computes it."""

import jax
import jax.numpy as jnp

from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.rule import (
    Flags,
    Options,
    Rule,
    Spec,
    State,
    decayed,
    joint_shape,
    like,
    scalar_dtype,
    slots,
)


def _first_eta(param: Spec, options: Options, flags: Flags) -> jax.Array:
    shape = joint_shape(options["lr"], options["lambd"], options["alpha"])
    return jnp.broadcast_to(safe.rounded(options["lr"], flags["scalar_dtype"]), shape)


def _first_mu(param: Spec, options: Options, flags: Flags) -> jax.Array:
    return jnp.ones_like(options["t0"])


def _asgd(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    lr, lambd = options["lr"], options["lambd"]
    grad = decayed(grad, param, options, flags)
    eta, mu = state["eta"], like(param, state["mu"])
    delta = -like(param, lambd * eta) * param - like(param, eta) * grad
    mean = mu * (param + delta) + (1 - mu) * state["ax"]
    step = state["step"] + 1
    # torch keeps these two in its default dtype, even beside float64 parameters.
    held = flags["scalar_dtype"]
    next_eta = safe.rounded(lr / (1 + lambd * lr * step) ** options["alpha"], held)
    next_mu = safe.rounded(1 / safe.maximum(1, step - options["t0"]), held)
    return delta, {"step": step, "ax": mean, "eta": next_eta, "mu": next_mu}


ASGD = Rule(
    name="ASGD",
    numeric=("lr", "lambd", "alpha", "t0"),
    switches=("weight_decay",),
    flags={"maximize": False, "scalar_dtype": scalar_dtype},
    names=slots("step", "ax", "eta", "mu"),
    step=_asgd,
    start={"eta": _first_eta, "mu": _first_mu},
)
