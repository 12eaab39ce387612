"""The client without sockets (httpx.MockTransport), and what it does to a real server's limits."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from faulty_server import FaultyServer, good

from configs.errors import UserError
from kd.kd_client import Answer, Dropped, ModelInfo, Stopped, TeacherClient, same_model
from kd.limits import Patience
from kd.settings import Settings
from kd.store import Store

KEY = "sk-a-very-secret-key-0123456789"
VENICE = Settings("https://api.venice.ai/api/v1", "teacher", KEY)
LOCAL = Settings("http://127.0.0.1:1/v1", "teacher", KEY)
BODY = {"model": "teacher", "messages": [{"role": "user", "content": "x" * 40}], "max_tokens": 10}
PRICED = {"data": [{"id": "teacher", "model_spec": {"pricing": {"input": {"usd": 10}, "output": {"usd": 1000}}}}]}
QUICK = Patience(timeout_s=2.0, attempts=4, backoff_s=0.001, longest_s=0.01, window_s=0.05)
Handler = Callable[[httpx.Request], httpx.Response]


def call(
    handler: Handler, use: Callable[[TeacherClient], Coroutine[Any, Any, Any]], settings: Settings = LOCAL, **more: Any
) -> Any:
    """What `use` returns of a client whose requests go to `handler`."""

    async def main() -> Any:
        options = {"patience": QUICK, **more}
        async with TeacherClient(settings, transport=httpx.MockTransport(handler), **options) as client:
            return await use(client)

    return asyncio.run(main())


def ask(handler: Handler, **more: Any) -> Answer:
    return call(handler, lambda client: client.ask(BODY), **more)


def replies(*responses: httpx.Response) -> Handler:
    """One response after another; the last one for good."""
    left = list(responses)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


def test_an_answer() -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={**good(), "cost": {"usd": 0.25}})

    answer = ask(handler)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cost) == (3, 3, 0.25) and json.loads(
        answer.raw
    ) == answer.body
    assert str(seen[0].url) == "http://127.0.0.1:1/v1/chat/completions" and json.loads(seen[0].content) == BODY
    assert seen[0].headers["authorization"] == f"Bearer {KEY}"
    call(handler, lambda client: client.ask({"prompt": [1, 2], "max_tokens": 5}))
    assert seen[1].url.path == "/v1/completions"


@pytest.mark.parametrize("figure", ["-1", "NaN", "Infinity", "-1e400", "1e30", "1" + 400 * "0", "true", '"3"', "null"])
def test_figures_that_cannot_be_are_replaced_by_our_own(tmp_path: Path, figure: str) -> None:
    """The answer is paid for: it is kept, its cost is what the listed price says, and the store can be read."""
    odd = {**good(), "usage": {"prompt_tokens": "?", "completion_tokens": "?"}, "cost": {"usd": "?"}}
    raw = json.dumps(odd).replace('"?"', figure)

    async def run(client: TeacherClient) -> tuple[Answer, float]:
        await client.models()
        return await client.ask(BODY), client.spent

    answer, spent = call(
        lambda request: httpx.Response(200, json=PRICED) if request.method == "GET" else httpx.Response(200, content=raw), run
    )
    price = (14 * 10 + 3 * 1000) / 1e6  # 40 bytes of prompt and a template, 11 bytes of text
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cost, spent) == (14, 3, price, price)
    with Store(tmp_path / "t.sqlite") as store:
        figures = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens, "cost": answer.cost}
        assert store.put(BODY, answer.raw, model="teacher", template=1, **figures)  # type: ignore[arg-type]
        assert len(list(store)) == 1 and store.totals().cost == price


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_tried_again(status: int) -> None:
    assert ask(replies(httpx.Response(status), httpx.Response(status), httpx.Response(200, json=good()))).completion_tokens == 3


@pytest.mark.parametrize(
    "broken",
    [
        httpx.Response(200, content=b'{"choices": [{"mess'),
        httpx.Response(200, json=[1]),
        httpx.Response(200, json={"error": "overloaded"}),
        httpx.Response(200, json={"choices": []}),
        httpx.Response(200, json={"choices": [{"logprobs": None}]}),
        httpx.Response(200, content=b"[" * 100_000),
        httpx.Response(200, content=b"<html>"),
    ],
)
def test_broken_bodies_are_tried_again(broken: httpx.Response) -> None:
    assert ask(replies(broken, httpx.Response(200, json=good()))).completion_tokens == 3


@pytest.mark.parametrize("error", [httpx.ReadTimeout, httpx.ConnectError, httpx.RemoteProtocolError, httpx.ReadError])
def test_lost_connections_are_tried_again(error: type[httpx.RequestError]) -> None:
    calls = 0

    def handler(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise error("lost")
        return httpx.Response(200, json=good())

    ask(handler)
    assert calls == 3


def test_gives_up() -> None:
    with pytest.raises(Dropped, match=r"gave up after 4 attempts \(HTTP 500: Internal Server Error\)"):
        ask(replies(httpx.Response(500)))


def test_an_error_with_status_200_costs_nothing_and_is_told() -> None:
    """As gateways pass on what the server behind them said; its text stands in the last line, without the key."""
    lost: list[float] = []

    async def run(client: TeacherClient) -> float:
        client.on_lost = lost.append
        await client.models()
        with pytest.raises(Dropped, match=r"gave up after 4 attempts \(HTTP 200 with an error: \[key\] overloaded\)"):
            await client.ask(BODY)
        return client.spent

    said = httpx.Response(200, json={"error": {"message": f"{KEY} overloaded"}})
    assert call(lambda request: httpx.Response(200, json=PRICED) if request.method == "GET" else said, run) == 0 and not lost


@pytest.mark.parametrize("field", ["code", "type"])
def test_a_429_for_want_of_money_ends_the_run(field: str) -> None:
    calls: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        calls.append(1)
        return httpx.Response(429, json={"error": {"message": "You exceeded your quota", field: "insufficient_quota"}})

    with pytest.raises(Stopped, match=r"HTTP 429 \(You exceeded your quota\): .*top it up") as caught:
        ask(handler)
    assert len(calls) == 1 and caught.value.status == 429


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_refused_prompts_cost_one_call(status: int) -> None:
    calls: list[int] = []

    def handler(request: httpx.Request) -> httpx.Response:
        calls.append(1)
        return httpx.Response(status, json={"error": "no\nsuch thing"})

    with pytest.raises(Dropped, match=f"HTTP {status} \\(no such thing\\)"):
        ask(handler)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "VENICE_API_KEY"), (402, "top it up"), (403, "may not"), (404, "model's name"), (302, "BASE_URL")],
)
@pytest.mark.parametrize("wait", [None, "3600"])
def test_what_ends_the_run(status: int, advice: str, wait: str | None) -> None:
    """Whatever the server says of waiting: it would not help."""
    with pytest.raises(Stopped, match=advice) as caught:
        ask(replies(httpx.Response(status, json={"error": {"message": "no"}}, headers={"Retry-After": wait} if wait else {})))
    assert caught.value.status == status


def test_another_model_stops() -> None:
    swapped = httpx.Response(200, json={**good(), "model": "smaller"})
    with pytest.raises(Stopped, match=r"asked for the model 'teacher', answered by 'smaller'.*--allow_other_model"):
        ask(replies(swapped))
    assert ask(replies(swapped), allow_other_model=True).body["model"] == "smaller"
    assert same_model("gpt-4o", "gpt-4o-2024-08-06") and not same_model("gpt-4o", "gpt-4o-mini") and not same_model("a", "b")


def test_a_model_that_may_not_tell_logprobs_is_asked_without() -> None:
    """As OpenAI answers for some of its models; a key that may not use the model gets the same to the plain call."""
    asked: list[bool] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append("logprobs" in json.loads(request.content))
        denied = httpx.Response(403, json={"error": {"message": "You are not allowed to request logprobs from this model"}})
        return denied if asked[-1] else httpx.Response(200, json=good())

    _, fields, top = call(handler, lambda client: client.probe(BODY))
    assert (fields, top, asked) == ({}, None, [True, False])
    with pytest.raises(Stopped, match="may not use this model"):
        call(replies(httpx.Response(403, json={})), lambda client: client.probe(BODY))


def test_half_a_surrogate_pair_in_an_answer_is_no_end() -> None:
    answer = {key: value for key, value in good("\ud83d").items() if key != "usage"}
    assert ask(replies(httpx.Response(200, content=json.dumps(answer).encode()))).completion_tokens == 1


def test_retry_after_holds_everything_back() -> None:
    """The other worker's request, too, which was refused nothing."""
    sent: list[float] = []

    def handler(request: httpx.Request) -> httpx.Response:
        sent.append(time.monotonic())
        return httpx.Response(429, headers={"Retry-After": "0.3"}) if len(sent) == 1 else httpx.Response(200, json=good())

    async def two(client: TeacherClient) -> None:
        refused = asyncio.create_task(client.ask(BODY))
        while not client.errors:
            await asyncio.sleep(0)
        await client.ask(BODY)
        await refused

    call(handler, two)
    assert len(sent) == 3 and sent[1] - sent[0] >= 0.3


def test_an_answers_headers_correct_the_limits() -> None:
    async def run(client: TeacherClient) -> float:
        await client.ask(BODY)
        return client.gate.rpm

    assert call(replies(httpx.Response(200, json=good(), headers={"x-ratelimit-limit-requests": "50"})), run) == 50


def test_a_long_retry_after_ends_the_run() -> None:
    with pytest.raises(Stopped, match=r"HTTP 429 \(daily limit\): the server asks to wait for 9000 s"):
        ask(replies(httpx.Response(429, json={"error": "daily limit"}, headers={"Retry-After": "9000"})))


def test_breaker_on_venice_keeps_below_twenty_failures() -> None:
    """All fail, 64 workers are asked for: at most 10 are in flight, and 9 failures pause the rest."""
    times: list[float] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.01)
        times.append(time.monotonic())
        return httpx.Response(500)

    async def run(client: TeacherClient) -> None:
        with pytest.raises(Stopped, match="20 requests in a row"):
            await client.run(((n, BODY) for n in range(50)), _ignore)
        assert client.gate.pauses >= 2

    patience = Patience(attempts=2, backoff_s=0.001, window_s=0.3)
    call(handler, run, VENICE, concurrency=64, patience=patience)  # type: ignore[arg-type]
    worst = max(sum(t <= other < t + patience.window_s for other in times) for t in times)
    assert 9 <= worst < 20


