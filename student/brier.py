"""BrierLM (CALM, arXiv 2510.27688, section 4): the geometric mean of Brier-1..4, in percent.

Brier-n of a prefix = E[1{x = y} + 1{x' = y} - 1{x = x'}], x and x' independent n-grams of the model, y the true one.
Where the model has a likelihood that is 2 p(y) - E_x[p(x)], and of E_x[p(x)] = sum_x p(x)^2 the sum over the last token
is exact too: only the first n-1 tokens are sampled. The value is the same, its variance far smaller.

Legend: `B` windows, `T` tokens a window, `S` n-gram starts a window, `K` tokens a chunk, `V` vocabulary, `H` width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from student.baseline import TokenModel
from student.student_model import Student

N = 4  # longest n-gram


def collisions(model: TokenModel | Student, tokens: Tensor, starts: Tensor) -> Tensor:
    """Estimates of sum_x p(x)^2 for the n-grams, n = 1..4, that begin at given positions after the true prefix.

    tokens (B, T); starts (S,) with 1 <= start and start + 4 <= T -> (4, B, S). Unbiased; uses torch's global generator.
    """
    step = _student_branches(model, tokens, starts) if isinstance(model, Student) else _token_branches(model, tokens, starts)
    path = torch.ones(len(tokens), len(starts), device=tokens.device)  # p(x_1..x_m-1) of what was sampled
    sampled: Tensor | None = None
    out = []
    for n in range(N):
        probs = step(sampled).float().softmax(-1)  # (B, S, V)
        out.append(path * probs.square().sum(-1))
        if n < N - 1:
            sampled = torch.multinomial(probs.flatten(0, 1), 1).view_as(path)
            path = path * probs.gather(-1, sampled[..., None])[..., 0]
    return torch.stack(out)


def _token_branches(model: TokenModel, tokens: Tensor, starts: Tensor) -> Callable[[Tensor | None], Tensor]:
    """Branch s of a window goes on from the true tokens before starts[s]. All branches share the window's cache: a step
    appends one key a branch, and the mask shows a branch the true tokens before its start and its own keys only."""
    cache, done = DynamicCache(), 0
    states = model.lm.model(tokens, past_key_values=cache, use_cache=True).last_hidden_state  # (B, T, H)
    prefix = torch.arange(tokens.shape[1], device=tokens.device) < starts[:, None]  # (S, T)
    own = torch.eye(len(starts), dtype=torch.bool, device=tokens.device)

    def step(sampled: Tensor | None) -> Tensor:
        nonlocal done
        if sampled is None:
            return states[:, starts - 1] @ model.table.T
        mask = torch.cat([prefix] + [own] * (done + 1), dim=1).expand(len(tokens), 1, -1, -1)  # (B, 1, S, T + S * steps)
        out = model.lm.model(
            sampled, attention_mask={"full_attention": mask}, position_ids=(starts + done).expand(len(tokens), -1),
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        done += 1
        return out.last_hidden_state @ model.table.T

    return step


def _student_branches(model: Student, tokens: Tensor, starts: Tensor) -> Callable[[Tensor | None], Tensor]:
    """Every branch is a row of its own, with the local decoder's window at its start; one that crosses into the next chunk
    has its sampled tokens encoded and the backbone run again. In the memory no branch sees a token of its own."""
    k, (batch, length) = model.cfg.k, tokens.shape
    rows = tokens.repeat_interleave(len(starts), 0)  # (R, T), R = B * S; sampled tokens are written into it
    at, row = starts.repeat(batch), torch.arange(batch * len(starts), device=tokens.device)
    one = model.predict(tokens)[1]  # (B, T, E)
    g = one.repeat_interleave(len(starts), 0)  # (R, T, E)
    cache, restarts = None, model.cfg.local_decoder == "restart"
    if model.local is not None:
        cache = model.local.branches(one, model.previous_embeddings(tokens), starts, k if restarts else 0)

    def step(sampled: Tensor | None) -> Tensor:
        nonlocal at
        if sampled is not None:
            rows[row, at] = sampled.flatten()
            at = at + 1
            crossed = (at % k == 0).nonzero()[:, 0]
            if len(crossed) and model.cfg.latents != "none":
                next_g = model.predict(rows[crossed])[1].unflatten(1, (-1, k))[
                    torch.arange(len(crossed), device=at.device), at[crossed] // k
                ]
                place = at[crossed, None] + torch.arange(k, device=at.device)
                inside = (place < length)[..., None]  # a chunk may reach past the window, its n-gram never does
                g[crossed[:, None], place.clamp(max=length - 1)] = torch.where(
                    inside, next_g.to(g.dtype), g[crossed[:, None], place.clamp(max=length - 1)]
                )
        hidden = g[row, at]
        if model.local is not None and cache is not None:
            back = torch.arange(1, model.cfg.local_tokens + 1, device=at.device)  # (n,)
            known = back <= (at % k if restarts else at)[:, None]  # (R, n)
            before = rows[row[:, None], (at[:, None] - back).clamp(min=0)].where(known, model.cfg.pad_id)
            if restarts:
                cache.seen = cache.seen & known[:, :1]
            if model.local.memory is not None and cache.memory is not None:
                cache.memory.own = model.local.memory.visible(length, at.device)[at]
            hidden = hidden + model.local.step(hidden, model.ae.embed(before), cache)
        return (hidden @ model.table.T).unflatten(0, (batch, -1))

    return step


def brier_lm(p_true: Tensor, collision: Tensor) -> float:
    """p_true (4,), collision (4,): means over prefixes of p(y_1..n) and of sum_x p(x)^2 -> BrierLM in percent.

    A Brier-n below 0 (worse than never committing) counts as 0, and so does the whole then.
    """
    return 100 * (2 * p_true - collision).clamp(min=0).double().prod().pow(1 / N).item()


def ngram_probabilities(nll: Tensor) -> Tensor:
    """nll (..., T) in nats -> (4, ..., T - 3): p of the true n-gram that begins at each position, n = 1..4."""
    runs = [nll[..., i : nll.shape[-1] - N + 1 + i] for i in range(N)]
    return (-torch.stack(runs).cumsum(0)).exp()


def brier_by_samples(first: Tensor, second: Tensor, truth: Tensor) -> float | None:
    """BrierLM from two independent samples (..., K) and the truth, CALM's own estimator; None where K < 4."""
    if truth.shape[-1] < N:
        return None

    def equal(a: Tensor, b: Tensor) -> Tensor:  # (4,): share of equal n-grams
        return (a == b)[..., :N].long().cumprod(-1).float().flatten(0, -2).mean(0)

    return brier_lm((equal(first, truth) + equal(second, truth)) / 2, equal(first, second))
