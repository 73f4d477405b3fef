"""Finds the user's own line and the submodule that called the running torch operation."""

import linecache
import os
import sys
from types import CodeType, FrameType

import torch

from jaxmeta_bridge.program import Location

_MODULE_CALL: CodeType = torch.nn.Module._call_impl.__code__
_SITE = os.path.dirname(os.path.dirname(torch.__file__))
# Frames of these packages are never the user's line.
_LIBRARIES = tuple(
    os.path.join(root, name) + os.sep
    for root, names in (
        (_SITE, ("torch", "jax", "optax", "flax")),
        (os.path.dirname(os.path.dirname(__file__)), ("jaxmeta_bridge",)),
    )
    for name in names
)


def locate(module_names: dict[int, str]) -> Location:
    """The innermost frame outside the libraries, and the innermost module being called.

    Args:
      module_names: the path of each submodule of the traced module, by `id`.
    """
    module, source = "", ""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (module and source):
        if not module and frame.f_code is _MODULE_CALL:
            module = module_names.get(id(frame.f_locals["self"]), "")
        elif not source and not frame.f_code.co_filename.startswith((*_LIBRARIES, "<frozen")):
            source = _describe(frame)
        frame = frame.f_back
    return Location(module, source)


def _describe(frame: FrameType) -> str:
    filename, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(filename, line).strip()
    return f"{filename}:{line}" + (f": {text}" if text else "")
