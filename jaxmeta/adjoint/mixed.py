"""Mixed mode: products with second derivatives of the inner loss by forward over reverse."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmeta.adjoint.base import Adjoint, LossAndAux, Step
from jaxmeta.adjoint.checkpoint import StepCheckpoint
from jaxmeta.adjoint.custom import Closed, Flat, close, replace, take, with_reverse
from jaxmeta.adjoint.linear import Arrays
from jaxmeta.adjoint.symmetry import untrue_rule
from jaxmeta.errors import ArgumentValueError
from jaxmeta.trees import PyTree

_SAVED = "jaxmeta: inner gradient"
_IS_GRADIENT = jax.checkpoint_policies.save_only_these_names(_SAVED)


@dataclass(frozen=True)
class MixedMode(Adjoint):
    r"""Reverse mode through the loop, forward over reverse through each inner gradient.

    The reverse pass needs, for the cotangent :math:`v` of an inner gradient
    :math:`\partial_w \ell(w, h)`, the products :math:`v^\top \partial_w \partial_w \ell` and
    :math:`v^\top \partial_h \partial_w \ell`. Second derivatives are symmetric, so both are one
    directional derivative of the whole gradient,

    .. math:: \frac{d}{d\varepsilon} \nabla_{w, h}\, \ell(w + \varepsilon v, h)
        \Big|_{\varepsilon = 0},

    which keeps nothing of a second reverse pass. Each step is computed again when the reverse
    pass gets there, all but its gradient. The derivatives are those of :class:`ReverseMode`, in
    less memory and, where the loss is most of the work, in about half the time.

    Args:
        checkpoint: what is kept between steps. :class:`StepCheckpoint`, the default, keeps
            parameters and optimizer state of each; :class:`NestedCheckpoint` and
            :class:`BinomialCheckpoint` those of a few; :class:`ReverseMode` all that a step
            computes outside of its gradient, too.
        save_gradients: whether to keep the inner gradient of each step, as much memory as the
            parameters, and so save one evaluation of it.
        assume_symmetric: do not look for derivative rules in the loss that break the symmetry.

    Raises:
        ArgumentValueError: the loss has a ``jax.custom_vjp`` or ``jax.custom_jvp`` whose rule is
            not the function's derivative, such as gradient reversal or a straight-through
            estimator; mixed mode would be wrong there. Straight-through written with
            ``jax.lax.stop_gradient`` is fine.

    Example:
        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> def meta_loss(lr):
        ...     loss = lambda w, batch: (w - batch) ** 2
        ...     out = jaxmeta.meta_unroll(
        ...         loss, optax.sgd, jnp.float32(0.0), jnp.ones(3), hyperparams=lr,
        ...         adjoint=jaxmeta.MixedMode())
        ...     return (out.params - 2.0) ** 2
        >>> print(f"{jax.grad(meta_loss)(0.25):.4f}")
        -3.3750

    References:
        Kemaev, Calian, Zintgraf, Farquhar and van Hasselt, "Scalable meta-learning via
        mixed-mode differentiation", ICML 2025, https://arxiv.org/abs/2505.00793. Pearlmutter,
        "Fast exact multiplication by the Hessian", Neural Computation 6, 1994.
    """

    checkpoint: Adjoint = StepCheckpoint()  # noqa: RUF009 - frozen
    save_gradients: bool = True
    assume_symmetric: bool = False

    def value_and_grad(self, fn: LossAndAux) -> Callable[[PyTree], tuple[tuple[Any, Any], PyTree]]:
        """See :meth:`Adjoint.value_and_grad`."""

        def evaluate(params: PyTree) -> tuple[tuple[Any, Any], PyTree]:
            leaves, structure = jax.tree.flatten(params)
            closed = close(lambda leaves: fn(jax.tree.unflatten(structure, leaves)), leaves)
            fault = None if self.assume_symmetric else untrue_rule(closed.jaxpr)
            if fault is not None:
                raise ArgumentValueError(
                    f"adjoint is MixedMode, which needs true derivatives in loss_fn, and {fault}. "
                    "Use ReverseMode() or StepCheckpoint(); or write the function with "
                    "jax.lax.stop_gradient; or, where its rule is true after all, pass "
                    "MixedMode(assume_symmetric=True)."
                )
            return self.of_closed(closed, leaves, structure)

        return evaluate

    def of_closed(self, closed: Closed, leaves: Arrays, structure: Any) -> Any:
        """Evaluate loss, aux and gradient of a loss whose rules are known to be true."""
        results = _inner_gradient(closed.function, len(leaves))([*closed.constants, *leaves])
        values, slopes = _split(results, len(leaves))
        if self.save_gradients:
            slopes = [checkpoint_name(slope, _SAVED) for slope in slopes]
        loss_and_aux = jax.tree.unflatten(closed.structure, values)
        return loss_and_aux, jax.tree.unflatten(structure, slopes)

    def loop(self, step: Step, carry: PyTree, xs: PyTree, length: int) -> tuple[PyTree, PyTree]:
        """See :meth:`Adjoint.loop`."""
        checkpoint = self.checkpoint
        if self.save_gradients:
            checkpoint = checkpoint.keeping(_IS_GRADIENT)
        return checkpoint.loop(step, carry, xs, length)


def _inner_gradient(loss_and_aux: Flat, number: int) -> Flat:
    """``[*constants, *params] -> [loss, *aux, *gradient]``, differentiated by mixed mode.

    Args:
        loss_and_aux: ``[*constants, *params] -> [loss, *aux]``.
        number: of params.
    """

    def value_and_grad(arrays: Arrays) -> Arrays:
        def split(params: Arrays) -> tuple[jax.Array, Arrays]:
            loss, *aux = loss_and_aux([*constants, *params])
            return loss, aux

        constants, params = _split(arrays, number)
        (loss, aux), gradient = jax.value_and_grad(split, has_aux=True)(params)
        return [loss, *aux, *gradient]

    def reverse(
        arrays: Arrays, wanted: tuple[int, ...], cotangents: list[jax.Array | None]
    ) -> Arrays:
        (of_loss, *of_aux), of_gradient = _split(cotangents, number)
        constants, params = _split(arrays, number)

        def values(at: Arrays) -> Arrays:
            return loss_and_aux(replace(arrays, wanted, at))

        def slopes(params: Arrays) -> Arrays:
            """Differentiate the loss by all that is wanted, where the parameters are these."""
            moved = [*constants, *params]
            loss, pull = jax.vjp(
                lambda at: loss_and_aux(replace(moved, wanted, at))[0], take(moved, wanted)
            )
            return pull(jnp.ones_like(loss))[0]

        direction = [
            jnp.zeros_like(param) if cotangent is None else cotangent
            for param, cotangent in zip(params, of_gradient, strict=True)
        ]
        slope, total = jax.jvp(slopes, [params], [direction])
        if of_loss is not None:
            total = [t + of_loss.astype(s.dtype) * s for t, s in zip(total, slope, strict=True)]
        kept = [i for i, cotangent in enumerate(of_aux) if cotangent is not None]
        if kept:
            _, pull = jax.vjp(lambda at: take(values(at)[1:], kept), take(arrays, wanted))
            (more,) = pull(take(of_aux, kept))
            total = [t + m for t, m in zip(total, more, strict=True)]
        return total

    return with_reverse(value_and_grad, reverse)


def _split(items: Sequence[Any], number: int) -> tuple[list[Any], list[Any]]:
    """Split off the last ``number`` items."""
    count = len(items) - number
    return list(items[:count]), list(items[count:])
