"""Scripts as users write them, run on plain eager torch and on the drop-in and compared.

A script is a function of `higher` (one of the two) and of `peek`, which it calls on the values
that it could read at that point. It returns tensors, numbers, strings, None, and lists, tuples and
dicts of these. `@script` makes it a test that runs twice: once nothing is read before the end, and
once every peek reads in all the usual ways. Neither may change a result.
"""

import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from eager_higher import get_diff_optim, innerloop_ctx, monkeypatch
from torch import nn

from jaxmeta import JaxmetaError
from jaxmeta_bridge import higher as drop_in

TOLERANCES: dict[torch.dtype, Any] = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.complex128: {"rtol": 1e-9, "atol": 1e-9},
    torch.bfloat16: {"rtol": 0.05, "atol": 0.01},  # eight bits, and many roundings
}

EAGER = types.SimpleNamespace(
    innerloop_ctx=innerloop_ctx, monkeypatch=monkeypatch, get_diff_optim=get_diff_optim
)


def quiet(*values: Any) -> None:
    """Reads nothing."""


def read(*values: Any) -> None:
    """Reads the values as scripts do: printed, formatted, as Python numbers and as NumPy."""
    for value in values:
        assert len(f"{value} {value!r}") > 0
        narrow = value.dtype is torch.bfloat16  # unknown to NumPy
        numbers = (value.detach().float() if narrow else value.detach()).numpy()
        assert np.array_equal(numbers, np.asarray(value.tolist()), equal_nan=True)
        if value.numel() == 1:
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                assert value.item() == float(value)  # torch warns once where it needs gradients
            assert bool(value) == bool(numbers)
            assert f"{value.item():.3f}" == f"{float(numbers.item()):.3f}"


def run(function: Callable[..., Any], higher: Any, peek: Callable[..., None] = quiet) -> Any:
    """The results of a script as ordinary values, and where torch's generator stands after it."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  (scripts draw from the global generator)
    results = plain(function(higher, peek))
    return results, torch.get_rng_state()


def plain(value: Any) -> Any:
    """Tensors as ordinary tensors with the same `requires_grad`, in the same containers."""
    if isinstance(value, torch.Tensor):
        numbers = torch.tensor(value.detach().tolist(), dtype=value.dtype).reshape(value.shape)
        return numbers.requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def assert_same(got: Any, expected: Any, path: str = "result") -> None:
    """Equal containers, dtypes, shapes and `requires_grad`; numbers to 1e-9 in float64."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor), f"{path}: {got!r} for a tensor"
        assert got.requires_grad == expected.requires_grad, f"{path}: requires_grad"
        tolerance = TOLERANCES.get(expected.dtype, {})
        torch.testing.assert_close(
            got, expected, equal_nan=True, msg=lambda text: f"{path}: {text}", **tolerance
        )
    elif isinstance(expected, dict):
        assert list(got) == list(expected), f"{path}: keys {list(got)} for {list(expected)}"
        for key, item in expected.items():
            assert_same(got[key], item, f"{path}[{key!r}]")
    elif isinstance(expected, list):
        assert len(got) == len(expected), f"{path}: {len(got)} items for {len(expected)}"
        for i, item in enumerate(expected):
            assert_same(got[i], item, f"{path}[{i}]")
    elif isinstance(expected, float | complex):
        assert got == pytest.approx(expected, rel=1e-9, abs=1e-9), path
    else:
        assert type(got) is type(expected) and got == expected, f"{path}: {got!r}, {expected!r}"


def check(function: Callable[..., Any], peek: Callable[..., None] = quiet) -> None:
    """The drop-in agrees with eager torch, and torch's generator is left at the same place."""
    expected, state = run(function, EAGER)
    got, state_of_drop_in = run(function, drop_in, peek)
    assert_same(got, expected)
    assert torch.equal(state_of_drop_in, state), "torch's global generator stands elsewhere"


def right_or_refused(function: Callable[..., Any], peek: Callable[..., None] = quiet) -> None:
    """`check`, unless the drop-in says by an error of its own that it cannot."""
    refusal = None
    try:
        run(function, drop_in, peek)
    except JaxmetaError as error:
        refusal = str(error)
    if refusal is None:
        check(function, peek)
    else:
        assert len(refusal) > 20, "an error says what was given and what to do"


def script(function: Callable[..., Any]) -> Callable[..., None]:
    """Makes a test of a script: `check` without and with reads."""

    def test(peek: Callable[..., None]) -> None:
        check(function, peek)

    test.__name__, test.__doc__, test.__module__ = (
        function.__name__,
        function.__doc__,
        function.__module__,
    )
    return pytest.mark.parametrize("peek", [quiet, read], ids=["unread", "read"])(test)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A standard normal draw that leaves torch's global generator alone."""
    generator = torch.Generator().manual_seed(seed + 10 * sum(shape))
    return torch.randn(shape, generator=generator, dtype=dtype)


def network(outputs: int = 1, dtype: torch.dtype = torch.float64) -> Any:
    """3 → 4 → `outputs`, tanh between; the same weights at each call."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * normal(*p.shape, seed=i, dtype=dtype))
    return model


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def batch(rows: int = 4, seed: int = 0, columns: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of `network` and targets."""
    return normal(rows, 3, seed=seed), normal(rows, columns, seed=seed + 100)


def gradients(model: nn.Module) -> list[Any]:
    """What `backward` left in the model's parameters."""
    return [p.grad for p in model.parameters()]
