"""The errors of the bridge, all of them `jaxmeta.JaxmetaError`."""

from jaxmeta import JaxmetaError


class ConversionError(JaxmetaError, ValueError):
    """A value cannot cross between torch and JAX unchanged."""


class UnsupportedOpError(JaxmetaError, NotImplementedError):
    """A torch operation has no JAX counterpart here."""


class ControlFlowError(JaxmetaError, TypeError):
    """Python code needs the concrete value of a tensor that is being traced."""
