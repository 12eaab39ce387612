"""Faults for real: servers on loopback that misbehave, kill -9, and a key that must not show up anywhere."""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, World, pack, run_script
from faulty_server import ByteTokenizer, FaultyServer, harvest_in_a_child

from ae.chunks import PackedData
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from kd import harvest as harvest_script
from kd.harvest import Harvest, HarvestConfig, Summary, harvest
from kd.kd_batcher import KDShard, pack_answers
from kd.kd_client import Answer, Stopped, TeacherClient
from kd.limits import Patience
from kd.prompts import Prompts
from kd.records import Misaligned, TokenTable, parse_answer
from kd.settings import Settings
from kd.store import Store

KEY = "sk-a-very-secret-key-0123456789"
QUICK = Patience(timeout_s=2.0, backoff_s=0.005, longest_s=0.05, failures=9, window_s=0.02)
TRANSIENT = ["429", "429 after", "500", "503", "slow", "reset", "truncated", "shape"]
ODD = ["odd null", "odd nan", "odd -9999", "odd duplicate", "odd fragment"]


def write_prompts(path: Path, n: int) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"prompt {i}"}) + "\n" for i in range(n)))
    return path


def config(tmp_path: Path, n: int, **more: Any) -> HarvestConfig:
    """One pass over n chat prompts."""
    values = {"prompts": str(write_prompts(tmp_path / "p.jsonl", n)), "store": str(tmp_path / "t.sqlite"), "mode": "chat"}
    return HarvestConfig(**{**values, "temperature": 0.0, "n_tokens": 10**9, **more})


def quiet(cfg: HarvestConfig, url: str, patience: Patience = QUICK) -> Summary:
    return harvest(cfg, Settings(url, "teacher", KEY), patience, log=lambda line: None)


def until_used_up(cfg: HarvestConfig, url: str, patience: Patience = QUICK, stops: int = 9) -> list[str]:
    """Run the same command again and again, as a user would, until all prompts are used; what stopped the runs before."""
    reasons: list[str] = []
    while len(reasons) <= stops:
        try:
            quiet(cfg, url, patience)
        except UserError as error:
            if "used up at" in str(error) and "budget" not in str(error):
                return reasons
            reasons.append(str(error))
    raise AssertionError(reasons)


def test_two_thousand_requests_against_a_server_that_fails_in_every_way(tmp_path: Path) -> None:
    """Every answerable prompt is answered exactly once; what cannot be aligned is counted, not guessed."""
    n, rng = 2000, random.Random(0)
    bad = {f"prompt {i}": status for i, status in zip(range(50, n, 150), ["400", "413", "415", "422"] * 9, strict=False)}
    once = {700: "swapped", 1300: "402", 400: "hung", 900: "hung"}

    def behave(number: int, prompt: str) -> str:
        if number in once:
            return once.pop(number)
        if prompt in bad:
            return bad[prompt]
        if rng.random() < 0.08:
            return rng.choice(TRANSIENT)
        kind = int(prompt.split()[1])
        return ODD[kind // 10 % len(ODD)] if kind % 10 == 7 else "good"

    patience = replace(QUICK, timeout_s=5.0)  # a good answer that took longer would be asked for, and delivered, again
    with FaultyServer(behave) as server:
        reasons = until_used_up(config(tmp_path, n, concurrency=16), server.url, patience)
    assert len(reasons) == 2 and "another-teacher" in reasons[0] and "HTTP 402" in reasons[1]
    delivered = Counter(prompt for prompt, what, _ in server.log if what in ("good", "slow", *ODD))
    answerable = {f"prompt {i}" for i in range(n)} - bad.keys()
    assert set(delivered) == answerable and set(delivered.values()) == {1}
    kinds: Counter[str] = Counter()
    with Store(tmp_path / "t.sqlite") as store:
        rows = list(store)
    assert sorted(row.request["messages"][-1]["content"] for row in rows) == sorted(answerable)
    table = TokenTable(ByteTokenizer())
    for row in rows:
        try:
            kinds["with logprobs" if parse_answer(row.request, row.answer, table).has_logprobs else "text alone"] += 1
        except Misaligned as error:
            kinds[str(error)] += 1
    odd = Counter(what for prompt, what, _ in server.log if what in ODD)
    assert kinds["text alone"] == odd["odd null"] > 20 and len(kinds) == 3
    assert kinds["the tokens' bytes differ from the text"] == odd["odd fragment"] > 20  # a last entry that is no token


def test_kill_9_twenty_times(tmp_path: Path) -> None:
    """At random moments: nothing committed goes missing, and no committed prompt is asked again."""
    n, rng = 4000, random.Random(1)
    prompts, path = write_prompts(tmp_path / "p.jsonl", n), tmp_path / "t.sqlite"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["faulty_server", "kd.harvest"])  # light, so that a child starts at once
    committed: set[str] = set()

    def stored() -> set[str]:
        if not path.exists():
            return set()
        with Store(path) as store:
            return {row.request["messages"][-1]["content"] for row in store}

    with FaultyServer(latency_s=0.01) as server:
        for _ in range(20):
            asked_before = len(server.log)
            child = context.Process(target=harvest_in_a_child, args=(str(prompts), str(path), server.url))
            child.start()
            deadline = time.monotonic() + 20
            seen = asked_before + rng.randint(1, 30)
            while len(server.log) < seen and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.02))
            child.kill()
            child.join()
            assert child.exitcode == -signal.SIGKILL
            assert not committed & set(server.asked()[asked_before:])
            now = stored()
            assert committed <= now
            committed = now
        assert 20 < len(committed) < n
    assert len(server.log) - len(committed) <= 20 * (8 + 1)  # what was in flight when a run was killed, at most, is lost


