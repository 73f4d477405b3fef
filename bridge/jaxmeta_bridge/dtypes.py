"""torch's dtypes and JAX's, one for one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

_TO_JAX: dict[torch.dtype, Any] = {
    torch.bool: jnp.bool_,
    torch.uint8: jnp.uint8,
    torch.uint16: jnp.uint16,
    torch.uint32: jnp.uint32,
    torch.uint64: jnp.uint64,
    torch.int8: jnp.int8,
    torch.int16: jnp.int16,
    torch.int32: jnp.int32,
    torch.int64: jnp.int64,
    torch.float8_e4m3fn: jnp.float8_e4m3fn,
    torch.float8_e5m2: jnp.float8_e5m2,
    torch.float16: jnp.float16,
    torch.bfloat16: jnp.bfloat16,
    torch.float32: jnp.float32,
    torch.float64: jnp.float64,
    torch.complex64: jnp.complex64,
    torch.complex128: jnp.complex128,
}
TO_JAX: dict[torch.dtype, np.dtype[Any]] = {t: np.dtype(j) for t, j in _TO_JAX.items()}
TO_TORCH: dict[np.dtype[Any], torch.dtype] = {j: t for t, j in TO_JAX.items()}

# What JAX has instead while its x64 mode is off.
NARROWED: dict[torch.dtype, torch.dtype] = {
    torch.uint64: torch.uint32,
    torch.int64: torch.int32,
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
}
# What an array of JAX's stands for while its x64 mode is off: torch's default integer.
WIDENED: dict[torch.dtype, torch.dtype] = {torch.int32: torch.int64}


def x64_enabled() -> bool:
    """Whether JAX has 64-bit types here, by the global setting or a local scope."""
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64
