"""Optimizers whose steps can be differentiated, made from `torch.optim` ones."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

import jaxmeta
from jaxmeta_bridge import recorder
from jaxmeta_bridge.higher import utils
from jaxmeta_bridge.higher.options import apply_override, copy_group
from jaxmeta_bridge.higher.options import apply_trainable_opt_params as apply_trainable_opt_params
from jaxmeta_bridge.higher.options import get_trainable_opt_params as get_trainable_opt_params
from jaxmeta_bridge.higher.state import OptimizerState
from jaxmeta_bridge.optim import Rule, rule_for

_UNTRACKED = 64  # steps without gradients that may wait to be computed
GradCallback = Callable[[list[Any]], Sequence[Any]]
# Names that scripts annotate with.
_GroupedGradsType = list[list[Any]]
_StateType = list[Any]
_GradClosureType = Callable[[torch.Tensor], torch.Tensor]
_OverrideType = dict[str, Any]
_GradCallbackType = GradCallback


class DifferentiableOptimizer:
    """Steps the fast weights of a patched module, or tensors, as a `torch.optim` optimizer would.

    A subclass overrides `_update`.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[torch.Tensor],
        fmodel: Any = None,
        device: torch.device | None = None,
        override: dict[str, Any] | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        adjoint: Any = None,
        **kwargs: Any,
    ) -> None:
        """Takes over options and state of `other`, which is not changed.

        Args:
          other: the optimizer to follow.
          reference_params: all parameters, in the order of those that `step` is given.
          fmodel: the patched module whose fast weights to step.
          device: where to put the state.
          override: values of options, a list of one for all groups or one for each group.
          grad_callback: given the list of all gradients (None where there is none), returns those
            to use.
          track_higher_grads: whether gradients go through the steps.
          adjoint: how a loop of steps is differentiated, one of `jaxmeta`'s adjoints; by default
            `"auto"`.
          **kwargs: ignored.
        """
        reference = list(reference_params)
        self.param_groups: list[dict[str, Any]] = [copy_group(g) for g in other.param_groups]
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads
        self._adjoint = _checked(adjoint)
        self._group_to_param_list: list[list[int]] = []
        numbers = {id(parameter): index for index, parameter in enumerate(reference)}
        for group in other.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in numbers:
                    raise ValueError(
                        f"The optimizer has a parameter of shape {tuple(parameter.shape)} that is "
                        "none of the reference parameters: make it from the parameters of the "
                        "model that is patched."
                    )
            self._group_to_param_list.append([numbers[id(p)] for p in group["params"]])
        # Nobody sees the gradients of others, unless there is a callback.
        self._own = {index for mapping in self._group_to_param_list for index in mapping}
        for group in self.param_groups:
            group["params"] = [None] * len(group["params"])
        if override is not None:
            self._apply_override(override)
        self.state: list[Any] = self._initial_state(other, device)

    def _initial_state(self, other: Any, device: torch.device | None) -> list[Any]:
        return [
            defaultdict(
                dict,
                {
                    index: utils._recursive_copy_and_cast(dict(other.state[parameter]), device)
                    for index, parameter in enumerate(group["params"])
                    if parameter in other.state
                },
            )
            for group in other.param_groups
        ]

    def _apply_override(self, override: dict[str, Any]) -> None:
        apply_override(self.param_groups, override)

    def step(
        self,
        loss: torch.Tensor,
        params: Iterable[torch.Tensor] | None = None,
        override: dict[str, Any] | None = None,
        grad_callback: GradCallback | None = None,
        **kwargs: Any,
    ) -> list[torch.Tensor]:
        """Takes one step on `loss`; returns all parameters after it.

        Args:
          loss: a scalar tensor.
          params: what to step; by default the fast weights of the patched module.
          override: values of options, from now on.
          grad_callback: as for the constructor, for this step.
          **kwargs: ignored.
        """
        if override is not None:
            self._apply_override(override)
        if params is None:
            params = None if self._fmodel is None else self._fmodel.fast_params
            if params is None:
                raise ValueError(
                    "params is missing: this optimizer has no patched module with weights of its "
                    "own, so step(loss, params=...) has to be given what to step."
                )
        params = list(params)
        callback = grad_callback if grad_callback is not None else self._grad_callback
        gradients: Any = self._gradients(loss, params, callback is None)
        if callback is not None:
            gradients = callback(gradients)
            if gradients is None or len(gradients) != len(params):
                raise ValueError(
                    f"grad_callback returned {type(gradients).__name__} for {len(params)} "
                    "gradients; expected a list with one entry for each."
                )
        new_params = self._apply(params, list(gradients))
        if self._fmodel is not None:
            self._fmodel.update_params(new_params)
        recorder.begin_stretch()
        return new_params

    def _gradients(self, loss: torch.Tensor, params: list[Any], unseen: bool) -> list[Any]:
        asked = [
            tensor.requires_grad and (not unseen or index in self._own)
            for index, tensor in enumerate(params)
        ]
        targets = [tensor for tensor, wanted in zip(params, asked, strict=True) if wanted]
        if not loss.requires_grad:
            raise RuntimeError(
                "The loss does not require grad: nothing that it was computed from does, or it was "
                "computed under torch.no_grad()."
            )
        found = iter(())
        if targets:
            found = iter(
                recorder.grad(
                    loss, targets, create_graph=self._track_higher_grads, allow_unused=True
                )
            )
        return [next(found) if wanted else None for wanted in asked]

    def _apply(self, params: list[Any], gradients: list[Any]) -> list[Any]:
        grouped = []
        for group, mapping in zip(self.param_groups, self._group_to_param_list, strict=True):
            group["params"] = [params[index] for index in mapping]
            grouped.append([gradients[index] for index in mapping])
        self._update(grouped)
        new_params = list(params)
        for group, mapping in zip(self.param_groups, self._group_to_param_list, strict=True):
            for tensor, index in zip(group["params"], mapping, strict=True):
                if tensor is params[index]:
                    continue
                if not self._track_higher_grads and not tensor.is_leaf:
                    tensor = recorder.to_leaf(tensor.detach(), params[index].requires_grad)
                new_params[index] = tensor
        return new_params

    def _update(self, grouped_grads: list[list[Any]], **kwargs: Any) -> None:
        """Replaces the tensors in each `group['params']` by what they are after a step.

        Args:
          grouped_grads: for each group and parameter the gradient, or None.
          **kwargs: ignored.
        """
        raise NotImplementedError(f"{type(self).__name__} has to override _update.")


