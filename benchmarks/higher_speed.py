"""The speed of `jaxmeta_bridge.higher` beside the `higher` package, on the same training loops.

One meta-iteration: for each task a few differentiable steps and one `backward()`, in a Python
loop; then a step of Adam on the initial weights. Four models (`higher_workloads.py`), three habits
of reading values in the loop. Before anything is timed the meta-gradients are compared.

    python benchmarks/higher_speed.py --higher ~/higher                # a checkout of higher
    python benchmarks/higher_speed.py --higher ~/higher --native      # and jaxmeta.meta_unroll
    python benchmarks/higher_speed.py --higher ~/higher --cost        # and what recording costs

The contestants are run in turn, several rounds, in one process, each training its own copy of the
model. A ratio is the median over the rounds of one round's ratio; above 1 is faster than `higher`.
`first` is the first meta-gradient of that row, compilation included; programs that an earlier row
of the same process compiled are not compiled again.
"""

import argparse
import gc
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import torch
from higher_workloads import READS, WORKLOADS, Reads, Task, Workload
from torch import Tensor, nn

import jaxmeta
from jaxmeta_bridge import from_torch, to_torch

TOLERANCE = 1e-3  # of the meta-gradients, relative to the largest entry of each parameter's
OURS = ("drop-in", "meta_unroll")  # higher's own release adds Adam's epsilon elsewhere
Backward = Callable[[nn.Module], None]


def load_higher(folder: Path) -> ModuleType:
    """The `higher` package found there, beside others of the same name."""
    if not (folder / "higher" / "__init__.py").is_file():
        sys.exit(f"{folder} holds no package named higher; give the folder that contains it.")
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module("higher")
    finally:
        sys.path.remove(str(folder))
        for name in [n for n in sys.modules if n.partition(".")[0] == "higher"]:
            del sys.modules[name]


def native(work: Workload, model: nn.Module) -> Backward:
    """The same meta-gradient by `jaxmeta.meta_unroll`, all tasks in one program."""
    network, loss = from_torch(model), from_torch(work.loss)

    def inner_loss(params: Any, batch: Any) -> jax.Array:
        inputs, targets = batch
        return loss(network(params, {}, inputs)[0], targets)

    def task_loss(params: Any, task: Task) -> jax.Array:
        batch = (task.inputs, task.targets)
        out = jaxmeta.meta_unroll(
            inner_loss, work.native(), params, batch=batch, num_steps=work.steps
        )
        return inner_loss(out.params, (task.query_inputs, task.query_targets))

    @to_torch
    def meta_loss(params: Any, tasks: Task) -> jax.Array:
        return jax.vmap(task_loss, in_axes=(None, 0))(params, tasks).sum()

    tasks = Task(*map(torch.stack, zip(*work.tasks, strict=True)))
    return lambda model: meta_loss(dict(model.named_parameters()), tasks).backward()


class Contestant:
    """One way to compute the meta-gradient, with a model and a meta-optimizer of its own."""

    def __init__(self, model: nn.Module, backward: Backward) -> None:
        self.model, self.backward = model, backward
        self.meta_optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        self.seconds: list[float] = []

    def gradients(self) -> tuple[dict[str, Tensor], float]:
        """The meta-gradient, and the seconds it took."""
        start = time.perf_counter()
        self.backward(self.model)
        named = self.model.named_parameters()
        found = {name: p.grad.clone() for name, p in named if p.grad is not None}
        for gradient in found.values():
            gradient.sum().item()  # whatever was put off is done now
        return found, time.perf_counter() - start

    def iterate(self) -> float:
        """One meta-iteration; the seconds it took."""
        gc.collect()  # nobody pays for what another left behind
        start = time.perf_counter()
        self.meta_optimizer.zero_grad()
        self.backward(self.model)
        self.meta_optimizer.step()
        for p in self.model.parameters():
            p.sum().item()  # as above
        return time.perf_counter() - start


