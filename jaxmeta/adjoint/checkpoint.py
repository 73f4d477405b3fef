"""Reverse mode that computes each step again instead of keeping what it computed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from jaxmeta.adjoint.base import Adjoint, LossAndAux, Policy, Step, either
from jaxmeta.trees import PyTree


@dataclass(frozen=True)
class StepCheckpoint(Adjoint):
    """Reverse mode with :func:`jax.checkpoint` on every inner step.

    The derivatives are those of :class:`ReverseMode`. The forward pass keeps only the
    parameters and the optimizer state between steps, and the reverse pass computes a step
    again when it gets there: memory is one step and ``T`` times parameters and state, for one
    more forward pass of each step.

    Args:
        policy: which intermediate values to keep after all, one of
            ``jax.checkpoint_policies``; by default none. Make it once: a policy that is made
            anew for each call makes ``meta_unroll`` compile anew.

    Example:
        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> def meta_loss(lr):
        ...     loss = lambda w, batch: (w - batch) ** 2
        ...     out = jaxmeta.meta_unroll(
        ...         loss, optax.sgd, jnp.float32(0.0), jnp.ones(3), hyperparams=lr,
        ...         adjoint=jaxmeta.StepCheckpoint())
        ...     return (out.params - 2.0) ** 2
        >>> print(f"{jax.grad(meta_loss)(0.25):.4f}")
        -3.3750

    References:
        Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory cost", 2016,
        https://arxiv.org/abs/1604.06174.
    """

    policy: Policy | None = None

    def value_and_grad(self, fn: LossAndAux) -> Callable[[PyTree], tuple[tuple[Any, Any], PyTree]]:
        """See :meth:`Adjoint.value_and_grad`."""
        return jax.value_and_grad(fn, has_aux=True)

    def loop(self, step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        """See :meth:`Adjoint.loop`."""
        # prevent_cse guards against XLA merging the two forward passes; inside a scan it cannot.
        rematerialised = jax.checkpoint(step, policy=self.policy, prevent_cse=False)
        return jax.lax.scan(rematerialised, carry, xs, length=length)

    def keeping(self, policy: Policy) -> Adjoint:
        """See :meth:`Adjoint.keeping`."""
        return replace(self, policy=either(self.policy, policy))
