"""Compiles plans, and runs them on the inputs of a recording."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxmeta
from jaxmeta_bridge.autograd import Program, apply, execute
from jaxmeta_bridge.dlpack import adopt
from jaxmeta_bridge.mappings import note_program
from jaxmeta_bridge.recorder.analysis import analyse, gradient_inputs
from jaxmeta_bridge.recorder.capture import leaf_tensor, linked
from jaxmeta_bridge.recorder.emit import Emitter
from jaxmeta_bridge.recorder.graph import INDEX_BITS, State, Value, note_read, value_at
from jaxmeta_bridge.recorder.history import note_run
from jaxmeta_bridge.recorder.loops import OWN, Loop, Part, find_loops
from jaxmeta_bridge.recorder.plan import Plan, make_plan, needed_windows
from jaxmeta_bridge.recorder.stretch import GradientOp
from jaxmeta_bridge.recorder.update import UpdateOp


@dataclass
class Statistics:
    """How often programs were compiled and run since the start, or since they were reset."""

    compiled: int = 0
    run: int = 0


STATISTICS = Statistics()


class CompiledPlan:
    """A plan, ready to run.

    Its operands are, in a row: the inputs that may be differentiated and those used by themselves,
    one by one; stacks of what the iterations of a loop take each for itself.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.parts = find_loops(plan.leaves, 0, len(plan.leaves))
        self.stacks = _stacks(plan, self.parts)
        stacked = {index for numbers in self.stacks.values() for index in numbers}
        single = set(range(len(plan.inputs))) - stacked | _used_alone(plan, self.parts, self.stacks)
        self.singles = sorted(single)
        emitter = Emitter(plan, self.parts, default_adjoint())
        places = {index: place for place, index in enumerate(self.singles)}
        addresses = list(self.stacks)

        def function(*operands: Any) -> list[Any]:
            stacks = dict(zip(addresses, operands[len(places) :], strict=True))
            return emitter.evaluate(lambda index: operands[places[index]], stacks)

        self.program = Program(function)
        self._gradients: dict[Any, Any] = {}
        STATISTICS.compiled += 1
        note_program()

    def gradients(self, mask: tuple[bool, ...]) -> Any:
        """Compiled: the gradients of the sum of all outputs by the operands in `mask`."""
        if mask not in self._gradients:
            function = self.program.function

            def total(active: list[Any], row: tuple[Any, ...]) -> Any:
                rest = iter(active)
                merged = [next(rest) if m else o for m, o in zip(mask, row, strict=False)]
                return sum(o.reshape(()) for o in function(*merged, *row[len(mask) :])).real

            def compute(*row: Any) -> list[Any]:
                active = [o for m, o in zip(mask, row, strict=False) if m]
                return [jnp.conj(g) for g in jax.grad(total)(active, row)]

            self._gradients[mask] = jax.jit(compute)
            note_program()
        return self._gradients[mask]

    def operands(self, inputs: Sequence[Value]) -> list[Any]:
        """The operands for these inputs."""
        row = [_operand(inputs[index]) for index in self.singles]
        for numbers in self.stacks.values():
            row.append(_stack([inputs[index].data for index in numbers]))
        return row


def _operand(value: Value) -> Any:
    return value.data if value.window is None else value.array


def _stack(items: list[Any]) -> Any:
    if isinstance(items[0], torch.Tensor):
        return torch.stack(items)
    return np.array(items, np.complex128 if isinstance(items[0], complex) else np.float64)


def _stacks(plan: Plan, parts: Sequence[Part]) -> dict[Any, list[int]]:
    """What can be stacked before the program runs: constant inputs, one an iteration."""
    found: dict[Any, list[int]] = {}
    for part in parts:
        if not isinstance(part, Loop):
            continue
        for (offset, external), role in part.roles.items():
            if role[0] != OWN:
                continue
            leaves = range(part.start + offset, part.stop, part.period)
            sources = [plan.leaves[leaf].sources[external] for leaf in leaves]
            if all(type(s) is int for s in sources):
                kinds = {plan.inputs[~s] for s in sources}
                if len(kinds) == 1 and not next(iter(kinds))[0].grad and _is_plain(kinds):
                    found[part.start, part.period, (offset, external)] = [~s for s in sources]
    return found


