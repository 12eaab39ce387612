"""Packed data on disk: the header and the flat files that `ae/chunks.py` and `kd/kd_batcher.py` write and read alike."""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.files import read_json, replace_text

FORMAT = "latentforge-packed"
VERSION = 1


def id_dtype(count: int) -> np.dtype:
    """The type of stored ids that takes `count` values."""
    return np.dtype(np.uint16 if count <= 1 << 16 else np.uint32)


def write_header(folder: Path, meta: dict[str, Any]) -> None:
    """Write meta.json, whole or not at all."""
    replace_text(folder / "meta.json", json.dumps({"format": FORMAT, "version": VERSION, **meta}, indent=1))


def is_packed(folder: Path) -> bool:
    """Whether the folder is a packed split of this project, of any version. Raises UserError where its header is damaged."""
    header = folder / "meta.json"
    return header.is_file() and read_json(header).get("format") == FORMAT


class Packed:
    """A packed folder, opened for reading: `tokens` (n_tokens,) and `doc_starts` (n_docs,) are read-only memory maps.

    Raises UserError when the folder is missing, of another format or version, or what it holds is not what its header says.
    """

    ABSENT = "no packed data in {} (meta.json is missing); write it with tools/data_packing.py"
    AGAIN = "pack the data again"

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.meta = read_json(self.folder / "meta.json")
        except FileNotFoundError:
            raise UserError(self.ABSENT.format(self.folder)) from None
        if self.meta.get("format") != FORMAT:
            raise UserError(f"{self.folder} is not packed data of this project: expected format {FORMAT!r}")
        if self.meta.get("version") != VERSION:
            found = reprlib.repr(self.meta.get("version"))
            raise UserError(f"{self.folder}: format version {found}, this code reads {VERSION}; {self.AGAIN}")
        self.n_tokens, self.n_docs = self._count("n_tokens"), self._count("n_docs")
        self.vocab_size = self._count("vocab_size", 1 << 32)
        self.eot_id, self.pad_id = (self._count(key, self.vocab_size - 1) for key in ("eot_id", "pad_id"))
        self.fingerprint, self.tokenizer_path = (
            self._field(key, lambda value: isinstance(value, str) and value != "", "a text")
            for key in ("tokenizer_fingerprint", "tokenizer")
        )
        self.tokens = self._map("tokens.bin", self._dtype("dtype", self.vocab_size), (self.n_tokens,))
        self.doc_starts = starts = self._map("docs.bin", np.dtype(np.int64), (self.n_docs,))
        inside = starts[0] == 0 and starts[-1] <= self.n_tokens if self.n_docs else not self.n_tokens
        if not inside or (starts[1:] < starts[:-1]).any():
            raise self._damaged("docs.bin does not say where documents begin")

    @property
    def tokenizer(self) -> str:
        """Where the tokenizer is: a folder kept beside the split, or the name it was loaded by."""
        beside = os.path.join(self.folder, self.tokenizer_path)
        return os.path.realpath(beside) if os.path.exists(beside) else self.tokenizer_path

    def _field(self, key: str, fits: Callable[[Any], bool], wanted: str) -> Any:
        """An entry of the header. Raises UserError unless it fits."""
        value = self.meta.get(key)
        if not fits(value):
            found = reprlib.repr(value) if key in self.meta else "nothing"
            raise UserError(f"{self.folder / 'meta.json'}: expected {key} to be {wanted}, got {found}; {self.AGAIN}")
        return value

    def _count(self, key: str, high: int = 1 << 62) -> int:
        return self._field(key, lambda value: type(value) is int and 0 <= value <= high, f"a whole number from 0 to {high}")

    def _dtype(self, key: str, count: int) -> np.dtype:
        dtype = id_dtype(count)
        self._field(key, lambda value: value == dtype.name, f"{dtype.name}, as vocab_size {self.vocab_size} wants it")
        return dtype

    def _map(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        path, expected = self.folder / name, math.prod(shape) * dtype.itemsize
        size = path.stat().st_size if path.is_file() else None
        if (size or 0) != expected:
            raise self._damaged(f"{name} {'is missing' if size is None else f'has {size} bytes'}, expected {expected}")
        return np.memmap(path, dtype=dtype, mode="r", shape=shape) if expected else np.empty(shape, dtype)

    def _known(self, ids: np.ndarray) -> np.ndarray:
        """Token ids as they are. Raises UserError for one outside the vocabulary, which would end in an index error later."""
        if ids.size and (highest := int(ids.max())) >= self.vocab_size:
            raise self._damaged(f"it holds token id {highest}, outside the vocabulary of {self.vocab_size}")
        return ids

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self.folder}: {what}: the data is damaged; {self.AGAIN}")
