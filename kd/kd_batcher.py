"""A teacher's stored answers -> packed training shards with its top-k logprobs beside every token, memory-mapped.

    python kd/kd_batcher.py --store data/teacher/MODEL.sqlite --tokenizer data/tokenizer --output data/teacher/packed

A shard is a packed split of `ae/chunks.py` (its `PackedData` reads it as plain training text) with two more files:

    meta.json          as there, and kd_kind, kd_k, kd_dtype, teacher (the models that answered), kd_scored (tokens with a row)
    tokens.bin         the ids of all documents, each ending with the end-of-text id
    docs.bin           int64, the index at which each document begins
    top_ids.bin        (n_tokens, k) uint16, or uint32 for vocabularies of 65,536 words or more; the largest value: missing
    top_logprobs.bin   (n_tokens, k) float16, nats

Row t is what the teacher says of token t, given the tokens of its document before it. Rows of a prompt, of an end-of-text
that the teacher did not write and of positions without logprobs are missing throughout; where an answer was cut, the
logprobs of the end-of-text's missing row are -inf: a text ends there that would have gone on. kd_kind is "logprobs", or
"sequence" for a teacher that tells none and for --k 0: then kd_k is 0 and the two files are not there.

Bytes a token: 2 + 4 k (82 at k = 20) with uint16 ids, 4 + 6 k (124 at k = 20) with uint32. float16 is good to 2.4e-4 nats
from -0.5 to -1 and to 0.004 at -8.

A document is the prompt and what was written after it, or the text that was scored. An end-of-text id in front is left
out: the document before ends with one. An answer that was cut by its length limit ends with end-of-text as every document.
Of equal documents only the first is kept. Validation is chosen by the hash of the prompt, of scored text by that of its
document's first tokens, or of the text where there is neither.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError, run_cli
from configs.files import read_json
from configs.packed import Packed, id_dtype, write_header
from kd.prompts import continued, prompt_ids_of, seam
from kd.records import (
    MISSING,
    Misaligned,
    TeacherRecord,
    TokenizerLike,
    TokenTable,
    choices_of,
    parse_answer,
    spells,
    text_of,
    told_ids,
)
from kd.store import Store, StoredAnswer

KINDS = ("logprobs", "sequence")
PACKING = 4  # version of how answers become documents and splits
FILES = ("tokens.bin", "docs.bin", "cuts.bin", "top_ids.bin", "top_logprobs.bin")
DEFAULT_K = 20
WHOLE = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete")  # finish reasons of what did not break off


class PackingTokenizer(TokenizerLike, Protocol):
    """What packing needs of a tokenizer beside parsing (`ae.tokenizer_adapter.TokenizerAdapter` has it)."""

    eot_id: int
    pad_id: int
    model_vocab_size: int

    def save(self, folder: str | Path) -> None: ...


class KDWriter:
    """Appends documents with their top-k rows to a shard. Memory does not grow with the data."""

    def __init__(self, folder: str | Path, vocab_size: int, k: int = DEFAULT_K) -> None:
        self.folder, self.k, self.vocab_size = Path(folder), k, vocab_size
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "meta.json").unlink(missing_ok=True)
        self.dtype, self.top_dtype = id_dtype(vocab_size), id_dtype(vocab_size + 1)  # one more for "missing"
        self.n_tokens = self.n_docs = self.n_scored = 0
        self._files = {name: open(self.folder / name, "wb") for name in FILES}

    def add(self, ids: np.ndarray, top_ids: np.ndarray, top_logprobs: np.ndarray, cut: bool = False) -> None:
        """Append a document: ids (T,), its end-of-text included, top_ids and top_logprobs (T, any k), best first.

        Missing are ids of -1 and logprobs of NaN. Rows are cut or filled up to the shard's k. cut: the answer was cut off, and
        its end-of-text is not the teacher's.
        """
        if top_ids.shape != top_logprobs.shape or top_ids.shape[:1] != ids.shape:
            raise ValueError(f"shapes do not fit: ids {ids.shape}, top ids {top_ids.shape}, logprobs {top_logprobs.shape}")
        known = (top_ids != MISSING) & ~np.isnan(top_logprobs)
        low, high = (int(f(np.concatenate([ids, top_ids[known]]))) for f in (np.min, np.max)) if len(ids) else (0, 0)
        if low < 0 or high >= self.vocab_size:
            raise ValueError(f"token id {low if low < 0 else high} is outside the vocabulary of {self.vocab_size}")
        kept = min(self.k, top_ids.shape[1])
        packed_ids = np.full((len(ids), self.k), np.iinfo(self.top_dtype).max, dtype=self.top_dtype)
        packed = np.zeros((len(ids), self.k), dtype=np.float16)
        np.copyto(packed_ids[:, :kept], top_ids[:, :kept].astype(self.top_dtype), where=known[:, :kept])
        lowest = np.finfo(np.float16).min
        np.copyto(packed[:, :kept], np.maximum(top_logprobs[:, :kept], lowest).astype(np.float16), where=known[:, :kept])
        parts = (ids.astype(self.dtype), np.int64(self.n_tokens), np.bool_(cut), packed_ids, packed)
        for file, part in zip(self._files.values(), parts, strict=True):
            file.write(part.tobytes())
        self.n_tokens += len(ids)
        self.n_docs += 1
        self.n_scored += int(known[:, :kept].any(1).sum())

    def discard(self) -> None:
        """Write no more, and no meta.json: what is there is no shard."""
        for file in self._files.values():
            file.close()

    def close(self, **meta: Any) -> None:
        """Flush, then write meta.json. A shard without any logprobs becomes one of kind "sequence"."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        if not self.n_scored:
            for name in FILES[3:]:
                (self.folder / name).unlink()
        head = {
            "dtype": self.dtype.name,
            "n_tokens": self.n_tokens,
            "n_docs": self.n_docs,
            "vocab_size": self.vocab_size,
            "kd_kind": KINDS[not self.n_scored],
            "kd_k": self.k if self.n_scored else 0,
            "kd_dtype": self.top_dtype.name,
            "kd_scored": self.n_scored,
        }
        write_header(self.folder, {**head, **meta})


