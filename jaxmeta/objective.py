"""The inner loss as a function of the parameters alone, checked while it is traced."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmeta.errors import ArgumentKeyError, ArgumentTypeError, ArgumentValueError
from jaxmeta.manual_axes import varying
from jaxmeta.signature import Passing
from jaxmeta.trees import (
    PyTree,
    describe,
    first_misfit,
    is_array,
    is_float,
    outline,
    restore_dtypes,
)


@dataclass(frozen=True)
class Objective:
    """``params -> (loss, (new_state, aux))`` at one step; what is not used is None."""

    loss_fn: Callable[..., Any]
    passing: Passing
    has_aux: bool
    batch: PyTree
    hyperparams: PyTree
    state: PyTree
    key: jax.Array | None

    def __call__(self, params: PyTree) -> tuple[jax.Array, tuple[PyTree, PyTree]]:
        """Evaluate the loss at ``params``."""
        loss, new_state, aux = self._split(self._evaluate(params))
        _require_float_scalar(loss)
        _require_axes(loss, params)
        _require_arrays(aux)
        if self.state is not None:
            new_state = restore_dtypes(new_state, self.state, "state", "the new state of loss_fn")
        return jnp.asarray(loss), (new_state, aux)

    def value(self, params: PyTree) -> jax.Array:
        """Evaluate the loss at ``params`` and nothing else."""
        return self(params)[0]

    def _evaluate(self, params: PyTree) -> Any:
        third = (self.hyperparams,) if self.passing == "third" else ()
        named = {"hyperparams": self.hyperparams} if self.passing == "named" else {}
        optional = {"state": self.state, "key": self.key}
        named |= {name: value for name, value in optional.items() if value is not None}
        try:
            return self.loss_fn(params, self.batch, *third, **named)
        except ArgumentKeyError:  # of a meta_unroll inside the loss, which has said it all
            raise
        except KeyError as error:
            given = {"params": params, "batch": self.batch, "hyperparams": self.hyperparams}
            given["state"] = self.state
            known = [
                f"{name} is {outline(tree)}" for name, tree in given.items() if tree is not None
            ]
            raise ArgumentKeyError(
                f"loss_fn asked for the key {error}, which is not there: {'; '.join(known)}."
            ) from error

    def _split(self, result: Any) -> tuple[Any, PyTree, PyTree]:
        """Take what loss_fn returned apart: ``(loss, new_state, aux)``."""
        if self.state is not None and self.has_aux:
            expected = "(loss, (new_state, aux)), as state= is given and has_aux=True"
            loss, rest = _pair(result, "", expected)
            return loss, *_pair(rest, " as its second output", expected)
        if self.state is not None:
            return *_pair(result, "", "(loss, new_state), as state= is given"), None
        if self.has_aux:
            loss, aux = _pair(result, "", "(loss, aux), as has_aux=True")
            return loss, None, aux
        return result, None, None


def _pair(value: Any, where: str, expected: str) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    raise ArgumentValueError(f"loss_fn returned {_found(value)}{where}; expected {expected}.")


def _found(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of length {len(value)}"
    return outline(value)


def _require_float_scalar(loss: Any) -> None:
    if not is_array(loss):
        raise ArgumentTypeError(
            f"loss_fn returned {_found(loss)} where a scalar loss is expected. For (loss, aux) "
            "pass has_aux=True, for (loss, new_state) pass state=."
        )
    if np.shape(loss) != ():
        raise ArgumentValueError(
            f"loss_fn returned {describe(loss)} as its loss; expected a scalar, shape (): take the "
            "mean or the sum."
        )
    if not is_float(loss):
        raise ArgumentTypeError(
            f"loss_fn returned {describe(loss)} as its loss; expected a real floating-point "
            "number, which can have a gradient."
        )


def _require_axes(loss: Any, params: PyTree) -> None:
    more = tuple(sorted(varying(loss) - varying(params)))
    if more and jax.tree.leaves(params):
        raise ArgumentValueError(
            f"loss_fn returned a loss that differs between the devices of the mesh axes {more}, "
            "and params are the same on all of them, so that JAX would sum the gradients of all. "
            f"For a loop on each device pass jax.lax.pcast(params, {more}, to='varying'); for one "
            f"loop on all of them return jax.lax.pmean(loss, {more})."
        )


def _require_arrays(aux: PyTree) -> None:
    found = first_misfit("aux", aux, is_array)
    if found is not None:
        name, leaf = found
        raise ArgumentTypeError(
            f"{name}, which loss_fn returned, is {describe(leaf)}; expected arrays or numbers, "
            "which can be stacked over the steps."
        )
