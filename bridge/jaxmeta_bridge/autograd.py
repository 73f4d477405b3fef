"""A JAX function of arrays as an operation of torch's autograd."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import torch
from jax.tree_util import PyTreeDef
from torch.autograd import forward_ad

from jaxmeta_bridge.dlpack import adopt, lend

# A tensor; or a number or a JAX or NumPy array, which is never differentiated.
Operand: TypeAlias = Any
Mask = tuple[bool, ...]


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Trace:
    """What tracing a program found out about its outputs; each compiled call returns it."""

    tree: PyTreeDef
    differentiable: Mask


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class _Tape:
    """How to go back from one recorded call.

    Args:
        sources: where the residuals are, in the row of operands, outputs and arrays of the tape.
        backward: compiled; of residuals and cotangents, the gradients to the operands that a mask
            over the recorded ones names.
    """

    sources: tuple[int, ...]
    backward: Callable[[list[Any], list[Any], Mask], list[jax.Array]]


class Program:
    """A JAX function of operands in a row; what is compiled of it, and its derivatives."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.run = jax.jit(self.trace)
        self._derived: dict[Any, Any] = {}

    def trace(self, *operands: Any) -> tuple[list[jax.Array], _Trace]:
        """The outputs in a row, and what they are."""
        outputs, tree = jax.tree.flatten(self.function(*operands))
        inexact = tuple(jnp.issubdtype(output.dtype, jnp.inexact) for output in outputs)
        return outputs, _Trace(tree, inexact)

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

    def function(*active: Any) -> tuple[list[Any], tuple[list[Any], _Trace]]:
        rest = iter(active)
        merged = [next(rest) if m else o for o, m in zip(operands, mask, strict=True)]
        outputs, trace = program.trace(*merged)
        return _select(outputs, trace.differentiable), (outputs, trace)

    return function, _select(operands, mask)


def _record(program: Program, mask: Mask) -> Callable[..., Any]:
    def recorded(*operands: Any) -> tuple[list[Any], _Trace, list[Any], _Tape]:
        function, active = _active(program, operands, mask)
        _, pullback, (outputs, trace) = jax.vjp(function, *active, has_aux=True)
        residuals, tree = jax.tree.flatten(pullback)
        # Most residuals are operands or outputs: those are kept once, and not as copies.
        row = [*operands, *outputs]
        places = {id(value): place for place, value in enumerate(row)}
        for residual in residuals:
            if places.setdefault(id(residual), len(row)) == len(row):
                row.append(residual)

        def backward(residuals: list[Any], cotangents: list[Any], wanted: Mask) -> list[jax.Array]:
            return _select(_conj(tree.unflatten(residuals)(_conj(cotangents))), wanted)

        sources = tuple(places[id(residual)] for residual in residuals)
        tape = _Tape(sources, jax.jit(backward, static_argnums=2))
        return outputs, trace, row[len(operands) + len(outputs) :], tape

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


class _Call:
    """One call of a program, recorded for the way back to `mask` if that names any operand."""

    def __init__(self, program: Program, mask: Mask) -> None:
        self.program = program
        self.mask = mask
        self.trace: _Trace
        self.tape: _Tape | None = None
        self.residuals: list[torch.Tensor] = []

    def run(self, operands: Sequence[Operand]) -> tuple[torch.Tensor, ...]:
        """The outputs; `trace`, and `tape` and `residuals` of a recorded call, are set."""
        lent = [lend(o) if isinstance(o, torch.Tensor) else o for o in operands]
        with jax.enable_x64(True), _placement():
            if any(self.mask):
                recorded = self.program.recorded(self.mask)
                outputs, self.trace, residuals, self.tape = recorded(*lent)
                self.residuals = [adopt(residual) for residual in residuals]
            else:
                outputs, self.trace = self.program.run(*lent)
        return tuple(adopt(output) for output in outputs)


def apply(program: Program, operands: Sequence[Operand]) -> tuple[tuple[torch.Tensor, ...], _Trace]:
    """Run `program`, as an operation of torch's own where torch has to know of it."""
    transformed = _transformed()
    recording = torch.is_grad_enabled() and not transformed
    mask = tuple(recording and isinstance(o, torch.Tensor) and o.requires_grad for o in operands)
    call = _Call(program, mask)
    if not transformed and not any(mask):
        return call.run(operands), call.trace
    outputs = _Operation.apply(call, *operands)
    return outputs, call.trace


