"""Traces a torch callable into a `Program` of functional aten operations, without computing.

Fake tensors (shapes and dtypes, no values) run through the callable. torch's functionalisation
turns in-place operations and views into pure ones, also those inside of torch's own C++; below it
`Recorder`, a mode for fake tensors, writes down what is left. Operations that the table does not
know are decomposed by torch's own rules until it does. What no rule resolves is collected, so that
one error names every gap.
"""

import collections
import contextlib
import functools
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._decomp import core_aten_decompositions
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.utils import _pytree as torch_tree

from jaxmeta_bridge.aten import DECOMPOSITIONS, LOWERINGS
from jaxmeta_bridge.errors import ControlFlowError, ConversionError, UnsupportedOpError
from jaxmeta_bridge.leaves import Leaves
from jaxmeta_bridge.location import locate
from jaxmeta_bridge.program import Location, Node, Program, Spec, Var
from jaxmeta_bridge.settings import tracing_settings

# Queries of a tensor's metadata: they compute nothing.
_METADATA = {torch.ops.prim.device.default, torch.ops.prim.layout.default}


def trace(
    function: Callable[..., Any],
    specs: Sequence[Spec],
    module_names: dict[int, str] | None = None,
) -> Program:
    """Records `function(*tensors)` for tensors of the given shapes and dtypes.

    Args:
      function: takes one positional tensor per spec; returns any tree that torch flattens.
      specs: shape and dtype of each argument.
      module_names: path of each submodule by `id`, for error messages.

    Raises:
      UnsupportedOpError: names every operation without a lowering, where it was called.
      ControlFlowError: a Python value was asked of a tensor that has none yet.
      ConversionError: the callable uses a tensor that needs gradients but is no argument of it.
    """
    recorder = Recorder(module_names or {})
    with tracing_settings():
        with recorder.paused():
            arguments = [spec.empty() for spec in specs]
        inputs = tuple(recorder.variable(argument) for argument in arguments)
        with recorder, _Functional(recorder):
            functional = [FunctionalTensor.to_functional(argument) for argument in arguments]
            with Leaves():
                results = function(*functional)
            leaves, structure = torch_tree.tree_flatten(_with_named_tuples(results))
            leaves = [_present(leaf) for leaf in leaves]
            finals = [_present(argument) for argument in functional]
    recorder.raise_if_unsupported()
    outputs = tuple(recorder.read_output(leaf) for leaf in leaves)
    program = Program(
        inputs,
        recorder.constants,
        tuple(recorder.nodes),
        outputs,
        functools.partial(torch_tree.tree_unflatten, treespec=structure),
        frozenset(v for v, t in zip(inputs, finals, strict=True) if recorder.variable(t) != v),
    )
    return program.without_dead_nodes()


def _with_named_tuples(results: Any) -> Any:
    """torch's own result types (of `max`, `sort`, ...) as named tuples, which JAX knows."""

    def is_result(node: Any) -> bool:
        return type(node).__module__ == "torch.return_types"

    def convert(node: Any) -> Any:
        if not is_result(node):
            return node
        members = vars(type(node)).items()
        fields = [name for name, kind in members if isinstance(kind, types.MemberDescriptorType)]
        return _named_tuple(type(node).__name__, tuple(fields))(*node)

    return torch_tree.tree_map(convert, results, is_leaf=is_result)


@functools.cache
def _named_tuple(name: str, fields: tuple[str, ...]) -> Callable[..., Any]:
    return collections.namedtuple(name, fields)


def _present(value: Any) -> Any:
    """The present value of a functional tensor, as the recorder knows it."""
    if not isinstance(value, FunctionalTensor):
        return value
    private: Any = torch
    private._sync(value)
    return private._from_functional_tensor(value.elem)


