"""Tells a user what was recorded, how it will run, and what made it run so far."""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import torch

from jaxmeta import ArgumentTypeError
from jaxmeta_bridge.recorder.execute import STATISTICS
from jaxmeta_bridge.recorder.graph import INDEX_BITS, INDEX_MASK, Kind
from jaxmeta_bridge.recorder.history import RUNS
from jaxmeta_bridge.recorder.loops import CARRIED, FIXED, OWN, Loop, Part, find_loops
from jaxmeta_bridge.recorder.plan import Leaf, Plan, make_plan
from jaxmeta_bridge.recorder.stretch import GradientOp, Stretch
from jaxmeta_bridge.recorder.tensor import Recorded

_WIDTH = 96
_OPERATIONS = 24  # of a segment that are named


def explain(tensor: torch.Tensor | None = None) -> str:
    """What the recording of an inner loop is, and what made programs run.

    Nothing is computed by it. A segment is what was recorded from one optimizer step to the next;
    a stretch of equal segments, each going on from the one before, is one `lax.scan`, and one of
    segments that do not depend on each other one `vmap`.

    Args:
      tensor: what an inner loop made, such as a meta-loss: the program that `backward()` of it
        runs is described first. Without it, only what has run so far is.

    Returns:
      Text to print.

    Raises:
      ArgumentTypeError: `tensor` is not a recorded one.

    Example:
      >>> import torch
      >>> from jaxmeta_bridge import higher
      >>> model = torch.nn.Linear(2, 1)
      >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
      >>> x = torch.ones(4, 2)
      >>> with higher.innerloop_ctx(model, sgd) as (fmodel, diffopt):
      ...     for _ in range(5):
      ...         _ = diffopt.step(fmodel(x).square().mean())
      >>> [line.strip() for line in higher.explain(fmodel.weight).splitlines() if "scan" in line]
      ['5 steps in a lax.scan: gradient of (Linear, square, mean), SGD']
    """
    parts: list[str] = []
    if tensor is not None:
        if type(tensor) is not Recorded:
            raise ArgumentTypeError(
                f"tensor is a {type(tensor).__name__}; expected a recorded tensor, which is what "
                "the patched module and the differentiable optimizer return, and what torch "
                "makes of these."
            )
        parts += _describe(tensor)
    return "\n".join([*parts, *_history()])


def _describe(tensor: Recorded) -> Iterator[str]:
    value = tensor._value
    if value.window is None:
        yield f"{_kind(value.kind)}: an input, there is nothing to compute."
        return
    plan, _ = make_plan([value], lambda v: not v.kind.grad and v.array is not None)
    loops = find_loops(plan.leaves, 0, len(plan.leaves))
    yield f"{_kind(value.kind)}, from {_count(len(plan.leaves), 'segment')}"
    yield from _inputs(plan)
    yield from _parts(plan, loops, "  ")


def _inputs(plan: Plan) -> Iterator[str]:
    yield from _wrap(f"  inputs: {_summary(map(_input_kind, plan.inputs))}", "    ")


def _parts(plan: Plan, parts: Sequence[Part], indent: str) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Loop):
            yield from _loop(plan, part, indent)
        else:
            yield from _wrap(f"{indent}once: {_operations(plan.leaves[part])}", indent + "  ")


def _loop(plan: Plan, loop: Loop, indent: str) -> Iterator[str]:
    if loop.independent:
        head = f"{loop.count} times side by side in a vmap"
    else:
        head = f"{loop.count} steps in a lax.scan"
    deeper = indent + "  "
    if loop.period == 1:
        yield from _wrap(f"{indent}{head}: {_operations(plan.leaves[loop.start])}", deeper)
    else:
        yield f"{indent}{head}, each of {_count(loop.period, 'segment')}:"
        yield from _parts(plan, loop.body, deeper)
    for role, title in (
        (CARRIED, "carried from one to the next"),
        (FIXED, "the same for all"),
        (OWN, "its own for each"),
    ):
        kinds = _kinds(plan, loop, role)
        if kinds:
            yield from _wrap(f"{deeper}{title}: {_summary(kinds)}", deeper + "  ")


def _kinds(plan: Plan, loop: Loop, role: str) -> list[Kind | None]:
    """What an iteration takes from outside itself in this role, each value once."""
    found: dict[Any, Kind | None] = {}
    for (offset, external), (name, *where) in loop.roles.items():
        if name != role:
            continue
        source = plan.leaves[loop.start + offset].sources[external]
        if role == CARRIED:
            source = loop.start + where[0], where[1]
        found[source] = _source_kind(plan, source)
    return list(found.values())


def _source_kind(plan: Plan, source: Any) -> Kind | None:
    if type(source) is int:
        return _input_kind(plan.inputs[~source])
    leaf, ref = source
    op, _ = plan.leaves[leaf].shape.steps[ref >> INDEX_BITS]
    return op.kinds[ref & INDEX_MASK]


def _input_kind(given: tuple[Kind, type]) -> Kind | None:
    """The kind; None for a Python number."""
    kind, sort = given
    return None if issubclass(sort, int | float | complex) else kind


def _operations(leaf: Leaf) -> str:
    return _names(op for op, _ in leaf.shape.steps)


def _names(ops: Iterable[Any]) -> str:
    runs = [(name, len(list(same))) for name, same in groupby(map(_name, ops))]
    text = ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in runs[:_OPERATIONS])
    rest = sum(n for _, n in runs[_OPERATIONS:])
    return text + (f" and {rest} more" if rest else "")


def _name(op: Any) -> str:
    if not isinstance(op, GradientOp):
        return op.name
    if isinstance(op._stretch, Stretch):
        return f"gradient of ({_names(step for step, _ in op._stretch.steps)})"
    return f"gradient of {_count(len(op._stretch._plan.leaves), 'segment')}"


def _summary(kinds: Iterable[Kind | None]) -> str:
    """Tensors by kind and their bytes, and the Python numbers."""
    kinds = list(kinds)
    numbers = kinds.count(None)
    counts = Counter(kind for kind in kinds if kind is not None)
    tensors = [f"{_kind(kind)} ×{n}" if n > 1 else _kind(kind) for kind, n in counts.items()]
    total = sum(n * math.prod(kind.shape) * kind.dtype.itemsize for kind, n in counts.items())
    parts = [f"{', '.join(tensors)} ({_bytes(total)})"] if tensors else []
    if numbers:
        parts.append(_count(numbers, "Python number"))
    return ", ".join(parts)


def _kind(kind: Kind) -> str:
    dtype = str(kind.dtype).removeprefix("torch.")
    return f"{dtype}[{','.join(map(str, kind.shape))}]{' with grad' if kind.grad else ''}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _history() -> Iterator[str]:
    yield (
        f"{_count(STATISTICS.compiled, 'program')} compiled, {_count(STATISTICS.run, 'run')}, "
        "since the start"
    )
    for runs in list(RUNS.values()):
        segments = _count(len(runs.program.plan.leaves), "segment")
        yield f"  {runs.source or '(no line of a script)'}"
        yield (
            f"    {runs.cause}: {_count(runs.count, 'run')} of {segments}, "
            f"{runs.compiled} compiled anew"
        )


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=indent, break_long_words=False)
