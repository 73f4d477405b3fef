"""Every wrong argument is refused at once, by a message that says what to do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxmeta
from jaxmeta import ArgumentKeyError, ArgumentTypeError, ArgumentValueError
from tests.native import support

W = {"dense": {"kernel": jnp.ones(2)}}
XS = np.ones((3, 2), np.float32)
SGD = optax.sgd(0.1)


def loss_fn(params: Any, x: Any) -> jax.Array:
    return jnp.mean((params["dense"]["kernel"] - x) ** 2)


def refused(error: type[Exception], *fragments: str, **changed: Any) -> None:
    """meta_unroll with the `changed` arguments raises `error`, and says all of `fragments`."""
    arguments = {"loss_fn": loss_fn, "optimizer": SGD, "params": W, "batches": XS, **changed}
    for run in (jaxmeta.meta_unroll, _under_jit):
        with pytest.raises(error) as caught:
            run(**arguments)
        assert isinstance(caught.value, jaxmeta.JaxmetaError)
        for fragment in fragments:
            assert fragment in str(caught.value)


def _under_jit(**arguments: Any) -> None:
    jax.jit(lambda: jaxmeta.meta_unroll(**arguments).losses)()


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
        params = {"dense": {"kernel": leaf}}
        for run in (jaxmeta.meta_unroll, _under_jit):
            with pytest.raises(ArgumentTypeError) as caught:
                run(loss_fn=loss_fn, optimizer=SGD, params=params, batches=XS)
            message = str(caught.value)
            assert message.startswith("params['dense']['kernel'] is ") and found in message
            assert message.endswith(
                "meta_unroll differentiates params: pass floats, or close over it."
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
            "optimizer(hyperparams) needs a concrete value for one of the optimizer's arguments",
            "plain function",
            "lambda count:",
            optimizer=lambda h: optax.sgd(schedule(h)),
            hyperparams=0.5,
        )

    def test_a_schedule_that_branches_in_update(self) -> None:
        refused(
            ArgumentTypeError,
            "optimizer.update needs a concrete value",
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
        expected = "expected an Adjoint, such as jaxmeta.ReverseMode()"
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
