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


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder whose make takes its environment for installed."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "v").mkdir()
    for name in ("requirements.txt", "pyproject.toml", "v/installed"):
        (tmp_path / name).touch()
    return tmp_path


def test_where_trainings_write_and_what_seed_they_have(root: Path) -> None:
    said = make("-n", "train-student", "VENV=v", "STUDENT_CKPT=k4/student.pt", cwd=root)
    assert '--checkpoint_dir "k4/"' in said and "--seed" not in said  # the config's
    assert "--seed 3" in make("-n", "train-ae", "VENV=v", "SEED=3", cwd=root)
    for target, name in (("train-student", "STUDENT_CKPT=k4/student_k4.pt"), ("train-ae", "AE_CKPT=ae4.pt")):
        with pytest.raises(subprocess.CalledProcessError) as error:
            make("-n", target, "VENV=v", name, cwd=root)
        assert f"{name}: expected a path that ends in /" in error.value.stderr


def test_switches_can_be_switched_off(root: Path) -> None:
    for value, on in (("1", True), ("0", False), ("no", False), ("", False)):
        said = make(
            "-n",
            "train-student",
            "train-token-model",
            "demo",
            "VENV=v",
            *(f"{x}={value}" for x in ("USE_KD", "RESUME", "QUICK")),
            cwd=root,
        )
        assert [said.count(flag) for flag in (" --use_kd", " --resume", " --quick")] == ([2, 2, 1] if on else [0, 0, 0])


def test_paths_with_spaces_stay_whole(root: Path) -> None:
    assert '--checkpoint_dir "my dir/k 4/"' in make("-n", "train-ae", "VENV=v", "CKPT_DIR=my dir/k 4", cwd=root)


def test_the_prompt_arrives_as_it_was_typed(root: Path) -> None:
    (root / "v" / "bin").mkdir()
    python = root / "v" / "bin" / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    for prompt in ("cost $5, $HOME and $(x)", "-x", 'say "a" # b'):
        assert f"--prompt={prompt}\n" in make("infer", "VENV=v", f"PROMPT={prompt}", cwd=root)
    assert "--prompt=import os\n" in make("infer", "VENV=v", cwd=root)


def test_the_temporary_folder_is_no_temperature(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMP", "/tmp")
    assert "--temperature 0.8" in make("-n", "infer", "VENV=v", cwd=root)
    assert "--temperature 0.3" in make("-n", "infer", "VENV=v", "TEMP=0.3", cwd=root)


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
