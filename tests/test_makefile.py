"""Every target is listed with a line, and `make clean` leaves what is not ours alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make(*arguments: str, cwd: Path) -> str:
    """What a shell's make prints: not that of the `make test VENV=...` that may run us, whose variables are inherited."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE") and key != "VENV"}
    return subprocess.run(["make", *arguments], cwd=cwd, capture_output=True, text=True, check=True, env=environment).stdout


def test_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"^\.PHONY: (.*)$", text, re.M).group(1).split())  # type: ignore[union-attr]
    listed = dict(re.findall(r"^  ([a-z-]+) +(\S.*)$", make("help", cwd=ROOT), re.M))
    assert phony <= set(listed)
    assert phony == set(re.findall(r"^([a-z-]+):", text, re.M))


def test_where_trainings_write_and_what_seed_they_have(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "v").mkdir()
    for name in ("requirements.txt", "pyproject.toml", "v/installed"):
        (tmp_path / name).touch()
    said = make("-n", "train-student", "VENV=v", "STUDENT_CKPT=k4/student.pt", cwd=tmp_path)
    assert '--checkpoint_dir "k4/"' in said and "--seed" not in said  # the config's
    assert "--seed 3" in make("-n", "train-ae", "VENV=v", "SEED=3", cwd=tmp_path)
    for target, name in (("train-student", "STUDENT_CKPT=k4/student_k4.pt"), ("train-ae", "AE_CKPT=ae4.pt")):
        with pytest.raises(subprocess.CalledProcessError) as error:
            make("-n", target, "VENV=v", name, cwd=tmp_path)
        assert f"{name}: expected a path that ends in /" in error.value.stderr


def test_clean_leaves_the_users_files(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    theirs = [".env", "data/mine.jsonl", "data/teacher/model.sqlite", "checkpoints/ae.pt", "runs/student/metrics.jsonl"]
    theirs.append("elsewhere/bin/python")  # an environment of their own, used as VENV=elsewhere
    ours = ["runs/demo/report.md", "runs/demo-quick/report.md", ".venv/installed", "ae/__pycache__/x.pyc", ".mypy_cache/x"]
    for name in [*theirs, *ours]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    make("clean", "VENV=elsewhere", cwd=tmp_path)
    assert [name for name in theirs if not (tmp_path / name).exists()] == []
    assert [name for name in ours if (tmp_path / name).exists()] == []
