"""Nothing paid for is lost: one transaction an answer, shared by threads and processes, refused when it is not ours."""

from __future__ import annotations

import json
import math
import multiprocessing
import sqlite3
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from kd.store import LARGEST, Store, Totals, canonical, request_key

BODY = {"messages": [{"role": "user", "content": "\u732b"}], "seed": 1}


def put(store: Store, seed: int, answer: bytes = b'{"x": 1}') -> bool:
    return store.put(
        {**BODY, "seed": seed},
        answer,
        model="m",
        template=1,
        prompt_ids=[1, seed],
        prompt_tokens=2,
        completion_tokens=3,
        cost=0.5,
    )


def put_many(path: str, first: int, count: int) -> None:
    with Store(path) as store:
        for seed in range(first, first + count):
            put(store, seed)


def test_an_answer_comes_back_as_it_was(tmp_path: Path) -> None:
    with Store(tmp_path / "deep" / "t.sqlite") as store:
        assert put(store, 1, b'{"logprob": NaN, "text": "\xe7\x8c\xab"}') and not put(store, 1, b'{"other": 2}')
        key = request_key("m", {"seed": 1, "messages": BODY["messages"]}, 1)
        assert key in store and request_key("m", BODY, 2) not in store and request_key("n", BODY, 1) not in store
        assert store.tokens_of(key) == 3 and store.get(b"none") is None
    with Store(tmp_path / "deep" / "t.sqlite", must_exist=True) as store:
        (row,) = store
        again = store.get(key)
        assert again is not None and replace(row, answer={}) == replace(again, answer={})
        assert all(
            list(answer) == ["logprob", "text"] and math.isnan(answer["logprob"]) for answer in (row.answer, again.answer)
        )
        assert again.answer["text"] == row.answer["text"]
        assert (row.model, row.template, row.request, row.prompt_ids) == ("m", 1, BODY, [1, 1])
        assert row.answer["text"] == "\u732b" and row.created > 1e9
        assert store.totals() == Totals(1, 2, 3, 0.5) and len(store) == 1


def test_a_cost_that_is_no_number_is_an_error_not_a_lost_answer(tmp_path: Path) -> None:
    """A NaN is a NULL to SQLite, which must not pass for an answer that was there already."""
    with Store(tmp_path / "t.sqlite") as store:
        with pytest.raises(sqlite3.IntegrityError, match=r"NOT NULL constraint failed: answers\.cost"):
            store.put(BODY, b"{}", model="m", template=1, cost=math.nan)
        with pytest.raises(sqlite3.IntegrityError, match=r"NOT NULL constraint failed: lost\.cost"):
            store.lose(math.nan)
        assert put(store, 1) and store.totals() == Totals(1, 2, 3, 0.5)


def test_keys_do_not_depend_on_order() -> None:
    assert canonical({"b": 1, "a": [2]}) == canonical({"a": [2], "b": 1}) == b'{"a":[2],"b":1}'
    assert request_key("m", {"a": 1}, 1) != request_key("m", {"a": 1.5}, 1)


def test_every_answer_is_synced_before_put_returns(tmp_path: Path) -> None:
    with Store(tmp_path / "t.sqlite") as store:
        assert store._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert store._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
        put(store, 1)
        with Store(tmp_path / "t.sqlite") as other:  # another connection sees it at once
            assert len(other) == 1


def test_threads_and_processes_share_a_file(tmp_path: Path) -> None:
    path = str(tmp_path / "t.sqlite")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=put_many, args=(path, start, 60)) for start in (0, 40)]
    for process in processes:
        process.start()
    with Store(path) as store:
        threads = [threading.Thread(target=lambda s=s: [put(store, i) for i in range(s, s + 50)]) for s in (80, 100)]
        for thread in threads:
            thread.start()
        for worker in (*threads, *processes):
            worker.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert len(store) == 150 and {row.request["seed"] for row in store} == set(range(150))


def test_one_harvest_at_a_time(tmp_path: Path) -> None:
    """Another one is refused, or waits where it says that it does; reading and writing go on."""
    said: list[str] = []

    def wait() -> None:
        with Store(tmp_path / "t.sqlite") as store, store.harvesting(said.append):
            said.append("in")

    waiting = threading.Thread(target=wait)
    with Store(tmp_path / "t.sqlite") as one, Store(tmp_path / "t.sqlite") as two:
        with one.harvesting():
            with pytest.raises(UserError, match=r"another harvest is using .*t\.sqlite; run this"), two.harvesting():
                pass
            assert put(two, 1)
            waiting.start()
            while not said:
                time.sleep(0.001)
            assert len(said) == 1 and "waiting until it is done" in said[0]
        waiting.join()
        assert said[1:] == ["in"]
        with two.harvesting():
            pass


def test_merge(tmp_path: Path) -> None:
    with Store(tmp_path / "a.sqlite") as a, Store(tmp_path / "b.sqlite") as b:
        for seed in range(100):
            put(a if seed < 60 else b, seed)
        put(b, 0, b'{"later": 1}')
        assert a.merge(b) == 40 and a.merge(b) == 0
        assert len(a) == 100 and a.get(request_key("m", {**BODY, "seed": 0}, 1)).answer == {"x": 1}  # type: ignore[union-attr]


