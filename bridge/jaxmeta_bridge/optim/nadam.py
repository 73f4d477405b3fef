"""NAdam, as `torch.optim.NAdam` computes it."""

import jax
import jax.numpy as jnp

from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.adam import decay_beside, moments
from jaxmeta_bridge.optim.rule import (
    Flags,
    Options,
    Rule,
    Spec,
    State,
    joint_shape,
    like,
    scalar_dtype,
    slots,
)


def _ones(param: Spec, options: Options, flags: Flags) -> jax.Array:
    shape = joint_shape(options["betas"][0], options["momentum_decay"])
    return jnp.ones(shape, jnp.result_type(float))


def _nadam(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    beta1, beta2 = options["betas"]
    grad, decay = decay_beside(grad, param, options, flags)
    step, state = moments(grad, state, options["betas"])
    mu = beta1 * (1 - 0.5 * 0.96 ** (step * options["momentum_decay"]))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((step + 1) * options["momentum_decay"]))
    # torch keeps this product in its default dtype, even beside float64 parameters.
    held = flags["scalar_dtype"]
    product = safe.rounded(state["mu_product"] * safe.rounded(mu, held), held)
    state["mu_product"] = product
    second = state["exp_avg_sq"]
    correction = like(second, 1 - safe.power(beta2, step))
    scale = safe.sqrt(second / correction) + like(second, options["eps"])
    of_grad = like(grad, options["lr"] * (1 - mu) / (1 - product))
    of_average = like(grad, options["lr"] * mu_next / (1 - product * mu_next))
    return decay - of_grad * (grad / scale) - of_average * (state["exp_avg"] / scale), state


NADAM = Rule(
    name="NAdam",
    numeric=("lr", "betas", "eps", "momentum_decay"),
    switches=("weight_decay",),
    flags={"maximize": False, "decoupled_weight_decay": False, "scalar_dtype": scalar_dtype},
    names=slots("step", "exp_avg", "exp_avg_sq", "mu_product"),
    step=_nadam,
    start={"mu_product": _ones},
)