async def _ignore(job: Any, outcome: Answer | Dropped) -> None:
    pass


def test_in_flight_answers_are_handled_when_another_stops_the_run() -> None:
    """They are paid for."""
    handled: list[int] = []

    async def handler(request: httpx.Request) -> httpx.Response:
        if b"stop" in request.content:
            return httpx.Response(402, json={"error": "empty"})
        await asyncio.sleep(0.1)
        return httpx.Response(200, json=good())

    async def handle(job: int, outcome: Answer | Dropped) -> None:
        handled.append(job)

    async def run(client: TeacherClient) -> None:
        bodies = [{**BODY, "user": "stop" if n == 3 else ""} for n in range(50)]
        with pytest.raises(Stopped, match="top it up"):
            await client.run(enumerate(bodies), handle)

    call(handler, run, concurrency=4)  # type: ignore[arg-type]
    assert sorted(handled) == [0, 1, 2]


def test_an_error_in_the_handler_ends_the_run_with_it() -> None:
    async def handle(job: int, outcome: Answer | Dropped) -> None:
        raise UserError("disk full")

    with pytest.raises(UserError, match="disk full"):
        call(replies(httpx.Response(200, json=good())), lambda client: client.run([(1, BODY), (2, BODY)], handle))


def test_probe_steps_down() -> None:
    asked: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        k = json.loads(request.content).get("top_logprobs")
        asked.append(k)
        return httpx.Response(200, json=good()) if k is None or k <= 5 else httpx.Response(400, json={"error": "too many"})

    answer, fields, top = call(handler, lambda client: client.probe(BODY))
    assert (
        asked == [20, 10, 5] and fields == {"logprobs": True, "top_logprobs": 5} and top == 2 and answer.completion_tokens == 3
    )


def test_probe_of_a_server_without_logprobs() -> None:
    def refuses(request: httpx.Request) -> httpx.Response:  # transformers serve
        return httpx.Response(422) if b"logprobs" in request.content else httpx.Response(200, json=good())

    def ignores(request: httpx.Request) -> httpx.Response:  # Venice where the model has none
        answer = good()
        answer["choices"][0]["logprobs"] = None
        return httpx.Response(200, json=answer)

    assert call(refuses, lambda client: client.probe(BODY))[1:] == ({}, None)
    assert call(ignores, lambda client: client.probe(BODY))[1:] == ({"logprobs": True, "top_logprobs": 20}, None)


def test_probe_that_wants_no_logprobs() -> None:
    asked: list[Any] = []

    def handler(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json=good())

    assert call(handler, lambda client: client.probe(BODY, 0))[1:] == ({}, None) and asked == [BODY]


def test_models() -> None:
    spec = {
        "availableContextTokens": 1000, "maxCompletionTokens": 16, "capabilities": {"supportsLogProbs": True},
        "pricing": {"input": {"usd": 0.35}, "output": {"usd": 1.9}}, "deprecation": {"date": "2027-01-01"},
    }  # fmt: skip
    urls: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        urls.append(str(request.url))
        return httpx.Response(200, json={"data": [{"id": "teacher", "model_spec": spec}, {"id": "v", "max_model_len": 9}, 3]})

    found = call(handler, lambda client: client.models(), VENICE)
    assert found == [ModelInfo("teacher", 1000, 16, True, 0.35, 1.9, "retires on 2027-01-01"), ModelInfo("v", 9)]
    assert (
        urls == ["https://api.venice.ai/api/v1/models?type=text"]
        and found[0].cost(1e6, 1e6) == 2.25
        and found[1].cost(1, 1) is None
    )


