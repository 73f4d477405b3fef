"""Records torch calls on tensors without values, and runs them as compiled JAX programs."""

from jaxmeta_bridge.recorder import attributes, autodiff, bounds, eager, inplace, queries
from jaxmeta_bridge.recorder.autodiff import grad, step_gradients
from jaxmeta_bridge.recorder.capture import capture, number
from jaxmeta_bridge.recorder.eager import to_ordinary
from jaxmeta_bridge.recorder.enter import (
    add_update,
    as_state,
    start_state,
    state_names,
    to_copies,
    to_leaf,
    to_recorded,
)
from jaxmeta_bridge.recorder.execute import settle
from jaxmeta_bridge.recorder.functions import watch_torch
from jaxmeta_bridge.recorder.graph import Value
from jaxmeta_bridge.recorder.graph import close_window as begin_stretch
from jaxmeta_bridge.recorder.tensor import Recorded, record_values, value_of, wrap
from jaxmeta_bridge.recorder.update import Settings, settings

__all__ = [
    "Recorded",
    "Settings",
    "Value",
    "add_update",
    "as_state",
    "attributes",
    "autodiff",
    "begin_stretch",
    "bounds",
    "capture",
    "eager",
    "grad",
    "inplace",
    "number",
    "queries",
    "record_values",
    "settings",
    "settle",
    "start_state",
    "state_names",
    "step_gradients",
    "to_copies",
    "to_leaf",
    "to_ordinary",
    "to_recorded",
    "value_of",
    "watch_torch",
    "wrap",
]
