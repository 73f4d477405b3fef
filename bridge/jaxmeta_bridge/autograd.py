"""A JAX function of arrays as an operation of torch's autograd."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import torch
from torch.autograd import forward_ad

from jaxmeta_bridge.dlpack import adopt, lend
from jaxmeta_bridge.dtypes import TO_TORCH

# A tensor; or a number or a JAX or NumPy array, which is never differentiated.
Operand: TypeAlias = Any
Mask = tuple[bool, ...]


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Trace:
    """What tracing a program found out about its outputs; each compiled call returns it."""

    tree: Any  # of the outputs
    differentiable: Mask


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Tape:
    """How to go back from one recorded call.

    Args:
        sources: where the residuals are, in the row of operands, outputs and arrays of the tape.
        backward: compiled; of a mask over the recorded operands, the residuals and the cotangents
            of the differentiable outputs: the gradients to those in the mask.
    """

    sources: tuple[int, ...]
    backward: Callable[..., list[jax.Array]]


class Program:
    """A JAX function of operands in a row; what is compiled of it, and its derivatives."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.run = jax.jit(self.trace)
        self._derived: dict[Any, Any] = {}

    def trace(self, *operands: Any) -> tuple[list[jax.Array], Trace]:
        """The outputs in a row, and what they are."""
        outputs, tree = jax.tree.flatten(self.function(*operands))
        inexact = tuple(jnp.issubdtype(output.dtype, jnp.inexact) for output in outputs)
        return outputs, Trace(tree, inexact)

    def recorded(self, mask: Mask) -> Callable[..., Any]:
        """Compiled: outputs and trace, and arrays and tape for the way back to `mask`."""
        return self._derive(_record, mask)

    def pullback(self, mask: Mask) -> "Program":
        """Of operands and cotangents of the differentiable outputs: the gradients to `mask`."""
        return self._derive(_pullback, mask)

    def pushforward(self, mask: Mask) -> "Program":
        """Of operands and tangents of `mask`: the tangents of the differentiable outputs."""
        return self._derive(_pushforward, mask)

    def batched(self, axes: tuple[int | None, ...]) -> "Program":
        """Over a batch at the given axis of each operand, and at axis 0 of each output."""
        return self._derive(_batched, axes)

    def _derive(self, make: Callable[["Program", Any], Any], argument: Any) -> Any:
        key = (make, argument)
        if key not in self._derived:
            self._derived.setdefault(key, make(self, argument))  # one for all threads
        return self._derived[key]


def _active(
    program: Program, operands: Sequence[Any], mask: Mask
) -> tuple[Callable[..., Any], list[Any]]:
    """`program` as a function of the operands in `mask` alone, and these.

    It returns the differentiable outputs, and beside them all outputs and the trace.
    """

    def function(*active: Any) -> tuple[list[Any], tuple[list[Any], Trace]]:
        rest = iter(active)
        merged = [next(rest) if m else o for o, m in zip(operands, mask, strict=True)]
        outputs, trace = program.trace(*merged)
        return _select(outputs, trace.differentiable), (outputs, trace)

    return function, _select(operands, mask)


def _record(program: Program, mask: Mask) -> Callable[..., Any]:
    def recorded(*operands: Any) -> tuple[list[Any], Trace, list[Any], list[Any], _Tape]:
        function, active = _active(program, operands, mask)
        _, pullback, (outputs, trace) = jax.vjp(function, *active, has_aux=True)
        residuals, tree = jax.tree.flatten(pullback)
        # Most residuals are operands or outputs, which are kept already, and not copied then.
        kept = {id(value) for value in (*operands, *outputs)}
        own = {id(residual): residual for residual in residuals if id(residual) not in kept}
        arrays = [array for array in own.values() if array.dtype in TO_TORCH]
        foreign = [array for array in own.values() if array.dtype not in TO_TORCH]
        row = [*operands, *outputs, *arrays, *foreign]
        places = {id(value): place for place, value in reversed(list(enumerate(row)))}

        def backward(wanted: Mask, *values: Any) -> list[jax.Array]:
            pullback = tree.unflatten(values[: len(residuals)])
            return _select(_conj(pullback(_conj(values[len(residuals) :]))), wanted)

        sources = tuple(places[id(residual)] for residual in residuals)
        tape = _Tape(sources, jax.jit(backward, static_argnums=0))
        return outputs, trace, arrays, foreign, tape

    return jax.jit(recorded)


def _pullback(program: Program, mask: Mask) -> Program:
    def function(*values: Any) -> list[jax.Array]:
        primal, active = _active(program, values[: len(mask)], mask)
        _, pullback, _ = jax.vjp(primal, *active, has_aux=True)
        return _conj(pullback(_conj(values[len(mask) :])))

    return Program(function)


def _pushforward(program: Program, mask: Mask) -> Program:
    def function(*values: Any) -> list[jax.Array]:
        primal, active = _active(program, values[: len(mask)], mask)
        return jax.jvp(primal, tuple(active), values[len(mask) :], has_aux=True)[1]

    return Program(function)


def _batched(program: Program, axes: tuple[int | None, ...]) -> Program:
    return Program(jax.vmap(program.function, in_axes=axes))


def _conj(values: Iterable[Any]) -> list[jax.Array]:
    """A complex cotangent of torch's is the conjugate of JAX's."""
    return [jnp.conj(value) for value in values]


