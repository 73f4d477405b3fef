"""Meta-learning problems for the comparisons with `higher`: models, tasks and optimizers in torch.

All data is random and small; what counts is the work, not what is learned.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal, NamedTuple

import optax
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What a training loop reads: nothing, the loss of each inner step, or the meta-loss and a score
# of the predictions before it calls backward().
Reads = Literal["nothing", "each loss", "meta-loss"]
READS: tuple[Reads, ...] = ("nothing", "each loss", "meta-loss")


class Task(NamedTuple):
    inputs: Tensor
    targets: Tensor
    query_inputs: Tensor
    query_targets: Tensor


@dataclass(frozen=True)
class Workload:
    """A model that adapts to each task by a few steps, and is judged after them."""

    network: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]
    tasks: list[Task]
    steps: int
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
    native: Callable[[], optax.GradientTransformation]  # the same optimizer in optax

    def model(self) -> nn.Module:
        """The same initial weights at each call."""
        torch.manual_seed(0)
        return self.network()

    def adapt(self, higher: ModuleType, model: nn.Module, task: Task, reads: Reads) -> Any:
        """The adapted model, by `higher` or by what stands in for it."""
        opt = self.optimizer(model.parameters())
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
            for _ in range(self.steps):
                loss = self.loss(fmodel(task.inputs), task.targets)
                diffopt.step(loss)
                if reads == "each loss":
                    loss.item()
        return fmodel

    def backward(self, higher: ModuleType, model: nn.Module, reads: Reads) -> None:
        """Adds the gradient of every task's meta-loss to the model's, a task at a time."""
        for task in self.tasks:
            fmodel = self.adapt(higher, model, task, reads)
            outputs = fmodel(task.query_inputs)
            meta_loss = self.loss(outputs, task.query_targets)
            if reads == "meta-loss":
                meta_loss.item()
                self.score(outputs, task.query_targets).item()
            meta_loss.backward()


def sgd(lr: float) -> dict[str, Any]:
    return {
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=lr),
        "native": lambda: optax.sgd(lr),
    }


def adam(lr: float) -> dict[str, Any]:
    # The default eps, 1e-8, makes a first step that is the sign of the gradient: its derivative
    # is rounding error, and comparing gradients would compare that.
    return {
        "optimizer": lambda parameters: torch.optim.Adam(parameters, lr=lr, eps=1e-3),
        # eps_root, too small to count, keeps optax from NaN where a gradient is exactly zero.
        "native": lambda: optax.adam(lr, eps=1e-3, eps_root=1e-16),
    }


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets)


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().mean()


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets)


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.argmax(-1) == targets).float().mean()


REGRESSION: dict[str, Any] = {"loss": squared_error, "score": absolute_error}
CLASSIFICATION: dict[str, Any] = {"loss": cross_entropy, "score": accuracy}


def sine(tasks: int = 25, steps: int = 10) -> Workload:
    """Regression of sines by a network of 40 and 40 units: tiny, so overhead is what it costs."""

    def network() -> nn.Module:
        return nn.Sequential(
            nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
        )

    def draw(rng: torch.Generator) -> Task:
        amplitude, phase = torch.rand(2, generator=rng)
        x = 10 * torch.rand(20, 1, generator=rng) - 5
        y = (0.1 + 5 * amplitude) * torch.sin(x + torch.pi * phase)
        return Task(x[:10], y[:10], x[10:], y[10:])

    return Workload(network, tasks=drawn(tasks, draw), steps=steps, **REGRESSION, **sgd(0.01))


def conv(tasks: int = 2, steps: int = 5, channels: int = 32, ways: int = 5) -> Workload:
    """One-shot classification by four blocks of convolution: the network of the demo."""

    def block(channels_in: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, padding=1),
            nn.BatchNorm2d(channels, track_running_stats=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )

    def network() -> nn.Module:
        blocks = [block(1), block(channels), block(channels), block(channels)]
        return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(channels, ways))

    def draw(rng: torch.Generator) -> Task:
        images = torch.randn(ways * 16, 1, 28, 28, generator=rng)
        labels = torch.arange(ways).repeat(16)
        return Task(images[:ways], labels[:ways], images[ways:], labels[ways:])

    return Workload(network, tasks=drawn(tasks, draw), steps=steps, **CLASSIFICATION, **sgd(0.1))


class Recurrent(nn.Module):
    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.lstm(x)
        return self.head(outputs[:, -1])


def lstm(tasks: int = 4, steps: int = 5, length: int = 20) -> Workload:
    """Regression on sequences by an LSTM of 32 units."""

    def draw(rng: torch.Generator) -> Task:
        x = torch.randn(32, length, 8, generator=rng)
        y = x.mean(1) @ torch.randn(8, 1, generator=rng)
        return Task(x[:16], y[:16], x[16:], y[16:])

    return Workload(
        lambda: Recurrent(8, 32),
        tasks=drawn(tasks, draw),
        steps=steps,
        **REGRESSION,
        **sgd(0.1),
    )


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads=4, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        # Asking for the weights keeps torch from its fused kernel, which has no second derivative.
        x = x + self.attention(z, z, z, need_weights=True)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, tokens: int, length: int, width: int, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.position = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(x) + self.position).mean(1))


def transformer(tasks: int = 2, steps: int = 5, length: int = 16, width: int = 32) -> Workload:
    """Classification of token sequences by two blocks, adapted with Adam."""
    tokens = 20

    def draw(rng: torch.Generator) -> Task:
        x = torch.randint(tokens, (16, length), generator=rng)
        y = torch.randint(tokens, (16,), generator=rng)
        return Task(x[:8], y[:8], x[8:], y[8:])

    return Workload(
        lambda: Transformer(tokens, length, width, blocks=2),
        tasks=drawn(tasks, draw),
        steps=steps,
        **CLASSIFICATION,
        **adam(1e-3),
    )


def drawn(count: int, draw: Callable[[torch.Generator], Task]) -> list[Task]:
    rng = torch.Generator().manual_seed(1)
    return [draw(rng) for _ in range(count)]


WORKLOADS: dict[str, Callable[..., Workload]] = {
    "sine": sine,
    "conv": conv,
    "lstm": lstm,
    "transformer": transformer,
}
