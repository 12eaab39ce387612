"""The server in a crowd and under abuse: clients that leave, failures, ends, nonsense; the program itself."""

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
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import yaml
from conftest import World
from fastapi import Request
from fastapi.testclient import TestClient
from served import Served, broken, listening, serve, slow, wait_for

import server
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from configs.schema import ServeConfig
from student.batching import Job
from student.sampler import Chunk
from tools import load_test
from web.metrics import Metrics
from web.protocol import Refused
from web.service import Ask
from web.stream import collect

ROOT = Path(__file__).parents[1]
FUZZ = int(os.environ.get("FUZZ", 400))  # random bodies
EXAMPLES = int(os.environ.get("EXAMPLES", 6))  # of schemathesis, for each operation


@pytest.fixture
def served(tokenizer: TokenizerAdapter) -> Iterator[Served]:
    it = serve(tokenizer, max_queue=8)
    yield it
    it.close()


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


def test_the_load_test_does_not_wait_beyond_its_phase() -> None:
    """A refused client would, as long as it is told to, and the rate would be of that time."""

    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path == "/health" else 429, headers={"Retry-After": "60"})

    async def run() -> load_test.Tally:
        async with httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(respond)) as client:
            return await load_test.phase(client, 2, 0.2, 0, [{}], ["a"])

    tally = asyncio.run(run())
    assert tally.refused >= 2 and tally.seconds < 20


def test_the_load_test_keeps_its_figures_when_the_server_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = False

    def respond(request: httpx.Request) -> httpx.Response:
        if gone:
            raise httpx.ConnectError("refused")
        if request.url.path == "/metrics":
            return httpx.Response(200, text="process_resident_memory_bytes 1e6\n")
        return httpx.Response(200, text='event: chunk\ndata: {"text": "a", "token_ids": [1]}\n\nevent: done\ndata: {}\n\n')

    async def phase(*_: Any) -> load_test.Tally:
        nonlocal gone
        gone = len(said) == 1
        said.append(0)
        return load_test.Tally(1, seconds=1.0)

    said: list[int] = []
    client = partial(httpx.AsyncClient, transport=httpx.MockTransport(respond))
    monkeypatch.setattr(load_test.httpx, "AsyncClient", client)
    monkeypatch.setattr(load_test, "phase", phase)
    result = asyncio.run(load_test.load("http://fake", [1, 1, 1], 1, 0, 8))
    assert len(result["phases"]) == 2 and result["memory_mb"] == [1, 1] and result["left"] is None


def test_the_load_test_does_not_read_an_error_as_no_memory() -> None:
    async def run() -> None:
        transport = httpx.MockTransport(lambda _: httpx.Response(500))
        async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
            await load_test.resident(client)

    with pytest.raises(UserError, match="/metrics: expected 200, got 500"):
        asyncio.run(run())


@pytest.mark.parametrize(("status", "said"), [(401, "set SERVE_API_KEY"), (400, "lower --max_new_tokens")])
def test_the_load_test_says_why_it_is_refused(monkeypatch: pytest.MonkeyPatch, status: int, said: str) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path == "/ready" else status)

    with_transport = partial(httpx.AsyncClient, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(load_test.httpx, "AsyncClient", with_transport)
    with pytest.raises(UserError, match=f"/generate: expected 200, got {status}; .*{said}"):
        asyncio.run(load_test.load("http://fake", [1], 1.0, 0.0, 8))


@pytest.mark.parametrize("steps", range(5))
def test_a_client_that_leaves_as_a_chunk_comes_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Before Python 3.12 `asyncio.wait_for` may swallow the cancelling then; the follower would wait for ever."""
    monkeypatch.setattr("web.service.IDLE_SECONDS", 0.05)

    async def run() -> int:
        ask, left = Ask([Job([1], None, lambda *_: None)]), asyncio.Event()

        class Leaving:
            async def receive(self) -> dict[str, str]:
                await left.wait()
                return {"type": "http.disconnect"}

        before = asyncio.all_tasks()
        collecting = asyncio.ensure_future(collect(cast(Request, Leaving()), ask))
        await asyncio.sleep(0.01)
        left.set()
        for _ in range(steps):
            await asyncio.sleep(0)
        ask._events.put_nowait((ask.jobs[0], Chunk(0, [1], "x")))
        with pytest.raises(Refused, match="went away"):
            await collecting
        await asyncio.sleep(0.3)
        return len(asyncio.all_tasks() - before)

    assert asyncio.run(run()) == 0


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


def test_a_client_that_leaves_within_its_body_is_no_bad_request(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "latentforge.server")
    with listening(served.app) as url:
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=20) as client:
            client.sendall(
                b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
        wait_for(lambda: "/generate" in caplog.text)
    assert "POST /generate 499" in caplog.text


def test_a_body_that_is_not_declared_as_json(served: Served) -> None:
    with TestClient(served.app) as client:
        answer = client.post("/generate", content=b'{"prompt": "x"}')
    assert answer.status_code == 415 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_more_prompts_than_anybody_answers_are_refused_at_a_glance(served: Served) -> None:
    with TestClient(served.app) as client:
        for prompts in ([[1]] * 2000, ["a"] * 2000):
            answer = client.post("/v1/completions", json={"prompt": prompts})
            assert answer.status_code == 422 and "at most 1024 items" in answer.json()["error"]["message"]


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


def test_a_rank_without_a_screen_is_refused() -> None:
    with pytest.raises(UserError, match="rank belongs to the vocabulary screen"):
        server.load_service(ServeConfig(rank=32), Metrics())


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
