"""Second-order MAML of a conv net: XLA's convolution and pooling against the bridge's.

One meta-gradient of a 4-block conv net, 28×28 images, 5 ways, 1 shot, 15 queries, 5 inner steps:

    lax           lax.conv_general_dilated and reduce_window, vmap over tasks
    bridge        the bridge's lowering, vmap over tasks
    bridge, map   the bridge's lowering, lax.map over tasks
    torch         torch eager, a loop over tasks

The ways are run in turn, several rounds, in one process; the table has medians and ratios.

    python benchmarks/convolution.py --channels 64 --tasks 4
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from jax import lax

import jaxmeta
from jaxmeta_bridge import from_torch

STEPS, LR = 5, 0.1
Params = list[dict[str, Any]]
Block = Callable[[Any, Any], Any]


def initial(channels: int, ways: int) -> Params:
    rng = np.random.default_rng(0)
    inputs = [1] + [channels] * 3
    blocks = [
        {
            "w": (rng.normal(size=(channels, n, 3, 3)) * (2 / (9 * n)) ** 0.5).astype(np.float32),
            "scale": np.ones((channels, 1, 1), np.float32),
            "shift": np.zeros((channels, 1, 1), np.float32),
        }
        for n in inputs
    ]
    head = (rng.normal(size=(channels, ways)) * channels**-0.5).astype(np.float32)
    return [*blocks, {"w": head}]


def draw(tasks: int, ways: int, queries: int) -> tuple[Any, ...]:
    rng = np.random.default_rng(1)

    def images(n: int) -> np.ndarray:
        return rng.normal(size=(tasks, n * ways, 1, 28, 28)).astype(np.float32)

    def labels(n: int) -> np.ndarray:
        return np.tile(np.arange(ways), (tasks, n))

    return images(1), labels(1), images(queries), labels(queries)


def conv_xla(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1)))


def pool_xla(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


conv_bridge = from_torch(lambda x, w: F.conv2d(x, w, padding=1))
pool_bridge = from_torch(lambda x: F.max_pool2d(x, 2))


def network(conv: Callable[..., Any], pool: Callable[..., Any], np_: Any) -> Block:
    """The network in JAX or torch, whose names for what it needs are the same."""

    def apply(params: Params, x: Any) -> Any:
        for block in params[:-1]:
            x = conv(x, block["w"])
            mean = x.mean((0, 2, 3))[:, None, None]
            x = x - mean
            x = x / np_.sqrt((x**2).mean((0, 2, 3))[:, None, None] + 1e-5)
            x = x * block["scale"] + block["shift"]
            x = pool(np_.where(x > 0, x, np_.zeros_like(x)))
        return x.reshape(len(x), -1) @ params[-1]["w"]

    return apply


def in_jax(apply: Block, over_tasks: str) -> Any:
    def loss(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = batch
        scores = apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    optimizer = optax.sgd(LR)

    def task_loss(params: Params, xs: Any, ys: Any, xq: Any, yq: Any) -> jax.Array:
        out = jaxmeta.meta_unroll(loss, optimizer, params, batch=(xs, ys), num_steps=STEPS)
        return loss(out.params, (xq, yq))

    def meta_loss(params: Params, *tasks: jax.Array) -> jax.Array:
        if over_tasks == "vmap":
            return jax.vmap(task_loss, (None, 0, 0, 0, 0))(params, *tasks).mean()
        return lax.map(lambda task: task_loss(params, *task), tasks).mean()

    return jax.jit(jax.grad(meta_loss))


def in_torch(apply: Block) -> Callable[..., Any]:
    def meta_gradient(params: list[dict[str, torch.Tensor]], *tasks: torch.Tensor) -> Any:
        total = torch.zeros(())
        leaves = [p for block in params for p in block.values()]
        for xs, ys, xq, yq in zip(*tasks, strict=True):
            fast = params
            for _ in range(STEPS):
                inner = F.cross_entropy(apply(fast, xs), ys)
                names = [p for block in fast for p in block.values()]
                grads = iter(torch.autograd.grad(inner, names, create_graph=True))
                fast = [{k: p - LR * next(grads) for k, p in block.items()} for block in fast]
            total = total + F.cross_entropy(apply(fast, xq), yq) / len(tasks[0])
        return torch.autograd.grad(total, leaves)

    return meta_gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--channels", type=int, default=64, help="of each convolution")
    parser.add_argument("--tasks", type=int, default=4, help="tasks in a meta-batch")
    parser.add_argument("--rounds", type=int, default=5, help="times each way is run")
    args = parser.parse_args()
    params, tasks = initial(args.channels, 5), draw(args.tasks, 5, 15)
    torch_params = jax.tree.map(lambda p: torch.tensor(p, requires_grad=True), params)
    torch_tasks = [torch.from_numpy(t) for t in tasks]

    def torch_conv(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, w, padding=1)

    bridge = network(conv_bridge, pool_bridge, jnp)
    torch_gradient = in_torch(network(torch_conv, lambda x: F.max_pool2d(x, 2), torch))
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: torch_gradient(torch_params, *torch_tasks)
    }
    compile_seconds = {"torch": 0.0}
    for name, function in {
        "lax": in_jax(network(conv_xla, pool_xla, jnp), "vmap"),
        "bridge": in_jax(bridge, "vmap"),
        "bridge, map": in_jax(bridge, "map"),
    }.items():
        start = time.perf_counter()
        compiled = function.lower(params, *tasks).compile()
        compile_seconds[name] = time.perf_counter() - start
        ways[name] = lambda compiled=compiled: jax.block_until_ready(compiled(params, *tasks))

    # The first run warms up, and shows that all compute the same.
    results = {n: [np.asarray(leaf) for leaf in jax.tree.leaves(way())] for n, way in ways.items()}
    for name, result in results.items():
        for ours, torchs in zip(result, results["torch"], strict=True):
            scale = np.abs(torchs).max()
            np.testing.assert_allclose(ours / scale, torchs / scale, atol=2e-2, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{'':14s}{'seconds':>9s}{'× torch':>9s}{'compile':>9s}")
    for name, median in medians.items():
        ratio = median / medians["torch"]
        print(f"{name:14s}{median:9.2f}{ratio:9.2f}{compile_seconds[name]:9.1f}")


if __name__ == "__main__":
    main()
