"""The connectionist temporal classification loss, by the forward recursion over its alignments.

torch cannot tell the shape of its own operation while tracing, so it becomes one of ours here.

Graves et al., "Connectionist temporal classification", ICML 2006.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import operands
from jaxmeta_bridge.aten.registry import decomposes, lowers

_LIBRARY = torch.library.Library("jaxmeta_bridge", "FRAGMENT")
for _overload, _lengths in (("", "int[]"), (".Tensor", "Tensor")):
    _LIBRARY.define(
        f"ctc_loss{_overload}(Tensor log_probs, Tensor targets, {_lengths} input_lengths, "
        f"{_lengths} target_lengths, int blank, bool zero_infinity) -> Tensor"
    )

_aten: Any = torch.ops.aten
_ctc_loss: Any = torch.ops.jaxmeta_bridge.ctc_loss
_IMPOSSIBLE = -1e30  # stands for log(0); finite, so that derivatives are


@torch.library.register_fake("jaxmeta_bridge::ctc_loss", lib=_LIBRARY)
@torch.library.register_fake("jaxmeta_bridge::ctc_loss.Tensor", lib=_LIBRARY)
def _shape(log_probs: torch.Tensor, *_: Any) -> torch.Tensor:
    return log_probs.new_empty(log_probs.shape[1:-1])


@decomposes(_aten._ctc_loss.default)
@decomposes(_aten._ctc_loss.Tensor)
def _decompose(
    log_probs: torch.Tensor,
    targets: torch.Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    zero_infinity: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    losses = _ctc_loss(log_probs, targets, input_lengths, target_lengths, blank, zero_infinity)
    return losses, log_probs.new_empty(0)  # the second is for torch's own backward pass


@lowers(_ctc_loss.default, _ctc_loss.Tensor)
def _lower(
    out: jax.ShapeDtypeStruct,
    log_probs: jax.Array,
    targets: jax.Array,
    input_lengths: Any,
    target_lengths: Any,
    blank: int,
    zero_infinity: bool,
) -> jax.Array:
    (log_probs,) = operands(out, log_probs)
    batched = log_probs.ndim == 3
    if not batched:
        log_probs = log_probs[:, None]
    input_lengths = jnp.asarray(input_lengths).reshape(-1)
    labels = _labels(targets, target_lengths, batched)
    losses = jax.vmap(_loss, in_axes=(1, 0, 0, 0, None))(
        log_probs, labels, input_lengths, jnp.asarray(target_lengths).reshape(-1), blank
    )
    finite = losses < -_IMPOSSIBLE / 2
    losses = jnp.where(finite, losses, 0 if zero_infinity else jnp.inf)
    return losses.reshape(out.shape)


def _labels(
    targets: jax.Array, target_lengths: Sequence[int] | jax.Array, batched: bool
) -> jax.Array:
    """The target labels by sample and place; they may come one sample after the other."""
    if targets.ndim == 2 or not batched:
        return jnp.atleast_2d(targets)
    lengths = jnp.asarray(target_lengths)
    known = not isinstance(target_lengths, jax.Array)
    longest = max(target_lengths, default=0) if known else targets.shape[0]
    places = jnp.cumsum(lengths) - lengths
    return jnp.take(targets, places[:, None] + jnp.arange(longest), mode="clip")


def _loss(
    log_probs: jax.Array, labels: jax.Array, input_length: Any, target_length: Any, blank: int
) -> jax.Array:
    """The loss of one sample: minus the log-probability of all alignments with its labels."""
    states = jnp.full(2 * labels.shape[0] + 1, blank).at[1::2].set(labels)
    skips = (states != blank) & (states != jnp.roll(states, 2))  # a blank may be left out
    emissions = log_probs[:, states]
    place = jnp.arange(states.shape[0])
    first = jnp.where(place < 2, emissions[0], _IMPOSSIBLE)

    def step(alphas: jax.Array, emission_and_time: tuple[jax.Array, jax.Array]) -> Any:
        emission, time = emission_and_time
        stay, advance = alphas, _shifted(alphas, 1)
        skip = jnp.where(skips, _shifted(alphas, 2), _IMPOSSIBLE)
        moved = jax.nn.logsumexp(jnp.stack([stay, advance, skip]), axis=0) + emission
        return jnp.where(time < input_length, moved, alphas), None

    times = jnp.arange(1, log_probs.shape[0])
    alphas, _ = lax.scan(step, first, (emissions[1:], times))
    last = 2 * target_length
    is_end = (place == last) | (place == last - 1)
    loss = -jax.nn.logsumexp(jnp.where(is_end, alphas, _IMPOSSIBLE))
    # Zero, but with the derivative exp(log_probs): torch's formula takes the log-probabilities to
    # be normalised. Behind a log_softmax it makes no difference.
    probs = jnp.exp(log_probs) * (jnp.arange(log_probs.shape[0]) < input_length)[:, None]
    return loss + jnp.sum(probs - lax.stop_gradient(probs))


def _shifted(alphas: jax.Array, by: int) -> jax.Array:
    return jnp.concatenate([jnp.full(by, _IMPOSSIBLE, alphas.dtype), alphas])[: alphas.shape[0]]
