"""The default: an exact adjoint, chosen from what is known while the loop is traced."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmeta.adjoint.base import Adjoint, LossAndAux, Step, checked
from jaxmeta.adjoint.custom import Flat, close, take, with_choice
from jaxmeta.adjoint.flat import flatten_loop
from jaxmeta.adjoint.forward import ForwardMode
from jaxmeta.adjoint.linear import Arrays
from jaxmeta.adjoint.mixed import MixedMode
from jaxmeta.adjoint.nested import NestedCheckpoint
from jaxmeta.adjoint.notes import note
from jaxmeta.adjoint.symmetry import untrue_rule
from jaxmeta.trees import PyTree

# Of a device's memory, what may be kept between steps: the rest is for the step itself, for
# what surrounds the loop, and for vmap, whose size the loop does not know.
_SHARE = 8
_WHERE_UNKNOWN = 8 * 2**30
# Forward mode costs one more pass for each number that the loop is differentiated in.
_FEW = 4


@dataclass(frozen=True)
class Auto(Adjoint):
    """Choose among the exact adjoints; ``adjoint="auto"``, the default, is ``Auto()``.

    Inner gradients are differentiated by :class:`MixedMode`, or by plain reverse mode where the
    loss has a derivative rule that mixed mode cannot rely on. Between steps it keeps what fits
    into the memory: parameters, optimizer state and inner gradient of each step; all of that
    but the gradients; or those of some steps, by :class:`NestedCheckpoint`, and then, where the
    loop is differentiated in no more than 4 numbers, nothing, by :class:`ForwardMode`. It
    never approximates. ``meta_unroll(...).adjoint`` says what was chosen and why.

    Args:
        memory: bytes that may be kept between steps; by default an eighth of the device's
            memory. ``jax.vmap`` multiplies what is kept, and the loop does not know its size.

    Example:
        >>> import jax.numpy as jnp, jaxmeta, optax
        >>> out = jaxmeta.meta_unroll(
        ...     lambda w, batch: (w - batch) ** 2, optax.sgd(0.1), jnp.float32(0.0), jnp.ones(3),
        ...     adjoint=jaxmeta.Auto(memory=10**6))
        >>> print(out.adjoint)
        everything between 3 steps is kept, 24 B of at most 1 MB
    """

    memory: int | None = None

    def value_and_grad(self, fn: LossAndAux) -> Callable[[PyTree], tuple[tuple[Any, Any], PyTree]]:
        """See :meth:`Adjoint.value_and_grad`."""

        def evaluate(params: PyTree) -> tuple[tuple[Any, Any], PyTree]:
            leaves, structure = jax.tree.flatten(params)
            closed = close(lambda leaves: fn(jax.tree.unflatten(structure, leaves)), leaves)
            fault = untrue_rule(closed.jaxpr)
            if fault is None:
                return MixedMode().of_closed(closed, leaves, structure)
            note(f"inner gradients by plain reverse mode, as {fault}")
            return jax.value_and_grad(fn, has_aux=True)(params)

        return evaluate

    def loop(self, step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        """See :meth:`Adjoint.loop`."""
        memory = self.memory or _device_memory() // _SHARE
        each = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry))
        limit = f"of at most {_in_words(memory)}"
        if 2 * length * each <= memory:
            kept = _in_words(2 * length * each)
            note(f"everything between {length} steps is kept, {kept} {limit}")
            return MixedMode().loop(step, carry, xs, length)
        kept = _in_words(length * each)
        if length * each <= memory:
            note(f"all but gradients between {length} steps is kept, {kept} {limit}")
            return MixedMode(save_gradients=False).loop(step, carry, xs, length)
        note(
            f"nested checkpoints, or forward mode for at most {_FEW} numbers, as {length} steps "
            f"would keep {kept} {limit}"
        )
        return _nested_or_forward(step, carry, xs, length)


def resolve_adjoint(adjoint: Any) -> Adjoint:
    """Return the adjoint that is meant: an instance of :class:`Adjoint`, or ``"auto"``."""
    return Auto() if isinstance(adjoint, str) and adjoint == "auto" else checked(adjoint)


def _nested_or_forward(step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
    """Choose when the loop is differentiated: only then it is known in how many numbers."""
    loop, arrays = flatten_loop(step, carry, xs, length)
    nested = MixedMode(NestedCheckpoint(), save_gradients=False)

    def choose(arrays: Arrays, wanted: Sequence[int]) -> Flat:
        few = sum(array.size for array in take(arrays, wanted)) <= _FEW
        real = all(jnp.issubdtype(array.dtype, jnp.floating) for array in take(arrays, wanted))
        return functools.partial(loop.run, ForwardMode() if few and real else nested)

    results = with_choice(functools.partial(loop.run, nested), choose)(arrays)
    return jax.tree.unflatten(loop.results, results)


@functools.cache
def _device_memory() -> int:
    """Bytes of the default device, or of the machine."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not a Unix
        return _WHERE_UNKNOWN


def _in_words(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