class _Functional(FunctionalTensorMode):
    """Turns in-place operations and views into pure ones."""

    def __init__(self, recorder: "Recorder") -> None:
        super().__init__()
        self._recorder = recorder
        self._constants: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._linalg_check_errors.default:
            return None  # has no result, and whether it raises depends on values
        if not _writes_first(func):
            args, kwargs = torch_tree.tree_map(self._functional, (args, kwargs or {}))
            return super().__torch_dispatch__(func, types, args, kwargs)
        if not isinstance(args[0], FunctionalTensor):
            self._recorder.refuse_change_of_captured(func)
        if torch.is_grad_enabled() or not args[0].is_floating_point():
            return super().__torch_dispatch__(func, types, args, kwargs)
        if args[0]._is_view():
            self._recorder.refuse_change_of_view(func)
        # Autograd does not notice a change under no_grad: the derivative stays what it was.
        with self, torch.enable_grad():
            before = args[0].clone()
        results = super().__torch_dispatch__(func, types, args, kwargs)
        with self, torch.enable_grad():
            args[0].copy_(torch.ops.jaxmeta_bridge.with_derivative_of(args[0], before))
        return results

    def _functional(self, leaf: Any) -> Any:
        """What is computed from constants alone may be changed in place as well."""
        if type(leaf) is not torch.Tensor or leaf.requires_grad:
            return leaf
        if id(leaf) not in self._constants:
            with self:
                self._constants[id(leaf)] = FunctionalTensor.to_functional(leaf), leaf
        return self._constants[id(leaf)][0]


def _writes_first(func: Any) -> bool:
    """Whether it is an in-place operation."""
    arguments = func._schema.arguments if isinstance(func, torch._ops.OpOverload) else []
    return bool(arguments and arguments[0].alias_info and arguments[0].alias_info.is_write)


class Recorder(FakeTensorMode):
    """Writes down every operation that reaches it, with variables in place of tensors."""

    def __init__(self, module_names: dict[int, str]) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._computing = False  # shapes, in operations that are no part of the program
        self.nodes: list[Node] = []
        self.constants: dict[Var, torch.Tensor] = {}
        self._module_names = module_names
        self._decomposing: list[Any] = []  # from the operation the user called to its parts
        self._unsupported: dict[str, None] = {}  # an ordered set of report lines
        self._variables: dict[int, tuple[Var, torch.Tensor]] = {}  # the tensor keeps its id alive
        self._fresh = itertools.count()

    def variable(self, tensor: torch.Tensor) -> Var:
        """The variable that stands for a tensor, made when it is first seen."""
        if id(tensor) not in self._variables:
            return self._assign(tensor)
        return self._variables[id(tensor)][0]

    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if self._computing or func in _METADATA:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        try:
            return self._record_or_decompose(func, args, kwargs or {})
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            location = str(self._locate())
            raise ControlFlowError(_control_flow_message(func, location)) from error
        except RuntimeError as error:
            if not hasattr(error, "__notes__"):
                error.add_note(f"from_torch was tracing {self._locate()}")
            raise

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Computes fake tensors without recording."""
        before, self._computing = self._computing, True
        try:
            with self:
                yield
        finally:
            self._computing = before

    def _record_or_decompose(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in LOWERINGS:
            return self._record(func, args, kwargs)
        self._decomposing.append(func)
        try:
            with self:
                results = _decompose(func, args, kwargs)
            return self._run_unknown(func, args, kwargs) if results is NotImplemented else results
        finally:
            self._decomposing.pop()

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _refuse_custom_gradient()
        if kwargs.get("generator") is not None:
            raise UnsupportedOpError(
                f"{self._locate()} draws from a torch.Generator of its own ({func}), which JAX "
                "cannot. Leave it out: the numbers come from `rng=`."
            )
        node_args, node_kwargs = torch_tree.tree_map(self._read, (args, kwargs))
        with self.paused():
            results = func(*args, **kwargs)
        single = isinstance(results, torch.Tensor)
        tensors = [
            value if isinstance(value, torch.Tensor) else None
            for value in ([results] if single else results)
        ]
        self.nodes.append(
            Node(
                op=func,
                args=node_args,
                kwargs=node_kwargs,
                outputs=tuple(None if t is None else self._assign(t) for t in tensors),
                specs=tuple(None if t is None else Spec.of(t) for t in tensors),
                single=single,
                differentiable=torch.is_grad_enabled(),
                location=self._locate(),
            )
        )
        return results

    def _assign(self, result: torch.Tensor) -> Var:
        """A new variable for a result: what reads this tensor from now on reads that value."""
        variable = Var(next(self._fresh))
        self._variables[id(result)] = (variable, result)
        return variable

    def refuse_change_of_captured(self, func: Any) -> None:
        """Raises: a change of what is neither argument nor buffer would be lost."""
        raise UnsupportedOpError(
            f"{self._locate()} changes a tensor in place ({func}) that is neither an argument nor "
            "a registered buffer; a pure function cannot. Register it with register_buffer, and "
            "its new value is returned."
        )

    def refuse_change_of_view(self, func: Any) -> None:
        """Raises: what the change leaves of the derivative of the whole cannot be told here."""
        raise UnsupportedOpError(
            f"{self._locate()} changes a view in place ({func}) under torch.no_grad(). Assign to "
            "the whole instead, x[index] = value, or leave out no_grad."
        )

    def _locate(self) -> Location:
        return locate(self._module_names)

    def _read(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return self.variable(leaf) if id(leaf) in self._variables else self._capture(leaf)

    def _capture(self, tensor: torch.Tensor) -> Var:
        """A tensor that is no argument is a constant, unless a gradient would be lost."""
        if isinstance(tensor, FakeTensor):
            raise UnsupportedOpError(
                f"{self._locate()} uses a tensor that no traced operation made, such as an "
                "nn.Parameter or a module created inside the callable. Create it outside, and pass "
                "it or register it."
            )
        if tensor.requires_grad:
            raise ConversionError(
                f"the callable uses a tensor of shape {tuple(tensor.shape)} that requires grad but "
                f"is neither an argument nor a registered parameter, so its gradient would be lost "
                f"({self._locate()}). Pass it as an argument, register it on the "
                "module, or use it detached."
            )
        variable = self.variable(tensor)
        self.constants[variable] = tensor
        return variable

    def read_output(self, leaf: Any) -> Any:
        """The variable of a returned tensor; other returned values stay as they are."""
        if isinstance(leaf, torch.Tensor) or leaf is None or isinstance(leaf, _PLAIN):
            return self._read(leaf)
        raise ConversionError(
            f"the callable returns a {type(leaf).__name__}; expected tensors, numbers, strings or "
            "None in tuples, lists, dicts or types known to torch.utils._pytree. Register the type "
            "there, or return its tensors."
        )

    def _run_unknown(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Notes an operation without a lowering and goes on, to find the others too."""
        location = self._locate()
        try:
            with self.paused():
                results = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise
        except Exception:
            self._unsupported[f"{self._decomposing[0]} ({location})"] = None
            self.raise_if_unsupported()
            raise
        if func is not torch.ops.aten._local_scalar_dense.default:  # of a value known at trace time
            self._unsupported[f"{self._decomposing[0]} ({location})"] = None
            for leaf in torch_tree.tree_leaves(results):
                if isinstance(leaf, torch.Tensor):
                    self.variable(leaf)
        return results

    def raise_if_unsupported(self) -> None:
        """Raises one error for all operations that have no lowering."""
        if self._unsupported:
            raise UnsupportedOpError(
                "from_torch has no JAX lowering for:\n  "
                + "\n  ".join(self._unsupported)
                + "\nRewrite these lines with other operations, or compute that part in JAX."
            )


