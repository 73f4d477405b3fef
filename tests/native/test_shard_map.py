"""Inside shard_map, with and without JAX's check of which values vary over the mesh."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxmeta
from jaxmeta.manual_axes import vary
from tests.native import support

pytestmark = pytest.mark.usefixtures("x64")

TASKS = np.random.default_rng(0).normal(size=(2, 3))
MESH = jax.make_mesh((1,), ("task",), axis_types=(jax.sharding.AxisType.Auto,))


def loss_fn(w: Any, x: Any, *, state: Any) -> Any:
    return jnp.cos(x * w) + state * w, 0.5 * state + x


def adapt(lr: Any, w: Any, xs: Any, loss: Any = loss_fn) -> jax.Array:
    out = jaxmeta.meta_unroll(loss, optax.adam, w, xs, hyperparams=lr, state=0.0, trajectory=True)
    return out.params + out.trajectory.sum()


def of_all_tasks(lr: Any, w: Any, tasks: Any) -> jax.Array:
    return jax.vmap(adapt, (None, None, 0))(lr, w, tasks)


def cast(lr: Any, w: Any, tasks: Any) -> jax.Array:
    """Each device has its own parameters."""
    return of_all_tasks(lr, vary(w, frozenset({"task"})), tasks)


def sharded(f: Any, check_vma: bool) -> Any:
    specs = (P(), P(), P("task"))
    mapped = jax.shard_map(f, mesh=MESH, in_specs=specs, out_specs=P("task"), check_vma=check_vma)
    return lambda lr, w: mapped(lr, w, TASKS).sum()


@pytest.mark.parametrize("f, check_vma", [(of_all_tasks, False), (cast, True)])
def test_as_under_vmap(f: Any, check_vma: bool) -> None:
    expected = jax.jit(jax.value_and_grad(lambda lr, w: of_all_tasks(lr, w, TASKS).sum(), (0, 1)))
    actual = jax.jit(jax.value_and_grad(sharded(f, check_vma), (0, 1)))
    support.assert_close(actual(0.1, 0.5), expected(0.1, 0.5))


def test_a_state_that_becomes_the_same_on_all_devices() -> None:
    def forgetful(w: Any, x: Any, *, state: Any) -> Any:
        return loss_fn(w, x, state=state)[0], jnp.zeros(())

    def on_each(xs: Any) -> jax.Array:
        return adapt(0.1, vary(jnp.float64(0.5), frozenset({"task"})), xs[0], forgetful)[None]

    mapped = jax.shard_map(on_each, mesh=MESH, in_specs=P("task"), out_specs=P("task"))
    expected = adapt(0.1, 0.5, TASKS[0], forgetful)
    support.assert_close(jax.jit(mapped)(TASKS[:1])[0], expected)


def test_gradients_are_not_summed_over_devices_unasked() -> None:
    with pytest.raises(jaxmeta.ArgumentValueError, match=r"mesh axes \('task',\).*jax.lax.pcast"):
        jax.jit(sharded(of_all_tasks, True))(0.1, 0.5)


def test_one_loop_on_all_devices() -> None:
    def on_all(w: Any, x: Any, *, state: Any, reduce: Any) -> Any:
        loss, state = loss_fn(w, x, state=state)
        return reduce(loss), reduce(state)

    mean = functools.partial(jax.lax.pmean, axis_name="task")
    parallel = jax.shard_map(
        lambda xs: adapt(0.1, 0.5, xs[0], functools.partial(on_all, reduce=mean)),
        mesh=MESH,
        in_specs=P("task"),
        out_specs=P(),
    )
    support.assert_close(jax.jit(parallel)(TASKS[:1]), adapt(0.1, 0.5, TASKS[0]))


def test_state_that_differs_between_devices() -> None:
    def uneven(w: Any, x: Any, *, state: Any) -> Any:
        loss, state = loss_fn(w, x, state=state)
        return jax.lax.pmean(loss, "task"), state

    mapped = jax.shard_map(
        lambda xs: adapt(0.1, 0.5, xs[0], uneven), mesh=MESH, in_specs=P("task"), out_specs=P()
    )
    with pytest.raises(jaxmeta.ArgumentValueError, match="state is the same on all devices"):
        jax.jit(mapped)(TASKS[:1])


def test_every_adjoint_on_two_devices() -> None:
    """In a process of its own, as the number of devices is set when JAX starts."""
    command = [sys.executable, "-m", "tests.native.sharded_adjoints"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("agree:")
