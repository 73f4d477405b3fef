"""Differentiate through training loops in JAX.

:func:`meta_unroll` trains parameters for some steps, and what it returns can be differentiated
in the initial parameters, the optimizer's options, the loss, the data: meta-learning,
hyperparameter optimization, data reweighting, learned losses and optimizers.
"""

from jaxmeta.adjoint import (
    Adjoint,
    Auto,
    BinomialCheckpoint,
    ForwardMode,
    MixedMode,
    NestedCheckpoint,
    ReverseMode,
    StepCheckpoint,
)
from jaxmeta.errors import (
    ArgumentKeyError,
    ArgumentTypeError,
    ArgumentValueError,
    JaxmetaError,
    NonFiniteError,
)
from jaxmeta.models import functional
from jaxmeta.unroll import Unrolled, meta_unroll

__all__ = [
    "Adjoint",
    "ArgumentKeyError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "Auto",
    "BinomialCheckpoint",
    "ForwardMode",
    "JaxmetaError",
    "MixedMode",
    "NestedCheckpoint",
    "NonFiniteError",
    "ReverseMode",
    "StepCheckpoint",
    "Unrolled",
    "functional",
    "meta_unroll",
]
