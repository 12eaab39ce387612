"""What `bench.py --train` measures, at a size that takes no time, and what it says of it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_script

import bench
from configs.schema import StudentTrainConfig, read_yaml
from student import speed

CPU = torch.device("cpu")


def test_a_scale_of_the_race() -> None:
    """Equal tokens for all three, the same backbone, and each a whole step."""
    scale = speed.larger_scale(vars(bench.SHAPES["tiny"]))
    for model in speed.MODELS:
        module, loss, tokens = speed.make_step(model, CPU, scale)
        loss().backward()
        assert tokens == 512 and all(p.grad is not None for p in module.parameters() if p.requires_grad)
    student, token_model = (speed.make_step(name, CPU, scale)[0].cfg for name in ("student", "token_model"))
    assert all(getattr(student, key) == value == getattr(token_model, key) for key, value in scale.backbone.items())


def test_the_recipe_grows_with_the_local_decoder() -> None:
    """At the demo's width it is the demo's own, at another its feed-forward blocks are as wide beside it."""
    told = read_yaml(speed.CONFIGS / "demo_student.yaml")
    width = read_yaml(speed.CONFIGS / "demo_ae.yaml")["embed_dim"]
    recipe = speed.recipe(width)
    assert recipe == {name: told.get(name, getattr(StudentTrainConfig(), name)) for name in recipe}
    assert speed.recipe(2 * width) == recipe | {"local_ffn_dim": 2 * told["local_ffn_dim"]}


def test_the_last_row_trains_as_the_demo_does() -> None:
    """The others with AdamW alone."""
    scale = speed.larger_scale(vars(bench.SHAPES["tiny"]))
    module = speed.make_step("student", CPU, scale)[0]
    by_row = [speed.optimizers(module, speed.train_config(i)) for i in range(len(speed.VARIANTS))]
    assert [[isinstance(x, torch.optim.Muon) for x in made] for made in by_row] == [[False]] * 4 + [[True, False]]
    muon, adamw = speed.optimizers(module, speed.train_config(4))
    trained = sum(p.ndim == 2 for name, p in module.named_parameters() if "embed" not in name and not name.startswith("ae."))
    assert len(muon.param_groups[0]["params"]) == trained  # the autoencoder's have AdamW
    assert adamw.param_groups[-1]["scale"] == 5  # the table's rate


def test_the_table_ends_in_the_ratio(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of the last rows; each row is a process that is told the scale. Compiling is not to be had here, nor Muon for the AE."""
    monkeypatch.setattr(speed, "wants_compile", lambda *_: False)
    monkeypatch.setattr(speed, "has_fast_bf16", lambda _: True)

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[command.index("--scale") + 1] == "tiny"
        model, index = command[command.index("--variant") + 1].split(":")
        seconds = {"ae": 1.0, "token_model": 2.0, "student": 1.5}[model] / (1 + int(index))
        row = {"model": model, "variant": speed.VARIANTS[int(index)], "tokens_per_step": 512, "seconds_per_step": seconds}
        row |= {"tokens_per_s": 512 / seconds, "tokens_per_s_range": [1.0, 2.0]}
        return subprocess.CompletedProcess(command, 0, json.dumps(row), "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(speed, "environment", dict)
    assert run_script(bench, "--train", "--scale", "tiny", "--output", str(tmp_path / "out.json")) == 0
    *table, ratio, line = capsys.readouterr().out.splitlines()
    assert ratio == "student / token_model seconds a step at equal tokens: 0.75"
    result = json.loads(line)
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert (result["scale"], len(result["rows"])) == ("tiny", len(table) - 1)
    assert result["student_to_token_model"] == pytest.approx(0.75)
    assert [row["ratio_to_plain"] for row in result["rows"]] == pytest.approx([1, 2, 3] + [1, 2, 3, 5] * 2)
