"""The order in which binomial checkpointing computes, keeps and reverses the steps of a loop."""

import functools
import math
from typing import NamedTuple

import numpy as np


class Schedule(NamedTuple):
    """What to do, as tables that a compiled loop reads.

    States are kept in numbered slots; slot 0 has the first one throughout. The forward pass fills
    others on its way. Then for each row, the state in ``start`` is taken, advanced as
    ``advances[begin:end]`` say, and ``step`` is reversed there.

    Attributes:
        first: int[T], the slot for the state before each step of the forward pass, or -1.
        rows: int[T, 4], ``(step, start, begin, end)``, the last step first.
        advances: int[n, 2], ``(step, slot for the state after it, or -1)``.
    """

    first: np.ndarray
    rows: np.ndarray
    advances: np.ndarray


@functools.lru_cache(maxsize=64)
def binomial_schedule(length: int, checkpoints: int) -> Schedule:
    """Return the schedule that advances least often.

    Args:
        length: T, at least 1.
        checkpoints: how many states may be kept beside the first.
    """
    first, rows, advances = np.full(length, -1), [], []
    # Stretches of steps yet to be reversed, the next one last: first step, how many, its slot.
    todo = [(0, length, 0)]
    while todo:
        base, steps, slot = todo.pop()
        start, begin = slot, len(advances)
        while steps > 1 and slot < checkpoints:
            ahead = _ahead(steps, checkpoints - slot)
            todo.append((base, ahead, slot))
            base, steps, slot = base + ahead, steps - ahead, slot + 1
            if rows:
                advances += [(step, -1) for step in range(base - ahead, base - 1)]
                advances.append((base - 1, slot))
            else:  # the forward pass comes by
                first[base] = start = slot
        if steps > 1:
            todo.append((base, steps - 1, slot))
        advances += [(step, -1) for step in range(base, base + steps - 1)]
        rows.append((base + steps - 1, start, begin, len(advances)))
    # One row at least, as a loop that never reads the table still has to be traced.
    table = np.asarray(advances or [(0, -1)], np.int32)
    return Schedule(first.astype(np.int32), np.asarray(rows, np.int32), table)


def _ahead(steps: int, free: int) -> int:
    """Return where to keep the next state, of so many steps, with so many slots free.

    With the state at the start, ``s = free + 1`` are kept, and ``r`` advances of each step cover
    ``binomial(s + r, s)`` steps; both parts are to be covered with as few as possible.
    """
    s, r = free + 1, 1
    while math.comb(s + r, s) < steps:
        r += 1
    return min(math.comb(s + r - 1, s), steps - math.comb(s + r - 2, s - 1))


def fewest_advances(length: int, checkpoints: int) -> int:
    """Return how many steps the schedule advances by, the first pass up to its last state included.

    Args:
        length: T, at least 1.
        checkpoints: how many states may be kept beside the first.
    """
    s, r = checkpoints + 1, 0
    while math.comb(s + r, s) < length:
        r += 1
    return r * length - math.comb(s + r, s + 1)
