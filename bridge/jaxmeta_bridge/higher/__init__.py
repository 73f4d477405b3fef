"""A drop-in for the `higher` library: `from jaxmeta_bridge import higher`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from jaxmeta_bridge import recorder
from jaxmeta_bridge.higher import optim, patch, utils
from jaxmeta_bridge.higher.optim import create_diff_optim, get_diff_optim, register_optim
from jaxmeta_bridge.higher.patch import monkeypatch
from jaxmeta_bridge.recorder.explain import explain

__all__ = [
    "create_diff_optim",
    "explain",
    "get_diff_optim",
    "innerloop_ctx",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: torch.nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | None = None,
    copy_initial_weights: bool = True,
    override: dict[str, Any] | None = None,
    track_higher_grads: bool = True,
    adjoint: Any = None,
) -> Iterator[tuple[Any, optim.DifferentiableOptimizer]]:
    """A patched copy of a model and a differentiable optimizer of its weights.

    Args:
      model: what to train in the inner loop; it is not changed.
      opt: an optimizer of (some of) its parameters, with the options and state to start from.
      device: where to put weights, buffers and state.
      copy_initial_weights: whether the initial weights are copies that lead no gradient to the
        model's parameters; False for MAML.
      override: option -> list of values, of length 1 or one for each parameter group; tensors
        that require grad get hypergradients.
      track_higher_grads: whether gradients go through the steps; False to save memory at test
        time.
      adjoint: how the loop is differentiated, one of `jaxmeta`'s adjoints. The `higher` library
        has no such argument.

    Yields:
      The patched model and the optimizer; both go on working after the block.
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    diffopt = get_diff_optim(
        opt,
        model.parameters(),
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        adjoint=adjoint,
    )
    try:
        yield fmodel, diffopt
    finally:
        recorder.begin_stretch()  # what follows the block belongs to no task