def _transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Operation(torch.autograd.Function):
    """A call of a program, as autograd and torch.func see it.

    An ordinary backward pass continues the recorded call. One that is itself differentiated or
    transformed is a call of another program, so derivatives of any order come from JAX.
    """

    @staticmethod
    def forward(call: _Call, *operands: Operand) -> tuple[torch.Tensor, ...]:
        return call.run(operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        call, *operands = inputs
        ctx.call = call
        ctx.others = [None if isinstance(o, torch.Tensor) else o for o in operands]
        tensors = [o for o in operands if isinstance(o, torch.Tensor)]
        kept = []
        if call.tape is not None:
            row = [*operands, *output, *call.residuals]
            kept = [row[source] for source in call.tape.sources if source >= len(operands)]
            call.residuals = []
        # Through autograd's own store, which notices changes in place and frees what is used.
        ctx.save_for_backward(*tensors, *kept)
        if _transformed():
            ctx.save_for_forward(*tensors)
        fixed = [not differentiable for differentiable in call.trace.differentiable]
        ctx.mark_non_differentiable(*_select(output, fixed))

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, wanted = ctx.call, ctx.needs_input_grad[1:]
        operands, kept = _saved(ctx)
        given = _select(cotangents, call.trace.differentiable)
        if call.tape is None or torch.is_grad_enabled() or _transformed():
            gradients, _ = apply(call.program.pullback(wanted), [*operands, *given])
        else:
            gradients = _backward(call, operands, kept, given, wanted)
        return None, *_spread(gradients, wanted)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        moved = tangents[1:]
        operands, _kept = _saved(ctx)
        mask = tuple(tangent is not None for tangent in moved)
        program = ctx.call.program.pushforward(mask)
        outputs, _trace = apply(program, [*operands, *_select(moved, mask)])
        return tuple(_spread(outputs, ctx.call.trace.differentiable))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *arguments: Any
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        call, *operands = arguments
        outputs, call.trace = apply(call.program.batched(in_dims[1:]), operands)
        return outputs, (0,) * len(outputs)


def _backward(
    call: _Call,
    operands: list[Operand],
    kept: list[torch.Tensor],
    cotangents: list[torch.Tensor],
    wanted: Mask,
) -> Sequence[torch.Tensor]:
    """The gradients to `wanted`, from the tape of the call."""
    assert call.tape is not None
    rest = iter(kept)
    row = [operands[s] if s < len(operands) else next(rest) for s in call.tape.sources]
    residuals = [lend(r) if isinstance(r, torch.Tensor) else r for r in row]
    with jax.enable_x64(True), _placement():
        gradients = call.tape.backward(
            residuals, [lend(c) for c in cotangents], tuple(_select(wanted, call.mask))
        )
    return [adopt(gradient) for gradient in gradients]


def _placement() -> contextlib.AbstractContextManager[None]:
    """What JAX does not place by its operands goes where CPU tensors are."""
    device = _cpu_beside_gpu()
    return contextlib.nullcontext() if device is None else jax.default_device(device)


@functools.cache
def _cpu_beside_gpu() -> jax.Device | None:
    return None if jax.default_backend() == "cpu" else jax.devices("cpu")[0]


def _saved(ctx: Any) -> tuple[list[Operand], list[torch.Tensor]]:
    """The operands of the call, and what else was kept for its residuals."""
    tensors = iter(ctx.saved_tensors)
    operands = [next(tensors) if other is None else other for other in ctx.others]
    return operands, list(tensors)


def _select(values: Iterable[Any], mask: Iterable[bool]) -> list[Any]:
    return [value for value, chosen in zip(values, mask, strict=True) if chosen]


def _spread(values: Iterable[Any], mask: Mask) -> list[Any]:
    """The inverse of `_select`, with None in the gaps."""
    rest = iter(values)
    return [next(rest) if chosen else None for chosen in mask]
