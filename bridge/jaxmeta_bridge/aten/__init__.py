"""The table of aten operations: importing this package fills it."""

from jaxmeta_bridge.aten import distances, linalg, linear  # noqa: F401
from jaxmeta_bridge.aten import (  # noqa: F401  (each fills the table)
    indexing,
    norms,
    ordering,
    reductions,
    shape,
)
from jaxmeta_bridge.aten.registry import DECOMPOSITIONS, LOWERINGS

__all__ = ["DECOMPOSITIONS", "LOWERINGS"]
