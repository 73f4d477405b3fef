"""The exceptions that jaxmeta raises, each also one of Python's own kinds."""


class JaxmetaError(Exception):
    """Base of every error that jaxmeta raises on purpose."""


class ArgumentTypeError(JaxmetaError, TypeError):
    """An argument is of the wrong kind: another dtype, not an optimizer, not callable."""


class ArgumentValueError(JaxmetaError, ValueError):
    """An argument is of the right kind but cannot be used: another shape, structure or range."""


class ArgumentKeyError(JaxmetaError, KeyError, ValueError):
    """A function asked a tree for a key that the tree does not have."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would put the message in quotes.
        return str(self.args[0]) if self.args else ""


class NonFiniteError(JaxmetaError, FloatingPointError):
    """A loss, a gradient or an updated parameter is NaN or infinite (``debug=True``)."""
