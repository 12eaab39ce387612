"""The shards of a harvest are disjoint and complete; their merged stores are the store of an unsharded harvest."""

from __future__ import annotations

import json
import os
import sqlite3
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from conftest import run_script
from faulty_server import ByteTokenizer, FaultyServer
from test_kd_faults import config, quiet
from test_kd_store import put

from configs.errors import UserError
from kd import shards
from kd.limits import Patience
from kd.prompts import HarvestConfig, Prompts
from kd.settings import Settings
from kd.shards import Shard, merge
from kd.store import Store

LOCAL = Settings("http://127.0.0.1:1/v1", "teacher")


def harvest_all(cfg: HarvestConfig, url: str) -> None:
    with pytest.raises(UserError, match="used up at"):
        quiet(cfg, url, Patience())  # a busy machine is no reason to ask twice


def contents(path: Path) -> dict[bytes, Any]:
    with Store(path, must_exist=True) as store:
        return {row.key: (row.request, row.answer, row.prompt_ids, row.completion_tokens, row.cost) for row in store}


def test_merged_shards_are_the_unsharded_harvest(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.sqlite" for i in range(4)]
    with FaultyServer() as server:
        harvest_all(config(tmp_path, 60, store=str(paths[0])), server.url)
        whole = server.asked()
        for i in (1, 2, 3):
            harvest_all(config(tmp_path, 60, store=str(paths[i]), shard=f"{i}/3"), server.url)
        assert sorted(server.asked()[60:]) == sorted(whole)  # each prompt once: disjoint and complete
    parts = [contents(path) for path in paths[1:]]
    assert all(10 < len(part) < 30 for part in parts)
    done = merge(paths[1:], tmp_path / "all.sqlite")
    assert contents(tmp_path / "all.sqlite") == contents(paths[0])
    assert (done["answers"], done["completion_tokens"], done["in_several"], done["models"]) == (60, 180, 0, ["teacher"])


def test_every_number_of_shards_covers_every_prompt_in_every_pass(tmp_path: Path) -> None:
    """The requests too, seeds included: a second pass asks the same documents of the same machine."""
    cfg = config(tmp_path, 40, temperature=1.0)
    for n in (1, 2, 3, 5, 7):
        whole = {json.dumps(job.body) for job in islice(Prompts(cfg, LOCAL, None), 80)}
        seen: list[str] = []
        for i in range(1, n + 1):
            cfg.shard = f"{i}/{n}"
            jobs = [job.body for job in islice(Prompts(cfg, LOCAL, None), 80)]
            own = [body for body in jobs if json.dumps(body) in whole]
            documents = [body["messages"][-1]["content"] for body in own]
            assert documents[: len(own) // 2] == documents[len(own) // 2 :]
            seen += map(json.dumps, own)
        cfg.shard = "1/1"
        assert len(seen) == 80 and set(seen) == whole


def test_shards_of_prompts_from_nothing_and_shards_without_any(tmp_path: Path) -> None:
    cfg = HarvestConfig(mode="completions")
    seeds = {}
    for i in (1, 2):
        cfg.shard = f"{i}/2"
        seeds[i] = {job.body["seed"] for job in islice(Prompts(cfg, LOCAL, ByteTokenizer()), 40)}
    assert not seeds[1] & seeds[2] and {*range(1, 30)} <= seeds[1] | seeds[2]
    with pytest.raises(UserError, match=r"p.jsonl holds no prompts for --shard \d/50"):
        for i in range(1, 51):
            next(iter(Prompts(config(tmp_path, 1, shard=f"{i}/50"), LOCAL, None)))


def test_a_machine_asks_for_its_part_of_the_tokens(tmp_path: Path) -> None:
    with FaultyServer() as server:
        assert quiet(config(tmp_path, 60, n_tokens=60, shard="2/4", concurrency=1), server.url).tokens == 15
    assert Shard(1, 4).share(61) == 16


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2", "1/2/3", ""])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UserError, match="expected i/n"):
        Shard.parse(text)


def test_an_answer_that_both_have_is_kept_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, output = tmp_path / "a", tmp_path / "b", tmp_path / "deep" / "all"
    with Store(a) as one, Store(b) as two:
        for seed in range(150):
            put(one if seed < 90 else two, seed)
        put(two, 0, b'{"later": 1}')
    assert run_script(shards, a, b, "--output", output) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["in_several"] == 1 and "150 answers of m" in captured.err
    assert contents(output) == contents(b) | contents(a)  # the first one stays
    assert run_script(shards, a, b, "--output", output) == 2 and "exists already" in capsys.readouterr().err


def test_what_cannot_be_merged_leaves_no_output(tmp_path: Path) -> None:
    good, other, output = tmp_path / "good", tmp_path / "other", tmp_path / "all"
    with Store(good) as one, Store(other) as two:
        for seed in range(200):
            put(one, seed, json.dumps({"text": os.urandom(60).hex()}).encode())
        two.put({"seed": 1}, b"{}", model="another", template=1)
    with pytest.raises(UserError, match=r"different teachers \(another, m\)"):
        merge([good, other], output)
    with pytest.raises(UserError, match="no teacher store at"):
        merge([good, tmp_path / "none"], output)
    raw = good.read_bytes()
    for damaged in (raw[: len(raw) // 2], raw[: len(raw) // 2] + b"\xff" * 9000 + raw[len(raw) // 2 + 9000 :]):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            merge([good, tmp_path / "bad"], output)
    (tmp_path / "bad").write_bytes(raw)
    with sqlite3.connect(tmp_path / "bad") as database:  # a bit of one answer, in a file that SQLite finds whole
        key, answer = database.execute("SELECT key, answer FROM answers LIMIT 1 OFFSET 150").fetchone()
        changed = answer[:-1] + bytes([answer[-1] ^ 1])
        database.execute("UPDATE answers SET answer = ? WHERE key = ?", (changed, key))
    with pytest.raises(UserError, match=f"the answer {key.hex()} is damaged"):
        merge([tmp_path / "bad", good], output)
    assert not output.exists()
    assert merge([good], output)["answers"] == 200  # what the failures left behind does not get into it


def test_an_interrupted_merge_is_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, output = [tmp_path / "a", tmp_path / "b"], tmp_path / "all"
    for first, path in zip((0, 100), parts, strict=True):
        with Store(path) as store:
            for seed in range(first, first + 100):
                put(store, seed)
    unpack, left = Store._unpack, iter(range(170))

    def interrupted(store: Store, row: tuple[Any, ...]) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return unpack(store, row)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Store, "_unpack", interrupted)
        merge(parts, output)
    assert not output.exists()
    merge(parts[1:], output)  # even with other inputs: nothing of the interrupted one is kept
    assert len(contents(output)) == 100
    output.unlink()
    assert merge(parts, output)["answers"] == 200
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("all-*"))
