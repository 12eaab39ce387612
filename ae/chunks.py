"""Packed data on disk, and the windows of tokens that training and evaluation read from it.

A packed split is a folder:

    meta.json     format, version, dtype, counts, tokenizer fingerprint and place, seq_len, k, source
    tokens.bin    all documents' token ids, one after another, each ending with the end-of-text id
    docs.bin      int64, the index in tokens.bin at which each document begins

`meta.json` is written last: a folder without it is an interrupted write, not data.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.errors import UserError

FORMAT = "latentforge-packed"
VERSION = 1


class PackedWriter:
    """Appends documents to a packed split. Memory does not grow with the data (docs.bin is streamed too)."""

    def __init__(self, folder: str | Path, vocab_size: int) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "meta.json").unlink(missing_ok=True)
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
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
        head = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype.name,
            "n_tokens": self.n_tokens,
            "n_docs": self.n_docs,
        }
        temporary = self.folder / "meta.json.tmp"
        temporary.write_text(json.dumps({**head, **meta}, indent=1), encoding="utf-8")
        temporary.replace(self.folder / "meta.json")


class PackedData:
    """A packed split, opened for reading. `tokens` is a read-only memory map, (n_tokens,).

    Raises UserError when the folder is missing, of another format or version, or its files have the wrong size.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"no packed data in {self.folder} (meta.json is missing); write it with tools/data_packing.py"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / 'meta.json'} cannot be read: {error}") from None
        if not isinstance(self.meta, dict) or self.meta.get("format") != FORMAT:
            raise UserError(f"{self.folder} is not packed data of this project: expected format {FORMAT!r}")
        if self.meta.get("version") != VERSION:
            raise UserError(
                f"{self.folder}: format version {self.meta.get('version')}, this code reads {VERSION}; pack the data again"
            )
        try:
            dtype: np.dtype = np.dtype({"uint16": np.uint16, "uint32": np.uint32}[self.meta["dtype"]])
            self.n_tokens, self.n_docs = int(self.meta["n_tokens"]), int(self.meta["n_docs"])
            self.fingerprint, self.tokenizer_path = str(self.meta["tokenizer_fingerprint"]), str(self.meta["tokenizer"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / 'meta.json'}: missing or wrong field {error}; pack the data again") from None
        self.tokens = self._map("tokens.bin", dtype, self.n_tokens)
        self.doc_starts = self._map("docs.bin", np.dtype(np.int64), self.n_docs)

    def _map(self, name: str, dtype: np.dtype, count: int) -> np.ndarray:
        path, expected = self.folder / name, count * dtype.itemsize
        size = path.stat().st_size if path.exists() else -1
        if size != expected:
            found = "is missing" if size < 0 else f"has {size} bytes"
            raise UserError(f"{path} {found}, expected {expected}: the data is damaged; pack it again")
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)

    @classmethod
    def pair(cls, folder: str | Path) -> tuple[PackedData, PackedData]:
        """The train and val splits of a packed folder."""
        return cls(Path(folder) / "train"), cls(Path(folder) / "val")

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is: a folder kept beside the split, or the name it was loaded by."""
        beside = (self.folder / self.tokenizer_path).resolve()
        return str(beside) if beside.exists() else self.tokenizer_path

    def windows(self, window: int) -> int:
        """How many non-overlapping windows of `window` tokens the split holds."""
        return self.n_tokens // window

    def batches(self, window: int, batch_size: int, limit: int | None = None) -> Iterator[torch.Tensor]:
        """Non-overlapping windows in order, (<= batch_size, window) int64; the tail that fills no window is left out."""
        n = self.windows(window) if limit is None else min(limit, self.windows(window))
        for i in range(0, n, batch_size):
            rows = self.tokens[i * window : min(i + batch_size, n) * window]
            yield torch.from_numpy(rows.reshape(-1, window).astype(np.int64))


def tokenizer_record(data: PackedData, checkpoint_dir: str | Path) -> dict[str, str]:
    """What a checkpoint says of its tokenizer: fingerprint and place, after putting a copy beside the checkpoint.

    `path` is relative to the checkpoint's folder, so that the folder can be moved as a whole; a hub name stays a name.
    """
    source = Path(data.tokenizer)
    if not source.is_dir():
        return {"fingerprint": data.fingerprint, "path": data.tokenizer}
    copy = Path(checkpoint_dir) / f"tokenizer-{data.fingerprint[:12]}"
    if not copy.exists():
        temporary = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
        shutil.copytree(source, temporary)
        temporary.replace(copy)
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
        rows = np.stack([self.data.tokens[s : s + self.window] for s in self.starts(step)])
        return torch.from_numpy(rows.astype(np.int64))


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
