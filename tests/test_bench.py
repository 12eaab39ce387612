"""The race and the training benchmark, on models of a few thousand parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, World, make_student, make_token_model, run_script

import bench
from student import race, speed
from student.drawing import Int8, Screen, Vocabulary
from student.fast import FastSampler
from student.flops import generation_bytes
from student.static import StaticBackbone

COLUMNS = {
    "scale", "racer", "batch", "prompt_tokens", "tokens_per_s", "ms_per_step", "ttft_s", "peak_mb", "backbone_steps",
    "flops_per_token", "bytes_per_token", "bandwidth_share", "bits_per_byte", "ratio_to_compiled_token_model",
}  # fmt: skip


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path's own code, without the compiler's minutes; and little memory to measure the bandwidth with."""
    for module in ("fast", "fast_token"):
        monkeypatch.setattr(f"student.{module}.CompiledStep", lambda step, rows: step)
    small = race.bandwidth(torch.device("cpu"), 1 << 20)
    monkeypatch.setattr(race, "bandwidth", lambda device: small)


def test_the_race(uncompiled: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "race" / "race.json"
    flags = ["--race", "--scale", "tiny", "--batch", 1, 2, "--prompt_tokens", 9, "--max_new_tokens", 32, "--repeats", 1]
    flags += ["--words", 64, "--rank", 8, "--memory", "none", "--device", "cpu", "--output", output]
    assert run_script(bench, *flags) == 0
    result = json.loads(output.read_text())
    shown = capsys.readouterr().out
    assert json.loads(shown.splitlines()[-1]) == result and "untrained shapes: speed only" in shown
    rows = result["rows"]
    assert [(r["batch"], r["racer"]) for r in rows] == [(b, name) for b in (1, 2) for name in race.RACERS]
    for row in rows:
        assert set(row) >= COLUMNS and row["tokens_per_s"] > 0 and row["ttft_s"] > 0
        assert (row["bandwidth_share"] is not None) == (row["batch"] == 1)
        base = next(r for r in rows if (r["racer"], r["batch"]) == ("token-compiled", row["batch"]))
        assert row["ratio_to_compiled_token_model"] == pytest.approx(row["tokens_per_s"] / base["tokens_per_s"])
        step = 8 if row["racer"].startswith("student") else 1
        assert row["ms_per_step"] == pytest.approx(1000 * row["batch"] * step / row["tokens_per_s"])
    # 32 tokens: transformers and ours count the pass over the prompt; eagerly it also gives the first token or chunk
    steps = {row["racer"]: row["backbone_steps"] for row in rows if row["batch"] == 1}
    assert steps == {"token-eager": 32, "token-compiled": 33, "student-eager": 4, "student-compiled": 5}
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_calls_are_counted_by_a_hook() -> None:
    """A module called three times counts three, whatever its caller says."""
    module = torch.nn.Identity()
    assert race.count_calls(module, lambda: len([module(torch.zeros(1)) for _ in range(3)])) == (3, 3)
    module(torch.zeros(1))
    assert race.count_calls(module, lambda: 7) == (7, 0)


@pytest.mark.parametrize("prompt", [1, 9])
@pytest.mark.parametrize("name", ["token-compiled", "student-compiled"])
def test_backbone_steps_are_those_that_ran(name: str, prompt: int, uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a prompt of one token the token-level model has no pass; the student's has one over its start vector."""
    calls: list[str] = []
    for part in ("step", "prefill"):
        run = getattr(StaticBackbone, part)
        monkeypatch.setattr(StaticBackbone, part, lambda *args, run=run, part=part: calls.append(part) or run(*args))
    model = make_token_model() if name == "token-compiled" else make_student()
    racer = race.make_racer(name, model, race.Ids(320), rows=2, prompt=prompt, new=8, dtype=torch.float32)
    for seed in range(2):
        calls.clear()
        assert racer.run([[5] * prompt] * 2, 8, seed).backbone_steps == len(calls)
        assert calls.count("prefill") == (name == "student-compiled" or prompt > 1)


def test_a_race_of_odd_lengths_and_of_the_same_screen(
    uncompiled: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt is rounded up to whole chunks, what is written down; the token-level model may have the student's screen."""
    racers = ["token-compiled", "token-compiled-screen", "student-compiled"]
    flags = ["--race", "--scale", "tiny", "--prompt_tokens", 33, "--repeats", 1, "--words", 64, "--rank", 8, "--memory", "none"]
    flags += ["--device", "cpu", "--output", tmp_path / "race.json", "--racers", *racers]
    assert run_script(bench, *flags, "--max_new_tokens", 8) == 2
    assert "expected at least two chunks of 8, got 8" in capsys.readouterr().err
    assert run_script(bench, *flags, "--max_new_tokens", 33) == 0
    rows = {row["racer"]: row for row in json.loads((tmp_path / "race.json").read_text())["rows"]}
    assert [rows[name]["words"] for name in racers] == [0, 64, 64] and {row["new_tokens"] for row in rows.values()} == {32}
    assert rows["token-compiled-screen"]["bytes_per_token"] < rows["token-compiled"]["bytes_per_token"]


def test_a_race_in_8_bits(uncompiled: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the student and, asked for, of the token-level model, alike; in large batches the product is exact."""
    racers = ["token-compiled", "token-compiled-screen", "student-compiled"]
    flags = ["--race", "--scale", "tiny", "--prompt_tokens", 9, "--repeats", 1, "--memory", "none", "--max_new_tokens", 16]
    flags += ["--device", "cpu", "--output", tmp_path / "race.json", "--racers", *racers, "--int8"]
    assert run_script(bench, *flags, "--words", 64) == 2 and "expected --int8 or --words" in capsys.readouterr().err
    assert run_script(bench, *flags, "--batch", 1, 8) == 0
    rows = {(row["racer"], row["batch"]): row for row in json.loads((tmp_path / "race.json").read_text())["rows"]}
    assert [rows[name, 1]["int8"] for name in racers] == [False, True, True]
    assert not any(rows[name, 8]["int8"] or rows[name, 8]["words"] for name in racers)
    assert "int8" in capsys.readouterr().out
    assert rows["token-compiled-screen", 1]["bytes_per_token"] < rows["token-compiled", 1]["bytes_per_token"]


@pytest.mark.parametrize("racer", ["student-eager", "student-compiled"])
def test_a_student_without_a_backbone_is_refused_before_anything_runs(
    racer: str, uncompiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"student": make_student(seq_len=64, latents="none"), "token": make_token_model(seq_len=64)}
    monkeypatch.setattr(bench, "make_untrained", lambda args, kind, *_: models[kind])
    monkeypatch.setattr(race.TokenEager, "run", lambda *_: pytest.fail("the race ran"))
    flags = ["--race", "--scale", "tiny", "--racers", "token-eager", racer, "--device", "cpu", "--output", tmp_path / "r.json"]
    assert run_script(bench, *flags) == 2
    assert "--latents none" in capsys.readouterr().err


def test_the_parts_of_a_chunk(
    uncompiled: None, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The steps make up the chunk, and the parts of a token step that step; prompts beyond the context are refused."""
    monkeypatch.setattr("student.parts.CompiledStep", lambda step, rows: step)
    flags = ["--parts", "--device", "cpu", "--repeats", 1]
    assert run_script(bench, *flags, "--scale", "tiny", "--batch", 1, 4, "--prompt_tokens", 9, 100, "--words", 0) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    cells = {(r["batch"], r["prompt_tokens"]): {} for r in rows}
    for row in rows:
        cells[row["batch"], row["prompt_tokens"]][row["name"]] = row["ms"] * row["times"]
    assert list(cells) == [(1, 9), (4, 9), (1, 100), (4, 100)]
    for ms in cells.values():
        assert ms["chunk"] > ms["latent step"] > 0 and ms["token step"] > ms["vocabulary product"] > 0, ms
    output = tmp_path / "parts.json"
    assert run_script(bench, *flags, "--student", world.student, "--prompt_tokens", 28, "--output", output) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(output.read_text())
    assert run_script(bench, *flags, "--student", world.student, "--prompt_tokens", 29) == 2
    assert "the prompt has 29 tokens" in capsys.readouterr().err
    monkeypatch.setattr(bench, "pick_device", torch.device)
    assert run_script(bench, "--parts", "--device", "cuda") == 2
    assert "--parts: expected the CPU, got cuda" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [[], ["--screen"], ["--train"]])
@pytest.mark.parametrize("flag", [["--int8"], ["--words", 64]])
def test_the_races_flags_elsewhere(mode: list[Any], flag: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(bench, *mode, *flag) == 2
    told = f"{flag[0]} is read by --race and --parts alone, and this is {mode[0] if mode else bench.EAGER}; leave it out"
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--race", "--prompts", "a"], "--prompts is read by the eager comparison alone, and this is --race"),
        (["--batch", 8], "--batch is read by --race and --parts alone"),
        (["--parts", "--memory", "all"], "--memory is read by --race alone, and this is --parts"),
        (["--train", "--windows", 4], "--windows is read by --screen alone, and this is --train"),
        (["--screen", "--scale", "tiny"], "--scale is read by --race and --parts and --train alone"),
    ],
)
def test_flags_that_the_mode_does_not_read(flags: list[Any], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(bench, *flags) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("mode", [[], ["--race"], ["--parts"], ["--screen"]])
def test_the_autoencoder_is_checked_wherever_the_student_is_read(
    mode: list[str], world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--student", world.student, "--baseline", world.token_model, "--ae", "/nowhere.pt", "--device", "cpu"]
    assert run_script(bench, *mode, *flags) == 2
    assert "/nowhere.pt does not exist" in capsys.readouterr().err


def test_8_bits_on_a_gpu_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "pick_device", torch.device)
    monkeypatch.setattr(bench, "run_race", lambda *_: pytest.fail("the race ran"))
    assert run_script(bench, "--race", "--int8", "--device", "cuda") == 2
    assert "--int8: expected the CPU, got cuda" in capsys.readouterr().err


def test_the_peak_is_the_childs_own() -> None:
    """A child of a process that has touched a GiB reports its own memory."""
    touched = torch.ones(1 << 28)
    command = [sys.executable, "-c", "import bench; print(bench.own_peak())"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert 50 < float(done.stdout) < 900 < bench.own_peak(), (done.stderr, touched.numel())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="a kernel that does not forget a peak")
def test_the_peak_of_loading_is_forgotten() -> None:
    code = "import bench, torch\nfrom configs.run import tune_process\ntune_process()\n"
    code += "x = torch.ones(1 << 28)\nbefore = bench.own_peak()\n"
    code += "del x\nbench.forget_peak(torch.device('cpu'))\nprint(before, bench.own_peak())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    before, after = map(float, done.stdout.split())
    assert before > 1024 and after < before - 900, done.stderr


def test_the_peak_is_of_the_cell_itself(uncompiled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that measures it reads as many prompts, as long ones, and writes as many tokens as the race does."""
    ran: list[tuple[str, int, int, int]] = []
    for kind in (race.TokenCompiled, race.StudentCompiled):
        run = kind.run

        def recorded(self: Any, prompts: race.Prompts, new: int, seed: int, run: Any = run) -> race.Lap:
            ran.append((type(self).__name__, len(prompts), len(prompts[0]), new))
            return run(self, prompts, new, seed)

        monkeypatch.setattr(kind, "run", recorded)

    def in_this_process(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        ran.append(("child", 0, 0, 0))
        assert run_script(bench, *command[2:]) == 0
        return subprocess.CompletedProcess(command, 0, "some lines\n123.5\n", "")

    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=in_this_process))
    flags = [
        "--race",
        "--scale",
        "tiny",
        "--batch",
        2,
        "--prompt_tokens",
        3,
        "--max_new_tokens",
        40,
        "--repeats",
        1,
        "--words",
        0,
    ]
    flags += ["--device", "cpu", "--output", tmp_path / "race.json", "--racers", "token-compiled", "student-compiled"]
    assert run_script(bench, *flags) == 0
    cells = [("TokenCompiled", 2, 3, 40), ("StudentCompiled", 2, 3, 40)]
    assert ran == [*cells, *cells, ("child", 0, 0, 0), cells[0], ("child", 0, 0, 0), cells[1]]  # warm, timed, measured
    assert [row["peak_mb"] for row in json.loads((tmp_path / "race.json").read_text())["rows"]] == [123.5, 123.5]


@pytest.mark.parametrize(("said", "told"), [("out of\nmemory\n", "memory"), ("", "exit code -9")])
def test_a_process_that_dies_while_its_memory_is_measured(
    said: str, told: str, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    died = subprocess.CompletedProcess([], -9, "", said)
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=lambda *_, **__: died))
    flags = ["--student", world.student, "--baseline", world.token_model, "--max_new_tokens", 2, "--repeats", 1]
    assert run_script(bench, *flags, "--prompts", "a") == 2
    assert f"measuring the memory of token_model failed: {told}; free some" in capsys.readouterr().err


def test_the_race_of_trained_models(uncompiled: None, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Quality stands beside speed, or there is no race; lengths beyond the context are left out and said."""
    flags = ["--race", "--student", world.student, "--baseline", world.token_model, "--max_new_tokens", 9, "--repeats", 1]
    flags += ["--memory", "none", "--device", "cpu", "--output", tmp_path / "r.json", "--prompt_tokens", 4, 400]
    assert run_script(bench, *flags) == 2
    assert "--race needs the models' bits per byte" in capsys.readouterr().err
    (tmp_path / "e.json").write_text(json.dumps({n: {"bits_per_byte": 2.5} for n in ("token_model", "student")}))
    assert run_script(bench, *flags, "--evaluate", tmp_path / "e.json") == 0
    shown = capsys.readouterr()
    assert "left out: 400 prompt tokens" in shown.err


def test_a_cell_cost_counts_what_is_read() -> None:
    """Against a count by hand: every weight of the backbone once, two bytes each, and the cache of 100 positions."""
    cfg = make_token_model().cfg
    flops, read = race.cost(cfg, None, 1, 100, 2)
    model = make_token_model()
    weights = sum(p.numel() for p in model.lm.model.parameters())
    assert read == pytest.approx(2 * weights + 100 * 2 * 2 * 2 * 8, rel=0.02)  # keys and values, 2 layers, 1 head of 8
    assert flops > 2 * weights * 0.9
    assert race.cost(cfg, None, 4, 100, 2)[1] < read
    student = make_student()
    table, never = student.table.detach(), torch.zeros(len(student.table), dtype=torch.bool)
    full, screened = (race.cost(student.cfg, v, 1, 32, 2) for v in (Vocabulary(table, never), Screen(table, never, 16, 2)))
    assert screened[0] < full[0] and screened[1] < full[1]
    eight = race.cost(student.cfg, Int8(table, never), 1, 32, 2)
    assert eight[0] == full[0] and full[1] - eight[1] == 3 * table.numel() - 2 * len(table)  # of 4 bytes, and scales of 2


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_students_cost_counts_every_cache_that_a_token_reads(layers: int, memory: bool) -> None:
    """Behind 32 tokens: the backbone's every K = 4 tokens, the local decoder's at each, as large as the fast path has them."""
    model = make_student(local_layers=layers, local_memory=memory)
    window = FastSampler(model, race.Ids(320), dtype=torch.bfloat16, compile=False).window  # type: ignore[arg-type]
    assert window is not None
    backbone = 2 * 2 * 8 * 2 * (32 // 4) / 4  # keys and values, 2 layers, 1 head of 8
    local = sum(x.nbytes for x in (*window.turned, *window.values)) + memory * 2 * 16 * 2 * 32
    weights = sum(generation_bytes(model.cfg, 2).values())
    for rows in (1, 32):
        assert race.cost(model.cfg, None, rows, 32, 2)[1] == pytest.approx(weights / rows + backbone + local)


def test_screen_quality() -> None:
    """More rank and more words never lose more; the mass outside is the total variation."""
    model = make_student(seq_len=8)
    tokens = [torch.randint(2, 300, (2, 32))]
    rows = race.screen_quality(model, torch.zeros(320, dtype=torch.bool), tokens, [2, 16, 99], [16, 160])
    low, eight, *screens = rows
    assert [r["table"] for r in rows[:3]] == ["bfloat16", "int8", "rank 2, 16 words"] and "cut" not in low
    assert [(r["rank"], r["words"]) for r in screens] == [(2, 16), (2, 160), (16, 16), (16, 160)]
    by = {(r["rank"], r["words"]): r for r in screens}
    assert 0 < low["total_variation"] < eight["total_variation"] < 0.05 < by[2, 160]["total_variation"]
    assert abs(eight["nats"]) < 0.05 and 0 < eight["nucleus"] < 0.05
    assert by[2, 16]["total_variation"] > by[2, 160]["total_variation"] > by[16, 160]["total_variation"] >= 0
    assert by[16, 16]["total_variation"] < 1e-4 and abs(by[16, 16]["nats"]) < 1e-4  # of full rank, it is exact
    assert by[16, 16]["cut"] > by[16, 160]["cut"] and by[16, 160]["max_missed"] == 0


def test_training_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for model in speed.MODELS:
        module, _, tokens = speed.make_step(model, torch.device("cpu"))
        assert tokens > 1000 and sum(p.numel() for p in module.parameters()) > 1e6
    monkeypatch.setattr(speed, "make_step", lambda *_: (torch.nn.Linear(2, 2), lambda: module_loss(), 10))
    linear = torch.nn.Linear(2, 2)

    def module_loss() -> torch.Tensor:
        return linear(torch.ones(1, 2)).sum()

    row = speed.measure("ae", 0, "cpu", 1)
    assert row["variant"] == "fp32 eager" and row["tokens_per_s"] > 0
    assert run_script(bench, "--train", "--variant", "nothing:0") == 2
    assert "--variant nothing:0: expected MODEL:INDEX" in capsys.readouterr().err


def test_the_first_delivery_is_not_timed() -> None:
    assert race.Lap(1.0, 3.0, 8, 40, 5).tokens_per_s(2) == 2 * 32 / 2
