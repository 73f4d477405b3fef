"""Forward mode: tangents carried beside the states, nothing kept."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmeta.adjoint.base import Adjoint, LossAndAux, Step
from jaxmeta.adjoint.custom import replace, take, with_reverse
from jaxmeta.adjoint.flat import FlatLoop, flatten_loop
from jaxmeta.adjoint.linear import Arrays
from jaxmeta.errors import ArgumentTypeError, ArgumentValueError
from jaxmeta.manual_axes import vary, varying
from jaxmeta.trees import PyTree, describe


@dataclass(frozen=True)
class ForwardMode(Adjoint):
    r"""Carry the derivatives of the state by each hyperparameter through the loop.

    For steps :math:`s_{t+1} = \Phi(s_t, h)`, and for each number in :math:`h`,

    .. math:: \dot s_{t+1} = \partial_s \Phi(s_t, h)\, \dot s_t + \partial_h \Phi(s_t, h)\, \dot h,

    and the meta-gradient is :math:`L'(s_T)\, \dot s_T`. Memory does not grow with T; time and
    memory grow with how many numbers the loop is differentiated in, so this is for few of them:
    learning rate, momentum, weight decay. ``jax.grad`` of the whole is used as ever. The
    derivatives are those of :class:`ReverseMode`.

    Args:
        max_inputs: refuse to differentiate in more numbers than this. All count that the loop
            takes and that have a derivative: initial parameters and batches, too.
        chunk_size: carry the tangents of so many numbers at a time; by default of all.

    Raises:
        ArgumentValueError: the loop is differentiated in more than ``max_inputs`` numbers.
        ArgumentTypeError: it is differentiated in complex numbers.

    Example:
        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> def meta_loss(lr):
        ...     loss = lambda w, batch: (w - batch) ** 2
        ...     out = jaxmeta.meta_unroll(
        ...         loss, optax.sgd, jnp.float32(0.0), jnp.ones(3), hyperparams=lr,
        ...         adjoint=jaxmeta.ForwardMode())
        ...     return (out.params - 2.0) ** 2
        >>> print(f"{jax.grad(meta_loss)(0.25):.4f}")
        -3.3750

    References:
        Franceschi, Donini, Frasconi and Pontil, "Forward and reverse gradient-based
        hyperparameter optimization", ICML 2017, https://arxiv.org/abs/1703.01785.
    """

    max_inputs: int = 1024
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_inputs", 0), ("chunk_size", 1)):
            number = getattr(self, name)
            if number is None and name == "chunk_size":
                continue
            if isinstance(number, bool) or not isinstance(number, int):
                raise ArgumentTypeError(f"{name} is {number!r}; expected an int.")
            if number < least:
                raise ArgumentValueError(f"{name} is {number}; expected at least {least}.")

    def value_and_grad(self, fn: LossAndAux) -> Callable[[PyTree], tuple[tuple[Any, Any], PyTree]]:
        """See :meth:`Adjoint.value_and_grad`."""
        return jax.value_and_grad(fn, has_aux=True)

    def loop(self, step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        """See :meth:`Adjoint.loop`."""
        if length == 0:  # there is no step to look at
            return jax.lax.scan(step, carry, xs, length=0)
        loop, arrays = flatten_loop(step, carry, xs, length)

        def reverse(
            arrays: Arrays, wanted: tuple[int, ...], cotangents: list[jax.Array | None]
        ) -> Arrays:
            self._check(take(arrays, wanted))
            return _pull(loop, arrays, wanted, cotangents, self.chunk_size)

        return jax.tree.unflatten(loop.results, with_reverse(loop.scan, reverse)(arrays))

    def _check(self, wanted: Arrays) -> None:
        size = sum(array.size for array in wanted)
        if size > self.max_inputs:
            listed = ", ".join(map(describe, wanted[:8])) + (", ..." if len(wanted) > 8 else "")
            raise ArgumentValueError(
                f"adjoint is ForwardMode, and the loop is differentiated in {size} numbers "
                f"({listed}), more than max_inputs={self.max_inputs}; each costs a pass. Use a "
                "reverse mode such as MixedMode(); or stop_gradient what needs no gradient."
            )
        for array in wanted:
            if jnp.issubdtype(array.dtype, jnp.complexfloating):
                raise ArgumentTypeError(
                    f"adjoint is ForwardMode, and the loop is differentiated in {describe(array)}; "
                    "expected real numbers. Use a reverse mode such as MixedMode()."
                )


def _pull(
    loop: FlatLoop,
    arrays: Arrays,
    wanted: tuple[int, ...],
    cotangents: list[jax.Array | None],
    chunk_size: int | None,
) -> Arrays:
    """Push each basis vector of the wanted arrays forward, and multiply with the cotangents."""
    pulled: dict[int, jax.Array] = {}
    by_axes: dict[frozenset[str], list[int]] = {}
    for i in wanted:
        by_axes.setdefault(varying(arrays[i]), []).append(i)
    for axes, places in by_axes.items():
        push = functools.partial(_push, loop, arrays, places, cotangents, axes)
        basis = _basis(take(arrays, places))
        if chunk_size is None:
            slopes = jax.vmap(push)(basis)
        else:
            slopes = jax.lax.map(push, basis, batch_size=chunk_size)
        ends = np.cumsum([arrays[i].size for i in places])[:-1]
        for i, part in zip(places, jnp.split(slopes, ends), strict=True):
            pulled[i] = part.reshape(arrays[i].shape).astype(arrays[i].dtype)
    return [pulled[i] for i in wanted]


def _push(
    loop: FlatLoop,
    arrays: Arrays,
    places: list[int],
    cotangents: list[jax.Array | None],
    axes: frozenset[str],
    direction: Arrays,
) -> jax.Array:
    """Return the derivative of ``<cotangents, results>`` along one direction.

    Args:
        loop: the loop.
        arrays: its inputs.
        places: of the inputs that move.
        cotangents: of its results.
        axes: mesh axes over which the inputs that move vary: over others, devices add up.
        direction: how they move.
    """
    of_carry, of_ys = cotangents[: loop.carry], cotangents[loop.carry :]
    constants, carry, xs = loop.split(arrays)
    given = dict(zip(places, direction, strict=True))
    moves_constants, moves_carry, moves_xs = loop.split([given.get(i) for i in range(len(arrays))])
    floats = [i for i, leaf in enumerate(carry) if _is_float(leaf)]

    def dot(cotangents: list[jax.Array | None], slopes: Arrays) -> jax.Array:
        pairs = zip(cotangents, slopes, strict=True)
        total = jnp.zeros((), kind)
        for term in [jnp.sum(c * s).real for c, s in pairs if c is not None]:
            shared = tuple(sorted(varying(term) - axes))
            total += (jax.lax.psum(term, shared) if shared else term).astype(kind)
        return total

    def step(state: Any, own: Any) -> tuple[Any, None]:
        carry, moved, total = state
        x, x_moves, of_y = own
        moves = replace([None] * len(carry), floats, moved)
        slopes = [
            list(map(_slope, *pair))
            for pair in ((moves_constants, constants), (moves, carry), (x_moves, x))
        ]
        (carry, _), (moved, y_moved) = jax.jvp(loop.step, (constants, carry, x), tuple(slopes))
        return (carry, take(moved, floats), total + dot(of_y, y_moved)), None

    kind = jnp.result_type(jnp.float32, *(arrays[i].dtype for i in places))
    start = [_slope(moves_carry[i], carry[i]) for i in floats]
    total = vary(jnp.zeros((), kind), axes)
    (_, moved, total), _ = jax.lax.scan(
        step, (carry, start, total), (xs, moves_xs, of_ys), length=loop.length
    )
    return total + dot(take(of_carry, floats), moved)


def _slope(move: Any, array: Any) -> Any:
    """Return the tangent of an array: as given, or zero."""
    if not _is_float(array):
        return np.zeros(array.shape, jax.dtypes.float0)
    return vary(jnp.zeros_like(array) if move is None else move, varying(array))


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def _basis(arrays: Arrays) -> Arrays:
    """Return, for each array, its part of the unit vectors of all of them, along a new axis."""
    sizes = [array.size for array in arrays]
    ends = np.cumsum(sizes)
    unit = np.eye(ends[-1], dtype=bool)
    return [
        jnp.asarray(unit[:, end - size : end], array.dtype).reshape(-1, *array.shape)
        for array, size, end in zip(arrays, sizes, ends, strict=True)
    ]
