"""Traces a torch callable into a `Program` of functional aten operations, without computing.

Fake tensors (shapes and dtypes, no values) run through the callable. `torch.func.functionalize`
turns in-place operations and views into pure ones, a `TorchDispatchMode` below autograd records
what is left, and operations that the table does not know are decomposed by torch's own rules until
it does. What no rule resolves is collected, so that one error names every gap.
"""

import collections
import contextlib
import functools
import itertools
import logging
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
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as torch_tree
from torch.utils._python_dispatch import TorchDispatchMode

from jaxmeta_bridge.aten import DECOMPOSITIONS, LOWERINGS
from jaxmeta_bridge.errors import ControlFlowError, ConversionError, UnsupportedOpError
from jaxmeta_bridge.leaves import Leaves
from jaxmeta_bridge.location import locate
from jaxmeta_bridge.program import Location, Node, Program, Spec, Var

_UNDECLARED_MUTATIONS = {torch.ops.aten.native_batch_norm.default}
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
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)

    def recorded(*tensors: torch.Tensor) -> Any:
        # Whatever the caller's grad mode, what is traced must be differentiable.
        with torch.enable_grad(), recorder, Leaves():
            return function(*tensors)

    with _defaults(), fake_mode:
        arguments = [torch.empty(spec.shape, dtype=spec.dtype, device="cpu") for spec in specs]
        inputs = tuple(recorder.variable(argument) for argument in arguments)
        try:
            results = torch.func.functionalize(recorded)(*arguments)
        except RuntimeError as error:
            _raise_if_custom_gradient(error)
            if "mutating a non-functional tensor" in str(error):
                raise UnsupportedOpError(
                    f"{recorder.last_location} or after it, the callable changes a tensor in place "
                    "that is neither an argument nor a registered buffer; a pure function cannot. "
                    "Register it with register_buffer, and its new value is returned."
                ) from error
            raise
    recorder.raise_if_unsupported()
    leaves, structure = torch_tree.tree_flatten(_with_named_tuples(results))
    outputs = tuple(recorder.read_output(leaf) for leaf in leaves)
    program = Program(
        inputs,
        recorder.constants,
        tuple(recorder.nodes),
        outputs,
        functools.partial(torch_tree.tree_unflatten, treespec=structure),
        # functionalize writes the final value of a changed argument back into it.
        frozenset(v for v, a in zip(inputs, arguments, strict=True) if a._version > 0),
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


@contextlib.contextmanager
def _defaults() -> Iterator[None]:
    """torch's modes as they are at the start, whatever they are around the call."""
    no_autocast = torch.autocast("cpu", enabled=False)
    with _without_fused_layers(), _quiet(), torch.inference_mode(False), no_autocast:
        yield


@contextlib.contextmanager
def _without_fused_layers() -> Iterator[None]:
    """In eval mode torch's transformer layers call kernels that are no compositions."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch logs a page about each error that user code raises on fake tensors, then raises it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


class Recorder(TorchDispatchMode):
    """Writes down every operation that reaches it, with variables in place of tensors."""

    def __init__(self, module_names: dict[int, str]) -> None:
        super().__init__()
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

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        try:
            return self._dispatch(func, args, kwargs or {})
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            location = str(self._locate())
            raise ControlFlowError(_control_flow_message(func, location)) from error
        except RuntimeError as error:
            if not hasattr(error, "__notes__"):
                error.add_note(f"from_torch was tracing {self._locate()}")
            raise

    def _dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _METADATA:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._refuse_change_of_captured(func, args)
        if func in _UNDECLARED_MUTATIONS:
            return self._record_batch_norm(args)
        if func in LOWERINGS:
            return self._record(func, args, kwargs)
        if (functional := _out_of_place(func)) in LOWERINGS:
            return self._record_in_place(func, functional, args, kwargs)
        self._decomposing.append(func)
        try:
            with self:
                results = _decompose(func, args, kwargs)
            return self._run_unknown(func, args, kwargs) if results is NotImplemented else results
        finally:
            self._decomposing.pop()

    def _record(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], runs: Any = None
    ) -> Any:
        node_args, node_kwargs = torch_tree.tree_map(self._read, (args, kwargs))
        results = (runs or func)(*args, **kwargs)
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

    def _record_in_place(
        self, func: Any, functional: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Records `x.op_()` as `x = op(x)`: torch's own kernels do this to temporary tensors.

        A change of values is refused where another tensor shares the memory and would change too.
        """
        changed = args[0]
        if torch.Tag.inplace_view not in func.tags and self._is_shared(changed):
            self._unsupported[f"{func} on memory with several views ({self._locate()})"] = None
        return self._record(functional, args, kwargs, runs=func)

    def _is_shared(self, tensor: torch.Tensor) -> bool:
        storage = StorageWeakRef(tensor.untyped_storage())
        return any(
            other is not tensor and storage == StorageWeakRef(other.untyped_storage())
            for _, other in self._variables.values()
        )

    def _refuse_change_of_captured(self, func: Any, args: tuple[Any, ...]) -> None:
        if isinstance(args[0], torch.Tensor) and not isinstance(args[0], FakeTensor):
            raise UnsupportedOpError(
                f"{self._locate()} changes a tensor in place ({func}) that is neither an argument "
                "nor a registered buffer; a pure function cannot. Register it with "
                "register_buffer, and its new value is returned."
            )

    @property
    def last_location(self) -> str:
        """Where the last recorded operation was called."""
        return str(self.nodes[-1].location) if self.nodes else "at its beginning"

    def _locate(self) -> Location:
        return locate(self._module_names)

    def _record_batch_norm(self, args: tuple[Any, ...]) -> Any:
        """Records batch norm in the form that returns the new running statistics.

        The kernel changes `running_mean` and `running_var` in place although its schema does not
        say so, hence functionalize does not see it. What reads them later reads the new values.
        """
        aten, running = torch.ops.aten, args[3:5]
        if running[0] is None:
            return self._record(aten._native_batch_norm_legit.no_stats, args[:3] + args[5:], {})
        results = self._record(aten._native_batch_norm_legit_functional.default, args, {})
        for old, new in zip(running, results[3:], strict=True):
            self._variables[id(old)] = (self.variable(new), old)
        return results[:3]

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


@functools.cache
def _out_of_place(func: Any) -> Any:
    """The operation that returns what `func` writes into its first argument; None if it is none."""
    if func is torch.ops.aten.bernoulli_.float:
        return torch.ops.aten.bernoulli.p
    name, overload = func._schema.name.removeprefix("aten::"), func._overloadname
    if not func._schema.is_mutable or not name.endswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1], None), overload, None)


def _decompose(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs torch's own rule for `func` in simpler operations; NotImplemented if there is none."""
    rule = DECOMPOSITIONS.get(func) or _core_decompositions().get(func)
    if rule is not None:
        results = rule(*args, **kwargs)
        if results is not NotImplemented:
            return results
    return func.decompose(*args, **kwargs)


def _raise_if_custom_gradient(error: RuntimeError) -> None:
    """A torch.autograd.Function hides its gradient from the tracer: say so, and where."""
    apply = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    trace_back = error.__traceback__
    while trace_back is not None:
        frame = trace_back.tb_frame
        if frame.f_code is apply:
            raise UnsupportedOpError(
                f"the callable uses the torch.autograd.Function {frame.f_locals['cls'].__name__}, "
                "whose hand-written gradient cannot be traced. Write it with ordinary torch "
                "operations (x + (y - x).detach() passes a gradient straight through), or write "
                "that part in JAX with jax.custom_vjp."
            ) from error
        trace_back = trace_back.tb_next


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
