"""Text -> token ids in DIR/train and DIR/val, with the tokenizer in DIR/tokenizer.

    python tools/data_packing.py --input data/corpus.jsonl --output data/packed --tokenizer data/tokenizer

Reads JSON lines with `text` or chat `messages`, plain text, and folders (every file of the tree that is not hidden; a
`.jsonl` file in it is read as JSON lines). What is a document:

- a line of a JSON lines file, and a file of a folder or glob; above 1 Mi characters a text is cut into several;
- of a plain-text file given by itself, pieces of up to 64 Ki characters;
- cuts are at the last blank line that fits, else the last line end, else the last space.

Of documents with the same text only the first is kept. Validation is chosen by the hash of the text: the same documents
in every run and in any order of input. Where the hash chooses none (a tiny corpus), the document with the lowest hash
goes to validation. Input is streamed; an existing output folder is replaced only once everything is written.
"""

from __future__ import annotations

import argparse
import codecs
import glob
import hashlib
import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from ae.chunks import PackedWriter
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError, run_cli
from configs.packed import is_packed

JSONL_SUFFIXES = {".jsonl", ".ndjson"}
MAX_DOCUMENT = 1 << 20  # characters
MAX_PIECE = 1 << 16  # the same, of a plain-text file given by itself
MAX_LINE = 1 << 26  # bytes of a JSON line
BATCH_CHARS = 1 << 21  # characters encoded at once; the encoder takes about 100 bytes of memory for each
LISTED = 20  # problems that are printed one by one
DEFAULT_TOKENIZER = "data/tokenizer"
PARTS = {"train", "val", "tokenizer"}  # what an output folder holds


# ---- reading documents


@dataclass
class Document:
    """One text, or one chat (`text`: its contents, joined). `place` is file:line, for messages."""

    text: str
    place: str
    messages: list[dict[str, Any]] | None = None

    def key(self) -> bytes:
        """What makes two documents the same, in UTF-8. Raises UnicodeError for a lone surrogate."""
        text = self.text if self.messages is None else json.dumps(self.messages, sort_keys=True, ensure_ascii=False)
        return text.encode()


@dataclass
class Problems:
    """Input that cannot be used: all are counted by kind, the first few kept by place. `strict` raises instead."""

    strict: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    listed: list[str] = field(default_factory=list)

    def add(self, kind: str, place: str, detail: str = "") -> None:
        line = f"{place}: {kind}" + (f" ({detail})" if detail else "")
        if self.strict:
            raise UserError(f"{line}; without --strict it is left out and counted")
        self.counts[kind] += 1
        if len(self.listed) < LISTED:
            self.listed.append(line)

    def report(self) -> str:
        """What was left out, where, and how often; "" when nothing was."""
        if not self.counts:
            return ""
        totals = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.most_common())
        more = sum(self.counts.values()) - len(self.listed)
        return "\n  ".join([f"left out: {totals}", *self.listed, *([f"... and {more:,} more"] if more else [])])


def check_json(path: Path) -> None:
    """Raise UserError for a .json file of records that was given by itself: its text would be packed, quotes, names and all."""
    if path.suffix.lower() != ".json" or not path.is_file():
        return
    with open(path, "rb") as file:
        head = file.read(1 << 16).lstrip()
    if head[:1] in (b"{", b"[") and any(key in head for key in (b'"text"', b'"messages"')):
        advice = "add --format jsonl" if head[:1] == b"{" else f"write it as JSON lines first: jq -c '.[]' {path} > {path}l"
        raise UserError(
            f"{path} looks like records with `text` or `messages`: {advice}; or take it as plain text with --format text"
        )


