"""Scaled dot-product attention."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import torch

from jaxmeta_bridge.aten.normalization import safe_softmax
from jaxmeta_bridge.aten.operands import working_dtype
from jaxmeta_bridge.aten.registry import lowers

aten: Any = torch.ops.aten


@lowers(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _attention(
    out: tuple[jax.ShapeDtypeStruct, ...],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: jax.Array | None = None,
    scale: float | None = None,
) -> tuple[jax.Array, None]:
    """Attention of "batch head query width"; several query heads may share a key head."""
    heads = query.shape[1]
    key, value = (jnp.repeat(a, heads // a.shape[1], axis=1) for a in (key, value))
    dtype = working_dtype(query.dtype)
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=dtype)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if attn_mask is not None:
        scores = scores + attn_mask.astype(dtype)
    if is_causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    weights = safe_softmax(scores, axis=-1)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=dtype), None
