"""The demo's bookkeeping: finished stages are not repeated, changed ones are, interrupted trainings resume.

The chain itself is run by .ci/run (`make demo QUICK=1`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_script

from configs.errors import UserError
from tools import demo, report
from tools.demo import Stage


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """The stages that were run, and whether they were resumed; nothing is really run."""
    calls: list[tuple[str, bool]] = []

    def fake(stage: Stage, resume: bool) -> None:
        calls.append((stage.name, resume))
        for path in filter(None, [*stage.outputs, stage.state, stage.stdout]):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
        if stage.run:
            ended = not (tmp_path / f"stop {stage.name}").exists()
            stage.run.mkdir(exist_ok=True)
            (stage.run / "metrics.jsonl").write_text(json.dumps({"step": 1, "time": 1, **({"final": True} if ended else {})}))
        if (tmp_path / f"interrupt {stage.name}").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_stage", fake)
    return calls


def names(root: Path) -> list[str]:
    return [stage.name for stage in demo.stages(root, True)]


def test_a_finished_stage_is_not_repeated(tmp_path: Path, ran: list[tuple[str, bool]]) -> None:
    root = tmp_path / "run"
    assert run_script(demo, "--quick", "--output", root) == 0
    assert ran == [(name, False) for name in names(root)]
    ran.clear()
    assert run_script(demo, "--quick", "--output", root) == 0
    assert ran == []
    before = (root / "stages.json").read_text()
    (root / "checkpoints/student.pt").unlink()
    assert run_script(demo, "--quick", "--output", root) == 0
    assert [name for name, _ in ran] == ["student"]
    assert list(json.loads((root / "stages.json").read_text())) == list(json.loads(before))


def test_another_command_runs_it_and_what_follows_again(
    tmp_path: Path, ran: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, all_names = tmp_path / "run", names(tmp_path)
    run_script(demo, "--quick", "--output", root)
    ran.clear()
    run_script(demo, "--output", root)  # the full demo: a larger corpus
    assert ran == [(name, False) for name in all_names]
    ran.clear()
    chain = demo.stages(root, False)
    chain[all_names.index("student")].command.append("--another")
    monkeypatch.setattr(demo, "stages", lambda *_: chain)
    run_script(demo, "--output", root)
    assert ran == [(name, False) for name in all_names[all_names.index("student") :]]


@pytest.mark.parametrize("how", ["interrupt", "stop"])  # Ctrl-C; SIGTERM, at which a trainer saves and exits with 0
def test_an_interrupted_training_resumes(
    tmp_path: Path, ran: list[tuple[str, bool]], capsys: pytest.CaptureFixture[str], how: str
) -> None:
    root = tmp_path / "run"
    (tmp_path / f"{how} token model").touch()
    assert run_script(demo, "--quick", "--output", root) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    (tmp_path / f"{how} token model").unlink()
    ran.clear()
    assert run_script(demo, "--quick", "--output", root) == 0
    all_names = names(root)
    expected = all_names[all_names.index("token model") :]
    assert ran == [(name, name == "token model") for name in expected]
    record = json.loads((root / "stages.json").read_text())
    assert all("seconds" in record[name] for name in all_names)


def test_another_training_does_not_go_on_from_the_one_before(
    tmp_path: Path, ran: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it was ended before its first save."""
    root = tmp_path / "run"
    run_script(demo, "--quick", "--output", root)
    chain = demo.stages(root, True)
    student = next(stage for stage in chain if stage.name == "student")
    student.command.append("--another")
    monkeypatch.setattr(demo, "stages", lambda *_: chain)
    fake = demo.run_stage

    def ended_at_once(stage: Stage, resume: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_stage", ended_at_once)
    assert run_script(demo, "--quick", "--output", root) == 130
    monkeypatch.setattr(demo, "run_stage", fake)
    ran.clear()
    assert run_script(demo, "--quick", "--output", root) == 0
    assert ran[0] == ("student", False)


def test_a_damaged_record_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stages.json").write_text("")
    assert run_script(demo, "--quick", "--output", tmp_path) == 2
    assert "stages.json cannot be read" in capsys.readouterr().err


def test_no_report_of_a_training_that_has_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"step": 1, "tokens": 8, "time": 1, "loss": 2.0, "ce": 2.0}
    for name in ("ae", "token_model", "student"):
        (tmp_path / name).mkdir()
        lines = [line, line if name == "student" else {**line, "final": True}]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    figures = {"ae": {}, **{key: {"nll_by_position": [1.0, 2.0]} for key in ("token_model", "student")}}
    for name, content in (("evaluate", figures), ("bench", {"environment": {}}), ("stages", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"the training of student in .* has not ended"):
        report.report(tmp_path)


def test_a_failed_stage_ends_the_demo() -> None:
    stage = Stage("broken", ["-c", "raise SystemExit(3)"], [])
    with pytest.raises(ValueError, match="'broken' failed with exit code 3"):
        demo.run_stage(stage, False)


def test_a_stage_that_ctrl_c_ends_before_it_has_loaded_is_no_failure() -> None:
    stage = Stage(
        "loading", ["-c", "import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.kill(os.getpid(), 2)"], []
    )
    with pytest.raises(KeyboardInterrupt):
        demo.run_stage(stage, False)