class KDShard(Packed):
    """A shard, opened for reading: also `top_ids` and `top_logprobs`, (n_tokens, k), are read-only memory maps.

    Raises UserError as `Packed`, and where there are no teacher's rows.
    """

    ABSENT = "no shard in {} (meta.json is missing); harvest and pack the teacher's answers"
    AGAIN = "pack the answers again"

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        if self.meta.get("kd_kind") not in KINDS:
            raise UserError(f"{self.folder} is packed text without a teacher's rows; expected a shard of kd/kd_batcher.py")
        soft = self.kind == "logprobs"
        self.k = self._field("kd_k", lambda k: type(k) is int and soft <= k <= soft * self.vocab_size, "as kd_kind wants it")
        self.scored = self._count("kd_scored", self.n_tokens)
        self.drawn = self.meta.get("drawn", True) is True  # its tokens are draws from the distributions that its rows tell
        self.teacher = self._field(
            "teacher", lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names), "a list of names"
        )
        self._top_dtype = self._dtype("kd_dtype", self.vocab_size + 1)
        ends = np.append(self.doc_starts[1:], self.n_tokens) - 1 if self.n_docs else self.doc_starts
        self.cut_ends = ends[self._map("cuts.bin", np.dtype(np.uint8), (self.n_docs,)) != 0]  # sorted, as documents are
        self.top_ids = self._map("top_ids.bin", self._top_dtype, (self.n_tokens, self.k))
        self.top_logprobs = self._map("top_logprobs.bin", np.dtype(np.float16), (self.n_tokens, self.k))

    @property
    def kind(self) -> str:
        """ "logprobs" or "sequence"."""
        return self.meta["kd_kind"]

    def windows(self, starts: Iterable[int], window: int) -> tuple[Tensor, Tensor, Tensor]:
        """The windows that begin at these tokens, as `PackedData.tokens` counts them.

        Returns tokens (B, T) int64, top ids (B, T, k) int64 with -1 for missing, and top logprobs (B, T, k) float32.
        Raises UserError for what cannot have been written.
        """
        spans = [slice(start, start + window) for start in starts]
        tokens, ids, logprobs = (np.stack([x[span] for span in spans]) for x in (self.tokens, self.top_ids, self.top_logprobs))
        told = ids != np.iinfo(self._top_dtype).max
        self._known(tokens), self._known(ids[told])
        if not (np.isfinite(logprobs) & (logprobs <= 0))[told].all():
            raise self._damaged("top_logprobs.bin holds what is no logprob")
        wide = np.where(told, ids, np.int64(MISSING))
        return torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(wide), torch.from_numpy(logprobs.astype(np.float32))

    def cut(self, starts: Iterable[int], window: int) -> Tensor:
        """Where in these windows an end-of-text stands for a cut, (B, T)."""
        at = np.array(list(starts))[:, None] + np.arange(window)
        return torch.from_numpy(np.searchsorted(self.cut_ends, at, "right") > np.searchsorted(self.cut_ends, at))


