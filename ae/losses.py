"""Losses of the autoencoder, and the token cross-entropy that every model here uses."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ae.ae_model import Autoencoder

MAX_LOGITS = 1 << 26  # elements of a logits buffer: a quarter of a GiB in float32
CACHED_LOGITS = 1 << 24  # elements up to which fewer, larger slices gain nothing
MIN_ROWS = 512  # rows of a slice, MAX_LOGITS permitting: each adds to the whole of the table's gradient


def _nll(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ table.T).float(), targets, reduction="none")


def token_nll(hidden: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(hidden table^T)[target], nats: hidden (N, E), table (V, E), targets (N,) -> (N,).

    With a large vocabulary the (N, V) logits are made a slice of rows at a time and again in the backward pass, so that
    memory stays bounded whatever N * V is. What is trained on is cheaper by `weighted_nll`.
    """
    rows = max(1, MAX_LOGITS // table.shape[0])
    if hidden.shape[0] <= rows:
        return _nll(hidden, table, targets)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_nll(h, table, t) for h, t in parts])
    return torch.cat([checkpoint(_nll, h, table, t, use_reentrant=False) for h, t in parts])  # type: ignore[list-item]


class _WeightedNLL(torch.autograd.Function):
    """Makes the gradients while a slice's logits are at hand: three products with the table and no (N, V) tensor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        to_hidden, to_table = ctx.needs_input_grad[:2]  # a frozen table needs no buffer of its size
        words, nlls, grads = table.to(dtype), [], []
        grad_table = torch.zeros_like(table, dtype=torch.float32) if to_table else None
        for h, target, weight in zip(hidden.to(dtype).split(rows), targets.split(rows), weights.split(rows), strict=True):
            logprobs, target, weight = F.log_softmax(h @ words.T, -1, dtype=torch.float32), target[:, None], weight[:, None]
            nlls.append(-logprobs.gather(1, target).squeeze(1))
            error = logprobs.exp_().scatter_add_(1, target, -torch.ones_like(weight)).mul_(weight).to(dtype)  # (rows, V)
            if to_hidden:
                grads.append(error @ words)
            if grad_table is not None:
                grad_table += error.T @ h
        nll = torch.cat(nlls)
        ctx.save_for_backward(
            torch.cat(grads).to(hidden.dtype) if to_hidden else None, None if grad_table is None else grad_table.to(table.dtype)
        )
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, table = ctx.saved_tensors
        return None if hidden is None else hidden * grad, None if table is None else table * grad, None, None, None


def weighted_nll(
    hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor | None = None, learn: bool = True
) -> tuple[Tensor, Tensor]:
    """Sum of weights * `token_nll`, and the `token_nll` of each row, (N,), which carries no gradient.

    weights: (N,) float32, unset: 1 / N each, so that the sum is the mean; they get no gradient. What the sum is for is
    known here, so its gradients are made in the forward pass, a slice of rows at a time, as in Liger (arXiv 2410.10989);
    without `learn` there are none, for a sum that is only reported.
    The largest buffer has max(MIN_ROWS * V, CACHED_LOGITS) elements and never more than MAX_LOGITS (of a row at least).
    """
    if weights is None:
        weights = torch.full(targets.shape, 1 / len(targets), device=hidden.device)
    if not (learn and torch.is_grad_enabled()):
        with torch.no_grad():
            nll = token_nll(hidden, table, targets)
            return (nll * weights).sum(), nll
    vocabulary = table.shape[0]
    rows = max(1, min(max(MIN_ROWS, CACHED_LOGITS // vocabulary), MAX_LOGITS // vocabulary))
    return _WeightedNLL.apply(hidden, table, targets, weights, rows)  # type: ignore[no-untyped-call, no-any-return]


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
    mean, log_std = model.posterior(chunks, token_mask)
    z = mean + log_std.exp() * torch.randn_like(mean)  # (B, D)
    g = model.decode(F.dropout(z, latent_dropout))  # (B, K, E)
    ce, _ = weighted_nll(g.flatten(0, 1), model.embedding.weight, chunks.flatten())
    kl_by_dim = kl_to_unit_gaussian(mean, log_std)
    total = chunks.shape[1] * ce + kl_weight * kl_by_dim.clamp(min=free_bits).sum(-1).mean()
    if l2_weight:
        total = total + l2_weight * mean.square().sum(-1).mean()
    parts = {"ce": ce.detach(), "kl": kl_by_dim.detach().sum(-1).mean(), "posterior_std": log_std.detach().exp().mean()}
    return total, parts
