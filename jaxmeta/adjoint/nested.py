"""Checkpoints of checkpoints: few states kept, for a forward pass more at each level."""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxmeta.adjoint.base import Adjoint, LossAndAux, Policy, Step, either
from jaxmeta.errors import ArgumentTypeError, ArgumentValueError
from jaxmeta.trees import PyTree


@dataclass(frozen=True)
class NestedCheckpoint(Adjoint):
    r"""Reverse mode with checkpoints at several levels.

    T steps are split into :math:`n_1` blocks of :math:`n_2` blocks of ... steps. The forward
    pass keeps the parameters and the optimizer state at the start of each outermost block; the
    reverse pass runs a block again when it gets there, keeping those of the next level. So
    :math:`n_1 + n_2 + \dots` states are held, and each step is computed once for each level and
    once in reverse. The derivatives are those of :class:`ReverseMode`.

    Args:
        levels: how many levels, or the largest number of blocks at each, outermost first, as
            ``(8, 4, 4)``. By default two levels for up to 256 steps, three beyond, four beyond
            4,096: at most 16, then 48, then some 4 times the fourth root of T states.
        policy: which intermediate values of the innermost steps to keep, as in
            :class:`StepCheckpoint`.

    Raises:
        ArgumentValueError: there are more steps than the levels have places for.

    Example:
        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> def meta_loss(lr):
        ...     loss = lambda w, batch: (w - batch) ** 2
        ...     out = jaxmeta.meta_unroll(
        ...         loss, optax.sgd, jnp.float32(0.0), jnp.ones(3), hyperparams=lr,
        ...         adjoint=jaxmeta.NestedCheckpoint())
        ...     return (out.params - 2.0) ** 2
        >>> print(f"{jax.grad(meta_loss)(0.25):.4f}")
        -3.3750

    References:
        Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory cost", 2016,
        https://arxiv.org/abs/1604.06174, section 4.
    """

    levels: int | tuple[int, ...] | None = None
    policy: Policy | None = None

    def __post_init__(self) -> None:
        sizes = self.levels if isinstance(self.levels, tuple) else (self.levels or 1,)
        if not sizes or any(isinstance(n, bool) or not isinstance(n, int) for n in sizes):
            raise ArgumentTypeError(
                f"levels is {self.levels!r}; expected their number, or a tuple of block counts "
                "such as (8, 4, 4)."
            )
        if min(sizes) < 1 or self.levels == 0:
            raise ArgumentValueError(f"levels is {self.levels!r}; expected positive numbers.")

    def value_and_grad(self, fn: LossAndAux) -> Callable[[PyTree], tuple[tuple[Any, Any], PyTree]]:
        """See :meth:`Adjoint.value_and_grad`."""
        return jax.value_and_grad(fn, has_aux=True)

    def loop(self, step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        """See :meth:`Adjoint.loop`."""
        sizes = self.sizes(length)
        whole = math.prod(sizes)
        innermost = jax.checkpoint(step, policy=self.policy, prevent_cse=False)
        carry, ys = _nested(innermost, carry, _part(xs, 0, whole), sizes)
        if whole == length:
            return carry, ys
        rest = _part(xs, whole, length)
        carry, more = jax.lax.scan(innermost, carry, rest, length=length - whole)
        return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, more)

    def keeping(self, policy: Policy) -> Adjoint:
        """See :meth:`Adjoint.keeping`."""
        return replace(self, policy=either(self.policy, policy))

    def sizes(self, length: int) -> tuple[int, ...]:
        """Choose the number of blocks at each level; steps that are left over follow them.

        Args:
            length: the number of steps.
        """
        if isinstance(self.levels, tuple):
            places = math.prod(self.levels)
            if places < length:
                raise ArgumentValueError(
                    f"NestedCheckpoint has levels {self.levels}, places for {places} steps, and "
                    f"the loop has {length}: give more or larger levels, or their number alone."
                )
            return _split(length, self.levels)
        levels = self.levels or (2 if length <= 256 else 3 if length <= 4096 else 4)
        side = math.ceil(max(length, 1) ** (1 / levels) - 1e-9)
        return _split(length, (2 * side,) * levels)


@functools.cache
def _split(length: int, largest: tuple[int, ...]) -> tuple[int, ...]:
    """Return the sizes, at most the given ones, for which fewest states are held in all.

    That is their sum and the steps left over. The program has the step twice where some are.
    """
    if length == 0:
        return (0,)
    best, fewest = (length,), float("inf")
    # The outermost size follows from the others.
    for inner in itertools.product(*map(_candidates, largest[1:])):
        block = math.prod(inner)
        outer = min(length // block, largest[0])
        rest = length - outer * block
        held = outer + sum(inner) + rest + (2 if rest else 0)
        if outer and held < fewest:
            best, fewest = (outer, *inner), held
    return tuple(n for n in best if n > 1) or (1,)


def _candidates(largest: int) -> list[int]:
    return [n for n in range(1, largest + 1) if n == 1 or n <= 16 or 2 * n >= largest]


def _nested(step: Step, carry: PyTree, xs: PyTree, sizes: tuple[int, ...]) -> tuple[PyTree, PyTree]:
    if len(sizes) == 1:
        return jax.lax.scan(step, carry, xs, length=sizes[0])
    outer, inner = sizes[0], sizes[1:]

    def block(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        return _nested(step, carry, xs, inner)

    blocks = jax.tree.map(lambda x: x.reshape(outer, -1, *x.shape[1:]), xs)
    rematerialised = jax.checkpoint(block, prevent_cse=False)
    carry, ys = jax.lax.scan(rematerialised, carry, blocks, length=outer)
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


def _part(xs: PyTree, start: int, stop: int) -> PyTree:
    return jax.tree.map(lambda x: x[start:stop], xs)
