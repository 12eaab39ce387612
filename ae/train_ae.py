"""Train the autoencoder on packed data.

    python ae/train_ae.py --config configs/ae_default.yaml --data data/packed

Writes checkpoint_dir/ae.pt and run_dir/ (config, metrics.jsonl, log). The final validation covers the whole
validation split: reconstruction is the arg max from the posterior's mean, counted per token and per chunk.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ae.ae_model import AEConfig, Autoencoder
from ae.chunks import PackedData, TrainWindows, tokenizer_record
from ae.initialise import copy_embedding
from ae.layers import heads_of
from ae.losses import MAX_LOGITS, ae_loss, kl_to_unit_gaussian
from configs import loop, plan
from configs.errors import run_cli
from configs.schema import AETrainConfig, parse_config

NOISE = 0.3  # standard deviation of the noise on the latent in the noisy figures
DEAD = 0.01  # a dimension whose mean varies less than this over chunks carries nothing (active units, arXiv 1509.00519)


@torch.no_grad()
def reconstruction(
    model: Autoencoder, data: PackedData, device: torch.device, bf16: bool, limit: int | None = None
) -> dict[str, Any]:
    """Reconstruction of a split's chunks (all, or the first `limit`): shares of exact chunks and tokens, clean and noisy.

    posterior_std: mean scale of the posterior; kl: nats a chunk; dead_dims: dimensions whose mean hardly varies. Raises
    UserError for a split without a chunk.
    """
    model.eval()
    torch.manual_seed(0)
    batch = max(1, min(2048, MAX_LOGITS // (model.cfg.k * model.cfg.vocab_size)))
    n = 0
    exact = torch.zeros(4, dtype=torch.int64)  # chunks, tokens, noisy chunks, noisy tokens
    moments = torch.zeros(2, model.cfg.latent_dim, dtype=torch.float64)
    std = kl = 0.0
    for chunks in data.batches(model.cfg.k, batch, limit):
        chunks = chunks.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            mean, log_std = model.posterior(chunks)
            right = [model.logits(model.decode(z)).argmax(-1) == chunks for z in (mean, mean + NOISE * torch.randn_like(mean))]
        exact += torch.stack([c for r in right for c in (r.all(-1).sum(), r.sum())]).cpu()
        moments += torch.stack([mean.sum(0), mean.square().sum(0)]).double().cpu()
        std += log_std.exp().mean().item() * len(chunks)
        kl += kl_to_unit_gaussian(mean, log_std).sum().item()
        n += len(chunks)
    model.train()
    variance = moments[1] / n - (moments[0] / n).square()
    chunk, token, noisy_chunk, noisy_token = (exact / torch.tensor([n, n * model.cfg.k] * 2)).tolist()
    return {
        "chunk_exact": chunk,
        "token_exact": token,
        "noisy_chunk_exact": noisy_chunk,
        "noisy_token_exact": noisy_token,
        "posterior_std": std / n,
        "kl": kl / n,
        "dead_dims": int((variance < DEAD).sum()),
        "chunks": n,
    }


def main() -> None:
    cfg = parse_config(AETrainConfig, __doc__)
    train, val = PackedData.pair(cfg.data)
    shape = AEConfig(train.vocab_size, cfg.k, cfg.latent_dim, cfg.embed_dim, cfg.num_layers)
    windows = TrainWindows(train, cfg.k, cfg.batch_size, cfg.seed)
    val.require_window(cfg.k)
    total = loop.total_steps(cfg, windows.steps_per_epoch)
    setup = loop.start("ae", cfg)
    with plan.unreal(cfg):
        model = Autoencoder(shape)
    if cfg.init_from and not cfg.dry_run:
        setup.run.log(f"ae: {copy_embedding(model, cfg.init_from, train.fingerprint)}")
    plan.place(model, setup.device)
    if cfg.embed_dim % (even := 2 * heads_of(cfg.embed_dim)):
        setup.run.log(f"ae: --embed_dim {cfg.embed_dim} is no multiple of {even}: no student with a local decoder can use it")
    setup.run.log(f"ae: {sum(p.numel() for p in model.parameters()):,} parameters, {total} steps of {cfg.batch_size} chunks")

    def loss(chunks: Tensor) -> loop.Losses:
        return ae_loss(
            model, chunks, kl_weight=cfg.kl_weight, free_bits=cfg.free_bits, l2_weight=cfg.l2_weight,
            latent_dropout=cfg.latent_dropout, token_mask=cfg.token_mask,
        )  # fmt: skip

    n_random, size = round(cfg.random_tokens * cfg.batch_size), train.vocab_size

    def batch_at(step: int) -> tuple[Tensor, ...]:
        chunks = windows.batch(step)  # (B, K)
        chunks[:n_random] = torch.randint(size, (n_random, cfg.k))
        return (chunks,)

    def validate(full: bool) -> dict[str, Any]:
        return reconstruction(model, val, setup.device, setup.bf16, None if full else 4096)

    if cfg.dry_run:
        return plan.show("ae", model, cfg, setup, total, cfg.batch_size * cfg.k, batch_at, loss)
    content = {
        "config": asdict(model.cfg),
        "tokenizer": tokenizer_record(train, cfg.checkpoint_dir),
        "train_tokens": train.n_tokens,
        "train_config": asdict(cfg),
    }
    figures = loop.fit("ae", model, cfg, setup, total, cfg.batch_size * cfg.k, batch_at, loss, validate, content)
    setup.run.log(
        f"ae: {figures['chunk_exact']:.2%} of {figures['chunks']:,} validation chunks exact "
        f"({figures['token_exact']:.3%} of tokens), "
        f"{figures['noisy_chunk_exact']:.2%} with N(0, {NOISE}) noise on the latent; "
        f"posterior std {figures['posterior_std']:.3f}, {figures['dead_dims']} of {cfg.latent_dim} dimensions dead"
    )
    if setup.here.first:
        print(json.dumps(figures))


if __name__ == "__main__":
    run_cli(main)