def document(
    record: TeacherRecord, eot_id: int, start_id: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """A record as a document: ids (T,), top ids (T, k), top logprobs (T, k), and whether it was cut before its end.

    What began the text for the teacher, its end-of-text or `start_id`, is left out.
    """
    ids = np.concatenate([record.prompt_ids, record.sampled_id]).astype(np.int64)
    above = len(record.prompt_ids)
    below = int(not len(ids) or ids[-1] != eot_id)
    rows = ((above, below), (0, 0))
    top_ids = np.pad(record.top_ids.astype(np.int64), rows, constant_values=MISSING)
    top_logprobs = np.pad(record.top_logprobs, rows, constant_values=np.nan)
    first = int(len(ids) > 1 and ids[0] in (eot_id, start_id))
    cut = bool(below) and (record.source == "score" or str(record.finish_reason or "stop").lower() not in WHOLE)
    return np.append(ids, [eot_id] * below)[first:], top_ids[first:], top_logprobs[first:], cut


def split_rank(prompt: np.ndarray, request: Mapping[str, Any], ids: np.ndarray) -> float:
    """In [0, 1), below the validation's share: held out. By the prompt, its ids or as it was sent, so that what was written
    after it lies in one split, however often it was asked; by the document where there was none.
    """
    asked = request.get("messages") or request.get("prompt")
    told = isinstance(asked, str) or "messages" in request or (isinstance(asked, list) and len(asked) > 1)
    as_sent = json.dumps(asked).encode() if told else ids.tobytes()
    source = hashlib.blake2b(prompt.tobytes() if len(prompt) else as_sent, digest_size=8).digest()
    return int.from_bytes(source, "big") / 2**64


def pack_answers(
    answers: Collection[StoredAnswer] | Store,
    tokenizer: PackingTokenizer,
    output: str | Path,
    *,
    k: int = DEFAULT_K,
    val_split: float = 0.05,
    **meta: Any,
) -> Counter[str]:
    """Write `output`/train, val and tokenizer from answers (a `Store` is such), and replace what was there once it is whole.

    k: the teacher's words that are kept a position; 0: its text alone, whatever its tokenizer.
    Returns counts: documents, tokens and scored tokens of each split, duplicates, and the answers left out by reason.
    Raises UserError where no answer can be used, or a split stays empty.
    """
    output = Path(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    collects = gc.isenabled()
    gc.disable()  # parsing makes twenty objects a token and no cycles; looking for these takes longer than the parsing
    try:
        counts = _pack(answers, tokenizer, temporary, k, val_split, meta)
        if output.exists():
            head = output / "train" / "meta.json"
            if not head.exists() or "kd_kind" not in read_json(head):
                raise UserError(f"{output} is no shard of a teacher's answers; name another --output, or remove it")
            shutil.rmtree(output)
        temporary.replace(output)
    finally:
        if collects:
            gc.enable()
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _pack(
    answers: Collection[StoredAnswer] | Store, tokenizer: PackingTokenizer, folder: Path, k: int, val_split: float,
    meta: dict[str, Any],
) -> Counter[str]:  # fmt: skip
    counts: Counter[str] = Counter()
    table, seen, models = TokenTable(tokenizer), set[bytes](), set[str]()
    writers = {name: KDWriter(folder / name, tokenizer.model_vocab_size, k) for name in ("train", "val")}
    lowest, drawn = 1.0, True
    for answer in answers:
        try:
            choices = choices_of(answer.answer)
        except Misaligned as error:
            counts[f"left out: {error}"] += 1
            continue
        request = answer.request
        sent_ids = isinstance(request.get("prompt"), list) and not request.get("echo")
        asked = prompt_ids_of(request, answer.prompt_ids, tokenizer)  # decides the split, whatever is answered
        before = continued(request)
        for index, choice in enumerate(choices):
            try:
                text, prompt_ids = text_of(choice), asked
                if before is not None and (space := seam(before, text)):
                    prompt_ids = tokenizer.encode(before + space)
                if not k and sent_ids and not spells(told_ids(choice) or [], text, table):
                    counts["prompts left out: ids of a tokenizer that may be another"] += bool(prompt_ids)
                    prompt_ids = []
                record = parse_answer(request, answer.answer, table, index, prompt_ids, text_alone=k == 0)
            except Misaligned as error:
                counts[f"left out: {error}"] += 1
                continue
            ids, top_ids, top_logprobs, cut = document(record, tokenizer.eot_id, tokenizer.start_id)
            if not len(record.sampled_id):
                counts["left out: empty"] += 1
                continue
            digest = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()
            if digest in seen:
                counts["duplicates"] += 1
                continue
            seen.add(digest)
            models.add(record.model)
            drawn &= record.source == "generate" and request.get("temperature", 1) == 1
            of = record.prompt_ids if asked is None else np.array(asked, np.int32)
            rank = split_rank(of[(of != tokenizer.eot_id) & (of != tokenizer.start_id)], request, ids)
            lowest = min(lowest, rank)
            writers["val" if rank < val_split else "train"].add(ids, top_ids, top_logprobs, cut)
    if 0 < val_split <= lowest < 1:  # so few prompts that none came to validation: the first of them does
        for writer in writers.values():
            writer.discard()
        return _pack(answers, tokenizer, folder, k, math.nextafter(lowest, 1), meta)
    for name, writer in writers.items():
        if not writer.n_docs and (name == "train" or val_split):
            none = "all to one prompt, and a prompt lies in one split" if seen else "the store is empty"
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items()) or none
            raise UserError(f"{len(seen):,} usable answers leave nothing for {name} ({reasons}); harvest more")
        counts[f"{name} documents"], counts[f"{name} tokens"] = writer.n_docs, writer.n_tokens
        counts[f"{name} scored tokens"] = writer.n_scored
        writer.close(
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer="../tokenizer",
            eot_id=tokenizer.eot_id,
            pad_id=tokenizer.pad_id,
            teacher=sorted(models),
            val_split=val_split,
            drawn=drawn,
            packing=PACKING,
            **meta,
        )
    tokenizer.save(folder / "tokenizer")
    return counts


def main() -> None:
    from ae.tokenizer_adapter import TokenizerAdapter

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="SQLite file of kd/harvest.py")
    parser.add_argument(
        "--tokenizer", required=True, help="the teacher's (--k 0: the student's): folder, tokenizer.json or hub name"
    )
    parser.add_argument("--output", required=True, help="folder of the shards")
    parser.add_argument(
        "--k", type=int, default=DEFAULT_K, help=f"teacher's words kept a position; 0: text alone [{DEFAULT_K}]"
    )
    parser.add_argument("--val_split", type=float, default=0.05, help="share of documents for validation [0.05]")
    args = parser.parse_args()
    if args.k < 0 or not 0 < args.val_split < 1:
        raise UserError(f"expected --k of at least 0 and --val_split between 0 and 1, got {args.k} and {args.val_split:g}")
    with Store(args.store, must_exist=True) as store:
        counts = pack_answers(store, TokenizerAdapter.load(args.tokenizer), args.output, k=args.k, val_split=args.val_split)
    for what, count in counts.items():
        print(f"{what}: {count:,}")


if __name__ == "__main__":
    run_cli(main)
