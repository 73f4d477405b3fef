"""Inner gradients as constants."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from jaxmeta.adjoint.base import Adjoint, LossAndAux, Step
from jaxmeta.adjoint.notes import note
from jaxmeta.trees import PyTree


@dataclass(frozen=True)
class FirstOrder(Adjoint):
    r"""Take each inner gradient as a constant: first-order MAML. An approximation.

    A step is :math:`w_{t+1} = w_t + u(g_t, s_t, w_t, h)` with the inner gradient
    :math:`g_t = \nabla_w \ell(w_t, b_t, h)`. Its derivatives are taken with

    .. math:: \frac{\partial g_t}{\partial (w_t, b_t, h)} := 0,

    so that there are no second derivatives of the inner loss. For gradient descent this leaves
    :math:`dw_T / dw_0 = 1`: the meta-gradient in the initial parameters is the gradient of the
    meta-loss at the adapted ones.

    All else is differentiated as it stands: the update, so that a learning rate, momentum or
    weight decay of the optimizer has a derivative; losses, aux and model state, which depend on
    the parameters of their step. What acts through the inner gradient alone, such as the
    hyperparameters and data of the inner loss, has no influence on the parameters then: use
    another adjoint for those, such as :class:`TruncatedReverse`.

    Of each step the reverse pass keeps what the update needs, such as the gradient for the
    derivative in a learning rate. What the loss computed it keeps only where losses, aux or
    model state are differentiated.

    Example:
        The same derivative in the initial parameter for any number of steps and any rate:

        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> from jaxmeta.adjoint.first_order import FirstOrder
        >>> def adapted(w):
        ...     loss = lambda w, batch: (w - batch) ** 2
        ...     return jaxmeta.meta_unroll(
        ...         loss, optax.sgd(0.25), w, jnp.ones(3), adjoint=FirstOrder()).params
        >>> print(f"{jax.grad(adapted)(0.0):.4f}")
        1.0000

    References:
        Finn, Abbeel and Levine, "Model-agnostic meta-learning for fast adaptation of deep
        networks", ICML 2017, https://arxiv.org/abs/1703.03400, section 5.2. Nichol, Achiam and
        Schulman, "On first-order meta-learning algorithms", 2018,
        https://arxiv.org/abs/1803.02999.
    """

    def value_and_grad(self, fn: LossAndAux) -> Callable[[PyTree], tuple[tuple[Any, Any], PyTree]]:
        """See :meth:`Adjoint.value_and_grad`."""

        def evaluate(params: PyTree) -> tuple[tuple[Any, Any], PyTree]:
            loss_and_aux, gradient = jax.value_and_grad(fn, has_aux=True)(params)
            return loss_and_aux, jax.lax.stop_gradient(gradient)

        return evaluate

    def loop(self, step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        """See :meth:`Adjoint.loop`."""
        note("inner gradients are taken as constants, an approximation")
        return jax.lax.scan(step, carry, xs, length=length)
