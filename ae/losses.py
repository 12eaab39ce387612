"""Losses of the autoencoder, and the token cross-entropy that every model here uses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ae.ae_model import Autoencoder

MAX_LOGITS = 1 << 26  # elements of a logits buffer: a quarter of a GiB in float32


def _nll(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ table.T).float(), targets, reduction="none")


def token_nll(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden table^T)[target], nats: hidden (N, E), table (V, E), targets (N,) -> (N,).

    With a large vocabulary the (N, V) logits are made a slice of rows at a time and again in the backward pass, so that
    memory stays bounded whatever N * V is.
    """
    rows = max(1, MAX_LOGITS // table.shape[0])
    if hidden.shape[0] <= rows:
        return _nll(hidden, table, targets)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_nll(h, table, t) for h, t in parts])
    return torch.cat([checkpoint(_nll, h, table, t, use_reentrant=False) for h, t in parts])  # type: ignore[list-item]


def kl_to_unit_gaussian(mean: Tensor, log_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(0, 1)) of each dimension, nats."""
    return 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std


def ae_loss(
    model: Autoencoder,
    chunks: Tensor,
    *,
    kl_weight: float,
    free_bits: float,
    l2_weight: float = 0.0,
    latent_dropout: float = 0.15,
    token_mask: float = 0.15,
) -> tuple[Tensor, dict[str, Tensor]]:
    """K * CE + kl_weight * sum_d max(free_bits, KL_d) + l2_weight * |mean|^2, averaged over chunks (B, K).

    Returns the total and its parts.

    Posterior noise, latent dropout and token masking are what make nearby latents decode alike (CALM, section 2.2).
    """
    mean, log_std = model.encode(chunks, token_mask)
    mean, log_std = mean.float(), log_std.float().clamp(-6, 2)
    z = mean + log_std.exp() * torch.randn_like(mean)  # (B, D)
    g = model.decode(F.dropout(z, latent_dropout))  # (B, K, E)
    ce = token_nll(g.flatten(0, 1), model.embedding.weight, chunks.flatten()).mean()
    kl_by_dim = kl_to_unit_gaussian(mean, log_std)
    total = chunks.shape[1] * ce + kl_weight * kl_by_dim.clamp(min=free_bits).sum(-1).mean()
    if l2_weight:
        total = total + l2_weight * mean.square().sum(-1).mean()
    parts = {"ce": ce.detach(), "kl": kl_by_dim.detach().sum(-1).mean(), "posterior_std": log_std.detach().exp().mean()}
    return total, parts
