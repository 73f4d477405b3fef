"""Reverse mode through the last steps only."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxmeta.adjoint.auto import Auto
from jaxmeta.adjoint.base import Adjoint, LossAndAux, Policy, Step, checked
from jaxmeta.adjoint.flat import flatten_loop
from jaxmeta.adjoint.notes import note
from jaxmeta.errors import ArgumentTypeError, ArgumentValueError
from jaxmeta.trees import PyTree


@dataclass(frozen=True)
class TruncatedReverse(Adjoint):
    r"""Differentiate the last ``steps`` steps; what comes before them is given. An approximation.

    For steps :math:`s_{t+1} = \Phi_t(s_t, h)` and a meta-loss :math:`L(s_T)`,

    .. math:: \frac{dL}{dh} \approx \sum_{t=T-k}^{T-1} \bar s_{t+1}\, \partial_h \Phi_t(s_t, h),
        \quad \bar s_T = L'(s_T), \quad \bar s_t = \bar s_{t+1}\, \partial_s \Phi_t(s_t, h).

    With k steps or fewer in the loop this is exact. Otherwise the steps before the last k count
    as constants: the state that they lead to, and with it the initial parameters and optimizer
    state, whose derivative is zero; their batches; and what they return, so that only the last k
    entries of the losses, aux and trajectory have derivatives. Where a step contracts distances
    by a factor :math:`\rho < 1`, as gradient descent near a minimum does, the error falls like
    :math:`\rho^k`; what hyperparameters do early on is not seen.

    ``TruncatedReverse(1)`` is the one-step lookahead: for gradient descent with rate
    :math:`\eta` and hyperparameters of the inner loss :math:`\ell`,

    .. math:: \frac{dL}{dh} \approx -\eta\, L'(w_T)\, \partial_h \nabla_w \ell(w_{T-1}, h),

    with the second derivative as it is, not approximated by finite differences.

    Memory is that of a loop of k steps, and time that of T forward passes and k reverse ones. All
    orders of derivatives, forward mode, too, are those of the loop with its first part constant.

    Args:
        steps: k, at least 1.
        adjoint: how the last k steps are differentiated; :class:`Auto`, the default, chooses
            among the exact ways.

    Example:
        Of three steps :math:`w \mapsto w - \eta \cdot 2 (w - 1)`, the last alone:

        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> from jaxmeta.adjoint.truncated import TruncatedReverse
        >>> def meta_loss(lr):
        ...     loss = lambda w, batch: (w - batch) ** 2
        ...     out = jaxmeta.meta_unroll(
        ...         loss, optax.sgd, jnp.float32(0.0), jnp.ones(3), hyperparams=lr,
        ...         adjoint=TruncatedReverse(1))
        ...     return (out.params - 2.0) ** 2
        >>> print(f"{jax.grad(meta_loss)(0.25):.4f}")
        -1.1250

    References:
        Shaban, Cheng, Hatch and Boots, "Truncated back-propagation for bilevel optimization",
        AISTATS 2019, https://arxiv.org/abs/1810.10667. With one step: Luketina, Berglund, Greff
        and Raiko, "Scalable gradient-based tuning of continuous regularization hyperparameters",
        ICML 2016, https://arxiv.org/abs/1511.06727; Liu, Simonyan and Yang, "DARTS:
        Differentiable architecture search", ICLR 2019, https://arxiv.org/abs/1806.09055.
    """

    steps: int
    adjoint: Adjoint = Auto()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise ArgumentTypeError(
                f"steps is {self.steps!r}; expected how many of the last steps to differentiate."
            )
        if self.steps < 1:
            raise ArgumentValueError(
                f"steps is {self.steps}; expected at least 1, as no step has no derivative."
            )
        checked(self.adjoint)

    def value_and_grad(self, fn: LossAndAux) -> Callable[[PyTree], tuple[tuple[Any, Any], PyTree]]:
        """See :meth:`Adjoint.value_and_grad`."""
        return self.adjoint.value_and_grad(fn)

    def loop(self, step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        """See :meth:`Adjoint.loop`."""
        if self.steps >= length:
            return self.adjoint.loop(step, carry, xs, length)
        note(f"only the last {self.steps} of {length} steps are differentiated, an approximation")
        loop, arrays = flatten_loop(step, carry, xs, length)
        constants, leaves, batches = loop.split(arrays)
        first = replace(loop, length=length - self.steps)
        last = replace(loop, length=self.steps)
        given = [*constants, *leaves, *(x[: first.length] for x in batches)]
        results = jax.lax.stop_gradient(first.scan(jax.lax.stop_gradient(given)))
        leaves, before = results[: loop.carry], results[loop.carry :]
        given = [*constants, *leaves, *(x[first.length :] for x in batches)]
        results = last.run(self.adjoint, given)
        leaves, after = results[: loop.carry], results[loop.carry :]
        ys = [jnp.concatenate(pair) for pair in zip(before, after, strict=True)]
        return jax.tree.unflatten(loop.results, [*leaves, *ys])

    def keeping(self, policy: Policy) -> Adjoint:
        """See :meth:`Adjoint.keeping`."""
        return replace(self, adjoint=self.adjoint.keeping(policy))
