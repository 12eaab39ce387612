"""The distillation demo: chain and report (its commands run for real in test_distillation.py and test_ablate.py)."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import World, run_script

from kd.store import Store
from tools import demo, distill_demo
from tools.demo import Stage
from tools.distill_demo import closed, serving


def row(name: str, seed: int, kl: float) -> dict[str, Any]:
    return {"name": name, "seed": seed, "kl_to_teacher": kl, "nats_per_token": 2.0, "bits_per_byte": 1.0, "brier_lm_all": 9.0,
            "train_seconds": 5.0}  # fmt: skip


def test_the_chain_and_its_report(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, ran, teacher = tmp_path / "d", list[Stage](), tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "model.safetensors").write_bytes(b"weights")
    grid = yaml.safe_load((Path(distill_demo.ROOT) / "configs/ablate_distill_demo.yaml").read_text())
    grid |= {"data": str(root / "packed"), "output": str(root / "runs"), "ae": str(world.ae)}
    grid["shared"] |= {"hidden_dim": 32, "seq_len": 8}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))

    def fake(stage: Stage, resume: bool) -> None:
        ran.append(stage)
        for path in filter(None, [*stage.outputs, stage.stdout]):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".sqlite":
                path.write_text("Once upon a time")
        if stage.name == "harvest":
            with Store(stage.outputs[0]) as store:
                answer = json.dumps({"choices": [{"text": "a story"}]}).encode()
                store.put({}, answer, model="t", template=1, prompt_ids=[], prompt_tokens=1, completion_tokens=2, cost=0.0)
        if stage.name.startswith("training"):
            (root / "runs").mkdir(exist_ok=True)
            rows = [row("student_ce", 0, 0.4), row("student_kd", 0, 0.3), row("token_model_kd", 0, 0.2)]
            rows.append(row("student_kd", 7, 0.9))  # of an earlier grid
            (root / "runs" / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))

    @contextmanager
    def served(model: Path, log: Path) -> Any:
        yield "http://127.0.0.1:9/v1"

    monkeypatch.setattr(demo, "run_stage", fake)
    monkeypatch.setattr(distill_demo, "serving", served)
    monkeypatch.setenv("VENICE_BASE_URL", "unset")
    monkeypatch.setenv("VENICE_API_KEY", "unset")
    flags = [
        "--teacher",
        teacher,
        "--grid",
        tmp_path / "grid.yaml",
        "--n_tokens",
        700,
        "--prompts",
        world.data,
    ]
    assert run_script(distill_demo, *flags) == 0
    report = capsys.readouterr().out
    assert "the soft targets close 25% (seed 0)." in report and "a story" in report and "Once upon a time" in report
    names = [stage.name for stage in ran]
    assert names == ["harvest", "packing", "training and evaluation", "sample of student_ce", "sample of student_kd"]
    harvest = ran[0].command
    window = grid["shared"]["seq_len"] * 8
    assert harvest[harvest.index("--prompt_tokens") + 1] == str(window // 8)
    assert harvest[harvest.index("--max_new_tokens") + 1] == str(window - window // 8 - 1)
    ran.clear()
    assert run_script(distill_demo, *flags) == 0 and not ran
    (teacher / "model.safetensors").write_bytes(b"other weights under the same name")
    assert run_script(distill_demo, *flags) == 0 and [stage.name for stage in ran] == names
    assert len(list(root.glob("teacher-*.sqlite"))) == 2


def test_share() -> None:
    assert closed(row("student_ce", 0, 0.5), row("student_kd", 0, 0.2)) == pytest.approx(0.6)


def test_what_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_script(distill_demo, "--grid", "nothing.yaml") == 2
    assert "cannot read config nothing.yaml" in capsys.readouterr().err


def test_a_server_that_cannot_start_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from configs.errors import UserError

    monkeypatch.setenv("PYTHONPATH", str(distill_demo.ROOT))
    with pytest.raises(UserError, match=r"ended: .*error"), serving(tmp_path / "no-model", tmp_path / "log"):
        sys.exit("not reached")
