"""Learning rate and momentum of five SGD steps on a line, to every printed digit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta

pytestmark = pytest.mark.usefixtures("x64")

# torch.manual_seed(3); nn.Linear(1, 1, bias=False).double().weight
WEIGHT = np.array([[-0.9914729595184326]])
X = np.random.RandomState(1).random_sample((100, 1))
Y = 3.5 * X
H = {"lr": np.array([0.3], np.float32), "momentum": np.array([0.5], np.float32)}


def mean_squared_error(w: Any, _: Any) -> jax.Array:
    return jnp.mean((X @ w.T - Y) ** 2)


def meta_loss(h: Any, w: Any, adjoint: jaxmeta.Adjoint) -> tuple[jax.Array, jaxmeta.Unrolled]:
    out = jaxmeta.meta_unroll(
        mean_squared_error,
        lambda h: optax.sgd(h["lr"], h["momentum"]),
        w,
        num_steps=5,
        hyperparams=h,
        trajectory=True,
        adjoint=adjoint,
    )
    return jnp.squeeze((out.params - 3.5) ** 2), out


@pytest.mark.parametrize("adjoint", [jaxmeta.ReverseMode(), jaxmeta.StepCheckpoint()])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_worked_example(wrap: Any, adjoint: jaxmeta.Adjoint) -> None:
    def f(h: Any, w: Any) -> Any:
        return meta_loss(h, w, adjoint)

    (value, out), (h, w) = wrap(jax.value_and_grad(f, (0, 1), has_aux=True))(H, WEIGHT)
    assert [f"{w.item():.4f}" for w in out.trajectory] == [
        "-0.9915",
        "-0.1217",
        "1.0145",
        "2.0640",
        "2.8668",
        "3.3908",
    ]
    assert value == pytest.approx(0.0119279879829, rel=1e-11)
    assert f"{h['lr'].item():.4f} {h['momentum'].item():.4f}" == "-1.6295 -0.9496"
    assert f"{w.item():.6f}" == "-0.005311"
    assert (h["lr"].dtype, h["lr"].shape) == (jnp.float32, (1,))
    assert (w.dtype, w.shape) == (jnp.float64, (1, 1))
