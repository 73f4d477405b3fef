"""Random draws. Each has a JAX key of its own, and torch's distribution rather than its numbers.

torch defines most derivatives of a draw by its parameters as zero: only `_standard_gamma` and
`_sample_dirichlet` have pathwise ones, as in JAX.
"""

from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

from jaxmeta_bridge.aten.operands import operands, working_dtype
from jaxmeta_bridge.aten.registry import decomposes, lowers

_aten: Any = torch.ops.aten
_Out = jax.ShapeDtypeStruct


def _uniform(out: _Out, key: jax.Array) -> jax.Array:
    """Uniform in [0, 1), never rounded up to 1; both parts of a complex number."""
    if not jnp.issubdtype(out.dtype, jnp.complexfloating):
        return jax.random.uniform(key, out.shape, out.dtype)
    parts = jax.random.uniform(key, (2, *out.shape), jnp.finfo(out.dtype).dtype)
    return lax.complex(parts[0], parts[1])


def _normal(out: _Out, key: jax.Array) -> jax.Array:
    return jax.random.normal(key, out.shape, working_dtype(out.dtype))


@lowers(_aten.rand.default, _aten.rand_like.default, draws=True)
def _rand(out: _Out, *args: Any, key: jax.Array) -> jax.Array:
    return _uniform(out, key)


@lowers(_aten.randn.default, _aten.randn_like.default, draws=True)
def _randn(out: _Out, *args: Any, key: jax.Array) -> jax.Array:
    return _normal(out, key)


@lowers(_aten.uniform.default, draws=True)
def _lower_uniform(
    out: _Out, _: Any, low: float = 0.0, high: float = 1.0, *, key: jax.Array
) -> jax.Array:
    return jax.random.uniform(key, out.shape, out.dtype, low, high)


@lowers(_aten.normal_functional.default, draws=True)
def _normal_functional(
    out: _Out, _: Any, mean: float = 0.0, std: float = 1.0, *, key: jax.Array
) -> jax.Array:
    return mean + std * _normal(out, key)


@lowers(
    _aten.normal.Tensor_float,
    _aten.normal.float_Tensor,
    _aten.normal.Tensor_Tensor,
    _aten.normal.float_float,
    draws=True,
)
def _lower_normal(out: _Out, mean: Any, std: Any = 1.0, *size: Any, key: jax.Array) -> jax.Array:
    mean, std = operands(out, mean, std)
    return lax.stop_gradient(mean + std * _normal(out, key))


@lowers(_aten.log_normal.default, draws=True)
def _log_normal(
    out: _Out, _: Any, mean: float = 1.0, std: float = 2.0, *, key: jax.Array
) -> jax.Array:
    return jnp.exp(mean + std * _normal(out, key))


@lowers(_aten.exponential.default, draws=True)
def _exponential(out: _Out, _: Any, lambd: float = 1.0, *, key: jax.Array) -> jax.Array:
    return jax.random.exponential(key, out.shape, working_dtype(out.dtype)) / lambd


@lowers(_aten.cauchy.default, draws=True)
def _cauchy(
    out: _Out, _: Any, median: float = 0.0, sigma: float = 1.0, *, key: jax.Array
) -> jax.Array:
    return median + sigma * jax.random.cauchy(key, out.shape, working_dtype(out.dtype))


@lowers(_aten.geometric.default, draws=True)
def _geometric(out: _Out, _: Any, p: float, *, key: jax.Array) -> jax.Array:
    return jax.random.geometric(key, p, out.shape)


@lowers(_aten.bernoulli.default, draws=True)
def _bernoulli(out: _Out, p: jax.Array, *, key: jax.Array) -> jax.Array:
    return jax.random.bernoulli(key, lax.stop_gradient(p), out.shape)


@lowers(_aten.bernoulli.p, _aten.bernoulli.Tensor, draws=True)
def _bernoulli_p(out: _Out, _: Any, p: Any = 0.5, *, key: jax.Array) -> jax.Array:
    return _bernoulli(out, jnp.asarray(p), key=key)


@lowers(_aten.binomial.default, draws=True)
def _binomial(out: _Out, count: jax.Array, p: jax.Array, *, key: jax.Array) -> jax.Array:
    count, p = operands(out, count, p)
    return lax.stop_gradient(jax.random.binomial(key, count, p, out.shape, p.dtype))


