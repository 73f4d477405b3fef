"""Tensors of every kind, and the comparison of a JAX array with one, bit by bit."""

import jax
import numpy as np
import torch


def example(dtype: torch.dtype, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    if dtype.is_complex:
        return torch.randn(shape, generator=generator, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def assert_same(array: jax.Array, tensor: torch.Tensor) -> None:
    """Shape, dtype and every bit, read without the code under test."""
    assert isinstance(array, jax.Array)
    assert array.shape == tuple(tensor.shape)
    assert str(array.dtype) == str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    assert np.asarray(array).tobytes() == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


def strided_views():
    base = torch.arange(24.0).reshape(4, 6)
    complex_base = torch.complex(base, base + 0.5)
    return {
        "transposed": base.T,
        "permuted": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        "every second column": base[:, ::2],
        "expanded": torch.arange(3.0).expand(4, 3),
        "expanded scalar": torch.tensor(2.0).expand(2, 2),
        "overlapping": torch.arange(5.0).as_strided((3, 3), (1, 1)),
        "offset into a storage": base.reshape(-1)[5:9],
        "conjugate": complex_base.conj(),
        "conjugate transposed": complex_base.mH,
        "negative": complex_base.conj().imag,
        "real part": complex_base.real,
        "bfloat16 transposed": base.to(torch.bfloat16).T,
        "channels last": torch.arange(48.0)
        .reshape(2, 2, 3, 4)
        .to(memory_format=torch.channels_last),
    }
