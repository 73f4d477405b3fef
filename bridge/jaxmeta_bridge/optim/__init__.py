"""The optimizers of `torch.optim` as pure JAX, differentiable in every number."""

from jaxmeta_bridge.optim.rule import Rule
from jaxmeta_bridge.optim.table import rule_for
from jaxmeta_bridge.optim.transformation import TorchTransformation, optax_from_torch

__all__ = ["Rule", "TorchTransformation", "optax_from_torch", "rule_for"]
