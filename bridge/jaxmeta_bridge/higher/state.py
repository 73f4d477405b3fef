"""The state of an optimizer in a recording, and its steps."""

from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch

from jaxmeta_bridge import recorder
from jaxmeta_bridge.optim import Rule
from jaxmeta_bridge.recorder import Settings, Value


class ParameterState(MutableMapping[str, Any]):
    """What an optimizer keeps for a parameter, under torch's names; tensors are made on demand."""

    def __init__(self) -> None:
        self.values_: dict[str, Value] = {}
        self.complete: Settings | None = None  # the options for which nothing is missing

    def __getitem__(self, name: str) -> torch.Tensor:
        return recorder.wrap(self.values_[name])

    def __setitem__(self, name: str, tensor: Any) -> None:
        self.values_[name] = recorder.value_of(torch.as_tensor(tensor))
        self.complete = None

    def __delitem__(self, name: str) -> None:
        self.complete = None
        del self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)

    def __repr__(self) -> str:
        return repr(dict(self))


class _GroupState(dict[int, ParameterState]):
    """State by the number of the parameter in its group; empty before the first step."""

    def __missing__(self, index: int) -> ParameterState:
        self[index] = ParameterState()
        return self[index]


class OptimizerState:
    """State of all parameters of an optimizer that torch has."""

    def __init__(self, rule: Rule, other: torch.optim.Optimizer, device: Any) -> None:
        self._rule = rule
        self._numbers: dict[Any, Value] = {}
        self._options = (*rule.numeric, *rule.switches, *rule.flags)
        self._known: dict[int, tuple[list[Any], Settings, list[Any]]] = {}
        self.groups = [_GroupState() for _ in other.param_groups]
        for group, states in zip(other.param_groups, self.groups, strict=True):
            _, static = rule.split(group)
            # Also what the present options do not need: they may be switched on.
            static = tuple((name, value or value is False) for name, value in static)
            for index, parameter in enumerate(group["params"]):
                found = other.state.get(parameter)
                if not found:
                    continue
                for name, tensor in rule.load(found, parameter, static).items():
                    own = tensor.detach().clone()
                    states[index][name] = own if device is None else own.to(device)

    def update(
        self,
        param_groups: list[dict[str, Any]],
        grouped_grads: list[list[Any]],
        tracked: bool,
        adjoint: Any,
    ) -> None:
        """Records a step, and puts the new parameters into the groups."""
        settings, rows = self._settings(param_groups)
        members = []
        places = []
        for number, (group, grads) in enumerate(zip(param_groups, grouped_grads, strict=True)):
            params, states, setting = group["params"], self.groups[number], settings[number]
            for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
                if grad is None:
                    continue
                value = recorder.value_of(param)
                state = states[index]
                if state.complete is not setting:
                    self._complete(setting, state, value, rows[number], tracked)
                if type(grad) is not Value:
                    grad = recorder.value_of(grad)
                members.append((number, value, grad, state.values_))
                places.append((params, state, index))
        if not members:
            return
        options = [value for row in rows for value in row]
        results = recorder.add_update(settings, options, members, tracked, adjoint)
        for (params, state, index), (new, values) in zip(places, results, strict=True):
            params[index] = recorder.wrap(new)
            state.values_ = values

    def values(self) -> list[Value]:
        """All that is kept."""
        states = [state for group in self.groups for state in group.values()]
        return [value for state in states for value in state.values_.values()]

    def _complete(
        self,
        settings: Settings,
        state: ParameterState,
        param: Value,
        options: Sequence[Value],
        tracked: bool,
    ) -> None:
        """Puts the initial state where there is none yet, and nothing that is not needed."""
        values = state.values_
        names = recorder.state_names(settings, param, options)
        if not all(name in values for name in names):
            depends = bool(self._rule.start)
            start = recorder.start_state(settings, param, options, depends, tracked)
            values = {name: values.get(name, start[name]) for name in names}
        grad = tracked and param.kind.grad
        state.values_ = {name: recorder.as_state(values[name], grad) for name in names}
        state.complete = settings

    def _settings(
        self, param_groups: list[dict[str, Any]]
    ) -> tuple[list[Settings], list[list[Value]]]:
        settings, rows = [], []
        for index, group in enumerate(param_groups):
            given = [group.get(name) for name in self._options]
            known = self._known.get(index)
            if known is None or any(a is not b for a, b in zip(known[0], given, strict=True)):
                known = self._known[index] = (given, *self._split(index, group))
            settings.append(known[1])
            rows.append([v if isinstance(v, Value) else _option(v) for v in known[2]])
        return settings, rows

    def _split(self, index: int, group: dict[str, Any]) -> tuple[Settings, list[Any]]:
        """The settings, and of each numeric option the value if it is a plain number."""
        numeric, static = self._rule.split(group)
        names, row = [], []
        for name, value in numeric.items():
            items = value if isinstance(value, tuple) else (value,)
            names.append((name, len(items) if isinstance(value, tuple) else 0))
            row += [
                self._number((index, name, place), float(v)) if isinstance(v, (int, float)) else v
                for place, v in enumerate(items)
            ]
        return recorder.settings(self._rule, static, tuple(names)), row

    def _number(self, place: Any, number: float) -> Value:
        """The input for a number; the same one while it does not change."""
        key = (place, number)
        if key not in self._numbers:
            self._numbers[key] = recorder.number(number)
        return self._numbers[key]


def _option(value: Any) -> Value:
    if isinstance(value, torch.Tensor):
        return recorder.value_of(value)
    if isinstance(value, np.ndarray):
        return recorder.value_of(torch.from_numpy(value))
    return recorder.number(float(value))