def _is_plain(kinds: set[Any]) -> bool:
    return all(sort is not type(None) for _, sort in kinds)


def _used_alone(plan: Plan, parts: Sequence[Part], stacks: dict[Any, list[int]]) -> set[int]:
    """Inputs that something takes by themselves, though a loop may have them in a stack as well."""
    alone = {~ref for ref in plan.wanted if type(ref) is int}
    for part in parts:
        if not isinstance(part, Loop):
            alone |= {~s for s in plan.leaves[part].sources if type(s) is int}
            continue
        for (offset, external), role in part.roles.items():
            if (part.start, part.period, (offset, external)) in stacks:
                continue
            count = 1 if role[0] != OWN else part.count
            for iteration in range(count):
                leaf = plan.leaves[part.start + iteration * part.period + offset]
                source = leaf.sources[external]
                if type(source) is int:
                    alone.add(~source)
    return alone


_PLANS: dict[Plan, CompiledPlan] = {}
_COMPILING = threading.RLock()


def compiled(plan: Plan) -> CompiledPlan:
    """The program for a plan, compiled once."""
    found = _PLANS.get(plan)
    first = found is None
    if found is None:
        with _COMPILING:
            found = _PLANS.get(plan) or _PLANS.setdefault(plan, CompiledPlan(plan))
    note_run(found, first)
    return found


def default_adjoint() -> Any:
    """How loops are differentiated unless their steps say otherwise."""
    return jaxmeta.Auto()


def compute(values: Sequence[Value]) -> None:
    """Gives each of the values its array."""
    missing = [v for v in values if v.window is not None and v.array is None]
    if not missing:
        return
    copies = {v: v.operands()[0] for v in missing if v.op.name == "detach"}
    copies = {copy: source for copy, source in copies.items() if source.window is not None}
    if copies:  # numbers that are read twice must be the same ones, to the last bit
        compute([*(v for v in missing if v not in copies), *copies.values()])
        for copy, source in copies.items():
            assert copy.window is not None
            copy.window.arrays[copy.ref] = source.array
        return
    missing += _steps_before(missing)
    plan, inputs = make_plan(missing, lambda v: v.array is not None)
    program = compiled(plan)
    STATISTICS.run += 1
    row = [o.detach() if isinstance(o, torch.Tensor) else o for o in program.operands(inputs)]
    outputs, _ = execute(program.program.run, row)
    for value, output in zip(missing, outputs, strict=True):
        assert value.window is not None
        value.window.arrays[value.ref] = output


def read(value: Value) -> torch.Tensor:
    """What a value is, as an ordinary tensor of its own without gradient."""
    if value.window is None:
        return torch.as_tensor(value.data).detach().clone()
    if value.array is None:
        compute(_together(value))
        note_read()
    tensor = _tensor(value)
    if not value.kind.grad:  # nothing leads back from here: what it was computed from may go
        value.become_input(tensor)
        return tensor.clone()
    return tensor


def _steps_before(values: Sequence[Value]) -> list[Value]:
    """What the last steps before the values left: kept, so that the next read goes on from there.

    Also the gradients that the values take, and what they take from a stretch that reads have
    ended, for the same reason.
    """
    found: list[Value] = []
    seen = {value.key for value in values}
    todo = list(values)
    for value in todo:
        window = value.window
        assert window is not None
        externals = analyse(window.state, frozenset((value.ref,))).externals
        sources = [window.externals[external] for external in externals]
        missing = [s for s in sources if s.window is not None and s.array is None]
        # A step also leaves what the model counts beside its parameters, such as batch statistics.
        stepped = {s.window for s in missing if isinstance(s.op, UpdateOp)}
        for source in missing:
            assert source.window is not None
            kept = source.window.read or source.window in stepped
            if not kept and not isinstance(source.op, GradientOp):
                continue
            new = [each for each in _together(source) if each.key not in seen]
            seen.update(each.key for each in new)
            found += new
            todo += new if isinstance(source.op, GradientOp) else []
    return found


