"""Functions that are differentiated in reverse by a rule of one's own, and forward by JAX."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from jaxmeta.adjoint.linear import Arrays, linear_call
from jaxmeta.manual_axes import vary, varying
from jaxmeta.trees import PyTree

Flat = Callable[[Arrays], Arrays]
Remember = Callable[[Arrays], tuple[Arrays, Arrays]]
Reverse = Callable[[Arrays, tuple[int, ...], list[jax.Array | None]], Arrays]


class Closed(NamedTuple):
    """A function of flat arrays that closes over no traced value.

    Attributes:
        function: ``[*constants, *arguments] -> results``.
        constants: the arrays that it closed over.
        jaxpr: what it computes.
        structure: the tree of its results.
    """

    function: Flat
    constants: Arrays
    jaxpr: Jaxpr
    structure: Any


def close(function: Callable[..., PyTree], *args: PyTree) -> Closed:
    """Turn what ``function`` closes over into inputs, so that none loses its derivative.

    Args:
        function: any function of trees of arrays, returning one.
        *args: what it will be called with, or the like of it.
    """
    traced, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    jaxpr, count = traced.jaxpr, len(traced.consts)

    def closed(arrays: Arrays) -> Arrays:
        return jaxpr_as_fun(ClosedJaxpr(jaxpr, arrays[:count]))(*arrays[count:])

    return Closed(closed, list(traced.consts), jaxpr, jax.tree.structure(shapes))


def with_reverse(function: Flat, reverse: Reverse, remember: Remember | None = None) -> Flat:
    """Give ``function`` a reverse-mode rule.

    Its values, its forward-mode derivatives and its derivatives of higher order are those that
    JAX derives from ``function`` and ``reverse``; the rule keeps nothing but the inputs
    and what ``remember`` adds to them.

    Args:
        function: ``arrays -> results``; closes over no traced value.
        reverse: ``(arrays, wanted, cotangents) -> cotangents of the wanted arrays``, which are
            the float ones that ``wanted`` numbers. A cotangent of a result that is known to be
            zero, or that is no float, is None.
        remember: ``arrays -> (results, kept)``, the same results and what the forward pass is to
            hand to ``reverse``, which is then given ``[*arrays, *kept]``.
    """

    @jax.custom_jvp
    def ruled(arrays: Arrays) -> Arrays:
        return function(arrays)

    def forget(arrays: Arrays) -> tuple[Arrays, Arrays]:
        return ruled(arrays), []

    run = forget if remember is None else _constant_memory(ruled, remember)

    def rule(primals: tuple[Arrays], tangents: tuple[Any]) -> tuple[Arrays, list[Any]]:
        (arrays,), (slopes,) = primals, tangents
        # Calling itself keeps the rule where the loop is differentiated more than once.
        results, kept = run(arrays)
        count = len(arrays)
        wanted = tuple(i for i, slope in enumerate(slopes) if moves(slope))
        number = len(results)  # what stays in the program must not hold on to results
        real = [i for i, result in enumerate(results) if _differentiable(result)]

        def push(arrays: Arrays, moved: Arrays) -> Arrays:
            def of_wanted(*values: jax.Array) -> Arrays:
                return take(function(replace(arrays[:count], wanted, values)), real)

            return jax.jvp(of_wanted, take(arrays, wanted), moved)[1]

        def pull(arrays: Arrays, cotangents: list[jax.Array | None]) -> Arrays:
            return reverse(arrays, wanted, replace([None] * number, real, cotangents))

        moved = linear_call(
            push, pull, [*arrays, *kept], take(slopes, wanted), like=take(results, real)
        )
        return results, replace(list(map(zero_slope, results)), real, moved)

    ruled.defjvp(rule, symbolic_zeros=True)
    return ruled


def _constant_memory(function: Flat, remember: Remember) -> Remember:
    """Return ``remember``, differentiated as if what is kept were constant: it only saves work."""
    remembered = jax.custom_jvp(remember)

    def rule(primals: tuple[Arrays], tangents: tuple[Any]) -> Any:
        results, kept = remembered(*primals)
        _, moved = jax.jvp(function, primals, tangents)
        return (results, kept), (moved, list(map(zero_slope, kept)))

    remembered.defjvp(rule)
    return remembered


def zero_slope(array: jax.Array) -> Any:
    """Return the tangent of what does not move, as a rule may return it.

    Zeros, not a SymbolicZero: JAX leaves those out of the rule's program, and then fails when it
    removes dead code from it.
    """
    if not _differentiable(array):
        return np.zeros(array.shape, jax.dtypes.float0)
    return vary(jnp.zeros_like(array), varying(array))


def with_choice(function: Flat, choose: Callable[[Arrays, tuple[int, ...]], Flat]) -> Flat:
    """Choose how a function is differentiated when it is known by which arrays.

    Args:
        function: ``arrays -> results``; closes over no traced value.
        choose: ``(arrays, wanted) -> the same function``, differentiated as it should be where
            the arrays that ``wanted`` numbers have derivatives.
    """

    @jax.custom_jvp
    def chosen(arrays: Arrays) -> Arrays:
        return function(arrays)

    def rule(primals: tuple[Arrays], tangents: tuple[Any]) -> tuple[Arrays, list[Any]]:
        (arrays,), (slopes,) = primals, tangents
        wanted = tuple(i for i, slope in enumerate(slopes) if moves(slope))
        best = choose(arrays, wanted)
        results, moved = jax.jvp(
            lambda *values: best(replace(arrays, wanted, values)),
            take(arrays, wanted),
            take(slopes, wanted),
        )
        return results, moved

    chosen.defjvp(rule, symbolic_zeros=True)
    return chosen


def moves(slope: Any) -> bool:
    """Whether a tangent, as it is given to a rule with symbolic zeros, is more than zero."""
    return not isinstance(slope, SymbolicZero) and slope.dtype != jax.dtypes.float0


def _differentiable(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.inexact)


def take(items: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """Return the items in these places."""
    return [items[i] for i in places]


def replace(items: Sequence[Any], places: Sequence[int], new: Sequence[Any]) -> list[Any]:
    """Return the items with new ones in these places."""
    replaced = list(items)
    for i, item in zip(places, new, strict=True):
        replaced[i] = item
    return replaced
