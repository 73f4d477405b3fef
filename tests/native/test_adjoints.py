"""What adjoints promise beside derivatives: memory, and that anyone can write one."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxmeta


def loss_fn(w: Any, x: Any) -> jax.Array:
    hidden = x
    for _ in range(4):
        hidden = jnp.tanh(hidden @ w)
    return jnp.mean(hidden**2)


def temporary_bytes(adjoint: jaxmeta.Adjoint, steps: int) -> int:
    """Memory of a meta-gradient where activations (256 x 16) are larger than weights (16 x 16)."""

    def meta_loss(lr: Any, w: Any, x: Any) -> jax.Array:
        return jaxmeta.meta_unroll(
            loss_fn, optax.sgd, w, batch=x, num_steps=steps, hyperparams=lr, adjoint=adjoint
        ).losses[-1]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((), (16, 16), (256, 16))]
    compiled = jax.jit(jax.grad(meta_loss)).lower(*shapes).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_step_checkpoint_keeps_parameters_but_no_activations() -> None:
    activations, weights = 256 * 16 * 4, 16 * 16 * 4

    def per_step(adjoint: jaxmeta.Adjoint) -> float:
        return (temporary_bytes(adjoint, 40) - temporary_bytes(adjoint, 20)) / 20

    assert per_step(jaxmeta.ReverseMode()) > 4 * activations
    assert per_step(jaxmeta.StepCheckpoint()) < 2 * weights


def test_a_policy_keeps_what_it_names() -> None:
    policy = jax.checkpoint_policies.dots_saveable
    sizes = [
        temporary_bytes(adjoint, 20)
        for adjoint in (
            jaxmeta.StepCheckpoint(),
            jaxmeta.StepCheckpoint(policy=policy),
            jaxmeta.ReverseMode(),
        )
    ]
    assert sizes == sorted(set(sizes))


def test_an_adjoint_of_ones_own() -> None:
    calls = []

    @dataclass(frozen=True)
    class FirstOrder(jaxmeta.Adjoint):
        """First-order MAML: the inner gradient counts as a constant."""

        def value_and_grad(self, fn: Any) -> Any:
            calls.append("value_and_grad")

            def constant_gradient(params: Any) -> Any:
                value, gradient = jax.value_and_grad(fn, has_aux=True)(params)
                return value, jax.lax.stop_gradient(gradient)

            return constant_gradient

        def loop(self, step: Any, carry: Any, xs: Any, length: int) -> Any:
            calls.append("loop")
            return jax.lax.scan(step, carry, xs, length=length)

    def end(w: Any, adjoint: Any) -> jax.Array:
        def squared(w: Any, x: Any) -> jax.Array:
            return (w - x) ** 2

        return jaxmeta.meta_unroll(squared, optax.sgd(0.25), w, jnp.ones(3), adjoint=adjoint).params

    assert jax.grad(end)(0.0, FirstOrder()) == pytest.approx(1.0)
    assert jax.grad(end)(0.0, jaxmeta.ReverseMode()) == pytest.approx(0.5**3)
    assert sorted(set(calls)) == ["loop", "value_and_grad"]
