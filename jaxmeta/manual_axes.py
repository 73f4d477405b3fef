"""Which mesh axes a value varies over inside ``jax.shard_map``; outside of it, none.

JAX keeps this as part of a value's type (``check_vma=True``), and what a loop carries must have
one type for all steps. See https://docs.jax.dev/en/latest/notebooks/shard_map.html.
"""

from typing import Any

import jax


def varying(tree: Any) -> frozenset[str]:
    """Return the axes that any leaf of ``tree`` varies over."""
    return frozenset().union(*map(_varying_leaf, jax.tree.leaves(tree)))


def _varying_leaf(leaf: Any) -> frozenset[str]:
    return varying_over(jax.typeof(leaf))


def varying_over(kind: Any) -> frozenset[str]:
    """Return the axes that values of a type, as :func:`jax.typeof` gives it, vary over."""
    kind = getattr(kind, "manual_axis_type", kind)  # since JAX 0.10
    return frozenset(getattr(kind, "varying", None) or getattr(kind, "vma", ()))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """Return ``tree`` with every leaf varying over at least ``axes``."""
    return jax.tree.map(lambda leaf: _vary_leaf(leaf, axes), tree)


def _vary_leaf(leaf: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _varying_leaf(leaf)))
    if not missing:
        return leaf
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(leaf, missing, to="varying")
    return getattr(jax.lax, "pvary")(leaf, missing)  # noqa: B009 - JAX 0.8 only
