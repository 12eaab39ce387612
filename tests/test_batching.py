"""The server's worker: queue, deadlines, cancelling, failures, scoring, its end; and a model that cannot go on."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from served import Served, broken, serve, slow, wait_for

import server
from ae.tokenizer_adapter import TokenizerAdapter
from student.batching import Batcher, Busy, Closing, Event, Expired, Finished, Job
from student.sampler import SamplingParams
from student.scoring import Text, padded_length, score
from web.service import Service
from web.stream import Events

LONG = SamplingParams(max_new_tokens=200, ignore_eot=True)


@pytest.fixture
def served(tokenizer: TokenizerAdapter) -> Iterator[Served]:
    it = serve(tokenizer, max_queue=8)
    yield it
    it.close()


class Asked:
    """A job and what came of it."""

    def __init__(self, prompt: list[int], params: SamplingParams | None = LONG, **more: Any) -> None:
        self.events: list[Event] = []
        self.over = threading.Event()
        self.job = Job(prompt, params, self.emit, **more)

    def emit(self, _: Job, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Finished | Exception):
            self.over.set()

    def wait(self) -> Event:
        assert self.over.wait(20)
        return self.events[-1]


def test_alone_and_in_a_crowd(served: Served, tokenizer: TokenizerAdapter) -> None:
    """Rows of all lengths and parameters, three times as many as slots: each as it is alone, to the last token."""
    draw = random.Random(0)
    rows = []
    for i in range(12):
        params = SamplingParams(
            draw.randint(1, 60), draw.choice((0.0, 0.7, 1.3)), draw.choice((0.8, 1.0)), draw.choice((0, 9)), seed=i
        )
        rows.append((tokenizer.encode("def main" * draw.randint(1, 9)), params))
    alone = []
    for prompt, params in rows:
        served.batcher.submit([(one := Asked(prompt, params)).job])
        assert isinstance(one.wait(), Finished)
        alone.append(one.job.token_ids)
    crowd = [Asked(prompt, params) for prompt, params in rows]
    served.batcher.submit([one.job for one in crowd])
    for one, expected in zip(crowd, alone, strict=True):
        assert isinstance(one.wait(), Finished)
        assert one.job.token_ids == expected


def test_the_queue_is_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(served, monkeypatch)
    crowd = [Asked([5, 6]) for _ in range(12)]  # 4 slots and a queue of 8
    served.batcher.submit([one.job for one in crowd])
    with pytest.raises(Busy) as busy:
        served.batcher.submit([Asked([5]).job])
    assert 1 <= busy.value.retry_after <= 60
    wait_for(lambda: (served.batcher.running, served.batcher.waiting) == (4, 8))
    for one in crowd:
        one.job.cancel()
    wait_for(lambda: (served.batcher.running, served.batcher.waiting) == (0, 0))
    served.batcher.submit([(one := Asked([5], SamplingParams(1))).job])
    assert isinstance(one.wait(), Finished)


def test_a_row_whose_prompt_is_being_read_waits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    add, told = served.batcher.sampler.add, []

    def reading(*args: Any) -> Any:
        told.append((served.batcher.running, served.batcher.waiting))
        return add(*args)

    monkeypatch.setattr(served.batcher.sampler, "add", reading)
    crowd = [Asked([5, 6]) for _ in range(3)]
    served.batcher.submit([one.job for one in crowd])
    for one in crowd:
        assert isinstance(one.wait(), Finished)
    assert told == [(0, 3), (1, 2), (2, 1)]


def test_cancelling_frees_the_slot_within_a_step(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, joined_after = 0, []
    step, add = served.batcher.sampler.step, served.batcher.sampler.add

    def counted() -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            crowd[0].job.cancel()
        return step()

    def joining(*args: Any) -> Any:
        joined_after.append(steps)
        return add(*args)

    monkeypatch.setattr(served.batcher.sampler, "step", counted)
    monkeypatch.setattr(served.batcher.sampler, "add", joining)
    crowd = [Asked([5, 6]) for _ in range(5)]
    served.batcher.submit([one.job for one in crowd])
    for one in crowd[1:]:
        assert isinstance(one.wait(), Finished)
    assert joined_after == [0, 0, 0, 0, 3]  # the one that waited has the slot in the very next step
    assert len(crowd[0].events) == 2


def test_deadlines(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(served, monkeypatch)
    crowd = [Asked([5, 6], deadline=time.monotonic() + 0.1) for _ in range(6)]  # in slots and in the queue
    served.batcher.submit([one.job for one in crowd])
    assert {type(one.wait()) for one in crowd} == {Expired}
    wait_for(lambda: served.batcher.sampler.free == 4)


@pytest.mark.parametrize("what", ["step", "add", "score"])
def test_what_fails_fails_its_rows_and_no_others(served: Served, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    with monkeypatch.context() as patch:
        if what == "score":
            patch.setattr("student.batching.score", broken)
        else:
            patch.setattr(served.batcher.sampler, what, broken)
        crowd = [Asked([5], SamplingParams(3), top=1), Asked([6], SamplingParams(3))]
        served.batcher.submit([one.job for one in crowd])
        assert isinstance(crowd[0].wait(), RuntimeError)
        assert isinstance(crowd[1].wait(), Finished if what == "score" else RuntimeError)
    wait_for(lambda: (served.batcher.sampler.free, served.batcher.running, served.batcher.waiting) == (4, 0, 0))
    served.batcher.submit([(one := Asked([5], top=1)).job])
    assert isinstance(one.wait(), Finished)
    assert not served.batcher.failed and not served.batcher.closing


def test_scoring_takes_no_more_than_fits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass holds texts whose longest, times their number, is within the bound; one that is longer goes alone."""
    passes: list[list[int]] = []

    def watched(model: Any, texts: list[Text]) -> Any:
        passes.append([padded_length(text, 4) for text in texts])
        return score(model, texts)

    monkeypatch.setattr("student.batching.score", watched)
    monkeypatch.setattr("student.batching.SCORE_TOKENS", 64)
    lengths = [16, 16, 20, 100, 4, 32, 32, 7]
    crowd = [Asked([5] * n, None, top=1, score_prompt=True) for n in lengths]
    served.batcher.submit([one.job for one in crowd])
    for one, n in zip(crowd, lengths, strict=True):
        assert isinstance(end := one.wait(), Finished) and end.scores is not None and len(end.scores.logprobs) == n
    assert passes == [[16, 16, 20], [100], [4, 32], [32, 8]]


