"""Set-up for all tests. No torch here: the native tests also run where torch is not installed."""

import os
from collections.abc import Iterator
from importlib.metadata import version

import pytest

# Most of a run is compilation, and without optimisation that is about twice as fast. XLA ends the
# process at a flag it does not know; the last of these is gone from newer releases.
_FAST_COMPILES = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
if tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11):
    _FAST_COMPILES.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FAST_COMPILES]).strip()

import jax  # noqa: E402  (XLA reads its flags once)


@pytest.fixture
def x64() -> Iterator[None]:
    """float64 for the duration of one test; the process's own setting stays as it is."""
    with jax.enable_x64(True):
        yield


_TESTS_RUN = 0


@pytest.fixture(autouse=True)
def _few_programs_at_a_time() -> Iterator[None]:
    """Each compiled program takes a few memory mappings, of which Linux allows 65,530 a process.

    All tests together would need more, and XLA ends the process when it gets none.
    """
    global _TESTS_RUN
    yield
    _TESTS_RUN += 1
    if _TESTS_RUN % 200 == 0:
        jax.clear_caches()
