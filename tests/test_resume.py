"""10 steps equal 5 + resume + 5, bit for bit, for every script; Ctrl-C saves and says how to go on."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SMALL_AE, SMALL_LM, World, make_student, run_script

from ae import train_ae
from ae.chunks import PackedData, TrainWindows
from ae.losses import ae_loss
from configs import loop
from configs.errors import EXIT_USER_ERROR
from configs.loop import optimizers
from configs.run import held, load_state, save_checkpoint, training_ended
from configs.schema import StudentTrainConfig
from student import baseline, train_student
from tools import data_packing, train_tokenizer

SCRIPTS = {"ae": train_ae, "token_model": baseline, "student": train_student}


def flags_of(name: str, world: World) -> list[Any]:
    own = {
        "ae": SMALL_AE,
        "token_model": [*SMALL_LM, "--k", 4],
        "student": [*SMALL_LM, "--local_memory", "--ae_ckpt", world.ae, "--mse_w", 0.1, "--base_w", 0.1],
    }
    return [*own[name], "--log_every", 1]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / f"{name}.pt", weights_only=True)["state"]


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [(m["step"], m["loss"]) for m in lines if "loss" in m]


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [*((name, ()) for name in SCRIPTS), ("student", ("--optimizer", "muon", "--table_lr", "5", "--local_qk_norm"))],
)
def test_ten_steps_are_five_and_five(name: str, optimizer: tuple[str, ...], world: World, tmp_path: Path) -> None:
    flags = [*flags_of(name, world), *optimizer]
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
    described = (tmp_path / "run/config.yaml").read_text()
    assert run_script(train_ae, *flags, "--max_steps", 2, "--resume", "--latent_dim", 24) == 2
    assert "another model (different latent_dim)" in capsys.readouterr().err
    assert (tmp_path / "run/config.yaml").read_text() == described  # still of the run that is there
    assert run_script(train_ae, *flags, "--max_steps", 2, "--resume", "--lr", 0.5) == 0
    assert "another run than the one that was saved: lr 0.001 -> 0.5" in capsys.readouterr().err


def test_resume_notices_other_text_behind_the_same_name(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More or less of it is said; another tokenizer's is refused, as the weights would be saved under its name."""
    data = tmp_path / "data"
    shutil.copytree(world.data, data)
    flags = [*world.train_flags(tmp_path), *flags_of("ae", world), "--data", data]
    assert run_script(train_ae, *flags, "--max_steps", 2) == 0
    n_tokens = PackedData(data / "train").n_tokens
    packing = [data_packing, "--output", data, "--seq_len", 32, "--k", 4, "--val_split", 0.3, "--tokenizer"]
    shutil.rmtree(data)
    assert run_script(*packing, world.root / "tokenizer", "--input", ROOT / "ae") == 0
    assert run_script(train_ae, *flags, "--max_steps", 3, "--resume") == 0
    assert f"data of {n_tokens:,} -> {PackedData(data / 'train').n_tokens:,} tokens" in capsys.readouterr().err
    shutil.rmtree(data)
    other = tmp_path / "tokenizer"
    assert run_script(train_tokenizer, "--input", ROOT / "kd", "--output", other, "--vocab_size", 320) == 0
    assert run_script(*packing, other, "--input", ROOT / "ae") == 0
    before = (tmp_path / "checkpoints/ae.pt").read_bytes()
    assert run_script(train_ae, *flags, "--max_steps", 3, "--resume") == 2  # which would train no step
    assert "ae.state.pt was trained on data of another tokenizer" in capsys.readouterr().err
    assert (tmp_path / "checkpoints/ae.pt").read_bytes() == before


