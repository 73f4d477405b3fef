"""Ways of differentiating the inner loop, one a file."""

from jaxmeta.adjoint.auto import Auto, resolve_adjoint
from jaxmeta.adjoint.base import Adjoint
from jaxmeta.adjoint.binomial import BinomialCheckpoint
from jaxmeta.adjoint.checkpoint import StepCheckpoint
from jaxmeta.adjoint.first_order import FirstOrder
from jaxmeta.adjoint.forward import ForwardMode
from jaxmeta.adjoint.mixed import MixedMode
from jaxmeta.adjoint.nested import NestedCheckpoint
from jaxmeta.adjoint.notes import Explanation
from jaxmeta.adjoint.notes import collect as collect_notes
from jaxmeta.adjoint.reverse import ReverseMode
from jaxmeta.adjoint.truncated import TruncatedReverse

__all__ = [
    "Adjoint",
    "Auto",
    "BinomialCheckpoint",
    "Explanation",
    "FirstOrder",
    "ForwardMode",
    "MixedMode",
    "NestedCheckpoint",
    "ReverseMode",
    "StepCheckpoint",
    "TruncatedReverse",
    "collect_notes",
    "resolve_adjoint",
]
