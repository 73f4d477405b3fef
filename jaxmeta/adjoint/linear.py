"""A linear function whose transpose is given, as a primitive that JAX can transform freely.

``jax.custom_vjp`` can be neither pushed forward nor differentiated again, and
``jax.custom_derivatives.linear_call`` has no rule for ``vmap``. This has both.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive, unmapped_aval
from jax.interpreters import ad, batching, mlir

from jaxmeta.manual_axes import vary, varying_over

Arrays = list[jax.Array]
Linear = Callable[[Arrays, Arrays], Arrays]
Transpose = Callable[[Arrays, list[jax.Array | None]], Arrays]


def linear_call(
    function: Linear,
    transpose: Transpose,
    residuals: Sequence[jax.Array],
    operands: Sequence[jax.Array],
    like: Sequence[jax.Array],
) -> Arrays:
    """Evaluate ``function(residuals, operands)``, linear in ``operands``.

    Reverse mode evaluates ``transpose`` in its place; every other derivative, that by the
    residuals included, is that of ``function`` and ``transpose`` as JAX knows them.

    Args:
        function: ``(residuals, operands) -> results``; closes over no traced value.
        transpose: ``(residuals, cotangents) -> cotangents of the operands``, where a cotangent
            that is known to be zero is None; closes over no traced value.
        residuals: arrays of any dtype.
        operands: float or complex arrays.
        like: arrays with the shapes and dtypes of the results.
    """
    return _linear.bind(
        *residuals,
        *operands,
        function=function,
        transpose=transpose,
        count=len(residuals),
        results=tuple(_plain(jax.typeof(array)) for array in like),
    )


def _plain(aval: Any) -> Any:
    return aval.update(weak_type=False)


_linear = Primitive("jaxmeta_linear")
_linear.multiple_results = True


@_linear.def_impl
def _evaluate(*args: Any, function: Linear, count: int, **_: Any) -> Arrays:
    return function(list(args[:count]), list(args[count:]))


@_linear.def_abstract_eval
def _types(*_: Any, results: tuple[Any, ...], **__: Any) -> list[Any]:
    return list(results)


mlir.register_lowering(_linear, mlir.lower_fun(_evaluate, multiple_results=True))


def _jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    function, count, results = (params[name] for name in ("function", "count", "results"))
    outputs = _linear.bind(*primals, **params)
    by_result: list[Arrays] = [[] for _ in results]
    if any(not isinstance(tangent, ad.Zero) for tangent in tangents[count:]):
        moved = map(ad.instantiate_zeros, tangents[count:])
        by_result = [[part] for part in _linear.bind(*primals[:count], *moved, **params)]
    moving = [i for i in range(count) if not isinstance(tangents[i], ad.Zero)]
    if moving:

        def of_residuals(*moved: Any) -> Arrays:
            residuals = list(primals[:count])
            for i, residual in zip(moving, moved, strict=True):
                residuals[i] = residual
            return function(residuals, list(primals[count:]))

        _, slopes = jax.jvp(
            of_residuals, [primals[i] for i in moving], [tangents[i] for i in moving]
        )
        for parts, part in zip(by_result, slopes, strict=True):
            parts.append(part)
    return outputs, [sum(parts[1:], parts[0]) for parts in by_result]


ad.primitive_jvps[_linear] = _jvp


def _transpose(cotangents: Sequence[Any], *args: Any, **params: Any) -> list[Any]:
    count = params["count"]
    known = tuple(i for i, ct in enumerate(cotangents) if not isinstance(ct, ad.Zero))
    if not known:
        return [None] * len(args)
    operands = tuple(map(_type, args[count:]))
    results = _linear.bind(
        *args[:count],
        *(cotangents[i] for i in known),
        function=partial(_forward, params["transpose"], known, operands, len(cotangents)),
        transpose=partial(_backward, params["function"], known, operands),
        count=count,
        results=operands,
    )
    wanted = map(ad.is_undefined_primal, args[count:])
    return [None] * count + [r if want else None for r, want in zip(results, wanted, strict=True)]


ad.primitive_transposes[_linear] = _transpose


def _type(operand: Any) -> Any:
    return _plain(operand.aval if ad.is_undefined_primal(operand) else jax.typeof(operand))


def _forward(
    transpose: Transpose,
    known: tuple[int, ...],
    types: tuple[Any, ...],
    number: int,
    residuals: Arrays,
    cotangents: Arrays,
) -> Arrays:
    """Apply the transpose to the cotangents that are not zero."""
    places: list[jax.Array | None] = [None] * number
    for i, cotangent in zip(known, cotangents, strict=True):
        places[i] = cotangent
    return _as_typed(transpose(residuals, places), types)


def _backward(
    function: Linear,
    known: tuple[int, ...],
    types: tuple[Any, ...],
    residuals: Arrays,
    cotangents: list[jax.Array | None],
) -> Arrays:
    """Transpose :func:`_forward`, which is to apply the function that was there first."""
    operands = [
        jnp.zeros(kind.shape, kind.dtype) if ct is None else ct
        for ct, kind in zip(cotangents, types, strict=True)
    ]
    results = function(residuals, operands)
    return [results[i] for i in known]


def _as_typed(arrays: Arrays, types: tuple[Any, ...]) -> Arrays:
    """Let each array vary over the mesh axes over which its type does."""
    return [vary(array, varying_over(kind)) for array, kind in zip(arrays, types, strict=True)]


def _batch(axis: Any, args: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    if all(dim is None for dim in dims):
        return _linear.bind(*args, **params), [None] * len(params["results"])
    count = params["count"]
    # Operands are all batched, so that no cotangent has to be summed over the axis here.
    operands = [
        batching.bdim_at_front(arg, dim, axis.size)
        for arg, dim in zip(args[count:], dims[count:], strict=True)
    ]
    mapped = partial(
        jax.vmap,
        in_axes=(list(dims[:count]), 0),
        axis_size=axis.size,
        axis_name=axis.name,
        spmd_axis_name=axis.spmd_name,
    )
    results = _linear.bind(
        *args[:count],
        *operands,
        function=mapped(params["function"]),
        transpose=mapped(params["transpose"]),
        count=count,
        results=tuple(unmapped_aval(axis.size, 0, kind) for kind in params["results"]),
    )
    return results, [0] * len(results)


batching.fancy_primitive_batchers[_linear] = _batch
