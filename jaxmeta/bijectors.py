"""Hyperparameters that stay legal: real numbers on the outside, natural values on the inside.

An outer optimizer adds to what it is given, and may step out of what a learning rate or a momentum
can be. So it is given *raw* numbers, and the inner loop the values that they stand for.
"""

import abc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxmeta.errors import ArgumentTypeError, ArgumentValueError
from jaxmeta.trees import PyTree, describe, is_float, named_leaves, outline, strong


class Bijector(abc.ABC):
    """A smooth increasing map of the real numbers onto the legal values of a hyperparameter.

    :func:`positive`, :func:`nonnegative`, :func:`unit_interval` and :func:`bounded` make the
    usual ones. One of your own is a frozen dataclass with these three methods; ``constrain`` and
    ``unconstrain`` are given float arrays of any shape and keep their dtype.
    """

    @property
    @abc.abstractmethod
    def domain(self) -> tuple[float, float]:
        """The open interval of the legal values."""

    @abc.abstractmethod
    def constrain(self, raw: jax.Array) -> jax.Array:
        """Return the values that ``raw`` stands for."""

    @abc.abstractmethod
    def unconstrain(self, value: jax.Array) -> jax.Array:
        """Return the raw numbers that stand for values inside of the domain."""


def positive() -> Bijector:
    r"""Make the bijector of numbers above 0: :math:`value = \exp(raw)`.

    For what is tuned by factors: learning rates, temperatures, regularisation strengths.
    """
    return Positive()


def nonnegative() -> Bijector:
    r"""Make the bijector of numbers near or above 0: :math:`value = \log(1 + \exp(raw))`.

    Softplus: like :func:`positive` near 0, and steps of equal size far above. For what may
    almost vanish, such as weight decay. Zero itself belongs to no raw number.
    """
    return Nonnegative()


def unit_interval() -> Bijector:
    r"""Make the bijector of numbers between 0 and 1: :math:`value = 1 / (1 + \exp(-raw))`.

    For momenta, Adam's betas, probabilities, mixing weights. The derivative keeps its relative
    precision near both ends, for values like 0.9999 too.
    """
    return bounded(0.0, 1.0)


def bounded(low: float, high: float) -> Bijector:
    r"""Make the bijector of numbers between two others.

    .. math:: value = low + (high - low) / (1 + \exp(-raw))

    Args:
        low: the lower end, which is not reached.
        high: the upper end, which is not reached.

    Raises:
        ArgumentTypeError: an end is no number.
        ArgumentValueError: an end is not finite, or ``low`` is not below ``high``.
    """
    return Bounded(low, high)


def constrain(raw: PyTree, bijectors: PyTree) -> PyTree:
    """Return the legal values that raw numbers stand for.

    The result is always inside of the domain: a value that would be rounded to an end of it, or
    overflow, is the nearest number of its dtype inside. Differentiable to any order, and the
    derivatives are finite for every finite raw number.

    Args:
        raw: tree of float arrays, from :func:`unconstrain` or an outer optimizer; dtypes are kept.
        bijectors: a tree prefix of ``raw``: one bijector for all that is below it. None leaves
            what is below it as it is.

    Raises:
        ArgumentTypeError: a leaf of ``raw`` is not float, or one of ``bijectors`` no bijector.
        ArgumentValueError: ``bijectors`` is no prefix of ``raw``.

    Example:
        Learn learning rate and momentum of an inner loop with an outer optimizer:

        >>> import jax, jax.numpy as jnp, jaxmeta, optax
        >>> bijectors = {"lr": jaxmeta.positive(), "momentum": jaxmeta.unit_interval()}
        >>> raw = jaxmeta.unconstrain({"lr": 0.1, "momentum": 0.9}, bijectors)
        >>> def meta_loss(raw):
        ...     out = jaxmeta.meta_unroll(
        ...         lambda w, x: (w - x) ** 2, lambda h: optax.sgd(h["lr"], h["momentum"]),
        ...         jnp.float32(0.0), jnp.ones(5), hyperparams=jaxmeta.constrain(raw, bijectors))
        ...     return (out.params - 1.0) ** 2
        >>> raw = jax.tree.map(lambda r, g: r - 0.1 * g, raw, jax.grad(meta_loss)(raw))
        >>> values = jaxmeta.constrain(raw, bijectors)
        >>> print(f"{values['lr']:.3f} {values['momentum']:.3f}")
        0.092 0.898

    References:
        Bijectors and the names of their directions: Dillon et al., "TensorFlow Distributions",
        2017, https://arxiv.org/abs/1711.10604; Stan's constraining transforms,
        https://mc-stan.org/docs/reference-manual/transforms.html.
    """

    def apply(name: str, leaf: Any, bijector: Bijector) -> jax.Array:
        return bijector.constrain(_array(name, leaf))

    return _map(apply, "raw", raw, bijectors)


