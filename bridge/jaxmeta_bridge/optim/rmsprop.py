"""RMSprop, as `torch.optim.RMSprop` computes it."""

import jax
import jax.numpy as jnp

from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.rule import Flags, Options, Rule, State, average, decayed, like, slots


def _rmsprop(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    grad = decayed(grad, param, options, flags)
    square = average(state["square_avg"], grad * grad, options["alpha"])
    state = {**state, "square_avg": square}
    variance = square
    if flags["centered"]:
        mean = average(state["grad_avg"], grad, options["alpha"])
        state["grad_avg"] = mean
        variance = square - mean * mean
        # Rounding can leave less than nothing, of which torch takes the root: NaN.
        variance = jnp.where(variance < 0, 0, variance)
    direction = grad / (safe.sqrt(variance) + like(grad, options["eps"]))
    if flags["momentum"]:
        direction = like(grad, options["momentum"]) * state["momentum_buffer"] + direction
        state["momentum_buffer"] = direction
    return -like(grad, options["lr"]) * direction, state


RMSPROP = Rule(
    name="RMSprop",
    numeric=("lr", "alpha", "eps"),
    switches=("weight_decay", "momentum"),
    flags={"maximize": False, "centered": False},
    names=slots("square_avg", momentum="momentum_buffer", centered="grad_avg"),
    step=_rmsprop,
)
