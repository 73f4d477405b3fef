"""Run as a program, with two devices: each exact adjoint inside shard_map, against one device.

Data are split over the devices, parameters are the same on both, the loss is the mean of both.
"""

import functools
import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
)

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, PartitionSpec

import jaxmeta
from jaxmeta import (
    BinomialCheckpoint,
    ForwardMode,
    MixedMode,
    NestedCheckpoint,
    ReverseMode,
    StepCheckpoint,
)

jax.config.update("jax_enable_x64", True)

STEPS = 5
DATA = np.random.default_rng(0).normal(size=(2, STEPS, 4, 3))  # device, step, example, feature
PARAMS = {"a": jnp.array([0.3, 0.2, -0.5]), "b": jnp.float64(0.7)}
RATES = {"lr": jnp.float64(0.1), "decay": jnp.float64(0.02)}
ADJOINTS = [
    ReverseMode(),
    StepCheckpoint(),
    NestedCheckpoint((2, 3)),
    BinomialCheckpoint(2),
    MixedMode(),
    MixedMode(BinomialCheckpoint(1)),
    MixedMode(NestedCheckpoint()),
    ForwardMode(),
    jaxmeta.Auto(),
    jaxmeta.Auto(memory=1),
]


def on_one(params: Any, x: Any, rates: Any) -> jax.Array:
    error = jnp.mean(jnp.tanh(x * params["a"]) ** 2 * params["b"])
    return error + rates["decay"] * jnp.sum(params["a"] ** 4)


def on_each(params: Any, x: Any, rates: Any) -> jax.Array:
    return jax.lax.pmean(on_one(params, x, rates), "device")


def meta_loss(loss: Any, adjoint: Any, rates: Any, params: Any, data: Any) -> jax.Array:
    out = jaxmeta.meta_unroll(
        loss, lambda h: optax.adam(h["lr"]), params, data, hyperparams=rates, adjoint=adjoint
    )
    return jnp.sum(out.params["a"] ** 3) + out.params["b"] + jnp.sum(out.losses)


def derivatives(f: Any) -> Any:
    first = jax.grad(f, (0, 1))(RATES, PARAMS)
    return first, jax.hessian(lambda rates: f(rates, PARAMS))(RATES)


def main() -> None:
    together = DATA.swapaxes(0, 1).reshape(STEPS, 8, 3)
    expected = derivatives(
        lambda rates, params: meta_loss(on_one, ReverseMode(), rates, params, together)
    )
    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,))
    for adjoint in ADJOINTS:
        sharded = jax.shard_map(
            lambda rates, params, data, adjoint=adjoint: meta_loss(
                on_each, adjoint, rates, params, data[0]
            ),
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec("device")),
            out_specs=PartitionSpec(),
        )
        actual = derivatives(jax.jit(functools.partial(lambda f, h, w: f(h, w, DATA), sharded)))
        for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-10, err_msg=repr(adjoint))
    print("agree:", len(ADJOINTS))


if __name__ == "__main__":
    main()
