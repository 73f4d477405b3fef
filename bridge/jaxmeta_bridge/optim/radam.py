"""RAdam, as `torch.optim.RAdam` computes it."""

import jax
import jax.numpy as jnp

from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.adam import decay_beside, moments
from jaxmeta_bridge.optim.rule import Flags, Options, Rule, State, like, slots


def _radam(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    beta1, beta2 = options["betas"]
    grad, decay = decay_beside(grad, param, options, flags)
    step, state = moments(grad, state, options["betas"])
    correction2 = 1 - safe.power(beta2, step)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * safe.power(beta2, step) / correction2
    rectified = length > 5
    # Where the branch is not taken, its numbers may have no square root.
    length, longest = (jnp.where(rectified, x, 6.0) for x in (length, longest))
    rect = safe.sqrt(
        (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    )
    second = state["exp_avg_sq"]
    scale = safe.sqrt(second) + like(second, options["eps"])
    adaptive = like(second, rect * safe.sqrt(correction2)) / scale
    factor = jnp.where(rectified, adaptive, 1)
    step_size = like(grad, options["lr"] / (1 - safe.power(beta1, step)))
    return decay - step_size * state["exp_avg"] * factor, state


RADAM = Rule(
    name="RAdam",
    numeric=("lr", "betas", "eps"),
    switches=("weight_decay",),
    flags={"maximize": False, "decoupled_weight_decay": False},
    names=slots("step", "exp_avg", "exp_avg_sq"),
    step=_radam,
)
