"""Inner loops written out by hand, and finite differences: what meta_unroll is held against.

No formula here uses `lax.scan` or optax. A rule is one optimizer's formula for one step,
`(step, h, w, g, memory) -> (w, memory)`, for trees of parameters; memory starts as None.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree


def train_by_hand(
    loss_fn: Callable[..., Any], rule: Callable[..., Any], w: Any, batches: Any, h: Any
) -> tuple[Any, jax.Array]:
    """Final parameters and losses of an inner loop, as a Python loop."""
    memory, losses = None, []
    for step in range(len(jax.tree.leaves(batches)[0])):
        batch = jax.tree.map(lambda leaf, step=step: leaf[step], batches)
        loss, g = jax.value_and_grad(loss_fn)(w, batch, h)
        w, memory = rule(step, h, w, g, memory)
        losses.append(loss)
    return w, jnp.stack(losses)


def sgd(step, h, w, g, memory):
    return jax.tree.map(lambda w, g: w - h["lr"] * g, w, g), None


def sgd_per_parameter(step, h, w, g, memory):
    return jax.tree.map(lambda w, g, lr: w - lr * g, w, g, h["lr"]), None


def sgd_decaying(step, h, w, g, memory):
    return jax.tree.map(lambda w, g: w - h["lr"] * h["rate"] ** step * g, w, g), None


def momentum(step, h, w, g, memory):
    memory = g if memory is None else jax.tree.map(lambda m, g: h["beta"] * m + g, memory, g)
    return jax.tree.map(lambda w, m: w - h["lr"] * m, w, memory), memory


def nesterov(step, h, w, g, memory):
    memory = g if memory is None else jax.tree.map(lambda m, g: h["beta"] * m + g, memory, g)
    ahead = jax.tree.map(lambda m, g: g + h["beta"] * m, memory, g)
    return jax.tree.map(lambda w, u: w - h["lr"] * u, w, ahead), memory


def adamw(step, h, w, g, memory):
    b1, b2 = h["b1"], h["b2"]
    m, v = memory or (jax.tree.map(jnp.zeros_like, w), jax.tree.map(jnp.zeros_like, w))
    m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, g)
    v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, v, g)
    scale_m, scale_v = 1 / (1 - b1 ** (step + 1)), 1 / (1 - b2 ** (step + 1))

    def move(w, m, v):
        return w - h["lr"] * (scale_m * m / (jnp.sqrt(scale_v * v) + 1e-8) + h["decay"] * w)

    return jax.tree.map(move, w, m, v), (m, v)


def clipped_momentum(step, h, w, g, memory):
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(g)))
    g = jax.tree.map(lambda leaf: leaf * jnp.minimum(1.0, h["limit"] / norm), g)
    return momentum(step, h, w, g, memory)


def second_order(f: Callable[[Any], jax.Array]) -> Callable[[Any, Any], tuple[Any, Any, Any]]:
    """`(x, direction) -> (f, gradient, Hessian times direction)` at `x`, as one program."""

    @jax.jit
    def at(x: Any, direction: Any) -> tuple[Any, Any, Any]:
        (value, gradient), (_, product) = jax.jvp(jax.value_and_grad(f), (x,), (direction,))
        return value, gradient, product

    return at


def assert_finite_differences_agree(
    at: Callable[[Any, Any], tuple[Any, Any, Any]], x: Any, direction: Any, tolerance: float = 1e-6
) -> None:
    """What `at` of `second_order` gives is the slope of its own values, and of its gradients."""
    flat, unravel = ravel_pytree(x)
    assert flat.dtype == jnp.float64
    _, gradient, product = at(x, direction)

    def slope(output: int, step: Any) -> Any:
        ahead, behind = (at(unravel(flat + s), direction)[output] for s in (step, -step))
        return (flatten(ahead) - flatten(behind)) / 2e-5

    slopes = np.stack([slope(0, step) for step in 1e-5 * np.eye(len(flat))])[:, 0]
    np.testing.assert_allclose(flatten(gradient), slopes, rtol=tolerance, atol=tolerance)
    slopes = slope(1, 1e-5 * flatten(direction))
    np.testing.assert_allclose(flatten(product), slopes, rtol=tolerance, atol=tolerance)


def random_like(tree: Any, seed: int = 0) -> Any:
    """A tree of standard normal numbers with the shapes of `tree`, in float64."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=np.shape(leaf))), tree)


def transformation(init: Callable[..., Any], update: Callable[..., Any]) -> Any:
    """An optimizer of one's own; optax's annotations ask for its parameter names."""
    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]


def flatten(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    """Trees agree leaf by leaf, relative to the largest entry of each."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), e in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert np.isfinite(e).all() and a.shape == e.shape
        bound = tolerance * max(1.0, np.abs(e).max(initial=0.0))
        np.testing.assert_allclose(a, e, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
