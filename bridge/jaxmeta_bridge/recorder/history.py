"""Which lines of a script made compiled programs run, and how often."""

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from jaxmeta_bridge.location import locate


@dataclass
class Runs:
    """Runs that one line asked for, in one way.

    Attributes:
      cause: the function that the line called.
      source: file, line number and text of the line.
      count: how many runs.
      compiled: how many of them were the first of their program.
      program: the latest one.
    """

    cause: str
    source: str
    count: int = 0
    compiled: int = 0
    program: Any = None


# By cause and line; the lines of an endless interactive session do not pile up.
RUNS: dict[tuple[str, str], Runs] = {}
LONGEST = 256


def note_run(program: Any, first: bool) -> None:
    """Adds a run, with the line of the user that it is for.

    Args:
      program: what runs.
      first: whether it has just been made, and is compiled now.
    """
    key = _cause(), locate({}).source
    runs = RUNS.get(key)
    if runs is None:
        if len(RUNS) >= LONGEST:
            del RUNS[next(iter(RUNS))]
        runs = RUNS[key] = Runs(*key)
    runs.count += 1
    runs.compiled += first
    runs.program = program


def _cause() -> str:
    """The name of the library function that the user's line called."""
    frame: FrameType | None = sys._getframe(2)
    name = ""
    while frame is not None and frame.f_globals.get("__name__", "").startswith(_LIBRARIES):
        code = frame.f_code
        if code.co_name == "__torch_function__":
            function = frame.f_locals["func"]
            # Of an attribute, such as `grad`, it is the `__get__`.
            owner = function.__self__ if function.__name__ == "__get__" else function
            name = getattr(owner, "__name__", "data")  # `data` is a property by then
        elif code.co_name not in _WRAPPERS:
            name = code.co_name
        frame = frame.f_back
    return name


_LIBRARIES = ("jaxmeta_bridge.", "torch.")
_WRAPPERS = {"wrapper", "decorate_context", "_use_grad"}  # of torch's decorators
