"""One process, accumulation, two processes and shards take the same steps; a process that dies costs the steps since a save."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL_AE, SMALL_LM, World, make_ae, make_student, pack, run_script

from ae import train_ae
from configs import parallel
from configs.parallel import Replicas, set_aside, slices, whole_saves
from configs.schema import LMTrainConfig
from kd.losses import mean_kl, scored_positions
from student import baseline, train_student
from student.baseline import load_token_model
from student.losses import counts, student_loss
from student.student_model import load_student

STEPS = 6
MUON = ("--optimizer", "muon", "--table_lr", 5)  # as the shipped configs: it leaves AdamW no matrices
STUDENT = [*SMALL_LM, "--local_memory", "--base_w", 0.1, "--pad_share", 0.7]  # rows with pads: each slice has its own count


def flags_of(world: World, folder: Path, *more: Any) -> list[str]:
    return [*map(str, (*world.train_flags(folder), "--no-bf16", "--log_every", 1, "--save_every", 2, *more))]


def torchrun(*runs: list[Any], restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Trainings in two processes."""
    options = ["--standalone", "--nproc_per_node", "2", "--max-restarts", str(restarts)]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "tests/many.py", json.dumps(runs)]
    # without the last one the new workers of an elastic restart look for the old ones' store
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=200)


def curve(folder: Path) -> dict[str, list[float]]:
    """The logged losses and gradient norms, one a step."""
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return {key: [line[key] for line in lines] for key in ("loss", "ce", "grad_norm", "tokens")}


def same(one: Path, other: Path, name: str) -> None:
    """Curves and weights agree to rounding; sums are taken in another order, and AdamW divides by small numbers.

    Weights: to a thousandth of how far the training has moved each tensor (1e-5 here).
    """
    a, b = curve(one), curve(other)
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=2e-4), key
    (weights, others), start = (saved(x, name) for x in (one, other)), saved(one.parent / f"{name}-start", name)
    assert weights.keys() == others.keys() == start.keys()
    for key, value in weights.items():
        moved, apart = (value - start[key]).norm().item(), (value - others[key]).norm().item()
        assert apart <= 1e-3 * moved, f"{key}: moved by {moved:.2e}, but {apart:.2e} apart"