def _together(value: Value) -> list[Value]:
    """Values that are read one after the other, as a rule.

    The parameters after a step, gradients, and all the numbers that a stretch computes: losses and
    metrics.
    """
    window, position = value.window, value.ref >> INDEX_BITS
    assert window is not None
    if not isinstance(value.op, UpdateOp | GradientOp):
        refs = () if value.kind.shape else _numbers(window.state)
        return [value, *(value_at(window, ref) for ref in refs if ref != value.ref)]
    return [value_at(window, position << INDEX_BITS | i) for i in range(len(value.op.kinds))]


def _numbers(state: State) -> tuple[int, ...]:
    """The values without dimensions in a window, those of a step or a gradient apart."""
    found = state.analyses.get("numbers")
    if found is None:
        found = state.analyses["numbers"] = tuple(
            position << INDEX_BITS | index
            for position, step in enumerate(state.steps())
            if not isinstance(step.op, UpdateOp | GradientOp)
            for index, kind in enumerate(step.op.kinds)
            if not kind.shape
        )
    return found


def with_graph(values: Sequence[Value], hide: bool = False) -> list[torch.Tensor]:
    """The values as tensors of torch's autograd, which leads to all inputs that require grad.

    Args:
      values: of the recording.
      hide: whether the gradients by the inputs will go on as ordinary tensors: then the values in
        between are out of torch's sight.
    """
    program, row, keys, inputs = _prepare(values)
    if hide:
        for window in needed_windows(values, _is_known_constant):
            window.hidden = True
    for place, index in enumerate(program.singles):
        if inputs[index].key in keys:
            row[place] = linked(inputs[index])
        elif isinstance(row[place], torch.Tensor):
            row[place] = row[place].detach()
    with torch.enable_grad():
        outputs, _ = apply(program.program, row)
    return list(outputs)


def _prepare(
    values: Sequence[Value], active: dict[Any, Value] | None = None
) -> tuple[CompiledPlan, list[Any], set[Any], list[Value]]:
    """The program for values, its operands, and keys of the inputs that gradients lead to."""
    if active is None:
        active = {value.key: value for value in gradient_inputs(values)}
    for value in active.values():
        make_leaf(value)
    plan, inputs = make_plan(values, _is_known_constant)
    program = compiled(plan)
    STATISTICS.run += 1
    # What was a leaf in the recording is an input by now.
    return program, program.operands(inputs), {value.key for value in active.values()}, inputs


def gradients(
    losses: Sequence[Value], active: dict[Any, Value]
) -> list[tuple[Value, torch.Tensor]]:
    """The gradient of the sum of the losses by each of the inputs in `active`."""
    program, row, keys, inputs = _prepare(losses, active)
    mask = tuple(
        isinstance(row[place], torch.Tensor) and inputs[index].key in keys
        for place, index in enumerate(program.singles)
    )
    row = [o.detach() if isinstance(o, torch.Tensor) else o for o in row]
    arrays = adopt(execute(program.gradients(mask), row))
    chosen = [inputs[index] for index, wanted in zip(program.singles, mask, strict=True) if wanted]
    return list(zip(chosen, arrays, strict=True))


def _tensor(value: Value) -> torch.Tensor:
    """A tensor of its own with the contents of a computed value."""
    array: Any = value.array
    return value.kind.empty().copy_(adopt([array])[0])


def settle(values: Sequence[Value]) -> None:
    """Computes values that lead no gradient back, and forgets how they came about."""
    open_ends = [v for v in values if v.window is not None and (v.leaf or not v.kind.grad)]
    compute(open_ends)
    for value in open_ends:
        value.become_input(_tensor(value).requires_grad_(value.leaf))


def _is_known_constant(value: Value) -> bool:
    return not value.kind.grad and value.array is not None


def make_leaf(value: Value) -> torch.Tensor:
    """Turns a leaf that the recording computes into an input of it."""
    if value.window is not None:
        compute([value])
        value.become_input(_tensor(value).requires_grad_())
    leaf = leaf_tensor(value)
    return value.data if leaf is None else leaf
