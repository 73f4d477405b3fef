"""Every kind of tree in every place."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct

import jaxmeta
from tests.native import support

XS = np.linspace(0.5, 1.5, 6, dtype=np.float32).reshape(3, 2)


class Pair(NamedTuple):
    w: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    # One field more than Flax: JAX takes dataclasses with equally many fields for equal.
    w: Any
    b: Any
    c: Any


@struct.dataclass
class Flax:
    w: Any
    b: Any


W, B = jnp.array([0.5, -0.5]), jnp.array(0.25)
PARAMS = {
    "array": W,
    "number": 0.5,
    "list": [W, B],
    "tuple": (W, (B,)),
    "dict": {"w": W, "b": {"b": B}},
    "None inside": {"w": W, "frozen": None, "b": [None, B]},
    "NamedTuple": Pair(W, B),
    "dataclass": Plain(W, B, B),
    "flax.struct": Flax(W, B),
    "nnx.State": nnx.state(nnx.Linear(2, 1, rngs=nnx.Rngs(0))),
    "numpy": {"w": np.array([0.5, -0.5], np.float32)},
}


def loss_fn(params: Any, x: Any) -> Any:
    return sum((jnp.sum(leaf) * x.sum() - 1) ** 2 for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("kind", PARAMS)
def test_parameters_keep_their_structure(kind: str) -> None:
    params = PARAMS[kind]
    out = jaxmeta.meta_unroll(loss_fn, optax.sgd(0.1), params, XS, trajectory=True, debug=True)
    assert type(out.params) is type(jax.tree.map(jnp.asarray, params))
    assert jax.tree.structure(out.params) == jax.tree.structure(params)
    expected = params
    for x in XS:
        gradient = jax.grad(loss_fn)(expected, x)
        expected = jax.tree.map(lambda w, g: w - 0.1 * g, expected, gradient)
    jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, 1e-5), out.params, expected)
    for leaf, first, last in zip(
        *map(jax.tree.leaves, (out.trajectory, params, out.params)), strict=True
    ):
        assert leaf.shape == (4, *np.shape(first))
        np.testing.assert_array_equal(leaf[0], first)
        np.testing.assert_array_equal(leaf[-1], last)


def test_no_parameters_at_all() -> None:
    out = jaxmeta.meta_unroll(
        lambda params, x: x.sum(), optax.adam(0.1), {}, XS, trajectory=True, debug=True
    )
    assert out.params == {} and out.trajectory == {}
    np.testing.assert_allclose(out.losses, XS.sum(1), rtol=1e-6)


def test_leaves_that_are_no_floats_pass_through() -> None:
    """Integers, booleans and random keys in batches, hyperparams, state and optimizer state."""

    class Noise(NamedTuple):
        key: Any
        used: Any

    def noisy(scale: Any) -> optax.GradientTransformation:
        def update(gradient: Any, state: Noise, params: Any = None) -> Any:
            key, subkey = jax.random.split(state.key)
            noise = scale * jax.random.normal(subkey)
            return jax.tree.map(lambda g: noise - g, gradient), Noise(key, state.used | True)

        return support.transformation(
            lambda params: Noise(jax.random.key(7), jnp.array(False)), update
        )

    def loss(w: Any, batch: Any, h: Any, *, state: Any) -> Any:
        keep = jax.random.bernoulli(batch["key"], 0.5) | batch["always"]
        drawn = jax.random.normal(h["key"]) + state["offset"][h["index"]]
        state = {**state, "count": state["count"] + batch["one"]}
        return jnp.where(keep, (w - drawn) ** 2, 0.0) * h["scale"], state

    batches = {
        "key": jax.random.split(jax.random.key(0), 3),
        "always": np.array([True, False, False]),
        "one": np.ones(3, np.int8),
    }
    h = {"key": jax.random.PRNGKey(3), "index": 1, "scale": 2.0}
    state = {"count": jnp.zeros((), jnp.uint8), "offset": jnp.arange(2.0), "flag": True}

    def final(given: Any) -> Any:
        w, scale = given
        out = jaxmeta.meta_unroll(
            loss,
            lambda h: noisy(0.1 * h["scale"]),
            w,
            batches,
            hyperparams={**h, "scale": scale},
            state=state,
        )
        return out.params, out

    gradient, out = jax.jit(jax.grad(final, has_aux=True))((0.5, 2.0))
    assert out.state["count"] == 3 and out.state["count"].dtype == jnp.uint8
    assert out.state["flag"].dtype == jnp.bool_ and out.opt_state.used
    eps = 1e-2
    for i, shift in enumerate(np.eye(2) * eps):
        ahead, behind = (final((0.5 + s[0], 2.0 + s[1]))[0] for s in (shift, -shift))
        slope = float(ahead - behind) / (2 * eps)
        assert gradient[i] == pytest.approx(slope, rel=1e-2, abs=1e-4)


def test_optimizer_state_that_holds_more_than_arrays() -> None:
    class State(NamedTuple):
        name: str
        labels: set[str]  # cannot be hashed
        rule: Any
        steps: int
        memory: Any

    labels = {"a", "b"}

    def rule(g: Any) -> Any:
        return -0.1 * g

    def update(gradient: Any, state: State, params: Any = None) -> Any:
        assert state.name == "descent" and state.rule is rule
        return jax.tree.map(state.rule, gradient), state._replace(steps=state.steps + 1)

    def init(params: Any) -> State:
        return State("descent", labels, rule, 0, jax.tree.map(jnp.zeros_like, params))

    optimizer = support.transformation(init, update)
    state = None
    for expected in (3, 6):
        out = jaxmeta.meta_unroll(loss_fn, optimizer, W, XS, opt_state=state)
        state = out.opt_state
        assert state.name == "descent" and state.rule is rule and state.labels is labels
        assert state.steps == expected
    gradient = jax.jit(
        jax.grad(lambda w: jaxmeta.meta_unroll(loss_fn, optimizer, w, XS).losses[-1])
    )(W)
    assert gradient.shape == W.shape


def test_aux_is_stacked_over_steps() -> None:
    def loss(w: Any, x: Any) -> Any:
        return (w - x.sum()) ** 2, {"x": x, "number": 1, "pair": (w, None)}

    out = jaxmeta.meta_unroll(loss, optax.sgd(0.5), 0.0, XS, has_aux=True)
    np.testing.assert_array_equal(out.aux["x"], XS)
    np.testing.assert_array_equal(out.aux["number"], [1, 1, 1])
    np.testing.assert_allclose(out.aux["pair"][0], [0.0, *XS.sum(1)[:2]], rtol=1e-6)
