"""The torch front end of jaxmeta: torch callables as JAX functions, and the way back.

`jaxmeta_bridge.higher` is a drop-in for the `higher` library; it is imported on its own.
"""

from jaxmeta_bridge.dlpack import tensor_to_jax, tensor_to_torch, tree_to_jax, tree_to_torch
from jaxmeta_bridge.errors import ControlFlowError, ConversionError, UnsupportedOpError
from jaxmeta_bridge.from_torch import ModuleFunction, TensorFunction, from_torch
from jaxmeta_bridge.optim import TorchTransformation, optax_from_torch
from jaxmeta_bridge.to_torch import to_torch

__all__ = [
    "ControlFlowError",
    "ConversionError",
    "ModuleFunction",
    "TensorFunction",
    "TorchTransformation",
    "UnsupportedOpError",
    "from_torch",
    "optax_from_torch",
    "tensor_to_jax",
    "tensor_to_torch",
    "to_torch",
    "tree_to_jax",
    "tree_to_torch",
]
