"""The two calls that torch makes with recorded tensors without asking `__torch_function__`.

`torch.autograd.Function.apply` would run on tensors without values, and the gradient that the
function defines would be lost. `tensor.data = recorded` would take over memory that is not there.
The first recording therefore puts a look at the arguments in front of them; nothing else changes.
"""

import functools
from typing import Any

import torch
from torch.utils import _pytree as torch_tree
from torch.utils.checkpoint import CheckpointFunction

from jaxmeta_bridge.recorder.eager import eager, to_ordinary
from jaxmeta_bridge.recorder.tensor import HANDLERS, INSIDE, Recorded, RecordsInCheckpoint


def _checkpoint(apply: Any, args: tuple[Any, ...]) -> Any:
    """A reentrant checkpoint; of a recording it keeps nothing, so that it is not needed there."""
    state = torch.get_rng_state()
    before, INSIDE.checkpoint = INSIDE.checkpoint, True
    try:
        return apply(*args)
    except RecordsInCheckpoint:
        torch.set_rng_state(state)
    finally:
        INSIDE.checkpoint = before
    return args[0](*args[2:])


@functools.cache
def watch_torch() -> None:
    """From now on, custom functions and writes to `data` notice recorded tensors."""
    _watch_functions()
    _watch_data()


def _watch_data() -> None:
    plain: Any = torch.Tensor.data

    def write(tensor: torch.Tensor, value: Any) -> None:
        if type(value) is Recorded and type(tensor) is not Recorded:
            value = to_ordinary(value).detach()
        plain.__set__(tensor, value)

    torch.Tensor.data = property(plain.__get__, write)  # type: ignore[assignment]
    # torch names the accessor by looking it up on the class.
    present: Any = torch.Tensor.data
    HANDLERS[present.__get__] = HANDLERS[plain.__get__]
    HANDLERS[present.__set__] = HANDLERS[plain.__set__]


def _watch_functions() -> None:
    original = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            return _checkpoint(functools.partial(original, cls), args)
        if not any(type(leaf) is Recorded for leaf in torch_tree.tree_leaves((args, kwargs))):
            return original(cls, *args, **kwargs)
        return eager(functools.partial(original, cls), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign]
