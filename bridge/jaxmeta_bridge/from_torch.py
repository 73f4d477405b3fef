"""`from_torch`: a torch module or function as a pure JAX function."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
import torch
from torch import nn

from jaxmeta import ArgumentKeyError, ArgumentTypeError, ArgumentValueError
from jaxmeta_bridge import modules
from jaxmeta_bridge.calls import Call, Compiled
from jaxmeta_bridge.dlpack import tensor_to_jax
from jaxmeta_bridge.dtypes import x64_enabled
from jaxmeta_bridge.keys import function_key, module_key
from jaxmeta_bridge.settings import TRACING
from jaxmeta_bridge.trace import trace


@overload
def from_torch(target: nn.Module) -> "ModuleFunction": ...  # pyright: ignore[reportOverlappingOverload]
@overload
def from_torch(target: Callable[..., Any]) -> "TensorFunction": ...


def from_torch(target: nn.Module | Callable[..., Any]) -> "ModuleFunction | TensorFunction":
    """Turns a torch module or function into a pure JAX function.

    The torch code is traced once per call signature (shapes, dtypes, structure and plain Python
    values of the arguments, the module's attributes such as `training`), lowered to JAX and cached.
    The result composes with `jax.jit`, `grad`, `jvp`, `vmap` and the rest, to any order. Dtypes are
    torch's own; while JAX's x64 mode is off, int32 stands for torch's int64, and float64 is an
    error.

    `to_torch` and `meta_unroll` notice when the mode or attributes of a module change that their
    function calls; a `jax.jit` of your own does not: after `eval()`, make that function anew. The
    values of `f.params` and `f.buffers` are those of the time when they are read: inside a function
    that is compiled, that is once, so pass them as arguments.

    Args:
      target: an `nn.Module`, or a function of tensors. A module is left as it is; while another
        thread traces it, its parameters are placeholders, so do not run it in torch meanwhile.

    Returns:
      A `ModuleFunction` for a module, `outputs, new_buffers = f(params, buffers, *inputs)`;
      a `TensorFunction` for a function, `outputs = g(*inputs)`.

    Raises:
      ArgumentTypeError: `target` is neither.
      ConversionError: at once, if the module has tensors without values or is compiled already.
      UnsupportedOpError, ControlFlowError: at the first call with a new signature, naming the
        operations, their modules and source lines.

    Example:
      >>> import jax, jax.numpy as jnp, torch
      >>> from jaxmeta_bridge import from_torch
      >>> f = from_torch(torch.nn.Linear(3, 2))
      >>> def loss(params, x):
      ...     y, _ = f(params, f.buffers, x)
      ...     return jnp.sum(y**2)
      >>> jax.grad(loss)(f.params, jnp.ones((4, 3)))["weight"].shape
      (2, 3)
    """
    if isinstance(target, nn.Module):
        return ModuleFunction(target)
    if isinstance(target, type) or not callable(target):
        raise ArgumentTypeError(
            f"target is {target!r}; from_torch expects an nn.Module instance or a function of "
            "tensors."
        )
    return TensorFunction(target)


class TensorFunction:
    """A torch function as a pure JAX function of its tensors; made by `from_torch`.

    Tensors that the function uses without taking them as arguments are constants: read again when
    torch says that they have changed, but fixed in what `jax.jit` compiles. One that requires grad
    is refused, since its gradient would be lost. An argument that the function changes in place is
    changed in the function only.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: dict[Hashable, Compiled] = {}

    def __jaxmeta_key__(self) -> Hashable:
        """What a program that calls this depends on; `meta_unroll` and `to_torch` ask for it."""
        return function_key(self._function)

    def __call__(self, *args: Any, rng: jax.Array | None = None, **kwargs: Any) -> Any:
        """Calls the function on trees of JAX arrays and plain Python values.

        Args:
          *args: as the torch function takes them, JAX arrays in place of tensors.
          rng: a JAX key; needed if the function draws random numbers.
          **kwargs: as the torch function takes them.
        """
        _check_key(rng)
        call = Call.of(args=args, kwargs=kwargs)
        key = (call.signature, function_key(self._function), _ambient())
        if key not in self._compiled:

            def function(*tensors: torch.Tensor) -> Any:
                parts = call.rebuild(tensors)
                return self._function(*parts["args"], **parts["kwargs"])

            with TRACING:
                program = trace(function, call.specs)
            self._compiled[key] = Compiled(_name(self._function), program)
        return self._compiled[key](call.arrays, rng)


class ModuleFunction:
    """An `nn.Module` as a pure JAX function of its parameters and buffers; made by `from_torch`."""

    def __init__(self, module: nn.Module) -> None:
        modules.check_convertible(module)
        self._module = module
        self._compiled: dict[Hashable, Compiled] = {}

    def __jaxmeta_key__(self) -> Hashable:
        """What a program that calls this depends on; `meta_unroll` and `to_torch` ask for it."""
        return module_key(self._module)

    @property
    def params(self) -> dict[str, jax.Array]:
        """The module's present parameters by torch's names, copied; tied ones stand once."""
        with TRACING:
            return {k: tensor_to_jax(p) for k, p in self._module.named_parameters()}

    @property
    def buffers(self) -> dict[str, jax.Array]:
        """The module's present buffers by torch's names, copied; int64 is int32 without x64."""
        with TRACING:
            return {k: tensor_to_jax(b, int64="int32") for k, b in self._module.named_buffers()}

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters with `requires_grad=False`."""
        with TRACING:
            named = list(self._module.named_parameters())
        return frozenset(name for name, parameter in named if not parameter.requires_grad)

    def partition(
        self, params: Mapping[str, jax.Array]
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Splits `params` into (trainable, frozen); `trainable | frozen` joins them again."""
        frozen = self.frozen
        return (
            {k: v for k, v in params.items() if k not in frozen},
            {k: v for k, v in params.items() if k in frozen},
        )

    def __call__(
        self,
        params: Mapping[str, jax.Array],
        buffers: Mapping[str, jax.Array],
        *inputs: Any,
        rng: jax.Array | None = None,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """Computes `module(*inputs, **kwargs)` with the given parameters and buffers.

        Args:
          params: one array per parameter, keys and shapes as in `self.params`; any float dtype.
          buffers: one array per buffer, keys and shapes as in `self.buffers`.
          *inputs: as `forward` takes them, JAX arrays in place of tensors.
          rng: a JAX key; needed if the module draws random numbers (dropout in train mode).
          **kwargs: as `forward` takes them.

        Returns:
          outputs: what `forward` returns, with JAX arrays.
          new_buffers: the buffers after the call (batch statistics, counters).

        Raises:
          ArgumentKeyError, ArgumentValueError, ArgumentTypeError: wrong keys, shapes or values.
        """
        _check_key(rng)
        with TRACING:  # while another thread traces, the module holds other tensors
            params = _ordered("params", params, dict(self._module.named_parameters()))
            buffers = _ordered("buffers", buffers, dict(self._module.named_buffers()))
            call = Call.of(params=params, buffers=buffers, args=inputs, kwargs=kwargs)
            key = (call.signature, module_key(self._module), _ambient())
            if key not in self._compiled:
                self._compiled[key] = self._compile(call)
        return self._compiled[key](call.arrays, rng)

    def _compile(self, call: Call) -> Compiled:
        def function(*tensors: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]]:
            parts = call.rebuild(tensors)
            state = parts["params"] | parts["buffers"]
            outputs = torch.func.functional_call(
                self._module, state, parts["args"], parts["kwargs"]
            )
            return outputs, {name: state[name] for name in parts["buffers"]}

        modules.check_without_gradient_hooks(self._module)
        names = {id(child): name for name, child in self._module.named_modules()}
        with modules.unchanged(self._module):
            modules.make_traceable(self._module)
            program = trace(function, call.specs, names)
        for name, variable in call.rebuild(program.inputs)["params"].items():
            if variable in program.changed:
                raise ArgumentValueError(
                    f"the module changes its parameter '{name}' in place when it is called; a pure "
                    "function cannot. Register it as a buffer, or move the change out of forward."
                )
        return Compiled(type(self._module).__name__, program)


def _ordered(
    argument: str, given: Mapping[str, Any], expected: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """`given` in the module's order, after checking keys and shapes."""
    if not isinstance(given, Mapping):
        raise ArgumentTypeError(
            f"{argument} is a {type(given).__name__}; expected a dict like f.{argument}."
        )
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected]
    if missing or unknown:
        raise ArgumentKeyError(
            f"{argument} has the wrong keys: missing {missing}, unknown {unknown}. Expected those "
            f"of f.{argument}: {list(expected)}."
        )
    for name, tensor in expected.items():
        shape = getattr(given[name], "shape", None)
        is_float = tensor.is_floating_point() or tensor.is_complex()
        if isinstance(given[name], jax.Array) and is_float != jnp.issubdtype(
            given[name].dtype, jnp.inexact
        ):
            raise ArgumentTypeError(
                f"{argument}['{name}'] is {given[name].dtype}; the module's is {tensor.dtype}. "
                "Give floats for floats and integers for integers."
            )
        if shape != tuple(tensor.shape):
            raise ArgumentValueError(
                f"{argument}['{name}'] has shape {shape}; the module's has {tuple(tensor.shape)}. "
                "Under jax.vmap, map over the leading axis (in_axes)."
            )
    return {name: given[name] for name in expected}


def _check_key(rng: Any) -> None:
    if rng is not None and not isinstance(rng, jax.Array):
        raise ArgumentTypeError(
            f"rng is {rng!r}; expected a JAX key, such as jax.random.key(0), or None."
        )


def _ambient() -> Hashable:
    """Settings outside the arguments that decide what a trace gives."""
    return (x64_enabled(), torch.get_default_dtype())


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
