"""flax models as pure functions: outputs, batch statistics and dropout, through meta_unroll."""

import functools
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxmeta
from jaxmeta import ArgumentTypeError, ArgumentValueError

XS = np.random.default_rng(0).normal(size=(3, 8, 4))
X = XS[0]


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(4, 64, param_dtype=jnp.float64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, param_dtype=jnp.float64, rngs=rngs)
        self.first = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Dropout(0.5, rngs=rngs, rng_collection="other")

    def __call__(self, x: Any, scale: float = 1.0) -> Any:
        return self.second(self.first(self.norm(self.hidden(x)))) * scale


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool = True, scale: float = 1.0) -> Any:
        x = linen.Dense(64, param_dtype=jnp.float64)(x)
        x = linen.BatchNorm(use_running_average=not train, param_dtype=jnp.float64)(x)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dropout(0.5, deterministic=not train, rng_collection="other")(x) * scale


def widen(tree: Any) -> Any:
    """flax starts batch statistics in float32, whatever the model is."""
    narrow = jnp.dtype("float32")
    return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == narrow else x, tree)


def make_nnx() -> NnxModel:
    model = NnxModel(nnx.Rngs(0, other=1))
    nnx.update(model, widen(nnx.state(model, nnx.BatchStat)))
    return model


@functools.cache
def make(kind: str) -> Any:
    with jax.enable_x64(True):
        if kind == "nnx":
            return jaxmeta.functional(make_nnx())
        model = LinenModel()
        return jaxmeta.functional(model, widen(model.init(jax.random.key(0), X)))


KINDS = pytest.mark.parametrize("kind", ["nnx", "linen"])
pytestmark = pytest.mark.usefixtures("x64")


def statistics(kind: str, state: Any) -> dict[str, Any]:
    found = state["norm"] if kind == "nnx" else state["batch_stats"]["BatchNorm_0"]
    return {name: jax.tree.leaves(found[name])[0] for name in ("mean", "var")}


@KINDS
def test_params_are_floats_and_state_is_the_rest(kind: str) -> None:
    _, params, state = make(kind)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float64")}
    assert len(jax.tree.leaves(params)) == 4  # kernel, bias; scale, bias
    assert {name: leaf.shape for name, leaf in statistics(kind, state).items()} == {
        "mean": (64,),
        "var": (64,),
    }


@KINDS
def test_batch_statistics_move_and_the_old_state_stays(kind: str) -> None:
    apply, params, state = make(kind)
    _, new = apply(params, state, X, key=jax.random.key(0))
    layer = params["hidden" if kind == "nnx" else "Dense_0"]
    kernel, bias = (np.asarray(jax.tree.leaves(layer[name])[0]) for name in ("kernel", "bias"))
    hidden = X @ kernel + bias
    np.testing.assert_allclose(
        statistics(kind, new)["mean"], 0.01 * hidden.mean(0), rtol=1e-5, atol=1e-7
    )
    np.testing.assert_allclose(statistics(kind, new)["var"], 0.99 + 0.01 * hidden.var(0), rtol=1e-5)
    np.testing.assert_array_equal(statistics(kind, state)["mean"], 0.0)
    assert jax.tree.structure(new) == jax.tree.structure(state)


@KINDS
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_dropout_is_drawn_from_the_key(kind: str, make_key: Any) -> None:
    apply, params, state = make(kind)

    def draw(seed: int) -> np.ndarray:
        return np.asarray(apply(params, state, X, key=make_key(seed))[0])

    np.testing.assert_array_equal(draw(1), draw(1))
    kept, others = draw(1) != 0, draw(2) != 0
    # Both layers keep half; if they drew alike, half would be left instead of a quarter.
    assert abs(kept.mean() - 0.25) < 0.08
    assert abs((kept == others).mean() - (0.25**2 + 0.75**2)) < 0.08


@KINDS
def test_keywords_reach_the_module(kind: str) -> None:
    apply, params, state = make(kind)
    key = jax.random.key(0)
    single, double = (apply(params, state, X, key=key, scale=s)[0] for s in (1.0, 2.0))
    np.testing.assert_allclose(double, 2 * single)


def test_without_a_key_an_nnx_model_draws_from_its_own_streams() -> None:
    apply, params, state = make("nnx")
    model = make_nnx()
    first, state = apply(params, state, X)
    np.testing.assert_array_equal(first, model(X))
    second, state = apply(params, state, X)
    np.testing.assert_array_equal(second, model(X))
    assert (first != second).any()


def test_an_nnx_model_is_neither_changed_nor_watched() -> None:
    model = make_nnx()
    apply, params, state = jaxmeta.functional(model)
    before = jax.tree.leaves(nnx.state(model))
    first, _ = apply(params, state, X)
    for old, new in zip(before, jax.tree.leaves(nnx.state(model)), strict=True):
        assert old is new or (jax.random.key_data(old) == jax.random.key_data(new)).all()
    model.eval()
    np.testing.assert_array_equal(apply(params, state, X)[0], first)
    apply, params, state = jaxmeta.functional(model)
    outputs, new_state = apply(params, state, X)
    np.testing.assert_allclose(outputs, model(X))
    np.testing.assert_array_equal(statistics("nnx", new_state)["mean"], 0.0)


