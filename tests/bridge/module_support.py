"""Holds a converted `nn.Module` against the module itself, run by torch in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as torch_tree

from jaxmeta_bridge import from_torch, tensor_to_jax


def check_module(
    factory: Callable[[], nn.Module],
    *inputs: Any,
    order: int = 2,
    tolerance: float = 1e-8,
    **kwargs: Any,
) -> None:
    """Asserts equal outputs, new buffers, and first and second gradients by parameters and inputs.

    The second gradients are those of the squared norm of the first ones, which are gradients of a
    fixed projection of all float outputs.

    Args:
      factory: makes the module; called twice with one seed.
      inputs: positional arguments of the module; float tensors among them are differentiated by.
      order: 1 leaves the second gradients out.
      tolerance: absolute and relative.
      kwargs: keyword arguments of the module, not differentiated by.
    """
    expected = _run_in_torch(_make(factory), inputs, kwargs, order)
    actual = _run_in_jax(_make(factory), inputs, kwargs, order)
    for what, values in expected.items():
        assert actual[what].keys() == values.keys(), what
        for name, value in values.items():
            np.testing.assert_allclose(
                np.asarray(actual[what][name]),
                value.numpy(force=True),  # torch has zeros without memory
                rtol=tolerance,
                atol=tolerance,
                err_msg=f"{what} {name}",
            )


def _make(factory: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return factory().double()


_Results = dict[str, dict[Any, Any]]


def _run_in_torch(
    module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], order: int
) -> _Results:
    variables: dict[Any, torch.Tensor] = dict(module.named_parameters())
    arguments = list(inputs)
    for position in _float_positions(inputs):
        arguments[position] = inputs[position].detach().clone().requires_grad_()
        variables[position] = arguments[position]
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no second derivative
        leaves = torch_tree.tree_leaves(module(*arguments, **kwargs))
    outputs = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    projection = sum((torch.as_tensor(w) * o).sum() for w, o in _projected(outputs))
    first = _gradients(projection, variables)
    results = {"output": outputs, "buffer": dict(module.named_buffers()), "gradient": first}
    if order == 2:
        squares = sum((g * g).sum() for g in first.values())
        results["second gradient"] = _gradients(squares, variables)
    return results


def _gradients(value: Any, variables: dict[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """By each variable; zero where torch finds no way to it."""
    if not (isinstance(value, torch.Tensor) and value.requires_grad):
        return {name: torch.zeros_like(variable) for name, variable in variables.items()}
    gradients = torch.autograd.grad(
        value, list(variables.values()), create_graph=True, allow_unused=True
    )
    return {
        name: torch.zeros_like(variable) if gradient is None else gradient
        for (name, variable), gradient in zip(variables.items(), gradients, strict=True)
    }


def _run_in_jax(
    module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], order: int
) -> _Results:
    with jax.enable_x64(True):
        f = from_torch(module)
        buffers = f.buffers
        fixed, named = jax.tree.map(
            lambda leaf: tensor_to_jax(leaf) if isinstance(leaf, torch.Tensor) else leaf,
            (list(inputs), kwargs),
        )
        variables: dict[Any, jax.Array] = f.params
        variables = {("parameter", name): value for name, value in variables.items()}
        variables |= {("input", i): fixed[i] for i in _float_positions(inputs)}

        def project(variables: dict[Any, jax.Array]) -> tuple[Any, Any]:
            arguments = [variables.get(("input", i), value) for i, value in enumerate(fixed)]
            params = {name: v for (kind, name), v in variables.items() if kind == "parameter"}
            outputs, new_buffers = f(params, buffers, *arguments, **named)
            leaves = dict(enumerate(jax.tree.leaves(outputs)))
            total = sum(((w * o).sum() for w, o in _projected(leaves)), jnp.zeros(()))
            return total, (leaves, new_buffers)

        def first(variables: dict[Any, jax.Array]) -> tuple[Any, Any]:
            return jax.grad(project, has_aux=True)(variables)

        def second(variables: dict[Any, jax.Array]) -> tuple[Any, Any]:
            def squared_norm(variables: dict[Any, jax.Array]) -> tuple[Any, Any]:
                gradients, results = first(variables)
                total = sum((jnp.sum(g * g) for g in gradients.values()), jnp.zeros(()))
                return total, (gradients, results)

            return jax.grad(squared_norm, has_aux=True)(variables)

        if order == 2:
            hessian_product, (gradients, results) = jax.jit(second)(variables)
        else:
            hessian_product, (gradients, results) = {}, jax.jit(first)(variables)
        return {
            "output": results[0],
            "buffer": results[1],
            "gradient": {name: value for (_, name), value in gradients.items()},
            "second gradient": {name: value for (_, name), value in hessian_product.items()},
        }


def _float_positions(inputs: tuple[Any, ...]) -> list[int]:
    return [
        i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor) and x.is_floating_point()
    ]


def _projected(outputs: dict[int, Any]) -> list[tuple[np.ndarray, Any]]:
    """Fixed random weights for each float output."""
    generator = np.random.default_rng(0)
    return [
        (generator.normal(size=tuple(output.shape)), output)
        for output in outputs.values()
        if "float" in str(output.dtype)
    ]