def contestants(
    work: Workload, reads: Reads, packages: dict[str, ModuleType], with_native: bool
) -> dict[str, Contestant]:
    found = {}
    for name, package in packages.items():

        def backward(model: nn.Module, package: ModuleType = package) -> None:
            work.backward(package, model, reads)

        found[name] = Contestant(work.model(), backward)
    if with_native:
        model = work.model()
        found["meta_unroll"] = Contestant(model, native(work, model))
    return found


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of two sets of gradients, relative to the largest entry of each parameter's."""
    if ours.keys() != theirs.keys():
        raise ValueError(f"gradients of only one: {sorted(ours.keys() ^ theirs.keys())}")
    # A gradient that is zero in theory (a bias before batch norm) is rounding error alone.
    floor = 1e-2 * max(float(g.abs().max()) for g in theirs.values())
    return max(
        float((ours[name] - g).abs().max() / g.abs().max().clamp(min=floor))
        for name, g in theirs.items()
    )


def first_gradients(racers: dict[str, Contestant]) -> dict[str, float]:
    """The seconds of the first meta-gradients; ends the process if ours differ from higher's."""
    gradients, seconds = {}, {}
    for name, racer in racers.items():
        gradients[name], seconds[name] = racer.gradients()
    for name, ours in gradients.items():
        difference = largest_difference(ours, gradients["higher"])
        if name in OURS and not difference <= TOLERANCE:
            sys.exit(f"{name}: meta-gradients differ by {difference:.1e} from those of higher")
    return seconds


def race(racers: dict[str, Contestant], warm_up: int, rounds: int) -> None:
    """Fills in each one's seconds."""
    for i in range(warm_up + rounds):
        for racer in racers.values():
            seconds = racer.iterate()
            if i >= warm_up:
                racer.seconds.append(seconds)


def loop_cost(package: ModuleType, work: Workload, repeats: int) -> float:
    """Microseconds of Python per inner step, before any value is asked for."""
    model, times = work.model(), []
    for _ in range(repeats):
        for task in work.tasks:
            start = time.perf_counter()
            fmodel = work.adapt(package, model, task, "nothing")
            times.append(time.perf_counter() - start)
            del fmodel
    return 1e6 * statistics.median(times) / work.steps


def report(racers: dict[str, Contestant], first: dict[str, float]) -> None:
    higher = racers["higher"].seconds
    for name, racer in racers.items():
        ratios = [theirs / own for theirs, own in zip(higher, racer.seconds, strict=True)]
        milliseconds = 1e3 * statistics.median(racer.seconds)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        ratio = f"{statistics.median(ratios):8.2f}  {spread}" if name != "higher" else ""
        print(f"    {name:18s}{milliseconds:10.1f}{first[name]:9.2f}{ratio}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    add = parser.add_argument
    add("--higher", type=Path, required=True, help="the folder that holds the package higher")
    add("--release", type=Path, help="another higher, such as the published release")
    add("--no-drop-in", action="store_true", help="leave out jaxmeta_bridge.higher")
    add("--native", action="store_true", help="also jaxmeta.meta_unroll")
    add("--cost", action="store_true", help="also the time of the inner loop's own Python")
    add("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    add("--reads", nargs="+", choices=READS, default=READS, help="what the loop reads")
    add("--rounds", type=int, default=7)
    add("--warm-up", type=int, default=3, help="rounds before the first that counts")
    add("--threads", type=int, help="of torch; as torch chooses by default")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    packages = {"higher": load_higher(args.higher)}
    if args.release:
        packages["higher, release"] = load_higher(args.release)
    if not args.no_drop_in:
        packages["drop-in"] = importlib.import_module("jaxmeta_bridge.higher")
    print(f"torch {torch.__version__} ({torch.get_num_threads()} threads), jax {jax.__version__}")
    for name in args.workloads:
        work = WORKLOADS[name]()
        print(f"\n{name}: {len(work.tasks)} tasks, {work.steps} steps")
        for reads in args.reads:
            racers = contestants(work, reads, packages, args.native and reads == "nothing")
            first = first_gradients(racers)
            race(racers, args.warm_up, args.rounds)
            print(f"  reads {reads:16s}{'ms':>10s}{'first, s':>9s}{'× higher':>8s}  range")
            report(racers, first)
        if args.cost:
            for label, package in packages.items():
                cost = loop_cost(package, work, args.rounds)
                print(f"  an inner step, µs   {label:18s}{cost:10.0f}", flush=True)


if __name__ == "__main__":
    main()
