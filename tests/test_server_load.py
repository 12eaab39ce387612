"""The server in a crowd and under abuse: determinism, limits, clients that leave, failures, ends, nonsense."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import World
from fastapi.testclient import TestClient
from served import Served, listening, serve, wait_for

import server
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from student.batching import Batcher, Busy, Closing, Event, Expired, Finished, Job
from student.sampler import SamplingParams
from student.scoring import Text, padded_length, score
from tools import load_test
from web.service import Service

ROOT = Path(__file__).parents[1]
LONG = SamplingParams(max_new_tokens=200, ignore_eot=True)
FUZZ = int(os.environ.get("FUZZ", 400))  # random bodies
EXAMPLES = int(os.environ.get("EXAMPLES", 6))  # of schemathesis, for each operation


@pytest.fixture
def served(tokenizer: TokenizerAdapter) -> Iterator[Served]:
    it = serve(tokenizer, max_queue=8)
    yield it
    it.close()


@pytest.fixture
def endless(tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row ends before its last token."""
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset())


def slow(served: Served, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """Latent steps that take their time."""
    step = served.batcher.sampler.step
    monkeypatch.setattr(served.batcher.sampler, "step", lambda: time.sleep(seconds) or step())


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


# ------------------------------------------------------------------------------------------------------ the batcher
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


def broken(*_: Any) -> Any:
    raise RuntimeError("out of memory")


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


@pytest.mark.parametrize("what", ["step", "add", "score"])
def test_a_failure_over_http(served: Served, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    body = {"prompt": "x", "max_tokens": 3, "logprobs": 1}
    with TestClient(served.app) as client:
        with monkeypatch.context() as patch:
            if what == "score":
                patch.setattr("student.batching.score", broken)
            else:
                patch.setattr(served.batcher.sampler, what, broken)
            whole = client.post("/v1/completions", json=body)
            streamed = client.post("/v1/completions", json={**body, "stream": True})
        assert (whole.status_code, whole.json()["error"]["code"]) == (500, "inference_failed")
        assert "out of memory" not in whole.text + streamed.text  # that is for the log
        assert "event: error" in streamed.text and '"inference_failed"' in streamed.text and "[DONE]" not in streamed.text
        assert client.post("/v1/completions", json=body).status_code == 200
        assert 'latentforge_rows_total{outcome="failed"} 2.0' in client.get("/metrics").text


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


# ------------------------------------------------------------------------------------------------------ over sockets
@pytest.mark.usefixtures("endless")
def test_load_with_clients_that_leave(tokenizer: TokenizerAdapter) -> None:
    """A second of the load test's minute."""
    it = serve(tokenizer)
    with listening(it.app) as url:
        result = asyncio.run(load_test.load(url, [12], 1.5, 0.2, 40))
    [row] = result["phases"]
    assert row["answers"] > 5 and row["hung_up"] > 0
    assert (row["wrong"], row["failed"], result["left"]) == (0, 0, 0)


def fake_phase(health: Callable[[], Awaitable[httpx.Response]]) -> load_test.Tally:
    """0.4 s of the load test against a server that does nothing wrong but in its /health."""

    async def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return await health()
        await asyncio.sleep(0.02)
        return httpx.Response(200, text='event: chunk\ndata: {"text": "a", "token_ids": [1]}\n\nevent: done\ndata: {}\n\n')

    async def run() -> load_test.Tally:
        async with httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(respond)) as client:
            return await load_test.phase(client, 2, 0.4, 0, [{}], ["a"])

    return asyncio.run(run())


def test_the_load_test_sees_a_health_that_fails() -> None:
    async def failing() -> httpx.Response:
        return httpx.Response(500)

    async def lost() -> httpx.Response:
        raise httpx.ReadError("reset")

    async def hanging() -> httpx.Response:
        await asyncio.sleep(60)
        raise AssertionError

    for health in (failing, lost):
        tally = fake_phase(health)
        assert tally.answers > 5 and tally.wrong == 0
        assert tally.failed == len(tally.health) > 1
    [seconds] = fake_phase(hanging).health
    assert 0.3 < seconds < 10


def test_the_load_test_does_not_read_an_error_as_no_memory() -> None:
    async def run() -> None:
        transport = httpx.MockTransport(lambda _: httpx.Response(500))
        async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
            await load_test.resident(client)

    with pytest.raises(UserError, match="/metrics: expected 200, got 500"):
        asyncio.run(run())


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(
    tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    it = serve(tokenizer, slots=1)
    slow(it, monkeypatch, 0.05)
    body = {"prompt": "x", "max_new_tokens": 200, "stream": stream}  # 50 steps
    with listening(it.app) as url, httpx.Client(base_url=url, timeout=20) as client:
        with pytest.raises(httpx.ReadTimeout):
            if stream:
                with client.stream("POST", "/generate", json=body) as answer:
                    next(answer.iter_lines())
                    raise httpx.ReadTimeout("enough")
            client.post("/generate", json=body, timeout=0.3)
        wait_for(lambda: 'latentforge_rows_total{outcome="cancelled"} 1.0' in client.get("/metrics").text)
        assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}


@pytest.mark.usefixtures("endless")
def test_what_clients_are_told(tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """429 with Retry-After, 504, errors within a stream, 503 at the end; /health answers all the while."""
    it = serve(tokenizer, slots=1, max_queue=1, timeout_s=1.5, grace_s=0.3)
    slow(it, monkeypatch, 0.05)
    body = {"prompt": "x", "max_new_tokens": 200}

    async def run(url: str) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=20) as client:
            running = asyncio.ensure_future(client.post("/generate", json=body))
            streamed = asyncio.ensure_future(client.post("/generate", json={**body, "stream": True}))
            while (it.batcher.running, it.batcher.waiting) != (1, 1):
                assert not running.done()
                await asyncio.sleep(0.01)
            busy = await client.post("/generate", json=body)
            assert (busy.status_code, busy.json()["error"]["code"]) == (429, "queue_full")
            assert int(busy.headers["retry-after"]) >= 1
            assert (await client.get("/health")).json() == {"status": "ok", "running": 1, "waiting": 1}
            assert ((await running).status_code, (await running).json()["error"]["code"]) == (504, "timeout")
            assert "event: error" in (await streamed).text and '"timeout"' in (await streamed).text
            last = asyncio.ensure_future(client.post("/generate", json=body))
            while not it.batcher.running:
                await asyncio.sleep(0.01)
            it.batcher.drain(0.2)
            assert ((await client.get("/ready")).status_code, (await client.get("/health")).status_code) == (503, 200)
            assert ((await last).status_code, (await last).json()["error"]["code"]) == (503, "closing")
            assert (await client.post("/generate", json=body)).status_code == 503

    with listening(it.app) as url:
        asyncio.run(run(url))


def test_a_body_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.guard.BODY_SECONDS", 0.2)
    with (
        listening(served.app) as url,
        socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as client,
    ):
        client.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{")
        assert client.recv(1000).split(b"\r\n")[0].split()[1] == b"408"


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_stream_says_that_it_is_alive(served: Served, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Between slow steps, and without losing any of the text."""
    body = {"prompt": "x", "max_new_tokens" if path == "/generate" else "max_tokens": 16, "seed": 1}
    with TestClient(served.app) as client:
        whole = client.post(path, json=body).json()
        slow(served, monkeypatch, 0.1)
        monkeypatch.setattr("web.service.IDLE_SECONDS", 0.01)
        blocks = client.post(path, json={**body, "stream": True}).text.strip().split("\n\n")
    assert sum(block.startswith(":") for block in blocks) >= 4
    parts = [json.loads(block.split("data: ", 1)[1]) for block in blocks if "data: {" in block]
    if path == "/generate":
        assert "".join(part.get("text", "") for part in parts) == whole["text"]
    else:
        assert "".join(part["choices"][0]["text"] for part in parts) == whole["choices"][0]["text"]


def test_nothing_is_taken_while_the_step_is_compiled(tokenizer: TokenizerAdapter) -> None:
    """Deadlines and the grace are the batcher's thread's, which compiles: so a row is refused rather than forgotten."""
    it = serve(tokenizer)
    it.batcher.ready.clear()  # as it is until the step is compiled
    with TestClient(it.app) as client:
        answer = client.post("/generate", json={"prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "starting", "5")
        it.batcher.drain(0)
        closing = client.post("/generate", json={"prompt": "x"})
        assert (closing.status_code, closing.json()["error"]["code"]) == (503, "closing")


def test_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """YAML < environment < flags."""
    for name in [name for name in os.environ if name.startswith("SERVE_") or name.endswith("_CHECKPOINT")]:
        monkeypatch.delenv(name)
    shipped = server.settings([])
    assert (shipped.student_ckpt, shipped.ae_ckpt, shipped.host, shipped.port) == (
        "checkpoints/student.pt",
        None,
        "127.0.0.1",
        7860,
    )
    (tmp_path / "mine.yaml").write_text("slots: 3\nmax_queue: 5\nport: 1\n")
    monkeypatch.setenv("SERVE_CONFIG", str(tmp_path / "mine.yaml"))
    monkeypatch.setenv("SERVE_MAX_QUEUE", "6")
    monkeypatch.setenv("STUDENT_CHECKPOINT", "x.pt")
    cfg = server.settings(["--port", "2"])
    assert (cfg.slots, cfg.max_queue, cfg.port, cfg.student_ckpt) == (3, 6, 2, "x.pt")
    monkeypatch.setenv("SERVE_SLOTS", "many")
    with pytest.raises(UserError, match="slots: expected int"):
        server.settings([])


def test_compose_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What compose.yaml passes on by default are settings, and the fast path is among them."""
    passed = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["server"]["environment"]
    for name in [name for name in os.environ if name.startswith("SERVE_")]:
        monkeypatch.delenv(name)
    for name, value in passed.items():
        found = re.fullmatch(r"\$\{(\w+):-(.*)\}", value)
        assert found and found[1] == name
        monkeypatch.setenv(name, found[2])
    cfg = server.settings([])
    assert (cfg.compile, cfg.slots) == (None, 32)  # None: auto
    assert {name for name in passed if name != server.KEY} == {
        f"SERVE_{field.upper()}" for field in server.from_environment(os.environ)
    }


def start(world: World, *command: str, **environment: str) -> subprocess.Popen[str]:
    known = {
        "STUDENT_CHECKPOINT": str(world.student),
        "AE_CHECKPOINT": str(world.ae),
        "OMP_NUM_THREADS": "1",
        "SERVE_SLOTS": "2",
    }
    env = {**os.environ, **known, **environment}
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def test_the_program(world: World) -> None:
    """Started as a person would, and stopped by a signal while it writes: the stream comes to its end."""
    with start(world, "server.py", "--port", "0", "--timeout_s", "60", **{server.KEY: "secret"}) as process:
        assert process.stderr is not None
        try:
            url = next(line for line in process.stderr if "listening at" in line).split("listening at ")[1].strip()
            with httpx.Client(base_url=url, timeout=30) as client:
                wait_for(lambda: client.get("/health").status_code == 200)
                body = {"prompt": "import", "max_new_tokens": 24, "stream": True}
                assert client.post("/generate", json=body).status_code == 401
                with client.stream("POST", "/generate", json=body, headers={"Authorization": "Bearer secret"}) as answer:
                    assert answer.status_code == 200
                    lines = answer.iter_lines()
                    next(lines)
                    process.send_signal(signal.SIGTERM)
                    assert "event: done" in list(lines)
        finally:
            process.terminate()
        assert process.wait(timeout=30) == -signal.SIGTERM
        log = process.stderr.read()
        assert "every row was finished" in log and "Traceback" not in log


@pytest.mark.parametrize("command", [("server.py",), ("-m", "uvicorn", "server:app")])
def test_what_cannot_be_served(world: World, command: tuple[str, ...]) -> None:
    with start(world, *command, STUDENT_CHECKPOINT="/nowhere/student.pt", SERVE_PORT="0") as process:
        _, log = process.communicate(timeout=60)
    assert process.returncode == 2
    assert log.splitlines()[-1].startswith("error: ") and "/nowhere/student.pt" in log
    assert "Traceback" not in log


# ---------------------------------------------------------------------------------------------------------- nonsense
PATHS = ("/generate", "/v1/completions", "/v1/chat/completions")
NAMES = (
    "prompt", "max_new_tokens", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "stream", "n", "echo",
    "logprobs", "messages", "top_logprobs", "model", "stream_options", "role", "content", "xyzzy",
)  # fmt: skip
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**63), 10**400, 1e308, -0.0, 5e-324, float("nan"), float("inf"), "", "a",
    "\ud800", "\0", "\U0001f642" * 9, "user", "def f():", 0.5,
)  # fmt: skip


def nonsense(draw: random.Random, depth: int = 0) -> Any:
    """A random value; near the top mostly an object with fields that the server knows."""
    kind = draw.random()
    if depth == 0 or (depth < 3 and kind < 0.15):
        return {draw.choice(NAMES): nonsense(draw, depth + 1) for _ in range(draw.randint(0, 6))}
    if depth < 4 and kind < 0.35:
        return [nonsense(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    return draw.choice(SCALARS)


@pytest.mark.usefixtures("endless")
def test_random_bodies(served: Served) -> None:
    """No answer is the server's fault (5xx), each is JSON or a stream, and no place is lost."""
    draw = random.Random(1)
    with TestClient(served.app, raise_server_exceptions=False) as client:
        for _ in range(FUZZ):
            body = nonsense(draw)
            if draw.random() < 0.7:
                body |= {"prompt": draw.choice(["x", [7], ["x", "y"]]), "max_tokens": 3, "max_new_tokens": 3}
                body["messages"] = [{"role": "user", "content": "x"}]
                for name in draw.sample(sorted(body), k=min(len(body), draw.randint(0, 2))):
                    body[name] = nonsense(draw, 1)
            content = json.dumps(body).encode()
            if draw.random() < 0.1:
                content = draw.randbytes(draw.randint(0, 50)) + content[: draw.randint(0, len(content))]
            answer = client.post(draw.choice(PATHS), content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code < 500, content
            if not answer.headers["content-type"].startswith("text/event-stream"):
                assert isinstance(answer.json(), dict)
        wait_for(lambda: served.batcher.running + served.batcher.waiting == 0)
        assert served.batcher.sampler.free == 4


def test_the_document(tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Schemathesis, all checks: what the OpenAPI document allows is answered (or refused for its meaning: 400, 404), what
    it forbids is refused, and every answer is of the form that the document states."""
    pytest.importorskip("schemathesis", reason="schemathesis is not installed (.ci/requirements.txt)")
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    it = serve(tokenizer, key="secret", max_new_tokens=8)
    config = tmp_path / "schemathesis.toml"
    config.write_text("[checks.positive_data_acceptance]\nexpected-statuses = ['2xx', 400, 404]\n")
    program = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "--config-file", str(config)]
    flags = "run --checks all --seed 1 --phases examples,coverage,fuzzing --no-color --generation-database none --max-examples"
    with listening(it.app) as url:
        command = [*program, *flags.split(), str(EXAMPLES), "--header", "Authorization: Bearer secret", f"{url}/openapi.json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
