"""Adafactor, as `torch.optim.Adafactor` computes it."""

import jax
import jax.numpy as jnp

from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.rule import Flags, Options, Rule, Spec, State, average, like


def _names(param: Spec, flags: Flags) -> tuple[str, ...]:
    factored = len(param.shape) > 1
    return ("step", "row_var", "col_var") if factored else ("step", "variance")


def _row_zeros(param: Spec, options: Options, flags: Flags) -> jax.Array:
    return jnp.zeros((*param.shape[:-1], 1), param.dtype)


def _col_zeros(param: Spec, options: Options, flags: Flags) -> jax.Array:
    return jnp.zeros((*param.shape[:-2], 1, param.shape[-1]), param.dtype)


def _adafactor(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    lr, eps2 = options["lr"], options["eps"][-1]
    # torch takes the first parameter's epsilon for all of a group, if their dtypes differ.
    eps1 = options["eps"][0] if len(options["eps"]) == 2 else float(jnp.finfo(flags["dtype"]).eps)
    step = state["step"] + 1
    count = step.astype(lr.dtype)
    decay = 1 - count ** options["beta2_decay"]
    size = safe.minimum(lr, count**-0.5) * safe.maximum(eps2, _rms(param).astype(lr.dtype))
    square = grad * grad
    if grad.ndim > 1:
        row = average(state["row_var"], square.mean(-1, keepdims=True), decay)
        col = average(state["col_var"], square.mean(-2, keepdims=True), decay)
        state = {"step": step, "row_var": row, "col_var": col}
        variance = row * col / safe.maximum(row.mean(-2, keepdims=True), like(row, eps1))
    else:
        variance = average(state["variance"], square, decay)
        state = {"step": step, "variance": variance}
    direction = grad / jnp.sqrt(safe.maximum(variance, like(variance, eps1 * eps1)))
    clip = safe.maximum(1, _rms(direction).astype(lr.dtype) / options["d"])
    delta = -like(grad, size / clip) * direction
    if flags["weight_decay"]:
        delta -= like(param, lr * options["weight_decay"]) * param
    return delta, state


def _rms(x: jax.Array) -> jax.Array:
    return safe.sqrt(jnp.mean(x * x))


ADAFACTOR = Rule(
    name="Adafactor",
    numeric=("lr", "beta2_decay", "eps", "d"),
    switches=("weight_decay",),
    flags={"maximize": False},
    names=_names,
    step=_adafactor,
    start={"row_var": _row_zeros, "col_var": _col_zeros},
    whole=("beta2_decay", "eps", "d"),
)
