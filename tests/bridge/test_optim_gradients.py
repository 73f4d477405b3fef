"""Derivatives of the rules against finite differences, at ordinary and at exactly zero values."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from optim_cases import CASES, FULLEST, Case, gradients, unrolled

from jaxmeta_bridge.optim import safe

STEPS = 7
SHAPE = (2, 3)

# Options without an effect on these runs; the others must have one, or a test could pass on zeros.
IDLE = {
    "sgd": {"dampening"},
    "sgd-decay-maximize": {"dampening"},
    "radam-unrectified": {"betas", "eps"},
    "adafactor": {"eps"},
    "adafactor-floors": {"d", "beta2_decay"},
    "muon": {"eps"},
    "muon-plain": {"eps"},
}


@pytest.fixture(autouse=True)
def smooth(x64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch's rounding to float32 and bfloat16, which finite differences would see."""
    monkeypatch.setattr(safe, "rounded", lambda x, dtype: x)


def inputs(case: Case) -> dict[str, Any]:
    """Everything that a run from a new state is a differentiable function of."""
    numeric, _ = case.split()
    return {
        "param": jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE)),
        "grads": jnp.asarray(gradients(STEPS, SHAPE)),
        "numeric": jax.tree.map(jnp.float64, numeric),
    }


def resumed_inputs(case: Case) -> dict[str, Any]:
    """The same for a run that goes on from a state after three steps."""
    numeric, static = case.split()
    state = case.rule.init(jax.ShapeDtypeStruct(SHAPE, jnp.float64), numeric, static)
    # Positive, as squares are.
    floats = {key: value + 0.4 for key, value in state.items() if value.dtype == jnp.float64}
    return inputs(case) | {"state": floats}


def outcome(case: Case) -> Callable[[dict[str, Any]], jax.Array]:
    """A number that depends on all of the last parameter and state."""
    weights = jnp.cos(jnp.arange(6.0)).reshape(SHAPE)
    _, static = case.split()

    def run(given: dict[str, Any]) -> jax.Array:
        state = case.rule.init(jax.typeof(given["param"]), given["numeric"], static)
        if "state" in given:
            later = {"step": jnp.int32(3), "started": jnp.bool_(True)}
            state = {k: {**given["state"], **later}[k] for k in state}
        last, state = unrolled(case, given["param"], given["grads"], given["numeric"], state)
        kept = [value for value in state.values() if value.dtype == jnp.float64]
        return (weights * jnp.sin(last)).sum() + sum(jnp.sin(0.3 * value).sum() for value in kept)

    return run


@functools.cache
def curvature(name: str) -> Callable[..., Any]:
    """(gradient, its derivative along a direction), compiled."""
    gradient = jax.grad(outcome(CASES[name]))
    return jax.jit(lambda given, direction: jax.jvp(gradient, (given,), (direction,)))


@functools.cache
def slope(name: str) -> Callable[..., Any]:
    """(value, its derivative along a direction) at many points in one direction, compiled."""

    def one(given: Any, direction: Any) -> Any:
        return jax.jvp(outcome(CASES[name]), (given,), (direction,))

    return jax.jit(jax.vmap(one, in_axes=(0, None)))


def differences(function: Callable[[Any], Any], at: Any, width: float = 1e-5) -> Any:
    """Central differences in each number of `at` of a function of a batch, the new axis first."""
    flat, unflatten = ravel_pytree(at)
    shifts = jnp.concatenate([jnp.eye(flat.size), -jnp.eye(flat.size)]) * width
    values = function(jax.vmap(unflatten)(flat + shifts))
    return jax.tree.map(
        lambda value: (value[: flat.size] - value[flat.size :]) / (2 * width), values
    )


def direction_for(given: Any) -> Any:
    flat, unflatten = ravel_pytree(given)
    return unflatten(jnp.cos(jnp.arange(flat.size)))


def assert_close(actual: Any, expected: Any, rtol: float = 1e-5) -> None:
    actual, expected = ravel_pytree(actual)[0], ravel_pytree(expected)[0]
    scale = np.abs(expected).max()
    assert scale > 0
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * max(scale, 1))


def check(name: str, given: Any, *parts: str, order: int = 1) -> Any:
    """Compare with differences in `parts` of `given`, or in all; the gradient."""
    direction = direction_for(given)
    gradient, curved = curvature(name)(given, direction)
    values, slopes = differences(lambda points: slope(name)(points, direction), given)
    _, unflatten = ravel_pytree(given)
    values, slopes = unflatten(values), unflatten(slopes)
    parts = parts or tuple(given)
    assert_close([gradient[part] for part in parts], [values[part] for part in parts])
    if order == 2:
        assert_close([curved[part] for part in parts], [slopes[part] for part in parts])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, curved)))
    return gradient


@pytest.mark.parametrize("name", CASES)
def test_from_a_new_state(name: str):
    gradient = check(name, inputs(CASES[name]), order=2)
    for option, slopes in gradient["numeric"].items():
        idle = option in IDLE.get(name, set())
        assert idle or all(np.all(part != 0) for part in jax.tree.leaves(slopes)), option


@pytest.mark.parametrize("name", [name for name in FULLEST if name not in ("adamw", "muon")])
def test_from_a_later_state(name: str):
    check(name, resumed_inputs(CASES[name]), order=2)