def test_prompts_read_together(tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several a pass: greedily each row is what it is alone."""
    it, together = serve(tokenizer, prefill_rows=4), []
    add = it.batcher.sampler.add
    monkeypatch.setattr(it.batcher.sampler, "add", lambda prompts, *rest: together.append(len(prompts)) or add(prompts, *rest))
    params, prompts = SamplingParams(20, temperature=0, ignore_eot=True), [[5 + i] * (1 + 5 * i) for i in range(4)]
    rows = []
    for jobs in ([[one] for one in prompts], [prompts]):
        for batch in jobs:
            rows += (crowd := [Asked(prompt, params) for prompt in batch])
            it.batcher.submit([one.job for one in crowd])
            assert all(isinstance(one.wait(), Finished) for one in crowd)
    assert together == [1, 1, 1, 1, 4]
    assert [one.job.token_ids for one in rows[:4]] == [one.job.token_ids for one in rows[4:]]
    it.close()


def test_a_pass_over_prompts_takes_no_more_than_fits(tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its pads: each prompt is as long as the longest. One that is longer than the bound is read alone."""
    it, passes = serve(tokenizer, prefill_rows=4), list[list[int]]()
    add = it.batcher.sampler.add

    def reading(prompts: list[list[int]], *rest: Any) -> Any:
        passes.append([len(prompt) for prompt in prompts])
        return add(prompts, *rest)

    monkeypatch.setattr(it.batcher.sampler, "add", reading)
    monkeypatch.setattr("student.batching.PREFILL_TOKENS", 64)
    crowd = [Asked([5] * n, SamplingParams(1)) for n in (8, 16, 20, 40, 100, 3, 4, 4)]
    it.batcher.submit([one.job for one in crowd])
    assert all(isinstance(one.wait(), Finished) for one in crowd)
    assert [n for own in passes for n in own] == [8, 16, 20, 40, 100, 3, 4, 4]
    assert all(len(own) == 1 or max(own) * len(own) <= 64 for own in passes) and passes[0] == [8, 16, 20]
    it.close()


def test_waiting_ends_where_reading_begins(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    add = served.batcher.sampler.add

    def reading(*args: Any) -> Any:
        time.sleep(0.2)
        return add(*args)

    monkeypatch.setattr(served.batcher.sampler, "add", reading)
    served.batcher.submit([(one := Asked([5, 6], SamplingParams(1))).job])
    assert isinstance(one.wait(), Finished)
    assert one.job.taken - one.job.submitted < 0.1 < one.job.joined - one.job.taken


def test_a_text_that_is_only_scored_counts_as_read(served: Served) -> None:
    served.batcher.submit([(one := Asked([5] * 9, None, top=0, score_prompt=True)).job])
    assert isinstance(one.wait(), Finished)
    figures = generate_latest(served.metrics.registry).decode()
    assert 'latentforge_tokens_total{kind="prompt"} 9.0' in figures and "latentforge_queue_seconds_count 1.0" in figures


@pytest.mark.parametrize("works", [True, False])
def test_the_step_is_compiled_before_anything_is_taken(served: Served, monkeypatch: pytest.MonkeyPatch, works: bool) -> None:
    begun, go = threading.Event(), threading.Event()

    def warm_up() -> None:
        begun.set()
        assert go.wait(20)
        if not works:
            raise RuntimeError("no compiler")

    monkeypatch.setattr(served.batcher.sampler, "warm_up", warm_up)
    batcher = Batcher(served.batcher.sampler, served.model, warm_up=True)
    app = server.make_app(Service(batcher, served.service.cfg, "tiny"), served.metrics)
    with TestClient(app) as client:
        assert begun.wait(20) and not batcher.ready.is_set()
        assert (client.get("/ready").status_code, client.get("/health").json()["status"]) == (503, "starting")
        go.set()
        wait_for(lambda: batcher.ready.is_set() or batcher.closing)
        assert (batcher.ready.is_set(), batcher.closing) == (works, not works)
        answer = client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == ((200, "ok") if works else (503, "failed"))
        assert client.get("/ready").status_code == (200 if works else 503)
        answer = client.post("/generate", json={"prompt": "x", "max_new_tokens": 4})
        assert answer.status_code == (200 if works else 503)


def test_draining_finishes_what_is_there(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(served, monkeypatch, 0.001)
    crowd = [Asked([5, 6]) for _ in range(6)]
    served.batcher.submit([one.job for one in crowd])
    served.batcher.drain(30)
    with pytest.raises(Closing):
        served.batcher.submit([Asked([5]).job])
    assert served.batcher.join(30) == 0
    assert {type(one.wait()) for one in crowd} == {Finished}


def test_draining_says_what_it_drops(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(served, monkeypatch)
    crowd = [Asked([5, 6]) for _ in range(6)]
    served.batcher.submit([one.job for one in crowd])
    served.batcher.drain(0.1)
    assert served.batcher.join(30) == 6
    assert {type(one.wait()) for one in crowd} == {Closing}


@pytest.mark.parametrize("where", ["sampler", "thread"])
def test_a_lost_device_is_told_at_health(served: Served, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def lost(*_: Any) -> Any:
        raise torch.AcceleratorError("device-side assert triggered") if where == "sampler" else RuntimeError("a bug")

    if where == "sampler":
        monkeypatch.setattr(served.batcher.sampler, "step", lost)
    else:
        monkeypatch.setattr(served.batcher, "_drop_ended", lost)
    with TestClient(served.app) as client:
        assert client.get("/health").json()["status"] == "ok"
        answer = client.post("/generate", json={"prompt": "a", "max_new_tokens": 8})
        assert answer.status_code in (500, 503), answer.text
        health = client.get("/health")
        assert (health.status_code, health.json()["status"], health.json()["running"]) == (503, "failed", 0)
        assert client.post("/generate", json={"prompt": "a"}).status_code == 503
    assert served.batcher.join(10) == (0 if where == "sampler" else 1)


def test_a_client_that_reads_no_more_is_given_up() -> None:
    class Ask:
        cancelled = False

        def cancel(self) -> None:
            self.cancelled = True

    async def content() -> AsyncIterator[bytes]:
        while True:
            yield b"data: x\n\n"

    async def receive() -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()  # as uvicorn's, where the socket's buffer is full

    async def main() -> bool:
        ask = Ask()
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "headers": []}
        events = Events(ask, content(), patience=0.1)  # type: ignore[arg-type]
        await asyncio.wait_for(events(scope, receive, send), 10)
        return ask.cancelled

    assert asyncio.run(main())
