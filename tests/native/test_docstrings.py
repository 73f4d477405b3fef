"""Every public name has a docstring, and the examples in them run."""

import doctest
import importlib
import pkgutil

import pytest

import jaxmeta

MODULES = ["jaxmeta", *(m.name for m in pkgutil.walk_packages(jaxmeta.__path__, "jaxmeta."))]
ADJOINTS = [
    "BinomialCheckpoint",
    "ForwardMode",
    "MixedMode",
    "NestedCheckpoint",
    "ReverseMode",
    "StepCheckpoint",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", jaxmeta.__all__)
def test_public_names_are_documented(name: str) -> None:
    assert getattr(jaxmeta, name).__doc__


@pytest.mark.parametrize("name", ["meta_unroll", "functional", *ADJOINTS])
def test_what_computes_has_an_example_and_a_source(name: str) -> None:
    documentation = getattr(jaxmeta, name).__doc__
    assert ">>> " in documentation and "References:" in documentation


def test_public_names() -> None:
    assert jaxmeta.__all__ == [
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
    ]
