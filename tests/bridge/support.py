"""Compares a torch function lowered to JAX with torch itself: values, dtypes and gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import _pytree as torch_tree

from jaxmeta_bridge.dtypes import TO_JAX
from jaxmeta_bridge.interpret import interpret
from jaxmeta_bridge.program import Spec
from jaxmeta_bridge.trace import trace

_TOLERANCES = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 3e-5,
    torch.complex64: 3e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


def check(
    function: Callable[..., Any],
    *tensors: torch.Tensor,
    order: int = 2,
    wrt: Sequence[int] | None = None,
    tolerance: float | None = None,
    jit: bool = True,
) -> None:
    """Asserts that `function` lowered to JAX does what it does in torch, run on the same tensors.

    Compared are shape, dtype and value of every output, and up to `order` gradients: of a random
    projection of all float outputs, then of a random projection of those gradients, and so on.

    Args:
      function: takes the tensors; returns any tree of tensors. Must be deterministic.
      tensors: its inputs; `requires_grad` is ignored.
      order: how many times to differentiate; 0 compares values only.
      wrt: positions of the inputs to differentiate by; all of float or complex dtype by default.
      tolerance: absolute and relative; by default according to the dtype.
      jit: compile one program with everything, or run operation by operation.
    """
    if wrt is None:
        wrt = [i for i, t in enumerate(tensors) if t.is_floating_point() or t.is_complex()]
    expected = _levels_in_torch(function, tensors, order, wrt)
    actual = _levels_in_jax(function, tensors, order, wrt, jit)
    for level, (ours, torchs) in enumerate(zip(actual, expected, strict=True)):
        what = f"order {level}" if level else "value"
        assert len(ours) == len(torchs), f"{what}: {len(ours)} results, torch has {len(torchs)}"
        for position, (array, tensor) in enumerate(zip(ours, torchs, strict=True)):
            _assert_close(array, tensor, f"{what}, result {position}", tolerance)


def run_in_jax(function: Callable[..., Any], *tensors: torch.Tensor, rng: Any = None) -> list[Any]:
    """The flat outputs of `function`, lowered to JAX and run on the tensors' values."""
    with jax.enable_x64(True):
        program = trace(function, [Spec.of(tensor) for tensor in tensors])
        constants = [to_array(constant) for constant in program.constants.values()]
        return interpret(program, [to_array(tensor) for tensor in tensors], constants, rng)


def to_array(tensor: torch.Tensor) -> jax.Array:
    """A JAX array of the tensor's dtype; call under x64."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous().clone()
    if tensor.dtype == torch.bfloat16:  # unknown to NumPy
        return jnp.asarray(tensor.view(torch.int16).numpy().view(jnp.bfloat16))
    return jnp.asarray(tensor.numpy())


def _levels_in_torch(
    function: Callable[..., Any], tensors: Sequence[torch.Tensor], order: int, wrt: Sequence[int]
) -> list[list[Any]]:
    inputs = [
        tensor.detach().clone().requires_grad_(order > 0 and i in wrt)
        for i, tensor in enumerate(tensors)
    ]
    results = torch_tree.tree_leaves(function(*inputs))
    levels = [results]
    for level in range(order):
        differentiated = [inputs[i] for i in wrt]
        terms = [
            (torch.as_tensor(weights) * result).real.sum().double()
            for weights, result in _projected(levels[-1], level)
            if result.requires_grad
        ]
        if terms:
            gradients: Sequence[Any] = torch.autograd.grad(
                torch.stack(terms).sum(), differentiated, create_graph=True, allow_unused=True
            )
        else:
            gradients = [None] * len(differentiated)
        levels.append(
            [
                torch.zeros_like(x) if gradient is None else gradient
                for x, gradient in zip(differentiated, gradients, strict=True)
            ]
        )
    return levels


def _levels_in_jax(
    function: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    order: int,
    wrt: Sequence[int],
    jit: bool,
) -> list[list[Any]]:
    with jax.enable_x64(True):
        program = trace(function, [Spec.of(tensor) for tensor in tensors])
        constants = [to_array(constant) for constant in program.constants.values()]
        inputs = [to_array(tensor) for tensor in tensors]

        def levels(differentiated: list[jax.Array], depth: int) -> list[list[Any]]:
            """Results and the gradients up to `depth`."""
            if depth == 0:
                merged = list(inputs)
                for i, x in zip(wrt, differentiated, strict=True):
                    merged[i] = x
                return [interpret(program, merged, constants, None)]

            def projection(differentiated: list[jax.Array]) -> tuple[Any, list[list[Any]]]:
                lower = levels(differentiated, depth - 1)
                terms = [
                    jnp.real(weights * result).sum()
                    for weights, result in _projected(lower[-1], depth - 1)
                ]
                return sum(terms, jnp.zeros(())), lower

            gradients, lower = jax.grad(projection, has_aux=True)(differentiated)
            # For a real function of z, torch's gradient is the conjugate of JAX's.
            return [*lower, [jnp.conj(gradient) for gradient in gradients]]

        def run(differentiated: list[jax.Array]) -> list[list[Any]]:
            return levels(differentiated, order)

        return (jax.jit(run) if jit else run)([inputs[i] for i in wrt])


def _projected(results: Sequence[Any], seed: int) -> list[tuple[Any, Any]]:
    """Pairs of fixed random weights (NumPy) and a result, for the float results."""
    generator = np.random.default_rng(seed)
    pairs = []
    for result in results:
        dtype = getattr(result, "dtype", None)
        if isinstance(result, torch.Tensor):
            inexact = result.is_floating_point() or result.is_complex()
        else:
            inexact = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
        if inexact:
            pairs.append((generator.normal(size=tuple(result.shape)).astype(np.float32), result))
    return pairs


def _assert_close(ours: Any, torchs: Any, what: str, tolerance: float | None) -> None:
    if not isinstance(torchs, torch.Tensor):
        number = ours.item() if isinstance(ours, jax.Array) else ours  # jit makes arrays of all
        assert number == torchs, f"{what}: {number}, torch has {torchs}"
        return
    assert tuple(ours.shape) == tuple(torchs.shape), f"{what}: {ours.shape}, torch {torchs.shape}"
    assert ours.dtype == TO_JAX[torchs.dtype], f"{what}: {ours.dtype}, torch has {torchs.dtype}"
    if tolerance is None:
        tolerance = _TOLERANCES.get(torchs.dtype, 0.0)
    torchs, array = torchs.detach().resolve_conj().resolve_neg(), np.asarray(ours)
    if torchs.dtype == torch.bfloat16:  # unknown to NumPy
        torchs, array = torchs.float(), array.astype(np.float32)
    np.testing.assert_allclose(
        array,
        torchs.numpy(force=True),  # autograd may give a tensor of zeros without storage
        rtol=tolerance,
        atol=tolerance,
        equal_nan=True,
        err_msg=what,
    )
