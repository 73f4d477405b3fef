"""A torch optimizer as an optax transformation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
import torch
from torch import nn

from jaxmeta import ArgumentKeyError, ArgumentTypeError, ArgumentValueError
from jaxmeta_bridge.dlpack import tensor_to_jax
from jaxmeta_bridge.dtypes import TO_JAX
from jaxmeta_bridge.optim.rule import Rule, State, Static
from jaxmeta_bridge.optim.table import rule_for


class TorchTransformation(optax.GradientTransformation):
    """An optax transformation that steps as a torch optimizer does; see `optax_from_torch`.

    Its state is a tree like the parameters, with what torch keeps for each as a dict.
    """

    _plan: "_Plan"

    @classmethod
    def _of(cls, plan: "_Plan") -> Self:
        self = cls(plan.init, plan.update)
        self._plan = plan
        return self

    def with_options(self, **options: Any) -> "TorchTransformation":
        """The same optimizer with other values of some options, which may be traced.

        Args:
            options: torch's names. A value is a number or array for all parameters, a list of one
                for each parameter group, or a dict of one for each parameter's name; each may be
                elementwise. Options that torch takes as a tuple (betas) are one here.

        Raises:
            ArgumentKeyError: the optimizer has no such option.
            ArgumentValueError: a list is not as long as there are groups.
        """
        return TorchTransformation._of(self._plan.with_options(options))


def optax_from_torch(
    optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer],
    names: nn.Module | Sequence[str] | None = None,
    **options: Any,
) -> TorchTransformation:
    """A torch optimizer as an optax transformation with torch's own formulas.

    Differentiable in the gradients, the parameters, the state and every numeric option, to any
    order; also where gradients are exactly zero, and in options that are zero, if these are
    arrays.

    Args:
        optimizer: an optimizer, for its parameter groups, options and state as they are now: `init`
            continues where it stands. Parameters that it does not hold, or that require no
            gradient, stay as they are. Or a class, for a fresh start on any tree of parameters.
        names: the module whose parameters the optimizer holds, or their names in its order;
            needed if there are several groups or a state, unless torch was given names.
        options: as for `TorchTransformation.with_options`.

    Returns:
      An `optax.GradientTransformation` for a dict of parameters by name, as `from_torch(...)` has.
      To meta-learn options, make it outside the function of them, since a compiled function does
      not see later changes of the torch optimizer, and call `with_options` inside.

    Raises:
        ArgumentTypeError: not a torch optimizer, or names that a class has no use for.
        ArgumentValueError: an optimizer without a rule (LBFGS, SparseAdam, one with its own step);
            names that do not fit its parameters.
        ArgumentKeyError: an unknown option.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> adam = torch.optim.Adam(model.parameters(), betas=(0.8, 0.99))
        >>> optimizer = optax_from_torch(adam, model)
        >>> f = from_torch(model)
        >>> def loss(params, x):
        ...     y, _ = f(params, f.buffers, x)
        ...     return (y**2).mean()
        >>> def meta_loss(h):
        ...     make = lambda h: optimizer.with_options(**h)
        ...     out = meta_unroll(loss, make, f.params, jnp.ones((5, 4, 3)), hyperparams=h)
        ...     return out.losses[-1]
        >>> sorted(jax.grad(meta_loss)({"lr": 0.1, "betas": (0.8, 0.99)}))
        ['betas', 'lr']
    """
    if isinstance(optimizer, type):
        rule = rule_for(optimizer)
        if names is not None:
            raise ArgumentTypeError(
                f"names is given with the class {optimizer.__name__}, which holds no parameters: "
                "leave it out, or pass an optimizer made for the module."
            )
        plan, options = _of_class(rule, optimizer, options)
    elif isinstance(optimizer, torch.optim.Optimizer):
        plan = _of_object(rule_for(type(optimizer)), optimizer, names)
    else:
        raise ArgumentTypeError(
            f"optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer or a "
            "class of them. meta_unroll takes optax transformations as they are."
        )
    return TorchTransformation._of(plan.with_options(options))


@dataclass(frozen=True, eq=False)
class _Plan:
    """A rule, and what it needs to know about each parameter.

    Attributes:
        rule: what happens to one parameter.
        groups: the options of each group.
        members: the group of each parameter by name; None: all are in the only one.
        state: what torch already keeps, by parameter name.
    """

    rule: Rule
    groups: tuple[dict[str, Any], ...]
    members: Mapping[str, int] | None
    state: Mapping[str, State]

    def with_options(self, options: Mapping[str, Any]) -> "_Plan":
        known = (*self.rule.numeric, *self.rule.switches, *self.rule.flags)
        groups = tuple(dict(group) for group in self.groups)
        for name, value in options.items():
            if name not in known or name not in groups[0]:
                raise ArgumentKeyError(
                    f"{self.rule.name} has no option {name!r} that changes its numbers; expected "
                    f"some of {', '.join(known)}."
                )
            values = value if isinstance(value, list) else [value]
            if len(values) not in (1, len(groups)):
                raise ArgumentValueError(
                    f"{name} is a list of {len(values)}; expected one value for each of the "
                    f"{len(groups)} parameter groups."
                )
            for i, group in enumerate(groups):
                group[name] = _to_jax(values[i % len(values)], name)
        return replace(self, groups=groups)

    def init(self, params: Any) -> Any:
        def start(path: Any, param: Any) -> State:
            name = _name(path)
            options = self._options(name)
            if options is None:
                return {}
            fresh = self.rule.init(jax.typeof(param), *options)
            return fresh | self._resumed(name, fresh)

        return jax.tree_util.tree_map_with_path(start, params)

    def update(self, updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ArgumentValueError(
                f"params is None; {self.rule.name} from torch needs the parameters: call "
                "optimizer.update(gradients, state, params)."
            )
        leaves, tree = jax.tree_util.tree_flatten_with_path(params)
        columns = (tree.flatten_up_to(column) for column in (updates, state))
        changes, states = [], []
        for (path, param), grad, kept in zip(leaves, *columns, strict=True):
            options = self._options(_name(path))
            change = jnp.zeros_like(param)
            if options is not None:
                change, kept = self.rule.change(param, grad, kept, *options)
            changes.append(change.astype(param.dtype))
            states.append(kept)
        return tree.unflatten(changes), tree.unflatten(states)

    def _options(self, name: str) -> tuple[dict[str, Any], Static] | None:
        """The split options of a parameter; None where the optimizer leaves it alone."""
        members = self.members
        if members is not None and name not in members:
            return None
        group = self.groups[0 if members is None else members[name]]
        own = {key: _of_parameter(key, value, name) for key, value in group.items()}
        return self.rule.split(own)

    def _resumed(self, name: str, fresh: State) -> State:
        # A switch may have been set differently since.
        kept = {key: value for key, value in self.state.get(name, {}).items() if key in fresh}
        for key, value in kept.items():
            if value.shape not in ((), fresh[key].shape):
                raise ArgumentValueError(
                    f"params[{name!r}] needs {key} of shape {fresh[key].shape}, and the torch "
                    f"optimizer's has {value.shape}: pass the parameters that it was made for."
                )
        return {
            key: jnp.broadcast_to(value.astype(fresh[key].dtype), fresh[key].shape)
            for key, value in kept.items()
        }


def _of_parameter(option: str, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ArgumentKeyError(
            f"{option} has no value for the parameter {name!r}; given: {sorted(value)}."
        )
    return value[name]


def _of_class(
    rule: Rule, optimizer_type: Callable[..., torch.optim.Optimizer], options: dict[str, Any]
) -> tuple[_Plan, dict[str, Any]]:
    """A plan with the options that torch itself can check, and the others."""
    arrays = {name: value for name, value in options.items() if not _is_torch_option(value)}
    checked = {name: value for name, value in options.items() if name not in arrays}
    if "momentum" in arrays:
        # SGD accepts nesterov only with one.
        checked["momentum"] = 0.5
    dummy = torch.zeros((1, 1), requires_grad=True)
    group = optimizer_type([dummy], **checked).param_groups[0]
    return _Plan(rule, (_snapshot(group),), None, {}), arrays


def _of_object(
    rule: Rule, optimizer: torch.optim.Optimizer, names: nn.Module | Sequence[str] | None
) -> _Plan:
    groups = tuple(_snapshot(group) for group in optimizer.param_groups)
    known = _names(optimizer, names)
    if known is None:
        if len(groups) > 1 or any(optimizer.state.values()):
            raise ArgumentValueError(
                f"names is None, and this {rule.name} has {len(groups)} parameter groups and a "
                f"state for {len(optimizer.state)} parameters, which belong to names: pass the "
                "module whose parameters it holds."
            )
        return _Plan(rule, groups, None, {})
    members: dict[str, int] = {}
    state: dict[str, State] = {}
    for i, group in enumerate(optimizer.param_groups):
        _, static = rule.split(groups[i])
        for p in group["params"]:
            if not p.requires_grad:
                continue
            name = known[id(p)]
            members[name] = i
            spec = jax.ShapeDtypeStruct(tuple(p.shape), TO_JAX[p.dtype])
            kept = rule.load(optimizer.state.get(p, {}), spec, static)
            state[name] = {
                key: tensor_to_jax(value, name=f"the state {key!r} of {name}")
                for key, value in kept.items()
            }
    return _Plan(rule, groups, members, state)


def _names(
    optimizer: torch.optim.Optimizer, names: nn.Module | Sequence[str] | None
) -> dict[int, str] | None:
    """The name of each of the optimizer's parameters, by its identity; None if unknown."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if names is None:
        given = [group.get("param_names", ()) for group in optimizer.param_groups]
        if not all(given):
            return None
        names = [name for group in given for name in group]
    if isinstance(names, nn.Module):
        found = {id(p): name for name, p in names.named_parameters()}
        foreign = [tuple(p.shape) for p in held if id(p) not in found]
        if foreign:
            raise ArgumentValueError(
                f"names is a {type(names).__name__} that lacks {len(foreign)} of the optimizer's "
                f"parameters, of shapes {foreign}: pass the module that has them all."
            )
        return found
    if len(names) != len(held) or len(set(names)) != len(held):
        raise ArgumentValueError(
            f"names has {len(set(names))} different names; the optimizer holds {len(held)} "
            "parameters."
        )
    return {id(p): name for p, name in zip(held, names, strict=True)}


def _snapshot(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a torch group, which later changes of it do not reach."""
    own = ("params", "param_names")
    return {name: _to_jax(value, name) for name, value in group.items() if name not in own}


def _to_jax(value: Any, name: str) -> Any:
    def convert(leaf: Any) -> Any:
        return tensor_to_jax(leaf, name=name) if isinstance(leaf, torch.Tensor) else leaf

    return jax.tree.map(convert, value)


def _is_torch_option(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_torch_option, value))
    return value is None or isinstance(value, bool | int | float | str)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")
