"""Adam and AdamW, as `torch.optim` computes them."""

import jax

from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.rule import (
    Flags,
    Options,
    Rule,
    State,
    average,
    decayed,
    like,
    slots,
)


def decay_beside(
    grad: jax.Array, param: jax.Array, options: Options, flags: Flags
) -> tuple[jax.Array, jax.Array | float]:
    """(gradient, what to add to the parameter) with weight decay coupled, or beside the moments."""
    if not (flags["decoupled_weight_decay"] and flags["weight_decay"]):
        return decayed(grad, param, options, flags), 0.0
    return grad, -like(param, options["lr"] * options["weight_decay"]) * param


def moments(
    grad: jax.Array, state: State, betas: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, State]:
    """(step, counted from 1; state) with the averages of the gradient and of its square."""
    step = state["step"] + 1
    return step, {
        **state,
        "step": step,
        "exp_avg": average(state["exp_avg"], grad, betas[0]),
        "exp_avg_sq": average(state["exp_avg_sq"], grad * grad, betas[1]),
    }


def _adam(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    beta1, beta2 = options["betas"]
    grad, decay = decay_beside(grad, param, options, flags)
    step, state = moments(grad, state, options["betas"])
    second = state["exp_avg_sq"]
    if flags["amsgrad"]:
        second = safe.maximum(state["max_exp_avg_sq"], second)
        state["max_exp_avg_sq"] = second
    correction = like(second, safe.sqrt(1 - safe.power(beta2, step)))
    scale = safe.sqrt(second) / correction + like(second, options["eps"])
    step_size = like(second, options["lr"] / (1 - safe.power(beta1, step)))
    return decay - step_size * (state["exp_avg"] / scale), state


def _rule(name: str, decoupled: bool) -> Rule:
    return Rule(
        name=name,
        numeric=("lr", "betas", "eps"),
        switches=("weight_decay",),
        flags={"maximize": False, "amsgrad": False, "decoupled_weight_decay": decoupled},
        names=slots("step", "exp_avg", "exp_avg_sq", amsgrad="max_exp_avg_sq"),
        step=_adam,
    )


ADAM = _rule("Adam", decoupled=False)
ADAMW = _rule("AdamW", decoupled=True)
