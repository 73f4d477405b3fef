"""One call of a converted torch callable: its signature, and the program compiled for it."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxmeta import ArgumentTypeError, ArgumentValueError
from jaxmeta_bridge.dlpack import tensor_to_jax
from jaxmeta_bridge.dtypes import TO_JAX, TO_TORCH, WIDENED, x64_enabled
from jaxmeta_bridge.interpret import check_precision, draws, interpret
from jaxmeta_bridge.keys import value_key
from jaxmeta_bridge.program import Program, Spec, Var


@dataclass(frozen=True)
class Call:
    """The arguments of a call, split into arrays (traced) and everything else (static)."""

    arrays: list[jax.Array]
    specs: tuple[Spec, ...]
    signature: Hashable
    rebuild: Callable[[Sequence[Any]], dict[str, Any]]  # values for the arrays -> the parts

    @classmethod
    def of(cls, **parts: Any) -> "Call":
        """Splits named parts of a call, each a tree; the names stand in error messages."""
        paths, structure = jax.tree.flatten_with_path(parts)
        leaves = [_as_array(path, leaf) for path, leaf in paths]
        traced = [isinstance(leaf, jax.Array) for leaf in leaves]
        arrays = [leaf for leaf, is_array in zip(leaves, traced, strict=True) if is_array]
        static = tuple(
            None if is_array else value_key(leaf)
            for leaf, is_array in zip(leaves, traced, strict=True)
        )
        arrays = _without_weak_floats(arrays)
        specs = tuple(_spec(array) for array in arrays)

        def rebuild(values: Sequence[Any]) -> dict[str, Any]:
            remaining = iter(values)
            return structure.unflatten(
                next(remaining) if is_array else leaf
                for leaf, is_array in zip(leaves, traced, strict=True)
            )

        return cls(arrays, specs, (structure, specs, static), rebuild)


def _as_array(path: tuple[Any, ...], leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray | np.generic):
        leaf = jnp.asarray(leaf)
    where = path[0].key + jax.tree_util.keystr(path[1:])
    if isinstance(leaf, torch.Tensor):
        raise ArgumentTypeError(
            f"{where} is a torch tensor; a converted callable is a JAX function and expects JAX "
            "arrays. Convert it with tensor_to_jax, or call from inside to_torch."
        )
    if isinstance(leaf, jax.Array) and np.dtype(_plain_dtype(where, leaf)) not in TO_TORCH:
        raise ArgumentTypeError(f"{where} has dtype {leaf.dtype}, which torch does not have.")
    if not isinstance(leaf, jax.Array):
        try:
            hash(leaf)
        except TypeError:
            raise ArgumentTypeError(
                f"{where} is a {type(leaf).__name__}; expected JAX arrays, or numbers, strings, "
                "None and other hashable values, in tuples, lists and dicts."
            ) from None
    return leaf


def _plain_dtype(where: str, leaf: jax.Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise ArgumentTypeError(
            f"{where} is a random key, which torch has not. Pass it as `rng=`: the operations that "
            "draw random numbers will use it."
        )
    return leaf.dtype


def _without_weak_floats(arrays: list[jax.Array]) -> list[jax.Array]:
    """Gives Python floats that JAX traces, which have no dtype of their own, that of the others.

    torch takes every 0-d array for a tensor with a dtype, so they would widen float32 results.
    """
    weak = [jnp.issubdtype(a.dtype, jnp.floating) and a.weak_type for a in arrays]
    if not any(weak):
        return arrays
    others = [a.dtype for a, is_weak in zip(arrays, weak, strict=True) if not is_weak]
    floats = [dtype for dtype in others if jnp.issubdtype(dtype, jnp.floating)]
    dtype = jnp.result_type(*floats) if floats else TO_JAX[torch.get_default_dtype()]
    return [a.astype(dtype) if is_weak else a for a, is_weak in zip(arrays, weak, strict=True)]


def _spec(array: jax.Array) -> Spec:
    dtype = TO_TORCH[np.dtype(array.dtype)]
    # Without x64, JAX has int32 where torch expects its default integer (labels, indices).
    return Spec(array.shape, dtype if x64_enabled() else WIDENED.get(dtype, dtype))


class Compiled:
    """A program, jitted, with the current values of the tensors that it captured."""

    def __init__(self, name: str, program: Program) -> None:
        check_precision(program)
        self.program = program
        self._draws = draws(program)
        self._captured = [_Captured(tensor) for tensor in program.constants.values()]

        def run(arrays: list[jax.Array], constants: list[jax.Array], rng: Any) -> list[Any]:
            values = interpret(program, arrays, constants, rng)
            return [value for value in values if isinstance(value, jax.Array)]

        run.__name__ = run.__qualname__ = name
        self._run = jax.jit(run)

    def __call__(self, arrays: list[jax.Array], rng: jax.Array | None) -> Any:
        if self._draws and rng is None:
            first = self._draws[0]
            raise ArgumentValueError(
                f"rng is None, but the callable draws random numbers ({first.op}, "
                f"traced at {first.location}). Pass rng=jax.random.key(seed), or switch the module "
                "to eval()."
            )
        constants = [captured.value() for captured in self._captured]
        computed = iter(self._run(arrays, constants, rng if self._draws else None))
        return self.program.unflatten(
            [next(computed) if isinstance(out, Var) else out for out in self.program.outputs]
        )


class _Captured:
    """A tensor used by the callable without being an argument: read anew when it has changed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._seen: tuple[int | None, bool] | None = None
        self._value: jax.Array | None = None

    def value(self) -> jax.Array:
        version = None if self._tensor.is_inference() else self._tensor._version
        now = (version, x64_enabled())
        if self._value is None or self._seen != now:
            with jax.ensure_compile_time_eval():  # a value to keep, not one of a running trace
                self._value = tensor_to_jax(self._tensor, int64="int32")
            self._seen = now
        return self._value