class Corpus:
    """The documents of files, folders and globs, streamed in the order of sorted paths.

    `bytes_total` is known at once, `bytes_read` grows with iteration. Raises UserError for an input that matches nothing.
    """

    def __init__(self, inputs: Sequence[str], format: str = "auto", strict: bool = False) -> None:
        """`format`: jsonl, text, or auto (by suffix)."""
        self.inputs, self.format, self.problems, self.bytes_read = list(inputs), format, Problems(strict), 0
        self.files = list(dict.fromkeys(file for item in inputs for file in find_files(item)))
        self.bytes_total = sum(file.stat().st_size for file in self.files)
        if format == "auto":
            for item in inputs:
                check_json(Path(item))
        alone = len(self.files) == 1 and Path(inputs[0]).is_file()
        self._text_limit = MAX_PIECE if alone else MAX_DOCUMENT

    def __iter__(self) -> Iterator[Document]:
        before = 0
        for path in self.files:
            self.bytes_read = before
            is_jsonl = self.format == "jsonl" or (self.format == "auto" and path.suffix.lower() in JSONL_SUFFIXES)
            read = self._json_lines if is_jsonl else self._plain_text
            try:
                with open(path, "rb") as file:
                    before += os.fstat(file.fileno()).st_size
                    yield from read(file, path)
            except OSError as error:
                self.problems.add("unreadable file", str(path), error.strerror or str(error))
        self.bytes_read = before

    def _json_lines(self, file: BinaryIO, path: Path) -> Iterator[Document]:
        number, whole = 0, True
        while line := file.readline(MAX_LINE):
            self.bytes_read += len(line)
            number += whole
            follows, whole = not whole, len(line) < MAX_LINE or line.endswith(b"\n")
            place = f"{path}:{number}"
            if follows or not whole:  # a part of a line that is too long
                if not follows:
                    self.problems.add("bad line", place, f"longer than {MAX_LINE >> 20} MiB")
                continue
            if not line.strip():
                continue
            try:
                document = parse_line(line.decode("utf-8-sig" if number == 1 else "utf-8"), place)
            except UnicodeError:
                self.problems.add("bad line", place, "not valid Unicode")
            except BadLine as error:
                self.problems.add("bad line", place, str(error))
            else:
                yield from self._cut(document)

    def _cut(self, document: Document) -> Iterator[Document]:
        """The document, or its pieces where it is too long."""
        if not document.text.strip():
            self.problems.add("empty document", document.place)
        elif len(document.text) <= MAX_DOCUMENT:
            yield document
        elif document.messages is not None:
            self.problems.add("bad line", document.place, f"a chat of more than {MAX_DOCUMENT:,} characters")
        else:
            start = 0
            while start < len(document.text):
                end = cut_point(document.text, start, MAX_DOCUMENT)
                yield Document(document.text[start:end], document.place)
                start = end

    def _plain_text(self, file: BinaryIO, path: Path) -> Iterator[Document]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        text, line, empty, block, problem = "", 1, True, b"x", ""
        while block and not problem:
            block = file.read(self._text_limit)
            self.bytes_read += len(block)
            good, nul, _ = block.partition(b"\0")
            problem = "binary file" if nul else ""
            try:
                text += decoder.decode(good, final=not block)
            except UnicodeDecodeError as error:
                text, problem = text + error.object[: error.start].decode(), "file that is not UTF-8"
            if problem and empty:
                break  # nothing of it is packed yet, so all of it is left out
            while len(text) > self._text_limit or (text and (problem or not block)):
                end = cut_point(text, 0, self._text_limit)
                if text[:end].strip():
                    empty = False
                    yield Document(text[:end], f"{path}:{line}")
                line += text.count("\n", 0, end)
                text = text[end:]
        if problem:
            place = str(path) if empty and problem == "binary file" else f"{path}:{line + text.count(chr(10))}"
            self.problems.add(problem, place, "" if empty else "left out from here on")
        elif empty:
            self.problems.add("empty document", str(path))


def find_files(item: str) -> list[Path]:
    """The files of a path, folder or glob, sorted. Raises UserError when there are none."""
    path = Path(item).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        files = [file for match in sorted(glob.glob(str(path), recursive=True)) if (file := Path(match)).is_file()]
        if not files:
            raise UserError(f"--input {item} does not exist and matches no file; tools/get_corpus.py writes a first corpus")
        return files
    files = []
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise UserError(f"--input {item} is a folder without files (hidden ones are not read)")
    return files


class BadLine(ValueError):
    """A JSON line that is no document, and why."""


