"""Ways of differentiating the inner loop, one a file."""

from jaxmeta.adjoint.auto import Auto, resolve_adjoint
from jaxmeta.adjoint.base import Adjoint
from jaxmeta.adjoint.binomial import BinomialCheckpoint
from jaxmeta.adjoint.checkpoint import StepCheckpoint
from jaxmeta.adjoint.forward import ForwardMode
from jaxmeta.adjoint.mixed import MixedMode
from jaxmeta.adjoint.nested import NestedCheckpoint
from jaxmeta.adjoint.notes import Explanation
from jaxmeta.adjoint.notes import collect as collect_notes
from jaxmeta.adjoint.reverse import ReverseMode

__all__ = [
    "Adjoint",
    "Auto",
    "BinomialCheckpoint",
    "Explanation",
    "ForwardMode",
    "MixedMode",
    "NestedCheckpoint",
    "ReverseMode",
    "StepCheckpoint",
    "collect_notes",
    "resolve_adjoint",
]
