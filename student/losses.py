"""The student's losses: a total and its named parts.

Legend: `B` batch, `L` chunks, `K` tokens a chunk, `T` = L * K, `D` latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ae.ae_model import Autoencoder
from ae.losses import weighted_nll
from student.energy import MODEL_SAMPLES, TARGET_SAMPLES, energy_loss
from student.student_model import Student


def counts(tokens: Tensor, pads: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What the means over a batch divide by: its tokens that are no pads, and its chunks without pads."""
    return tokens.numel() - pads.sum(), (tokens.numel() // k - (pads > 0).sum()).clamp(min=1)  # all may have pads


def whole(pads: Tensor, chunks: int) -> Tensor:
    """Which chunks have no pads: pads (B,), all in a row's first chunk -> (B, chunks)."""
    return (pads == 0)[:, None] | (torch.arange(chunks, device=pads.device) > 0)


def student_loss(
    model: Student,
    frozen: Autoencoder | None,
    tokens: Tensor,
    pads: Tensor,
    *,
    ce_w: float,
    ce_at: Tensor | None = None,
    mse_w: float = 0.0,
    base_w: float = 0.0,
    kd_w: float = 0.0,
    kd: Callable[[Tensor], Tensor] | None = None,
    counted: Sequence[Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """tokens (B, T) of which the first pads[b] of a row are padding -> total loss and parts, nats (mse: per dimension).

    ce: mean token cross-entropy under the exact conditional; ce_at (B, T) marks the positions that learn from it, unset: all.
    mse: squared error between the predicted latents and the frozen autoencoder's mean of the true chunks. base:
    cross-entropy of the parallel logits alone. kd: states (B, T, E) to their divergence from a teacher, such as
    `kd.losses.mean_kl`. Pads carry no loss. counted: what the means divide by, where it is not `counts` of these rows (of
    a part of a batch: its share of the whole batch's).
    """
    z_hat, g = model.predict(tokens)  # (B, L, D), (B, T, E)
    states = model.token_states(tokens, g)  # (B, T, E)
    real = torch.arange(tokens.shape[1], device=tokens.device) >= pads[:, None]  # (B, T)
    count, n_chunks = counted or counts(tokens, pads, model.cfg.k)

    each = real.flatten() / count  # weights of a mean over the tokens that are no pads
    learnt, nll = weighted_nll(
        states.flatten(0, 1), model.table, tokens.flatten(), each if ce_at is None else each * ce_at.flatten(),
        learn=ce_w > 0 or kd is None,
    )  # fmt: skip
    total, parts = ce_w * learnt, {"ce": (nll * each).sum()}
    if kd is not None:
        divergence = kd(states)
        total, parts["kl"] = total + kd_w * divergence, divergence.detach()
    if base_w:
        base, _ = weighted_nll(g.flatten(0, 1), model.table, tokens.flatten(), each)
        total, parts["base"] = total + base_w * base, base.detach()
    if mse_w:
        assert frozen is not None
        with torch.no_grad():
            mean, _ = frozen.encode(tokens.unflatten(1, (-1, model.cfg.k)))  # (B, L, D)
        error = (z_hat.float() - mean.float()).square().mean(-1)
        mse = (error * whole(pads, z_hat.shape[1])).sum() / n_chunks
        total, parts["mse"] = total + mse_w * mse, mse.detach()
    return total, parts


def student_energy_loss(
    model: Student, frozen: Autoencoder, tokens: Tensor, pads: Tensor, counted: Sequence[Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """CALM's energy score between samples of the head and of the frozen autoencoder's posterior, (B, T) -> total, parts."""
    h = model.backbone_states(tokens)  # (B, L, H)
    samples = model.exit(h.expand(MODEL_SAMPLES, *h.shape)).float()  # (N, B, L, D)
    with torch.no_grad():
        mean, log_std = frozen.posterior(tokens.unflatten(1, (-1, model.cfg.k)))
        targets = mean + log_std.exp() * torch.randn(TARGET_SAMPLES, *mean.shape, device=mean.device)  # (M, B, L, D)
    _, n_chunks = counted or counts(tokens, pads, model.cfg.k)
    loss = (energy_loss(samples, targets) * whole(pads, h.shape[1])).sum() / n_chunks
    return loss, {"energy": loss.detach()}
