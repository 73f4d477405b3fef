"""Models of flax as pure functions of their parameters and their state."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxmeta.errors import ArgumentTypeError, ArgumentValueError
from jaxmeta.trees import PyTree, outline

Apply = Callable[..., tuple[Any, PyTree]]


def functional(
    model: Any, variables: Mapping[str, Any] | None = None
) -> tuple[Apply, PyTree, PyTree]:
    """Split a flax model into ``(apply, params, state)``, as :func:`meta_unroll` wants it.

    ``outputs, new_state = apply(params, state, *inputs, key=None, **kwargs)`` is a pure function:

    - For a ``flax.nnx`` module, params are its ``nnx.Param`` variables, and state is all else:
      batch statistics, random streams, caches. A call draws from the streams in the state, and
      the new state holds them as they are then; with ``key`` they are seeded from it first. The
      module itself is never changed, and later changes of it (``eval()``) do not count.
    - For a ``flax.linen`` module, ``variables`` is what ``model.init`` returned: params are its
      ``"params"`` collection, and state is a dict of the others, all of them mutable. Whatever
      the module draws comes from ``key``.

    ``kwargs`` go to the module's call, for example ``train=True``.

    Args:
        model: a ``flax.nnx.Module``, or a ``flax.linen.Module`` with its ``variables``.
        variables: the variables of a linen module.

    Raises:
        ArgumentTypeError: ``model`` is no flax module.
        ArgumentValueError: ``variables`` is missing, or has nothing to do with the model.

    Example:
        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
        >>> apply, params, state = jaxmeta.functional(model)
        >>> def loss_fn(params, batch, *, state, key):
        ...     outputs, state = apply(params, state, batch, key=key)
        ...     return jnp.mean(outputs**2), state
        >>> out = jaxmeta.meta_unroll(
        ...     loss_fn, optax.sgd(0.1), params, jnp.ones((5, 2, 3)), state=state,
        ...     key=jax.random.key(0))
        >>> out.losses.shape
        (5,)

    References:
        flax, https://flax.readthedocs.io: ``nnx.split`` and ``nnx.merge``, linen's ``apply``.
    """
    # A model of a library is here only if the user has imported that library.
    nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
    if nnx is not None and isinstance(model, nnx.Module):
        if variables is not None:
            raise ArgumentValueError(
                "variables is given for a flax.nnx module, which holds its own variables: leave it "
                "out."
            )
        return _functional_nnx(nnx, model)
    if linen is not None and isinstance(model, linen.Module):
        return _functional_linen(model, variables)
    raise ArgumentTypeError(
        f"model is {outline(model)}; expected a flax.nnx.Module or a flax.linen.Module. A "
        "torch.nn.Module is converted by jaxmeta_bridge.from_torch; any other model only needs a "
        "loss_fn that takes its parameters as a tree."
    )


def _functional_nnx(nnx: Any, model: Any) -> tuple[Apply, PyTree, PyTree]:
    graph, params, state = nnx.split(model, nnx.Param, ...)
    variables = (variable for _, variable in nnx.to_flat_state(state))
    streams = sorted({v.tag for v in variables if isinstance(v, nnx.RngKey)})

    def apply(
        params: PyTree, state: PyTree, *inputs: Any, key: jax.Array | None = None, **kwargs: Any
    ) -> tuple[Any, PyTree]:
        module = nnx.merge(graph, params, state, copy=True)
        if key is not None:
            # Streams of different names would draw the same numbers from the same key.
            keys = {name: jax.random.fold_in(key, i) for i, name in enumerate(streams)}
            nnx.reseed(module, **keys)
        outputs = module(*inputs, **kwargs)
        return outputs, nnx.split(module, nnx.Param, ...)[2]

    return apply, params, state


def _functional_linen(
    model: Any, variables: Mapping[str, Any] | None
) -> tuple[Apply, PyTree, PyTree]:
    if variables is None or "params" not in variables:
        raise ArgumentValueError(
            f"variables is {outline(variables)}; a flax.linen module needs what model.init(key, "
            "*inputs) returns, a dict with the key 'params'."
        )
    state = {name: collection for name, collection in variables.items() if name != "params"}

    def apply(
        params: PyTree, state: PyTree, *inputs: Any, key: jax.Array | None = None, **kwargs: Any
    ) -> tuple[Any, PyTree]:
        outputs, changed = model.apply(
            {"params": params, **state}, *inputs, rngs=key, mutable=list(state), **kwargs
        )
        return outputs, dict(changed)

    return apply, variables["params"], state
