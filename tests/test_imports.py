"""Imports point one way: configs <- ae, kd (never each other) <- student <- programs and tools."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "configs": {"configs"},
    "ae": {"configs", "ae"},
    "kd": {"configs", "kd"},
    "student": {"configs", "ae", "student"},
    "tools": {"configs", "ae", "student", "kd", "tools"},
    "web": {"configs", "ae", "student", "web"},
}
# What joins two packages: scripts, and what the trainers read teachers with.
PROGRAMS = {
    "student/distillation.py": {"kd"},
    "kd/harvest.py": {"ae"},
    "kd/prompts.py": {"ae"},
    "kd/kd_batcher.py": {"ae"},
    "kd/local_teacher.py": {"ae"},
}
MODULES = sorted(path for folder in ALLOWED for path in (ROOT / folder).glob("*.py"))
PROJECT = {*ALLOWED, "infer", "server", "bench"}


def imported(path: Path) -> set[str]:
    """Top-level names of the project's own modules that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names & PROJECT


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_direction(path: Path) -> None:
    assert imported(path) <= ALLOWED[path.parent.name] | PROGRAMS.get(f"{path.parent.name}/{path.name}", set())


def test_models_and_losses_know_no_training_loop() -> None:
    for name in (
        "ae/layers.py",
        "ae/ae_model.py",
        "ae/losses.py",
        "student/student_model.py",
        "student/local_decoder.py",
        "student/losses.py",
    ):
        assert "configs.loop" not in (ROOT / name).read_text(encoding="utf-8"), name
