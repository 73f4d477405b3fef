"""Time of a meta-gradient by each adjoint, beside plain reverse mode.

    python benchmarks/adjoint_time.py
    python benchmarks/adjoint_time.py --workloads transformer --steps 8 32

Adjoints are run in turn, several rounds, in one process; the gradients are compared first. A ratio
is the median over the rounds of one round's ratio to plain reverse: below 1 is faster.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from adjoint_workloads import WORKLOADS, Workload

import jaxmeta
from jaxmeta import MixedMode, NestedCheckpoint, ReverseMode, StepCheckpoint

ADJOINTS: dict[str, Any] = {
    "ReverseMode()": ReverseMode(),
    '"auto"': jaxmeta.Auto(),
    "StepCheckpoint()": StepCheckpoint(),
    "MixedMode()": MixedMode(),
    "MixedMode(save_gradients=False)": MixedMode(save_gradients=False),
    "MixedMode(NestedCheckpoint())": MixedMode(NestedCheckpoint()),
}


def fill(shapes: Any, seed: int) -> Any:
    """Small normal numbers for floats, token numbers for integers."""
    rng = np.random.default_rng(seed)

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(shape.dtype, jnp.floating):
            return jnp.asarray(0.1 * rng.normal(size=shape.shape), shape.dtype)
        return jnp.asarray(rng.integers(0, 10, size=shape.shape), shape.dtype)

    return jax.tree.map(draw, shapes)


def measure(workload: Workload, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, for each adjoint."""
    arguments = (fill(workload.meta, 0), fill(workload.params, 1), fill(workload.batches(steps), 2))

    def gradient(adjoint: Any) -> Any:
        return jax.jit(jax.grad(lambda m, p, b: workload.meta_loss(m, p, b, adjoint)))

    programs = {name: gradient(adjoint) for name, adjoint in ADJOINTS.items()}
    results = {name: program(*arguments) for name, program in programs.items()}
    for name, result in results.items():
        for a, e in zip(
            jax.tree.leaves(result), jax.tree.leaves(results["ReverseMode()"]), strict=True
        ):
            scale = float(jnp.abs(e).max()) or 1.0
            np.testing.assert_allclose(a / scale, e / scale, atol=2e-3, err_msg=name)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for name in options.workloads:
        for steps in options.steps:
            seconds = measure(WORKLOADS[name](), steps, options.rounds)
            plain = seconds["ReverseMode()"]
            print(
                f"\n{name}, T = {steps}: {1e3 * statistics.median(plain):.1f} ms by plain reverse"
            )
            for adjoint, own in seconds.items():
                ratios = [a / b for a, b in zip(own, plain, strict=True)]
                low, high = min(ratios), max(ratios)
                print(f"  {adjoint:34} {statistics.median(ratios):6.2f}   {low:.2f} to {high:.2f}")


if __name__ == "__main__":
    main()
