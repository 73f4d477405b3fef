"""Whether second derivatives of the inner loss are symmetric, as mixed mode needs them to be.

Derivatives that JAX finds itself are, ``stop_gradient`` included. Rules that are written by hand
need not be: gradient reversal, a straight-through estimator. Each such rule in the loss is run on
random numbers while the loss is traced; rules that are JAX's own are trusted.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun, jaxprs_in_params

from jaxmeta.trees import PyTree

_CUSTOM_JVP, _CUSTOM_VJP = "custom_jvp_call", "custom_vjp_call"
_JAX = Path(jax.__file__).parent
_OWN = Path(__file__).parent
# Functions that users hand to jax.custom_gradient appear under the name of a helper of JAX's own.
_NOT_JAX = "custom_derivatives.py"
# Beyond this many numbers a trial would take longer than tracing does.
_LARGEST = 2**24


def untrue_rule(jaxpr: Jaxpr) -> str | None:
    """Find a custom derivative rule that breaks the symmetry, or cannot be shown to keep it.

    Args:
        jaxpr: of the inner loss.

    Returns:
        Which function, where it is defined and what is wrong; None where there is none.
    """
    for equation in _custom_calls(jaxpr):
        source = equation.params["call_jaxpr"].jaxpr.debug_info.func_src_info or "a function"
        if _trusted(source):
            continue
        try:
            with jax.ensure_compile_time_eval():
                fault = _fault(equation)
        except Exception as error:  # a rule may close over traced values, or need a mesh axis
            fault = f"could not be tried out ({type(error).__name__}: {error})"
        if fault is not None:
            return f"the derivative rule of {source} {fault}"
    return None


def _custom_calls(jaxpr: Jaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        # Inside a custom_jvp nothing counts: its rule stands for it.
        if equation.primitive.name != _CUSTOM_JVP:
            for inner in jaxprs_in_params(equation.params):
                yield from _custom_calls(inner)
        if equation.primitive.name in (_CUSTOM_JVP, _CUSTOM_VJP):
            yield equation


def _trusted(source: str) -> bool:
    """``source`` reads ``name at file:line``."""
    path = Path(source.rpartition(" at ")[2].rpartition(":")[0])
    if path.name == _NOT_JAX:
        return False
    return _JAX in path.parents or _OWN in path.parents


def _fault(equation: JaxprEqn) -> str | None:
    floats: list[Any] = [v.aval for v in equation.invars if _is_float(v.aval)]
    size = sum(aval.size for aval in floats)
    if size > _LARGEST:
        return f"was not tried out: its arguments have {size} numbers, more than {_LARGEST}"
    if not floats:
        return None
    function = _function(equation)
    found = "is not finite at random arguments, so that it could not be tried out"
    for draw in (_normal, _unit):
        arguments = [draw(v.aval, seed) for seed, v in enumerate(equation.invars)]
        asymmetry = _asymmetry(function, arguments)
        if not np.isfinite(asymmetry):
            continue
        if asymmetry > _tolerance(floats):
            return "is not the derivative of any function: its second derivative is not symmetric"
        plain = equation.params["call_jaxpr"]
        if equation.primitive.name == _CUSTOM_VJP and not _same(function, plain, arguments, floats):
            return "is not the derivative of the function"
        found = None
    return found


def _function(equation: JaxprEqn) -> Callable[..., list[jax.Array]]:
    """Return the equation as a function of its inputs, rule and all."""
    variables = [v for v in equation.invars if not isinstance(v, Literal)]
    info = equation.params["call_jaxpr"].jaxpr.debug_info
    jaxpr = Jaxpr((), variables, equation.outvars, [equation], equation.effects, info)
    call = jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))

    def function(*arguments: jax.Array) -> list[jax.Array]:
        pairs = zip(equation.invars, arguments, strict=True)
        return call(*(a for v, a in pairs if not isinstance(v, Literal)))

    return function


def _asymmetry(function: Callable[..., Any], arguments: list[Any]) -> float:
    """``|v'Hw - w'Hv|`` relative to its parts, of a function of the results that is not linear."""
    at, rest = _split(arguments)

    def gradient(at: list[jax.Array]) -> list[jax.Array]:
        results, pull = jax.vjp(lambda at: _floats(function(*rest(at))), at)
        weights = _directions(results, 1)
        slope = _dot(weights, results)
        return pull([w * (1 + slope).astype(w.dtype) for w in weights])[0]

    v, w = _directions(at, 2), _directions(at, 3)
    of_v = _dot(w, jax.jvp(gradient, [at], [v])[1])
    of_w = _dot(v, jax.jvp(gradient, [at], [w])[1])
    return float(abs(of_v - of_w) / (abs(of_v) + abs(of_w) + 1))


def _same(
    function: Callable[..., Any], plain: ClosedJaxpr, arguments: list[Any], floats: list[Any]
) -> bool:
    """Whether a rule agrees with what JAX finds for the function without it."""
    at, rest = _split(arguments)

    def slope(function: Callable[..., Any]) -> Any:
        results, pull = jax.vjp(lambda at: _floats(function(*rest(at))), at)
        return _dot(_directions(at, 2), pull(_directions(results, 1))[0])

    by_rule, true = slope(function), slope(jaxpr_as_fun(plain))
    return float(abs(by_rule - true)) <= _tolerance(floats) * float(1 + abs(by_rule) + abs(true))


def _split(arguments: list[Any]) -> tuple[list[jax.Array], Callable[..., list[Any]]]:
    """Return the float arguments, and the function that puts such ones in their places."""
    places = [i for i, argument in enumerate(arguments) if _is_float(argument)]

    def replaced(floats: list[jax.Array]) -> list[Any]:
        new = list(arguments)
        for i, value in zip(places, floats, strict=True):
            new[i] = value
        return new

    return [arguments[i] for i in places], replaced


def _is_float(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)


def _floats(results: list[Any]) -> list[Any]:
    return [result for result in results if _is_float(result)]


def _normal(aval: Any, seed: int) -> jax.Array:
    return _draw(aval, seed, lambda rng: rng.normal(size=aval.shape))


def _unit(aval: Any, seed: int) -> jax.Array:
    return _draw(aval, seed, lambda rng: rng.uniform(0.1, 0.9, size=aval.shape))


def _draw(aval: Any, seed: int, numbers: Callable[[np.random.Generator], Any]) -> jax.Array:
    if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jnp.zeros(aval.shape, aval.dtype)
    rng = np.random.default_rng(seed)
    if _is_float(aval):
        return jnp.asarray(numbers(rng), aval.dtype)
    return jnp.asarray(rng.integers(0, 2, size=aval.shape), aval.dtype)


def _directions(arrays: PyTree, seed: int) -> list[jax.Array]:
    rng = np.random.default_rng(100 * seed)
    return [jnp.asarray(rng.normal(size=a.shape) / a.size**0.5, a.dtype) for a in arrays]


def _dot(xs: PyTree, ys: PyTree) -> Any:
    pairs = zip(jax.tree.leaves(xs), jax.tree.leaves(ys), strict=True)
    products = [jnp.sum(x * y, dtype=jnp.promote_types(x.dtype, jnp.float32)) for x, y in pairs]
    return functools.reduce(jnp.add, products, jnp.float32(0))


def _tolerance(avals: list[Any]) -> float:
    return 1e3 * max(float(jnp.finfo(aval.dtype).eps) for aval in avals)
