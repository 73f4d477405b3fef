"""Raw numbers and the legal values that they stand for."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import jaxmeta
from jaxmeta.bijectors import (
    bounded,
    constrain,
    nonnegative,
    positive,
    unconstrain,
    unit_interval,
)
from tests.native.support import assert_close

KINDS = [np.float64, np.float32, ml_dtypes.bfloat16, np.float16]
RULES = {
    "positive": positive(),
    "nonnegative": nonnegative(),
    "unit_interval": unit_interval(),
    "bounded": bounded(-1.0, 3.0),
    "up to zero": bounded(-5.0, 0.0),
}
FORMULAS = {
    "positive": math.exp,
    "nonnegative": lambda r: math.log1p(math.exp(r)),
    "unit_interval": lambda r: 1 / (1 + math.exp(-r)),
    "bounded": lambda r: -1 + 4 / (1 + math.exp(-r)),
    "up to zero": lambda r: -5 + 5 / (1 + math.exp(-r)),
}
# d value / d raw, written so that it is precise on both sides.
SLOPES = {
    "positive": math.exp,
    "nonnegative": lambda r: 1 / (1 + math.exp(-r)),
    "unit_interval": lambda r: 1 / (2 + math.exp(r) + math.exp(-r)),
    "bounded": lambda r: 4 / (2 + math.exp(r) + math.exp(-r)),
    "up to zero": lambda r: 5 / (2 + math.exp(r) + math.exp(-r)),
}
CURVATURES = {
    "positive": math.exp,
    "nonnegative": lambda r: 1 / (2 + math.exp(r) + math.exp(-r)),
    "unit_interval": lambda r: -math.tanh(r / 2) / (2 + math.exp(r) + math.exp(-r)),
    "bounded": lambda r: -4 * math.tanh(r / 2) / (2 + math.exp(r) + math.exp(-r)),
    "up to zero": lambda r: -5 * math.tanh(r / 2) / (2 + math.exp(r) + math.exp(-r)),
}
RAW = [-14.0, -9.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 9.0, 14.0]
every_rule = pytest.mark.parametrize("name", RULES)


def with_derivatives(rule: Any, raw: Any) -> Any:
    """Values, first and second derivatives at each of the raw numbers."""

    def at(r: Any) -> Any:
        slope = jax.value_and_grad(rule.constrain)
        return (*slope(r), jax.grad(lambda r: slope(r)[1])(r))

    return map(np.asarray, jax.jit(jax.vmap(at))(raw))


@every_rule
def test_values_and_both_derivatives(name: str, x64: None) -> None:
    value, first, second = with_derivatives(RULES[name], jnp.asarray(RAW))
    np.testing.assert_allclose(value, list(map(FORMULAS[name], RAW)), rtol=1e-14, atol=2e-15)
    np.testing.assert_allclose(first, list(map(SLOPES[name], RAW)), rtol=2e-15)
    np.testing.assert_allclose(second, list(map(CURVATURES[name], RAW)), rtol=1e-12)


@every_rule
def test_slopes_are_precise_in_float32(name: str) -> None:
    """At 0.9999 and beyond the usual s * (1 - s) has lost half of its digits."""
    slopes = list(with_derivatives(RULES[name], jnp.asarray(RAW, jnp.float32)))[1]
    np.testing.assert_allclose(slopes, list(map(SLOPES[name], RAW)), rtol=3e-6)


@every_rule
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_round_trip(name: str, kind: Any, x64: None) -> None:
    low, high = RULES[name].domain
    upper = 1e3 if high == math.inf else high
    steps = np.geomspace(1e-4, 0.5, 200)
    values = np.concatenate([low + steps * (upper - low), upper - steps * (upper - low)])
    values = values.astype(kind)
    values = values[(values > np.asarray(low, kind)) & (values < np.asarray(upper, kind))]
    raw = unconstrain(values, RULES[name])
    back = np.asarray(jax.jit(RULES[name].constrain)(raw))
    assert raw.dtype == back.dtype == kind
    exact, found = values.astype(np.float64), back.astype(np.float64)
    eps = float(jnp.finfo(kind).eps)
    distance = exact - low if high == math.inf else np.minimum(exact - low, high - exact)
    bound = eps * abs(exact) + (2 + abs(np.asarray(raw, np.float64))) * eps * distance
    assert (abs(found - exact) <= bound).all()


@pytest.mark.parametrize("value", [0.9, 0.999, 1 - 1e-8, 1 - 1e-12])
def test_values_close_to_one_come_back_exactly(value: float, x64: None) -> None:
    raw = unconstrain(value, unit_interval())
    assert constrain(raw, unit_interval()) == value
    np.testing.assert_allclose(raw, math.log(value) - math.log(1 - value), rtol=1e-15)


@every_rule
@pytest.mark.parametrize("kind", [np.float64, np.float16], ids=lambda kind: kind.__name__)
def test_far_out_the_value_is_legal_and_the_derivatives_finite(
    name: str, kind: Any, x64: None
) -> None:
    raw = jnp.asarray([-6e4, -800, -200, -90, -20, 20, 90, 200, 800, 6e4], kind)
    values, *derivatives = with_derivatives(RULES[name], raw)
    low, high = RULES[name].domain
    assert (values > low).all() and (values < high).all()
    assert np.isfinite(derivatives).all()


def test_a_saturated_beta_still_has_a_slope() -> None:
    """In float32 the value is the last number below 1 from raw = 17 on."""
    value, slope = jax.value_and_grad(unit_interval().constrain)(jnp.float32(20.0))
    assert value == np.nextafter(np.float32(1), np.float32(0))
    np.testing.assert_allclose(slope, math.exp(-20), rtol=1e-5)


def test_a_bijector_holds_for_all_below_it_and_none_for_what_stays() -> None:
    values = {"adam": {"b1": 0.9, "b2": [0.99, 0.999]}, "steps": 7, "lr": 0.1, "other": (-1.0,)}
    rules = {"adam": unit_interval(), "steps": None, "lr": positive(), "other": None}
    raw = unconstrain(values, rules)
    assert raw["steps"] == 7 and raw["other"] == (-1.0,)
    np.testing.assert_allclose(raw["adam"]["b2"][1], math.log(999), rtol=1e-5)
    np.testing.assert_allclose(raw["lr"], math.log(0.1), rtol=1e-6)
    assert_close(constrain(raw, rules)["adam"], values["adam"], 1e-6)
    assert jax.tree.structure(constrain(raw, rules)) == jax.tree.structure(values)


@every_rule
def test_under_jit_and_vmap(name: str) -> None:
    raw = {"a": jnp.linspace(-3.0, 3.0, 5), "b": {"c": jnp.ones((5, 2))}}
    rules = {"a": RULES[name], "b": RULES[name]}
    plain = constrain(raw, rules)
    for transformed in (jax.jit, jax.vmap):
        assert_close(transformed(lambda raw: constrain(raw, rules))(raw), plain, 1e-6)
        assert_close(transformed(lambda v: unconstrain(v, rules))(plain), raw, 1e-5)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, 2.0, np.nan])
def test_a_traced_value_outside_becomes_nan(value: float) -> None:
    traced = jax.jit(lambda v: unconstrain(v, unit_interval()))
    assert np.isnan(traced(value))
    assert np.isfinite(traced(0.5))


REFUSED = [
    (0.0, nonnegative(), "values is 0.0; expected numbers above 0, which in float32 go from 1.17"),
    (-1e-3, positive(), "values is -0.001; expected numbers above 0"),
    (1.0, unit_interval(), "values is 1.0; expected numbers above 0 and below 1, .* to 0.99999994"),
    (1 - 1e-8, unit_interval(), "values is 0.99999999; .* float32 go .* start a little inside"),
    ({"a": np.array([2.0, 3.0])}, bounded(1, 3), r"\['a'\] is float64\[2\] with the entry 3.0;"),
    (math.inf, positive(), "values is inf; expected numbers above 0"),
    (math.nan, bounded(-1, 1), "values is nan; expected numbers above -1 and below 1"),
]


@pytest.mark.parametrize(("values", "rule", "message"), REFUSED)
def test_values_outside_are_refused(values: Any, rule: Any, message: str) -> None:
    with pytest.raises(jaxmeta.ArgumentValueError, match=message):
        unconstrain(values, rule)


def test_what_is_no_float_is_refused() -> None:
    for convert, root in ((constrain, "raw"), (unconstrain, "values")):
        with pytest.raises(jaxmeta.ArgumentTypeError, match=rf"{root}\['n'\] is a scalar int32"):
            convert({"n": 3}, {"n": positive()})
    with pytest.raises(jaxmeta.ArgumentTypeError, match="values is str 'x'; expected floats"):
        unconstrain("x", positive())


def test_bijectors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(jaxmeta.ArgumentTypeError, match=r"bijectors\['a'\] is function .* None"):
        constrain({"a": 1.0}, {"a": positive})
    with pytest.raises(jaxmeta.ArgumentValueError, match="no tree prefix of raw: .*'b'.*'a'"):
        constrain({"a": 1.0}, {"b": positive()})
    with pytest.raises(jaxmeta.ArgumentValueError, match="no tree prefix of values"):
        unconstrain(1.0, {"a": None})


def test_ends_that_make_no_interval_are_refused() -> None:
    for low, high in ((1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(jaxmeta.ArgumentValueError, match=f"low is {low} and high is {high}"):
            bounded(low, high)
    wrong: Any = "1"
    with pytest.raises(jaxmeta.ArgumentTypeError, match="high is str '1'; expected a Python"):
        bounded(0.0, wrong)


@pytest.mark.parametrize("rule", [bounded(1, 1 + 1e-9), bounded(-3e38, 3e38), bounded(0, 1e39)])
def test_an_interval_too_narrow_or_wide_for_the_dtype_is_refused(rule: Any) -> None:
    with pytest.raises(jaxmeta.ArgumentValueError, match=r"Bounded\(.* does not fit float32"):
        constrain(jnp.float32(0.0), rule)


def test_meta_gradient_through_a_loop_is_the_chain_rule(x64: None) -> None:
    rules = {"lr": positive(), "momentum": unit_interval(), "decay": nonnegative()}
    values = {"lr": 0.1, "momentum": 0.9, "decay": 1e-4}

    def meta_loss(h: Any) -> jax.Array:
        def optimizer(h: Any) -> optax.GradientTransformation:
            return optax.chain(
                optax.add_decayed_weights(h["decay"]), optax.sgd(h["lr"], h["momentum"])
            )

        out = jaxmeta.meta_unroll(
            lambda w, x: jnp.sum((w - x) ** 2),
            optimizer,
            jnp.zeros(2, jnp.float64),
            jnp.ones((3, 2)),
            hyperparams=h,
        )
        return jnp.sum((out.params - 1) ** 2)

    by_value = jax.grad(meta_loss)(jax.tree.map(jnp.float64, values))
    raw = unconstrain(values, rules)
    by_raw = jax.grad(lambda raw: meta_loss(constrain(raw, rules)))(raw)
    slopes = {"lr": 0.1, "momentum": 0.9 * 0.1, "decay": -math.expm1(-1e-4)}
    expected = jax.tree.map(lambda g, slope: g * slope, by_value, slopes)
    for name in rules:
        np.testing.assert_allclose(by_raw[name], expected[name], rtol=1e-9)