_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)


@functools.cache
def _core_decompositions() -> dict[Any, Callable[..., Any]]:
    return dict(core_aten_decompositions())


def _decompose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs torch's own rule for `func` in simpler operations; NotImplemented if there is none."""
    rule = DECOMPOSITIONS.get(func) or _core_decompositions().get(func)
    if rule is not None:
        results = rule(*args, **kwargs)
        if results is not NotImplemented:
            return results
    return func.decompose(*args, **kwargs)


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _refuse_custom_gradient() -> None:
    """A torch.autograd.Function hides its gradient from the tracer: say so."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not trace.__code__:
        if frame.f_code is _APPLY:
            raise UnsupportedOpError(
                f"the callable uses the torch.autograd.Function {frame.f_locals['cls'].__name__}, "
                "whose hand-written gradient cannot be traced. Write it with ordinary torch "
                "operations (x + (y - x).detach() passes a gradient straight through), or write "
                "that part in JAX with jax.custom_vjp."
            )
        frame = frame.f_back


def _control_flow_message(func: Any, location: str) -> str:
    if func is torch.ops.aten._local_scalar_dense.default:
        what = "asks for the Python value of a tensor (if, while, bool, int, float, item)"
        remedy = "Use torch.where, or compute the decision outside and pass it as a Python value."
    else:
        what = f"calls {func}, the shape of whose result depends on values"
        remedy = (
            "Use a mask with torch.where instead of selecting, or pass indices of fixed length."
        )
    return (
        f"{location} {what}. from_torch traces shapes without values, so that the result can be "
        f"compiled and differentiated. {remedy}"
    )
