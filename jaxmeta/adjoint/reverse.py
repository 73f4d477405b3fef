"""Plain reverse mode."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxmeta.adjoint.base import Adjoint, LossAndAux, Step
from jaxmeta.trees import PyTree


@dataclass(frozen=True)
class ReverseMode(Adjoint):
    r"""Let JAX differentiate the loop as it stands.

    For inner steps :math:`s_{t+1} = \Phi(s_t, h)` and a meta-loss :math:`L(s_T)` the reverse
    pass is :math:`\bar s_t = \bar s_{t+1}\, \partial_s \Phi(s_t, h)` from
    :math:`\bar s_T = L'(s_T)`, and :math:`dL/dh = \sum_t \bar s_{t+1}\, \partial_h \Phi(s_t, h)`.

    Reverse mode keeps what each step computed, so memory is ``T`` times that of one step.
    Forward mode (``jax.jvp``, ``jax.jacfwd``) keeps nothing.

    Example:
        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> def meta_loss(lr):
        ...     loss = lambda w, batch: (w - batch) ** 2
        ...     out = jaxmeta.meta_unroll(
        ...         loss, optax.sgd, jnp.float32(0.0), jnp.ones(3), hyperparams=lr,
        ...         adjoint=jaxmeta.ReverseMode())
        ...     return (out.params - 2.0) ** 2
        >>> print(f"{jax.grad(meta_loss)(0.25):.4f}")
        -3.3750

    References:
        Maclaurin, Duvenaud and Adams, "Gradient-based hyperparameter optimization through
        reversible learning", ICML 2015, https://arxiv.org/abs/1502.03492.
    """

    def value_and_grad(self, fn: LossAndAux) -> Callable[[PyTree], tuple[tuple[Any, Any], PyTree]]:
        """See :meth:`Adjoint.value_and_grad`."""
        return jax.value_and_grad(fn, has_aux=True)

    def loop(self, step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        """See :meth:`Adjoint.loop`."""
        return jax.lax.scan(step, carry, xs, length=length)
