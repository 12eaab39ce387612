"""Where the tokens of a window stand - how far into their document, whether they copy a far word - to tell NLL by it.

What a model can know of a token's document is what its window shows. So two lengths count: `distance`, the tokens of the
document before the token, and `seen`, those of them that lie in the window. They differ where a document began before its
window.

Legend: `B` windows, `T` tokens a window, `V` vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ae.chunks import PackedData
from ae.tokenizer_adapter import TokenizerAdapter

EDGES = (0, 16, 32, 64, 128, 256, 512)
BUCKETS = (*(f"{low}-{high - 1}" for low, high in pairwise(EDGES)), f"{EDGES[-1]}+")
NEAR = 16  # tokens that a local decoder sees without the latents
IDENTIFIER = re.compile(r"\w{3,}")


@dataclass
class Places:
    """Of each token of some windows, (B, T) int64 tensors on the CPU; -1 where a token belongs to no bucket."""

    by_distance: Tensor
    by_seen: Tensor
    far_copy: Tensor  # 0: it repeats a word from far away; -1: it does not


def bucket(length: np.ndarray) -> np.ndarray:
    """Index into BUCKETS of lengths in tokens."""
    return np.searchsorted(EDGES, length, side="right") - 1


def places(data: PackedData, words: np.ndarray, starts: np.ndarray, length: int) -> Places:
    """The places of the windows of `length` tokens that begin at the split's tokens `starts`, (B,); words: `word_of`.

    by_distance counts a token only where distance and seen fall into one bucket: of a document that began before the
    window the true distance is the longer one, and a model that sees 20 tokens from the middle of a document is neither at
    a document's beginning nor, say, 300 tokens into what it reads. by_seen counts all tokens.

    far_copy: tokens that are a word, or a part of one, of at least three letters, digits and underscores (space around
    it aside), which occurred earlier in the same document within the window, but not among the last NEAR tokens.
    """
    at = np.arange(length)
    position = starts[:, None] + at  # (B, T)
    begin = data.doc_starts[np.searchsorted(data.doc_starts, position, side="right") - 1]
    distance = position - begin
    seen = np.minimum(distance, at)
    by_distance, by_seen = bucket(distance), bucket(seen)
    word = words[data.tokens[position]]
    gap = gaps(word)
    far = (word >= 0) & (gap > NEAR) & (gap <= seen)
    return Places(*(torch.from_numpy(x) for x in (np.where(by_distance == by_seen, by_seen, -1), by_seen, far - 1)))


def gaps(values: np.ndarray) -> np.ndarray:
    """(B, T) -> how many places before each value the last equal one of its row stands; T where there is none."""
    order = np.argsort(values, axis=1, kind="stable")  # equal values side by side, in their order
    ordered = np.take_along_axis(values, order, 1)
    gap = np.full(values.shape, values.shape[1], dtype=np.int64)
    gap[:, 1:] = np.where(ordered[:, 1:] == ordered[:, :-1], np.diff(order, axis=1), values.shape[1])
    out = np.empty_like(gap)
    np.put_along_axis(out, order, gap, 1)
    return out


def word_of(tokenizer: TokenizerAdapter) -> np.ndarray:
    """The word that each token is, as a number, (model_vocab_size,); -1 for no word. Space around a word does not count."""
    words: dict[str, int] = {}
    out = np.full(tokenizer.model_vocab_size, -1, dtype=np.int64)
    for i in range(tokenizer.size):
        text = tokenizer.token_bytes(i).decode("utf-8", errors="replace").strip()
        if IDENTIFIER.fullmatch(text):
            out[i] = words.setdefault(text, len(words))
    return out


class MeanBy:
    """Means of a figure per token in each of some classes."""

    def __init__(self, classes: int) -> None:
        self.total, self.count = torch.zeros(classes, dtype=torch.float64), torch.zeros(classes, dtype=torch.int64)

    def add(self, values: Tensor, classes: Tensor) -> None:
        """Values and their classes, of one shape, on the CPU; a class below 0 is left out."""
        kept = classes >= 0
        self.total += torch.bincount(classes[kept], values[kept].double(), minlength=len(self.total))
        self.count += torch.bincount(classes[kept], minlength=len(self.count))

    def means(self) -> list[float | None]:
        """None for a class without tokens."""
        return [t / n if n else None for t, n in zip(self.total.tolist(), self.count.tolist(), strict=True)]
