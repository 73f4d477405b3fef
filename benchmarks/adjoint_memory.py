"""Memory of a meta-gradient by each adjoint, as XLA plans it; nothing is run or allocated.

    python benchmarks/adjoint_memory.py                        # the small transformer
    python benchmarks/adjoint_memory.py --check                # and whether the goals are met
    python benchmarks/adjoint_memory.py --workload gpt2        # GPT-2 small, 1,000 and 10,000 steps

A number is the temporary memory of the compiled gradient: what it needs beside its arguments and
results. Compilation is for the CPU, so that it can be repeated anywhere.
"""

import argparse
import sys
import time
from typing import Any

import jax
from adjoint_workloads import Workload, gpt2_small, transformer

import jaxmeta
from jaxmeta import BinomialCheckpoint, MixedMode, NestedCheckpoint, ReverseMode, StepCheckpoint

MB = 1e6


def temporary_bytes(workload: Workload, steps: int, adjoint: Any) -> tuple[int, float]:
    """Bytes of the compiled meta-gradient, and the seconds that tracing and compiling took."""

    def meta_loss(meta: Any, params: Any, batches: Any) -> jax.Array:
        return workload.meta_loss(meta, params, batches, adjoint)

    start = time.perf_counter()
    lowered = jax.jit(jax.grad(meta_loss)).lower(
        workload.meta, workload.params, workload.batches(steps)
    )
    analysis = lowered.compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes, time.perf_counter() - start


ROWS: dict[str, tuple[jaxmeta.Adjoint, bool]] = {
    "ReverseMode()": (ReverseMode(), False),
    "StepCheckpoint()": (StepCheckpoint(), False),
    "MixedMode()": (MixedMode(), False),
    "MixedMode(), blocks": (MixedMode(), True),
    "MixedMode(NestedCheckpoint()), blocks": (MixedMode(NestedCheckpoint()), True),
    "MixedMode(BinomialCheckpoint(4)), blocks": (MixedMode(BinomialCheckpoint(4)), True),
}


def small(steps: list[int], check: bool) -> None:
    print("4-layer transformer, Adam, MB; `blocks`: each block under jax.checkpoint")
    print(f"{'T =':44}" + "".join(f"{t:>9}" for t in steps))
    measured: dict[tuple[str, int], int] = {}
    for name, (adjoint, rematerialise) in ROWS.items():
        workload = transformer(rematerialise=rematerialise)
        for t in steps:
            measured[name, t], _ = temporary_bytes(workload, t, adjoint)
        print(f"{name:44}" + "".join(f"{measured[name, t] / MB:9.0f}" for t in steps), flush=True)
    if check:
        goals(measured)


def goals(measured: dict[tuple[str, int], int]) -> None:
    plain, best = "ReverseMode()", "MixedMode(BinomialCheckpoint(4)), blocks"
    long, _ = temporary_bytes(transformer(), 4096, MixedMode(NestedCheckpoint()))
    claims = {
        "T = 128: at most 1/150 of plain reverse": measured[best, 128] * 150
        <= measured[plain, 128],
        "T = 512: at most 1/400 of plain reverse": measured[best, 512] * 400
        <= measured[plain, 512],
        "T = 128 to 512: at most 1.5 times": measured[best, 512] <= 1.5 * measured[best, 128],
        f"T = 4096, nested: under 1 GB ({long / MB:.0f} MB)": long < 1e9,
    }
    for claim, met in claims.items():
        print("met   " if met else "MISSED", claim)
    if not all(claims.values()):
        sys.exit(1)


def gpt2(steps: list[int]) -> None:
    print("GPT-2 small, 64 sequences of 128 tokens, Adam; GB, and seconds to compile")
    workload = gpt2_small()
    rows = {
        "ReverseMode()": (ReverseMode(), [16]),
        "MixedMode(NestedCheckpoint(5))": (MixedMode(NestedCheckpoint(5)), steps),
        "MixedMode(BinomialCheckpoint(8), save_gradients=False)": (
            MixedMode(BinomialCheckpoint(8), save_gradients=False),
            steps,
        ),
    }
    for name, (adjoint, lengths) in rows.items():
        for t in lengths:
            size, seconds = temporary_bytes(workload, t, adjoint)
            print(f"{name:56} T = {t:6}  {size / 1e9:7.1f} GB  {seconds:5.1f} s", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=["transformer", "gpt2"], default="transformer")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a goal is missed")
    arguments = parser.parse_args()
    if arguments.workload == "gpt2":
        gpt2(arguments.steps or [1000, 10000])
    else:
        small(arguments.steps or [2, 8, 32, 128, 512], arguments.check)
