"""torch's own settings while a callable is traced, restored afterwards."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import torch

# Tracing changes these settings, and swaps a module's parameters, for a moment: one at a time.
TRACING = threading.RLock()


@contextlib.contextmanager
def tracing_settings() -> Iterator[None]:
    """Whatever the caller's modes: gradients are on, inference mode and autocast are off."""
    with (
        _without_questions(),
        quiet(),
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.enable_grad(),
    ):
        yield


@contextlib.contextmanager
def _without_questions() -> Iterator[None]:
    """Has torch and others ask for no values of tensors where they can do without.

    They can when torch is compiling. The transformer layers compare their mask with a causal one
    all the same, for a hint that nothing depends on; and in eval mode they call kernels that are no
    compositions.
    """
    compiler: Any = torch.compiler
    transformer: Any = torch.nn.modules.transformer
    mha = torch.backends.mha
    compiling, detect = compiler._is_compiling_flag, transformer._detect_is_causal_mask
    fused = mha.get_fastpath_enabled()
    compiler._is_compiling_flag = True
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: is_causal is True
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        compiler._is_compiling_flag = compiling
        transformer._detect_is_causal_mask = detect
        mha.set_fastpath_enabled(fused)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """torch logs a page about each error that user code raises on fake tensors, then raises it."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled
