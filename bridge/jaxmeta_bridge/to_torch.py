"""A JAX function as a function of torch tensors, differentiable by torch's autograd."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer

from jaxmeta_bridge.autograd import Operand, Program, apply
from jaxmeta_bridge.dlpack import check_array_dtype, check_tensor, is_wrapped
from jaxmeta_bridge.errors import ConversionError
from jaxmeta_bridge.keys import function_key


def to_torch(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, written in JAX, as a function of torch tensors that autograd knows.

    The result takes and returns trees (dicts, lists, tuples, named tuples, classes registered
    with `jax.tree_util`; None stays None) as positional and keyword arguments:

    - Tensors keep their dtype, 64-bit ones included, whatever JAX's settings are; results lie on
      the device of the inputs and are new tensors, even where `function` returns an input.
    - Floating-point and complex tensors are differentiated, to any order, by `backward`,
      `torch.autograd.grad`, forward-mode AD and the transformations of `torch.func`.
    - Numbers are traced, without a dtype of their own, so a new value compiles nothing; bools are
      fixed while compiling, so `function` may branch on them. JAX and NumPy arrays, random keys
      for instance, are inputs too. None of these are differentiated.
    - Every array or number that `function` returns becomes a tensor.

    `function` is traced and compiled once for each structure, shapes and dtypes, as under
    `jax.jit`, so it must be pure; bind what must be a plain number while tracing, such as a number
    of steps, with `functools.partial`. It is traced anew when a module whose `from_torch` it calls
    has changed its mode or attributes, or a variable that it closes over is bound anew.
    `torch.autocast` has no effect on it.

    Raises:
        ConversionError: when called, if an argument or a result is not such a value.

    Example:
        >>> norm = to_torch(lambda x: jnp.sqrt(jnp.sum(x**2)))
        >>> x = torch.tensor([3.0, 4.0], requires_grad=True)
        >>> norm(x).backward()
        >>> x.grad
        tensor([0.6000, 0.8000])
    """
    programs: dict[Any, tuple[Program, list[str]]] = {}

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        bools = tuple(leaf if type(leaf) is bool else None for leaf in leaves)
        key = (tree, bools, function_key(function))
        bound = programs.get(key)
        if bound is None:
            bound = programs.setdefault(key, _bind(function, (args, kwargs), bools))
        program, names = bound
        operands = [_operand(leaf, name) for leaf, name in zip(leaves, names, strict=True)]
        _check_devices(operands, names)
        outputs, trace = apply(program, operands)
        return trace.tree.unflatten(outputs)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # torch cannot look into JAX: split its graph here
            return torch.compiler.disable(run)(*args, **kwargs)
        return run(*args, **kwargs)

    return call


def _bind(
    function: Callable[..., Any], arguments: Any, bools: tuple[bool | None, ...]
) -> tuple[Program, list[str]]:
    """`function` of the leaves of its arguments in a row, and what to call these."""
    label = getattr(function, "__name__", type(function).__name__)
    paths, tree = jax.tree_util.tree_flatten_with_path(arguments)
    names = [
        f"{('args', 'kwargs')[path[0].idx]}{jax.tree_util.keystr(path[1:])} of {label}"
        for path, _ in paths
    ]

    def of_leaves(*operands: Any) -> Any:
        leaves = [
            operand if fixed is None else fixed
            for operand, fixed in zip(operands, bools, strict=True)
        ]
        args, kwargs = tree.unflatten(leaves)
        result = function(*args, **kwargs)
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: _output(leaf, f"result{jax.tree_util.keystr(path)} of {label}"),
            result,
        )

    return Program(of_leaves), names


def _operand(leaf: Any, name: str) -> Operand:
    if isinstance(leaf, torch.Tensor):
        if not is_wrapped(leaf):
            check_tensor(leaf, name)
        return leaf
    if isinstance(leaf, Tracer):
        raise ConversionError(
            f"{name} is a tracer of JAX: inside jit, grad or vmap call the JAX function itself, "
            "without to_torch."
        )
    if isinstance(leaf, (np.ndarray, np.generic)):
        return np.array(leaf)  # its owner may change it before the backward pass
    if isinstance(leaf, (int, float, complex, jax.Array)):
        return leaf
    raise ConversionError(
        f"{name} is a {type(leaf).__name__}; expected tensors, numbers, arrays or None, in dicts, "
        "lists, tuples or classes registered with jax.tree_util. Bind anything else with "
        "functools.partial before to_torch."
    )


def _check_devices(operands: list[Operand], names: list[str]) -> None:
    devices = {operand.device for operand in operands if isinstance(operand, torch.Tensor)}
    if len(devices) > 1:
        where = ", ".join(
            f"{name} on {operand.device}"
            for operand, name in zip(operands, names, strict=True)
            if isinstance(operand, torch.Tensor)
        )
        raise ConversionError(f"Tensors on several devices: {where}. Move them to one.")


def _output(leaf: Any, name: str) -> jax.Array:
    if isinstance(leaf, (bool, int, float, complex, np.ndarray, np.generic)):
        leaf = jnp.asarray(leaf)
    if not isinstance(leaf, jax.Array):
        raise ConversionError(
            f"{name} is a {type(leaf).__name__}; expected JAX arrays, numbers or None, in dicts, "
            "lists, tuples or classes registered with jax.tree_util."
        )
    check_array_dtype(leaf, name)
    return leaf
