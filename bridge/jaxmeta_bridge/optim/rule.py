"""What a torch optimizer does to one parameter, as pure JAX."""

import math
import numbers
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import torch

from jaxmeta import ArgumentKeyError, ArgumentTypeError, ArgumentValueError

State = dict[str, jax.Array]

# Numeric options as a step computes with them: arrays of JAX's widest float, which holds torch's
# Python numbers exactly where x64 is on, and tuples of such arrays (betas).
Options = Mapping[str, Any]

# The options that choose between formulas, by name, as one hashable value.
Static = tuple[tuple[str, Hashable], ...]

# The same as a step looks them up, with the parameter's own dtype as "dtype".
Flags = Mapping[str, Any]


class Spec(Protocol):
    """The shape and dtype of a parameter: an array, a tracer or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


@dataclass(frozen=True, eq=False)
class Rule:
    """One torch optimizer: what it keeps for a parameter and how it changes it.

    Every number that torch computes with is differentiable, to any order. Moments have the
    parameter's dtype and counters are int32. Half-precision parameters are updated in float32 and
    rounded once; torch rounds after each operation.

    Attributes:
        name: the class in `torch.optim`.
        numeric: the options that torch always computes with.
        switches: those that torch leaves out where they are the number 0. A tensor is never left
            out, so that it has a gradient at 0.
        flags: the options that choose between formulas, and their values where a group lacks
            them; a function gives the value of a flag that is no option.
        names: what is kept for a parameter of that shape.
        step: (param, grad, state, options, flags) to (what to add to param, new state).
        start: what is kept before the first step where that isn't zeros like the parameter.
        whole: the options that must be one number, because they apply to the tensor as a whole.
    """

    name: str
    numeric: tuple[str, ...]
    switches: tuple[str, ...]
    flags: Mapping[str, Any]
    names: Callable[[Spec, Flags], tuple[str, ...]]
    step: Callable[[jax.Array, jax.Array, State, Options, Flags], tuple[jax.Array, State]]
    start: Mapping[str, Callable[[Spec, Options, Flags], jax.Array]] = field(default_factory=dict)
    whole: tuple[str, ...] = ()

    def split(self, group: Mapping[str, Any]) -> tuple[dict[str, Any], Static]:
        """The (numeric, static) options of one of `optimizer.param_groups`.

        `numeric` maps names to numbers, tensors, arrays or tuples of these; `static` is hashable.
        Options without an effect on the numbers (foreach, fused, capturable, ...) are in neither.
        """
        flags: dict[str, Any] = {}
        for name, default in self.flags.items():
            value = group.get(name, default)
            flags[name] = value() if callable(value) else _plain(value)
        numeric = {name: self._given(group, name) for name in self.numeric}
        for name in self.switches:
            value = self._given(group, name)
            flags[name] = not (isinstance(value, numbers.Number) and value == 0)
            if flags[name]:
                numeric[name] = value
        return numeric, tuple(flags.items())

    def init(self, param: Spec, numeric: Mapping[str, Any], static: Static) -> State:
        """What is kept for `param` before its first step."""
        self._check(param)
        return self._init(param, self._options(numeric, param), dict(static))

    def load(
        self, torch_state: Mapping[str, Any], param: Spec, static: Static
    ) -> dict[str, torch.Tensor]:
        """`optimizer.state[p]` under the names of `init`; {} if torch has not stepped `p` yet.

        A name that torch lacks, because an option was switched on later, is left out; `update`
        begins with `init`'s value there.
        """
        found = {name: value for name, value in torch_state.items() if value is not None}
        # Adagrad makes its state before the first step, from an option: that is init's task.
        if not found or ("step" in found and int(found["step"]) == 0):
            return {}
        if "momentum_buffer" in found:
            found["started"] = True
        wanted = self.names(param, dict(static))
        dtypes = {"step": torch.int32, "started": torch.bool}
        return {
            name: torch.as_tensor(found[name], dtype=dtypes.get(name))
            for name in wanted
            if name in found
        }

    def change(
        self,
        param: jax.Array,
        grad: jax.Array,
        state: Mapping[str, jax.Array],
        numeric: Mapping[str, Any],
        static: Static,
    ) -> tuple[jax.Array, State]:
        """What one step adds to `param`, in at least float32, and the new state."""
        self._check(param)
        options = self._options(numeric, param)
        flags = {**dict(static), "dtype": param.dtype}
        if any(name not in state for name in self.names(param, flags)):
            state = {**self._init(param, options, flags), **state}
        work = jnp.promote_types(param.dtype, jnp.float32)
        grad = jnp.asarray(grad, work)
        delta, new_state = self.step(
            jnp.asarray(param, work),
            -grad if flags.get("maximize") else grad,
            {name: _at_least_float32(value) for name, value in state.items()},
            options,
            flags,
        )
        cast = {name: value.astype(state[name].dtype) for name, value in new_state.items()}
        return delta, {**state, **cast}

    def update(
        self,
        param: jax.Array,
        grad: jax.Array,
        state: Mapping[str, jax.Array],
        numeric: Mapping[str, Any],
        static: Static,
    ) -> tuple[jax.Array, State]:
        """(new param, new state) after one step; dtypes stay, whatever the options have.

        Args:
            param: of a real float dtype.
            grad: of the parameter's shape.
            state: from `init`, `load` or the step before.
            numeric: from `split`, each an array or a number; an array of the parameter's shape
                applies element by element.
            static: from `split`.
        """
        delta, state = self.change(param, grad, state, numeric, static)
        return (param.astype(delta.dtype) + delta).astype(param.dtype), state

    def _init(self, param: Spec, options: Options, flags: Flags) -> State:
        starts = {"step": _zero, "started": _no, **self.start}
        return {
            name: starts.get(name, _zeros)(param, options, flags)
            for name in self.names(param, flags)
        }

    def _given(self, group: Mapping[str, Any], name: str) -> Any:
        if name not in group:
            raise ArgumentKeyError(
                f"The options of {self.name} lack {name!r}; given: {sorted(map(str, group))}."
            )
        value = group[name]
        if isinstance(value, tuple | list):
            # None, Adafactor's first eps, stands for a number that depends on the dtype.
            return tuple(number for number in value if number is not None)
        return value

    def _options(self, numeric: Mapping[str, Any], param: Spec) -> Options:
        return {
            name: tuple(self._array(name, v, param) for v in value)
            if isinstance(value, tuple)
            else self._array(name, value, param)
            for name, value in numeric.items()
        }

    def _array(self, name: str, value: Any, param: Spec) -> jax.Array:
        array = jnp.asarray(value, jnp.result_type(float))
        shape = tuple(param.shape)
        if array.size == 1:
            return array.reshape(())
        if name in self.whole:
            raise ArgumentValueError(
                f"{name} of {self.name} has shape {array.shape}; expected one number, because "
                "it applies to a parameter as a whole."
            )
        if array.shape != shape:
            raise ArgumentValueError(
                f"{name} of {self.name} has shape {array.shape} for a parameter of shape {shape}; "
                "expected one number or an array of the parameter's shape."
            )
        return array

    def _check(self, param: Spec) -> None:
        if not jnp.issubdtype(param.dtype, jnp.floating):
            pairs = jnp.issubdtype(param.dtype, jnp.complexfloating)
            remedy = "optimize torch.view_as_real(param)" if pairs else "convert it to a float"
            raise ArgumentTypeError(
                f"{self.name} got a parameter of dtype {param.dtype}; expected a real float: "
                f"{remedy}."
            )


def slots(*names: str, **switched: str) -> Callable[[Spec, Flags], tuple[str, ...]]:
    """`names`, and each of `switched` (a flag to a name) whose flag is on."""

    def kept(param: Spec, flags: Flags) -> tuple[str, ...]:
        return names + tuple(name for flag, name in switched.items() if flags[flag])

    return kept


def like(array: jax.Array, value: jax.Array | float) -> jax.Array:
    """`value` in the dtype of `array`: the last thing that torch does to a number, too."""
    return jnp.asarray(value, array.dtype)


def average(old: jax.Array, new: jax.Array, decay: jax.Array) -> jax.Array:
    """The moving average decay · old + (1 − decay) · new."""
    return like(old, decay) * old + like(old, 1 - decay) * new


def decayed(grad: jax.Array, param: jax.Array, options: Options, flags: Flags) -> jax.Array:
    """`grad` with that of the penalty ½ weight_decay |param|² added."""
    if not flags["weight_decay"]:
        return grad
    return grad + like(param, options["weight_decay"]) * param


def scalar_dtype() -> str:
    """The dtype of the scalars that torch keeps in the state of a parameter of any dtype."""
    return "float64" if torch.get_default_dtype() is torch.float64 else "float32"


def joint_shape(*options: jax.Array) -> tuple[int, ...]:
    """The shape of what is computed from `options`, some of which may be elementwise."""
    return jnp.broadcast_shapes(*(option.shape for option in options))


def _at_least_float32(value: jax.Array) -> jax.Array:
    value = jnp.asarray(value)
    if jnp.issubdtype(value.dtype, jnp.floating):
        return value.astype(jnp.promote_types(value.dtype, jnp.float32))
    return value


def _plain(value: Any) -> Any:
    """A flag as Python's own kind: overrides may hold it in a tensor."""
    return value.item() if hasattr(value, "item") and math.prod(value.shape) == 1 else value


def _zero(param: Spec, options: Options, flags: Flags) -> jax.Array:
    return jnp.zeros((), jnp.int32)


def _no(param: Spec, options: Options, flags: Flags) -> jax.Array:
    return jnp.zeros((), jnp.bool_)


def _zeros(param: Spec, options: Options, flags: Flags) -> jax.Array:
    return jnp.zeros(param.shape, param.dtype)
