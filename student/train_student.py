"""Train the student on packed data, starting from a trained autoencoder.

    python student/train_student.py --config configs/student_default.yaml --data data/packed --ae_ckpt checkpoints/ae.pt

Writes checkpoint_dir/student.pt and run_dir/ (config, metrics.jsonl, log). Controls: `--latents none` (local decoder
alone), `--local_decoder none` (independent positions), `--head energy` (CALM).

`--use_kd` distills from the teacher in .env: its text is the training text, its logprobs are soft targets. What the store
lacks is harvested first, from the beginnings of --data's documents; `kd/harvest.py` and `kd/kd_batcher.py` do both apart.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ae.ae_model import AEConfig, Autoencoder, load_ae
from ae.chunks import PackedData, TrainWindows, tokenizer_record
from configs import loop, plan
from configs.errors import UserError, run_cli
from configs.run import check_fingerprint, weights_digest
from configs.schema import AETrainConfig, StudentTrainConfig, parse_config
from student.baseline import backbone_fields, mean_nll
from student.distillation import open_teacher, shift_right
from student.initialise import copy_backbone
from student.losses import counts, student_energy_loss, student_loss
from student.student_model import Student, StudentConfig


def pad_left(tokens: Tensor, k: int, pad_id: int, share: float, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Shift a share of the windows (B, T) right behind 1..k-1 pads; returns tokens and the pads of each row, (B,)."""
    rng = np.random.default_rng([seed, step, 1])
    count = rng.integers(1, k, len(tokens)) * (rng.random(len(tokens)) < share) if k > 1 else np.zeros(len(tokens), np.int64)
    pads = torch.from_numpy(count)
    return shift_right(tokens, pads, pad_id), pads


def planned_ae(cfg: StudentTrainConfig) -> tuple[Autoencoder, dict[str, Any]]:
    """For a dry run: the autoencoder of --ae_ckpt; where none is trained yet, one of the default shape for --data's words."""
    if Path(cfg.ae_ckpt).exists():
        return load_ae(cfg.ae_ckpt)
    data, default = PackedData(Path(cfg.data) / "train"), AETrainConfig()
    k, latent_dim = cfg.k or default.k, cfg.latent_dim or default.latent_dim
    shape = AEConfig(data.vocab_size, k, latent_dim, default.embed_dim, default.num_layers)
    print(f"{cfg.ae_ckpt} does not exist: planning with {shape}", file=sys.stderr)
    return Autoencoder(shape), {"tokenizer": {"fingerprint": data.fingerprint}}


