"""The scripts as a shell runs them: what they print where, and one line with exit code 2 for what a user can cause."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, World, run_script

import infer
from tools import evaluate, plot


def shell(*command: Any, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300)


def test_scripts_run_as_written_from_the_root() -> None:
    """`python ae/train_ae.py` finds the other packages through the editable install, with no path set."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "ae/train_ae.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_infer(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ae", world.ae, "--student", world.student, "--prompt", "def f(", "--max_new_tokens", 10, "--seed", 3]
    plain = shell("infer.py", *flags)
    assert plain.returncode == 0, plain.stderr
    assert "3 latent steps, 10 tokens" in plain.stderr and "tokens/s" in plain.stderr
    for flag, expected in (("--stream", plain.stdout), ("--echo", "def f(" + plain.stdout)):
        assert run_script(infer, *flags, flag) == 0 and capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 500], "the model's context is 32 tokens (room for a prompt of 24"),
        (["--prompt", "x", "--max_new_tokens", 40], "40 new ones were asked for"),
        (["--prompt", "x", "--top_p", 0], "top_p: expected more than 0"),
        (["--prompt", "x", "--student", "/nowhere.pt"], "/nowhere.pt does not exist"),
        (["--prompt", "x", "--device", "cuda:7"], "--device cuda:7 cannot be used"),
        (["--prompt", "x", "--int8"], "--int8 belongs to the fast path; add --compile"),
        (["--prompt", "x", "--words", 64], "--words belongs to the fast path; add --compile"),
        (["--prompt", "x", "--rank", 64], "--rank belongs to the vocabulary screen; add --compile --words N"),
        (["--prompt", "x", "--rank", 8, "--compile"], "--rank belongs to the vocabulary screen"),
    ],
)
def test_infer_with_bad_input(world: World, capsys: pytest.CaptureFixture[str], flags: list[Any], message: str) -> None:
    assert run_script(infer, "--student", world.student, "--max_new_tokens", 8, *flags) == 2
    out, error = capsys.readouterr()
    assert out == "" and message in error and error.count("\n") == 1


def test_a_prompt_from_standard_input(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is UTF-8 whatever the locale says, and what is not is told before the model is loaded."""
    for raw, locale, code in (("é\n".encode(), "ascii", 0), (b"caf\xe9\n", "utf-8", 2)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding=locale))
        student = "/nowhere.pt" if code else world.student
        assert run_script(infer, "--student", student, "--prompt", "-", "--max_new_tokens", 4, "--echo") == code
        out, error = capsys.readouterr()
        assert out.startswith("é\n") if not code else "expected UTF-8 on standard input, got byte 0xe9" in error


def test_a_long_prompt_is_cut_when_asked(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--student", world.student, "--max_new_tokens", 8, "--prompt", "x" * 500, "--truncate_prompt"]
    assert run_script(infer, *flags) == 0
    assert "the prompt's last 24 of " in capsys.readouterr().err


def test_evaluate(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--ae", world.ae, "--student", world.student, "--baseline", world.token_model, "--data", world.data]
    assert run_script(evaluate, *flags, "--output", tmp_path / "e.json", "--max_windows", 20) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "e.json").read_text())
    assert {"chunk_exact", "token_exact", "noisy_chunk_exact"} <= set(result["ae"])
    assert result["ae"]["chunks"] == 20 * 32 / 4
    for name in ("token_model", "student"):
        figures = result[name]
        assert len(figures["nll_by_position"]) == 4
        assert sum(figures["nll_by_position"]) / 4 == pytest.approx(figures["nats_per_token"], rel=1e-5)
        assert 0 <= figures["brier_lm"] < 100 and 0 <= figures["brier_lm_all"] < 100
        assert figures["tokens"] == 20 * 28  # windows of 32 less the first chunk
    assert "latent_swap_cost" in result["student"] and "latent_swap_cost" not in result["token_model"]
    assert "bits per byte" in out


def test_evaluate_says_what_cannot_be_compared(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(evaluate, "--data", world.data) == 2
    assert "nothing to evaluate" in capsys.readouterr().err
    assert run_script(evaluate, "--ae", world.ae, "--data", "/nowhere") == 2
    assert "no packed data in /nowhere" in capsys.readouterr().err


def test_bench(world: World, tmp_path: Path) -> None:
    flags = [
        "--student",
        world.student,
        "--baseline",
        world.token_model,
        "--max_new_tokens",
        10,
        "--prompts",
        "a",
        "if x:",
        "--repeats",
        1,
    ]
    done = shell("bench.py", *flags, "--output", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "b.json").read_text())
    assert result["token_model"]["backbone_steps"] == 10 and result["student"]["backbone_steps"] == 3
    for name in ("token_model", "student"):
        assert {"backbone_steps", "tokens", "tokens_per_s", "ttft_s", "peak_mb"} <= set(result[name])
        assert result[name]["peak_mb"] > 50 and result[name]["ttft_s"] > 0
    assert "backbone steps" in done.stdout


def test_plot(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(plot, world.root / "run", "--output", tmp_path / "p.png") == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    copy = shutil.copytree(world.root / "run", tmp_path / "other" / "run")
    (copy / "metrics.jsonl").write_text((copy / "metrics.jsonl").read_text().replace('"ce": ', '"ce": 1'))
    assert run_script(plot, world.root / "run", copy, "--output", tmp_path / "two.png") == 0  # of one name, and both drawn
    assert run_script(plot, copy, "--output", tmp_path / "one.png") == 0
    assert (tmp_path / "two.png").read_bytes() != (tmp_path / "one.png").read_bytes()
    for flags, said in (
        (("--key", "nonsense"), "has no 'nonsense' to draw: expected one of"),
        (("--output", tmp_path / "p.xyz"), "ends in one of"),
        (("--output", tmp_path), "ends in one of"),
    ):
        assert run_script(plot, world.root / "run", *flags) == 2
        assert said in capsys.readouterr().err
    assert run_script(plot, tmp_path) == 2
    assert "no run in" in capsys.readouterr().err
    assert run_script(plot, world.root / "run", "--output", tmp_path / "nowhere" / "p.png") == 2
    error = capsys.readouterr().err
    assert "nowhere/p.png: No such file or directory" in error and error.count("\n") == 1
