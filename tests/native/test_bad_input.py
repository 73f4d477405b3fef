"""Wrong data, keys and adjoints are refused at once, by a message that says what to do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmeta
from jaxmeta import ArgumentTypeError, ArgumentValueError
from tests.native.refusal import SGD, XS, W, loss_fn, refused


class TestParams:
    @pytest.mark.parametrize(
        "leaf, found",
        [
            (jnp.arange(2), "int32[2]"),
            (np.array([True]), "bool[1]"),
            (3, "int32"),
            (jnp.ones(2, jnp.complex64), "complex64[2]"),
            (1j, "complex64"),
            (jax.random.key(0), "key<fry>"),
            ("text", "str 'text'"),
            (np.array(["text"]), "ndarray"),
            (object(), "object"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_leaves_that_are_no_floats(self, leaf: Any, found: str) -> None:
        refused(
            ArgumentTypeError,
            "params['dense']['kernel'] is ",
            found,
            "; meta_unroll differentiates params: pass floats, or close over it.",
            params={"dense": {"kernel": leaf}},
        )


class TestBatches:
    def test_leading_axes_that_differ(self) -> None:
        refused(
            ArgumentValueError,
            "batches['x'] has 3, batches['y'] has 4",
            "leading axis of batches is the inner step",
            batches={"x": XS, "y": np.ones(4)},
        )

    def test_a_scalar_leaf(self) -> None:
        refused(
            ArgumentValueError,
            "batches['scale'] is a scalar",
            "leading step axis",
            "batch=",
            batches={"x": XS, "scale": 2.0},
        )

    def test_a_leaf_that_is_no_array(self) -> None:
        refused(
            ArgumentTypeError,
            "batches['name'] is str 'train'",
            "expected an array or a number",
            batches={"x": XS, "name": "train"},
        )
        refused(
            ArgumentTypeError,
            "batch['name'] is str 'train'",
            batches=None,
            batch={"name": "train"},
            num_steps=1,
        )

    def test_both_kinds(self) -> None:
        refused(ArgumentValueError, "batches and batch are both given", batch=XS, num_steps=3)


class TestNumSteps:
    def test_unknown(self) -> None:
        refused(ArgumentValueError, "number of inner steps is unknown", "num_steps", batches=None)
        refused(ArgumentValueError, "number of inner steps is unknown", batches=None, batch=XS)

    def test_negative(self) -> None:
        refused(ArgumentValueError, "num_steps is -1; expected zero or more", num_steps=-1)

    @pytest.mark.parametrize(
        "steps, found", [(3.0, "3"), ("3", "str '3'"), (True, "bool"), ([3], "list")]
    )
    def test_no_integer(self, steps: Any, found: str) -> None:
        refused(ArgumentTypeError, "num_steps is", found, "expected a Python int", num_steps=steps)

    def test_traced(self) -> None:
        unroll = functools.partial(jaxmeta.meta_unroll, loss_fn, SGD, W, batch=XS[0])
        with pytest.raises(
            ArgumentTypeError, match="num_steps is a scalar int32; expected a Python"
        ):
            jax.jit(lambda steps: unroll(num_steps=steps).losses)(3)

    def test_contradicting_batches(self) -> None:
        refused(
            ArgumentValueError,
            "num_steps is 5, but batches have a leading axis of 3",
            "batch=",
            num_steps=5,
        )


class TestTheRest:
    @pytest.mark.parametrize(
        "key",
        [
            0,
            jnp.zeros(2),
            jax.random.split(jax.random.key(0)),
            jax.random.split(jax.random.PRNGKey(0)),
        ],
    )
    def test_key(self, key: Any) -> None:
        refused(
            ArgumentTypeError,
            "key is",
            "expected one random key",
            loss_fn=lambda p, x, key: 0.0,
            key=key,
        )

    def test_adjoint(self) -> None:
        expected = "expected 'auto' or an Adjoint, such as jaxmeta.ReverseMode()"
        refused(ArgumentTypeError, "adjoint is str 'reverse'", expected, adjoint="reverse")
        refused(ArgumentTypeError, "adjoint is None", expected, adjoint=None)
        refused(
            ArgumentTypeError,
            "adjoint is the class StepCheckpoint",
            "an instance: StepCheckpoint()",
            adjoint=jaxmeta.StepCheckpoint,
        )

    def test_an_adjoint_that_cannot_be_hashed(self) -> None:
        adjoint = jaxmeta.StepCheckpoint(policy=[])  # type: ignore[arg-type]
        refused(ArgumentTypeError, "StepCheckpoint that cannot be hashed", adjoint=adjoint)

    def test_a_refused_call_leaves_nothing_behind(self) -> None:
        broken = [True]

        def loss(params: Any, x: Any) -> Any:
            return x if broken else loss_fn(params, x)

        with pytest.raises(ArgumentValueError):
            jaxmeta.meta_unroll(loss, SGD, W, XS)
        broken.clear()
        assert jaxmeta.meta_unroll(loss, SGD, W, XS).losses.shape == (3,)
