"""Trees of arrays: names of leaves, what a leaf is, dtypes that stay as they began."""

import functools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmeta.errors import ArgumentValueError
from jaxmeta.manual_axes import vary, varying

PyTree = Any

_SCALARS = (bool, int, float, complex)
_KINDS = (np.bool_, np.integer, jnp.floating, np.complexfloating)
_FLOAT, _NOT_A_NUMBER = _KINDS.index(jnp.floating), len(_KINDS)


def named_leaves(root: str, tree: PyTree) -> Iterator[tuple[str, Any]]:
    """Yield ``(name, leaf)``, the name as the user would write it: ``params['w']``."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield root + jax.tree_util.keystr(path), leaf


def first_misfit(root: str, tree: PyTree, fits: Callable[[Any], bool]) -> tuple[str, Any] | None:
    """Return the name and value of the first leaf that does not fit."""
    if all(map(fits, jax.tree.leaves(tree))):  # names cost time, and are seldom needed
        return None
    return next((name, leaf) for name, leaf in named_leaves(root, tree) if not fits(leaf))


def is_array(leaf: Any) -> bool:
    """Whether JAX can compute with ``leaf``: an array (keys included) or a Python number."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return _kind(leaf.dtype) < _NOT_A_NUMBER
    return isinstance(leaf, (jax.Array, *_SCALARS))


def is_float(leaf: Any) -> bool:
    """Whether ``leaf`` is an array, or a number, that can have a gradient."""
    return is_array(leaf) and _kind(dtype(leaf)) == _FLOAT


def dtype(leaf: Any) -> Any:
    """The dtype that ``leaf``, for which :func:`is_array` holds, has in a JAX computation."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def describe(leaf: Any) -> str:
    """Say what a leaf is: ``float32[3,4]`` for an array, ``str 'abc'`` for anything else."""
    if isinstance(leaf, type):
        return f"the class {leaf.__name__}"
    if not is_array(leaf):
        return f"{type(leaf).__name__} {leaf!r:.60}"
    shape = ",".join(map(str, np.shape(leaf)))
    return f"{dtype(leaf)}[{shape}]" if shape else f"a scalar {dtype(leaf)}"


def outline(tree: PyTree) -> str:
    """Say in a few words what a tree is: its keys where it has keys."""
    if tree is None:
        return "None"
    if isinstance(tree, dict):
        return f"a dict with the keys {list(tree)}"
    if jax.tree_util.all_leaves([tree]):
        return describe(tree)
    fields = getattr(tree, "_fields", None)
    return f"a {type(tree).__name__}" + (f" with the fields {list(fields)}" if fields else "")


def strong(tree: PyTree) -> PyTree:
    """Give every array leaf a dtype of its own: Python numbers and weak types have none.

    What a loop carries needs it, because the result of one step is the input of the next.
    Leaves that are no arrays stay as they are.
    """
    return jax.tree.map(_strong_leaf, tree)


def _strong_leaf(leaf: Any) -> Any:
    if isinstance(leaf, _SCALARS):
        return np.asarray(leaf, dtype(leaf))
    if isinstance(leaf, jax.Array) and jax.typeof(leaf).weak_type:
        return jax.lax.convert_element_type(leaf, leaf.dtype)
    return leaf


def restore_dtypes(new: PyTree, old: PyTree, root: str, maker: str) -> PyTree:
    """Return ``new`` in the dtypes of ``old``, which it must otherwise match leaf by leaf.

    Args:
        new: what one step made.
        old: what the step was given.
        root: how error messages call the tree.
        maker: who made ``new``, for error messages.

    Raises:
        ArgumentValueError: the structure, a shape or the kind of a dtype has changed.
    """
    found = difference(new, old, root)
    if found is not None:
        raise ArgumentValueError(f"{maker} has another structure than {root}: {found}.")
    names = [name for name, _ in named_leaves(root, old)]
    leaves, structure = jax.tree.flatten(old)
    restored = map(_restore_leaf, jax.tree.leaves(new), leaves, names, [maker] * len(names))
    return jax.tree.unflatten(structure, restored)


def _restore_leaf(new: Any, old: Any, name: str, maker: str) -> Any:
    same_shape = is_array(new) and np.shape(new) == np.shape(old)
    same_dtype = same_shape and dtype(new) == dtype(old)
    if not same_dtype:
        if not (same_shape and _kind(dtype(new)) <= _kind(dtype(old)) < _NOT_A_NUMBER):
            raise ArgumentValueError(
                f"{name} is {describe(old)} before a step, and {maker} makes it {describe(new)}: "
                "the shape and the kind of number must stay the same from step to step."
            )
        new = jnp.asarray(new, dtype(old))
    more = sorted(varying(new) - varying(old))
    if more:
        raise ArgumentValueError(
            f"{name} is the same on all devices of the mesh axes {more} before a step, and {maker} "
            f"differs between them. Where each device trains on its own, pass params that vary: "
            f"jax.lax.pcast(params, {tuple(more)}, to='varying')."
        )
    return vary(_strong_leaf(new), varying(old))


@functools.cache
def _kind(dtype: Any) -> int:
    """Rank of a kind of number; a value can move up without losing anything but precision."""
    return next((i for i, kind in enumerate(_KINDS) if jnp.issubdtype(dtype, kind)), _NOT_A_NUMBER)


def difference(new: PyTree, old: PyTree, root: str) -> str | None:
    """Say how two trees differ in structure, naming the leaves; None where they do not."""
    structure_new, structure_old = jax.tree.structure(new), jax.tree.structure(old)
    if structure_new == structure_old:
        return None
    names_new = [name for name, _ in named_leaves(root, new)]
    names_old = [name for name, _ in named_leaves(root, old)]
    missing = [name for name in names_old if name not in names_new]
    extra = [name for name in names_new if name not in names_old]
    parts = [f"{', '.join(missing[:5])} missing"] if missing else []
    parts += [f"{', '.join(extra[:5])} not expected"] if extra else []
    return "; ".join(parts) or f"{structure_new} where {structure_old} is expected"


@jax.tree_util.register_static
class Hidden:
    """A leaf that is no array, as a node without leaves, so that it can enter and leave jit."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Hidden):
            return False
        comparable = isinstance(self.value, Hashable) and isinstance(other.value, Hashable)
        return self.value is other.value or (comparable and self.value == other.value)

    def __hash__(self) -> int:
        return hash(self.value) if isinstance(self.value, Hashable) else id(self.value)

    def __repr__(self) -> str:
        return f"Hidden({self.value!r})"


def hide(tree: PyTree) -> PyTree:
    """Wrap each leaf that is no array in :class:`Hidden`."""
    return jax.tree.map(lambda leaf: leaf if is_array(leaf) else Hidden(leaf), tree)


def reveal(tree: PyTree) -> PyTree:
    """Undo :func:`hide`."""
    return jax.tree.map(
        lambda leaf: leaf.value if isinstance(leaf, Hidden) else leaf,
        tree,
        is_leaf=lambda node: isinstance(node, Hidden),
    )
