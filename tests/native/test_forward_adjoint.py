"""Forward mode beside the matrix of adjoints: orders, inputs of each step, limits, memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxmeta
from jaxmeta.adjoint.forward import ForwardMode
from jaxmeta.adjoint.reverse import ReverseMode
from tests.native import support

ORDERS = [
    (jax.jacfwd, jax.jacfwd),
    (jax.jacfwd, jax.jacrev),
    (jax.jacrev, jax.jacfwd),
    (jax.jacrev, jax.jacrev),
]
DATA = {
    "x": jnp.sin(jnp.arange(24.0)).reshape(4, 6),
    "label": jnp.array([0, 1, 1, 0]),
    "key": jax.random.split(jax.random.key(1), 4),
}


def loss_fn(w: Any, batch: Any, h: Any) -> jax.Array:
    noise = jax.random.normal(batch["key"], (6,), jnp.result_type(h["decay"]))
    score = jnp.tanh(w["a"] * batch["x"] + 0.1 * noise).sum() * w["b"][batch["label"]]
    return (score - batch["label"]) ** 2 + h["decay"] * jnp.sum(w["a"] ** 4)


def meta_loss(adjoint: Any, h: Any, w: Any, x: Any) -> jax.Array:
    out = jaxmeta.meta_unroll(
        loss_fn,
        lambda h: optax.adam(h["lr"], eps_root=1e-3),
        w,
        DATA | {"x": x},
        hyperparams=h,
        adjoint=adjoint,
    )
    return jnp.sum(out.params["a"] ** 3) + jnp.sum(out.params["b"]) + jnp.sum(out.losses**2)


def point() -> tuple[Any, Any, Any]:
    h = {"lr": jnp.float64(0.1), "decay": jnp.float64(0.02)}
    w = {"a": jnp.linspace(-0.5, 0.6, 6), "b": jnp.array([0.3, -0.7])}
    return h, w, jnp.asarray(DATA["x"], jnp.float64)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("orders", ORDERS)
def test_second_derivatives_in_every_order(orders: Any) -> None:
    outer, inner = orders
    _, w, x = point()

    def of(adjoint: Any) -> Any:
        f = functools.partial(meta_loss, adjoint)
        return jax.jit(outer(inner(lambda h: f(h, w, x))))(point()[0])

    support.assert_close(of(ForwardMode()), of(ReverseMode()), 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 16, 64])
def test_inputs_of_each_step_and_chunks(chunk_size: int | None) -> None:
    """34 numbers: 2 hyperparameters, 8 parameters, 24 of the batches, 6 at each step."""

    def of(adjoint: Any) -> Any:
        return jax.jit(jax.grad(functools.partial(meta_loss, adjoint), (0, 1, 2)))(*point())

    adjoint = ForwardMode(max_inputs=34, chunk_size=chunk_size)
    support.assert_close(of(adjoint), of(ReverseMode()), 1e-12)


@pytest.mark.usefixtures("x64")
def test_no_steps() -> None:
    h, w, _ = point()

    def end(w: Any) -> jax.Array:
        out = jaxmeta.meta_unroll(
            loss_fn,
            lambda h: optax.sgd(h["lr"]),
            w,
            num_steps=0,
            batch=jax.tree.map(lambda leaf: leaf[0], DATA),
            hyperparams=h,
            adjoint=ForwardMode(),
        )
        assert out.losses.shape == (0,)
        return jnp.sum(out.params["a"] ** 2)

    support.assert_close(jax.grad(end)(w), {"a": 2 * w["a"], "b": jnp.zeros(2)})


@pytest.mark.usefixtures("x64")
def test_too_many_inputs_are_refused_when_differentiated() -> None:
    h, w, x = point()
    f = functools.partial(meta_loss, ForwardMode(max_inputs=9))
    assert jnp.isfinite(f(h, w, x))
    jax.grad(f)(h, w, x)  # 2 numbers
    message = r"differentiated in 10 numbers \(.*float64\[6\].*max_inputs=9.*MixedMode"
    with pytest.raises(jaxmeta.ArgumentValueError, match=message):
        jax.grad(f, (0, 1))(h, w, x)
    jax.jvp(lambda w: f(h, w, x), (w,), (w,))  # forward mode outside needs none of it


def test_complex_inputs_are_refused() -> None:
    def end(z: Any) -> jax.Array:
        return jaxmeta.meta_unroll(
            lambda w, z: (w - jnp.abs(z)) ** 2,
            optax.sgd(0.1),
            jnp.float32(0.0),
            batch=z,
            num_steps=2,
            adjoint=ForwardMode(),
        ).params

    with pytest.raises(jaxmeta.ArgumentTypeError, match="complex64.*real numbers"):
        jax.grad(end, holomorphic=False)(jnp.complex64(1 + 2j))


@pytest.mark.parametrize(
    "options", [{"max_inputs": -1}, {"max_inputs": 2.0}, {"chunk_size": 0}, {"chunk_size": True}]
)
def test_options_are_checked(options: Any) -> None:
    (name,) = options
    with pytest.raises((jaxmeta.ArgumentTypeError, jaxmeta.ArgumentValueError), match=name):
        ForwardMode(**options)


def temporary_bytes(adjoint: Any, steps: int) -> int:
    def end(lr: Any, w: Any, x: Any) -> jax.Array:
        return jaxmeta.meta_unroll(
            lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2),
            optax.adam,
            w,
            batch=x,
            num_steps=steps,
            hyperparams=lr,
            adjoint=adjoint,
        ).losses[-1]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (16, 16), (64, 16))]
    analysis = jax.jit(jax.grad(end)).lower(*shapes).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    few, many = (temporary_bytes(ForwardMode(), steps) for steps in (64, 1024))
    assert many - few <= 2 * 4 * (1024 - 64)  # the losses and their cotangents
    few, many = (temporary_bytes(ReverseMode(), steps) for steps in (64, 1024))
    assert many - few > (1024 - 64) * 16 * 16 * 4
