"""The inner optimizer: any optax transformation, or a function of the hyperparams making one."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
import optax

from jaxmeta.errors import ArgumentKeyError, ArgumentTypeError, ArgumentValueError
from jaxmeta.objective import Objective
from jaxmeta.trees import (
    PyTree,
    difference,
    hide,
    named_leaves,
    outline,
    restore_dtypes,
    reveal,
    strong,
)


class Transformation(Protocol):
    """What optax calls a gradient transformation, from optax or not."""

    @property
    def init(self) -> Callable[..., Any]:
        """``params -> opt_state``."""
        ...

    @property
    def update(self) -> Callable[..., Any]:
        """``(gradient, opt_state, params, **extra) -> (updates, opt_state)``."""
        ...


_EXPECTED = (
    "Expected an optax.GradientTransformation, such as optax.sgd(0.1), or a function of the "
    "hyperparams that returns one. A schedule is neither: pass optax.sgd(schedule)."
)

# What JAX raises where Python needs the value of a traced array: in an if, float(), range().
_NEEDS_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_FOREIGN_STATE = "opt_state is not a state of this optimizer for these params"
_OWN_STATE = (
    "Pass the opt_state of a meta_unroll with the same optimizer, or optimizer.init(params)."
)


def is_transformation(optimizer: Any) -> bool:
    """Whether ``optimizer`` looks like an optax transformation."""
    functions = (getattr(optimizer, name, None) for name in ("init", "update"))
    return not isinstance(optimizer, type) and all(map(callable, functions))


def check_optimizer(optimizer: Any, *, hyperparams: PyTree, loss_takes_hyperparams: bool) -> None:
    """Raise unless ``optimizer`` is a transformation or can be made from the hyperparams."""
    if is_transformation(optimizer):
        if hyperparams is not None and not loss_takes_hyperparams:
            raise ArgumentValueError(
                "hyperparams is given, but neither loss_fn nor optimizer takes it, so its gradient "
                "would be zero: give loss_fn a third argument, or pass optimizer as a function "
                "hyperparams -> optax.GradientTransformation."
            )
        return
    if not callable(optimizer):
        raise ArgumentTypeError(f"optimizer is {outline(optimizer)}. {_EXPECTED}")
    if hyperparams is None:
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        raise ArgumentTypeError(
            f"optimizer is the function {name!r}, and no hyperparams= is given to call it with. "
            f"{_EXPECTED}"
        )


@dataclass(frozen=True)
class Optimizer:
    """A transformation as the loop uses it: with dtypes that stay, and errors that explain."""

    transformation: Transformation
    hyperparams: PyTree

    def start(self, params: PyTree, opt_state: PyTree | None) -> PyTree:
        """Return the state before the first step, in the form that a loop can carry.

        Args:
            params: the initial parameters.
            opt_state: a state to continue from, its non-array leaves hidden; None for a new one.

        Raises:
            ArgumentValueError: ``opt_state`` does not belong to this optimizer and ``params``.
        """

        def init(params: PyTree) -> PyTree:
            with _explained("optimizer.init", self.hyperparams):
                return strong(hide(self.transformation.init(params)))

        if opt_state is None:
            return init(params)
        expected = jax.eval_shape(init, params)
        found = difference(opt_state, expected, "opt_state")
        if found is not None:
            raise ArgumentValueError(f"{_FOREIGN_STATE}: {found}. {_OWN_STATE}")
        for (name, leaf), own in zip(
            named_leaves("opt_state", opt_state), jax.tree.leaves(expected), strict=True
        ):
            if np.shape(leaf) != own.shape:
                raise ArgumentValueError(
                    f"{_FOREIGN_STATE}: {name} has shape {np.shape(leaf)}; expected {own.shape}. "
                    f"{_OWN_STATE}"
                )
        return opt_state

    def step(
        self,
        gradient: PyTree,
        opt_state: PyTree,
        params: PyTree,
        loss: jax.Array,
        objective: Objective,
    ) -> tuple[PyTree, PyTree]:
        """Return ``(new params, new opt_state)``, both in the dtypes of the old ones."""
        update = self.transformation.update
        extra = _accepted(update, value=loss, grad=gradient, value_fn=objective.value)
        with _explained("optimizer.update", self.hyperparams, tuple(extra)):
            updates, new_state = update(gradient, reveal(opt_state), params, **extra)
        maker = "the update that optimizer makes"
        found = difference(updates, params, "params")
        if found is not None:
            raise ArgumentValueError(f"{maker} has another structure than params: {found}.")
        new_params = restore_dtypes(optax.apply_updates(params, updates), params, "params", maker)
        new_state = restore_dtypes(
            hide(new_state), opt_state, "opt_state", "the new state that optimizer makes"
        )
        return new_params, new_state


def build(optimizer: Any, hyperparams: PyTree) -> Optimizer:
    """Make the optimizer from the hyperparams, or take it as it is where it takes none."""
    if is_transformation(optimizer):
        return Optimizer(optimizer, hyperparams)
    with _explained("optimizer(hyperparams)", hyperparams):
        try:
            made = optimizer(hyperparams)
        except _NEEDS_VALUE:
            raise
        except TypeError as error:
            raise ArgumentTypeError(
                f"optimizer(hyperparams) raised {type(error).__name__}: {error}. hyperparams is "
                f"{outline(hyperparams)}. {_EXPECTED}"
            ) from error
    if not is_transformation(made):
        raise ArgumentTypeError(f"optimizer(hyperparams) returned {outline(made)}. {_EXPECTED}")
    return Optimizer(made, hyperparams)


def _accepted(update: Callable[..., Any], **offered: Any) -> dict[str, Any]:
    """Choose the extra arguments that ``update`` takes after (gradient, state, params)."""
    try:
        parameters = list(inspect.signature(update).parameters.values())
    except (TypeError, ValueError):  # written in C, without a signature
        return {}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return offered
    names = {parameter.name for parameter in parameters[3:]}
    return {name: value for name, value in offered.items() if name in names}


@contextlib.contextmanager
def _explained(call: str, hyperparams: PyTree, extra: tuple[str, ...] = ()) -> Iterator[None]:
    """Say of an error that the user's optimizer raises where it comes from and what helps."""
    try:
        yield
    except ArgumentKeyError:
        raise
    except KeyError as error:
        raise ArgumentKeyError(
            f"{call} asked for the key {error}, which is not there: hyperparams is "
            f"{outline(hyperparams)}."
        ) from error
    except _NEEDS_VALUE as error:
        raise ArgumentTypeError(
            f"{call} needs the value of an argument of the optimizer while JAX traces it, and "
            "what comes from hyperparams (or is the step count of a schedule) has none then. Some "
            "optax schedules branch on their arguments (the rate of exponential_decay, the scales "
            "of the piecewise ones, the peak of warmup_cosine_decay_schedule, sgdr_schedule): "
            "write the schedule as a plain function of the count, such as "
            "optax.sgd(lambda count: h['lr'] * h['rate'] ** count), with jnp.where in place of if; "
            "or close over a Python number where no gradient is needed."
        ) from error
    except Exception as error:
        if extra:
            error.add_note(
                f"{call} was given the extra arguments {', '.join(extra)}. A transformation that "
                "needs other ones (obj_fn, grad_fn), or refuses one of these, can be wrapped: "
                "optax.GradientTransformationExtraArgs(opt.init, lambda g, s, p, *, value_fn, "
                "**_: opt.update(g, s, p, obj_fn=value_fn))."
            )
        raise