def test_what_was_lost_is_part_of_the_cost(tmp_path: Path) -> None:
    """Once in a merged store, and in a file that had nothing of the kind before."""
    path = tmp_path / "t.sqlite"
    put_many(str(path), 0, 3)
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone() == (1,)
    with Store(path) as store:
        store.lose(0.25)
        store.lose(0.25)
    with Store(path, must_exist=True) as store, Store(tmp_path / "all.sqlite") as merged:
        assert store.totals() == Totals(3, 6, 9, 2.0) and len(list(store)) == 3
        assert merged.merge(store) == 3 and merged.merge(store) == 0
        assert merged.totals() == store.totals()


def test_iteration_sees_what_comes_in_meanwhile(tmp_path: Path) -> None:
    with Store(tmp_path / "a.sqlite") as store:
        put_many(str(store.path), 0, 70)
        seen = 0
        for row in store:
            seen += 1
            if row.request["seed"] == 69:
                put(store, 70)
        assert seen == 71


def test_files_that_are_no_store_of_ours(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no teacher store at"):
        Store(tmp_path / "none.sqlite", must_exist=True)
    with pytest.raises(UserError, match="no teacher store at"):
        Store(tmp_path)
    (tmp_path / "text").write_text("not a database " * 100)
    with pytest.raises(UserError, match="damaged or no SQLite file"):
        Store(tmp_path / "text")
    with sqlite3.connect(tmp_path / "foreign") as other:
        other.execute("CREATE TABLE theirs (x)")
    with pytest.raises(UserError, match="something else"):
        Store(tmp_path / "foreign")
    Store(tmp_path / "newer").close()
    with sqlite3.connect(tmp_path / "newer") as newer:
        newer.execute("PRAGMA user_version = 9")
    with pytest.raises(UserError, match="version 9, this code reads 1"):
        Store(tmp_path / "newer")


def test_reading_changes_nothing(tmp_path: Path) -> None:
    path, empty = tmp_path / "t.sqlite", tmp_path / "empty"
    put_many(str(path), 0, 3)
    before = path.read_bytes()
    with Store(path, must_exist=True) as store:
        assert len(list(store)) == 3
        with pytest.raises(UserError, match="readonly"):
            put(store, 9)
    assert path.read_bytes() == before
    empty.touch()
    with pytest.raises(UserError, match="no teacher store"):
        Store(empty, must_exist=True)
    assert empty.read_bytes() == b""


@pytest.mark.parametrize(
    "program",
    [
        "CREATE TRIGGER t AFTER INSERT ON answers BEGIN DELETE FROM answers; END",
        "CREATE VIEW v AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n FROM r) SELECT n FROM r",
    ],
)
def test_programs_in_a_store_are_refused(tmp_path: Path, program: str) -> None:
    put_many(str(tmp_path / "t.sqlite"), 0, 3)
    with sqlite3.connect(tmp_path / "t.sqlite") as database:
        database.execute(program)
    for must_exist in (True, False):
        with pytest.raises(UserError, match="not those of a teacher store"):
            Store(tmp_path / "t.sqlite", must_exist)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("answer", zlib.compress(bytes(LARGEST + 1)), "cut short, or more than 256 MiB"),
        ("answer", zlib.compress(b'{"x": 2}')[:-3], "cut short"),
        ("answer", zlib.compress(b"[]"), "not what its key says"),
        ("request", zlib.compress(b'{"seed": 2}'), "not what its key says"),
        ("model", "another", "not what its key says"),
        ("prompt_ids", zlib.compress(b"[-1]"), "no list of token ids"),
        ("completion_tokens", -1, "a count or a cost is no number"),
        ("cost", "much", "a count or a cost is no number"),
    ],
)
def test_an_answer_is_what_was_stored(tmp_path: Path, column: str, value: object, message: str) -> None:
    put_many(str(tmp_path / "t.sqlite"), 0, 1)
    with sqlite3.connect(tmp_path / "t.sqlite") as database:
        database.execute(f"UPDATE answers SET {column} = ?", (value,))
    with Store(tmp_path / "t.sqlite", must_exist=True) as store, pytest.raises(UserError, match=message):
        list(store)


def test_a_damaged_file_is_one_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "t.sqlite"
    put_many(str(path), 0, 300)
    raw = bytearray(path.read_bytes())
    raw[4096 * 2 :] = b"\xff" * (len(raw) - 4096 * 2)
    path.write_bytes(raw)
    with pytest.raises(UserError, match="damaged"), Store(path) as store:
        list(store)


def test_an_answer_that_cannot_be_read_names_itself(tmp_path: Path) -> None:
    with Store(tmp_path / "t.sqlite") as store:
        put(store, 1, b"{broken")
        with pytest.raises(UserError, match=r"the answer [0-9a-f]{32} is damaged"):
            list(store)


def test_requests_keep_lone_surrogates(tmp_path: Path) -> None:
    """A JSON lines file may hold one; it must not end the harvest."""
    with Store(tmp_path / "t.sqlite") as store:
        assert store.put({"prompt": json.loads('"\\ud800"')}, b"{}", model="m", template=1)