def unconstrain(values: PyTree, bijectors: PyTree) -> PyTree:
    """Return the raw numbers that stand for hyperparameters given in their natural units.

    Args:
        values: tree of float arrays or Python floats, each inside of its bijector's domain.
        bijectors: a tree prefix of ``values``, as for :func:`constrain`.

    Returns:
        A tree like ``values``. ``constrain`` of it is ``values`` again, to the precision of the
        dtype: relative to the distance from the nearer finite end, within ``(2 + |raw|) * eps``.
        Under ``jax.jit``, where values cannot be looked at, those outside of the domain are NaN.

    Raises:
        ArgumentTypeError: a leaf of ``values`` is not float, or one of ``bijectors`` no bijector.
        ArgumentValueError: a value is not inside of the domain, or ``bijectors`` is no prefix.

    Example:
        >>> import jaxmeta
        >>> raw = jaxmeta.unconstrain({"lr": 1e-3, "b1": 0.9}, {
        ...     "lr": jaxmeta.positive(), "b1": jaxmeta.unit_interval()})
        >>> print(f"{raw['lr']:.3f} {raw['b1']:.3f}")
        -6.908 2.197
    """

    def apply(name: str, leaf: Any, bijector: Bijector) -> jax.Array:
        value = _array(name, leaf)
        if isinstance(value, Tracer):
            lowest, highest = _ends(bijector, value.dtype)
            inside = (value >= lowest) & (value <= highest)
            return jnp.where(inside, bijector.unconstrain(value), jnp.nan)
        _check_inside(name, leaf, np.asarray(value), bijector)
        return bijector.unconstrain(value)

    return _map(apply, "values", values, bijectors)


@dataclass(frozen=True)
class Positive(Bijector):
    """See :func:`positive`."""

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, math.inf

    def constrain(self, raw: jax.Array) -> jax.Array:
        largest = np.log(jnp.finfo(raw.dtype).max).astype(raw.dtype)
        return _inside(jnp.exp(jnp.minimum(raw, _next(largest, 0))), self)

    def unconstrain(self, value: jax.Array) -> jax.Array:
        return jnp.log(value)


@dataclass(frozen=True)
class Nonnegative(Bijector):
    """See :func:`nonnegative`."""

    @property
    def domain(self) -> tuple[float, float]:
        return 0.0, math.inf

    def constrain(self, raw: jax.Array) -> jax.Array:
        return _inside(jnp.where(raw >= 0, raw, 0) + jnp.log1p(_small_exp(raw)), self)

    def unconstrain(self, value: jax.Array) -> jax.Array:
        return value + jnp.log(-jnp.expm1(-value))


