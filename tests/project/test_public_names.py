"""The two doors: adding or removing a public name is a decision, so it is made here as well."""

import inspect
from types import ModuleType

import pytest

import jaxmeta
import jaxmeta_bridge

JAXMETA = {
    "Adjoint",
    "ArgumentKeyError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "JaxmetaError",
    "NonFiniteError",
    "ReverseMode",
    "StepCheckpoint",
    "Unrolled",
    "functional",
    "meta_unroll",
}
JAXMETA_BRIDGE = {
    "ControlFlowError",
    "ConversionError",
    "UnsupportedOpError",
    "from_torch",
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
def test_every_public_name_is_documented(door: ModuleType, names: set[str]):
    # vars, because a class without a docstring would otherwise show that of its base class.
    public = {name: getattr(door, name) for name in names}
    docs = {
        n: vars(o).get("__doc__") if inspect.isclass(o) else o.__doc__ for n, o in public.items()
    }
    assert not [name for name, doc in docs.items() if not doc]
