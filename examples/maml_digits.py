"""MAML on handwritten digits: a PyTorch network that learns how to learn, differentiated by JAX.

The network and both optimizers are PyTorch's. The inner loop, which adapts the network to a task
in a few steps of gradient descent, is one call of `jaxmeta.meta_unroll`; it is compiled, and
`meta_loss.backward()` differentiates through it exactly, second derivatives included. What is
meta-learned: the weights to start from, and the learning rate of each inner step.

    python examples/maml_digits.py            # a few minutes on two cores
    python examples/maml_digits.py --quick    # seconds, to see that it runs
    python examples/maml_digits.py --help     # every setting

Ctrl-C ends the training early and keeps what was learned. Method: Finn, Abbeel and Levine (2017),
arXiv:1703.03400; learning rates per step: Antoniou, Edwards and Storkey (2019), arXiv:1810.09502.
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxmeta
import optax
import torch
import torch.nn.functional as F  # noqa: N812 - the customary name
from digits import TRAINING_CLASSES, UNSEEN_CLASSES, Tasks, TaskSampler, load_images, nearest
from jaxmeta_bridge import from_torch, to_torch
from report import Accuracy, History, print_table, save_figure
from torch import Tensor, nn
from tqdm import tqdm


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
    tasks: int = option(4, "tasks in a meta-batch")
    iterations: int = option(300, "steps of the meta-optimizer")
    eval_tasks: int = option(400, "tasks of unseen classes in the final evaluation")
    meta_lr: float = option(3e-3, "learning rate of the meta-optimizer, at the start")
    seed: int = option(0, "decides the initial weights and which tasks are drawn")
    device: str = option("cpu", "cpu or gpu")
    out: str = option("demo-results", "directory for the figure, the metrics and the weights")


QUICK = {"queries": 5, "channels": 8, "inner_steps": 2, "iterations": 10, "eval_tasks": 20}

# Learning rates that the network before meta-training may choose from, on training classes.
INNER_LR_CHOICES = (0.03, 0.1, 0.3, 1.0)
LOG_LR_SPEED = 5  # the inner learning rates move so many times faster than the weights
HELD_OUT_CHECKS = 6  # points of the held-out learning curve; nothing is chosen by them

MetaLoss = Callable[[dict[str, nn.Parameter], Tensor, Tasks], tuple[Tensor, Tensor]]


def conv_net(channels: int, ways: int) -> nn.Sequential:
    """Four blocks that halve 28×28 pixels to 1×1, normalized by the batch at hand."""

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
    """The loss on the query sets after adapting to the support sets, as a torch function."""
    network = from_torch(model)
    cross_entropy = from_torch(F.cross_entropy)

    def inner_loss(params: dict[str, jax.Array], support: tuple[jax.Array, jax.Array]) -> jax.Array:
        images, labels = support
        logits, _ = network(params, {}, images)
        return cross_entropy(logits, labels)

    def task_loss(
        params: dict[str, jax.Array], lrs: jax.Array, task: Tasks
    ) -> tuple[jax.Array, jax.Array]:
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
    def meta_loss(
        params: dict[str, jax.Array], log_lrs: jax.Array, tasks: Tasks
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the mean loss and int[task, way·query], the predicted labels."""
        per_task = jax.vmap(task_loss, in_axes=(None, None, 0))
        losses, predictions = per_task(params, jnp.exp(log_lrs), tasks)
        return losses.mean(), predictions

    return meta_loss


@dataclass
class Learner:
    """What is meta-learned, and the loss that judges it."""

    model: nn.Module
    log_lrs: nn.Parameter  # float[step]; logarithms keep the learning rates positive
    meta_loss: MetaLoss

    def loss(self, tasks: Tasks) -> tuple[Tensor, Tensor]:
        """Returns the mean query loss after adaptation, and int[task, way·query], the labels."""
        return self.meta_loss(dict(self.model.named_parameters()), self.log_lrs, tasks)

    def predict(self, tasks: Tasks) -> Tensor:
        return self.loss(tasks)[1]


@torch.no_grad()
def evaluate(predict: Callable[[Tasks], Tensor], batches: Iterable[Tasks]) -> Accuracy:
    """Judges the labels, int[task, way·query], that `predict` gives to the query sets."""
    accuracies = torch.cat([(predict(b) == b.query_labels).float().mean(1) for b in batches])
    error = accuracies.std() / len(accuracies) ** 0.5
    return Accuracy(accuracies.mean().item(), 1.96 * error.item(), len(accuracies))


def tune_inner_lr(learner: Learner, batches: list[Tasks]) -> float:
    """Sets the inner learning rates to the one that is best for the untrained network."""

    def accuracy(lr: float) -> float:
        learner.log_lrs.data.fill_(math.log(lr))
        return evaluate(learner.predict, batches).mean

    best = max(INNER_LR_CHOICES, key=accuracy)
    learner.log_lrs.data.fill_(math.log(best))
    return best


