"""The memory of long unrolls: `jaxmeta_bridge.higher` beside the `higher` package.

One task, T inner steps, one `backward()`, each in a fresh process. The table has the most memory
that the process held, beyond what it held before the first step (imports and the model).

    python benchmarks/higher_memory.py --higher ~/higher                    # a checkout of higher
    python benchmarks/higher_memory.py --higher ~/higher --steps 5 20 --workload sine
"""

# This process imports neither torch nor JAX: a child would count its parent's memory as its own.
import argparse
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

WORKLOADS = ("sine", "conv", "lstm", "transformer")
TOLERANCE = 1e-2  # of the meta-gradient's norm


def most_memory() -> float:
    """The most memory this process ever held, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(args: argparse.Namespace) -> None:
    """Prints the memory and the gradient's norm, as JSON, of one run in this process."""
    import importlib

    from higher_speed import load_higher
    from higher_workloads import WORKLOADS as workloads

    drop_in = args.measure == "drop-in"
    module = "jaxmeta_bridge.higher"
    package = importlib.import_module(module) if drop_in else load_higher(args.higher)
    work = workloads[args.workload](tasks=1, steps=args.steps[0])
    model = work.model()
    before = most_memory()
    work.backward(package, model, args.reads)
    norm = math.hypot(*(float(p.grad.norm()) for p in model.parameters() if p.grad is not None))
    print(json.dumps({"mib": most_memory() - before, "norm": norm}))


def in_fresh_process(contestant: str, steps: int, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--measure", contestant]
    command += ["--steps", str(steps), "--workload", args.workload, "--reads", args.reads]
    command += ["--higher", str(args.higher)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{contestant}, {steps} steps: {run.stderr.strip() or run.returncode}")
    return json.loads(run.stdout.splitlines()[-1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--higher", type=Path, required=True, help="the folder that holds the package higher")
    add("--no-drop-in", action="store_true", help="leave out jaxmeta_bridge.higher")
    add("--steps", type=int, nargs="+", default=[5, 20, 80, 320])
    add("--workload", choices=WORKLOADS, default="transformer")
    add("--reads", choices=("nothing", "each loss", "meta-loss"), default="nothing")
    add("--measure", choices=("higher", "drop-in"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.measure:
        return measure(args)
    contestants = ["higher"] + ["drop-in"] * (not args.no_drop_in)
    print(f"{args.workload}, reads {args.reads}: MiB\n{'steps':>7s}", end="")
    print("".join(f"{name:>10s}" for name in contestants), flush=True)
    for steps in args.steps:
        runs = [in_fresh_process(name, steps, args) for name in contestants]
        print(f"{steps:7d}" + "".join(f"{run['mib']:10.0f}" for run in runs), flush=True)
        for run in runs:
            if not math.isclose(run["norm"], runs[0]["norm"], rel_tol=TOLERANCE):
                sys.exit(f"the meta-gradients differ: norms {[run['norm'] for run in runs]}")


if __name__ == "__main__":
    main()
