"""MAML on handwritten digits: a PyTorch network that learns to learn, differentiated by JAX.

The network and its meta-optimizer are PyTorch's. Adapting the network to a task, a few steps of
gradient descent, is one call of `jaxmeta.meta_unroll`; `meta_loss.backward()` differentiates
through those steps exactly, second derivatives included. Meta-learned are the weights to start
from and the learning rate of each step.

    python examples/maml_digits.py            # a few minutes on two cores
    python examples/maml_digits.py --quick    # seconds, to see that it runs
    python examples/maml_digits.py --help     # every setting

Ctrl-C ends the training early and keeps what was learned. Methods: Finn, Abbeel and Levine (2017),
arXiv:1703.03400; a learning rate for each step: Antoniou, Edwards and Storkey (2019),
arXiv:1810.09502.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
import torch.nn.functional as F
from digits import (
    EXAMPLES,
    TRAINING_CLASSES,
    UNSEEN_CLASSES,
    Tasks,
    TaskSampler,
    load_images,
    nearest_neighbour,
)
from report import EPISODES, Accuracy, History, print_table, save_figure
from torch import Tensor, nn
from tqdm import tqdm

import jaxmeta
from jaxmeta_bridge import from_torch, to_torch


def option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """The settings; each is an option of the command line."""

    ways: int = option(5, "classes in a task")
    shots: int = option(1, "images of each class to adapt to")
    queries: int = option(15, "further images of each class to be judged on")
    channels: int = option(32, "channels of each of the four convolutions")
    inner_steps: int = option(5, "steps of gradient descent that adapt the network to a task")
    tasks: int = option(2, "tasks in a meta-batch")
    iterations: int = option(400, "steps of the meta-optimizer")
    eval_tasks: int = option(300, "tasks of unseen classes in the final evaluation")
    meta_lr: float = option(3e-3, "learning rate of the meta-optimizer at the start")
    seed: int = option(0, "decides the initial weights and which tasks are drawn")
    device: str = option("cpu", "cpu or gpu")
    out: str = option("demo-results", "directory for the figure, the metrics and the weights")


QUICK = {"queries": 5, "channels": 8, "inner_steps": 2, "iterations": 10, "eval_tasks": 20}

INNER_LR_CHOICES = (0.03, 0.1, 0.3, 1.0)  # tried for the network before meta-training
LOG_LR_SPEED = 5  # the logarithms of the inner learning rates move this much faster than weights
HELD_OUT_CHECKS = 5  # points of the learning curve on unseen classes; nothing is chosen by them

# ------------------------------------------------------------------------ the method

# (params, log_lrs, tasks) -> the mean query loss; int[task, way·query], the labels given
MetaLoss = Callable[[dict[str, Tensor], Tensor, Tasks], tuple[Tensor, Tensor]]
Predict = Callable[[Tasks], Tensor]  # int[task, way·query]
Params = dict[str, jax.Array]


def conv_net(channels: int, ways: int) -> nn.Sequential:
    """Four blocks that shrink 28×28 pixels to one, normalized by the statistics of the batch."""

    def block(channels_in: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels_in, channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(channels, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )

    blocks = [block(1), block(channels), block(channels), block(channels)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels, ways))


def make_meta_loss(model: nn.Module, inner_steps: int) -> MetaLoss:
    """How well the model does after adapting to each task, as a differentiable torch function."""
    network = from_torch(model)
    cross_entropy = from_torch(F.cross_entropy)

    def inner_loss(params: Params, support: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = support
        logits, _ = network(params, {}, images)
        return cross_entropy(logits, labels)

    def task_loss(params: Params, lrs: jax.Array, task: Tasks) -> tuple[jax.Array, jax.Array]:
        adapted = jaxmeta.meta_unroll(
            inner_loss,
            lambda lrs: optax.sgd(lambda step: lrs[step]),
            params,
            batch=(task.support_images, task.support_labels),
            num_steps=inner_steps,
            hyperparams=lrs,
        )
        logits, _ = network(adapted.params, {}, task.query_images)
        return cross_entropy(logits, task.query_labels), logits.argmax(-1)

    @to_torch
    def meta_loss(params: Params, log_lrs: jax.Array, tasks: Tasks) -> tuple[jax.Array, jax.Array]:
        each_task = jax.vmap(task_loss, in_axes=(None, None, 0))
        losses, predictions = each_task(params, jnp.exp(log_lrs), tasks)
        return losses.mean(), predictions

    return meta_loss


@dataclass
class Learner:
    """What is meta-learned, and the loss that judges it."""

    model: nn.Module
    log_lrs: nn.Parameter  # float[step]; logarithms keep the learning rates positive
    meta_loss: MetaLoss

    def loss(self, tasks: Tasks) -> tuple[Tensor, Tensor]:
        return self.meta_loss(dict(self.model.named_parameters()), self.log_lrs, tasks)

    @torch.no_grad()
    def predict(self, tasks: Tasks) -> Tensor:
        return self.loss(tasks)[1]


def make_learner(config: Config, device: torch.device) -> Learner:
    torch.manual_seed(config.seed)
    model = conv_net(config.channels, config.ways).to(device)
    log_lrs = nn.Parameter(torch.zeros(config.inner_steps, device=device))
    return Learner(model, log_lrs, make_meta_loss(model, config.inner_steps))


def meta_train(
    config: Config,
    learner: Learner,
    draw: Callable[[], Tasks],
    check: Callable[[], Accuracy],
    stop: threading.Event,
) -> History:
    """Trains on tasks from `draw`, for all iterations or until `stop` is set."""
    weights = {"params": learner.model.parameters()}
    log_lrs = {"params": [learner.log_lrs], "lr": config.meta_lr * LOG_LR_SPEED}
    meta_opt = torch.optim.Adam([weights, log_lrs], lr=config.meta_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(meta_opt, config.iterations)
    history = History()
    every = max(1, config.iterations // HELD_OUT_CHECKS)
    # disable=None: a bar on a terminal, only the lines of bar.write in a log.
    bar = tqdm(range(1, config.iterations + 1), "meta-training", disable=None, dynamic_ncols=True)
    for iteration in bar:
        if stop.is_set():
            break
        tasks = draw()
        meta_loss, predictions = learner.loss(tasks)
        meta_opt.zero_grad()
        meta_loss.backward()
        meta_opt.step()
        schedule.step()

        correct = (predictions == tasks.query_labels).float().mean()
        history.add(meta_loss.item(), correct.item())
        bar.set_postfix(loss=f"{meta_loss:.3f}", accuracy=f"{correct:.3f}", refresh=False)
        if iteration % every == 0:
            history.held_out.append((iteration, check()))
            bar.write(history.summary(every))
    bar.close()
    return history


# ------------------------------------------------------------------------ evaluation


def evaluate(predict: Predict, batches: Iterable[Tasks]) -> Accuracy:
    """The accuracy of the labels that `predict` gives to the query sets."""
    by_task = torch.cat([(predict(b) == b.query_labels).float().mean(1) for b in batches])
    error = by_task.std() / len(by_task) ** 0.5
    return Accuracy(by_task.mean().item(), 1.96 * error.item(), len(by_task))


def tune_inner_lr(learner: Learner, batches: list[Tasks]) -> float:
    """Sets every inner learning rate to the one choice that does best; returns it."""

    def accuracy(lr: float) -> float:
        learner.log_lrs.data.fill_(math.log(lr))
        return evaluate(learner.predict, batches).mean

    best = max(INNER_LR_CHOICES, key=accuracy)
    learner.log_lrs.data.fill_(math.log(best))
    return best


def run(config: Config, device: torch.device, stop: threading.Event) -> None:
    """The experiment: baselines, meta-training, the final evaluation, files."""
    start = time.perf_counter()
    timings: dict[str, float] = {}
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # torch only draws tasks; threads of its own would disturb JAX's
    learner = make_learner(config, device)
    images = load_images().to(device)
    shape = (config.ways, config.shots, config.queries)
    training = TaskSampler(images, TRAINING_CLASSES, shape)
    unseen = TaskSampler(images, UNSEEN_CLASSES, shape)
    rng = torch.Generator().manual_seed(config.seed)
    few = max(2, config.tasks, config.eval_tasks // 8)

    def draw() -> Tasks:
        return training.draw(config.tasks, rng)

    def test(predict: Predict, count: int, seed: int = config.seed + 1000) -> Accuracy:
        return evaluate(predict, unseen.batches(count, config.tasks, seed))

    def check() -> Accuracy:
        return test(learner.predict, few, seed=config.seed + 2000)

    with stage("compiling the adaptation", timings, "(about 10 s) ..."):
        learner.predict(draw())
    with stage("evaluating the untrained network", timings, "..."):
        lr = tune_inner_lr(learner, [draw() for _ in range(0, few, config.tasks)])
        results = {
            "nearest_neighbour": test(nearest_neighbour, config.eval_tasks),
            "before": test(learner.predict, config.eval_tasks),
        }
    if not stop.is_set():
        with stage("compiling the meta-gradient", timings, "(about 30 s) ..."):
            learner.loss(draw())[0].backward()
    with stage("meta-training", timings):
        history = meta_train(config, learner, draw, check, stop)
    with stage("evaluating the meta-trained network", timings, "..."):
        # Those who interrupt want to leave: fewer of the same tasks.
        count = config.eval_tasks // 4 if stop.is_set() else config.eval_tasks
        results["after"] = test(learner.predict, count)
        shown = list(unseen.batches(EPISODES, config.tasks, config.seed + 1000))
        episodes = [pair for b in shown for pair in zip(b.split(), learner.predict(b), strict=True)]
    timings["total"] = round(time.perf_counter() - start, 2)

    weights = {"model": learner.model.state_dict(), "log_lrs": learner.log_lrs.detach()}
    torch.save(weights, out / "weights.pt")
    title = f"{config.ways}-way {config.shots}-shot accuracy on unseen classes"
    save_figure(out / "figure.png", title, history, results, episodes)
    save_metrics(
        out / "metrics.json",
        config=dataclasses.asdict(config),
        interrupted=stop.is_set(),
        results={name: accuracy._asdict() for name, accuracy in results.items()},
        inner_lr={"before": lr, "after": learner.log_lrs.exp().tolist()},
        seconds=timings,
        history=dataclasses.asdict(history),
    )
    print_table(title, results)
    print(f"\n{out}/: figure.png, metrics.json, weights.pt   {timings['total']:.0f} s")


# ------------------------------------------------------------------------ the command line


def save_metrics(path: Path, **metrics: Any) -> None:
    """Writes JSON, adding the versions of what ran and the most memory it took."""
    versions = {"python": platform.python_version()}
    for package in ("jaxmeta", "jax", "jaxlib", "optax", "torch", "numpy"):
        with suppress(PackageNotFoundError):  # of a source folder that is not installed
            versions[package] = version(package)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)
    metrics |= {"versions": versions, "peak_rss_mb": peak}
    path.write_text(json.dumps(metrics, indent=1) + "\n")


@contextmanager
def stage(name: str, timings: dict[str, float], announce: str = "") -> Iterator[None]:
    """Times a stage; one that prints nothing by itself is announced with these words."""
    if announce:
        print(f"{name} {announce}", end=" ", flush=True)
    start = time.perf_counter()
    yield
    timings[name] = round(time.perf_counter() - start, 2)
    if announce:
        print(f"{timings[name]:.0f} s", flush=True)


def stop_on_ctrl_c() -> threading.Event:
    """The first Ctrl-C sets the event, the second ends the process."""
    stop = threading.Event()

    def on_signal(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        stop.set()
        # print may not be called here: the signal may have come in the middle of another.
        os.write(2, b"\nStopping early, results follow; Ctrl-C again aborts.\n")

    signal.signal(signal.SIGINT, on_signal)
    return stop


def find_device(name: str) -> torch.device:
    """The device for the tensors, and so for JAX, which runs where its inputs are."""
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return torch.device("cpu")
    try:
        jax.devices("gpu")
    except RuntimeError as error:
        sys.exit(f"--device gpu: this JAX has no GPU ({error}). Install jax[cuda13], or use cpu.")
    if not torch.cuda.is_available():
        sys.exit("--device gpu: this torch has no GPU. Install a CUDA build of torch, or use cpu.")
    return torch.device("cuda")


def parse_arguments() -> Config:
    parser = argparse.ArgumentParser(
        description="Second-order MAML of a PyTorch network on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=f"small sizes: {QUICK}")
    for setting in dataclasses.fields(Config):
        kind: Any = setting.type
        parser.add_argument(
            "--" + setting.name.replace("_", "-"),
            type=kind,
            default=setting.default,
            choices=("cpu", "gpu") if setting.name == "device" else None,
            help=setting.metadata["help"],
        )
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    given = vars(parser.parse_args())
    del given["quick"]
    config = Config(**given)
    for name in ("shots", "queries", "channels", "inner_steps", "tasks", "iterations"):
        if given[name] < 1:
            parser.error(f"--{name.replace('_', '-')} is {given[name]}; expected 1 or more")
    if not 2 <= config.ways <= len(UNSEEN_CLASSES):
        parser.error(f"--ways is {config.ways}; expected 2 to {len(UNSEEN_CLASSES)}")
    if config.shots + config.queries > EXAMPLES:
        parser.error(f"--shots + --queries is more than the {EXAMPLES} images of a class")
    if config.eval_tasks < 8:
        parser.error(f"--eval-tasks is {config.eval_tasks}; expected 8 or more")
    return config


if __name__ == "__main__":
    settings = parse_arguments()
    run(settings, find_device(settings.device), stop_on_ctrl_c())
