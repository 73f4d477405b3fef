"""What is no optimizer, or no state of it, is refused, and its own errors are explained."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmeta import ArgumentKeyError, ArgumentTypeError, ArgumentValueError
from tests.native import support
from tests.native.refusal import W, refused


class NotAnOptimizer:
    """Like torch.optim.SGD."""

    param_groups = ()

    def step(self) -> None: ...
    def zero_grad(self) -> None: ...


class TestOptimizer:
    @pytest.mark.parametrize(
        "optimizer, found",
        [
            (3, "a scalar int32"),
            ("sgd", "str 'sgd'"),
            (NotAnOptimizer(), "NotAnOptimizer"),
            (None, "None"),
        ],
    )
    def test_no_optimizer(self, optimizer: Any, found: str) -> None:
        refused(
            ArgumentTypeError,
            f"optimizer is {found}",
            "Expected an optax.GradientTransformation, such as optax.sgd(0.1)",
            optimizer=optimizer,
        )

    def test_a_schedule(self) -> None:
        schedule = optax.exponential_decay(0.1, 10, 0.9)
        fragments = ("no hyperparams= is given", "pass optax.sgd(schedule)")
        refused(ArgumentTypeError, "optimizer is the function", *fragments, optimizer=schedule)
        for hyperparams in (0.1, {"lr": 0.1}):
            refused(
                ArgumentTypeError,
                "optimizer(hyperparams)",
                "pass optax.sgd(schedule)",
                optimizer=schedule,
                hyperparams=hyperparams,
            )

    def test_a_function_of_hyperparams_without_hyperparams(self) -> None:
        refused(
            ArgumentTypeError, "no hyperparams= is given", optimizer=lambda h: optax.sgd(h["lr"])
        )

    def test_a_function_that_returns_something_else(self) -> None:
        refused(
            ArgumentTypeError,
            "optimizer(hyperparams) returned None",
            optimizer=lambda h: None,
            hyperparams=0.1,
        )

    def test_a_function_without_arguments(self) -> None:
        refused(
            ArgumentTypeError,
            "optimizer(hyperparams) raised TypeError",
            "0 positional arguments",
            optimizer=lambda: optax.sgd(0.1),
            hyperparams=0.1,
        )

    def test_a_class(self) -> None:
        refused(
            ArgumentTypeError,
            "optimizer(hyperparams) returned NotAnOptimizer",
            optimizer=lambda h: NotAnOptimizer(),
            hyperparams=0.1,
        )

    def test_a_missing_hyperparam(self) -> None:
        refused(
            ArgumentKeyError,
            "optimizer(hyperparams) asked for the key 'momentum'",
            "hyperparams is a dict with the keys ['lr']",
            optimizer=lambda h: optax.sgd(h["lr"], h["momentum"]),
            hyperparams={"lr": 0.1},
        )

    def test_a_missing_hyperparam_of_a_schedule(self) -> None:
        refused(
            ArgumentKeyError,
            "optimizer.update asked for the key 'rate'",
            "hyperparams is a dict with the keys ['lr']",
            optimizer=lambda h: optax.sgd(lambda count: h["lr"] * h["rate"]),
            hyperparams={"lr": 0.1},
        )

    def test_hyperparams_of_another_structure(self) -> None:
        refused(
            ArgumentTypeError,
            "optimizer(hyperparams) raised",
            "hyperparams is float32[2]",
            optimizer=lambda h: optax.sgd(h["lr"]),
            hyperparams=jnp.ones(2),
        )

    def test_a_hyperparam_that_is_no_array(self) -> None:
        refused(
            ArgumentTypeError,
            "hyperparams['name'] is str 'sgd'",
            optimizer=lambda h: optax.sgd(h["lr"]),
            hyperparams={"lr": 0.1, "name": "sgd"},
        )

    @pytest.mark.parametrize(
        "optimizer",
        [
            lambda h: optax.sgd(float(h)),
            lambda h: optax.sgd(np.asarray(h).item()),
            lambda h: optax.sgd([0.1, 0.2][h.astype(int)]),
        ],
    )
    def test_options_that_must_be_python_numbers(self, optimizer: Any) -> None:
        refused(
            ArgumentTypeError,
            "optimizer(hyperparams) needs the value of an argument",
            optimizer=optimizer,
            hyperparams=0.5,
        )

    @pytest.mark.parametrize(
        "schedule",
        [
            lambda h: optax.exponential_decay(0.1, 10, h),
            lambda h: optax.piecewise_constant_schedule(0.1, {2: h}),
            lambda h: optax.warmup_cosine_decay_schedule(0.0, h, 2, 10),
            lambda h: optax.sgdr_schedule(
                [{"init_value": 0.0, "peak_value": h, "decay_steps": 4, "warmup_steps": 1}]
            ),
        ],
    )
    def test_schedules_that_cannot_be_traced(self, schedule: Any) -> None:
        refused(
            ArgumentTypeError,
            "optimizer(hyperparams) needs the value of an argument of the optimizer",
            "plain function",
            "lambda count:",
            optimizer=lambda h: optax.sgd(schedule(h)),
            hyperparams=0.5,
        )

    def test_a_schedule_that_branches_in_update(self) -> None:
        refused(
            ArgumentTypeError,
            "optimizer.update needs the value of an argument",
            "lambda count:",
            optimizer=lambda h: optax.sgd(lambda count: h if bool(count) else 0.1),
            hyperparams=0.5,
        )

    def test_an_update_of_another_shape(self) -> None:
        refused(
            ArgumentValueError,
            "params is a scalar float32 before a step",
            "float32[3]",
            loss_fn=lambda w, x: (w - 1) ** 2,
            params=jnp.float32(1.0),
            optimizer=optax.sgd,
            hyperparams=jnp.ones(3),
        )

    def test_an_update_of_another_structure(self) -> None:
        forgetful = support.transformation(lambda params: (), lambda g, s, p: (g["dense"], s))
        refused(
            ArgumentValueError,
            "the update that optimizer makes",
            "params['dense']['kernel'] missing",
            optimizer=forgetful,
        )


class TestOptimizerState:
    def test_of_another_optimizer(self) -> None:
        refused(
            ArgumentValueError,
            "opt_state is not a state of this optimizer for these params",
            "optimizer.init(params)",
            opt_state=optax.adam(0.1).init(W),
        )

    def test_of_other_params(self) -> None:
        refused(
            ArgumentValueError,
            "opt_state[0].mu['dense']['kernel'] has shape (5,); expected (2,)",
            optimizer=optax.adam(0.1),
            opt_state=optax.adam(0.1).init({"dense": {"kernel": jnp.ones(5)}}),
        )
        refused(
            ArgumentValueError,
            "opt_state[0].mu['dense']['kernel'], opt_state[0].nu['dense']['kernel'] missing",
            "opt_state[0].mu['w'], opt_state[0].nu['w'] not expected",
            optimizer=optax.adam(0.1),
            opt_state=optax.adam(0.1).init({"w": jnp.ones(2)}),
        )

    def test_that_changes(self) -> None:
        growing = support.transformation(
            lambda params: {"seen": jnp.zeros(1)},
            lambda g, state, params=None: (g, {"seen": jnp.zeros(2)}),
        )
        refused(
            ArgumentValueError,
            "opt_state['seen'] is float32[1] before a step",
            "the new state that optimizer makes",
            "float32[2]",
            optimizer=growing,
        )

    def test_whose_name_changes(self) -> None:
        renamed = support.transformation(
            lambda params: "first", lambda g, state, params=None: (g, "second")
        )
        refused(
            ArgumentValueError,
            "the new state that optimizer makes has another structure than opt_state",
            "Hidden('second')",
            optimizer=renamed,
        )
