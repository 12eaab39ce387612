"""Log probabilities of given texts: exact, batched, of the model itself (temperature 1, no filter).

A text is padded on the left as the sampler pads a prompt, so that what was written is scored under the very distribution
that it was drawn from; on the right it is filled up to whole chunks, which nothing before them can see.

Legend: `B` texts, `T` tokens, `E` embedding width, `V` vocabulary, `N` scored tokens of all texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ae.losses import MAX_LOGITS
from student.student_model import Student


@dataclass
class Text:
    """Tokens to score: `written` follows `prompt`, whose length decides the padding. Scores begin at token `first`."""

    prompt: Sequence[int]
    written: Sequence[int] = ()
    first: int = 0
    top: int = 0  # likeliest words wanted a position

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt, *self.written]


@dataclass
class Scores:
    """Of tokens first.. of a text: log probability in nats, and the likeliest words with theirs, likeliest first."""

    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of texts that stand one behind the other."""
    columns = zip(*((part.logprobs, part.top_ids, part.top_logprobs) for part in parts), strict=True)
    return Scores(*([x for part in column for x in part] for column in columns)) if parts else Scores([], [], [])


def padded_length(text: Text, k: int) -> int:
    """Tokens that a text takes in whole chunks, pads on both sides included."""
    return -(-len(text.prompt) // k) * k + -(-len(text.written) // k) * k


@torch.inference_mode()
def score(model: Student, texts: Sequence[Text]) -> list[Scores]:
    """The scores of each text, in order, from one pass over all of them."""
    k, pad, table = model.cfg.k, model.cfg.pad_id, model.table
    longest = max(padded_length(text, k) for text in texts)
    rows = [[pad] * (-len(text.prompt) % k) + text.tokens for text in texts]
    tokens = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=table.device)  # (B, T)
    hidden = model.hidden(tokens)  # (B, T, E)
    starts = [-len(text.prompt) % k + text.first for text in texts]
    wanted = [slice(start, len(row)) for start, row in zip(starts, rows, strict=True)]
    states = torch.cat([hidden[i, part] for i, part in enumerate(wanted)])  # (N, E)
    targets = torch.cat([tokens[i, part] for i, part in enumerate(wanted)])  # (N,)
    top = min(max(text.top for text in texts), len(table))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    step = max(1, MAX_LOGITS // len(table))
    for h, target in zip(states.split(step), targets.split(step), strict=True):
        logprobs = (h @ table.T).float().log_softmax(-1)
        best = logprobs.topk(top, dim=-1)
        parts.append((logprobs.gather(-1, target[:, None])[:, 0], best.indices, best.values))
    own, ids, values = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    out, at = [], 0
    for text, part in zip(texts, wanted, strict=True):
        end = at + part.stop - part.start
        out.append(Scores(own[at:end].tolist(), ids[at:end, : text.top].tolist(), values[at:end, : text.top].tolist()))
        at = end
    return out
