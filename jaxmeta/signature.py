"""How ``loss_fn`` wants to be called, read from its signature before anything is traced."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxmeta.errors import ArgumentTypeError
from jaxmeta.trees import outline

Passing = Literal["third", "named"] | None

_KEYWORDS = ("state", "key")


def hyperparams_passing(
    loss_fn: Callable[..., Any], *, hyperparams: bool, state: bool, key: bool
) -> Passing:
    """Find out how ``loss_fn`` takes the hyperparams: third, by name, or not at all (None).

    Args:
        loss_fn: the inner loss.
        hyperparams: whether hyperparams are given to meta_unroll.
        state: whether a state is.
        key: whether a key is.

    Raises:
        ArgumentTypeError: ``loss_fn`` cannot be called with what it will be given.
    """
    if not callable(loss_fn):
        raise ArgumentTypeError(
            f"loss_fn is {outline(loss_fn)}; expected a function (params, batch) -> loss."
        )
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # written in C, without a signature: any call may be right
        return "third" if hyperparams else None
    passing = _passing(signature.parameters) if hyperparams else None
    positional = ["params", "batch", "hyperparams"][: 3 if passing == "third" else 2]
    named = [n for n, given in zip(_KEYWORDS, (state, key), strict=True) if given]
    named += ["hyperparams"] if passing == "named" else []
    try:
        signature.bind(*positional, **dict.fromkeys(named))
    except TypeError as error:
        call = ", ".join(positional + [f"{name}=" for name in named])
        raise ArgumentTypeError(
            f"loss_fn{signature} cannot be called as loss_fn({call}): {error}. meta_unroll passes "
            "(params, batch), the hyperparams to a third argument, and state= and key= where they "
            "are given to meta_unroll; bind other arguments with functools.partial."
        ) from None
    return passing


def _passing(parameters: Mapping[str, inspect.Parameter]) -> Passing:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    further = [
        parameter
        for parameter in list(parameters.values())[2:]
        if parameter.kind in positional and parameter.name not in _KEYWORDS
    ]
    if not further:
        kinds = [parameter.kind for parameter in parameters.values()]
        return "third" if inspect.Parameter.VAR_POSITIONAL in kinds else None
    third = further[0]
    if third.name == "hyperparams" and third.kind is third.POSITIONAL_OR_KEYWORD:
        return "named"
    if third.default is not third.empty:
        raise ArgumentTypeError(
            f"hyperparams= is given, and loss_fn's third argument {third.name!r} has a default, so "
            "it is unclear whether it is meant: bind it with functools.partial, or name it "
            "'hyperparams'."
        )
    return "third"