def apply(program: Program, operands: Sequence[Operand]) -> tuple[Sequence[torch.Tensor], Trace]:
    """Run `program`, as an operation of torch's own where torch has to know of it."""
    if _transformed():
        trace, *outputs = TransformedJaxCall.apply(program, *operands)
        return outputs, trace
    if torch.is_grad_enabled():
        mask = tuple(isinstance(o, torch.Tensor) and o.requires_grad for o in operands)
        if any(mask):
            trace, *outputs = JaxCall.apply(program, mask, *operands)
            return outputs, trace
    outputs, trace = execute(program.run, operands)
    return adopt(outputs), trace


def _transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class JaxCall(torch.autograd.Function):
    """A call that keeps what its backward pass needs.

    Where that pass is itself differentiated, it is a call of another program instead, so
    derivatives of any order come from JAX, and the first one costs nothing extra.
    """

    @staticmethod
    def forward(ctx: Any, program: Program, mask: Mask, *operands: Operand) -> tuple[Any, ...]:
        arrays, trace, own, foreign, tape = execute(program.recorded(mask), operands)
        outputs = adopt(arrays)
        row = [*operands, *outputs, *adopt(own), *foreign]
        residuals = [row[source] for source in tape.sources if source >= len(operands)]
        ctx.mask, ctx.tape = mask, tape
        _save(ctx, program, operands, residuals, trace)
        return trace, *outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        operands, rest = _saved(ctx, len(wanted))
        given = _select(cotangents[1:], ctx.trace.differentiable)
        if torch.is_grad_enabled() or _transformed():
            gradients, _ = apply(ctx.program.pullback(wanted), [*operands, *given])
        else:
            others, sources = iter(rest), ctx.tape.sources
            residuals = [operands[s] if s < len(operands) else next(others) for s in sources]
            backward = functools.partial(ctx.tape.backward, tuple(_select(wanted, ctx.mask)))
            gradients = adopt(execute(backward, [*residuals, *given]))
        return None, None, *_spread(gradients, wanted)


class TransformedJaxCall(torch.autograd.Function):
    """A call inside a transformation, each of which makes it a call of another program."""

    @staticmethod
    def forward(program: Program, *operands: Operand) -> tuple[Any, ...]:
        arrays, trace = execute(program.run, operands)
        return trace, *adopt(arrays)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        program, *operands = inputs
        _save(ctx, program, operands, [], output[0])
        ctx.save_for_forward(*[o for o in operands if isinstance(o, torch.Tensor)])

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1:]
        operands, _ = _saved(ctx, len(wanted))
        given = _select(cotangents[1:], ctx.trace.differentiable)
        gradients, _ = apply(ctx.program.pullback(wanted), [*operands, *given])
        return None, *_spread(gradients, wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        moved = tangents[1:]
        operands, _ = _saved(ctx, len(moved))
        mask = tuple(tangent is not None for tangent in moved)
        program = ctx.program.pushforward(mask)
        outputs, _ = apply(program, [*operands, *_select(moved, mask)])
        return None, *_spread(outputs, ctx.trace.differentiable)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[Any, ...], tuple[int | None, ...]]:
        program, *operands = arguments
        outputs, trace = apply(program.batched(in_dims[1:]), operands)
        return (trace, *outputs), (None, *[0] * len(outputs))


def execute(compiled: Callable[..., Any], values: Iterable[Operand]) -> Any:
    """What a compiled function makes of operands, of which tensors are only lent to it."""
    lent = [lend(value) if isinstance(value, torch.Tensor) else value for value in values]
    with jax.enable_x64(True), _placement():
        return compiled(*lent)


def _placement() -> contextlib.AbstractContextManager[None]:
    """Where JAX computes with CPU tensors; those on a GPU bring their own device along."""
    device = _cpu_beside_gpu()
    return contextlib.nullcontext() if device is None else jax.default_device(device)


@functools.cache
def _cpu_beside_gpu() -> Any:
    return None if jax.default_backend() == "cpu" else jax.devices("cpu")[0]


def _save(
    ctx: Any,
    program: Program,
    operands: Sequence[Operand],
    residuals: Sequence[Any],
    trace: Trace,
) -> None:
    ctx.program, ctx.trace = program, trace
    values = [*operands, *residuals]
    ctx.others = [None if isinstance(value, torch.Tensor) else value for value in values]
    # Autograd's own store notices changes in place, and frees what a backward pass has used.
    ctx.save_for_backward(*[value for value in values if isinstance(value, torch.Tensor)])


def _saved(ctx: Any, count: int) -> tuple[list[Operand], list[Any]]:
    """The operands, `count` of them, and the residuals that are none of these."""
    tensors = iter(ctx.saved_tensors)
    values = [next(tensors) if other is None else other for other in ctx.others]
    return values[:count], values[count:]


def _select(values: Iterable[Any], mask: Iterable[bool]) -> list[Any]:
    return [value for value, chosen in zip(values, mask, strict=True) if chosen]


def _spread(values: Iterable[Any], mask: Mask) -> list[Any]:
    """The inverse of `_select`, with None in the gaps."""
    rest = iter(values)
    return [next(rest) if chosen else None for chosen in mask]