def main() -> None:
    cfg = parse_config(StudentTrainConfig, __doc__)
    with plan.unreal(cfg):
        frozen, ae_content = planned_ae(cfg) if cfg.dry_run else load_ae(cfg.ae_ckpt)
    ae = frozen.cfg
    for name in ("k", "latent_dim"):
        asked, has = getattr(cfg, name), getattr(ae, name)
        if asked is not None and asked != has:
            raise UserError(
                f"--{name} {asked} disagrees with {cfg.ae_ckpt}, which has {name} {has}; leave the flag out or train another AE"
            )
    data = str((cfg.use_kd and cfg.kd_data) or cfg.data)
    text = PackedData(Path(data) / "train")  # a teacher's answers are packed with the same tokenizer
    check_fingerprint(ae_content["tokenizer"]["fingerprint"], text.fingerprint, cfg.ae_ckpt, data)
    cfg.k, cfg.latent_dim = ae.k, ae.latent_dim
    if cfg.latents == "none":
        cfg.mse_w = 0.0  # no latent is predicted
    shape = StudentConfig(
        **backbone_fields(cfg), k=ae.k, vocab_size=ae.vocab_size, latent_dim=ae.latent_dim, embed_dim=ae.embed_dim,
        ae_layers=ae.num_layers, local_layers=cfg.local_layers, local_window=cfg.local_window, pad_id=text.pad_id,
        local_decoder=cfg.local_decoder, head=cfg.head, latents=cfg.latents, local_qk_norm=cfg.local_qk_norm,
        local_memory=cfg.local_memory, latent_bypass=cfg.latent_bypass, local_tokens=cfg.local_tokens,
        local_ffn_dim=cfg.local_ffn_dim,
    )  # fmt: skip
    teacher = open_teacher(cfg, shape.context) if cfg.use_kd else None  # may cost money: after all that can be checked before
    train, val = PackedData.pair(teacher.folder) if teacher else PackedData.pair(cfg.data)
    windows = TrainWindows(train, shape.context, cfg.batch_size, cfg.seed)
    val.require_window(shape.context)
    total = loop.total_steps(cfg, windows.steps_per_epoch)
    setup = loop.start("student", cfg)
    with plan.unreal(cfg):
        model = Student(shape)
        model.ae.load_state_dict(frozen.state_dict())
    if cfg.init_from and not cfg.dry_run:
        setup.run.log("student: " + copy_backbone(model, cfg.init_from))
    plan.place(model, setup.device)
    frozen.requires_grad_(False)
    if cfg.mse_w or cfg.head == "energy":  # else nothing reads it any more
        plan.place(frozen, setup.device)
    setup.run.log(f"student: {sum(p.numel() for p in model.parameters()):,} parameters, {total} steps, k {ae.k}")
    if cfg.head == "energy":
        setup.run.log("student: the energy head trains by the energy score alone; ce_w, mse_w, base_w and kd_w are not used")
    ce_w = teacher.say(setup.run.log, cfg) if teacher else 1.0 if cfg.ce_w is None else cfg.ce_w

    def loss(tokens: Tensor, pads: Tensor, n_tokens: Tensor, n_chunks: Tensor, *rows: Tensor) -> loop.Losses:
        counted = n_tokens, n_chunks
        if cfg.head == "energy":
            return student_energy_loss(model, frozen, tokens, pads, counted)
        kd = teacher.divergence(cfg, model.table, rows, tokens) if teacher else None
        ce_at = teacher.hard(cfg, rows) if teacher else None
        return student_loss(
            model, frozen, tokens, pads, ce_w=ce_w, ce_at=ce_at, mse_w=cfg.mse_w, base_w=cfg.base_w, kd_w=cfg.kd_w, kd=kd,
            counted=counted,
        )  # fmt: skip

    def batch_at(step: int) -> tuple[Tensor, ...]:
        tokens, pads = pad_left(windows.batch(step), ae.k, model.cfg.pad_id, cfg.pad_share, cfg.seed, step)
        rows = teacher.rows(windows.starts(step), shape.context, pads) if teacher else ()
        return tokens, pads, *counts(tokens, pads, ae.k), *rows

    @torch.no_grad()
    def validate(_: bool) -> dict[str, Any]:
        if cfg.head == "direct":
            kl = teacher.validate(model, setup, cfg.eval_windows) if teacher else {}
            return mean_nll(model, val, setup, cfg.eval_windows) | kl
        model.eval()
        torch.manual_seed(0)
        total, n = 0.0, 0
        for tokens in val.batches(model.cfg.context, 8, cfg.eval_windows):
            tokens = tokens.to(setup.device)
            energy = student_energy_loss(model, frozen, tokens, tokens.new_zeros(len(tokens)))[0].item()
            total, n = total + energy * len(tokens), n + len(tokens)
        model.train()
        return {"energy": total / n}

    tokens_per_step = cfg.batch_size * model.cfg.context
    if cfg.dry_run:
        return plan.show("student", model, cfg, setup, total, tokens_per_step, batch_at, loss)
    content = {
        "config": asdict(model.cfg),
        "tokenizer": tokenizer_record(train, cfg.checkpoint_dir),
        "train_tokens": train.n_tokens,
        "train_config": asdict(cfg),
        "distillation": teacher.about() if teacher else None,
        "autoencoder": weights_digest(frozen) if cfg.mse_w or cfg.head == "energy" else None,  # whose latents are aimed at
    }
    figures = loop.fit("student", model, cfg, setup, total, tokens_per_step, batch_at, loss, validate, content)
    if setup.here.first:
        print(json.dumps(figures))


if __name__ == "__main__":
    run_cli(main)