def saved(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"checkpoints/{name}.pt", weights_only=True)["state"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An autoencoder of a text that stays as it is. The other tests' is this repository's own, new with every commit, and in
    some of these a weight's first gradient is all but zero, so that rounding decides AdamW's whole step."""
    made = World(tmp_path_factory.mktemp("world"))
    rng, folder = random.Random(0), made.root / "text"
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(200)]
    folder.mkdir()
    for i in range(40):
        lines = [" ".join(rng.choices(words, range(200, 0, -1), k=rng.randint(3, 12))) for _ in range(40)]
        (folder / f"{i}.txt").write_text("\n".join(lines))
    assert run_script(train_ae, *pack(made, folder).train_flags(), *SMALL_AE, "--max_steps", 20) == 0
    return made


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings of this file but the killed one."""
    root = tmp_path_factory.mktemp("runs")
    student = [*STUDENT, "--ae_ckpt", world.ae, "--max_steps", STEPS]
    token_model = [*SMALL_LM, "--k", 4, "--max_steps", STEPS]
    for name, script, own in (("student", train_student, student), ("token_model", baseline, token_model)):
        at_rest = [*own, "--max_steps", 1, "--lr", 0]
        assert run_script(script, *flags_of(world, root / f"{name}-start", *at_rest)) == 0
        assert run_script(script, *flags_of(world, root / f"{name}-1x1", *own)) == 0
        assert run_script(script, *flags_of(world, root / f"{name}-1x4", *own, "--grad_accum", 4)) == 0
    assert run_script(baseline, *flags_of(world, root / "muon-1x1", *token_model, *MUON)) == 0
    half = [x if x != STEPS else STEPS // 2 for x in token_model]
    sharded = ("--fsdp", "--activation_checkpointing", "--grad_accum", 2)
    done = torchrun(
        ["student", *flags_of(world, root / "student-2x2", *student, "--grad_accum", 2)],
        ["student", *flags_of(world, root / "local-only", *student, "--latents", "none")],  # what nothing reads has no gradient
        ["student", *flags_of(world, root / "student-fsdp", *student, "--fsdp")],
        ["stop at", 3],
        ["student", *flags_of(world, root / "student-stopped", *student, "--grad_accum", 2)],
        ["student", *flags_of(world, root / "student-stopped", *student, "--grad_accum", 2, "--resume")],
        ["token_model", *flags_of(world, root / "token_model-fsdp", *half, *sharded)],
        ["token_model", *flags_of(world, root / "token_model-fsdp", *token_model, *sharded, "--resume")],
        ["token_model", *flags_of(world, root / "muon-fsdp", *half, *MUON, "--fsdp")],
        ["token_model", *flags_of(world, root / "muon-fsdp", *token_model, *MUON, "--fsdp", "--resume")],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (root / "stdout").write_text(done.stdout)
    (root / "stderr").write_text(done.stderr)
    return root


@pytest.mark.parametrize("other", ["1x4", "2x2", "fsdp"])
def test_the_student_learns_the_same(runs: Path, other: str) -> None:
    same(runs / "student-1x1", runs / f"student-{other}", "student")


@pytest.mark.parametrize("other", ["1x4", "fsdp"])
def test_the_token_model_learns_the_same(runs: Path, other: str) -> None:
    """In shards: interrupted and resumed, with activation checkpointing and accumulation."""
    same(runs / "token_model-1x1", runs / f"token_model-{other}", "token_model")


def test_a_signal_to_one_process_stops_all(runs: Path) -> None:
    """After the step in which it came, with a save from which the training goes on as if nothing had been."""
    log = (runs / "student-stopped/run/log.txt").read_text()
    assert "stopped at step 4 of 6" in log and "resumed at step 4 of 6" in log
    assert curve(runs / "student-stopped") == curve(runs / "student-2x2")
    stopped, whole = (saved(runs / name, "student") for name in ("student-stopped", "student-2x2"))
    assert stopped.keys() == whole.keys() and all(torch.equal(stopped[key], whole[key]) for key in whole)


def test_muon_in_shards_learns_nearly_the_same(runs: Path) -> None:
    """Muon makes all singular values of a step alike, in bfloat16: also those that are little but rounding."""
    one, other = curve(runs / "muon-1x1"), curve(runs / "muon-fsdp")
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    adamw = curve(runs / "token_model-1x1")["loss"]
    assert abs(one["loss"][-1] - adamw[-1]) > 10 * abs(one["loss"][-1] - other["loss"][-1])


def test_only_the_first_process_speaks_and_writes(runs: Path) -> None:
    figures = [json.loads(line) for line in (runs / "stdout").read_text().splitlines() if line.startswith("{")]
    assert len(figures) == 8 and all("nats_per_token" in line for line in figures)
    assert (runs / "stderr").read_text().count("student: 2 processes, cpu") == 5
    for name in ("student-2x2", "student-fsdp"):
        found = {path.name for path in (runs / name / "checkpoints").iterdir() if not path.name.startswith("tokenizer")}
        own = {"student.shards"} if name == "student-fsdp" else {"student.state.pt", "student.state.prev.pt"}
        assert found == {"student.pt", ".student.begun", *own}


def test_a_sharded_model_is_one_file_in_the_end(runs: Path) -> None:
    student, _ = load_student(runs / "student-fsdp/checkpoints/student.pt")
    token_model, content = load_token_model(runs / "token_model-fsdp/checkpoints/token_model.pt")
    assert content["figures"]["nats_per_token"] > 0 and all(type(p) is torch.nn.Parameter for p in student.parameters())
    assert torch.equal(token_model.lm.lm_head.weight, token_model.lm.model.embed_tokens.weight)
    saves = whole_saves(runs / "student-fsdp/checkpoints/student.shards")
    assert [save.name for save in saves] == ["step-00000006", "step-00000004"]
    (saves[0] / "about.json").unlink()  # as a kill in the middle of the save leaves it
    assert [save.name for save in whole_saves(saves[0].parent)] == ["step-00000004"]


@pytest.mark.parametrize(("step", "resumed"), [(3, True), (1, False)])
def test_a_killed_process_costs_the_steps_since_the_last_save(
    world: World, runs: Path, tmp_path: Path, step: int, resumed: bool
) -> None:
    """And where it had saved nothing yet, it begins anew: not where another training ended that wrote to the same folder."""
    shutil.copytree(runs / "student-1x1", tmp_path, dirs_exist_ok=True)
    flags = flags_of(world, tmp_path, *STUDENT, "--ae_ckpt", world.ae, "--max_steps", STEPS, "--grad_accum", 2)
    done = torchrun(["die at", step], ["student", *flags], restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("resumed at step 2 of 6" in done.stderr) == resumed
    assert curve(tmp_path) == curve(runs / "student-2x2")
    killed, whole = saved(tmp_path, "student"), saved(runs / "student-2x2", "student")
    assert killed.keys() == whole.keys() and all(torch.equal(killed[key], whole[key]) for key in whole)


def test_shards_of_a_training_before_come_last_and_go_first(tmp_path: Path) -> None:
    def saved(step: int) -> None:
        (tmp_path / f"step-{step:08}").mkdir()
        (tmp_path / f"step-{step:08}" / "about.json").write_text("{}")

    for step in (750, 800):
        saved(step)
    set_aside(tmp_path)
    saved(500)
    names = ["step-00000500", "old-step-00000800", "old-step-00000750"]
    assert [place.name for place in whole_saves(tmp_path)] == names


def test_the_mean_of_the_slices_is_the_loss_of_the_batch() -> None:
    """Exactly, gradients too, with pads and a teacher's rows of which each slice has another number."""
    model, frozen = make_student(), make_ae(vocab_size=320, latent_dim=8, embed_dim=16)
    tokens, pads = torch.randint(2, 320, (4, 64)), torch.tensor([3, 0, 0, 2])
    ids = torch.stack([torch.randperm(320)[:3] for _ in range(256)]).view(4, 64, 3)
    ids[0, :50] = ids[2, 7:9] = -1
    logprobs = torch.full((4, 64, 3), -2.0)
    batch = tokens, pads, *counts(tokens, pads, 4), ids, logprobs, scored_positions(ids)

    def loss(tokens, pads, n_tokens, n_chunks, ids, logprobs, scored):  # type: ignore[no-untyped-def]
        kd = lambda states: mean_kl(states, model.table, ids, logprobs, count=scored)
        weights = {"ce_w": 1.0, "mse_w": 1.0, "base_w": 0.5, "kd_w": 1.0}
        return student_loss(model, frozen, tokens, pads, kd=kd, counted=(n_tokens, n_chunks), **weights)

    (whole, parts), cut = loss(*batch), [loss(*part) for part in slices(batch, 4)]
    assert sum(x for x, _ in cut).item() / 4 == pytest.approx(whole.item(), rel=1e-6)  # type: ignore[union-attr]
    for key, value in parts.items():
        assert sum(part[key] for _, part in cut).item() / 4 == pytest.approx(value.item(), rel=1e-6)  # type: ignore[union-attr]
    expected = torch.autograd.grad(whole, model.ae.embedding.weight)[0]
    found = torch.autograd.grad(sum(x for x, _ in cut) / 4, model.ae.embedding.weight)[0]  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_backward_pass_is_left_to_the_types_of_the_forward_pass() -> None:
    """Within autocast it would hold a copy of each weight in that type until it ends."""
    within: list[bool] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            within.append(torch.is_autocast_enabled("cpu"))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            within.append(torch.is_autocast_enabled("cpu"))
            return grad

    model = torch.nn.Linear(3, 1)
    replicas = Replicas(model, LMTrainConfig(batch_size=4, grad_accum=2), parallel.World(), torch.device("cpu"))
    loss_of = lambda x: (Watched.apply(model(x)).float().mean(), {})
    replicas.backward(loss_of, [torch.randn(4, 3)], 0, lambda: torch.autocast("cpu", torch.bfloat16))
    assert within == [True, False] * 2 and model.weight.grad is not None


def test_slices_and_what_cannot_be_cut(packed: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, count = torch.arange(8).view(4, 2), torch.tensor(6)
    parts = slices([rows, count], 2)
    assert torch.equal(torch.cat([part[0] for part in parts]), rows) and [part[1].item() for part in parts] == [3, 3]
    assert slices([rows, count], 1)[0][1] is count
    flags = [*flags_of(packed, tmp_path), *SMALL_LM, "--k", 4, "--max_steps", 1]
    assert run_script(baseline, *flags, "--grad_accum", 3) == 2
    assert "--batch_size 4: expected a multiple of processes * --grad_accum = 3" in capsys.readouterr().err
    assert run_script(baseline, *flags, "--fsdp") == 2
    assert "start it with torchrun" in capsys.readouterr().err
