"""What a few-shot experiment found: numbers, learning curves and adapted tasks, in one figure."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from digits import Tasks
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

BLUE, ORANGE, GREY = "#3366aa", "#dd7722", "#777777"
RIGHT, WRONG = "#2a9d4a", "#d03a3a"
EPISODES, QUERIES = 3, 4  # in the figure: tasks, and queries of each class
TILE = 34  # pixels of an image with its margin
LETTERS = "ABCDEFGHIJKLMNOP"  # the classes of a task
NAMES = {
    "nearest_neighbour": "nearest neighbour on pixels",
    "before": "same network before meta-training",
    "after": "after meta-training",
}


class Accuracy(NamedTuple):
    """Mean accuracy over tasks, and the half width of its 95 % confidence interval."""

    mean: float
    ci95: float
    tasks: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.ci95:.3f}"


@dataclass
class History:
    """How meta-training went: one entry an iteration, and now and then a held-out check."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    held_out: list[tuple[int, Accuracy]] = field(default_factory=list)  # iteration, accuracy

    def add(self, loss: float, accuracy: float) -> None:
        self.loss.append(loss)
        self.accuracy.append(accuracy)

    def summary(self, last: int) -> str:
        """The last `last` iterations and the last check, in a line."""
        return (
            f"iteration {len(self.loss)}: meta-loss {np.mean(self.loss[-last:]):.3f}, accuracy "
            f"{np.mean(self.accuracy[-last:]):.3f}, on unseen classes {self.held_out[-1][1]}"
        )


def print_table(title: str, results: dict[str, Accuracy]) -> None:
    print(f"\n{title}")
    for name, accuracy in results.items():
        print(f"  {NAMES[name]:<34} {accuracy}  ({accuracy.tasks} tasks)")


def save_figure(
    path: Path,
    title: str,
    history: History,
    results: dict[str, Accuracy],
    episodes: list[tuple[Tasks, Tensor]],
) -> None:
    """Draws the learning curves above the first `EPISODES` of `episodes`.

    Args:
      path: of the PNG.
      title: stands above.
      history: of meta-training.
      results: by the keys of `NAMES`.
      episodes: tasks of unseen classes, and int[way·query], the labels given to their queries.
    """
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 9), layout="constrained")  # pyplot would want a display
        figure.suptitle(title, fontsize=14)
        grid = figure.add_gridspec(2, EPISODES)
        _draw_curves(figure.add_subplot(grid[0, :]), history, results)
        for index, (task, predicted) in enumerate(episodes[:EPISODES]):
            _draw_episode(figure.add_subplot(grid[1, index]), task, predicted)
        figure.supxlabel(
            "Tasks of unseen classes. Top row: an image of each class to adapt to. Below: others "
            "of that class, framed green where recognized, else red with the wrong answer.",
            fontsize=10,
        )
        figure.savefig(path, dpi=130)


def _draw_curves(axes: Axes, history: History, results: dict[str, Accuracy]) -> None:
    accuracy = np.array(history.accuracy)
    iterations = np.arange(1, len(accuracy) + 1)
    axes.plot(iterations, accuracy, color=BLUE, alpha=0.2, linewidth=0.8)
    window = min(len(accuracy), 20)
    if window:
        smooth = np.convolve(accuracy, np.ones(window) / window, mode="valid")
        label = f"training classes, mean of {window} meta-batches"
        axes.plot(iterations[window - 1 :], smooth, color=BLUE, linewidth=2, label=label)
    if history.held_out:
        _draw_points(axes, history.held_out, ORANGE, "unseen classes, along the way")
    for name, dashes in (("before", "--"), ("nearest_neighbour", ":")):
        label = f"{NAMES[name]}: {results[name]}"
        axes.axhline(results[name].mean, color=GREY, linestyle=dashes, label=label)
    after = results["after"]
    label = f"{NAMES['after']}: {after}"
    _draw_points(axes, [(len(accuracy), after)], WRONG, label, marker="*", size=14)
    axes.set(xlabel="iteration", ylabel="accuracy on the query sets")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)


def _draw_points(
    axes: Axes,
    points: list[tuple[int, Accuracy]],
    color: str,
    label: str,
    marker: str = "o",
    size: int = 6,
) -> None:
    iterations, accuracies = zip(*points, strict=True)
    axes.errorbar(
        iterations,
        [accuracy.mean for accuracy in accuracies],
        [accuracy.ci95 for accuracy in accuracies],
        color=color,
        label=label,
        marker=marker,
        markersize=size,
        capsize=3,
        zorder=3,
    )


def _draw_episode(axes: Axes, task: Tasks, predicted: Tensor) -> None:
    """One task: a column a class, its support image above, queries below with the verdict."""
    ways = int(task.query_labels.max()) + 1
    support = task.support_images.reshape(ways, -1, 28, 28)[:, 0]
    queries = task.query_images.reshape(ways, -1, 28, 28)[:, :QUERIES]
    answers = predicted.reshape(ways, -1)[:, :QUERIES]
    rows = queries.shape[1]
    axes.set_axis_off()
    axes.set(xlim=(-2, ways * TILE), ylim=((rows + 1.3) * TILE, -12), aspect="equal")
    for way in range(ways):
        left = way * TILE
        _draw_tile(axes, support[way], left, 0, "black")
        axes.text(left + 14, -5, LETTERS[way], ha="center", weight="bold")
        for row in range(rows):
            answer = int(answers[way, row])
            top = (row + 1.3) * TILE
            _draw_tile(axes, queries[way, row], left, top, RIGHT if answer == way else WRONG)
            if answer != way:
                _draw_answer(axes, answer, left + 27, top + 1)


def _draw_answer(axes: Axes, answer: int, right: float, top: float) -> None:
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.text(right, top, LETTERS[answer], color=WRONG, ha="right", va="top", bbox=paper)


def _draw_tile(axes: Axes, image: Tensor, left: float, top: float, color: str) -> None:
    extent = (left, left + 28, top + 28, top)
    axes.imshow(image.cpu(), cmap="gray_r", vmin=0, vmax=1, extent=extent)
    axes.add_patch(Rectangle((left, top), 28, 28, fill=False, edgecolor=color, linewidth=2))
