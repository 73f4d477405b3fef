"""Memory of the compiled meta-gradient on a small transformer, exact as XLA plans it.

The model is that of `benchmarks/adjoint_memory.py`, smaller so that it compiles quickly.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxmeta import Auto, ForwardMode, MixedMode, NestedCheckpoint, ReverseMode, StepCheckpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from adjoint_workloads import transformer  # type: ignore[import-not-found]

SMALL = {"layers": 2, "width": 32, "heads": 2, "vocabulary": 64, "length": 64, "batch": 4}


@functools.cache
def temporary_bytes(adjoint: Any, steps: int, rematerialise: bool = False) -> int:
    workload = transformer(**SMALL, rematerialise=rematerialise)

    def meta_loss(meta: Any, params: Any, batches: Any) -> jax.Array:
        return workload.meta_loss(meta, params, batches, adjoint)

    shapes = (workload.meta, workload.params, workload.batches(steps))
    analysis = jax.jit(jax.grad(meta_loss)).lower(*shapes).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_mixed_mode_keeps_no_activations_between_steps() -> None:
    workload = transformer(**SMALL)
    params = sum(4 * leaf.size for leaf in jax.tree.leaves(workload.params))
    per_step = (temporary_bytes(MixedMode(), 24) - temporary_bytes(MixedMode(), 8)) / 16
    assert per_step == pytest.approx(4 * params, rel=0.05)  # parameters, two moments, gradient
    less = MixedMode(save_gradients=False)
    per_step = (temporary_bytes(less, 24) - temporary_bytes(less, 8)) / 16
    assert per_step == pytest.approx(3 * params, rel=0.05)


def test_mixed_mode_needs_less_for_a_step() -> None:
    assert temporary_bytes(MixedMode(), 8) < 0.75 * temporary_bytes(StepCheckpoint(), 8)
    assert temporary_bytes(MixedMode(), 8) < 0.15 * temporary_bytes(ReverseMode(), 8)
    assert temporary_bytes(MixedMode(), 8, True) < 0.65 * temporary_bytes(MixedMode(), 8)


def test_nested_checkpoints_hardly_grow() -> None:
    nested = MixedMode(NestedCheckpoint(3))
    assert temporary_bytes(nested, 512) < 1.4 * temporary_bytes(nested, 64)
    assert temporary_bytes(nested, 512) < temporary_bytes(MixedMode(), 512) / 10


def test_the_default_heeds_its_memory() -> None:
    limit = 2**20
    assert temporary_bytes(Auto(memory=limit), 64) < temporary_bytes(Auto(), 64) / 2
    assert temporary_bytes(Auto(), 8) == temporary_bytes(MixedMode(), 8)


def test_forward_mode_does_not_grow() -> None:
    def one_rate(steps: int) -> int:
        workload = transformer(**SMALL)

        def meta_loss(rate: Any, params: Any, batches: Any) -> jax.Array:
            rates = jax.tree.map(lambda leaf: rate, params)
            return workload.meta_loss(rates, params, batches, ForwardMode())

        shapes = (jax.ShapeDtypeStruct((), "float32"), workload.params, workload.batches(steps))
        analysis = jax.jit(jax.grad(meta_loss)).lower(*shapes).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    batches = 4 * 65 * 4  # bytes of a step's tokens
    assert one_rate(256) - one_rate(16) <= 2 * 240 * batches
