"""Ways of differentiating the inner loop, one a file."""

from jaxmeta.adjoint.base import Adjoint, check_adjoint
from jaxmeta.adjoint.checkpoint import StepCheckpoint
from jaxmeta.adjoint.reverse import ReverseMode

__all__ = ["Adjoint", "ReverseMode", "StepCheckpoint", "check_adjoint"]
