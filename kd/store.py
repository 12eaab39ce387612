"""A teacher's answers on disk: one SQLite file a teacher, one transaction an answer, kept exactly as received.

An answer's key is the hash of the model, the whole request body and the version of the prompt template, so that the same
question is never paid for twice; `put` returns only once the answer is on the disk (WAL, synchronous=FULL), and nothing
may use an answer before. Any number of threads and processes may share a file on a local disk, of which one at a time
harvests: two would ask, and pay, for the same. The API key is no part of a request body, and so never gets here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from configs.errors import UserError

APPLICATION_ID = 0x4C464B44  # "LFKD", in SQLite's header: says whose file this is
VERSION = 1
PATIENCE_S = 60.0  # how long to wait for another process's transaction
PAGE = 64  # rows read at once
LARGEST = 256 << 20  # bytes of a request or an answer, unpacked; an answer of 16,000 tokens with 20 logprobs each has 30 MB
SCHEMA = """CREATE TABLE answers (
    key BLOB PRIMARY KEY, model TEXT NOT NULL, template INTEGER NOT NULL, request BLOB NOT NULL, prompt_ids BLOB,
    answer BLOB NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost REAL NOT NULL,
    created REAL NOT NULL)"""
LOST = "CREATE TABLE lost (id BLOB PRIMARY KEY, cost REAL NOT NULL, created REAL NOT NULL)"  # made by the first such row
COLUMNS = "key, model, template, request, prompt_ids, answer, prompt_tokens, completion_tokens, cost, created"
VALUES = ", ".join("?" * (COLUMNS.count(",") + 1))
INSERT = f"INSERT INTO answers ({COLUMNS}) VALUES ({VALUES}) ON CONFLICT(key) DO NOTHING"  # OR IGNORE would drop a NULL, too


def canonical(body: Mapping[str, Any]) -> bytes:
    """A request body as JSON that does not depend on the order of its keys."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def request_key(model: str, body: Mapping[str, Any], template: int) -> bytes:
    """What an answer is found by, 16 bytes."""
    return hashlib.blake2b(canonical({"model": model, "body": body, "template": template}), digest_size=16).digest()


@dataclass(frozen=True)
class StoredAnswer:
    """A row. `prompt_ids`: the prompt as training text where the request does not say it; `cost`: dollars; `created`: UNIX."""

    key: bytes
    model: str
    template: int
    request: dict[str, Any]
    prompt_ids: list[int] | None
    answer: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    cost: float
    created: float


def _unpacked(
    key: bytes, model: str, template: int, request: bytes, prompt: bytes | None, answer: bytes, *figures: Any
) -> StoredAnswer:
    """A row of the table, whose columns take values of any type. Raises ValueError and zlib.error for what nobody stored."""
    if not isinstance(model, str) or not isinstance(template, int):
        raise ValueError("its model or template is none")
    if not all(isinstance(x, bytes) for x in (request, answer, b"" if prompt is None else prompt)):
        raise ValueError("what should be compressed is not")
    body, told, ids = (None if packed is None else _json(packed) for packed in (request, answer, prompt))
    if not isinstance(body, dict) or not isinstance(told, dict) or key != request_key(model, body, template):
        raise ValueError("it is not what its key says")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int and 0 <= i < 1 << 31 for i in ids)):
        raise ValueError("its prompt is no list of token ids")
    if [type(x) for x in figures] != [int, int, float, float] or min(figures) < 0:
        raise ValueError("a count or a cost is no number")
    return StoredAnswer(key, model, template, body, ids, told, *figures)


def _json(packed: bytes) -> Any:
    """Compressed JSON; no more than LARGEST bytes of it, however small it is packed."""
    stream = zlib.decompressobj()
    raw = stream.decompress(packed, LARGEST)
    if not stream.eof:
        raise ValueError(f"cut short, or more than {LARGEST >> 20} MiB")
    return json.loads(raw)


@dataclass(frozen=True)
class Totals:
    """Sums over a store; `cost` in dollars, of answers and of requests without one."""

    answers: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


