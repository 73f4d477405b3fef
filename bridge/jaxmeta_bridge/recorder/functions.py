"""`torch.autograd.Function` on recorded tensors.

`apply` is the one call that torch makes without asking `__torch_function__`, so a function with a
gradient of its own would run on tensors without values, and its gradient would be lost. The first
recording therefore puts a look at the arguments in front of it; nothing else changes.
"""

import functools
from typing import Any

import torch
from torch.utils import _pytree as torch_tree
from torch.utils.checkpoint import CheckpointFunction

from jaxmeta_bridge.recorder.eager import eager
from jaxmeta_bridge.recorder.tensor import INSIDE, Recorded, RecordsInCheckpoint


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
def watch_functions() -> None:
    """From now on, custom functions notice recorded tensors."""
    original = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            return _checkpoint(functools.partial(original, cls), args)
        if not any(type(leaf) is Recorded for leaf in torch_tree.tree_leaves((args, kwargs))):
            return original(cls, *args, **kwargs)
        return eager(functools.partial(original, cls), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign]
