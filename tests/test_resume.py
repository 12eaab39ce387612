"""10 steps equal 5 + resume + 5, bit for bit, for every script; Ctrl-C saves and says how to go on."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL_AE, SMALL_LM, World, run_script

from ae import train_ae
from student import baseline, train_student

SCRIPTS = {"ae": train_ae, "token_model": baseline, "student": train_student}


def flags_of(name: str, world: World) -> list[Any]:
    own = {
        "ae": SMALL_AE,
        "token_model": [*SMALL_LM, "--k", 4],
        "student": [*SMALL_LM, "--ae_ckpt", world.ae, "--mse_w", 0.1, "--base_w", 0.1],
    }
    return [*own[name], "--log_every", 1]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / f"{name}.pt", weights_only=True)["state"]


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"]) for m in lines if "loss" in m]


@pytest.mark.parametrize("name", SCRIPTS)
def test_ten_steps_are_five_and_five(name: str, world: World, tmp_path: Path) -> None:
    flags = flags_of(name, world)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_script(SCRIPTS[name], *world.train_flags(whole), *flags, "--max_steps", 10) == 0
    assert run_script(SCRIPTS[name], *world.train_flags(parts), *flags, "--max_steps", 5) == 0
    five = weights(parts, name)
    assert run_script(SCRIPTS[name], *world.train_flags(parts), *flags, "--max_steps", 10, "--resume") == 0
    one, two = weights(whole, name), weights(parts, name)
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not all(torch.equal(one[key], five[key]) for key in one)
    assert losses(whole) == losses(parts) and [step for step, _ in losses(whole)] == list(range(1, 11))


def test_resume_refuses_another_model_and_no_state(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*world.train_flags(tmp_path), *flags_of("ae", world)]
    assert run_script(train_ae, *flags, "--max_steps", 1, "--resume") == 2
    assert "ae.state.pt does not exist" in capsys.readouterr().err
    assert run_script(train_ae, *flags, "--max_steps", 1) == 0
    assert run_script(train_ae, *flags, "--max_steps", 2, "--resume", "--latent_dim", 24) == 2
    assert "another model (different latent_dim)" in capsys.readouterr().err
    assert run_script(train_ae, *flags, "--max_steps", 2, "--resume", "--lr", 0.5) == 0
    assert "another run than the one that was saved: lr 0.001 -> 0.5" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_before_the_update(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*world.train_flags(tmp_path), *flags_of("ae", world)]
    assert run_script(train_ae, *flags, "--max_steps", 2) == 0
    before = weights(tmp_path, "ae")
    true_loss = train_ae.ae_loss
    monkeypatch.setattr(
        train_ae, "ae_loss", lambda *a, **k: tuple(x * float("nan") if i == 0 else x for i, x in enumerate(true_loss(*a, **k)))
    )
    assert run_script(train_ae, *flags, "--max_steps", 4, "--resume") == 2
    assert "the loss is nan" in capsys.readouterr().err
    assert all(torch.equal(before[key], value) for key, value in weights(tmp_path, "ae").items())


def test_interrupt_saves_and_the_printed_command_goes_on(world: World, tmp_path: Path) -> None:
    flags = [*world.train_flags(tmp_path / "cut"), *map(str, flags_of("ae", world))]
    command = [sys.executable, "ae/train_ae.py", *flags, "--max_steps", "4000"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    metrics = tmp_path / "cut/run/metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "Traceback" not in error
    done = int(re.search(r"stopped at step (\d+) of 4000", error).group(1))  # type: ignore[union-attr]
    go_on = shlex.split(re.search(r"Go on with: (.*)", error).group(1))  # type: ignore[union-attr]
    assert go_on[:2] == ["python", "ae/train_ae.py"] and go_on[-1] == "--resume"
    steps = done + 3
    assert run_script(train_ae, *go_on[2:], "--max_steps", steps) == 0
    assert run_script(train_ae, *world.train_flags(tmp_path / "whole"), *flags_of("ae", world), "--max_steps", steps) == 0
    one, two = weights(tmp_path / "cut", "ae"), weights(tmp_path / "whole", "ae")
    assert all(torch.equal(one[key], two[key]) for key in one)
