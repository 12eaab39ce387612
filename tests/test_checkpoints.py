"""Checkpoints are replaced whole or not at all, and what is no checkpoint of ours is refused in one line."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL_AE, SMALL_LM, World, run_script

import infer
from ae import train_ae
from ae.ae_model import load_ae
from ae.chunks import PackedData, PackedWriter
from configs import loop
from configs.errors import UserError
from configs.run import (
    FORMAT,
    VERSION,
    Damaged,
    load_checkpoint,
    load_state,
    remove_temporaries,
    save_checkpoint,
    saved_states,
    state_before,
)
from student import baseline, train_student
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


def test_a_flipped_bit_is_found_or_harmless(tmp_path: Path) -> None:
    """Each bit of the weights counts; of the archive's own fields those that nothing reads (times, padding) do not."""
    seed = random.SystemRandom().randrange(1 << 32)  # other bits in every run of the tests
    draw, path, w = random.Random(seed), tmp_path / "ae.pt", torch.randn(300)
    print("bits drawn with seed", seed)
    save_checkpoint(path, "ae", {"state": {"w": w}})
    whole = path.read_bytes()
    begins = whole.index(w.numpy().tobytes())
    refused = 0
    folder_bits = [(at + 38, 4) for at in range(len(whole)) if whole[at : at + 4] == b"PK\x01\x02"]  # makes a part a folder
    places = [*range(0, len(whole), 7), *range(begins, begins + 1200, 13), begins + 1199]
    for at, bit in [*folder_bits, *((at, draw.randrange(8)) for at in places)]:
        flipped = bytearray(whole)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            content = load_checkpoint(path, "ae")
        except Damaged:
            refused += 1
        else:
            assert not begins <= at < begins + 1200
            assert torch.equal(content["state"]["w"], w) and content["kind"] == "ae"
    assert refused > len(whole) / 7 / 2
    path.write_bytes(whole)
    assert torch.equal(load_checkpoint(path, "ae")["state"]["w"], w)


def test_a_flipped_bit_of_a_model_is_refused(world: World, tmp_path: Path) -> None:
    for source, load in ((world.ae, load_ae), (world.student, load_student), (world.token_model, load_token_model)):
        flipped = bytearray(source.read_bytes())
        flipped[len(flipped) // 2] ^= 16
        (tmp_path / source.name).write_bytes(flipped)
        with pytest.raises(UserError, match=rf"{source.name} is damaged .*wrong checksum or attributes of .*; write it again"):
            load(tmp_path / source.name)


def test_a_kill_at_any_instant_leaves_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of a save that the disk sees is the last one once, before and after it is made."""

    class Killed(BaseException):
        pass

    path, log = tmp_path / "ae.state.pt", []
    calls = [(os, "fsync"), (os, "open"), (os, "close"), (Path, "replace"), (torch, "save")]
    left, steps_seen = 0, set()

    def deadly(true: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            for now in (lambda: None, lambda: true(*args, **kwargs)):
                out = now()
                left -= 1
                if left < 0:
                    raise Killed
            return out

        return call

    for last in range(100):
        for old in tmp_path.iterdir():
            old.unlink()
        for step in (1, 2):
            save_checkpoint(path, "ae.state", {"step": step}, state_before(path))
        left = last
        with monkeypatch.context() as patch:
            for owner, call in calls:
                patch.setattr(owner, call, deadly(getattr(owner, call)))
            try:
                save_checkpoint(path, "ae.state", {"step": 3}, state_before(path))
            except Killed:
                pass
            else:
                break
        remove_temporaries(tmp_path, "ae")
        assert {p.name for p in tmp_path.iterdir()} <= {"ae.state.pt", "ae.state.prev.pt"}
        steps_seen.add(load_state(path, "ae.state", log.append)["step"])
        assert path.is_file()
    else:
        raise AssertionError("no save went through")
    assert last >= 14 and steps_seen == {2, 3} and any("ae.state.pt is missing" in line for line in log)


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path: Path) -> None:
    path, log = tmp_path / "ae.state.pt", []
    with pytest.raises(UserError, match=r"ae.state.pt does not exist.*train without --resume"):
        load_state(path, "ae.state", log.append)
    for step in (1, 2, 3):
        save_checkpoint(path, "ae.state", {"step": step}, state_before(path))
    assert load_state(path, "ae.state", log.append)["step"] == 3 and not log
    path.write_bytes(path.read_bytes()[:-40])
    assert load_state(path, "ae.state", log.append)["step"] == 2
    assert len(log) == 1 and "ae.state.pt is damaged" in log[0] and log[0].endswith("the save before it, step 2")
    assert saved_states(path) == [path] and load_checkpoint(path, "ae.state")["step"] == 2
    save_checkpoint(path, "ae.state", {"step": 3}, state_before(path))
    for state in saved_states(path):
        state.write_bytes(b"")
    with pytest.raises(UserError, match=r"ae.state.pt and .*ae.state.prev.pt: damaged.*train without --resume"):
        load_state(path, "ae.state", log.append)


def test_a_state_that_cannot_be_read_does_not_give_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says that it is damaged: the disk, or the rights to the file, may be."""
    path = tmp_path / "ae.state.pt"
    for step in (1, 2):
        save_checkpoint(path, "ae.state", {"step": step}, state_before(path))

    def unreadable(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"cannot be read \(Input/output error\); it may be sound"),
    ):
        patch.setattr(torch, "load", unreadable)
        load_state(path, "ae.state", lambda line: None)
    assert load_state(path, "ae.state", lambda line: None)["step"] == 2 and len(saved_states(path)) == 2


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


