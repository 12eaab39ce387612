"""Packed data on disk, and the windows of tokens that training and evaluation read from it.

A packed split is a folder:

    meta.json     format, version, dtype, counts, tokenizer fingerprint and place, seq_len, k, source
    tokens.bin    all documents' token ids, one after another, each ending with the end-of-text id
    docs.bin      int64, the index in tokens.bin at which each document begins

`meta.json` is written last: a folder without it is an interrupted write, not data.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from configs.packed import Packed, id_dtype, write_header
from configs.run import check_fingerprint


class PackedWriter:
    """Appends documents to a packed split. Memory does not grow with the data (docs.bin is streamed too)."""

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "meta.json").unlink(missing_ok=True)
        self.vocab_size, self.dtype = vocab_size, id_dtype(vocab_size)
        self.n_tokens = self.n_docs = 0
        self._tokens = open(self.folder / "tokens.bin", "wb")
        self._docs = open(self.folder / "docs.bin", "wb")

    def add(self, ids: np.ndarray) -> None:
        """Append one document's ids, (n,), its end-of-text included."""
        self._docs.write(np.int64(self.n_tokens).tobytes())
        self._tokens.write(ids.astype(self.dtype, copy=False).tobytes())
        self.n_tokens += len(ids)
        self.n_docs += 1

    def close(self, **meta: Any) -> None:
        """Flush, then write meta.json with the counts and what the caller adds."""
        for file in (self._tokens, self._docs):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        counts = {"n_tokens": self.n_tokens, "n_docs": self.n_docs, "vocab_size": self.vocab_size}
        write_header(self.folder, {"dtype": self.dtype.name, **counts, **meta})


class PackedData(Packed):
    """A packed split, opened for reading. Raises UserError as `Packed`."""

    @classmethod
    def pair(cls, folder: str | Path) -> tuple[PackedData, PackedData]:
        """The train and val splits of a packed folder."""
        return cls(Path(folder) / "train"), cls(Path(folder) / "val")

    def windows(self, window: int) -> int:
        """How many non-overlapping windows of `window` tokens the split holds."""
        return self.n_tokens // window

    def require_window(self, window: int) -> None:
        """Raise UserError unless the split holds at least one window of `window` tokens."""
        if not self.windows(window):
            raise UserError(
                f"{self.folder} holds {self.n_tokens} tokens, less than one window of {window}; "
                "pack the data with a higher --val_split, or lower --seq_len"
            )

    def rows(self, starts: Sequence[int], window: int) -> torch.Tensor:
        """The windows that begin at these tokens, (len(starts), window) int64."""
        return torch.from_numpy(self._known(np.stack([self.tokens[s : s + window] for s in starts])).astype(np.int64))

    def batches(self, window: int, batch_size: int, limit: int | None = None) -> Iterator[torch.Tensor]:
        """Non-overlapping windows in order, (<= batch_size, window) int64; the tail that fills no window is left out.

        Raises UserError where there is none.
        """
        self.require_window(window)
        n = self.windows(window) if limit is None else min(limit, self.windows(window))
        for i in range(0, n, batch_size):
            rows = self._known(self.tokens[i * window : min(i + batch_size, n) * window])
            yield torch.from_numpy(rows.reshape(-1, window).astype(np.int64))


def tokenizer_record(data: PackedData, checkpoint_dir: str | Path) -> dict[str, str]:
    """What a checkpoint says of its tokenizer: fingerprint and place, after putting a copy beside the checkpoint.

    `path` is relative to the checkpoint's folder, so that the folder can be moved as a whole; a hub name stays a name.
    The copy is made of what was read, as the data may name any folder. Raises UserError where that is another tokenizer.
    """
    source = data.tokenizer
    if not os.path.isdir(source):
        return {"fingerprint": data.fingerprint, "path": data.tokenizer}
    tokenizer = TokenizerAdapter.load(source)
    check_fingerprint(data.fingerprint, tokenizer.fingerprint, str(data.folder), source)
    copy = Path(checkpoint_dir) / f"tokenizer-{tokenizer.fingerprint[:12]}"
    if not copy.exists():
        temporary = copy.with_name(f".{copy.name}.{threading.get_native_id()}.tmp")  # a number of all processes' threads
        tokenizer.save(temporary)
        try:
            temporary.replace(copy)
        except OSError:  # another process, of the same training or not, was faster
            if not copy.exists():
                raise
            shutil.rmtree(temporary)
    return {"fingerprint": data.fingerprint, "path": copy.name}


class TrainWindows:
    """Every window of an epoch once, in random order, cut at a random phase that changes each epoch.

    The batch of a step depends on (seed, step) alone, so that a resumed run reads exactly what an undisturbed one would.
    """

    def __init__(self, data: PackedData, window: int, batch_size: int, seed: int) -> None:
        self.data, self.window, self.batch_size, self.seed = data, window, batch_size, seed
        self.per_epoch = (data.n_tokens - window) // window  # one window less, to leave room for the phase
        if self.per_epoch < 1:
            raise UserError(
                f"{data.folder} holds {data.n_tokens} tokens: too few for windows of {window}; "
                "bring more text or lower --seq_len"
            )

    @property
    def steps_per_epoch(self) -> int:
        return max(1, self.per_epoch // self.batch_size)

    def _start(self, item: int) -> int:
        epoch, index = divmod(item, self.per_epoch)
        phase, *keys = _epoch_numbers(self.seed, epoch)
        return phase % self.window + permuted(index, self.per_epoch, keys) * self.window

    def starts(self, step: int) -> list[int]:
        """Where the windows of `step` begin in `data.tokens`."""
        return [self._start(step * self.batch_size + i) for i in range(self.batch_size)]

    def batch(self, step: int) -> torch.Tensor:
        """The windows of `step`, (batch_size, window) int64."""
        return self.data.rows(self.starts(step), self.window)


@lru_cache(maxsize=4)
def _epoch_numbers(seed: int, epoch: int) -> list[int]:
    """An epoch's phase and permutation keys."""
    return [int(n) for n in np.random.default_rng([seed, epoch]).integers(1 << 32, size=5)]


def permuted(index: int, size: int, keys: Sequence[int]) -> int:
    """Where a pseudo-random permutation of range(size) puts `index`, without a table of its order.

    A Feistel network permutes the next power of four; values past the end are sent through it again until they fit.
    """
    bits = max(1, (size - 1).bit_length() + 1 >> 1)
    mask = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & mask
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
            left, right = right, left ^ (mixed >> 29 ^ mixed >> 47) & mask
        index = left << bits | right
        if index < size:
            return index
