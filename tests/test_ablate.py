"""A tiny grid end to end: trained, measured, told, resumed; and grids that are wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest
import yaml
from conftest import ROOT, World, run_script

from ae import train_ae
from configs.errors import UserError
from student import baseline, train_student
from tools import ablate, evaluate
from tools.grid import Grid, Run, current, load_grid, published, read_rows
from tools.quality import but_for_k, gain_share, section, summary, write_section

SHARED: dict[str, Any] = {
    "hidden_dim": 32, "num_layers": 1, "num_heads": 2, "seq_len": 8, "batch_size": 4, "max_steps": 4, "lr": 1e-2,
    "log_every": 1, "eval_every": 2, "eval_windows": 4, "device": "cpu", "base_w": 0.1,
}  # fmt: skip


class InProcess:
    """Stands in for a `Popen` of a script of this repository: runs it here and now, which spares the imports."""

    modules = (baseline, evaluate, train_ae, train_student)

    def __init__(self, command: list[str], *, stdout: IO[bytes], env: dict[str, str], **_: Any) -> None:
        module = next(m for m in self.modules if m.__file__ == command[1])
        assert env["OMP_NUM_THREADS"]
        self.out = io.TextIOWrapper(stdout, write_through=True)
        with contextlib.redirect_stdout(self.out), contextlib.redirect_stderr(self.out):
            self.returncode = run_script(module, *command[2:])
        self.out.detach()

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "Popen", InProcess)


def written(path: Path, world: World, **changes: Any) -> Path:
    """A grid file of three variants, with `changes`."""
    values = {
        "data": str(world.data), "output": str(path.parent / "out"), "ae": str(world.root / "checkpoints" / "ae.pt"),
        "shared": SHARED, "control": "local_only", "token_model": "token_model", "recommended": "student", "max_windows": 8,
        "variants": {
            "token_model": {"model": "token_model", "k": 4},
            "local_only": {"model": "student", "latents": "none", "local_window": 4},
            "student": {"model": "student", "local_window": 4},
        },
    }  # fmt: skip
    path.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("ablate_*.yaml")), ids=lambda path: path.name)
def test_shipped_grids_load(path: Path) -> None:
    grid = load_grid(path)
    assert {grid.control, grid.token_model} <= set(grid.variants) and grid.runs()


def test_a_grid_end_to_end(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: None) -> None:
    """Two autoencoders of different K, one trained here; two jobs where there are two cores."""
    ae4 = str(world.root / "checkpoints" / "ae.pt")
    variants = {
        "student": {"model": "student", "local_window": 4},
        "local_only": {"model": "student", "latents": "none", "local_window": 4},
        "energy": {"model": "student", "head": "energy", "seeds": [1]},
        "k2": {"model": "student", "local_window": 4, "ae_ckpt": "{ae2.ckpt}", "seq_len": 16},
        "ae2": {"model": "ae", "k": 2, "latent_dim": 16, "embed_dim": 32, "batch_size": 32, "max_steps": 3, "device": "cpu"},
        "token_model": {"model": "token_model", "k": 4},
    }
    path = written(tmp_path / "ablate_tiny.yaml", world, variants=variants, ae=ae4)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "quality.md").write_text("# Mine\n\nbefore\n")
    flags = ["--grid", path, "--docs", docs, "--jobs", min(2, len(os.sched_getaffinity(0)))]
    assert run_script(ablate, *flags, "--only", "student") == 0
    assert "Not run with the grid's present settings: local_only-s0, local_only-s1" in capsys.readouterr().out
    first = (tmp_path / "out" / "results.jsonl").read_text()
    assert run_script(ablate, *flags) == 0
    out, err = capsys.readouterr()
    assert "student-s0: done" in err and (tmp_path / "out" / "results.jsonl").read_text().startswith(first)
    rows = {(row["name"], row["seed"]): row for row in json.loads((docs / "quality.json").read_text())["rows"]}
    assert set(rows) == {
        ("student", 0), ("k2", 0), ("ae2", 0), ("energy", 1), *((n, s) for n in ("local_only", "token_model") for s in (0, 1))
    }  # fmt: skip
    student, k2 = rows["student", 0], rows["k2", 0]
    assert student["training_tokens"] == k2["training_tokens"] == 4 * 4 * 32
    assert (student["k"], k2["k"], k2["backbone_steps_per_token"]) == (4, 2, 0.5)
    assert student["tokens"] == k2["tokens"] == 8 * 28 and len(k2["nll_by_position"]) == 2  # scored on the same tokens
    assert [point[0] for point in student["curve"]] == [256, 512] and student["train_seconds"] > 0
    assert student["settings"]["base_w"] == 0.1 and "base_w" not in rows["token_model", 0]["settings"]
    assert k2["inherited_flops"] == rows["ae2", 0]["train_flops"] > 0 == student["inherited_flops"]
    for key in ("bits_per_byte", "brier_lm_all", "latent_swap_cost", "nll_by_distance", "far_copy_tokens", "train_flops"):
        assert student[key] is not None
    assert rows["energy", 1]["nats_per_token"] is None and "identity" not in student
    page, best = (docs / "quality.md").read_text(), json.loads((docs / "quality.json").read_text())["recommended"]
    assert page.startswith("# Mine\n\nbefore\n") and page.count("<!-- ablate tiny") == 1 and out.strip() in page
    assert best["name"] == "student" and best["bits_per_byte_ratio"] == pytest.approx(
        student["bits_per_byte"] / rows["token_model", 0]["bits_per_byte"]
    )
    for plot in ("quality_tiny.png", "frontier_tiny.png"):
        assert (docs / plot).read_bytes().startswith(b"\x89PNG") and f"({plot})" in page
    assert not list((tmp_path / "out").glob("*/checkpoints/*.state*.pt"))


def stale(grid: Grid) -> list[str]:
    rows = read_rows(grid.output)
    return [run.title for run in grid.runs() if not current(run, rows)]


def test_what_counts_as_done(world: World, tmp_path: Path, in_process: None) -> None:
    """A run stays done while settings, data and inputs do; its folder is made anew when they change."""
    variants = {
        "token_model": {"model": "token_model", "k": 4, "max_steps": 1},
        "local_only": {"model": "token_model", "k": 4, "max_steps": 2},
    }
    path = tmp_path / "g.yaml"
    change: dict[str, Any] = {"recommended": None, "variants": variants}
    written(path, world, **change)
    assert stale(load_grid(path)) == ["token_model-s0", "local_only-s0"]
    flags = ["--grid", path, "--docs", tmp_path / "docs"]
    assert run_script(ablate, *flags) == 0
    assert stale(load_grid(path)) == []
    ckpt = tmp_path / "out" / "token_model-s0" / "checkpoints" / "token_model.pt"
    before = ckpt.stat().st_mtime_ns
    written(path, world, **change, shared={**SHARED, "log_every": 2, "mse_w": 0.0, "weight_decay": 0.1})
    assert stale(load_grid(path)) == []  # what changes no weights, what is another trainer's, and a default spelled out
    written(path, world, **change, max_windows=9)
    assert len(stale(load_grid(path))) == 2
    assert run_script(ablate, *flags) == 0
    assert stale(load_grid(path)) == [] and ckpt.stat().st_mtime_ns == before  # only measured again
    variants["token_model"]["lr"] = 2e-3
    written(path, world, **change, max_windows=9)
    assert stale(load_grid(path)) == ["token_model-s0"]
    assert run_script(ablate, *flags, "--report") == 0  # a stale row is not compared with the others
    assert "Not run with the grid's present settings: token_model-s0" in (tmp_path / "docs" / "quality.md").read_text()
    variants["token_model"]["max_steps"] = 3
    written(path, world, **change, max_windows=9)
    assert run_script(ablate, *flags) == 0
    row = read_rows(tmp_path / "out")["token_model", 0]
    assert (row["training_tokens"], len(read_rows(tmp_path / "out"))) == (3 * 4 * 32, 2)
    assert ckpt.stat().st_mtime_ns > before


def test_rows_of_runs_made_elsewhere_stay(world: World, tmp_path: Path, in_process: None) -> None:
    """Docs hold more rows than this machine has runs: those that the grid still describes are told, the others are not."""
    variants = {name: {"model": "token_model", "k": 4, "max_steps": 1} for name in ("token_model", "local_only", "other")}
    change: dict[str, Any] = {"recommended": None, "variants": variants}
    path = written(tmp_path / "g.yaml", world, **change)
    docs = tmp_path / "docs"
    flags = ["--grid", path, "--docs", docs]
    assert run_script(ablate, *flags) == 0
    before = json.loads((docs / "quality.json").read_text())
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    variants["other"]["lr"] = 2e-3
    written(path, world, **change)
    assert run_script(ablate, *flags, "--only", "local_only") == 0
    after = json.loads((docs / "quality.json").read_text())
    assert [row["name"] for row in after["rows"]] == ["token_model", "local_only"] and len(before["rows"]) == 3
    assert after["rows"][0] == before["rows"][0]  # not run here
    assert set(read_rows(tmp_path / "out")) == {("local_only", 0)}
    assert "Not run with the grid's present settings: other-s0" in (docs / "quality.md").read_text()
    page = docs / "quality.json"
    page.write_text(page.read_text().replace(after["rows"][0]["data"], "of other text"))
    assert run_script(ablate, *flags, "--report") == 0
    assert [row["name"] for row in json.loads(page.read_text())["rows"]] == ["local_only"]  # its run is here
    written(path, world, **change, max_windows=9)  # other text scored: no row of before can stand beside it
    assert run_script(ablate, *flags, "--report") == 0
    assert json.loads((docs / "quality.json").read_text())["rows"] == []


def test_a_published_row_stands_only_with_what_it_starts_from(world: World, tmp_path: Path) -> None:
    grid = load_grid(written(tmp_path / "g.yaml", world, ae={"k": 4, "max_steps": 2}))
    student, ae = grid.run("student", 0), grid.run("ae", 0)

    def told(run: Run) -> dict[str, Any]:
        row = {"grid": grid.name, "name": run.variant.name, "seed": run.seed, "model": run.variant.model}
        return {**row, "data": grid.data_id, "settings": run.variant.settings, "evaluation": grid.evaluation}

    rows = [told(student), told(ae)]
    assert published(student, rows) == rows[0]
    other = load_grid(written(tmp_path / "g.yaml", world, ae={"k": 4, "max_steps": 3}))
    assert published(other.run("student", 0), rows) is None and published(
        other.run("token_model", 0), [told(grid.run("token_model", 0))]
    )


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_a_damaged_page_is_named(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = written(tmp_path / "g.yaml", world)
    (tmp_path / "quality.json").write_text(text)
    assert run_script(ablate, "--grid", path, "--docs", tmp_path, "--report") == 2
    assert re.search(r"quality.json(: expected a JSON object, got a list| cannot be read: )", capsys.readouterr().err)


def test_ctrl_c_saves_and_the_same_command_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "g.yaml", world, shared={**SHARED, "max_steps": 400, "eval_every": 0})
    command = [sys.executable, str(ROOT / "tools" / "ablate.py"), "--grid", str(path), "--docs", str(tmp_path / "docs")]
    process = subprocess.Popen([*command, "--only", "local_only"], stderr=subprocess.PIPE, start_new_session=True)
    metrics = tmp_path / "out" / "local_only-s0" / "metrics.jsonl"
    deadline = time.time() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130 and "Traceback" not in error
    state = tmp_path / "out" / "local_only-s0" / "checkpoints" / "student.state.pt"
    assert state.exists() and 2 <= metrics.read_text().count("\n") < 400
    monkeypatch.setattr(ablate, "Popen", InProcess)
    assert run_script(ablate, *command[2:], "--only", "local_only") == 0
    assert "resumed at step" in (tmp_path / "out" / "local_only-s0" / "log.txt").read_text()
    assert read_rows(tmp_path / "out")["local_only", 0]["training_tokens"] == 400 * 4 * 32


def test_a_run_stopped_before_its_first_line_of_metrics(world: World, tmp_path: Path, in_process: None) -> None:
    path = written(tmp_path / "g.yaml", world)
    command = ["--grid", path, "--docs", tmp_path / "docs", "--only", "token_model"]
    assert run_script(ablate, *command) == 0
    (tmp_path / "out" / "results.jsonl").unlink()
    (tmp_path / "out" / "token_model-s0" / "metrics.jsonl").write_text("")
    assert run_script(ablate, *command) == 0 and ("token_model", 0) in read_rows(tmp_path / "out")


def test_a_failed_run_stops_only_those_that_need_it(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_process: None
) -> None:
    variants = {
        "broken": {"model": "ae", "k": 4, "num_layers": 3},
        "token_model": {"model": "token_model", "k": 4, "max_steps": 1},
        "local_only": {"model": "student", "latents": "none", "ae_ckpt": "{broken.ckpt}"},
    }
    path = written(tmp_path / "g.yaml", world, variants=variants, recommended=None)
    assert run_script(ablate, "--grid", path, "--docs", tmp_path / "docs") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "broken-s0 failed (exit code 2: error: num_layers: expected a multiple of 4" in error
    assert "local_only-s0 failed (it needs broken-s0)" in error
    assert list(read_rows(tmp_path / "out")) == [("token_model", 0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrl": "x"}, "unknown key 'contrl'; did you mean 'control'"),
        ({"control": None}, "`control` is missing"),
        ({"control": "local"}, "control: unknown variant 'local'; did you mean 'local_only'"),
        ({"shared": {"hiden_dim": 3}}, "shared: unknown key 'hiden_dim'; did you mean 'hidden_dim'"),
        ({"shared": [1]}, "expected `name: value` lines under `shared`"),
        ({"shared": {**SHARED, "seed": 3}}, "`seed` is the grid's to set"),
        ({"shared": {**SHARED, "eval_every": 3, "log_every": 2}}, "eval_every: expected a multiple of log_every = 2"),
        ({"seeds": "0"}, "seeds: expected a list of whole numbers"),
        ({"max_windows": 1}, "max_windows: expected at least 2"),
        ({"ae": "/nowhere.pt"}, "checkpoint /nowhere.pt does not exist"),
    ],
)
def test_bad_grids(world: World, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        _ = load_grid(written(tmp_path / "g.yaml", world, **change)).first
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"model": "studnt"}, "expected settings with `model:` one of ae, token_model, student"),
        (None, "expected settings with `model:`"),
        ({"model": "student", "local_windw": 3}, "new: unknown key 'local_windw'; did you mean 'local_window'"),
        ({"model": "token_model", "k": 4, "latents": "none"}, "new: unknown key 'latents'"),
        ({"model": "student", "run_dir": "x"}, "`run_dir` is the grid's to set"),
        ({"model": "student", "ae_ckpt": "{student.ckpt}"}, "ae_ckpt: student is a student, expected a variant of model ae"),
        ({"model": "student", "seq_len": 9}, "windows of seq_len * k tokens differ (token_model 32, new 36)"),
        ({"model": "student", "ae_ckpt": "{aa.ckpt}"}, "ae_ckpt: unknown variant 'aa'"),
        ({"model": "student", "kd_data": "{new.ckpt}"}, "in a circle: new <- new"),
    ],
)
def test_bad_variants(world: World, tmp_path: Path, variant: Any, message: str) -> None:
    values = yaml.safe_load(written(tmp_path / "g.yaml", world).read_text())
    values["variants"]["new"] = variant
    with pytest.raises(UserError) as error:
        _ = load_grid(written(tmp_path / "g.yaml", world, variants=values["variants"])).first
    assert message in str(error.value)


def test_bad_flags(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "g.yaml", world)
    assert run_script(ablate, "--grid", path, "--only", "studet") == 2
    assert "unknown variant 'studet'; did you mean 'student'" in capsys.readouterr().err
    assert run_script(ablate, "--grid", path, "--docs", tmp_path / "d", "--jobs", 9999) == 2
    assert "--jobs: expected 1 to" in capsys.readouterr().err


def row(name: str, nats: float | None, seed: int = 0, **more: Any) -> dict[str, Any]:
    figures = {"model": "student", "windows": 2, "tokens": 9, "bits_per_byte": nats, "threads": 1, "nll_by_position": None}
    return {"name": name, "seed": seed, "nats_per_token": nats, "settings": {}, **figures, **more}


def test_gain_share() -> None:
    control, full = row("c", 3.5), row("t", 3.3)
    assert gain_share(row("s", 3.4), control, full)[0] == pytest.approx(0.5)
    for mine, one, two, reason in (
        (row("s", 3.4), None, full, "no run with seed 0"),
        (row("s", None), control, full, "no likelihood"),
        (row("s", 3.4), row("c", 3.2), full, "the control (3.2000 nats) is no worse than the token model (3.3000)"),
        (row("s", 3.4, tokens=8), control, full, "scored on other tokens"),
    ):
        share, why = gain_share(mine, one, two)
        assert share is None and reason in str(why)


def test_summary_goes_seed_by_seed() -> None:
    rows = [row("c", 3.5), row("t", 3.3), row("s", 3.4), row("c", 3.7, 1), row("t", 3.3, 1), row("s", 3.4, 1), row("s", 3.0, 2)]
    roles = {"control": "c", "token_model": "t", "recommended": None}
    entry = {e["name"]: e for e in summary(rows, roles, {}, {})}["s"]
    assert entry["latent_gain_share_by_seed"] == [pytest.approx(0.5), pytest.approx(0.75), None]
    assert entry["latent_gain_share"] == pytest.approx(0.625) and "seed 2" in entry["latent_gain_share_reason"]
    assert entry["bits_per_byte_ratio"] == pytest.approx(3.4 / 3.3) and entry["nats_spread"] == pytest.approx(0.2)


def test_a_mean_tells_of_how_many_seeds_it_is() -> None:
    cost = {"train_flops": 1e15, "inherited_flops": 0.0, "training_tokens": 1e6, "train_seconds": 1.0}
    cost |= {"environment": dict.fromkeys(("gpu", "processor", "torch", "commit"))}
    figures = [
        ("c", 0, 3.5, None),
        ("c", 1, 3.3, None),
        ("t", 0, 3.3, 19.0),
        ("t", 1, 3.4, 20.0),
        ("s", 0, 3.4, 18.0),
        ("s", 1, 3.2, None),
    ]
    rows = [
        row(name, nats, seed, model="token_model" if name == "t" else "student") | cost | {"brier_lm": brier}
        for name, seed, nats, brier in figures
    ]
    entries = summary(rows, {"control": "c", "token_model": "t", "recommended": None}, {}, {})
    lines = {
        line.split(" | ")[0][2:]: line for line in section("g", "g.yaml", rows, entries, [], []).split("\n\n")[2].splitlines()
    }
    assert "| 0.50 (1 of 2) |" in lines["s"] and "| 18.00 (1 of 2) |" in lines["s"]  # seed 1's control has nothing to win
    assert "| 19.50 |" in lines["t"] and "of 2)" not in lines["c"]


def test_the_recommended_variant_at_every_k() -> None:
    small, other = {"ae_ckpt": "8", "seq_len": 64, "lr": 1e-3}, {"ae_ckpt": "4", "seq_len": 128, "compile": True}
    settings = {"s": small, "s_k4": small | other, "s_fast": small | {"lr": 2e-3}, "t": {"lr": 1e-3, "layers": 4}}
    assert but_for_k([row(name, 3.4, settings=told) for name, told in settings.items()], "s") == {"s", "s_k4"}


def test_a_variant_is_held_against_its_own_control() -> None:
    rows = [row("c", 3.5), row("t", 3.3, model="token_model"), row("s", 3.4), row("wide", 3.45), row("s_wide", 3.36)]
    rows += [row("t_wide", 3.35, model="token_model"), row("alone", 3.4, settings={"latents": "none"})]
    roles = {"control": "c", "token_model": "t", "recommended": None}
    entries = {e["name"]: e for e in summary(rows, roles, {"s_wide": "wide"}, {"s_wide": "t_wide"})}
    assert entries["s"]["latent_gain_share"] == pytest.approx(0.5)
    assert entries["s_wide"]["latent_gain_share"] == pytest.approx(0.9) and entries["s_wide"]["control"] == "wide"
    assert entries["s_wide"]["bits_per_byte_ratio"] == pytest.approx(3.36 / 3.35) and entries["s"]["token_model"] == "t"
    assert not [name for name in ("wide", "t", "t_wide", "alone") if "latent_gain_share" in entries[name]]


def test_a_row_measured_as_before_is_measured_again_but_not_trained(world: World, tmp_path: Path, in_process: None) -> None:
    path = written(tmp_path / "ablate_g.yaml", world)
    flags = ["--grid", path, "--docs", tmp_path / "docs", "--only", "token_model"]
    assert run_script(ablate, *flags) == 0
    results, checkpoint = (
        tmp_path / "out" / "results.jsonl",
        tmp_path / "out" / "token_model-s0" / "checkpoints" / "token_model.pt",
    )
    trained, told = checkpoint.stat().st_mtime_ns, json.loads(results.read_text())
    results.write_text(json.dumps({key: value for key, value in told.items() if key != "brier_windows"}) + "\n")
    assert run_script(ablate, *flags) == 0
    assert json.loads(results.read_text()) == told and checkpoint.stat().st_mtime_ns == trained


def test_prose_around_a_section_survives(tmp_path: Path) -> None:
    path = tmp_path / "quality.md"
    write_section(path, "a", "one")
    write_section(path, "b", "two")
    path.write_text(path.read_text() + "\nprose after\n")
    write_section(path, "a", "three")
    page = path.read_text()
    assert page.startswith("# Quality") and page.endswith("prose after\n") and "one" not in page
    assert page.index("three") < page.index("two") < page.index("prose after")
    path.write_text(page.replace("<!-- end of ablate a -->", ""))
    with pytest.raises(UserError, match="only one of the two markers"):
        write_section(path, "a", "four")


def test_each_figure_stands_under_its_head() -> None:
    told = {
        "bits_per_byte": 1.5,
        "brier_lm": 20.0,
        "brier_lm_all": 30.0,
        "brier_windows": 64,
        "latent_swap_cost": 0.25,
        "nll_far_copy": 2.125,
        "kl_to_teacher": 0.0625,
        "backbone_steps_per_token": 0.125,
        "training_tokens": 5e6,
        "train_flops": 4e15,
        "inherited_flops": 6e15,
        "train_seconds": 70.0,
        "k": 8,
        "environment": dict.fromkeys(("gpu", "processor", "torch", "commit")),
    }
    rows = [row("s", 3.4) | told, row("c", 3.5) | told, row("t", 3.3, model="token_model") | told | {"bits_per_byte": 1.25}]
    entries = summary(rows, {"control": "c", "token_model": "t", "recommended": None}, {}, {})
    lines = section("g", "g.yaml", rows, [e for e in entries if e["name"] == "s"], [], []).splitlines()
    head, _, cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines if line.startswith("|")][:3]
    assert dict(zip(head, cells, strict=True)) == {
        "variant": "s",
        "seeds": "1",
        "NLL, nats/token": "3.4000",
        "bits per byte": "1.5000",
        "to token model": "1.200",
        "latent gain share": "0.50",
        "other latents cost": "0.250",
        "far words, nats": "2.125",
        "KL to teacher": "0.0625",
        "BrierLM, chunk start": "20.00",
        "BrierLM, all": "30.00",
        "backbone steps a token": "0.125",
        "training tokens, M": "5.00",
        "training PFLOPs": "4 + 6",
        "training s (threads)": "70 (1)",
    }
