"""A dry run's figures against a real model's, and that it takes neither the memory nor writes a file."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_AE, SMALL_LM, World, make_ae, make_student, run_script
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ae import train_ae
from ae.chunks import PackedData, PackedWriter
from configs import loop, plan
from configs.schema import LMTrainConfig, StudentTrainConfig
from student import baseline, train_student
from student.flops import optimizer_flops, training_flops
from student.losses import student_loss
from student.student_model import load_student

MEASURE = plan.matmul_rate
SETUP = loop.Setup(loop.NoRun(says=False), torch.device("cpu"), False, False, loop.World())


@pytest.fixture(autouse=True)
def rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A known one: no second spent on each dry run."""
    monkeypatch.setattr(plan, "matmul_rate", lambda device, bf16: 1e10)


def test_the_rate_is_that_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that moves on by a quarter of a second whenever it is read: three products in the first full second, after
    one that loads the library."""
    ticks = itertools.count()
    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 4))
    with FlopCounterMode(display=False) as done:
        assert MEASURE(SETUP.device, False, 1.0) == pytest.approx(2 * 1024**3 * 3)
    assert done.get_total_flops() == 2 * 1024**3 * 4


def planned(module: object, capsys: pytest.CaptureFixture[str], *flags: object) -> dict[str, Any]:
    capsys.readouterr()
    assert run_script(module, *flags, "--dry_run") == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def real_bytes(model: nn.Module, cfg: LMTrainConfig, loss: Tensor) -> tuple[int, int, int]:
    """Weights, gradients and optimizer states of a real step."""
    loss.backward()
    states = []
    for optimizer in loop.optimizers(model, cfg):
        optimizer.step()
        states += [x for state in optimizer.state.values() for x in state.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return tuple(sum(x.numel() * x.element_size() for x in xs) for xs in (model.parameters(), gradients, states))  # type: ignore[return-value]


def make_step(**changes: Any) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """A student of 640 words, its loss and a batch."""
    model = make_student(hidden_dim=64, ffn_dim=128, vocab_size=640, embed_dim=32, **changes).train()
    frozen = make_ae(vocab_size=640, latent_dim=8, embed_dim=32).requires_grad_(False)
    batch = torch.randint(2, 640, (4, model.cfg.context)), torch.tensor([0, 0, 1, 2])
    return model, lambda tokens, pads: student_loss(model, frozen, tokens, pads, ce_w=1.0, mse_w=1.0), batch


def test_weights_gradients_and_optimizer_are_the_real_ones(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    short = 8  # a window in which attention, which the plan does not count, is little beside the products
    flags = [*SMALL_LM, "--ae_ckpt", world.ae, "--local_memory", "--local_window", short]
    told = planned(train_student, capsys, *world.train_flags(), *flags)
    memory = told["memory"]["1 process"]
    model, _ = load_student(world.student)
    tokens, pads = torch.randint(2, 320, (4, model.cfg.context)), torch.zeros(4, dtype=torch.long)
    loss, _ = student_loss(model.train(), model.ae, tokens, pads, ce_w=1.0, mse_w=1.0)
    assert real_bytes(model, StudentTrainConfig(), loss) == (memory["parameters"], memory["gradients"], memory["optimizer"])
    flops = training_flops(dataclasses.replace(model.cfg, local_window=short), StudentTrainConfig())
    assert told["flops_per_step"] == pytest.approx(flops * tokens.numel(), rel=0.1)
    assert told["tokens_per_s"] * told["seconds_per_step"] == pytest.approx(tokens.numel())
    with_muon = planned(train_student, capsys, *world.train_flags(), *flags, "--optimizer", "muon_all")
    more = with_muon["flops_per_step"] - told["flops_per_step"]
    assert more == with_muon["memory"]["1 process"]["optimizer_flops"] > 0  # once a step
    assert more == optimizer_flops(model.cfg, StudentTrainConfig(optimizer="muon_all"))
    checkpoint, state = (world.student.with_name(name).stat().st_size for name in ("student.pt", "student.state.pt"))
    assert told["disk_bytes"] == pytest.approx(checkpoint + 3 * state, rel=0.5)  # so small that the headers count


def test_fake_tensors_take_what_real_ones_take() -> None:
    """And what stays for the backward pass is what autograd saves."""
    model, loss_of, batch = make_step()
    real = plan.measure(model, LMTrainConfig(), loss_of, batch, SETUP)
    saved: dict[int, tuple[Tensor, int]] = {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = x, storage.nbytes()  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss_of(*batch)
    assert real.activations == pytest.approx(sum(size for _, size in saved.values()), rel=0.1)
    with plan.unreal(LMTrainConfig(dry_run=True, device="cpu")):
        fake_model, fake_loss, _ = make_step()
        fake_batch = tuple(plan._fake().from_tensor(x) for x in batch)
        fake = plan.measure(fake_model, LMTrainConfig(), fake_loss, fake_batch, SETUP)
    for field, value in vars(real).items():  # real tensors also see a few numbers that fake ones fold away
        assert getattr(fake, field) == pytest.approx(value, rel=0.01), field


def test_live_bytes_by_hand() -> None:
    a = torch.zeros(100)
    with plan.LiveBytes() as live:
        b = a + 1  # 400 bytes given, 400 made
        c = b.view(10, 10).T  # none
        d = torch.cat([b, b])  # 800
        assert (live.given, live.now, live.peak) == (400, 1200, 1200)
        del b
        assert live.now == 1200  # the view holds it
        del c, d
        assert (live.now, live.peak) == (0, 1200)


def test_checkpointing_keeps_less_and_computes_more(packed: World, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*packed.train_flags(), *SMALL_LM, "--num_layers", 4, "--k", 4]
    plain, less, half = (
        planned(baseline, capsys, *flags, *more) for more in ((), ("--activation_checkpointing",), ("--grad_accum", 2))
    )
    kept, less_kept, half_kept = (x["memory"]["1 process"]["activations"] for x in (plain, less, half))
    assert less_kept < 0.7 * kept and less["flops_per_step"] > 1.05 * plain["flops_per_step"]
    assert half_kept == pytest.approx(kept / 2, rel=0.2) and half["flops_per_step"] == pytest.approx(plain["flops_per_step"])


def test_what_several_processes_take() -> None:
    """Buckets are never freed; what --fsdp holds whole is all but the layers, twice, and three times a layer."""
    model = make_student()
    layer = sum(4 * p.numel() for p in model.backbone.layers[0].parameters())
    whole = sum(4 * p.numel() for p in model.parameters())
    one = plan.Memory(whole, 10, whole, 2 * whole, 1000, -500, 4 * whole + 510, 0, 0)
    many, shards = plan.data_parallel(one), plan.sharded(plan.data_parallel(one), model, 4)
    assert (many.rest, many.peak) == (0, 4 * whole + 1010)
    assert (shards.parameters, shards.optimizer) == (whole // 4, 2 * whole // 4)
    assert shards.peak == whole + 1010 + 2 * (whole - 2 * layer) + 3 * layer


def test_nothing_is_written(packed: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for module, flags in ((train_ae, SMALL_AE), (train_student, [*SMALL_LM, "--k", 4])):
        planned(module, capsys, "--data", packed.data, *flags, "--device", "cpu")
    assert not list(tmp_path.iterdir())
    assert run_script(baseline, "--data", packed.data, *SMALL_LM, "--k", 4, "--dry_run", "--grad_accum", 3) == 2
    assert "--batch_size 4: expected a multiple of --grad_accum 3" in capsys.readouterr().err


def test_the_cards_student_is_planned_without_its_memory(packed: World, tmp_path: Path) -> None:
    """3 GB of weights and 14 GB in all with AdamW, in a process of less than one."""
    meta = PackedData(packed.data / "train").meta
    for split in ("train", "val"):
        writer = PackedWriter(tmp_path / split, 151_936)
        writer.add(np.arange(9000))
        kept = {key: meta[key] for key in ("tokenizer_fingerprint", "tokenizer", "eot_id", "pad_id")}
        writer.close(**kept, vocab_size=151_936)
    command = [sys.executable, "student/train_student.py", "--config", "configs/student_default.yaml", "--data", str(tmp_path)]
    command += ["--dry_run", "--optimizer", "adamw", "--batch_size", "4", "--grad_accum", "1", "--device", "cpu", "--ae_ckpt"]
    command.append(str(tmp_path / "none.pt"))
    script = f"import resource, subprocess; print(subprocess.run({command!r}, capture_output=True, text=True).stdout)\n"
    script += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    *_, line, _, peak = done.stdout.splitlines()
    memory = json.loads(line)["memory"]["1 process"]
    assert memory["parameters"] > 3e9 and memory["peak"] > 12e9 and int(peak) < 1.5e9
