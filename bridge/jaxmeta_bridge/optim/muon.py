"""Muon, as `torch.optim.Muon` computes it."""

import math

import jax
import jax.numpy as jnp

from jaxmeta import ArgumentValueError
from jaxmeta_bridge.optim import safe
from jaxmeta_bridge.optim.rule import Flags, Options, Rule, Spec, State, average, like


def _names(param: Spec, flags: Flags) -> tuple[str, ...]:
    if len(param.shape) != 2:
        raise ArgumentValueError(
            f"Muon got a parameter of shape {tuple(param.shape)}; expected a matrix: give the "
            "others to another optimizer."
        )
    return ("momentum_buffer",)


def _muon(
    param: jax.Array, grad: jax.Array, state: State, options: Options, flags: Flags
) -> tuple[jax.Array, State]:
    momentum, lr = options["momentum"], options["lr"]
    buffer = average(state["momentum_buffer"], grad, momentum)
    direction = average(buffer, grad, momentum) if flags["nesterov"] else buffer
    direction = orthogonal(direction, options["ns_coefficients"], options["eps"], flags["ns_steps"])
    step_size = like(grad, lr * _ratio(flags["adjust_lr_fn"], param.shape))
    decay = like(param, lr * options["weight_decay"]) * param
    return -decay - step_size * direction, {"momentum_buffer": buffer}


def orthogonal(
    matrix: jax.Array,
    coefficients: tuple[jax.Array, jax.Array, jax.Array],
    eps: jax.Array,
    steps: int,
) -> jax.Array:
    """Newton and Schulz's iteration towards the orthogonal factor of `matrix`.

    torch runs it in bfloat16. Here each result has bfloat16's value, while derivatives are those
    of the formula, in the dtype of `matrix`: bfloat16's own would keep two digits.
    """

    def rounded(x: jax.Array) -> jax.Array:
        return safe.rounded(x, jnp.bfloat16)

    a, b, c = (like(matrix, x) for x in coefficients)
    tall = matrix.shape[0] > matrix.shape[1]
    x = rounded(matrix.T if tall else matrix)
    norm = rounded(safe.sqrt(jnp.sum(x * x)))
    x = rounded(x / safe.maximum(norm, rounded(like(x, eps))))
    for _ in range(steps):
        gram = rounded(x @ x.T)
        polynomial = rounded(b * gram + c * (gram @ gram))
        x = rounded(a * x + polynomial @ x)
    return x.T if tall else x


def _ratio(adjust: str | None, shape: tuple[int, ...]) -> float:
    rows, columns = shape
    if adjust in (None, "original"):
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


MUON = Rule(
    name="Muon",
    numeric=("lr", "weight_decay", "momentum", "ns_coefficients", "eps"),
    switches=(),
    flags={"nesterov": True, "ns_steps": 5, "adjust_lr_fn": None},
    names=_names,
    step=_muon,
    whole=("ns_coefficients", "eps"),
)