def parse_line(line: str, place: str) -> Document:
    """One JSON line. Raises BadLine, or UnicodeError for a lone surrogate."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadLine(f"expected an object with `text` or `messages`, got a {type(record).__name__}")
    text, messages = record.get("text"), record.get("messages")
    if text is None and messages is None:
        raise BadLine("neither `text` nor `messages`")
    if text is not None:
        if not isinstance(text, str):
            raise BadLine(f"`text`: expected a string, got a {type(text).__name__}")
        document = Document(text, place)
    else:
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
        ):
            raise BadLine("`messages`: expected a list of objects with strings `role` and `content`")
        document = Document("\n".join(m["content"] for m in messages), place, messages)
    if "\\u" in line:  # the one way for a lone surrogate to come in
        document.key()
    return document


def cut_point(text: str, start: int, limit: int) -> int:
    """Where the document that begins at `start` ends: at most `limit` characters on, at a blank line if possible."""
    if len(text) - start <= limit:
        return len(text)
    for mark in ("\n\n", "\n", " "):
        at = text.rfind(mark, start + limit // 2, start + limit)
        if at >= 0:
            return at + len(mark)
    return start + limit


# ---- packing


class Digests:
    """A set of 16-byte digests that takes about 16 bytes for each, where a `set` takes 100."""

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(1 << 16)]

    def add(self, digest: bytes) -> bool:
        """Whether it is new. (A match across the border of two digests is as improbable as a collision.)"""
        bucket, rest = self._buckets[digest[0] << 8 | digest[1]], digest[2:]
        if rest in bucket:
            return False
        bucket += rest
        return True


@dataclass
class Item:
    """A document on its way: `text` is the rendered chat if `chat`; `rank` in [0, 1) is its hash; `ids` end with EOT."""

    text: str
    chat: bool
    rank: float
    n_bytes: int
    ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


def read_items(corpus: Corpus, tokenizer: TokenizerAdapter, counts: Counter[str]) -> Iterator[list[Item]]:
    """Distinct documents in batches of about BATCH_CHARS characters."""
    digests, batch, size = Digests(), [], 0
    for document in corpus:
        key = document.key()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        if not digests.add(digest):
            counts["duplicates"] += 1
            continue
        text = document.text
        if document.messages is not None:
            try:
                text = tokenizer.render_chat(document.messages)
            except UserError as error:
                corpus.problems.add("bad line", document.place, str(error))
                continue
        batch.append(Item(text, document.messages is not None, int.from_bytes(digest[8:], "big") / 2**64, len(key)))
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch


def encode(batch: list[Item], tokenizer: TokenizerAdapter) -> list[Item]:
    """Fill in the ids. The bytes of a chat are those of its tokens, as the template adds to what its messages hold."""
    end = np.array([tokenizer.eot_id], dtype=np.int32)
    texts, chats = [item for item in batch if not item.chat], [item for item in batch if item.chat]
    for item, ids in zip(texts, tokenizer.encode_batch([item.text for item in texts]), strict=True):
        item.ids = np.concatenate([ids, end])
    for item, ids in zip(chats, tokenizer.encode_rendered([item.text for item in chats]), strict=True):
        closed = len(ids) > 0 and ids[-1] == end[0]  # some templates end an answer so
        item.ids, item.n_bytes = ids if closed else np.concatenate([ids, end]), int(tokenizer.byte_lengths[ids].sum())
    return batch


def encoded(batches: Iterator[list[Item]], tokenizer: TokenizerAdapter) -> Iterator[Item]:
    """Items with their ids, in order. Two batches are encoded at a time, each on all cores, so that none idles in between."""
    with ThreadPoolExecutor(2) as pool:
        running: deque[Future[list[Item]]] = deque()
        for batch in batches:
            running.append(pool.submit(encode, batch, tokenizer))
            if len(running) > 2:
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


class Split:
    """A packed split being written, and the bytes of its text."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.writer, self.n_bytes = PackedWriter(folder, vocab_size), 0

    def add(self, item: Item) -> None:
        self.writer.add(item.ids)
        self.n_bytes += item.n_bytes


