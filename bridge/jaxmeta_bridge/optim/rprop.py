"""Rprop, as `torch.optim.Rprop` computes it."""

import jax
import jax.numpy as jnp

from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.rule import Flags, Options, Rule, Spec, State, like, slots


def _first_size(param: Spec, options: Options, flags: Flags) -> jax.Array:
    # The learning rate is only this start: later steps do not read it.
    return jnp.broadcast_to(options["lr"].astype(param.dtype), param.shape)


def _rprop(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    shrink, grow = (like(grad, eta) for eta in options["etas"])
    smallest, largest = (like(grad, size) for size in options["step_sizes"])
    agreement = jnp.sign(grad * state["prev"])
    factor = jnp.where(agreement > 0, grow, jnp.where(agreement < 0, shrink, 1))
    size = safe.minimum(safe.maximum(state["step_size"] * factor, smallest), largest)
    grad = jnp.where(agreement < 0, 0, grad)
    return -jnp.sign(grad) * size, {"prev": grad, "step_size": size}


RPROP = Rule(
    name="Rprop",
    numeric=("lr", "etas", "step_sizes"),
    switches=(),
    flags={"maximize": False},
    names=slots("prev", "step_size"),
    step=_rprop,
    start={"step_size": _first_size},
)
