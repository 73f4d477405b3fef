"""The worked example, a script for `higher` with one line changed, prints the known numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "higher_toy.py"
WEIGHTS = [-0.9915, -0.1217, 1.0145, 2.0640, 2.8668, 3.3908]


@pytest.fixture(scope="module")
def sections() -> list[str]:
    """What it prints: with `copy_initial_weights` False, and True."""
    paths = [str(ROOT), str(ROOT / "bridge"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.split("copy_initial_weights=")
    assert not first
    assert [section.split("\n")[0] for section in rest] == ["False", "True"]
    return rest


def numbers(section: str, title: str) -> list[float]:
    """The numbers of the line that begins so."""
    (line,) = [line for line in section.splitlines() if line.strip().startswith(title)]
    return [float(number) for number in re.findall(r"-?\d+\.\d+", line)]


@pytest.mark.parametrize("number", [0, 1], ids=["not copied", "copied"])
def test_numbers(sections: list[str], number: int):
    section = sections[number]
    assert numbers(section, "weights:") == WEIGHTS
    # All printed digits but the last, which is rounded.
    assert numbers(section, "meta-loss:") == pytest.approx([0.0119279879829], abs=1e-12)
    assert numbers(section, "gradient of lr:") == pytest.approx([-1.6295], abs=5e-5)
    assert numbers(section, "gradient of momentum:") == pytest.approx([-0.9496], abs=5e-5)


def test_gradient_of_the_weight(sections: list[str]):
    assert numbers(sections[0], "gradient of model's weight:") == [-0.005311]
    assert sections[1].rstrip().endswith("gradient of model's weight: None")


def test_only_the_import_differs_from_a_script_for_higher():
    imports = [line for line in SCRIPT.read_text("utf-8").splitlines() if "jaxmeta" in line]
    assert imports == ["from jaxmeta_bridge import higher"]
