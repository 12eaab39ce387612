"""The server's answers: against the sampler and the exact likelihood, through plain HTTP and through other people's clients."""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from served import Served, listening, serve

from ae.tokenizer_adapter import TokenizerAdapter
from student.batching import Job
from student.sampler import Sampler, SamplingParams
from student.scoring import Scores, Text, score

PROMPT = "def encode(self, chunks):\n    return"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def served(tokenizer: TokenizerAdapter) -> Iterator[Served]:
    it = serve(tokenizer)
    yield it
    it.close()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[TestClient]:
    with TestClient(served.app, raise_server_exceptions=False) as it:
        yield it


@pytest.fixture(scope="module")
def url(tokenizer: TokenizerAdapter) -> Iterator[str]:
    it = serve(tokenizer, key="secret")
    with listening(it.app) as address:
        yield address


@pytest.fixture
def chatty(tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer, with a chat template."""
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)


@pytest.fixture(scope="module")
def seed(client: TestClient) -> int:
    """One with which the random model goes on for 40 tokens."""

    def tokens(seed: int) -> int:
        body = {"prompt": PROMPT, "seed": seed, "max_tokens": 40}
        return ask(client, **body)["usage"]["completion_tokens"]

    return next(seed for seed in range(100) if tokens(seed) == 40)


def events(text: str) -> list[tuple[str, Any]]:
    """(name, data) of server-sent events."""
    out = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        out.append((fields.get("event", ""), fields["data"] if fields["data"] == "[DONE]" else json.loads(fields["data"])))
    return out


def ask(client: TestClient, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ------------------------------------------------------------------------------------------------------- /generate
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.8, "top_k": 7}, {"temperature": 1.0}]
)
def test_generate_is_the_sampler(
    served: Served, client: TestClient, tokenizer: TokenizerAdapter, sampling: dict[str, Any]
) -> None:
    params = SamplingParams(max_new_tokens=30, seed=5, **{"top_p": 0.95, **sampling})
    [expected] = Sampler(served.model, tokenizer).generate([tokenizer.encode(PROMPT)], params)
    answer = ask(client, "/generate", prompt=PROMPT, max_new_tokens=30, seed=5, **sampling)
    assert answer["token_ids"] == expected.token_ids
    assert answer["text"] == expected.text
    assert (answer["latent_steps"], answer["finish_reason"]) == (expected.latent_steps, expected.finish_reason)
    n = len(tokenizer.encode(PROMPT))
    assert answer["usage"] == {
        "prompt_tokens": n, "completion_tokens": len(expected.token_ids), "total_tokens": n + len(expected.token_ids)
    }  # fmt: skip
    timing = answer["timing"]
    assert 0 <= timing["queued_s"] <= timing["first_chunk_s"] <= timing["total_s"]


def test_generate_streams_a_chunk_a_step(client: TestClient, seed: int) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": 22, "seed": seed, "top_p": 1, "temperature": 1}
    whole = ask(client, "/generate", **body)
    answer = client.post("/generate", json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, (last, done) = events(answer.text)
    assert [name for name, _ in chunks] == ["chunk"] * whole["latent_steps"]
    assert "".join(data["text"] for _, data in chunks) == whole["text"]
    assert [len(data["token_ids"]) for _, data in chunks[:-1]] == [4] * (len(chunks) - 1)
    assert (last, done["usage"], done["finish_reason"]) == ("done", whole["usage"], whole["finish_reason"])


def test_stop_and_seeds(client: TestClient, seed: int) -> None:
    body = {"prompt": PROMPT, "max_new_tokens": 40, "temperature": 1, "top_p": 1}
    whole = ask(client, "/generate", **body, seed=seed)["text"]
    cut = ask(client, "/generate", **body, seed=seed, stop=[whole[9:12], "\0never"])
    assert (cut["text"], cut["finish_reason"]) == (whole[: whole.find(whole[9:12])], "stop")
    assert len({ask(client, "/generate", **body)["text"] for _ in range(4)}) > 1  # no seed: another one every time


@pytest.mark.parametrize(("path", "defaults"), [("/generate", (0.8, 0.95)), ("/v1/completions", (1.0, 1.0))])
def test_null_is_the_endpoints_default(client: TestClient, seed: int, path: str, defaults: tuple[float, float]) -> None:
    body = {"prompt": PROMPT, "seed": seed, "max_new_tokens" if path == "/generate" else "max_tokens": 40}

    def text(**sampling: float | None) -> str:
        answer = ask(client, path, **body, **sampling)
        return answer["text"] if path == "/generate" else answer["choices"][0]["text"]

    names = ("temperature", "top_p")
    told = text(**dict(zip(names, defaults, strict=True)))
    assert text() == told == text(temperature=None, top_p=None)
    assert text(temperature=1.8, top_p=None) != told != text(temperature=None, top_p=0.3)


# ------------------------------------------------------------------------------------------------- OpenAI's dialect
def test_prompts_in_every_form(client: TestClient, tokenizer: TokenizerAdapter) -> None:
    ids = tokenizer.encode(PROMPT)
    for prompt in (PROMPT, ids, [PROMPT, "x"], [ids, tokenizer.encode("x")]):
        choices = ask(client, prompt=prompt, seed=1, max_tokens=9, n=2)["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        assert choices[0]["text"] == ask(client, prompt=PROMPT, seed=1, max_tokens=9)["choices"][0]["text"]
        assert choices[1]["text"] == ask(client, prompt=PROMPT, seed=2, max_tokens=9)["choices"][0]["text"]
    assert ask(client, prompt="", seed=1)["usage"]["prompt_tokens"] == 1  # the end of the text before
    assert ask(client, prompt=["", "", "x"], seed=1, n=2)["usage"]["prompt_tokens"] == 2 + len(tokenizer.encode("x"))


def test_logprobs_are_the_exact_likelihood(served: Served, client: TestClient, tokenizer: TokenizerAdapter) -> None:
    ids = tokenizer.encode(PROMPT)
    for length in (1, 2, 5, 8, len(ids)):
        body = {"prompt": [ids[:length], ids[:3]], "max_tokens": 0, "echo": True, "logprobs": 3}
        choice = ask(client, **body)["choices"][0]
        filled = torch.tensor([ids[:length] + [served.model.cfg.pad_id] * (-length % 4)])
        with torch.inference_mode():
            expected = -served.model.nll(filled, first=1)[0, : length - 1]
        shown = choice["logprobs"]
        assert shown["token_logprobs"][0] is None and shown["top_logprobs"][0] is None
        torch.testing.assert_close(torch.tensor(shown["token_logprobs"][1:]), expected, atol=2e-5, rtol=0)
        assert "".join(shown["tokens"]) == choice["text"] == tokenizer.decode(ids[:length])
        ends = [*shown["text_offset"][1:], len(choice["text"])]
        assert [choice["text"][a:b] for a, b in zip(shown["text_offset"], ends, strict=True)] == shown["tokens"]


def test_a_tokens_likelihood_does_not_hang_on_how_many_follow_it(client: TestClient, tokenizer: TokenizerAdapter) -> None:
    """Else choices of different length could not be compared."""
    ids = tokenizer.encode(PROMPT)
    told = []
    for length in (5, 6, 7, 8):
        body = {"prompt": ids[:length], "max_tokens": 0, "echo": True, "logprobs": 1}
        told.append(ask(client, **body)["choices"][0]["logprobs"]["token_logprobs"][1:5])
    assert all(row == pytest.approx(told[0], abs=2e-5) for row in told)


def test_logprobs_of_what_was_written(served: Served, client: TestClient, tokenizer: TokenizerAdapter) -> None:
    body = {"prompt": PROMPT, "max_tokens": 11, "seed": 4, "logprobs": 2}
    [alone], [echoed] = ask(client, **body)["choices"], ask(client, **body, echo=True)["choices"]
    n = len(tokenizer.encode(PROMPT))
    for key, shift in (("tokens", 0), ("token_logprobs", 0), ("top_logprobs", 0), ("text_offset", len(PROMPT))):
        found, told = echoed["logprobs"][key][n:], alone["logprobs"][key]
        if key.endswith("logprobs"):  # sums over other batches round differently in the last decimal
            assert found == [pytest.approx(x, abs=1e-5) for x in told]
        else:
            assert found == [x + shift if shift else x for x in told]
    greedy = ask(client, **{**body, "temperature": 0})["choices"][0]["logprobs"]
    assert greedy["token_logprobs"] == [max(top.values()) for top in greedy["top_logprobs"]]
    written = ask(client, "/generate", prompt=PROMPT, max_new_tokens=11, seed=4, temperature=1, top_p=1)["token_ids"]
    [scores] = score(served.model, [Text(tokenizer.encode(PROMPT), written, n)])
    assert alone["logprobs"]["token_logprobs"][: len(written)] == pytest.approx(scores.logprobs, abs=2e-5)


def test_logprobs_stop_where_the_text_does(client: TestClient, tokenizer: TokenizerAdapter, seed: int) -> None:
    """By bytes: tokens of a model as young as this one split characters, and each then shows a U+FFFD of its own."""
    body = {"prompt": PROMPT, "seed": seed, "temperature": 1, "top_p": 1}
    whole = ask(client, "/generate", max_new_tokens=40, **body)
    [cut] = ask(client, max_tokens=40, stop=whole["text"][9:12], logprobs=0, **body)["choices"]

    def holds_it(count: int) -> bool:
        written = b"".join(map(tokenizer.token_bytes, whole["token_ids"][:count]))
        sure = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character begun is none yet
        return sure.decode(written).startswith(cut["text"])

    kept, needed = len(cut["logprobs"]["tokens"]), next(count for count in range(41) if holds_it(count))
    assert kept == needed


def test_a_row_that_ends_itself_scores_its_end(
    client: TestClient, tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that max_tokens 1 with echo always gives one position more than the prompt has, which lm-eval counts on."""
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset(range(0, 320, 2)))  # half of all words end a text
    choices = ask(client, prompt=PROMPT, max_tokens=1, n=16, seed=0, echo=True, logprobs=1)["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"length", "stop"}
    assert {len(choice["logprobs"]["token_logprobs"]) for choice in choices} == {len(tokenizer.encode(PROMPT)) + 1}


def test_every_end_scores_as_itself(client: TestClient, tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of stop_ids ends a row, and what is scored is the one that was drawn: written greedily, the likeliest token."""
    monkeypatch.setattr(tokenizer, "stop_ids", frozenset(range(0, 320, 2)))
    body = {"prompt": [[5], [6], [7], [8]], "max_tokens": 30, "temperature": 0, "logprobs": 1}
    answer = ask(client, **body)
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
    shown = [choice["logprobs"] for choice in answer["choices"]]
    assert sum(len(row["tokens"]) for row in shown) == answer["usage"]["completion_tokens"] + len(shown)
    for row in shown:
        assert row["token_logprobs"] == [max(top.values()) for top in row["top_logprobs"]]


def test_special_tokens_before_an_end_that_had_no_room_are_scored(served: Served) -> None:
    """They have no text, and no stop string cut it: a row of one token that the next one would have ended."""
    service, job = served.service, Job([5], SamplingParams(1), lambda *_: None, top=0)
    sampler = service.batcher.sampler
    special, end = sampler.tokenizer.pad_id, sampler.tokenizer.eot_id
    assert not sampler.tokenizer.token_bytes(special)
    chunk = sampler._accept(sampler.new_row(0, SamplingParams(1)), [special, end, 7, 7])
    job.token_ids, job.finish_reason, job.ended, job.cut = chunk.token_ids, str(chunk.finish_reason), chunk.ended, chunk.cut
    assert (job.token_ids, job.finish_reason, job.ended) == ([special], "stop", None)
    told = service.completion_logprobs(job, Scores([-1.0], [[]], [[]]), chunk.text)
    assert told and told["token_logprobs"] == [-1.0]


def test_a_streamed_completion(client: TestClient) -> None:
    body = {"prompt": [PROMPT, "x"], "max_tokens": 13, "seed": 3, "echo": True, "logprobs": 1}
    whole = ask(client, **body)
    *parts, (_, usage), (_, done) = events(
        client.post("/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}).text
    )
    assert (done, usage["choices"], usage["usage"]) == ("[DONE]", [], whole["usage"])
    for expected in whole["choices"]:
        own = [part["choices"][0] for _, part in parts if part["choices"][0]["index"] == expected["index"]]
        assert "".join(part["text"] for part in own) == expected["text"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [expected["finish_reason"]]
        assert own[-1]["logprobs"] == expected["logprobs"]


@pytest.mark.usefixtures("chatty")
def test_chat(client: TestClient, tokenizer: TokenizerAdapter) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "import"}]}]
    prompt = tokenizer.encode("user: import\nassistant:")
    expected = ask(client, prompt=prompt, seed=2, max_tokens=12)["choices"][0]["text"]
    body = {"messages": messages, "seed": 2, "max_completion_tokens": 12, "logprobs": True, "top_logprobs": 2}
    answer = ask(client, "/v1/chat/completions", **body)
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": expected}
    assert b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"]).decode(errors="replace") == expected
    assert {len(token["top_logprobs"]) for token in choice["logprobs"]["content"]} == {2}
    *parts, (_, done) = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    deltas = [part["choices"][0]["delta"] for _, part in parts]
    assert deltas[0]["role"] == "assistant" and done == "[DONE]"
    assert "".join(delta.get("content", "") for delta in deltas) == expected
    assert len(ask(client, "/v1/chat/completions", messages=messages)["choices"]) == 1  # as long as there is room


def test_no_chat_without_a_template(client: TestClient) -> None:
    answer = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    assert "no chat template" in answer.json()["error"]["message"]


# --------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/generate", {}, 422, "prompt"),
        ("/generate", {"prompt": 3}, 422, "prompt"),
        ("/generate", {"prompt": "a", "max_new_tokens": "5"}, 422, "max_new_tokens"),
        ("/generate", {"prompt": "a", "max_new_tokens": 0}, 422, "max_new_tokens"),
        ("/generate", {"prompt": "a", "max_tokens": 5}, 422, "max_tokens"),  # OpenAI's name: not to be passed over in silence
        ("/generate", {"prompt": "a", "max_new_tokens": 10**40}, 422, "max_new_tokens"),
        ("/generate", {"prompt": "a", "max_new_tokens": 5000}, 400, "max_new_tokens"),
        ("/generate", {"prompt": "a", "max_new_tokens": 257}, 400, "prompt"),
        ("/generate", {"prompt": "a" * 1_000_000}, 400, "prompt"),
        ("/generate", {"prompt": "a", "temperature": -1}, 422, "temperature"),
        ("/generate", {"prompt": "a", "temperature": float("nan")}, 422, "temperature"),
        ("/generate", {"prompt": "a", "top_p": float("inf")}, 422, "top_p"),
        ("/generate", {"prompt": "a", "stop": [""]}, 422, "stop"),
        ("/generate", {"prompt": "a", "seed": 2**63}, 422, "seed"),
        ("/generate", {"prompt": "\ud800"}, 400, "prompt"),
        ("/v1/completions", {"prompt": []}, 422, "prompt"),
        ("/v1/completions", {"prompt": [5, 400]}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "model"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs"),
        ("/v1/completions", {"prompt": "a", "n": 33}, 400, "n"),
        ("/v1/completions", {"prompt": ["a"] * 33}, 400, "prompt"),
        ("/v1/completions", {"prompt": "a", "best_of": 2}, 422, "best_of"),
        ("/v1/completions", {"prompt": "a", "presence_penalty": 0.5}, 422, "presence_penalty"),
        ("/v1/completions", {"prompt": "a", "min_p": 0.1}, 422, "min_p"),
        ("/v1/completions", {"prompt": "a", "repetition_penalty": 1.2}, 422, "repetition_penalty"),
        ("/v1/completions", {"prompt": "a", "stop_token_ids": [5]}, 422, "stop_token_ids"),
        ("/v1/chat/completions", {"messages": []}, 422, "messages"),
        ("/v1/chat/completions", {"messages": [HI], "response_format": {"type": "json_object"}}, 422, "response_format"),
        ("/v1/chat/completions", {"messages": [HI], "tool_choice": "required"}, 422, "tool_choice"),
        ("/v1/chat/completions", {"messages": [HI], "functions": [{}]}, 422, "functions"),
        ("/v1/chat/completions", {"messages": [HI], "max_completion_tokens": 5000}, 400, "max_completion_tokens"),
        ("/v1/chat/completions", {"messages": [HI], "max_tokens": 5000}, 400, "max_tokens"),
        ("/v1/chat/completions", {"messages": [HI], "logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
        ("/v1/chat/completions", {"messages": [{**HI, "content": "a" * 1000}]}, 400, "messages"),
    ],
)
@pytest.mark.usefixtures("chatty")
def test_refused(client: TestClient, path: str, body: dict[str, Any], status: int, param: str) -> None:
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status, answer.text
    assert error["param"] == param
    assert error["message"] and error["type"] and error["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b'{"prompt": ' + b"1" * 5000 + b"}", b"null", b'"a"'])
def test_bodies_that_are_no_request(client: TestClient, content: bytes) -> None:
    answer = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["error"]["message"]


def test_a_body_too_large(tokenizer: TokenizerAdapter) -> None:
    it = serve(tokenizer, max_body_bytes=1000)
    with TestClient(it.app) as client:
        big = json.dumps({"prompt": "a" * 2000}).encode()
        headers = {"Content-Type": "application/json"}
        assert client.post("/generate", content=big, headers=headers).status_code == 413
        assert (
            client.post("/generate", content=iter([big[:900], big[900:]]), headers=headers).status_code == 413
        )  # no length told
        assert client.post("/generate", json={"prompt": "a", "max_new_tokens": 1}).status_code == 200


def test_many_prompts_leave_the_event_loop_free(
    served: Served, client: TestClient, tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is short, together they are long: encoded in a thread that is not the event loop's."""
    on_the_loop: list[bool] = []
    encode = tokenizer.encode

    def watched(text: str) -> list[int]:
        on_the_loop.append(asyncio._get_running_loop() is not None)
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode", watched)
    for prompt, expected in ((["x" * 200] * 30, [False] * 30), (["x"] * 3, [True] * 3)):
        on_the_loop.clear()
        ask(client, prompt=prompt, max_tokens=1)
        assert on_the_loop == expected


def test_a_failure_of_the_server_itself(tokenizer: TokenizerAdapter, caplog: pytest.LogCaptureFixture) -> None:
    """A 500 passes the guard like any answer: its id and headers, its line in the log, its count."""
    it = serve(tokenizer)
    it.service.tokenizer = None  # type: ignore[assignment]
    with TestClient(it.app) as client, caplog.at_level(logging.INFO):
        answer = client.post("/generate", json={"prompt": "x"})
        counted = client.get("/metrics").text
    name = answer.headers["x-request-id"]
    assert (answer.status_code, answer.headers["x-content-type-options"]) == (500, "nosniff")
    assert (answer.json()["error"]["type"], answer.json()["error"]["request_id"]) == ("server_error", name)
    assert 'latentforge_requests_total{path="/generate",status="500"} 1.0' in counted
    logged = [record for record in caplog.records if name in record.getMessage()]
    assert [(record.levelname, bool(record.exc_info)) for record in logged] == [("ERROR", True), ("INFO", False)]
    assert "POST /generate 500" in logged[1].getMessage()


def test_the_key(tokenizer: TokenizerAdapter) -> None:
    it = serve(tokenizer, key="sécretà")
    with TestClient(it.app) as client:
        for path in ("/", "/health", "/ready", "/openapi.json"):
            assert client.get(path).status_code == 200
        for wrong in ({}, *({"Authorization": told.encode()} for told in ("Bearer wrong", "Basic sécretà", "Bearer"))):
            answer = client.get("/v1/models", headers=wrong)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for right in ("bearer sécretà", "Bearer  sécretà\t"):
            assert client.get("/v1/models", headers={"Authorization": right.encode()}).status_code == 200


# ------------------------------------------------------------------------------------------------ the smaller paths
def test_small_paths(served: Served, client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    assert client.get("/ready").status_code == 200
    about = client.get("/version").json()
    assert (about["model"], about["k"], about["context"]) == ("tiny", 4, 256)
    [card] = client.get("/v1/models").json()["data"]
    assert (card["id"], card["max_model_len"]) == ("tiny", 256)
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text and "https://" not in page.text
    missing = client.get("/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
    wrong = client.delete("/generate")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_metrics(tokenizer: TokenizerAdapter) -> None:
    it = serve(tokenizer)
    with TestClient(it.app) as client:
        written = ask(client, "/generate", prompt=PROMPT, max_new_tokens=9, seed=1)
        text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    for name, value in (
        ('requests_total{path="/generate",status="200"}', 1),
        (f'rows_total{{outcome="{written["finish_reason"]}"}}', 1),
        ('tokens_total{kind="prompt"}', written["usage"]["prompt_tokens"]),
        ('tokens_total{kind="generated"}', written["usage"]["completion_tokens"]),
        ("latent_steps_total", written["latent_steps"]),
        ("batch_rows_sum", written["latent_steps"]),
        ("first_chunk_seconds_count", 1),
        ("chunk_interval_seconds_count", written["latent_steps"] - 1),
        ("queue_rows", 0),
        ("running_rows", 0),
    ):
        assert float(values[f"latentforge_{name}"]) == value, name


def test_no_prompt_in_the_log(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client.post("/generate", json={"prompt": "xyzzy", "max_new_tokens": 4})
        client.post("/generate", json={"prompt": "xyzzy", "max_new_tokens": -4, "stop": "xyzzy"})
        client.post("/v1/completions?q=xyzzy", json={"prompt": "xyzzy", "logprobs": 99})
    ours = [record for record in caplog.records if record.name.startswith("latentforge")]
    assert len(ours) == 3
    assert not any("xyzzy" in record.getMessage() for record in ours)


# ------------------------------------------------------------------------------------------- other people's clients
def test_the_official_client(url: str, tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    openai = pytest.importorskip("openai", reason="the openai client is not installed (.ci/requirements.txt)")
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="the model 'gpt-5' does not exist"):
        client.models.retrieve("gpt-5")
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 10, "seed": 1}
    whole = client.completions.create(**asked, n=2, logprobs=2)
    assert whole.usage.completion_tokens >= len(whole.choices) == 2
    assert len(whole.choices[0].logprobs.tokens) == len(whole.choices[0].logprobs.token_logprobs)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert parts[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    messages = [{"role": "user", "content": "import"}]
    chat = {"model": "tiny", "messages": messages, "seed": 1, "max_completion_tokens": 10}
    answer = client.chat.completions.create(**chat)
    pieces = [part.choices[0].delta.content or "" for part in client.chat.completions.create(**chat, stream=True)]
    assert "".join(pieces) == answer.choices[0].message.content
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError, match="context is 256 tokens"):
        client.completions.create(model="tiny", prompt="x" * 1000, max_tokens=200)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()


def test_lm_eval(url: str, tokenizer: TokenizerAdapter, packed: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """`local-completions` gets the exact likelihood, token by token, and continuations."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (.ci/requirements.txt)")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model="tiny", tokenizer=str(packed.root / "tokenizer"),
        tokenizer_backend="huggingface", max_length=200, batch_size=4, num_concurrent=1,
    )  # fmt: skip
    pairs = [("def", " main():"), ("import os", "\nimport sys\n"), ("x", " = 1"), ("", "import")] * 3
    got = model.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, got, strict=True):
        before = tokenizer.encode(context) or [tokenizer.eot_id]
        ids = tokenizer.encode(context + continuation) if context else before + tokenizer.encode(continuation)
        [scores] = score(served.model, [Text((), ids, len(before), 1)])  # in chunks from the first token on
        assert logprob == pytest.approx(sum(scores.logprobs), abs=1e-4)
        assert greedy == all(top[0] == id for top, id in zip(scores.top_ids, ids[len(before) :], strict=True))
    asked = Instance("generate_until", {}, ("def ", {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0}), 0)
    [written] = model.generate_until([asked], disable_tqdm=True)
    [expected] = Sampler(served.model, tokenizer).generate(
        [tokenizer.encode("def ")], SamplingParams(12, 0.0, 1.0, stop=("\n\n",))
    )
    assert written == expected.text
