"""Differentiate through training loops in JAX.

:func:`meta_unroll` trains parameters for some steps, and what it returns can be differentiated
in the initial parameters, the optimizer's options, the loss, the data: meta-learning,
hyperparameter optimization, data reweighting, learned losses and optimizers.
"""

from jaxmeta.adjoint import (
    Adjoint,
    Auto,
    BinomialCheckpoint,
    FirstOrder,
    ForwardMode,
    MixedMode,
    NestedCheckpoint,
    ReverseMode,
    StepCheckpoint,
    TruncatedReverse,
)
from jaxmeta.bijectors import (
    Bijector,
    bounded,
    constrain,
    nonnegative,
    positive,
    unconstrain,
    unit_interval,
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
    "Bijector",
    "BinomialCheckpoint",
    "FirstOrder",
    "ForwardMode",
    "JaxmetaError",
    "MixedMode",
    "NestedCheckpoint",
    "NonFiniteError",
    "ReverseMode",
    "StepCheckpoint",
    "TruncatedReverse",
    "Unrolled",
    "bounded",
    "constrain",
    "functional",
    "meta_unroll",
    "nonnegative",
    "positive",
    "unconstrain",
    "unit_interval",
]
