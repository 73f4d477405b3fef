"""The worked example runs, and what it leaves behind is what it says."""

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TIMEOUT = 300


def start_demo(out: Path, *options: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), str(ROOT / "bridge"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "maml_digits.py", "--quick", "--out", str(out), *options],
        cwd=EXAMPLES,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def adapted_predictions(model: torch.nn.Module, lrs: torch.Tensor, task: Any) -> torch.Tensor:
    """The inner loop written in plain torch."""
    params: dict[str, torch.Tensor] = dict(model.named_parameters())
    for lr in lrs:
        logits = torch.func.functional_call(model, params, (task.support_images,))
        loss = F.cross_entropy(logits, task.support_labels)
        gradients = torch.autograd.grad(loss, list(params.values()))
        params = {
            name: (value - lr * gradient).detach().requires_grad_()
            for (name, value), gradient in zip(params.items(), gradients, strict=True)
        }
    return torch.func.functional_call(model, params, (task.query_images,)).argmax(-1)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("maml_digits")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The directory and the output of a finished run."""
    out = tmp_path_factory.mktemp("demo")
    process = start_demo(out)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    return out, output


def test_metrics(finished: tuple[Path, str]):
    out, output = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert not metrics["interrupted"]
    assert len(metrics["history"]["loss"]) == metrics["config"]["iterations"]
    assert len(metrics["inner_lr"]["after"]) == metrics["config"]["inner_steps"]
    assert {"jax", "torch", "optax"} <= set(metrics["versions"])
    assert metrics["peak_rss_mb"] > 100
    assert metrics["seconds"]["total"] > 0
    for name in ("nearest_neighbour", "before", "after"):
        result = metrics["results"][name]
        assert result["tasks"] >= metrics["config"]["eval_tasks"]
        assert f"{result['mean']:.3f} ± {result['ci95']:.3f}" in output


def test_output_without_a_terminal_has_no_control_characters(finished: tuple[Path, str]):
    assert not set("\r\x1b\b") & set(finished[1])


def test_figure(finished: tuple[Path, str]):
    assert (finished[0] / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_weights_load_into_the_module_and_reproduce_the_accuracy(
    finished: tuple[Path, str], example: ModuleType
):
    out, _ = finished
    metrics = json.loads((out / "metrics.json").read_text())
    config = metrics["config"]
    weights = torch.load(out / "weights.pt", weights_only=True)
    model = example.conv_net(config["channels"], config["ways"])
    model.load_state_dict(weights["model"])

    shape = (config["ways"], config["shots"], config["queries"])
    sampler = example.TaskSampler(example.load_images(), example.UNSEEN_CLASSES, shape)
    correct = []
    for tasks in sampler.batches(config["eval_tasks"], config["tasks"], config["seed"] + 1000):
        for task in tasks.split():
            predicted = adapted_predictions(model, weights["log_lrs"].exp(), task)
            correct.append((predicted == task.query_labels).float().mean().item())
    accuracy = sum(correct) / len(correct)
    # A query on the border between two classes may fall either way.
    assert accuracy == pytest.approx(metrics["results"]["after"]["mean"], abs=0.01)


def test_ctrl_c_leaves_a_usable_result(tmp_path: Path):
    process = start_demo(tmp_path, "--iterations", "1000000")
    assert process.stdout is not None
    for line in process.stdout:
        if "meta-gradient" in line:  # compiled: training begins
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["interrupted"]
    assert metrics["results"]["after"]["tasks"] < metrics["config"]["eval_tasks"]
    assert (tmp_path / "figure.png").exists()
    assert (tmp_path / "weights.pt").exists()


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--ways", "17", "--ways is 17; expected 2 to 16"),
        ("--inner-steps", "0", "--inner-steps is 0; expected 1 or more"),
        ("--queries", "500", "the 500 images of a class"),
        ("--device", "tpu", "invalid choice: 'tpu'"),
    ],
)
def test_options_out_of_range_are_refused(
    option: str,
    value: str,
    message: str,
    example: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(sys, "argv", ["maml_digits.py", "--quick", option, value])
    with pytest.raises(SystemExit):
        example.parse_arguments()
    assert message in capsys.readouterr().err


def test_a_missing_gpu_is_named(example: ModuleType):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--device gpu"):
        example.find_device("gpu")
