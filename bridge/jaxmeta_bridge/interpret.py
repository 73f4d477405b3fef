"""Runs a `Program` as a JAX function: one lowering for each operation, nothing else."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch.utils import _pytree as torch_tree

from jaxmeta_bridge.aten import LOWERINGS
from jaxmeta_bridge.dtypes import NARROWED, TO_JAX, x64_enabled
from jaxmeta_bridge.errors import ConversionError
from jaxmeta_bridge.program import Node, Program, Spec, Var

# The table's values know their shape and dtype; where they are stored is JAX's business.
_IGNORED = frozenset(
    ("device", "layout", "pin_memory", "memory_format", "generator", "non_blocking", "dtype")
)


def interpret(
    program: Program, inputs: Sequence[jax.Array], constants: Sequence[Any], rng: jax.Array | None
) -> list[Any]:
    """The flat outputs of the program; traceable by JAX.

    Args:
      program: from `trace`.
      inputs: one array per program input.
      constants: one array per program constant, in the order of `program.constants`.
      rng: a JAX key; may be None if `draws(program)` is empty.
    """
    values: dict[Var, jax.Array] = dict(zip(program.inputs, inputs, strict=True))
    values.update(zip(program.constants, constants, strict=True))
    keys = _keys(rng)
    for node in program.nodes:
        try:
            _run(node, values, keys)
        except Exception as error:
            error.add_note(f"while running {node.op} of {node.location}")
            raise
    return [values[out] if isinstance(out, Var) else out for out in program.outputs]


def draws(program: Program) -> list[Node]:
    """The operations of the program that take random numbers."""
    return [node for node in program.nodes if LOWERINGS[node.op].draws]


def check_precision(program: Program) -> None:
    """Refuses a program with 64-bit floats, or numbers that need 64 bits, while JAX has none."""
    if x64_enabled():
        return
    for node in program.nodes:
        specs = [spec for spec in node.specs if spec is not None]
        wide = (s.dtype for s in specs if s.dtype in (torch.float64, torch.complex128))
        obstacle = next((f"gives {dtype}" for dtype in wide), None)
        whole = not all(s.dtype.is_floating_point for s in specs)
        if obstacle is None and whole and node.op not in _WITH_END:
            numbers = torch_tree.tree_leaves((node.args, node.kwargs))
            obstacle = next((f"is given {n}" for n in numbers if _is_wide_int(n)), None)
        if obstacle is not None:
            raise ConversionError(
                f"{node.op} {obstacle} ({node.location}), but JAX's x64 mode is off here. Call "
                "inside `with jax.enable_x64(True):`, or change the torch code."
            )


# Their end may be the largest int64, for "to the end".
_WITH_END = {torch.ops.aten.slice.Tensor, torch.ops.aten.slice_scatter.default}


def _is_wide_int(number: Any) -> bool:
    return isinstance(number, int) and not -(2**31) <= number < 2**31


def _keys(rng: jax.Array | None) -> Iterator[jax.Array]:
    for index in itertools.count():
        assert rng is not None, "a program that draws was run without a key"
        yield jax.random.fold_in(rng, index)


def _run(node: Node, values: dict[Var, jax.Array], keys: Iterator[jax.Array]) -> None:
    def read(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, Var) else leaf

    args, kwargs = torch_tree.tree_map(
        read, (node.args, {k: v for k, v in node.kwargs.items() if k not in _IGNORED})
    )
    lowering = LOWERINGS[node.op]
    if lowering.draws:
        kwargs["key"] = next(keys)
    expected = tuple(None if spec is None else _to_struct(spec) for spec in node.specs)
    results = lowering.function(expected[0] if node.single else expected, *args, **kwargs)
    for variable, struct, result in zip(
        node.outputs, expected, (results,) if node.single else results, strict=True
    ):
        if variable is not None and struct is not None and result is not None:
            result = jnp.asarray(result).astype(struct.dtype)
            assert result.shape == struct.shape, f"torch: {struct.shape}, JAX: {result.shape}"
            values[variable] = result if node.differentiable else jax.lax.stop_gradient(result)


def _to_struct(spec: Spec) -> jax.ShapeDtypeStruct:
    dtype = spec.dtype if x64_enabled() else NARROWED.get(spec.dtype, spec.dtype)
    return jax.ShapeDtypeStruct(spec.shape, TO_JAX[dtype])