def pack(corpus: Corpus, tokenizer: TokenizerAdapter, folder: Path, seq_len: int, k: int, val_split: float) -> str:
    """Write `folder`/train, val and tokenizer; returns a summary for people. Raises UserError when a split stays empty."""
    counts: Counter[str] = Counter()
    train, val = (Split(folder / name, tokenizer.model_vocab_size) for name in ("train", "val"))
    lowest: Item | None = None  # goes to validation if the hash chooses none
    with tqdm(total=corpus.bytes_total, unit="B", unit_scale=True, desc="packing", mininterval=0.5) as bar:
        for item in encoded(read_items(corpus, tokenizer, counts), tokenizer):
            bar.update(corpus.bytes_read - bar.n)
            if item.rank < val_split:
                val.add(item)
            elif val_split and not val.writer.n_docs and (lowest is None or item.rank < lowest.rank):
                if lowest:
                    train.add(lowest)
                lowest = item
            else:
                train.add(item)
        bar.update(corpus.bytes_read - bar.n)
    if lowest:
        (train if val.writer.n_docs or not train.writer.n_docs else val).add(lowest)

    problems = corpus.problems.report()
    n_docs = train.writer.n_docs + val.writer.n_docs
    if n_docs == 0:
        raise UserError("no usable document in the input" + (f"\n{problems}" if problems else ""))
    if n_docs == 1 and val_split:
        raise UserError("one document alone cannot be split into training and validation: bring more, or use --val_split 0")
    if not train.writer.n_docs:
        raise UserError(f"the hash puts all {n_docs} documents into validation: bring more, or lower --val_split")
    tokenizer.save(folder / "tokenizer")
    for split in (train, val):
        split.writer.close(
            tokenizer_fingerprint=tokenizer.fingerprint,
            tokenizer="../tokenizer",
            vocab_size=tokenizer.model_vocab_size,
            eot_id=tokenizer.eot_id,
            pad_id=tokenizer.pad_id,
            seq_len=seq_len,
            k=k,
            n_bytes=split.n_bytes,
            source=corpus.inputs,
            val_split=val_split,
            left_out={**corpus.problems.counts, **counts},
        )
    lines = [
        f"{name}: {split.writer.n_docs:,} documents, {split.writer.n_tokens:,} tokens, {split.n_bytes:,} bytes"
        for name, split in (("train", train), ("val", val))
    ]
    return "\n".join([*lines, f"duplicates dropped: {counts['duplicates']:,}", *([problems] if problems else [])])


# ---- the command


def check_output(output: Path) -> None:
    """Only a folder that packing has written may be replaced. Raises UserError."""
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; expected a folder")
    held = {entry.name for entry in output.iterdir()} if output.exists() else set()
    if other := sorted(held - PARTS):
        raise UserError(f"--output {output} would be replaced, but holds other things ({', '.join(other[:3])}); choose another")
    if held and not all(is_packed(output / split) for split in {"train", *held} - {"tokenizer"}):
        raise UserError(f"--output {output} would be replaced, but is no packed data; choose another, or remove it")


def replace_folder(new: Path, output: Path) -> None:
    """Put `new` in the place of `output`; the old one is deleted last."""
    old = new.with_name(new.name + ".old")
    if output.exists():
        output.rename(old)
    try:
        new.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def load_tokenizer(name: str | None) -> TokenizerAdapter:
    if name is None and not Path(DEFAULT_TOKENIZER).exists():
        raise UserError(
            f"no --tokenizer given, and there is none in {DEFAULT_TOKENIZER}; train one with "
            f"`python tools/train_tokenizer.py --input FILES --output {DEFAULT_TOKENIZER} --vocab_size 4096`"
        )
    return TokenizerAdapter.load(name or DEFAULT_TOKENIZER)


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that `Corpus` takes."""
    parser.add_argument("--input", required=True, nargs="+", metavar="PATH|DIR|GLOB", help="files, folders or globs")
    parser.add_argument("--format", choices=("auto", "jsonl", "text"), default="auto", help="auto goes by suffix [%(default)s]")
    parser.add_argument("--strict", action="store_true", help="end with an error at the first input that cannot be used")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_corpus_arguments(parser)
    parser.add_argument("--output", required=True, metavar="DIR", help="packed data to write")
    parser.add_argument("--tokenizer", help=f"folder, tokenizer.json or hub name [{DEFAULT_TOKENIZER}]")
    parser.add_argument(
        "--seq_len", type=int, default=4096, help="noted in meta.json; windows are the trainers' to choose [%(default)s]"
    )
    parser.add_argument(
        "--k", type=int, default=8, help="noted in meta.json; chunks are the autoencoder's to choose [%(default)s]"
    )
    parser.add_argument("--val_split", type=float, default=0.05, help="share of documents for validation [%(default)s]")
    args = parser.parse_args()
    if args.k < 1 or args.seq_len < 1:
        raise UserError(f"--seq_len and --k must be at least 1, got {args.seq_len} and {args.k}")
    if not 0 <= args.val_split < 1:
        raise UserError(f"--val_split must be at least 0 and below 1, got {args.val_split}")
    output = Path(args.output).expanduser().resolve()
    check_output(output)
    corpus = Corpus(args.input, args.format, args.strict)
    tokenizer = load_tokenizer(args.tokenizer)

    temporary = output.with_name(f".{output.name}.tmp-{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        summary = pack(corpus, tokenizer, temporary, args.seq_len, args.k, args.val_split)
        replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"{summary}\nwritten to {args.output}")


if __name__ == "__main__":
    run_cli(main)