def with_zeros(grads: jax.Array) -> jax.Array:
    """An entry that is always zero, one that is zero at first, and one that is so later."""
    return grads.at[:, 0, 0].set(0).at[0, 0, 1].set(0).at[1:, 0, 2].set(0)


@pytest.mark.parametrize("name", CASES)
def test_zero_gradients(name: str):
    given = inputs(CASES[name])
    given["grads"] = with_zeros(given["grads"])
    check(name, given, "param", "numeric")
    given["grads"] *= 0
    slopes = curvature(name)(given, direction_for(given))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("name", ["adamw-amsgrad", "nadam", "adagrad", "adamax", "rmsprop"])
def test_derivative_in_a_gradient_that_is_zero(name: str):
    """g / (|g| + eps) and its relatives have a derivative at zero, 1 / eps."""
    given = inputs(CASES[name])
    given["grads"] = with_zeros(given["grads"])
    direction = direction_for(given)
    actual, _ = curvature(name)(given, direction)
    values, _ = differences(lambda points: slope(name)(points, direction), given, 1e-7)
    assert_close(actual["grads"], ravel_pytree(given)[1](values)["grads"], 1e-4)


ZEROS = {
    "sgd-momentum": {"lr": 0.0, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0},
    "sgd-nesterov": {"momentum": 0.0},
    "adam": {"betas": (0.0, 0.0), "eps": 0.0},
    "adam-amsgrad": {"weight_decay": 0.0, "betas": (0.0, 0.5), "eps": 0.0},
    "adamw": {"weight_decay": 0.0, "lr": 0.0},
    "nadam": {"weight_decay": 0.0, "betas": (0.0, 0.0), "momentum_decay": 0.0},
    "radam": {"weight_decay": 0.0, "betas": (0.0, 0.99), "eps": 0.0},
    "radam-unrectified": {"betas": (0.0, 0.0)},
    "adamax": {"weight_decay": 0.0, "betas": (0.0, 0.0)},
    "adagrad": {"weight_decay": 0.0, "lr_decay": 0.0, "eps": 0.0, "initial_accumulator_value": 0.0},
    "adadelta": {"weight_decay": 0.0, "rho": 0.0},
    "asgd": {"weight_decay": 0.0, "lambd": 0.0, "alpha": 0.0},
    "rmsprop": {"weight_decay": 0.0, "alpha": 0.0},
    "rmsprop-momentum": {"momentum": 0.0, "alpha": 0.0, "eps": 0.0},
    "rprop": {"lr": 0.0},
    "adafactor": {"weight_decay": 0.0, "beta2_decay": 0.0},
    "muon": {"weight_decay": 0.0, "momentum": 0.0},
}


@pytest.mark.parametrize("name", ZEROS)
def test_options_that_are_zero_arrays(name: str):
    given = inputs(CASES[name])
    assert ZEROS[name].keys() <= given["numeric"].keys()
    given["numeric"] |= jax.tree.map(jnp.float64, ZEROS[name])
    check(name, given, "numeric", order=2)


def test_centered_rmsprop_survives_a_variance_that_rounds_below_zero():
    case = CASES["rmsprop-centered"]
    numeric, static = case.split()
    param, grad = jnp.ones(50), jnp.linspace(0.1, 0.2, 50)
    square = 0.3 * grad * grad + 0.7 * grad**2
    mean = 0.3 * grad + 0.7 * grad
    assert (square < mean * mean).any()
    state = case.rule.init(jax.typeof(param), numeric, static)
    state |= {"square_avg": grad**2, "grad_avg": grad}

    def loss(grad: jax.Array) -> jax.Array:
        return case.rule.update(param, grad, state, numeric, static)[0].sum()

    value, slope = jax.value_and_grad(loss)(grad)
    np.testing.assert_allclose(value, (param - 0.1 * grad / 0.1).sum(), rtol=1e-6)
    assert np.isfinite(slope).all()


def test_square_root():
    for function in (safe.sqrt, jax.grad(safe.sqrt), jax.grad(jax.grad(safe.sqrt))):
        assert function(jnp.zeros(())) == 0
        assert np.isnan(function(jnp.array(jnp.nan)))
        assert np.isnan(function(jnp.array(-1.0)))
    assert jax.grad(safe.sqrt)(jnp.array(4.0)) == 0.25


def test_maximum_and_minimum():
    for function, reference in ((safe.maximum, np.maximum), (safe.minimum, np.minimum)):
        for a in (1.0, 2.0, np.nan):
            for b in (1.0, 2.0, np.nan):
                np.testing.assert_array_equal(function(jnp.array(a), jnp.array(b)), reference(a, b))
                slopes = jax.grad(function, argnums=(0, 1))(jnp.array(a), jnp.array(b))
                assert sorted(map(float, slopes)) == [0, 1]


def test_power():
    for count in range(4):
        function = functools.partial(safe.power, count=jnp.int32(count))
        expected = [1.0 if order == count else 0.0 for order in range(5)]
        actual = []
        for _ in range(5):
            actual.append(function(jnp.zeros(())))
            function = jax.grad(function)
        factorial = float(np.prod(np.arange(1, count + 1)))
        np.testing.assert_array_equal(actual, factorial * np.array(expected))
