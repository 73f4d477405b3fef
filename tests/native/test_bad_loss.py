"""A loss_fn that cannot be called as it will be, or returns something else, is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from jaxmeta import ArgumentKeyError, ArgumentTypeError, ArgumentValueError
from tests.native.refusal import SGD, loss_fn, refused


class TestSignature:
    def test_one_argument(self) -> None:
        refused(
            ArgumentTypeError,
            "loss_fn(params) cannot be called as loss_fn(params, batch): too many",
            loss_fn=lambda params: 0.0,
        )

    def test_hyperparams_that_are_not_given(self) -> None:
        refused(
            ArgumentTypeError,
            "missing a required argument: 'h'",
            "functools.partial",
            loss_fn=lambda p, x, h: 0.0,
        )

    def test_hyperparams_that_nobody_takes(self) -> None:
        refused(
            ArgumentValueError,
            "hyperparams is given, but neither loss_fn nor optimizer takes it",
            "third argument",
            hyperparams={"lr": 0.1},
        )

    def test_a_third_argument_that_may_be_meant(self) -> None:
        for optimizer in (SGD, optax.sgd):
            refused(
                ArgumentTypeError,
                "third argument 'scale' has a default",
                "functools.partial",
                "name it 'hyperparams'",
                loss_fn=lambda p, x, scale=1.0: 0.0,
                optimizer=optimizer,
                hyperparams=0.1,
            )

    @pytest.mark.parametrize("name, value", [("key", jax.random.key(0)), ("state", {"mean": 0.0})])
    def test_key_and_state(self, name: str, value: Any) -> None:
        call = f"loss_fn(params, batch, {name}=)"
        refused(ArgumentTypeError, call, f"unexpected keyword argument '{name}'", **{name: value})

        def needs_key(params: Any, batch: Any, *, key: Any) -> Any: ...
        def needs_state(params: Any, batch: Any, state: Any) -> Any: ...

        loss = {"key": needs_key, "state": needs_state}[name]
        refused(ArgumentTypeError, f"argument: '{name}'", f"{name}=", loss_fn=loss)

    def test_another_argument(self) -> None:
        refused(
            ArgumentTypeError,
            "'temperature'",
            "functools.partial",
            loss_fn=lambda p, x, h, temperature: 0.0,
            hyperparams=0.1,
        )


class TestLoss:
    def test_not_callable(self) -> None:
        refused(ArgumentTypeError, "loss_fn is a scalar", "expected a function", loss_fn=0.5)

    @pytest.mark.parametrize(
        "loss, found", [(lambda p, x: x, "float32[2]"), (lambda p, x: x[:1], "float32[1]")]
    )
    def test_not_scalar(self, loss: Any, found: str) -> None:
        refused(
            ArgumentValueError,
            f"loss_fn returned {found} as its loss",
            "scalar",
            "mean",
            loss_fn=loss,
        )

    @pytest.mark.parametrize(
        "loss, found",
        [
            (lambda p, x: jnp.int32(1), "int32"),
            (lambda p, x: 1, "int32"),
            (lambda p, x: 1j, "complex64"),
        ],
    )
    def test_not_real(self, loss: Any, found: str) -> None:
        refused(ArgumentTypeError, f"a scalar {found} as its loss", "floating-point", loss_fn=loss)

    def test_nothing(self) -> None:
        refused(
            ArgumentTypeError, "loss_fn returned None", "scalar loss", loss_fn=lambda p, x: None
        )

    def test_aux_that_was_not_declared(self) -> None:
        refused(
            ArgumentTypeError,
            "loss_fn returned a tuple of length 2",
            "has_aux=True",
            loss_fn=lambda p, x: (loss_fn(p, x), 1.0),
        )

    def test_aux_that_was_declared_and_is_missing(self) -> None:
        refused(
            ArgumentValueError,
            "loss_fn returned a scalar float32; expected (loss, aux), as has_aux=True",
            has_aux=True,
        )
        refused(
            ArgumentValueError,
            "a tuple of length 3; expected (loss, aux)",
            loss_fn=lambda p, x: (loss_fn(p, x), 1.0, 2.0),
            has_aux=True,
        )

    def test_aux_that_is_no_array(self) -> None:
        refused(
            ArgumentTypeError,
            "aux['name'], which loss_fn returned, is str 'x'",
            loss_fn=lambda p, x: (loss_fn(p, x), {"name": "x"}),
            has_aux=True,
        )

    def test_a_state_that_is_not_returned(self) -> None:
        refused(
            ArgumentValueError,
            "expected (loss, new_state), as state= is given",
            loss_fn=lambda p, x, state: loss_fn(p, x),
            state=1.0,
        )

    def test_state_and_aux_that_are_not_nested(self) -> None:
        refused(
            ArgumentValueError,
            "a scalar float32 as its second output; expected (loss, (new_state, aux))",
            loss_fn=lambda p, x, state: (loss_fn(p, x), state),
            state=1.0,
            has_aux=True,
        )

    def test_a_key_that_no_tree_has(self) -> None:
        refused(
            ArgumentKeyError,
            "loss_fn asked for the key 'kernel'",
            "params is a dict with the keys ['dense']",
            "hyperparams is a dict with the keys ['decay']",
            loss_fn=lambda p, x, h: p["kernel"],
            hyperparams={"decay": 0.1},
        )


class TestState:
    def state_refused(self, new: Any, *fragments: str, old: Any = None) -> None:
        refused(
            ArgumentValueError,
            "the new state of loss_fn",
            *fragments,
            loss_fn=lambda p, x, state: (loss_fn(p, x), new),
            state={"mean": 0.0, "count": 0} if old is None else old,
        )

    def test_missing_and_new_leaves(self) -> None:
        self.state_refused(
            {"mean": 0.0, "variance": 1.0}, "state['count'] missing; state['variance'] not expected"
        )

    def test_another_container(self) -> None:
        self.state_refused([0.0], "another structure than state", "PyTreeDef", old=(0.0,))

    def test_another_shape(self) -> None:
        self.state_refused(
            {"mean": jnp.zeros(2), "count": 0}, "state['mean'] is a scalar float32", "float32[2]"
        )

    def test_a_number_of_another_kind(self) -> None:
        self.state_refused(
            {"mean": 0.0, "count": 0.5}, "state['count'] is a scalar int32", "a scalar float32"
        )

    def test_no_array(self) -> None:
        self.state_refused({"mean": "x", "count": 1}, "state['mean']", "str 'x'")
        refused(ArgumentTypeError, "state is str 'x'", state="x")
