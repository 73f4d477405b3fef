"""The table of aten operations: importing this package fills it."""

from jaxmeta_bridge.aten import (  # noqa: F401  (each fills the table)
    activations,
    arithmetic,
    attention,
    comparison,
    convolution,
    ctc,
    distances,
    elementwise,
    embedding,
    factories,
    indexing,
    linalg,
    linear,
    losses,
    normalization,
    norms,
    ordering,
    padding,
    patches,
    pooling,
    random,
    recurrent,
    reductions,
    resize,
    sampling,
    shape,
    special,
)
from jaxmeta_bridge.aten.registry import DECOMPOSITIONS, LOWERINGS

__all__ = ["DECOMPOSITIONS", "LOWERINGS"]