def meta_train(
    config: Config,
    learner: Learner,
    draw: Callable[[], Tasks],
    check: Callable[[], Accuracy],
    stop: threading.Event,
) -> History:
    """Trains until `stop` is set or all iterations are done; `check` gives held-out points."""
    meta_opt = torch.optim.Adam(
        [
            {"params": learner.model.parameters()},
            {"params": [learner.log_lrs], "lr": LOG_LR_SPEED * config.meta_lr},
        ],
        lr=config.meta_lr,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(meta_opt, config.iterations)
    history = History()
    every = max(1, config.iterations // HELD_OUT_CHECKS)
    # On a terminal a bar; in a log only the lines at the checks.
    bar = tqdm(range(1, config.iterations + 1), "meta-training", disable=None, dynamic_ncols=True)
    for iteration in bar:
        if stop.is_set():
            break
        tasks = draw()
        meta_opt.zero_grad()
        meta_loss, predictions = learner.loss(tasks)
        meta_loss.backward()
        meta_opt.step()
        schedule.step()

        accuracy = (predictions == tasks.query_labels).float().mean().item()
        history.loss.append(meta_loss.item())
        history.accuracy.append(accuracy)
        bar.set_postfix(loss=f"{meta_loss.item():.3f}", accuracy=f"{accuracy:.3f}", refresh=False)
        if iteration % every == 0:
            history.held_out.append((iteration, check()))
            bar.write(history.summary(every))
    bar.close()
    return history


@contextmanager
def timed(what: str, timings: dict[str, float], expected: int | None = None) -> Iterator[None]:
    """Notes how long a stage took; if it is a silent one, announces it."""
    if expected:
        print(f"{what} (about {expected} s) ...", end=" ", flush=True)
    start = time.perf_counter()
    yield
    timings[what] = time.perf_counter() - start
    if expected:
        print(f"{timings[what]:.0f} s")


def stop_on_ctrl_c() -> threading.Event:
    """The first Ctrl-C sets the event; a second one ends the process."""
    stop = threading.Event()

    def interrupted(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        stop.set()
        os.write(2, b"\nStopping; a short evaluation follows. Ctrl-C again aborts.\n")

    signal.signal(signal.SIGINT, interrupted)
    return stop


def find_device(name: str) -> torch.device:
    """Tensors on this device make JAX run there too."""
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")
        return torch.device("cpu")
    try:
        jax.devices("gpu")
    except RuntimeError as error:
        sys.exit(f"--device gpu: JAX finds no GPU ({error}). Install it with `jax[cuda13]`.")
    if not torch.cuda.is_available():
        sys.exit("--device gpu: torch finds no GPU. Install torch for CUDA.")
    return torch.device("cuda")


def parse_arguments() -> Config:
    parser = argparse.ArgumentParser(
        description="Second-order MAML of a PyTorch network on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    quick = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"see that it runs: {quick}")
    for setting in dataclasses.fields(Config):
        flag = "--" + setting.name.replace("_", "-")
        choices = ("cpu", "gpu") if setting.name == "device" else None
        kind: Any = setting.type
        text = setting.metadata["help"]
        parser.add_argument(flag, type=kind, default=setting.default, choices=choices, help=text)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    given = vars(parser.parse_args())
    given.pop("quick")
    for name in ("shots", "queries", "channels", "inner_steps", "tasks", "iterations"):
        if given[name] < 1:
            parser.error(f"--{name.replace('_', '-')} is {given[name]}; expected 1 or more")
    if not 2 <= given["ways"] <= len(UNSEEN_CLASSES):
        parser.error(f"--ways is {given['ways']}; expected 2 to {len(UNSEEN_CLASSES)}")
    if given["shots"] + given["queries"] > EXAMPLES:
        parser.error(f"--shots plus --queries exceed the {EXAMPLES} examples of a class")
    return Config(**given)


def main() -> None:
    config = parse_arguments()
    device = find_device(config.device)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    stop = stop_on_ctrl_c()
    timings: dict[str, float] = {}

    torch.manual_seed(config.seed)
    model = conv_net(config.channels, config.ways).to(device)
    log_lrs = nn.Parameter(torch.zeros(config.inner_steps, device=device))
    learner = Learner(model, log_lrs, make_meta_loss(model, config.inner_steps))

    images = load_images().to(device)
    shape = (config.ways, config.shots, config.queries)
    training = TaskSampler(images, TRAINING_CLASSES, shape)
    unseen = TaskSampler(images, UNSEEN_CLASSES, shape)

    results = baselines(config, learner, training, unseen)
    results["after"] = ...


if __name__ == "__main__":
    main()
