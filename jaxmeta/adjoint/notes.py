"""What an adjoint chose and why, collected while a loop is traced."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_lines: ContextVar[list[str] | None] = ContextVar("lines", default=None)


@contextlib.contextmanager
def collect() -> Iterator[list[str]]:
    """Collect what is noted inside, each sentence once."""
    lines: list[str] = []
    token = _lines.set(lines)
    try:
        yield lines
    finally:
        _lines.reset(token)


def note(line: str) -> None:
    """Add a sentence to the collection, where there is one."""
    lines = _lines.get()
    if lines is not None and line not in lines:
        lines.append(line)


@jax.tree_util.register_static
class Explanation(str):
    """A sentence that travels with arrays through JAX's transformations.

    Any two are equal to JAX, so that results of loops that differ in nothing else have one tree
    structure.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Explanation)

    def __hash__(self) -> int:
        return hash(Explanation)