class _RuleOptimizer(DifferentiableOptimizer):
    """One that torch has itself."""

    _type: type[torch.optim.Optimizer]
    _steps = 0

    def _initial_state(self, other: Any, device: torch.device | None) -> list[Any]:
        self._rule: Rule = rule_for(self._type)
        self._machine = OptimizerState(self._rule, other, device)
        return self._machine.groups

    def _gradients(self, loss: torch.Tensor, params: list[Any], unseen: bool) -> list[Any]:
        found = None
        if unseen and type(self)._update is _RuleOptimizer._update:
            found = recorder.step_gradients(loss, params, self._own, self._track_higher_grads)
        return super()._gradients(loss, params, unseen) if found is None else found

    def _update(self, grouped_grads: list[list[Any]], **kwargs: Any) -> None:
        self._machine.update(
            self.param_groups, grouped_grads, self._track_higher_grads, self._adjoint
        )
        if not self._track_higher_grads:
            self._steps += 1
            if self._steps % _UNTRACKED == 0:
                self._settle()

    def _settle(self) -> None:
        """Lets go of the steps so far, and of their batches: nothing leads back to them."""
        tensors = [tensor for group in self.param_groups for tensor in group["params"]]
        if self._fmodel is not None:
            tensors += self._fmodel.buffers()
        values = [tensor._value for tensor in tensors if type(tensor) is recorder.Recorded]
        recorder.settle([*values, *self._machine.values()])


_opt_mapping: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {}


def _differentiable(name: str) -> type[_RuleOptimizer]:
    optimizer = getattr(torch.optim, name)
    body = {
        "_type": optimizer,
        "__doc__": f"Steps as `torch.optim.{name}` does, differentiable in all its numbers.",
        "__module__": __name__,
    }
    kind = type(f"Differentiable{name}", (_RuleOptimizer,), body)
    _opt_mapping[optimizer] = kind
    return kind