@lowers(_aten.poisson.default, draws=True)
def _poisson(out: _Out, rate: jax.Array, *, key: jax.Array) -> jax.Array:
    return jax.random.poisson(key, lax.stop_gradient(rate), out.shape)


@lowers(_aten._standard_gamma.default, draws=True)
def _standard_gamma(out: _Out, shape: jax.Array, *, key: jax.Array) -> jax.Array:
    (shape,) = operands(out, shape)
    return jax.random.gamma(key, shape, out.shape, shape.dtype)


@lowers(_aten._sample_dirichlet.default, draws=True)
def _sample_dirichlet(out: _Out, concentration: jax.Array, *, key: jax.Array) -> jax.Array:
    (concentration,) = operands(out, concentration)
    return jax.random.dirichlet(key, concentration, out.shape[:-1], concentration.dtype)


@lowers(_aten.multinomial.default, draws=True)
def _multinomial(
    out: _Out, weights: jax.Array, count: int, replacement: bool = False, *, key: jax.Array
) -> jax.Array:
    logits = jnp.log(weights.astype(working_dtype(weights.dtype)))
    if replacement:
        draws = jax.random.categorical(key, logits, shape=(count, *weights.shape[:-1]))
        return jnp.moveaxis(draws, 0, -1)
    # The largest of perturbed log-weights are a sample without replacement (Gumbel top-k).
    perturbed = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    return lax.top_k(perturbed, count)[1]


@lowers(_aten.randperm.default, draws=True)
def _randperm(out: _Out, n: int, *, key: jax.Array) -> jax.Array:
    return jax.random.permutation(key, n)


@lowers(_aten.randint.default, draws=True)
def _randint(out: _Out, high: int, size: Any, *, key: jax.Array) -> jax.Array:
    return _integers(out, 0, high, key)


@lowers(_aten.randint.low, draws=True)
def _randint_low(out: _Out, low: int, high: int, size: Any, *, key: jax.Array) -> jax.Array:
    return _integers(out, low, high, key)


@lowers(_aten.randint_like.default, _aten.random.to, draws=True)
def _randint_like(out: _Out, _: Any, high: int, *, key: jax.Array) -> jax.Array:
    return _integers(out, 0, high, key)


@lowers(_aten.randint_like.low_dtype, getattr(_aten.random, "from"), draws=True)
def _randint_like_low(
    out: _Out, _: Any, low: int, high: int | None, *, key: jax.Array
) -> jax.Array:
    return _integers(out, low, _largest(out.dtype) if high is None else high, key)


@lowers(_aten.random.default, draws=True)
def _random(out: _Out, _: Any, *, key: jax.Array) -> jax.Array:
    return _integers(out, 0, _largest(out.dtype), key)


def _integers(out: _Out, low: int, high: int, key: jax.Array) -> jax.Array:
    """Uniform in [low, high); drawn as the widest integers, as the dtype may be a float."""
    return jax.random.randint(key, out.shape, low, high, jnp.asarray(0).dtype)


def _largest(dtype: Any) -> int:
    """The end of the range in which the dtype represents every integer."""
    if dtype == jnp.bool_:
        return 2
    if jnp.issubdtype(dtype, jnp.floating):
        return 2 ** (jnp.finfo(dtype).nmant + 1) + 1
    return int(jnp.iinfo(dtype).max)


@decomposes(_aten.rrelu_with_noise.default)
def _rrelu(
    x: torch.Tensor,
    noise: torch.Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    if not training:
        return _aten.leaky_relu(x, (lower + upper) / 2)
    return torch.where(x <= 0, x * _aten.uniform(x, lower, upper), x)


@decomposes(_aten.rrelu_with_noise_functional.default)
def _rrelu_functional(
    x: torch.Tensor, noise: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _rrelu(x, noise, *options), noise


@decomposes(_aten.native_dropout.default)
def _native_dropout(
    x: torch.Tensor, p: float, train: bool | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if train is False or p == 0:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    mask = _aten.bernoulli.p(x, 1 - p)
    return x * mask * (0 if p == 1 else 1 / (1 - p)), mask.bool()
