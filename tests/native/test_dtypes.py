"""What is carried keeps the dtype it starts with; nothing else is changed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta

BATCHES = np.linspace(-1.0, 1.0, 6, dtype=np.float32).reshape(3, 2)


def loss_fn(w: Any, x: Any) -> jax.Array:
    return jnp.mean((w * x - 1.0) ** 2)


def momentum(h: Any) -> optax.GradientTransformation:
    return optax.sgd(h["lr"], h["beta"])


def dtypes(tree: Any) -> set[Any]:
    return {leaf.dtype for leaf in jax.tree.leaves(tree)}


def unroll(params: Any, h: Any, **options: Any) -> jaxmeta.Unrolled:
    return jaxmeta.meta_unroll(loss_fn, momentum, params, BATCHES, hyperparams=h, **options)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("adjoint", [jaxmeta.ReverseMode(), jaxmeta.StepCheckpoint()])
def test_float64_hyperparams_leave_smaller_params_alone(dtype: Any, adjoint: Any) -> None:
    h = {"lr": jnp.float64(0.3), "beta": jnp.float64(0.6)}
    params = jnp.ones(2, dtype)
    out = unroll(params, h, adjoint=adjoint, trajectory=True)
    assert dtypes([out.params, out.opt_state, out.trajectory]) == {jnp.dtype(dtype)}
    gradient = jax.grad(lambda h: unroll(params, h, adjoint=adjoint).losses[-1])(h)
    assert dtypes(gradient) == {jnp.dtype("float64")}
    wide = jax.grad(lambda h: unroll(jnp.ones(2), h, adjoint=adjoint).losses[-1])(h)
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for name, value in wide.items():
        assert gradient[name] == pytest.approx(value, rel=tolerance)


@pytest.mark.usefixtures("x64")
def test_adam_moments_and_counts_keep_their_dtypes() -> None:
    h = {"lr": jnp.float64(0.1), "b1": jnp.float64(0.9)}
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    out = jaxmeta.meta_unroll(
        lambda params, x: loss_fn(params["w"], x),
        lambda h: optax.adam(h["lr"], h["b1"], mu_dtype=jnp.float32),
        params,
        BATCHES,
        hyperparams=h,
    )
    adam = out.opt_state[0]
    assert (adam.mu["w"].dtype, adam.nu["w"].dtype) == (jnp.float32, jnp.bfloat16)
    assert adam.count.dtype == jnp.int32 and adam.count == 3


def test_float32_without_x64() -> None:
    out = unroll(np.ones(2), {"lr": 0.3, "beta": 0.6})
    assert dtypes([out.params, out.opt_state, out.losses]) == {jnp.dtype("float32")}


def test_one_program_in_both_precisions() -> None:
    for enabled, dtype in ((False, "float32"), (True, "float64"), (False, "float32")):
        with jax.enable_x64(enabled):
            out = unroll(np.ones(2), {"lr": 0.3, "beta": 0.6})
            assert dtypes([out.params, out.opt_state, out.losses]) == {jnp.dtype(dtype)}


def test_python_numbers_and_weak_types_become_strong() -> None:
    def counting(w: Any, x: Any, *, state: Any) -> Any:
        mean = 0.9 * state["mean"] + 0.1 * x.mean()
        return (w - mean) ** 2, {"mean": mean, "count": state["count"] + 1}

    weak = jnp.asarray(2.0)
    assert weak.weak_type
    out = jaxmeta.meta_unroll(
        counting, optax.sgd(0.1), weak, BATCHES, state={"mean": 0.0, "count": 0}
    )
    for leaf in (out.params, out.state["mean"], out.state["count"]):
        assert not leaf.weak_type
    assert out.state["count"].dtype == jnp.int32 and out.state["count"] == 3


def test_a_python_number_as_hyperparam_does_not_widen_the_loss() -> None:
    seen = []

    def loss(w: Any, x: Any, h: Any) -> jax.Array:
        seen.append((h * w).dtype)
        return (h * w - 1) ** 2

    jaxmeta.meta_unroll(
        loss, optax.sgd(0.1), jnp.ones((), jnp.bfloat16), num_steps=1, hyperparams=2.0
    )
    assert seen == [jnp.bfloat16]


@pytest.mark.usefixtures("x64")
def test_a_float64_model_may_have_float32_statistics() -> None:
    def loss(w: Any, x: Any, *, state: Any) -> Any:
        return (w - x.mean()) ** 2, 0.5 * state + 0.5 * x.mean()

    xs = jnp.asarray(BATCHES, jnp.float64)
    out = jaxmeta.meta_unroll(loss, optax.sgd(0.1), 1.0, xs, state=jnp.float32(0.0))
    assert (out.params.dtype, out.state.dtype) == (jnp.float64, jnp.float32)


def test_loss_scale_of_low_precision_and_full_precision_master_copy() -> None:
    """Mixed precision: bfloat16 inside the loss, float32 parameters and optimizer."""

    def loss(w: Any, x: Any) -> jax.Array:
        return loss_fn(w.astype(jnp.bfloat16), x.astype(jnp.bfloat16)).astype(jnp.float32)

    def final(lr: Any, loss: Any) -> jax.Array:
        out = jaxmeta.meta_unroll(loss, optax.adam, jnp.ones(2), BATCHES, hyperparams=lr)
        assert dtypes([out.params, out.opt_state[0].mu]) == {jnp.dtype("float32")}
        return out.params.sum()

    mixed, full = (jax.grad(final)(0.1, loss) for loss in (loss, loss_fn))
    assert mixed == pytest.approx(float(full), rel=0.05)
