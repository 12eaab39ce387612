"""What the student loses against the teacher's top-k logprobs: a true KL over k+1 buckets.

A server tells the k likeliest words and their logprobs, not the rest. Renormalising the k makes the student over-confident,
and summing p log(p/q) over them alone can turn negative. Here "everything else" is one more bucket on both sides, so that
the loss is a KL divergence between two distributions: at least 0, and 0 only where all k+1 masses agree. With k = V it is
the dense KL.

Legend: `N` positions, `E` embedding width, `V` vocabulary, `k` words that the teacher told.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 1 << 26  # elements of a logits buffer: a quarter of a GiB in float32
NOTHING = -1e30  # the logit of an empty bucket; finite, so that 0 times it is 0


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 without cancellation on either side of -log 2; -inf at 0."""
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())


def teacher_buckets(top_ids: Tensor, top_logprobs: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """Log masses of the k words and of the rest, (N, k) -> (N, k + 1); -inf for a missing word and for no rest.

    Logprobs that add up to more than 1 (float16 rounds) are scaled down to 1.
    """
    known = top_ids >= 0
    words = top_logprobs.masked_fill(~known, -torch.inf)
    rest = log1mexp(words.logsumexp(-1).clamp(max=0)).masked_fill(known.sum(-1) == vocab_size, -torch.inf)
    return (torch.cat([words, rest[:, None]], dim=-1) / temperature).log_softmax(-1)


def logits_kl(
    logits: Tensor, top_ids: Tensor, top_logprobs: Tensor, temperature: float = 1.0, drawn: Tensor | None = None
) -> Tensor:
    """`bucket_kl` of a student given by its logits, (N, V) -> (N,)."""
    dtype, vocab_size = torch.promote_types(logits.dtype, torch.float32), logits.shape[-1]
    logits, known = logits.to(dtype), top_ids >= 0
    outside = top_ids.new_full((), vocab_size)  # a column for the missing, cut off again
    told = torch.zeros(len(logits), vocab_size + 1, dtype=torch.bool, device=logits.device)
    told = told.scatter(-1, top_ids.where(known, outside), True)[:, :-1]
    rest = logits.masked_fill(told, NOTHING).logsumexp(-1)  # summed itself, not 1 - the others: exact however small
    words = logits.gather(-1, top_ids.clamp(min=0)).masked_fill(~known, NOTHING)
    student = (torch.cat([words, rest[:, None]], dim=-1) / temperature).log_softmax(-1)  # (N, k + 1)
    teacher = teacher_buckets(top_ids, top_logprobs.to(dtype), vocab_size, temperature)
    mass = teacher.exp()
    kl = (mass * (teacher.masked_fill(mass == 0, 0.0) - student)).sum(-1)
    kl = temperature**2 * kl.clamp(min=0)  # below 0 there is only rounding
    if drawn is None:
        return kl
    elsewhere = known.any(-1) & ~told.gather(-1, drawn[:, None])[:, 0]
    return kl + torch.where(elsewhere, rest - logits.gather(-1, drawn[:, None])[:, 0], 0.0)


def _table_kl(
    hidden: Tensor, table: Tensor, top_ids: Tensor, top_logprobs: Tensor, temperature: float, drawn: Tensor | None
) -> Tensor:
    return logits_kl(hidden @ table.T, top_ids, top_logprobs, temperature, drawn)


def bucket_kl(
    hidden: Tensor,
    table: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    temperature: float = 1.0,
    drawn: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of each position, nats: hidden (N, E), table (V, E), top_ids (N, k), top_logprobs (N, k) -> (N,).

    The student is softmax(hidden table^T), which stands for the same position under the same prefix as the teacher's.
    An id of -1 is missing: its mass is in the rest, and where all are missing the loss is 0 (all mass in one bucket).
    The known ids of a row differ from one another (`kd/records.py` sees to it); the teacher gets no gradient.

    Temperature: the buckets are made first, then tempered on both sides alike, mass^(1 / temperature) renormalised, since
    the shape of the rest is not known. It stays a KL, and with k = V it is the usual tempered one. The result is
    multiplied by temperature^2, which keeps the size of the gradients.

    drawn: (N,), the tokens that stand there. The buckets tell nothing of the words inside the rest; a token drawn from it
    does: -log student(token | rest) is added where the token is none of the k. For tokens that the teacher drew at
    temperature 1, the mean of the sum is the dense KL and a constant, with the noise of the draw in the rest alone.

    With a large vocabulary the (N, V) logits are made a slice of rows at a time and again in the backward pass, so that
    memory stays bounded whatever N * V is.
    """
    rows = max(1, MAX_LOGITS // table.shape[0])
    if hidden.shape[0] <= rows:
        return _table_kl(hidden, table, top_ids, top_logprobs, temperature, drawn)
    tokens = [None] * -(-hidden.shape[0] // rows) if drawn is None else drawn.split(rows)
    parts = zip(hidden.split(rows), top_ids.split(rows), top_logprobs.split(rows), tokens, strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([_table_kl(h, table, ids, logprobs, temperature, t) for h, ids, logprobs, t in parts])
    slices = [
        checkpoint(_table_kl, h, table, ids, logprobs, temperature, t, use_reentrant=False) for h, ids, logprobs, t in parts
    ]
    return torch.cat(slices)  # type: ignore[arg-type]


def scored_positions(top_ids: Tensor) -> Tensor:
    """How many positions of (..., k) the teacher scored; 1 for none, as it is divided by."""
    return (top_ids >= 0).any(-1).sum().clamp(min=1)


def mean_kl(
    states: Tensor,
    table: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
    temperature: float = 1.0,
    drawn: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Mean `bucket_kl` over the positions that the teacher scored: states (B, T, E), rows (B, T, k), drawn (B, T) -> ().

    0 where the teacher scored none. count: what to divide by, where it is not the number of these rows' scored positions.
    """
    tokens = None if drawn is None else drawn.flatten()
    kl = bucket_kl(states.flatten(0, 1), table, top_ids.flatten(0, 1), top_logprobs.flatten(0, 1), temperature, tokens)
    return kl.sum() / (scored_positions(top_ids) if count is None else count)