def test_resume_notices_another_autoencoder_where_its_latents_are_aimed_at(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "ae.pt"
    content = torch.load(world.ae, weights_only=True)
    content["state"]["encoder.head.bias"] += 1
    save_checkpoint(other, "ae", content)
    for mse_w, told in ((0.1, True), (0, False)):
        flags = [*world.train_flags(tmp_path / str(told)), *flags_of("student", world), "--mse_w", mse_w]
        assert run_script(train_student, *flags, "--max_steps", 1) == 0
        assert run_script(train_student, *flags, "--max_steps", 2, "--resume", "--ae_ckpt", other) == 0
        assert ("the latents of another autoencoder" in capsys.readouterr().err) == told


def test_two_trainings_do_not_write_into_one_folder(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*world.train_flags(tmp_path), *flags_of("ae", world), "--max_steps", 1]
    for folder, name in (("checkpoints", ".ae.lock"), ("run", ".lock")):
        lock = held(tmp_path / folder / name)
        assert lock is not None and run_script(train_ae, *flags) == 2
        assert f"another training writes to {tmp_path / folder}" in capsys.readouterr().err
        lock.close()
    assert run_script(train_ae, *flags) == 0 and not list(tmp_path.glob("*/.*"))


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of clusters have none: no reason not to train there. What else goes wrong is told."""

    def refuse(number: int) -> None:
        def flock(*_: Any) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("configs.run.fcntl.flock", flock)

    refuse(errno.ENOSYS)
    assert held(tmp_path / "a" / ".lock") is not None
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        held(tmp_path / "a" / ".lock")


def test_what_torchrun_restarts_goes_on_from_its_own_save_alone(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training that died before it had begun must not take over what an earlier one left in the folder."""
    flags = [*world.train_flags(tmp_path), *flags_of("ae", world), "--max_steps", 2]
    for restarts, job, resumed in ((0, "a", False), (1, "a", True), (1, "b", False), (2, "b", True)):
        for key, value in (("RANK", "0"), ("TORCHELASTIC_RESTART_COUNT", str(restarts)), ("TORCHELASTIC_RUN_ID", job)):
            monkeypatch.setenv(key, value)
        assert run_script(train_ae, *flags) == 0
        assert ("resumed at step 2" in capsys.readouterr().err) == resumed


def test_resume_refuses_fewer_steps(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*world.train_flags(tmp_path), *flags_of("ae", world)]
    assert run_script(train_ae, *flags, "--max_steps", 3) == 0
    before = (tmp_path / "checkpoints/ae.pt").read_bytes()
    assert run_script(train_ae, *flags, "--max_steps", 2, "--resume") == 2
    assert "is at step 3, past the 2 that were asked for" in capsys.readouterr().err
    assert (tmp_path / "checkpoints/ae.pt").read_bytes() == before


def test_a_resumed_run_has_the_weight_decay_that_it_says(world: World, tmp_path: Path) -> None:
    flags = [*flags_of("token_model", world), "--weight_decay", 0.1, "--lr", 0.01, "--warmup_steps", 0, "--lr_decay", 0]
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        assert run_script(baseline, *world.train_flags(folder), *flags, "--max_steps", 2) == 0
    assert run_script(baseline, *world.train_flags(one), *flags, "--max_steps", 4, "--resume") == 0
    assert run_script(baseline, *world.train_flags(other), *flags, "--max_steps", 4, "--resume", "--weight_decay", 50) == 0
    sizes = [sum(x.square().sum().item() for x in weights(folder, "token_model").values()) for folder in (one, other)]
    assert sizes[1] < 0.95 * sizes[0]


def _dies(**_: Any) -> None:
    raise MemoryError


def test_a_new_start_keeps_the_save_of_the_run_before_until_it_has_its_own(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And neither goes on from it, should it die before."""
    flags = [*world.train_flags(tmp_path), *flags_of("ae", world), "--max_steps", 2]
    assert run_script(train_ae, *flags) == 0
    folder = tmp_path / "checkpoints"
    first = (folder / "ae.state.pt").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("configs.loop._StopSignal", _dies)
        with pytest.raises(MemoryError):
            run_script(train_ae, *flags, "--seed", 1)
    assert (folder / "ae.state.old.pt").read_bytes() == first
    capsys.readouterr()
    assert run_script(train_ae, *flags, "--seed", 1, "--resume") == EXIT_USER_ERROR  # it would be another training's end
    assert "ae.state.old.pt is of the training before: rename it to ae.state.pt" in capsys.readouterr().err
    assert run_script(train_ae, *flags, "--seed", 1) == 0
    assert not (folder / "ae.state.old.pt").exists() and (folder / "ae.state.pt").read_bytes() != first


def test_muon_has_the_matrices(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_student()
    muon, adamw = optimizers(model, StudentTrainConfig(optimizer="muon", table_lr=5.0))
    its_own = {id(p) for p in muon.param_groups[0]["params"]}
    named = {name for name, p in model.named_parameters() if id(p) in its_own}
    matrices = {"backbone.layers.0.self_attn.q_proj.weight", "local.layers.0.qkv.weight", "local.enter.weight", "exit.weight"}
    assert matrices <= named and not any("ae." in name or "norm" in name or "bias" in name for name in named)
    (table,) = adamw.param_groups[-1]["params"]
    assert table is model.table and adamw.param_groups[-1]["scale"] == 5
    rest = sum(len(group["params"]) for group in adamw.param_groups)
    assert len(its_own) + rest == sum(p.requires_grad for p in model.parameters())
    all_of_it, _ = optimizers(model, StudentTrainConfig(optimizer="muon_all", table_lr=5.0))
    ae = {id(p) for p in model.ae.parameters() if p.ndim == 2 and p is not table}
    assert {id(p) for p in all_of_it.param_groups[0]["params"]} == its_own | ae and ae
    flags = [*world.train_flags(tmp_path), *flags_of("token_model", world)]
    assert run_script(baseline, *flags, "--max_steps", 1) == 0
    assert run_script(baseline, *flags, "--max_steps", 2, "--resume", "--optimizer", "muon") == 2
    assert "saved with --optimizer adamw, got muon; go on with adamw" in capsys.readouterr().err
    assert run_script(baseline, *flags, "--max_steps", 2, "--resume", "--table_lr", 5) == 2
    assert "saved with --table_lr 1.0, got 5.0; go on with 1.0" in capsys.readouterr().err


def test_every_group_of_every_optimizer_follows_the_schedule(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []

    def kept(*args: Any) -> list[torch.optim.Optimizer]:
        made.extend(optimizers(*args))
        return made

    monkeypatch.setattr(loop, "optimizers", kept)
    flags = [*world.train_flags(tmp_path), *flags_of("token_model", world), "--optimizer", "muon", "--lr", 0.01]
    assert run_script(baseline, *flags, "--max_steps", 3, "--warmup_steps", 0, "--lr_decay", 1.0) == 0
    assert len(made) == 2 and isinstance(made[0], torch.optim.Muon) and isinstance(made[1], torch.optim.AdamW)
    rates = [group["lr"] for optimizer in made for group in optimizer.param_groups]
    assert len(rates) == 3 and rates == pytest.approx([0.01 / 3] * 3)


def test_a_save_from_before_a_setting_existed_goes_on_without_a_word(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One from before there were several optimizers, too, and bit for bit."""
    flags, (new, old) = [*flags_of("token_model", world), "--lr_decay", 0.5], (tmp_path / "new", tmp_path / "old")
    for folder in (new, old):
        assert run_script(baseline, *world.train_flags(folder), *flags, "--max_steps", 2) == 0
    path = old / "checkpoints" / "token_model.state.pt"
    state = load_state(path, "token_model.state", print)
    del state["train_config"]["optimizer"]
    (state["optimizer"],) = state.pop("optimizers")
    save_checkpoint(path, "token_model.state", state)
    capsys.readouterr()
    for folder in (new, old):
        assert run_script(baseline, *world.train_flags(folder), *flags, "--max_steps", 4, "--resume") == 0
    said = capsys.readouterr().err
    assert said.count("resumed at step 2 of 4") == 2 and "another run" not in said
    assert said.count("is laid out anew for 4 steps: the rate goes on at") == 2
    one, two = weights(new, "token_model"), weights(old, "token_model")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_save_with_an_empty_group_goes_on(world: World, tmp_path: Path) -> None:
    """With Muon and a rate of its own for the table AdamW has no matrices; saves once told so."""
    flags = [*flags_of("token_model", world), "--optimizer", "muon", "--table_lr", 5]
    for folder in (tmp_path / "new", tmp_path / "old"):
        assert run_script(baseline, *world.train_flags(folder), *flags, "--max_steps", 2) == 0
    path = tmp_path / "old" / "checkpoints" / "token_model.state.pt"
    state = load_state(path, "token_model.state", print)
    groups = state["optimizers"][1]["param_groups"]
    assert len(groups) == 2 and all(group["params"] for group in groups)
    groups.insert(0, {**groups[0], "params": []})
    save_checkpoint(path, "token_model.state", state)
    for folder in (tmp_path / "new", tmp_path / "old"):
        assert run_script(baseline, *world.train_flags(folder), *flags, "--max_steps", 4, "--resume") == 0
    one, two = (weights(tmp_path / name, "token_model") for name in ("new", "old"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_noise_is_the_seeds_own(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each step's: also of a processor, whose generator takes 32 bits of a seed."""
    drawn: dict[int, list[float]] = {}
    monkeypatch.setattr(train_ae, "ae_loss", lambda model, chunks, **_: drawing(model, chunks, drawn[seed]))

    def drawing(model: Any, chunks: torch.Tensor, noise: list[float]) -> Any:
        noise.append(torch.rand(()).item())
        return ae_loss(model, chunks, kl_weight=1e-3, free_bits=0.5)

    for seed in (0, 1, 7):
        drawn[seed] = []
        flags = [*world.train_flags(tmp_path / str(seed)), *flags_of("ae", world), "--seed", seed, "--random_tokens", 0]
        assert run_script(train_ae, *flags, "--max_steps", 2) == 0
    assert len({value for values in drawn.values() for value in values}) == 6


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
    error = capsys.readouterr().err
    bad = tmp_path / "checkpoints" / "ae.bad_batch.pt"
    assert "the loss is nan" in error and "at step 2" in error and f"kept in {bad}" in error and "lower --lr" in error
    kept = torch.load(bad, weights_only=True)
    assert (kept["step"], kept["seed"]) == (2, 0) and kept["loss"] != kept["loss"]
    chunks = TrainWindows(PackedData(world.data / "train"), 4, 64, 0).batch(2)
    assert len(kept["batch"]) == 1 and torch.equal(kept["batch"][0], chunks)
    assert all(torch.equal(before[key], value) for key, value in weights(tmp_path, "ae").items())


def test_a_damaged_state_costs_the_steps_since_the_save_before(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags_of("ae", world), "--max_steps", 6, "--save_every", 2]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for folder in (cut, whole):
        assert run_script(train_ae, *world.train_flags(folder), *flags) == 0
    state = cut / "checkpoints" / "ae.state.pt"
    flipped = bytearray(state.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    state.write_bytes(flipped)
    assert run_script(train_ae, *world.train_flags(cut), *flags, "--resume") == 0
    error = capsys.readouterr().err
    assert f"{state} is damaged" in error and "going on from the save before it, step 4" in error
    assert "resumed at step 4 of 6" in error
    one, two = weights(cut, "ae"), weights(whole, "ae")
    assert all(torch.equal(one[key], two[key]) for key in one) and losses(cut) == losses(whole)


def test_a_line_cut_short_is_no_end(tmp_path: Path) -> None:
    """As a full disk leaves it; --resume drops it."""
    assert not training_ended(tmp_path)
    for text, ended in (('{"step": 1}\n', False), ('{"step": 2, "final": true}\n', True), ('{"step": 2, "fin', False)):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert training_ended(tmp_path) == ended


def test_tensorboard_shows_what_metrics_say(world: World, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    flags = [*world.train_flags(tmp_path), *flags_of("ae", world), "--eval_every", 2]
    assert run_script(train_ae, *flags, "--max_steps", 3) == 0  # the steps before --tensorboard are shown, too
    assert run_script(train_ae, *flags, "--max_steps", 5, "--resume", "--tensorboard") == 0
    with open(tmp_path / "run/metrics.jsonl", "a") as file:  # a killed run has logged more than it saved
        file.write(json.dumps({"time": 9.0, "step": 8, "loss": 77.0}) + '\n{"time": 9.1, "st')
    assert run_script(train_ae, *flags, "--max_steps", 7, "--resume", "--tensorboard") == 0
    shown = event_accumulator.EventAccumulator(str(tmp_path / "run"), size_guidance={"scalars": 0}).Reload()
    events = sorted((tag, e.step, e.value) for tag in shown.Tags()["scalars"] for e in shown.Scalars(tag))
    expected = []
    for line in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()):
        group, step = "final/" if line.pop("final", False) else "", line.pop("step")
        expected += [(group + key, step, value) for key, value in line.items() if key != "time"]
    expected.sort()
    assert [e[:2] for e in events] == [e[:2] for e in expected]
    assert [e[2] for e in events] == pytest.approx([e[2] for e in expected])
    tags = {e[:2] for e in expected}
    assert {("loss", 1), ("loss", 7), ("val_kl", 4), ("kl", 7), ("final/kl", 7)} <= tags and ("loss", 8) not in tags


def test_tensorboard_that_is_not_installed(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    flags = [*world.train_flags(tmp_path), *flags_of("ae", world)]
    assert run_script(train_ae, *flags, "--max_steps", 1, "--tensorboard") == 2
    assert "pip install tensorboard" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_sigterm_saves_and_ends_well(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*world.train_flags(tmp_path), *flags_of("ae", world), "--max_steps", 6]
    true_loss, steps = train_ae.ae_loss, []

    def signalled(*a: Any, **k: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_loss(*a, **k)

    monkeypatch.setattr(train_ae, "ae_loss", signalled)
    handler = signal.getsignal(signal.SIGTERM)
    assert run_script(train_ae, *flags) == 0
    assert len(steps) == 3 and signal.getsignal(signal.SIGTERM) == handler
    assert "stopped at step 3 of 6" in (tmp_path / "run/log.txt").read_text()
    assert run_script(train_ae, *flags, "--resume") == 0
    assert len(steps) == 6 and [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


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


def test_what_decays_and_at_what_rate() -> None:
    model = make_student(local_memory=True)
    for choice in ("adamw", "muon", "muon_all"):
        made = optimizers(model, StudentTrainConfig(optimizer=choice, table_lr=5.0, weight_decay=0.1))
        decay = {id(p): group["weight_decay"] for x in made for group in x.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            expected = 0.1 / 5 if p is model.table else 0.1 if p.ndim > 1 else 0.0
            assert decay[id(p)] == pytest.approx(expected), name


def test_every_group_has_its_rate_and_gradients_are_clipped(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, norms = [], []

    def kept(*args: Any) -> Any:
        made.extend(optimizers(*args))
        for x in made:
            x.register_step_pre_hook(
                lambda x, *_: norms.append(sum(p.grad.square().sum() for g in x.param_groups for p in g["params"]))
            )
        return made

    monkeypatch.setattr(loop, "optimizers", kept)
    flags = [
        *world.train_flags(tmp_path),
        *flags_of("token_model", world),
        "--optimizer",
        "muon",
        "--table_lr",
        5,
        "--lr",
        0.01,
    ]
    assert run_script(baseline, *flags, "--max_steps", 3, "--warmup_steps", 0, "--lr_decay", 1.0, "--grad_clip", 0.01) == 0
    rates = [group["lr"] for x in made for group in x.param_groups]
    assert rates == pytest.approx([0.01 / 3, 0.01 / 3, 0.05 / 3])
    assert (norms[0] + norms[1]).sqrt().item() == pytest.approx(0.01, rel=1e-3)
