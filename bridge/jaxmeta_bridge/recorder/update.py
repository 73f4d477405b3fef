"""A step of an optimizer, and the state before the first one, as operations of the recording."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxmeta_bridge.dtypes import TO_JAX, TO_TORCH
from jaxmeta_bridge.optim import Rule
from jaxmeta_bridge.recorder.graph import Kind


@dataclass(frozen=True, eq=False)
class Settings:
    """The options of a parameter group, without the values of its numbers; see `settings`.

    Attributes:
        rule: the optimizer.
        static: the rule's static options.
        numbers: name of each numeric option, and how many values it has; 0 for a single one.
    """

    rule: Rule
    static: tuple[Any, ...]
    numbers: tuple[tuple[str, int], ...]

    def fill(self, values: Sequence[Any]) -> dict[str, Any]:
        """The rule's numeric options, from all values in a row."""
        rest = iter(values)
        return {
            name: tuple(next(rest) for _ in range(count)) if count else next(rest)
            for name, count in self.numbers
        }

    def size(self) -> int:
        return sum(count or 1 for _, count in self.numbers)


class StartOp:
    """The state of an optimizer for one parameter before its first step.

    Its inputs are the numeric options.
    """

    __slots__ = ("_kind", "_settings", "kinds", "name", "names")

    def __init__(self, settings: Settings, kind: Kind, options: tuple[Kind, ...]) -> None:
        self.name = f"{settings.rule.name}.start"
        self._settings = settings
        self._kind = kind

        def start(*values: Any) -> dict[str, jax.Array]:
            return settings.rule.init(_struct(kind), settings.fill(values), settings.static)

        with jax.enable_x64(True):
            shapes = jax.eval_shape(start, *[_struct(option) for option in options])
        grad = any(option.grad for option in options)
        self.names = tuple(sorted(shapes))
        self.kinds = tuple(_kind(shapes[name], grad) for name in self.names)

    def lower(self, inputs: Sequence[jax.Array], adjoint: Any) -> list[jax.Array]:
        """See `Op.lower`."""
        settings = self._settings
        state = settings.rule.init(_struct(self._kind), settings.fill(inputs), settings.static)
        return [jnp.asarray(state[name]) for name in self.names]


@dataclass(frozen=True)
class Member:
    """One parameter in a step.

    Attributes:
        group: number of its settings.
        param: its kind.
        grad: that of its gradient.
        state: names and kinds of its state.
    """

    group: int
    param: Kind
    grad: Kind
    state: tuple[tuple[str, Kind], ...]


class UpdateOp:
    """One step of an optimizer.

    Inputs: for each group its numeric options; for each member its parameter, gradient and state.
    Outputs: for each member its new parameter and state.
    """

    __slots__ = ("_depends", "_groups", "_members", "_tracked", "adjoint", "kinds", "name")

    def __init__(
        self,
        groups: tuple[Settings, ...],
        members: tuple[Member, ...],
        options: tuple[Kind, ...],
        tracked: bool,
        adjoint: Any,
    ) -> None:
        self.adjoint = adjoint  # how a loop of such steps is differentiated
        self.name = groups[0].rule.name if groups else "update"
        self._groups = groups
        self._members = members
        self._tracked = tracked
        kinds: list[Kind] = []
        known = any(option.grad for option in options)
        for member in members:
            inputs = (member.param, member.grad, *(kind for _, kind in member.state))
            grad = tracked and (known or any(kind.grad for kind in inputs))
            kinds.append(Kind.of(member.param.shape, member.param.dtype, grad or not tracked))
            for _, kind in member.state:
                moved = grad and kind.dtype.is_floating_point
                kinds.append(Kind.of(kind.shape, kind.dtype, moved))
        self.kinds = tuple(kinds)
        self._depends = self._find_dependence()

    def _find_dependence(self) -> list[tuple[int, ...]]:
        """Of each output the inputs on which it depends: those of its member and its group."""
        options: list[tuple[int, ...]] = []
        count = 0
        for settings in self._groups:
            options.append(tuple(range(count, count + settings.size())))
            count += settings.size()
        depends: list[tuple[int, ...]] = []
        for member in self._members:
            width = 2 + len(member.state)
            own = options[member.group] + tuple(range(count, count + width))
            depends += [own] * (width - 1)
            count += width
        return depends

    def depends(self, index: int) -> tuple[int, ...]:
        """The inputs on which an output depends."""
        return self._depends[index]

    def lower(self, inputs: Sequence[jax.Array], adjoint: Any) -> list[jax.Array]:
        """See `Op.lower`."""
        rest = iter(inputs)
        options = [
            settings.fill([next(rest) for _ in range(settings.size())]) for settings in self._groups
        ]
        outputs: list[jax.Array] = []
        for member in self._members:
            settings = self._groups[member.group]
            param, grad = next(rest), next(rest)
            state = {name: next(rest) for name, _ in member.state}
            new_param, new_state = settings.rule.update(
                param, grad, state, options[member.group], settings.static
            )
            outputs.append(new_param)
            outputs += [new_state[name] for name, _ in member.state]
        if self._tracked:
            return outputs
        return [jax.lax.stop_gradient(output) for output in outputs]


def _struct(kind: Kind) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(kind.shape, TO_JAX[kind.dtype])


def _kind(struct: Any, grad: bool) -> Kind:
    dtype = TO_TORCH[struct.dtype]
    return Kind.of(tuple(struct.shape), dtype, grad and dtype.is_floating_point)


_SETTINGS: dict[Any, Settings] = {}


def settings(rule: Rule, static: tuple[Any, ...], numbers: tuple[tuple[str, int], ...]) -> Settings:
    """The one object with these attributes."""
    key = (rule, static, numbers)
    if key not in _SETTINGS:
        _SETTINGS.setdefault(key, Settings(*key))
    return _SETTINGS[key]


_STARTS: dict[Any, StartOp] = {}


def start_op(settings: Settings, kind: Kind, options: tuple[Kind, ...]) -> StartOp:
    """The one such operation."""
    kind = Kind.of(kind.shape, kind.dtype, False)
    key = (settings, kind, options)
    if key not in _STARTS:
        _STARTS.setdefault(key, StartOp(*key))
    return _STARTS[key]