DifferentiableSGD = _differentiable("SGD")
DifferentiableAdam = _differentiable("Adam")
DifferentiableAdamW = _differentiable("AdamW")
DifferentiableNAdam = _differentiable("NAdam")
DifferentiableRAdam = _differentiable("RAdam")
DifferentiableAdadelta = _differentiable("Adadelta")
DifferentiableAdafactor = _differentiable("Adafactor")
DifferentiableAdagrad = _differentiable("Adagrad")
DifferentiableAdamax = _differentiable("Adamax")
DifferentiableASGD = _differentiable("ASGD")
DifferentiableMuon = _differentiable("Muon")
DifferentiableRMSprop = _differentiable("RMSprop")
DifferentiableRprop = _differentiable("Rprop")


def _class_for(kind: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    if kind in _opt_mapping:
        return _opt_mapping[kind]
    try:
        rule = rule_for(kind)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{kind.__name__} has no differentiable version: {error} One of your own can be added "
            "with register_optim."
        ) from error
    return _opt_mapping[getattr(torch.optim, rule.name)]


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[torch.Tensor],
    fmodel: Any = None,
    device: torch.device | None = None,
    override: dict[str, Any] | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable version of an optimizer, with its options and state.

    Args are those of `DifferentiableOptimizer`.
    """
    return _class_for(type(opt))(
        opt,
        reference_params,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: dict[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: Any = None,
    device: torch.device | None = None,
    override: dict[str, Any] | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """A differentiable optimizer of the given type, without an ordinary one to follow.

    Args:
      opt_type: a class in `torch.optim`, or one given to `register_optim`.
      opt_kwargs: for the class, such as `{"lr": 0.1}`.
      params: the parameters or parameter groups; by default those of `fmodel`.
      fmodel: the patched module whose fast weights to step.
      device: where to put the state.
      override: as for `get_diff_optim`.
      track_higher_grads: as for `get_diff_optim`.
      **kwargs: further ones of `DifferentiableOptimizer`.
    """
    diff_type = _class_for(opt_type)
    if params is None:
        if fmodel is None:
            raise ValueError("params and fmodel are missing: one of them has to be given.")
        params = list(fmodel.parameters())
    given = list(params)
    if not (given and isinstance(given[0], dict)):
        given = [{"params": given}]
    stand_ins: dict[int, torch.Tensor] = {}

    def stand_in(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in stand_ins:
            stand_ins[id(tensor)] = torch.zeros(tensor.shape, dtype=tensor.dtype).requires_grad_()
        return stand_ins[id(tensor)]

    groups = []
    for group in given:
        members = group["params"]
        tensors = [members] if torch.is_tensor(members) else list(members)
        groups.append({**group, "params": [stand_in(tensor) for tensor in tensors]})
    reference = list(stand_ins.values())
    if fmodel is not None and fmodel.fast_params is not None:
        order = list(fmodel.fast_params)
        if stand_ins.keys() <= {id(tensor) for tensor in order}:
            reference = [stand_in(tensor) for tensor in order]
    return diff_type(
        opt_type(groups, **(opt_kwargs or {})),
        reference,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def register_optim(
    optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]
) -> None:
    """Has optimizers of a type be followed by a differentiable version of your own.

    Args:
      optim_type: a subclass of `torch.optim.Optimizer`.
      diff_optim_type: a subclass of `DifferentiableOptimizer` that overrides `_update`.
    """
    _opt_mapping[optim_type] = diff_optim_type


def _add(tensor: Any, a1: Any, a2: Any = None) -> Any:
    """tensor + a1, or tensor + a1 · a2."""
    return tensor + (a1 if a2 is None else a1 * a2)


def _addcdiv(tensor: Any, a1: Any, a2: Any, a3: Any = None) -> Any:
    """tensor + a1 / a2, or tensor + a1 · a2 / a3."""
    return tensor + (a1 / a2 if a3 is None else a1 * (a2 / a3))


def _addcmul(tensor: Any, a1: Any, a2: Any, a3: Any = None) -> Any:
    """tensor + a1 · a2, or tensor + a1 · a2 · a3."""
    return tensor + (a1 * a2 if a3 is None else a1 * a2 * a3)


def _checked(adjoint: Any) -> jaxmeta.Adjoint | None:
    if adjoint is None or isinstance(adjoint, jaxmeta.Adjoint):
        return adjoint
    if isinstance(adjoint, str) and adjoint == "auto":
        return jaxmeta.Auto()
    raise jaxmeta.ArgumentTypeError(
        f"adjoint is {adjoint!r}; expected 'auto' or one of jaxmeta's adjoints, such as "
        "jaxmeta.MixedMode()."
    )
