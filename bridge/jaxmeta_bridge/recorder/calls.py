"""A torch call as an operation of the recording: its results' kinds, and its meaning in JAX.

The first call of a function with arguments of some kinds is run once on fake tensors, which tells
the results' shapes, dtypes and places in autograd, what is changed in place and what shares memory,
and traced once into a `Program`. Later calls look the outcome up. What cannot be traced has an
outcome too: `None`, and is computed by ordinary means.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as torch_tree

from jaxmeta_bridge.aten import LOWERINGS
from jaxmeta_bridge.dlpack import tensor_to_jax
from jaxmeta_bridge.errors import ControlFlowError, ConversionError, UnsupportedOpError
from jaxmeta_bridge.interpret import interpret
from jaxmeta_bridge.program import Node, Program, Spec, Var
from jaxmeta_bridge.recorder.graph import Kind
from jaxmeta_bridge.settings import TRACING, quiet
from jaxmeta_bridge.trace import trace

Autocast = torch.dtype | None


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor (or a number that is an input) stands among the arguments."""

    index: int


class CallOp:
    """A torch function of tensors, with all other arguments fixed."""

    __slots__ = ("_constants", "_program", "draws", "kinds", "name", "replay", "written")

    def __init__(
        self,
        name: str,
        program: Program,
        kinds: tuple[Kind, ...],
        draws: tuple[Callable[[], torch.Tensor], ...],
        written: tuple[int, ...],
        replay: Callable[..., Any],
    ) -> None:
        self.name = name
        self.kinds = kinds
        self.draws = draws  # make the random numbers that follow the other inputs
        self.written = written  # inputs that it changes: their new values follow the results
        self.replay = replay  # the function itself, of real tensors
        self._program = program
        self._constants: list[jax.Array] | None = None

    def lower(self, inputs: Sequence[jax.Array], adjoint: Any) -> list[jax.Array]:
        """See `Op.lower`."""
        if self._constants is None:
            with jax.ensure_compile_time_eval():
                self._constants = [tensor_to_jax(t) for t in self._program.constants.values()]
        outputs = interpret(self._program, list(inputs), self._constants, None)
        return [
            output if kind.grad else jax.lax.stop_gradient(output)
            for output, kind in zip(outputs, self.kinds, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is known of a call before it runs."""

    op: CallOp
    rebuild: Callable[[list[Any]], Any]  # the result from its tensors
    single: bool  # it is one tensor
    count: int  # of tensors in the result
    same: tuple[int | None, ...]  # result tensor -> the input that it is, the very same object
    views: tuple[int | None, ...]  # result tensor -> the input whose memory it shares


_ONE_DTYPE = {
    *("linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm"),
    *("addmv", "baddbmm", "addbmm", "dot", "vdot", "inner", "ger", "outer", "index_copy"),
    *("index_copy_", "index_add", "index_add_", "scatter", "scatter_", "scatter_add", "lerp"),
    *("scatter_add_", "lstm", "gru", "rnn_tanh", "rnn_relu", "Linear", "Sequential", "einsum"),
}


def _refuses_mixed_dtypes(function: Any, kinds: Sequence[Kind]) -> bool:
    """Whether torch itself will refuse: fake tensors are more generous than real ones."""
    if getattr(function, "__name__", "") not in _ONE_DTYPE:
        return False
    return len({kind.dtype for kind in kinds if kind.dtype.is_floating_point}) > 1


def study(
    function: Callable[..., Any],
    args: Any,
    kwargs: dict[str, Any],
    kinds: Sequence[Kind],
    numbers: int,
    autocast: Autocast,
) -> Outcome | None:
    """Finds the outcome of `function(*args, **kwargs)`; None if it cannot be traced.

    Args:
      function: a torch function.
      args: its arguments, with a `Slot` for each tensor.
      kwargs: likewise.
      kinds: of the tensors, by slot.
      numbers: how many of the last slots are Python numbers.
      autocast: the dtype, where autocast is on.
    """
    enabled = torch.is_grad_enabled()
    if autocast is None and _refuses_mixed_dtypes(function, kinds):
        return None
    if "rrelu" in getattr(function, "__name__", ""):
        return None  # how many numbers it draws depends on values

    def call(tensors: Sequence[Any], grad: bool = enabled) -> Any:
        with torch.set_grad_enabled(grad), _autocast(autocast):
            return function(*fill(args, tensors), **fill(kwargs, tensors))

    with TRACING:
        try:
            found = _look(call, kinds, numbers)
            if found is None:
                return None
            results, inputs, written, dtype = found
            return _outcome(function, call, kinds, numbers, dtype, results, inputs, written)
        except (UnsupportedOpError, ControlFlowError, ConversionError):
            return None


def _look(call: Any, kinds: Sequence[Kind], numbers: int) -> Any:
    """Runs the call on fake tensors: results, arguments, which were changed; None if it cannot."""
    with quiet(), torch.inference_mode(False), FakeTensorMode(allow_non_fake_inputs=True):
        count = len(kinds) - numbers
        inputs = [_example(kind) for kind in kinds[:count]]
        versions = [tensor._version for tensor in inputs]
        try:
            results = call([*inputs, *[1.5] * numbers])
        except Exception:  # whatever it is, the real call will tell
            return None
        written = tuple(i for i, t in enumerate(inputs) if t._version != versions[i])
        leaves = torch_tree.tree_leaves(results)
        if not all(isinstance(leaf, (torch.Tensor, *_PLAIN)) for leaf in leaves):
            return None
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(t.layout is not torch.strided or t.device.type == "meta" for t in tensors):
            return None
        dtype = tensors[0].dtype if tensors else torch.float32
        if numbers and not (dtype.is_floating_point or dtype.is_complex):
            return None
        return results, inputs, written, dtype


_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


def _example(kind: Kind) -> torch.Tensor:
    with torch.enable_grad():
        tensor = kind.empty()
        if not kind.grad:
            return tensor
        result = tensor.requires_grad_().clone()
        if kind.strides is None or result.stride() == kind.strides:
            return result
        # clone() closes gaps in memory.
        size = 1 + sum((n - 1) * s for n, s in zip(kind.shape, kind.strides, strict=True))
        whole = torch.empty(size, dtype=kind.dtype).requires_grad_().clone()
        return whole.as_strided(kind.shape, kind.strides)


def _outcome(
    function: Any,
    call: Any,
    kinds: Sequence[Kind],
    numbers: int,
    number_dtype: torch.dtype,
    results: Any,
    inputs: list[torch.Tensor],
    written: tuple[int, ...],
) -> Outcome:
    count = len(kinds) - numbers
    specs = [Spec(kind.shape, kind.dtype, kind.strides) for kind in kinds[:count]]
    specs += [Spec((), number_dtype)] * numbers

    def traced(*tensors: torch.Tensor) -> Any:
        return torch_tree.tree_leaves(call(tensors)), tensors

    program = trace(traced, specs)
    leaves, structure = torch_tree.tree_flatten(results)
    is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    plain = [None if tensor else leaf for leaf, tensor in zip(leaves, is_tensor, strict=True)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    outputs = [out for out in program.outputs[: len(leaves)] if isinstance(out, Var)]
    assert len(outputs) == len(tensors)
    # Batch norm changes its statistics without torch counting it as a change.
    changed = {i for i, var in enumerate(program.inputs) if var in program.changed}
    written = tuple(sorted({*written, *changed}))
    finals = [inputs[index] for index in written]
    outputs += [program.outputs[len(leaves) + index] for index in written]
    program = dataclasses.replace(program, outputs=tuple(outputs)).without_dead_nodes()
    program, draws = _draws_as_inputs(program, specs)
    op = CallOp(
        getattr(function, "__name__", str(function)),
        program,
        tuple(Kind.like(tensor) for tensor in [*tensors, *finals]),
        draws,
        written,
        call,
    )

    def rebuild(values: list[Any]) -> Any:
        rest = iter(values)
        filled = [next(rest) if t else p for t, p in zip(is_tensor, plain, strict=True)]
        return torch_tree.tree_unflatten(filled, structure)

    storages = [tensor.untyped_storage()._cdata for tensor in inputs]
    return Outcome(
        op,
        rebuild,
        isinstance(results, torch.Tensor),
        len(tensors),
        tuple(_find(lambda i, t=t: i is t, inputs) for t in tensors),
        tuple(_find(lambda s, t=t: s == t.untyped_storage()._cdata, storages) for t in tensors),
    )


def _find(test: Callable[[Any], bool], items: Sequence[Any]) -> int | None:
    return next((index for index, item in enumerate(items) if test(item)), None)


_aten: Any = torch.ops.aten
# Draws whose distribution no tensor decides: of their arguments only the shapes matter.
_FREE_DRAWS = {
    _aten.rand.default,
    _aten.rand_like.default,
    _aten.randn.default,
    _aten.randn_like.default,
    _aten.randint.default,
    _aten.randint.low,
    _aten.randint_like.default,
    _aten.randint_like.low_dtype,
    _aten.randperm.default,
}
# Those that fill a tensor: torch draws in the order of its memory.
_FILLS = {
    _aten.uniform.default: torch.Tensor.uniform_,
    _aten.normal_functional.default: torch.Tensor.normal_,
    _aten.log_normal.default: torch.Tensor.log_normal_,
    _aten.exponential.default: torch.Tensor.exponential_,
    _aten.cauchy.default: torch.Tensor.cauchy_,
    _aten.geometric.default: torch.Tensor.geometric_,
    _aten.bernoulli.p: torch.Tensor.bernoulli_,
}


def _draws_as_inputs(
    program: Program, specs: Sequence[Spec]
) -> tuple[Program, tuple[Callable[[], torch.Tensor], ...]]:
    """The program with its random numbers as further inputs, and what draws them.

    They are torch's own, drawn in torch's order when the call is recorded: a seed means the same.
    """
    draws: list[Callable[[], torch.Tensor]] = []
    inputs = list(program.inputs)
    nodes: list[Node] = []
    known: dict[Any, Any] = dict(zip(program.inputs, specs, strict=True))
    known |= {var: Spec.of(tensor) for var, tensor in program.constants.items()}
    for node in program.nodes:
        known |= dict(zip(node.outputs, node.specs, strict=True))
        if not LOWERINGS[node.op].draws:
            nodes.append(node)
        elif (node.op in _FREE_DRAWS or node.op in _FILLS) and node.outputs[0] is not None:
            draws.append(_drawer(node, known))
            inputs.append(node.outputs[0])
        else:
            raise UnsupportedOpError("a draw whose distribution depends on values")
    return dataclasses.replace(program, inputs=tuple(inputs), nodes=tuple(nodes)), tuple(draws)


def _drawer(node: Node, specs: dict[Any, Spec]) -> Callable[[], torch.Tensor]:
    def example(leaf: Any) -> Any:
        if not isinstance(leaf, Var):
            return leaf
        return specs[leaf].empty()

    def draw() -> torch.Tensor:
        args, kwargs = torch_tree.tree_map(example, (node.args, node.kwargs))
        with torch.no_grad():
            return _FILLS.get(node.op, node.op)(*args, **kwargs)

    return draw


def fill(template: Any, tensors: Sequence[Any]) -> Any:
    """`template` with the tensors in their slots."""
    if type(template) is Slot:
        return tensors[template.index]
    if isinstance(template, tuple | list):
        items = [fill(item, tensors) for item in template]
        if hasattr(template, "_fields"):
            return type(template)(*items)
        return type(template)(items)
    if isinstance(template, dict):
        return {key: fill(item, tensors) for key, item in template.items()}
    if isinstance(template, slice):
        return slice(*(fill(p, tensors) for p in (template.start, template.stop, template.step)))
    return template


@contextlib.contextmanager
def _autocast(dtype: Autocast) -> Iterator[None]:
    if dtype is None:
        yield
    else:
        with torch.autocast("cpu", dtype=dtype, cache_enabled=False):
            yield
