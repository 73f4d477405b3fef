"""What the adjoint benchmarks train: each workload is a meta-loss with its arguments' shapes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jaxmeta

Tree = Any


@dataclass(frozen=True)
class Workload:
    """A meta-loss ``(meta, params, batches, adjoint) -> scalar``, differentiated in ``meta``.

    Attributes:
        meta_loss: the loss of the last inner step, after ``T`` of them.
        meta: shapes of the meta-parameters.
        params: shapes of the initial parameters.
        batches: ``T -> shapes`` of the inner batches.
    """

    meta_loss: Callable[..., jax.Array]
    meta: Tree
    params: Tree
    batches: Callable[[int], Tree]


def transformer(
    *,
    layers: int = 4,
    width: int = 128,
    heads: int = 4,
    vocabulary: int = 256,
    length: int = 128,
    batch: int = 8,
    rematerialise: bool = True,
) -> Workload:
    """A decoder-only language model, Adam, a learning rate for each parameter as meta-parameter.

    Args:
        layers: blocks of attention and a two-layer network.
        width: of the residual stream.
        heads: of the attention.
        vocabulary: number of tokens.
        length: tokens of a sequence.
        batch: sequences of an inner step.
        rematerialise: whether each block is under ``jax.checkpoint``.
    """
    params = {
        "embedding": _floats(vocabulary, width),
        "position": _floats(length, width),
        "blocks": _blocks(layers, width),
        "norm": _floats(width),
    }

    def loss_fn(params: Tree, tokens: jax.Array) -> jax.Array:
        per_token = _cross_entropy(params, tokens, heads, rematerialise)
        return jnp.mean(per_token)

    def meta_loss(rates: Tree, params: Tree, batches: Tree, adjoint: Any) -> jax.Array:
        def optimizer(rates: Tree) -> optax.GradientTransformation:
            return optax.chain(
                optax.scale_by_adam(),
                optax.stateless(lambda u, _: jax.tree.map(lambda r, u: -r * u, rates, u)),
            )

        out = jaxmeta.meta_unroll(
            loss_fn, optimizer, params, batches[:-1], hyperparams=rates, adjoint=adjoint
        )
        return loss_fn(out.params, batches[-1])

    def batches(steps: int) -> Tree:
        return jax.ShapeDtypeStruct((steps + 1, batch, length + 1), jnp.int32)

    return Workload(meta_loss, params, params, batches)


def gpt2_small() -> Workload:
    """GPT-2 small with Adam; the meta-parameters weigh the loss of each type of token.

    12 layers, width 768, 12 heads, 50,257 tokens, 64 sequences of 128 tokens, blocks and
    logits rematerialised.
    """
    width, vocabulary, length = 768, 50257, 128
    params = {
        "embedding": _floats(vocabulary, width),
        "position": _floats(length, width),
        "blocks": _blocks(12, width),
        "norm": _floats(width),
    }

    def loss_fn(params: Tree, tokens: jax.Array, weights: jax.Array) -> jax.Array:
        per_token = _cross_entropy(params, tokens, 12, True)
        return jnp.mean(jax.nn.softplus(weights)[tokens[:, 1:]] * per_token)

    def meta_loss(weights: Tree, params: Tree, batches: Tree, adjoint: Any) -> jax.Array:
        out = jaxmeta.meta_unroll(
            loss_fn,
            optax.adam(1e-4),
            params,
            batches[:-1],
            hyperparams=weights,
            adjoint=adjoint,
        )
        return jnp.mean(_cross_entropy(out.params, batches[-1], 12, True))

    def batches(steps: int) -> Tree:
        return jax.ShapeDtypeStruct((steps + 1, 64, length + 1), jnp.int32)

    return Workload(meta_loss, _floats(vocabulary), params, batches)


def mlp(*, width: int = 128, layers: int = 3, batch: int = 128) -> Workload:
    """A network of tanh layers, Adam, its learning rate as the meta-parameter."""

    def loss_fn(params: Tree, batch: Tree) -> jax.Array:
        hidden = batch[0]
        for weights in params:
            hidden = jnp.tanh(hidden @ weights)
        return jnp.mean((hidden - batch[1]) ** 2)

    data = ((batch, width), (batch, width))
    return _with_learning_rate(loss_fn, [_floats(width, width)] * layers, data)


def cnn(*, channels: int = 16, size: int = 16, batch: int = 16) -> Workload:
    """Three convolutions with pooling and a linear layer, Adam, its learning rate."""

    def loss_fn(params: Tree, batch: Tree) -> jax.Array:
        hidden = batch[0]
        for kernel in params["kernels"]:
            hidden = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    hidden, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
            )
            rows, columns, depth = hidden.shape[1:]
            blocks = hidden.reshape(-1, rows // 2, 2, columns // 2, 2, depth)
            hidden = jnp.mean(blocks, axis=(2, 4))
        outputs = hidden.reshape(hidden.shape[0], -1) @ params["out"]
        return jnp.mean((outputs - batch[1]) ** 2)

    inputs = [3, channels, channels]
    params = {
        "kernels": [_floats(3, 3, depth, channels) for depth in inputs],
        "out": _floats((size // 8) ** 2 * channels, 10),
    }
    return _with_learning_rate(loss_fn, params, ((batch, size, size, 3), (batch, 10)))


def _with_learning_rate(
    loss_fn: Callable[..., jax.Array], params: Tree, data: tuple[tuple[int, ...], ...]
) -> Workload:
    def meta_loss(rate: jax.Array, params: Tree, batches: Tree, adjoint: Any) -> jax.Array:
        inner = jax.tree.map(lambda leaf: leaf[:-1], batches)
        out = jaxmeta.meta_unroll(
            loss_fn, optax.adam, params, inner, hyperparams=rate, adjoint=adjoint
        )
        return loss_fn(out.params, jax.tree.map(lambda leaf: leaf[-1], batches))

    def batches(steps: int) -> Tree:
        return tuple(_floats(steps + 1, *shape) for shape in data)

    return Workload(meta_loss, _floats(), params, batches)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _blocks(layers: int, width: int) -> Tree:
    return {
        "norm1": _floats(layers, width),
        "qkv": _floats(layers, width, 3 * width),
        "out": _floats(layers, width, width),
        "norm2": _floats(layers, width),
        "up": _floats(layers, width, 4 * width),
        "down": _floats(layers, 4 * width, width),
    }


def _cross_entropy(params: Tree, tokens: jax.Array, heads: int, rematerialise: bool) -> jax.Array:
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = params["embedding"][inputs] + params["position"][: inputs.shape[1]]
    wrap = jax.checkpoint if rematerialise else (lambda function: function)
    block = wrap(lambda x, p: (_block(x, p, heads), None))
    x, _ = jax.lax.scan(block, x, params["blocks"])

    def head(x: jax.Array, embedding: jax.Array, targets: jax.Array) -> jax.Array:
        logits = _normalise(x, params["norm"]) @ embedding.T
        picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1) - picked

    return wrap(head)(x, params["embedding"], targets)


def _block(x: jax.Array, p: Tree, heads: int) -> jax.Array:
    batch, length, width = x.shape
    qkv = _normalise(x, p["norm1"]) @ p["qkv"]
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, width // heads), 2, 0)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * (width // heads) ** -0.5
    seen = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9), -1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
    x = x + mixed @ p["out"]
    return x + jax.nn.gelu(_normalise(x, p["norm2"]) @ p["up"]) @ p["down"]


def _normalise(x: jax.Array, scale: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, -1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5) * scale


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": functools.partial(transformer, rematerialise=False),
    "transformer, blocks": transformer,
}
