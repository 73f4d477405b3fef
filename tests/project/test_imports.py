"""What an import does to the rest of the process: nothing."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(code: str) -> None:
    """Run code in a Python of its own, where nothing has been imported or set yet."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "bridge")])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_jaxmeta_does_not_import_torch():
    run("import sys, jaxmeta; assert 'torch' not in sys.modules")


def test_importing_changes_no_settings():
    run("""
import os, random, warnings
import jax, numpy, torch

def settings():
    return {
        "jax": dict(jax.config.values),
        "numpy": (numpy.geterr(), numpy.get_printoptions()),
        "torch dtype": torch.get_default_dtype(),
        "torch device": torch.get_default_device(),
        "torch private backend": torch._C._get_privateuse1_backend_name(),
        "torch deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch attention": torch.backends.mha.get_fastpath_enabled(),
        "torch grad": torch.is_grad_enabled(),
        "torch threads": torch.get_num_threads(),
        "torch seed": torch.initial_seed(),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": repr(numpy.random.get_state()),
        "python random": random.getstate(),
        "warnings": list(warnings.filters),
        "environment": dict(os.environ),
    }

before = settings()
import jaxmeta, jaxmeta_bridge
after = settings()
changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
assert not changed, changed
""")
