"""The gradient of recorded values by others, as an operation of the recording.

It holds the stretch of the recording between them. What that stretch takes from elsewhere is an
input of the operation, so gradients of gradients find their way.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from jaxmeta_bridge.errors import UnsupportedOpError
from jaxmeta_bridge.recorder.analysis import analyse
from jaxmeta_bridge.recorder.graph import INDEX_BITS, INDEX_MASK, Kind, Value, Window, add, add_refs
from jaxmeta_bridge.recorder.plan import make_plan
from jaxmeta_bridge.recorder.stretch import GradientOp, LongStretch, Stretch, gradient_op
from jaxmeta_bridge.recorder.update import UpdateOp


def add_gradient(
    outputs: Sequence[Value],
    wanted: Sequence[Value],
    cotangents: Sequence[Value] | None,
    keep: bool,
) -> list[Value | None]:
    """Records the gradient of the outputs by the wanted values; None where there is no path.

    Args:
      outputs: values that require grad.
      wanted: values of the recording.
      cotangents: one for each output; ones if None.
      keep: whether the gradients shall be differentiable (torch's `create_graph`).
    """
    if not wanted:
        return []
    if len(outputs) == 1 and cotangents is None:
        found = _add_within_window(outputs[0], wanted, keep)
        if found is not None:
            return found
    _refuse_inside(outputs, wanted)
    count = len(wanted)
    wanted = [*wanted, *_weights_between(outputs, wanted)]
    gradients = _add_partial(outputs, wanted, cotangents, keep)
    for given, older in _generations(wanted):
        # Partial derivatives count the other wanted values as constants. What is newer passes its
        # gradient on to what it was made from.
        found = [(wanted[i], gradient) for i in given if (gradient := gradients[i]) is not None]
        if not found or not older:
            continue
        values, weights = [value for value, _ in found], [gradient for _, gradient in found]
        more = _add_partial(values, [wanted[i] for i in older], weights, keep)
        for i, gradient in zip(older, more, strict=True):
            gradients[i] = _add_sum(gradients[i], gradient)
    return gradients[:count]


_FEW = 4  # updates between values and their gradient that are taken one by one


def _weights_between(outputs: Sequence[Value], wanted: Sequence[Value]) -> list[Value]:
    """Weights of an inner loop on the ways from the wanted values to the outputs, if they are few.

    A gradient that is differentiated again has to know them: a later one may be by them.
    """
    known = {value.key for value in wanted}
    found: dict[Any, Value] = {}
    updates: set[Any] = set()
    for _, operands in _between(outputs, wanted):
        for value in operands:
            if value.window is None or value.leaf or not value.kind.grad or value.key in known:
                continue
            if isinstance(value.op, UpdateOp):
                found.setdefault(value.key, value)
                updates.add((value.window, value.ref >> INDEX_BITS))
    return list(found.values()) if len(updates) <= _FEW else []


def _refuse_inside(outputs: Sequence[Value], wanted: Sequence[Value]) -> None:
    """Raises where an earlier gradient, which is differentiated now, hides a wanted value."""
    inside = [v for v in wanted if v.window is not None and v.ref >> INDEX_BITS in v.window.inside]
    if not inside:
        return
    nodes = _between(outputs, inside, through=True)
    if any(isinstance(window.steps[place].op, GradientOp) for (window, place), _ in nodes):
        raise UnsupportedOpError(
            "A gradient is asked of tensors that come from an earlier gradient (create_graph=True, "
            "or a step), by values that were computed on the way to that one, such as activations "
            "or weights in the middle of a long loop. Ask for them in the earlier call, too, or "
            "make them leaves with detach().requires_grad_()."
        )


def _generations(wanted: Sequence[Value]) -> Iterator[tuple[list[int], list[int]]]:
    """Of values by which to differentiate: what one operation made, and all older ones.

    From the newest on, as numbers; nothing if no value can depend on another.
    """
    ages = [
        (-1.0, 0) if v.window is None or v.leaf else (v.window.serial, v.ref >> INDEX_BITS)
        for v in wanted
    ]
    order = sorted(set(ages), reverse=True)
    for age in order[:-1]:
        yield (
            [i for i, other in enumerate(ages) if other == age],
            [i for i, other in enumerate(ages) if other < age],
        )


class _SumOp:
    """The sum of two values."""

    def __init__(self, kind: Kind) -> None:
        self.kinds = (kind,)
        self.name = "add"

    def lower(self, inputs: Sequence[jax.Array], adjoint: Any) -> list[jax.Array]:
        """See `Op.lower`."""
        return [inputs[0] + inputs[1]]


_SUMS: dict[Kind, _SumOp] = {}


def _add_sum(one: Value | None, other: Value | None) -> Value | None:
    if one is None or other is None:
        return other if one is None else one
    op = _SUMS.setdefault(one.kind, _SumOp(one.kind))
    return add(op, (one, other))[0]


def _add_partial(
    outputs: Sequence[Value],
    wanted: Sequence[Value],
    cotangents: Sequence[Value] | None,
    keep: bool,
) -> list[Value | None]:
    """As `add_gradient`, of ways that lead through no other wanted value."""
    nodes = _between(outputs, wanted)
    used = _used(nodes, outputs, wanted)
    if not used:
        return [None] * len(wanted)
    windows = {window for (window, _), _ in nodes}
    if len(windows) > 2 and not any(value.window in windows for value in used):
        inputs, stretch = _long_stretch(used, outputs)
    else:
        inputs, stretch = _stretch(nodes, used, outputs)
    op = gradient_op(stretch, [v.kind for v in used], cotangents is not None, keep)
    if keep:
        for window, position in _inside(nodes):
            window.inside.add(position)
    made = add(op, (*inputs, *(cotangents or ())))
    gradients = {value.key: gradient for value, gradient in zip(used, made, strict=True)}
    return [gradients.get(value.key) for value in wanted]


_Node = tuple[tuple[Window, int], list[Value]]  # an operation's place, and its operands


def _between(
    outputs: Sequence[Value], wanted: Sequence[Value], through: bool = False
) -> list[_Node]:
    """The operations on the ways from the wanted values to the outputs, in order.

    Args:
      outputs: where the ways end.
      wanted: where they begin.
      through: whether to take all newer operations on which the outputs depend.
    """
    targets = {value.key for value in wanted}
    # What is older than all wanted values cannot depend on them.
    oldest = min(v.ref if v.window is None else v.window.serial for v in wanted)
    found: dict[tuple[Window, int], list[Value]] = {}
    stack = [v for v in outputs if v.key not in targets and _leads_on(v, oldest)]
    while stack:
        value = stack.pop()
        assert value.window is not None
        node = (value.window, value.ref >> INDEX_BITS)
        if node not in found:
            found[node] = value.operands()
            stack.extend(v for v in found[node] if v.key not in targets and _leads_on(v, oldest))
    order = sorted(found.items(), key=lambda item: (item[0][0].serial, item[0][1]))
    if through:
        return order
    dependent: set[tuple[Window, int]] = set()
    for node, operands in order:
        for value in operands:
            if (value.key in targets and value.kind.grad) or (
                _leads_on(value, oldest) and (value.window, value.ref >> INDEX_BITS) in dependent
            ):
                dependent.add(node)
                break
    return [item for item in order if item[0] in dependent]


def _inside(nodes: list[_Node]) -> set[tuple[Window, int]]:
    """Of some operations those whose results another of them takes."""
    places = {node for node, _ in nodes}
    taken = {(v.window, v.ref >> INDEX_BITS) for _, operands in nodes for v in operands if v.window}
    return {(window, position) for window, position in taken if window} & places


def _leads_on(value: Value, oldest: float) -> bool:
    """Whether gradients go on from a value to what it was made from."""
    home = value.window
    return value.kind.grad and home is not None and not value.leaf and home.serial >= oldest


def _used(nodes: list[_Node], outputs: Sequence[Value], wanted: Sequence[Value]) -> list[Value]:
    """Those of the wanted values on which the outputs depend, each once."""
    targets = {value.key for value in wanted}
    reached = {v.key for _, operands in nodes for v in operands if v.key in targets}
    reached |= {value.key for value in outputs if value.key in targets}
    return list({value.key: value for value in wanted if value.key in reached}.values())


def _stretch(
    nodes: list[_Node], used: Sequence[Value], outputs: Sequence[Value]
) -> tuple[list[Value], Stretch]:
    """The operations as a function, and its inputs: first those used, then what else it takes."""
    inputs: list[Value] = list(used)
    numbers = {node: index for index, (node, _) in enumerate(nodes)}
    slots = {value.key: ~index for index, value in enumerate(used)}

    def place(value: Value) -> Any:
        slot = slots.get(value.key)
        if slot is not None:
            return slot
        if value.window is not None and not value.leaf:
            number = numbers.get((value.window, value.ref >> INDEX_BITS))
            if number is not None:
                return number, value.ref & INDEX_MASK
        slots[value.key] = ~len(inputs)
        inputs.append(value)
        return slots[value.key]

    steps = tuple(
        [
            (window.steps[position].op, tuple([place(v) for v in operands]))
            for (window, position), operands in nodes
        ]
    )
    return inputs, Stretch(steps, tuple([place(value) for value in outputs]))


def _long_stretch(
    used: Sequence[Value], outputs: Sequence[Value]
) -> tuple[list[Value], LongStretch]:
    """As `_stretch`, for one of several windows."""
    stop = {value.key for value in used}
    plan, found = make_plan(outputs, lambda value: value.key in stop)
    inputs = list(used)
    numbers = {value.key: number for number, value in enumerate(used)}
    order = []
    for value in found:
        if value.key not in numbers:
            numbers[value.key] = len(inputs)
            inputs.append(value)
        order.append(numbers[value.key])
    return inputs, LongStretch(plan, tuple(order))


def _add_within_window(
    output: Value, wanted: Sequence[Value], keep: bool
) -> list[Value | None] | None:
    """As `add_gradient`, where all ways lie inside the window at hand: the usual inner step.

    What there is to find out depends on the structure of the window alone, so it is done once.
    """
    window = output.window
    if window is None or window.closed:
        return None
    slots = window.slots
    places = []
    home, position = wanted[0].window, wanted[0].ref >> INDEX_BITS
    for value in wanted:
        # Values that different operations made may depend on each other.
        if value.window is window or value.window is not home:
            return None
        if home is not None and value.ref >> INDEX_BITS != position:
            return None
        places.append(slots.get(value.key, -1))
    key = (output.ref, tuple(places), keep)
    found = window.state.analyses.get(key)
    if found is None:
        found = window.state.analyses[key] = _template(window, output, wanted, places, keep)
    op, refs, order, others, inside = found
    externals = window.externals
    for place in others:
        if not _is_before(externals[place], wanted):
            return None
    if op is None:
        return [None for _ in wanted]
    if keep:
        window.inside |= inside
    ref = add_refs(window, op, refs)
    kinds = op.kinds
    return [
        None if number is None else Value(kinds[number], window, ref + number) for number in order
    ]


def _is_before(value: Value, wanted: Sequence[Value]) -> bool:
    """Whether a value cannot depend on the wanted ones, which one operation made, by its age."""
    home = value.window
    if home is None or value.leaf:
        return True
    maker = wanted[0]
    if maker.window is None:
        return home.serial < min(other.ref for other in wanted)
    mine, theirs = value.ref >> INDEX_BITS, maker.ref >> INDEX_BITS
    return (home.serial, mine) <= (maker.window.serial, theirs)


def _template(
    window: Window, output: Value, wanted: Sequence[Value], places: Sequence[int], keep: bool
) -> tuple[Any, tuple[int, ...], tuple[int | None, ...], tuple[int, ...], frozenset[int]]:
    """The operation, its refs, which gradient each wanted value gets, and what to mind.

    That is externals that may depend on the wanted values, and positions inside the operation.
    """
    needed = analyse(window.state, frozenset((output.ref,)))
    others = tuple(
        place
        for place in needed.externals
        if window.externals[place].kind.grad and place not in places
    )
    nodes = [node for node in _between([output], wanted) if node[0][0] is window]
    used = _used(nodes, [output], wanted)
    if not used:
        return None, (), (None,) * len(wanted), others, frozenset()
    inputs, stretch = _stretch(nodes, used, [output])
    op = gradient_op(stretch, [v.kind for v in used], False, keep)
    numbers = {value.key: number for number, value in enumerate(used)}
    refs = tuple(v.ref if v.window is window else ~window.slots[v.key] for v in inputs)
    order = tuple(numbers.get(value.key) for value in wanted)
    return op, refs, order, others, frozenset(position for _, position in _inside(nodes))