@dataclass(frozen=True)
class Bounded(Bijector):
    """See :func:`bounded`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            end = getattr(self, name)
            if isinstance(end, bool) or not isinstance(end, (int, float, np.number)):
                raise ArgumentTypeError(f"{name} is {outline(end)}; expected a Python number.")
            object.__setattr__(self, name, float(end))
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ArgumentValueError(
                f"low is {self.low} and high is {self.high}; expected finite numbers, low below "
                "high. For numbers without an upper end take positive() or nonnegative()."
            )

    @property
    def domain(self) -> tuple[float, float]:
        return self.low, self.high

    def constrain(self, raw: jax.Array) -> jax.Array:
        _ends(self, raw.dtype)  # the ends themselves may not fit
        low, high = (jnp.asarray(end, raw.dtype) for end in self.domain)
        small = _small_exp(raw)
        # Measured from the nearer end, so that neither the distance nor its derivative cancels.
        distance = (high - low) * (small / (1 + small))
        return _inside(jnp.where(raw >= 0, high - distance, low + distance), self)

    def unconstrain(self, value: jax.Array) -> jax.Array:
        low, high = (jnp.asarray(end, value.dtype) for end in self.domain)
        return jnp.log((value - low) / (high - low)) - jnp.log((high - value) / (high - low))


def _small_exp(raw: jax.Array) -> jax.Array:
    """``exp(-|raw|)``, with the derivative of one side at 0."""
    return jnp.exp(jnp.where(raw >= 0, -raw, raw))


def _inside(value: jax.Array, bijector: Bijector) -> jax.Array:
    """Round to the nearest number inside of the domain; the derivative is that of ``value``."""
    lowest, highest = _ends(bijector, value.dtype)
    return value + jax.lax.stop_gradient(jnp.clip(value, lowest, highest) - value)


def _ends(bijector: Bijector, kind: Any) -> tuple[Any, Any]:
    """Return the lowest and the highest number of a dtype inside of the domain."""
    info = jnp.finfo(kind)
    with np.errstate(over="ignore"):
        low, high = (np.asarray(end, kind) for end in bijector.domain)
    # XLA may take what is below the smallest normal number for zero.
    lowest = _next(low, np.inf) if low else info.smallest_normal
    highest = _next(high, -np.inf) if high else -info.smallest_normal
    overflows = np.isinf([low, high]).tolist() != np.isinf(bijector.domain).tolist()
    if overflows or lowest >= highest or float(highest) - float(lowest) > float(info.max):
        raise ArgumentValueError(
            f"{bijector} does not fit {kind}: there must be at least two numbers between its ends, "
            "and their difference must not overflow. Take another interval or another dtype."
        )
    return lowest, highest


def _next(end: Any, towards: Any) -> Any:
    return np.nextafter(end, np.asarray(towards, end.dtype))


def _check_inside(name: str, leaf: Any, value: np.ndarray, bijector: Bijector) -> None:
    lowest, highest = _ends(bijector, value.dtype)
    outside = ~((value >= lowest) & (value <= highest))
    if not outside.any():
        return
    low, high = bijector.domain
    found = f"{leaf}" if value.ndim == 0 else f"{describe(leaf)} with the entry {value[outside][0]}"
    upper = "" if high == math.inf else f" and below {high:g}"
    raise ArgumentValueError(
        f"{name} is {found}; expected numbers above {low:g}{upper}, which in {value.dtype} go from "
        f"{lowest!s} to {highest!s}. An end itself has no raw number: start a little inside, or "
        "leave what is to stay at an end out of the hyperparams."
    )


def _array(name: str, leaf: Any) -> jax.Array:
    if not is_float(leaf):
        raise ArgumentTypeError(
            f"{name} is {describe(leaf)}; expected floats: write 1.0 for 1, or give it the "
            "bijector None, which leaves it as it is."
        )
    return jnp.asarray(strong(leaf))


def _map(
    apply: Callable[[str, Any, Bijector], jax.Array], root: str, tree: PyTree, bijectors: PyTree
) -> PyTree:
    """Apply to each leaf with the bijector that stands above it."""
    rules, structure = jax.tree_util.tree_flatten_with_path(
        bijectors, is_leaf=lambda node: node is None
    )
    for path, rule in rules:
        if not (rule is None or isinstance(rule, Bijector)):
            raise ArgumentTypeError(
                f"bijectors{jax.tree_util.keystr(path)} is {outline(rule)}; expected a bijector, "
                "such as jaxmeta.positive(), or None."
            )
    try:
        parts = structure.flatten_up_to(tree)
    except (ValueError, TypeError) as error:
        raise ArgumentValueError(
            f"bijectors is no tree prefix of {root}: bijectors is {outline(bijectors)}, {root} is "
            f"{outline(tree)} ({error})."
        ) from None

    def below(path: Any, rule: Bijector | None, part: PyTree) -> PyTree:
        if rule is None:
            return part
        names = named_leaves(root + jax.tree_util.keystr(path), part)
        return jax.tree.unflatten(
            jax.tree.structure(part), [apply(name, leaf, rule) for name, leaf in names]
        )

    return structure.unflatten(
        below(path, rule, part) for (path, rule), part in zip(rules, parts, strict=True)
    )