class Store:
    """The store in `path`, made there if it is missing. Close it, or use it in `with`.

    With `must_exist` it is only read: neither made, nor laid out where the file is empty, nor changed.
    Every method raises UserError for a file that is damaged, foreign, of another version, locked for long or on a full disk.
    """

    def __init__(self, path: str | Path, must_exist: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            if must_exist or self.path.exists():
                raise UserError(f"no teacher store at {path}: expected a file written by kd/harvest.py (make harvest)")
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        with self._errors():
            self._db = sqlite3.connect(self.path, timeout=PATIENCE_S, check_same_thread=False, isolation_level=None)
            try:
                self._open(must_exist)
            except BaseException:
                self._db.close()
                raise

    def _open(self, only_read: bool) -> None:
        """Check whose file it is; lay out a new one, in one transaction, as several processes may do it at once."""
        self._db.execute("PRAGMA cell_size_check = ON")
        self._db.execute(f"PRAGMA query_only = {only_read:d}")
        self._db.execute("BEGIN" if only_read else "BEGIN IMMEDIATE")
        tables = self._db.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        ours = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if not tables and not ours and not only_read:
            self._db.execute(SCHEMA)
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(f"PRAGMA user_version = {VERSION}")
        elif ours != APPLICATION_ID:
            raise UserError(f"{self.path} is an SQLite file of something else, no teacher store; choose another --store")
        elif version != VERSION:
            raise UserError(
                f"{self.path} has format version {version}, this code reads {VERSION}; harvest into another --store"
            )
        elif tables not in ([(SCHEMA,)], [(SCHEMA,), (LOST,)]):  # a view or a trigger would be somebody's program
            raise sqlite3.DatabaseError("its tables are not those of a teacher store")
        self._db.execute("COMMIT")
        if only_read:
            return
        self._db.execute("PRAGMA synchronous = FULL")
        deadline = time.monotonic() + PATIENCE_S
        while True:  # the switch itself does not wait for another process's lock
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's errors as one line that says what to do; all but a missing value's, which is the caller's."""
        try:
            yield
        except sqlite3.IntegrityError:  # a NaN is a NULL to SQLite
            raise
        except sqlite3.OperationalError as error:
            raise UserError(
                f"teacher store {self.path}: {error}. What was stored before is intact; look for a full disk, a folder that "
                "cannot be written, or another program that holds the file"
            ) from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: its message quotes damaged names
            raise UserError(
                f"{self.path} is damaged or no SQLite file ({error}). Move it away, or save what can be read with "
                f"`sqlite3 {self.path} .recover`"
            ) from None

    @contextmanager
    def harvesting(self, wait: Callable[[str], None] | None = None) -> Iterator[None]:
        """Keep every other harvest off this store meanwhile; the lock ends with the process, however that ends.

        Where another one holds it: waits until that is done, after telling `wait` so; raises UserError without `wait`.
        """
        with open(f"{self.path}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy = f"another harvest is using {self.path}"
                if wait is None:
                    raise UserError(f"{busy}; run this command again when it is done, or use another --store") from None
                wait(f"{busy}: waiting until it is done")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def put(
        self,
        body: Mapping[str, Any],
        answer: bytes,
        *,
        model: str,
        template: int,
        prompt_ids: Sequence[int] | None = None,
        prompt_tokens: int = 0,
        completion_tokens: int = 0,
        cost: float = 0.0,
    ) -> bool:
        """Commit the answer (JSON, as received) to the request `body`; False if there was one already, which stays."""
        row = (
            request_key(model, body, template),
            model,
            template,
            zlib.compress(canonical(body)),
            None if prompt_ids is None else zlib.compress(json.dumps([int(i) for i in prompt_ids]).encode()),
            zlib.compress(answer),
            prompt_tokens,
            completion_tokens,
            cost,
            time.time(),
        )
        return self._insert(row)

    def _insert(self, row: tuple[Any, ...]) -> bool:
        with self._errors(), self._lock:
            return self._db.execute(INSERT, row).rowcount == 1

    def lose(self, cost: float) -> None:
        """Commit the dollars that a request may have cost that brought no answer to keep."""
        with self._errors(), self._lock:
            self._add_lost([(os.urandom(16), cost, time.time())])

    def _has_lost(self) -> bool:
        return self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'lost'").fetchone() is not None

    def _add_lost(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self._db.execute(LOST.replace("TABLE", "TABLE IF NOT EXISTS"))
        self._db.executemany("INSERT INTO lost VALUES (?, ?, ?) ON CONFLICT(id) DO NOTHING", rows)

    def tokens_of(self, key: bytes) -> int | None:
        """The completion tokens of the answer with this key; None where there is none."""
        with self._errors(), self._lock:
            row = self._db.execute("SELECT completion_tokens FROM answers WHERE key = ?", (key,)).fetchone()
            if row is not None and not isinstance(row[0], int):
                raise sqlite3.DatabaseError("a count of tokens is no number")
        return None if row is None else row[0]

    def __contains__(self, key: bytes) -> bool:
        return self.tokens_of(key) is not None

    def __len__(self) -> int:
        return self.totals().answers

    def totals(self) -> Totals:
        """Counts and cost of all answers, and what was lost."""
        sums = "count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), coalesce(sum(cost), 0.0)"
        with self._errors(), self._lock:
            totals = Totals(*self._db.execute(f"SELECT {sums} FROM answers").fetchone())
            lost = self._db.execute("SELECT coalesce(sum(cost), 0.0) FROM lost").fetchone()[0] if self._has_lost() else 0.0
        return replace(totals, cost=totals.cost + lost)

    def newest(self) -> float:
        """When the youngest answer was stored, UNIX seconds; 0 without any."""
        with self._errors(), self._lock:
            return self._db.execute("SELECT coalesce(max(created), 0.0) FROM answers").fetchone()[0]

    def get(self, key: bytes) -> StoredAnswer | None:
        """The answer with this key; None where there is none."""
        with self._errors(), self._lock:
            row = self._db.execute(f"SELECT {COLUMNS} FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else self._unpack(row)

    def __iter__(self) -> Iterator[StoredAnswer]:
        """All answers in the order of their commit, those that come in meanwhile included. Memory does not grow."""
        return map(self._unpack, self._rows())

    def _unpack(self, row: tuple[Any, ...]) -> StoredAnswer:
        try:
            return _unpacked(*row)
        except (zlib.error, ValueError, RecursionError) as error:
            name = row[0].hex()[:32] if isinstance(row[0], bytes) else str(row[0])[:32]
            raise UserError(f"{self.path}: the answer {name} is damaged ({error})") from None

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        last = 0
        while True:
            with self._errors(), self._lock:
                query = f"SELECT rowid, {COLUMNS} FROM answers WHERE rowid > ? ORDER BY rowid LIMIT {PAGE}"
                rows = self._db.execute(query, (last,)).fetchall()
            if not rows:
                return
            for row in rows:
                if row[0] <= last:
                    raise UserError(f"{self.path} is damaged: its rows are out of order")  # else this might never end
                last = row[0]
                yield row[1:]

    def merge(self, other: Store) -> int:
        """Take over the answers of `other` that are not here, and what it lost; returns how many answers.

        Raises UserError at one that is damaged.
        """
        taken, rows = 0, other._rows()
        while page := list(islice(rows, PAGE)):
            for row in page:
                other._unpack(row)  # compressed answers carry a checksum
            with self._errors(), self._lock:  # one transaction, one sync a page
                self._db.execute("BEGIN IMMEDIATE")
                taken += self._db.executemany(INSERT, page).rowcount
                self._db.execute("COMMIT")
        with other._errors(), other._lock:
            lost = other._db.execute("SELECT * FROM lost").fetchall() if other._has_lost() else []
        if lost:
            with self._errors(), self._lock:
                self._add_lost(lost)
        return taken

    def settle(self) -> None:
        """Bring all that was committed into the file itself, which may then be moved. Raises UserError on a full disk."""
        with self._errors(), self._lock:
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def models(self) -> set[str]:
        """The teachers whose answers are here: one, as a rule."""
        with self._errors(), self._lock:
            return {model for (model,) in self._db.execute("SELECT DISTINCT CAST(model AS TEXT) FROM answers")}

    def check(self) -> None:
        """Raise UserError where SQLite's own structure of the file is damaged."""
        with self._errors(), self._lock:
            found = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
