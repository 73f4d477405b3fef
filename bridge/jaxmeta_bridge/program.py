"""The flat program that a traced torch callable becomes: `trace` writes it, `interpret` runs it."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as torch_tree


@dataclass(frozen=True)
class Var:
    """A value of the program: an index into the interpreter's environment."""

    index: int


@dataclass(frozen=True)
class Spec:
    """Shape and dtype that torch gives a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    # Where torch lays the value out in another order than row by row: draws follow the memory.
    strides: tuple[int, ...] | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "Spec":
        return cls(tuple(tensor.shape), tensor.dtype, strides_of(tensor))

    def empty(self) -> torch.Tensor:
        """Memory for such a value."""
        if self.strides is None:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype)


def strides_of(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The strides of a tensor that is not laid out row by row."""
    return None if tensor.is_contiguous() else tuple(tensor.stride())


@dataclass(frozen=True)
class Location:
    """Where in the user's code an operation was called."""

    module: str  # path of the innermost submodule, e.g. "encoder.layers.0"; "" outside modules
    source: str  # "file.py:12: the line itself"; "" if torch alone is on the stack

    def __str__(self) -> str:
        module = f"module '{self.module}'" if self.module else ""
        return ", ".join(part for part in (module, self.source) if part) or "unknown place"


@dataclass(frozen=True)
class Node:
    """One operation: `op(*args, **kwargs)` with `Var`s where tensors stood."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Var | None, ...]  # None where torch returned no tensor
    specs: tuple[Spec | None, ...]
    single: bool  # the operation returns one tensor rather than a tuple
    differentiable: bool  # False under torch.no_grad()
    location: Location

    def inputs(self) -> list[Var]:
        leaves, _ = torch_tree.tree_flatten((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Var)]


@dataclass(frozen=True)
class Program:
    """Operations in order, from input and constant values to output values."""

    inputs: tuple[Var, ...]
    constants: dict[Var, torch.Tensor]
    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]  # a Var where a tensor is returned, else the Python value itself
    unflatten: Callable[[list[Any]], Any]  # flat outputs -> what the torch callable returned
    changed: frozenset[Var] = frozenset()  # inputs that the callable changes in place

    def without_dead_nodes(self) -> "Program":
        """Drops what no output needs; autograd's own bookkeeping leaves such operations behind."""
        needed = {out for out in self.outputs if isinstance(out, Var)}
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if needed.intersection(out for out in node.outputs if out is not None):
                kept.append(node)
                needed.update(node.inputs())
        constants = {var: value for var, value in self.constants.items() if var in needed}
        return dataclasses.replace(self, constants=constants, nodes=tuple(reversed(kept)))