@pytest.mark.parametrize(("status", "kind"), [(400, Dropped), (401, Stopped)])
def test_no_part_of_the_key_is_shown(status: int, kind: type[Exception]) -> None:
    """A long error is cut once the key is out of it, wherever that stood."""
    for before in range(300 - len(KEY), 301):
        with pytest.raises(kind) as caught:
            ask(replies(httpx.Response(status, json={"error": "x" * before + KEY + "y" * 300})))
        assert KEY[:4] not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("proxy", ["gopher://x:1", "socks5://x:1", "http://me:secret-word/@x"])
def test_a_proxy_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.setitem(sys.modules, "socksio", None)  # as where it is not installed
    with pytest.raises(UserError, match="the proxy in HTTPS_PROXY") as caught:
        TeacherClient(VENICE)
    assert "secret-word" not in str(caught.value)
    TeacherClient(LOCAL)  # no proxy on the way there


@pytest.mark.parametrize("field", ["echo", "model"])
def test_an_answer_that_repeats_the_key_is_not_kept(field: str) -> None:
    with pytest.raises(Dropped, match="repeats the API key"):
        ask(replies(httpx.Response(200, json={**good(), field: KEY})))


# ------------------------------------------------------------------------------------------------- on real sockets
async def _cpu_seconds(url: str, n: int, bare: bool, at_once: int = 64) -> float:
    """Of this process, for n requests of a bare httpx loop that reads its answers, or of our client."""
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(limits=limits) as http, TeacherClient(Settings(url, "teacher"), concurrency=at_once) as client:
        work = iter(range(n))

        async def loop() -> None:
            for i in work:
                response = await http.post(f"{url}/chat/completions", json={**BODY, "seed": i})
                assert response.status_code == 200 and response.json()["choices"]

        start = time.process_time()
        if bare:
            await asyncio.gather(*(loop() for _ in range(at_once)))
        else:
            await client.run(((i, {**BODY, "seed": i}) for i in work), _ignore)
        return time.process_time() - start


def test_overhead(instant_server: str) -> None:
    """At 64 at once the client takes little more of the processor than a bare loop (1.1 times where it was measured)."""
    asyncio.run(_cpu_seconds(instant_server, 64, bare=True))
    seconds: dict[bool, float] = {True: math.inf, False: math.inf}
    for _ in range(3):  # in turns, the least of each: other programs get into the way of one turn or another
        for bare in seconds:
            seconds[bare] = min(seconds[bare], asyncio.run(_cpu_seconds(instant_server, 128, bare)))
    print(f"bare {seconds[True]:.3f} s, client {seconds[False]:.3f} s, ratio {seconds[False] / seconds[True]:.2f}")
    assert seconds[False] < 1.5 * seconds[True]


def _resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_flat(instant_server: str) -> None:
    asyncio.run(_cpu_seconds(instant_server, 300, bare=False, at_once=8))
    before = _resident_mb()
    asyncio.run(_cpu_seconds(instant_server, 1000, bare=False, at_once=8))
    assert _resident_mb() - before < 10


@pytest.fixture(scope="module")
def instant_server() -> Any:
    """A server that answers at once, in a process of its own."""
    script = Path(__file__).with_name("faulty_server.py")
    process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    yield process.stdout.readline().strip()
    process.stdin.close()
    process.wait(timeout=10)


def test_reset_in_the_middle_of_a_body_on_a_real_socket() -> None:
    with FaultyServer(lambda n, prompt: ("reset", "truncated", "good")[n]) as server:

        async def run() -> Answer:
            async with TeacherClient(Settings(server.url, "teacher"), patience=QUICK) as client:
                return await client.ask(BODY)

        assert asyncio.run(run()).completion_tokens == 3 and len(server.log) == 3


def test_a_body_that_drips_is_given_up_in_time() -> None:
    """Something comes before each read times out, so only the limit on the whole answer ends it."""
    with FaultyServer(lambda n, prompt: "good" if n else "drip") as server:

        async def run() -> int:
            patience = Patience(timeout_s=1.0, backoff_s=0.001)
            async with TeacherClient(Settings(server.url, "teacher"), patience=patience) as client:
                await client.ask(BODY)
                return client.errors["timeout"]

        assert asyncio.run(run()) >= 1 and server.asked("good")
