"""Where torch rounds to float32 or bfloat16, values are its own and derivatives the formula's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optim_cases import CASES, gradients, unrolled

from jaxmeta_bridge.optim import safe

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded(dtype: str):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(50))
    held = x.astype(dtype).astype(jnp.float64)
    assert (held != x).all()
    np.testing.assert_array_equal(jax.jit(safe.rounded, static_argnums=1)(x, dtype), held)
    slope = jax.grad(lambda x: (safe.rounded(x, dtype) ** 2).sum())(x)
    np.testing.assert_array_equal(slope, 2 * held)


@pytest.mark.parametrize(
    ("name", "tolerance"), [("asgd", 1e-6), ("nadam", 1e-6), ("muon-plain", 0.1)]
)
def test_derivatives_are_near_those_without_rounding(
    name: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
):
    case = CASES[name]
    numeric, _ = case.split()
    param, grads = jnp.cos(jnp.arange(6.0)).reshape(2, 3), gradients(4, (2, 3))

    def loss(param: jax.Array, numeric: object) -> jax.Array:
        return jnp.sin(unrolled(case, param, grads, numeric)[0]).sum()

    slope = jax.grad(loss, argnums=(0, 1))
    rounded = jax.tree.leaves(slope(param, numeric))
    monkeypatch.setattr(safe, "rounded", lambda x, dtype: x)
    for actual, expected in zip(rounded, jax.tree.leaves(slope(param, numeric)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=1e-6)