def test_a_linen_model_in_evaluation_needs_no_key() -> None:
    apply, params, state = make("linen")
    outputs, new = apply(params, state, X, train=False)
    expected: Any = LinenModel().apply({"params": params, **state}, X, train=False)
    np.testing.assert_allclose(outputs, expected)
    jax.tree.map(np.testing.assert_array_equal, new, state)


def test_a_linen_model_without_state() -> None:
    model = linen.Dense(2)
    apply, params, state = jaxmeta.functional(model, model.init(jax.random.key(0), X))
    assert state == {}
    outputs, new = apply(params, state, X)
    assert outputs.shape == (8, 2) and new == {}


def test_a_linen_method() -> None:
    class Autoencoder(linen.Module):
        def setup(self) -> None:
            self.encoder, self.decoder = linen.Dense(2), linen.Dense(4)

        def encode(self, x: Any) -> Any:
            return self.encoder(x)

        def __call__(self, x: Any) -> Any:
            return self.decoder(self.encode(x))

    model = Autoencoder()
    apply, params, state = jaxmeta.functional(model, model.init(jax.random.key(0), X))
    assert apply(params, state, X, method="encode")[0].shape == (8, 2)


@KINDS
@pytest.mark.parametrize("adjoint", [jaxmeta.ReverseMode(), jaxmeta.StepCheckpoint()])
def test_through_meta_unroll(kind: str, adjoint: jaxmeta.Adjoint) -> None:
    apply, params, state = make(kind)

    def loss_fn(params: Any, x: Any, *, state: Any, key: Any) -> Any:
        outputs, state = apply(params, state, x, key=key)
        return jnp.mean(jnp.sin(outputs)), state

    def meta_loss(lr: Any) -> Any:
        out = jaxmeta.meta_unroll(
            loss_fn,
            optax.sgd,
            params,
            XS,
            hyperparams=lr,
            state=state,
            key=jax.random.key(5),
            adjoint=adjoint,
        )
        outputs, _ = apply(out.params, out.state, X, key=jax.random.key(6))
        return jnp.mean(outputs**2), out

    at = jax.jit(jax.value_and_grad(meta_loss, has_aux=True))
    (_, out), slope = at(0.5)
    (ahead, _), _ = at(0.5 + 1e-5)
    (behind, _), _ = at(0.5 - 1e-5)
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-5, rtol=1e-7)

    key, w, by_hand = jax.random.key(5), params, state
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    for x, loss in zip(XS, out.losses, strict=True):
        key, subkey = jax.random.split(key)
        (expected, by_hand), gradient = step(w, x, state=by_hand, key=subkey)
        w = jax.tree.map(lambda w, g: w - 0.5 * g, w, gradient)
        np.testing.assert_allclose(loss, expected, rtol=1e-10)
    for name, leaf in statistics(kind, by_hand).items():
        np.testing.assert_allclose(statistics(kind, out.state)[name], leaf, rtol=1e-9)


class TestBadInput:
    def test_no_flax_module(self) -> None:
        for model, found in (
            (3, "a scalar int64"),
            (lambda x: x, "function"),
            (nnx.Linear, "the class Linear"),
        ):
            with pytest.raises(ArgumentTypeError, match=f"model is {found}.*flax.nnx.Module or a"):
                jaxmeta.functional(model)

    def test_linen_without_variables(self) -> None:
        with pytest.raises(ArgumentValueError, match=r"variables is None; .* model.init\(key"):
            jaxmeta.functional(LinenModel())
        with pytest.raises(ArgumentValueError, match=r"keys \['kernel'\]; .* the key 'params'"):
            jaxmeta.functional(LinenModel(), {"kernel": 1.0})

    def test_nnx_with_variables(self) -> None:
        with pytest.raises(ArgumentValueError, match="variables is given for a flax.nnx module"):
            jaxmeta.functional(make_nnx(), {"params": {}})

    def test_a_module_that_stores_something_new_in_a_step(self) -> None:
        class Remembering(nnx.Module):
            def __init__(self) -> None:
                self.linear = nnx.Linear(4, 1, rngs=nnx.Rngs(0))

            def __call__(self, x: Any) -> Any:
                self.seen = nnx.Variable(x.sum())
                return self.linear(x)

        apply, params, state = jaxmeta.functional(Remembering())

        def loss_fn(params: Any, x: Any, state: Any) -> Any:
            outputs, state = apply(params, state, x)
            return jnp.mean(outputs), state

        with pytest.raises(ArgumentValueError, match=r"state\['seen'\].* not expected"):
            jaxmeta.meta_unroll(loss_fn, optax.sgd(0.1), params, XS, state=state)


def test_flax_is_not_imported_for_those_who_do_not_use_it() -> None:
    script = (
        "import sys, jaxmeta\n"
        "assert not any(name.split('.')[0] in ('flax', 'torch') for name in sys.modules)\n"
        "try: jaxmeta.functional(object())\n"
        "except TypeError: pass\n"
        "assert not any(name.split('.')[0] == 'flax' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, cwd=_root())


def _root() -> str:
    return jaxmeta.__path__[0].removesuffix("jaxmeta")