def start_harvest(tmp_path: Path, server: FaultyServer, *flags: Any) -> subprocess.Popen[str]:
    """As a program, with 500 prompts and the store t.sqlite."""
    prompts = write_prompts(tmp_path / "p.jsonl", 500)
    flags = ("--prompts", prompts, "--store", tmp_path / "t.sqlite", "--mode", "chat", "--base_url", server.url, *flags)
    environment = {**os.environ, "VENICE_API_KEY": KEY, "VENICE_MODEL": "teacher", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kd.harvest", *map(str, flags)]
    return subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(server: FaultyServer, requests: int) -> None:
    deadline = time.monotonic() + 20
    while len(server.log) < requests and time.monotonic() < deadline:
        time.sleep(0.01)


def test_interrupt_keeps_what_is_in_flight(tmp_path: Path) -> None:
    """The first Ctrl-C sends nothing more and commits every answer that is on its way."""
    with FaultyServer(latency_s=0.2) as server:
        child = start_harvest(tmp_path, server)
        wait_for(server, 12)
        child.send_signal(signal.SIGINT)
        out, error = child.communicate(timeout=20)
    assert child.returncode == 130 and "finishing the requests that are in flight" in error and "Traceback" not in error
    with Store(tmp_path / "t.sqlite") as store:
        assert len(store) == len(server.log) >= 12
    assert KEY not in out + error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_counts_what_it_gives_up(tmp_path: Path, number: signal.Signals) -> None:
    """What is in flight may be charged for: it is part of the store's cost when the process ends, at once."""
    price = {"input": {"usd": 0}, "output": {"usd": 1000}}  # an answer of 3 tokens: $0.003; a request of 100: $0.1
    with FaultyServer(lambda n, prompt: "hung" if n else "good") as server:
        server.models = [{"id": "teacher", "model_spec": {"pricing": price}}]
        child = start_harvest(tmp_path, server, "--budget_usd", 1, "--max_new_tokens", 100, "--concurrency", 4)
        assert child.stderr is not None
        wait_for(server, 5)
        child.send_signal(number)
        for line in child.stderr:
            if "once more to drop them" in line:
                break
        child.send_signal(number)
        error = child.stderr.read()
        assert child.wait(timeout=20) == 130 and "Traceback" not in error and "spent in all: $0.4030" in error
        assert server.in_flight == 4  # none of them was waited for
    with Store(tmp_path / "t.sqlite", must_exist=True) as store:
        assert store.totals().answers == 1 and store.totals().cost == pytest.approx(0.003 + 4 * 0.1)


def test_a_second_interrupt_leaves_no_paid_answer_behind(tmp_path: Path) -> None:
    """One that came in, and waits for the disk while everything is cancelled."""
    busy = threading.Event()

    async def main(store: Store) -> Harvest:
        cfg, settings = config(tmp_path, 1), Settings("http://127.0.0.1:1/v1", "teacher")
        async with TeacherClient(settings) as client:
            work = Harvest(cfg, client, store, Prompts(cfg, settings, None), log=lambda line: None)
            work.disk.submit(busy.wait)
            (job,) = work.prompts
            handling = asyncio.create_task(work._handle(job, Answer(b"{}", {}, 1, 1, 0.5, 0.0)))
            await asyncio.sleep(0.05)
            assert not handling.done()
            return work  # whereupon asyncio cancels all tasks

    with Store(tmp_path / "t.sqlite") as store:
        work = asyncio.run(main(store))
        busy.set()
        work.disk.shutdown()
        assert len(store) == 1 and store.totals().cost == 0.5


def test_the_key_shows_up_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """Not in logs at the finest level, output, errors, tracebacks with their causes, reprs, or any byte of the store."""
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    for what in ("401", "402", "404", "400", "500", "echo key", "reset", "swapped", "302", "good"):
        with FaultyServer(lambda number, prompt, what=what: what) as server:  # its errors repeat the key
            settings = Settings(server.url, "teacher", KEY)
            said.append(repr(settings))
            cfg = config(tmp_path, 30, concurrency=4)
            try:
                harvest(cfg, settings, Patience(attempts=2, backoff_s=0.001, window_s=0.01), log=said.append)
            except UserError as error:
                said += traceback.format_exception(error)
                said += [repr(error), repr(error.__cause__), repr(error.__context__)]
    monkey = Settings("http://127.0.0.1:1/v1", "teacher", KEY)
    with pytest.raises(UserError) as caught:
        harvest(cfg, monkey, Patience(attempts=2, backoff_s=0.001), log=said.append)
    said += traceback.format_exception(caught.value)
    everything = "\n".join([*said, caplog.text, *capfd.readouterr()])
    assert "[key]" in everything and "used up at" in everything  # it was there to be seen, and the good run went through
    assert KEY not in everything
    for file in tmp_path.iterdir():
        assert KEY.encode() not in file.read_bytes()
    with Store(tmp_path / "t.sqlite") as store:
        assert len(store) == 30 and all(KEY not in json.dumps([row.request, row.answer]) for row in store)


# -------------------------------------------------------------------------------------------------------- harvesting
def test_harvest_from_packed_data(packed: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Prompts are the beginnings of documents, as ids; the same command asks for nothing again, and more for more tokens."""
    monkeypatch.chdir(tmp_path)
    with FaultyServer() as server:
        flags = ["--data", packed.data, "--base_url", server.url, "--model", "teacher", "--prompt_tokens", 5, "--text_prompts"]
        assert run_script(harvest_script, *flags, "--n_tokens", 30, "--dry_run") == 0 and not server.log
        assert "estimate for 30 tokens" in capsys.readouterr().err
        for n_tokens, requests in ((30, 10), (30, 10), (45, 15)):
            assert run_script(harvest_script, *flags, "--n_tokens", n_tokens, "--concurrency", 1) == 0
            assert len(server.log) == requests
    out = capsys.readouterr().err
    assert "10 answers (10 from earlier runs)" in out and "15 answers (10 from earlier runs)" in out
    data = PackedData(packed.data / "train")
    with Store(tmp_path / "data" / "teacher" / "teacher.sqlite") as store:
        rows = list(store)
    assert rows[0].prompt_ids == data.tokens[:5].tolist() and "prompt" in rows[0].request
    assert len({row.request["seed"] for row in rows}) == 15


def test_harvest_from_nothing(packed: World, tmp_path: Path) -> None:
    tokenizer = str(packed.root / "tokenizer")
    with FaultyServer() as server:
        cfg = HarvestConfig(n_tokens=9, tokenizer=tokenizer, store=str(tmp_path / "t"), concurrency=1)
        summary = quiet(cfg, server.url)
        assert server.asked() == ["[0]"] * 3 and summary.answers == 3 and summary.tokens == 9
        with Store(tmp_path / "t") as store:
            assert {row.request["seed"] for row in store} == {1, 2, 3} and [row.prompt_ids for row in store] == [[]] * 3


def test_the_estimate_goes_by_the_first_answer(tmp_path: Path) -> None:
    """Short answers to long prompts: what prompts cost was bounded from below before, and says so."""
    said: list[str] = []
    price = {"input": {"usd": 1}, "output": {"usd": 2}}
    with FaultyServer() as server:  # answers of 3 tokens after 3 of a prompt, whatever is asked
        server.models = [{"id": "teacher", "model_spec": {"pricing": price}}]
        cfg = config(tmp_path, 2, n_tokens=3_000_000, max_new_tokens=512)
        for dry_run in (True, False):
            cfg.dry_run = dry_run
            try:
                harvest(cfg, Settings(server.url, "teacher"), QUICK, log=said.append)
            except UserError as error:
                assert "used up" in str(error)
    before, after = (line for line in said if "estimate" in line)
    assert "at least 5,860 calls, 35,160 prompt tokens, $6.04" in before and "time unknown" in before
    assert "about 1,000,000 calls, 3,000,000 prompt tokens, $9.00" in after


def test_a_budget_counts_earlier_runs(tmp_path: Path) -> None:
    """Running the same command again spends nothing more; a larger budget goes on."""
    price = {"input": {"usd": 0}, "output": {"usd": 1000}}  # an answer of 3 tokens: $0.003
    with FaultyServer() as server:
        server.models = [{"id": "teacher", "model_spec": {"pricing": price}}]
        for budget, answers in ((0.0105, 3), (0.0105, 3), (0.0165, 5)):
            cfg = config(tmp_path, 50, max_new_tokens=3, budget_usd=budget, concurrency=4)
            with pytest.raises(Stopped, match="the budget is used up"):
                quiet(cfg, server.url)
            assert len(server.log) == answers
            with Store(tmp_path / "t.sqlite") as store:
                assert store.totals().cost == pytest.approx(0.003 * answers)


def test_a_budget_counts_what_was_lost_in_earlier_runs(tmp_path: Path) -> None:
    """Answers that break on their way may be charged for: the same command again asks for no more of them."""
    price = {"input": {"usd": 0}, "output": {"usd": 1000}}  # a request of 3 tokens: $0.003
    with FaultyServer(lambda number, prompt: "truncated" if number % 2 else "good") as server:
        server.models = [{"id": "teacher", "model_spec": {"pricing": price}}]
        cfg = config(tmp_path, 50, max_new_tokens=3, budget_usd=0.0185, concurrency=1)
        for _ in range(2):
            with pytest.raises(Stopped, match=r"the budget is used up: \$0.0180 spent"):
                quiet(cfg, server.url)
            assert len(server.log) == 6
    with Store(tmp_path / "t.sqlite", must_exist=True) as store:
        assert store.totals().answers == 3 and store.totals().cost == pytest.approx(0.018)


def test_a_store_takes_one_harvest_at_a_time(tmp_path: Path) -> None:
    """A second one would ask, and pay, for the same; an estimate asks for nothing."""
    cfg = config(tmp_path, 5)
    with FaultyServer() as server:
        with Store(tmp_path / "t.sqlite") as store, store.harvesting():
            with pytest.raises(UserError, match="another harvest is using"):
                quiet(cfg, server.url)
            quiet(config(tmp_path, 5, dry_run=True), server.url)
        assert not server.log
        assert until_used_up(cfg, server.url) == [] and len(server.log) == 5


def test_no_logprobs_there_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    with FaultyServer(lambda number, prompt: "odd null") as server:
        server.models = [
            {"id": name, "model_spec": {"capabilities": {"supportsLogProbs": has}}}
            for name, has in (("teacher", False), ("better", True))
        ]
        cfg = config(tmp_path, 5, n_tokens=6, temperature=1.0)
        summary = harvest(cfg, Settings(server.url, "teacher"), QUICK, log=said.append)
    text = "\n".join(said)
    assert summary.top_logprobs is None and "sequence-level" in text and "that give logprobs: better" in text
    assert "teacher gives no top logprobs" in text


def test_a_stored_answer_without_logprobs_is_not_said_to_be_asked_again(tmp_path: Path) -> None:
    """The server gives logprobs by now: the same harvest goes on as it was begun, another seed finds out."""
    said: list[str] = []
    with FaultyServer(lambda number, prompt: "odd null" if number < 2 else "good") as server:
        cfg = config(tmp_path, 5, n_tokens=6, temperature=1.0, concurrency=1)
        quiet(cfg, server.url)
        for seed, text_alone in ((0, True), (1, False)):
            cfg.seed, asked = seed, len(server.log)
            summary = harvest(cfg, Settings(server.url, "teacher"), QUICK, log=said.append)
            assert (summary.top_logprobs is None) == text_alone == (len(server.log) == asked)
    text = "\n".join(said)
    assert "the first stored answer has no top logprobs (another --store or --seed" in text and "gives no top" not in text


def test_a_wrong_tokenizer_stops_before_it_costs_much(packed: World, tmp_path: Path) -> None:
    """The server's words are no tokens of a byte tokenizer that was trained on other text."""
    with FaultyServer(lambda number, prompt: "odd fragment") as server:
        cfg = config(tmp_path, 500, tokenizer=str(packed.root / "tokenizer"), concurrency=2)
        with pytest.raises(Stopped, match="none of 20 answers aligns"):
            quiet(cfg, server.url)
        assert len(server.log) <= 25


def test_a_teacher_that_writes_nothing_stops_before_it_costs_much(tmp_path: Path) -> None:
    """With a tokenizer or without; one that does so now and then goes on, and it is counted."""
    with FaultyServer(lambda n, prompt: "odd empty") as server:
        with pytest.raises(Stopped, match=r"none of 20 answers can be used: the teacher wrote no text.*--max_new_tokens"):
            quiet(config(tmp_path, 100, concurrency=2), server.url)
        assert 20 <= len(server.log) <= 22
    with FaultyServer(lambda n, prompt: "good" if n % 10 == 0 else "odd empty") as server:
        lines: list[str] = []
        cfg = config(tmp_path, 100, concurrency=2, store=str(tmp_path / "other.sqlite"), n_tokens=150)
        harvest(cfg, Settings(server.url, "teacher", KEY), QUICK, log=lines.append)
    empty = sum(what == "odd empty" for _, what, _ in server.log)
    assert empty > 30 and f"cannot be used: {empty} x the teacher wrote no text" in lines


def test_its_text_alone_needs_no_tokenizer_of_the_teacher(packed: World, tmp_path: Path) -> None:
    """Nothing is misaligned where no logprobs are asked for; logprobs that were stored before are left out."""
    tokenizer = TokenizerAdapter.load(packed.root / "tokenizer")
    said: list[str] = []
    with FaultyServer() as server:
        cfg = config(tmp_path, 30, tokenizer=str(packed.root / "tokenizer"), n_tokens=75, temperature=1.0, concurrency=2)
        with pytest.raises(Stopped, match=r"none of 20 answers aligns .* or --top_logprobs 0 for its text alone"):
            quiet(cfg, server.url)
        cfg.top_logprobs = 0
        summary = harvest(cfg, Settings(server.url, "teacher"), QUICK, log=said.append)
    text = "\n".join(said)
    assert "--top_logprobs 0: going on with its text alone" in text and "gives no top logprobs" not in text
    assert summary.aligned >= 25 and not summary.misaligned and summary.top_logprobs is None
    with Store(tmp_path / "t.sqlite") as store:
        assert sum("logprobs" not in row.request for row in store) == summary.aligned
        counts = pack_answers(store, tokenizer, tmp_path / "kd", k=0)
    assert KDShard(tmp_path / "kd" / "train").kind == "sequence" and not any("left out" in what for what in counts)
    assert counts["train documents"] + counts["val documents"] == summary.aligned  # the equal ones of both harvests once


def test_a_corpus_is_not_said_to_be_scored_while_requests_were_dropped(tmp_path: Path) -> None:
    """The same command asks for what is missing; then it is."""
    few = pack(World(tmp_path / "few"), ROOT / "ae")
    more = {"data": str(few.data), "prompts": None, "mode": "score", "top_logprobs": 2, "concurrency": 1}
    more["max_new_tokens"] = 4096
    cfg, lines = config(tmp_path, 1, **more), list[str]()
    with FaultyServer(lambda n, prompt: "400" if n == 2 else "good") as server:
        with pytest.raises(UserError, match=r"1 requests got no answer, the rest of .* is scored; run it again"):
            harvest(cfg, Settings(server.url, "teacher", KEY), QUICK, log=lines.append)
        assert not any(line.startswith("all of") for line in lines)
        harvest(cfg, Settings(server.url, "teacher", KEY), QUICK, log=lines.append)
    assert any(line.startswith("all of") for line in lines)


def test_answers_to_other_prompts_are_said_not_to_count(tmp_path: Path) -> None:
    def said(**more: Any) -> list[str]:
        lines: list[str] = []
        harvest(
            config(tmp_path, 100, n_tokens=6, concurrency=1, **more),
            Settings(server.url, "teacher", KEY),
            QUICK,
            log=lines.append,
        )
        return [line for line in lines if "do not count towards --n_tokens (--whole_store counts them)" in line]

    with FaultyServer() as server:
        assert not said() and not said()
        (line,) = said(max_new_tokens=100)
        assert "has no answer to the first prompt: its 2 answers" in line
        assert not said(max_new_tokens=99, whole_store=True)


def test_logprobs_that_no_tokenizer_checks_are_said(tmp_path: Path) -> None:
    said: list[str] = []
    with FaultyServer() as server:
        harvest(config(tmp_path, 5, n_tokens=6), Settings(server.url, "teacher"), QUICK, log=said.append)
    assert sum("no --tokenizer: not checked" in line for line in said) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data": None, "prompts": None}, "a chat needs prompts"),
        ({"data": "x"}, "not both"),
        ({"prompts": "/nowhere"}, "cannot be read"),
        ({"mode": "completions"}, "give --tokenizer"),
        ({"prompts": __file__}, r"test_kd_faults\.py:1: expected a JSON object"),
        ({"budget_usd": 1.0}, "lists no price"),
        ({"mode": "score", "data": "x", "prompts": None, "top_logprobs": 0}, "--top_logprobs of at least 1"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    with FaultyServer() as server:
        cfg = config(tmp_path, 2)
        for key, value in flags.items():
            setattr(cfg, key, value)
        with pytest.raises(UserError, match=message):
            harvest_without_tokenizer(cfg, server.url)
        assert not server.log


def harvest_without_tokenizer(cfg: HarvestConfig, url: str, load: Callable[[HarvestConfig], None] = lambda cfg: None) -> None:
    before = harvest_script.load_tokenizer
    harvest_script.load_tokenizer = load  # type: ignore[assignment]
    try:
        quiet(cfg, url)
    finally:
        harvest_script.load_tokenizer = before


def test_a_store_below_a_file_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", 1)
    flags = ["--prompts", prompts, "--store", prompts / "t.sqlite", "--mode", "chat", "--model", "m"]
    assert run_script(harvest_script, *flags, "--base_url", "http://127.0.0.1:1/v1") == 2
    assert "p.jsonl: File exists; expected a path that can be used" in capsys.readouterr().err


def test_kd_is_light_to_import() -> None:
    code = "import sys, kd.harvest; assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
