"""Recurrent layers: a scan over time for each layer and direction.

The operations are the bridge's own; `leaves` puts them in place of torch's recurrent functions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

import jaxmeta_bridge.leaves  # noqa: F401  (defines the operations)
from jaxmeta_bridge.aten.operands import working_dtype
from jaxmeta_bridge.aten.registry import lowers

_ops: Any = torch.ops.jaxmeta_bridge
_State = tuple[jax.Array, ...]  # one array "batch width" for each state that the cell carries
# (state, input's share of the gates, recurrent product) -> new state, whose first is the output
_Cell = Callable[[_State, jax.Array, Callable[[jax.Array], jax.Array]], _State]


def _lstm_cell(
    state: _State, inputs: jax.Array, recurrent: Callable[[jax.Array], jax.Array]
) -> _State:
    h, c = state
    i, f, g, o = jnp.split(inputs + recurrent(h), 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru_cell(
    state: _State, inputs: jax.Array, recurrent: Callable[[jax.Array], jax.Array]
) -> _State:
    (h,) = state
    input_r, input_z, input_n = jnp.split(inputs, 3, axis=-1)
    hidden_r, hidden_z, hidden_n = jnp.split(recurrent(h), 3, axis=-1)
    r, z = jax.nn.sigmoid(input_r + hidden_r), jax.nn.sigmoid(input_z + hidden_z)
    n = jnp.tanh(input_n + r * hidden_n)
    return (n + z * (h - n),)


def _simple_cell(activation: Callable[[jax.Array], jax.Array]) -> _Cell:
    def cell(
        state: _State, inputs: jax.Array, recurrent: Callable[[jax.Array], jax.Array]
    ) -> _State:
        return (activation(inputs + recurrent(state[0])),)

    return cell


def _run_direction(
    cell: _Cell,
    weights: Sequence[jax.Array],
    has_biases: bool,
    x: jax.Array,
    start: _State,
    reverse: bool,
) -> tuple[_State, jax.Array]:
    """One layer in one direction over `x` "time batch feature": last state, outputs."""
    input_weight, hidden_weight, *rest = weights
    input_bias, hidden_bias, *rest = rest if has_biases else (None, None, *rest)
    projection = rest[0] if rest else None

    def recurrent(h: jax.Array) -> jax.Array:
        return _linear(h, hidden_weight, hidden_bias)

    def step(state: _State, inputs: jax.Array) -> tuple[_State, jax.Array]:
        h, *others = cell(state, inputs, recurrent)
        h = h if projection is None else _linear(h, projection, None)
        return (h, *others), h

    return lax.scan(step, start, _linear(x, input_weight, input_bias), reverse=reverse)


def _linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    product = x @ weight.T
    return product if bias is None else product + bias


def _run_layers(
    cell: _Cell,
    x: jax.Array,
    states: Sequence[jax.Array],
    weights: Sequence[jax.Array],
    masks: Sequence[jax.Array],
    has_biases: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[jax.Array, ...]:
    """Output and last states; `states` are stacked "layer·direction batch width"."""
    dtype = working_dtype(x.dtype)
    x, states, weights, masks = jax.tree.map(
        lambda a: a.astype(dtype), (x, list(states), list(weights), list(masks))
    )
    if batch_first:
        x, masks = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), (x, masks))
    runs = states[0].shape[0]
    directions = 2 if bidirectional else 1
    per_run = len(weights) // runs
    last: list[_State] = []
    for layer in range(runs // directions):
        outputs = []
        for direction in range(directions):
            run = layer * directions + direction
            end, output = _run_direction(
                cell,
                weights[run * per_run : (run + 1) * per_run],
                has_biases,
                x,
                tuple(state[run] for state in states),
                reverse=direction == 1,
            )
            last.append(end)
            outputs.append(output)
        x = jnp.concatenate(outputs, axis=-1)
        if layer < len(masks):
            x = x * masks[layer]
    x = jnp.swapaxes(x, 0, 1) if batch_first else x
    return (x, *(jnp.stack(ends) for ends in zip(*last, strict=True)))


@lowers(_ops.lstm.default)
def _lstm(out: Any, x: jax.Array, states: Sequence[jax.Array], *rest: Any) -> tuple[jax.Array, ...]:
    return _run_layers(_lstm_cell, x, states, *rest)


def _lower_single_state(op: Any, cell: _Cell) -> None:
    @lowers(op)
    def _(out: Any, x: jax.Array, state: jax.Array, *rest: Any) -> tuple[jax.Array, ...]:
        return _run_layers(cell, x, [state], *rest)


_lower_single_state(_ops.gru.default, _gru_cell)
_lower_single_state(_ops.rnn_tanh.default, _simple_cell(jnp.tanh))
_lower_single_state(_ops.rnn_relu.default, _simple_cell(jax.nn.relu))
