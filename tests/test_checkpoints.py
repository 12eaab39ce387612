"""Checkpoints are replaced whole or not at all, and what is no checkpoint of ours is refused in one line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, World, run_script

import infer
from ae import train_ae
from ae.ae_model import load_ae
from configs.errors import UserError
from configs.run import FORMAT, VERSION, load_checkpoint, save_checkpoint
from student import train_student
from student.baseline import load_token_model
from student.student_model import load_student
from tools import evaluate


def edited(source: Path, target: Path, **changes: Any) -> Path:
    torch.save({**torch.load(source, weights_only=True), **changes}, target)
    return target


def test_round_trip(tmp_path: Path) -> None:
    content = {"config": {"a": 1}, "state": {"w": torch.randn(3)}}
    save_checkpoint(tmp_path / "new" / "ae.pt", "ae", content)
    back = load_checkpoint(tmp_path / "new" / "ae.pt", "ae")
    assert (back["format"], back["version"], back["config"]) == (FORMAT, VERSION, {"a": 1})
    assert torch.equal(back["state"]["w"], content["state"]["w"])
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["ae.pt"]


def test_what_is_refused(world: World, tmp_path: Path) -> None:
    whole = world.ae.read_bytes()
    cases = {
        "missing": (None, "does not exist; train one with ae/train_ae.py"),
        "empty": (b"", "damaged or no PyTorch file"),
        "truncated": (whole[: len(whole) // 2], "damaged or no PyTorch file"),
        "text": (b"not a checkpoint\n" * 100, "damaged or no PyTorch file"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_ae(tmp_path / name)
    torch.save({"w": torch.zeros(2)}, tmp_path / "foreign")
    torch.save([1, 2], tmp_path / "list")
    for name in ("foreign", "list"):
        with pytest.raises(UserError, match="no checkpoint of this project"):
            load_ae(tmp_path / name)
    with pytest.raises(UserError, match="kind 'ae', expected 'student'"):
        load_student(world.ae)
    with pytest.raises(UserError, match="kind 'student', expected 'token_model'"):
        load_token_model(world.student)
    with pytest.raises(UserError, match=f"format version {VERSION + 1}"):
        load_ae(edited(world.ae, tmp_path / "future", version=VERSION + 1))
    state = torch.load(world.ae, weights_only=True)["state"]
    state.pop("embedding.weight")
    with pytest.raises(UserError, match="do not fit its config"):
        load_ae(edited(world.ae, tmp_path / "lacking", state=state))


def test_pickles_are_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": FORMAT, "kind": "ae", "version": VERSION, "state": Trap()}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="damaged"):
        load_ae(tmp_path / "ae.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ae.pt"
    save_checkpoint(path, "ae", {"state": {"w": torch.zeros(4)}})
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*saved before is intact") as error:
        save_checkpoint(path, "ae", {"state": {"w": torch.ones(4)}})
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["ae.pt"]


def test_a_file_that_may_not_grow_ends_training_in_one_line(world: World, tmp_path: Path) -> None:
    """The real thing: a process whose files may not exceed 64 KiB trains, and its checkpoint does not fit."""
    code = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "from configs.errors import run_cli\nfrom ae import train_ae\nrun_cli(train_ae.main)"
    )
    flags = [
        *world.train_flags(tmp_path),
        "--k",
        "4",
        "--latent_dim",
        "64",
        "--embed_dim",
        "64",
        "--batch_size",
        "8",
        "--max_steps",
        "1",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "cannot write checkpoint" in lines[0] and "there was none before" in lines[0]
    assert "Traceback" not in done.stderr
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.is_file()]


def test_another_tokenizer_is_refused(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {**torch.load(world.ae, weights_only=True)["tokenizer"], "fingerprint": "0" * 32}
    foreign = edited(world.ae, world.ae.parent / "foreign.pt", tokenizer=record)
    flags = world.train_flags(tmp_path)
    assert run_script(train_student, *flags, "--ae_ckpt", foreign) == 2
    assert "another tokenizer (000000000000)" in capsys.readouterr().err
    assert run_script(evaluate, "--ae", foreign, "--data", world.data) == 2
    assert "another tokenizer" in capsys.readouterr().err
    assert run_script(infer, "--student", world.student, "--ae", foreign, "--prompt", "x") == 2
    assert "another tokenizer" in capsys.readouterr().err
    student = edited(world.student, world.student.parent / "foreign_student.pt", tokenizer=record)
    assert run_script(infer, "--student", student, "--prompt", "x") == 2
    assert "another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "value"), [("--k", 8), ("--latent_dim", 32)])
def test_shapes_that_disagree_with_the_ae(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, value: int
) -> None:
    assert run_script(train_student, *world.train_flags(tmp_path), "--ae_ckpt", world.ae, flag, value) == 2
    assert f"{flag} {value} disagrees with {world.ae}" in capsys.readouterr().err
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "run").exists()


def test_a_bad_start_overwrites_nothing(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = world.ae.read_bytes()
    for flags in (
        ["--num_layers", 3],
        ["--lr", "fast"],
        ["--batch_size", -1],
        ["--set", "latent=3"],
        ["--config", "/nowhere"],
        ["--device", "abacus"],
    ):
        assert run_script(train_ae, *world.train_flags(), *flags) == 2
        error = capsys.readouterr().err
        assert error.count("error:") == 1 and "Traceback" not in error, error
    assert world.ae.read_bytes() == before
