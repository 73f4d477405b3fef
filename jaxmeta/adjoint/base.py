"""What a way of differentiating the inner loop has to provide."""

import abc
from collections.abc import Callable
from typing import Any

import jax

from jaxmeta.errors import ArgumentTypeError
from jaxmeta.trees import PyTree, outline

LossAndAux = Callable[[PyTree], tuple[Any, Any]]
Step = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]
Policy = Callable[..., Any]


class Adjoint(abc.ABC):
    """A way of differentiating :func:`jaxmeta.meta_unroll`, passed as its ``adjoint``.

    Every adjoint runs the same inner loop; they differ in the memory and time that its
    derivatives take. A new one is a frozen dataclass (``meta_unroll`` compiles once for equal
    adjoints) with these two methods. Both are called while JAX traces, and what they return
    must be differentiable in everything that ``fn`` and ``step`` close over, too.
    """

    @abc.abstractmethod
    def value_and_grad(self, fn: LossAndAux) -> Callable[[PyTree], tuple[tuple[Any, Any], PyTree]]:
        """The inner gradient: ``params -> ((loss, aux), dloss/dparams)`` of ``fn``.

        Args:
            fn: ``params -> (loss, aux)``, the loss a float scalar.
        """

    @abc.abstractmethod
    def loop(self, step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        """Run ``length`` steps, as :func:`jax.lax.scan` does.

        Args:
            step: ``(carry, x) -> (carry, y)``.
            carry: what the first step is given.
            xs: a tree whose leaves have a leading axis of size ``length``.
            length: the number of steps, zero included.

        Returns:
            The last carry, and the ``y`` stacked along a leading axis.
        """

    def keeping(self, policy: Policy) -> "Adjoint":
        """Return an adjoint that also keeps what ``policy`` chooses of a step, where it can.

        Args:
            policy: one of ``jax.checkpoint_policies``, or the like.
        """
        return self


def either(first: Policy | None, second: Policy) -> Policy:
    """Return the policy that keeps what any of the two keeps."""
    if first is None:
        return second
    return jax.checkpoint_policies.save_from_both_policies(first, second)


def checked(adjoint: Any) -> Adjoint:
    """Return ``adjoint`` if it is a hashable instance of :class:`Adjoint`, else raise."""
    if isinstance(adjoint, Adjoint):
        try:
            hash(adjoint)
        except TypeError:
            raise ArgumentTypeError(
                f"adjoint is a {type(adjoint).__name__} that cannot be hashed, so meta_unroll "
                "cannot tell whether it is compiled for it: make it a frozen dataclass of "
                "hashable fields."
            ) from None
        return adjoint
    if isinstance(adjoint, type) and issubclass(adjoint, Adjoint):
        raise ArgumentTypeError(
            f"adjoint is the class {adjoint.__name__}; expected an instance: {adjoint.__name__}()."
        )
    raise ArgumentTypeError(
        f"adjoint is {outline(adjoint)}; expected 'auto' or an Adjoint, such as "
        "jaxmeta.ReverseMode()."
    )
