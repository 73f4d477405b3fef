"""Imports go downward only; files and functions stay short enough to read."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("jaxmeta/**/*.py"), *ROOT.glob("bridge/**/*.py")])
USERS = sorted([*ROOT.glob("examples/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])


def where(file: Path) -> str:
    return str(file.relative_to(ROOT))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"), where(file))


def test_imports_keep_to_the_floors():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "bridge")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", USERS, ids=where)
def test_scripts_use_the_doors_only(file: Path):
    imported = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    inside = {m for m in imported if m.startswith(("jaxmeta.", "jaxmeta_bridge."))}
    assert not inside


@pytest.mark.parametrize("file", SOURCES, ids=where)
def test_files_and_functions_are_short(file: Path):
    assert len(file.read_text("utf-8").splitlines()) < 400
    long = {
        node.name: lines
        for node in ast.walk(parse(file))
        if isinstance(node, ast.FunctionDef) and (lines := code_lines(node)) > 60
    }
    assert not long


def code_lines(function: ast.FunctionDef) -> int:
    """Lines from the first statement after the docstring to the end."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
