"""SGD, as `torch.optim.SGD` computes it."""

import jax
import jax.numpy as jnp

from jaxmeta_bridge.optim.rule import Flags, Options, Rule, State, decayed, like


def _sgd(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    direction = grad = decayed(grad, param, options, flags)
    if flags["momentum"]:
        momentum = like(grad, options["momentum"])
        damped = like(grad, 1 - options["dampening"]) * grad
        # The first gradient becomes the buffer as it is, without dampening.
        buffer = jnp.where(state["started"], momentum * state["momentum_buffer"] + damped, grad)
        direction = grad + momentum * buffer if flags["nesterov"] else buffer
        state = {"momentum_buffer": buffer, "started": jnp.ones_like(state["started"])}
    return -like(grad, options["lr"]) * direction, state


SGD = Rule(
    name="SGD",
    numeric=("lr", "dampening"),
    switches=("weight_decay", "momentum"),
    flags={"maximize": False, "nesterov": False},
    names=lambda param, flags: ("momentum_buffer", "started") if flags["momentum"] else (),
    step=_sgd,
)