def test_a_disk_that_fills_up_later_keeps_the_last_save(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, but the first three saves fit; with space again, --resume ends as a run that never stopped."""
    command = [*world.train_flags(tmp_path), *SMALL_AE, "--max_steps", "5", "--save_every", "1"]
    checkpoints, (soft, hard) = tmp_path / "checkpoints", resource.getrlimit(resource.RLIMIT_FSIZE)
    true_rate = loop.learning_rate

    def rate(step: int, *rest: Any) -> float:
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
        return true_rate(step, *rest)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "learning_rate", rate)
            assert run_script(train_ae, *command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "File too large" in error and f"is intact: {checkpoints / 'ae.state.pt'}" in error
    files = {p.name for p in checkpoints.iterdir() if p.is_file()}
    assert files == {"ae.pt", "ae.state.pt", "ae.state.prev.pt"}
    assert load_checkpoint(checkpoints / "ae.state.pt", "ae.state")["step"] == 3
    (checkpoints / ".ae.state.pt.1.tmp").write_bytes(b"what a killed run left")
    assert run_script(train_ae, *command, "--resume") == 0
    assert run_script(train_ae, *command, *world.train_flags(tmp_path / "whole")) == 0
    one, two = (load_ae(folder / "checkpoints/ae.pt")[1]["state"] for folder in (tmp_path, tmp_path / "whole"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert {p.name for p in checkpoints.iterdir() if p.is_file()} == files


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


@pytest.mark.parametrize("script", [train_ae, baseline, train_student], ids=["ae", "token model", "student"])
def test_no_validation_text_is_told_before_training(
    script: ModuleType, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world.data, tmp_path / "packed")
    val = PackedData(world.data / "val")
    ids = {"eot_id": val.eot_id, "pad_id": val.pad_id}
    empty = PackedWriter(tmp_path / "packed" / "val", val.vocab_size)
    empty.close(tokenizer_fingerprint=val.fingerprint, tokenizer=val.tokenizer_path, **ids)
    flags = [*world.train_flags(tmp_path), "--data", tmp_path / "packed", "--max_steps", 1]
    shape = (
        SMALL_AE if script is train_ae else [*SMALL_LM, *(["--ae_ckpt", world.ae] if script is train_student else ["--k", 4])]
    )
    assert run_script(script, *flags, *shape) == 2
    assert f"val holds 0 tokens, less than one window of {4 if script is train_ae else 32}" in capsys.readouterr().err
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
