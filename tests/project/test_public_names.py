"""The two doors: adding or removing a public name is a decision, so it is made here as well."""

import inspect
from types import FunctionType, ModuleType

import pytest

import jaxmeta
import jaxmeta_bridge

JAXMETA = {
    "Adjoint",
    "ArgumentKeyError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "Auto",
    "Bijector",
    "BinomialCheckpoint",
    "FirstOrder",
    "ForwardMode",
    "JaxmetaError",
    "MixedMode",
    "NestedCheckpoint",
    "NonFiniteError",
    "ReverseMode",
    "StepCheckpoint",
    "TruncatedReverse",
    "Unrolled",
    "bounded",
    "constrain",
    "functional",
    "meta_unroll",
    "nonnegative",
    "positive",
    "unconstrain",
    "unit_interval",
}
JAXMETA_BRIDGE = {
    "ControlFlowError",
    "ConversionError",
    "ModuleFunction",
    "TensorFunction",
    "TorchTransformation",
    "UnsupportedOpError",
    "from_torch",
    "optax_from_torch",
    "tensor_to_jax",
    "tensor_to_torch",
    "to_torch",
    "tree_to_jax",
    "tree_to_torch",
}
DOORS = [(jaxmeta, JAXMETA), (jaxmeta_bridge, JAXMETA_BRIDGE)]


@pytest.mark.parametrize(("door", "names"), DOORS)
def test_public_names(door: ModuleType, names: set[str]):
    assert set(door.__all__) == names
    assert len(door.__all__) == len(names)


@pytest.mark.parametrize(("door", "names"), DOORS)
def test_everything_public_is_documented(door: ModuleType, names: set[str]):
    undocumented = set()
    for name in names:
        public = getattr(door, name)
        members = vars(public) if inspect.isclass(public) else {"__doc__": public.__doc__}
        # Of a class, its own docstring: without one, getattr would find that of its base class.
        if not members.get("__doc__"):
            undocumented.add(name)
        undocumented |= {
            f"{name}.{key}"
            for key, member in members.items()
            if not key.startswith("_")
            and isinstance(member, FunctionType | property)
            and not member.__doc__
        }
    assert not undocumented
