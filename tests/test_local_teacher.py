"""The local teacher against plain transformers, on a real small model (left out where its weights are not beside us)."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, Qwen3Config

from configs.errors import UserError
from kd.engine import GOLDEN, Engine, Row, choose
from kd.local_teacher import ServeConfig, Teacher, load_teacher, make_app

ROOT = Path(__file__).parents[1]
STORIES = ROOT.parent / "shared" / "teachers" / "stories260k"
QWEN = ROOT.parent / "shared" / "tokenizers" / "qwen3"
NAME = "stories260k"
START = "Once upon a time, there was a"

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def teacher() -> Iterator[Teacher]:
    if not STORIES.is_dir():
        pytest.skip(f"the teacher {STORIES} is not here")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the program does for a model of this size
    served = load_teacher(ServeConfig(model=str(STORIES), max_batch=8))
    yield served
    served.engine.close()
    torch.set_num_threads(threads)


async def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> httpx.Response:
    return await client.post(path, json={"model": NAME, **body}, timeout=60)


def ask_all(teacher: Teacher, bodies: list[dict[str, Any]], path: str = "/v1/completions") -> list[httpx.Response]:
    """The answers to requests sent at once."""

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=make_app(teacher))
        async with httpx.AsyncClient(transport=transport, base_url="http://teacher") as client:
            return await asyncio.gather(*(post(client, path, body) for body in bodies))

    return asyncio.run(run())


@pytest.fixture
def ask(teacher: Teacher) -> Ask:
    """One completion's choice."""

    def one(**body: Any) -> dict[str, Any]:
        answer = ask_all(teacher, [body])[0]
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]

    return one


@torch.inference_mode()
def forward(teacher: Teacher, ids: list[int]) -> torch.Tensor:
    """Logprobs of what follows each token, (T, V)."""
    return teacher.engine.model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_greedy_text_is_that_of_generate(teacher: Teacher, ask: Ask) -> None:
    choice = ask(prompt="", max_tokens=200, temperature=0, return_token_ids=True)
    expected = teacher.engine.model.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)[0].tolist()
    assert choice["prompt_token_ids"] + choice["token_ids"] == expected
    assert choice["text"] == " " + teacher.text.tokenizer.decode(expected[1:])
    assert choice["finish_reason"] == "length"


def test_logprobs_are_those_of_a_plain_forward(teacher: Teacher, ask: Ask) -> None:
    """Whatever the sampling is, and at every position of the batch."""
    choice = ask(prompt=START, max_tokens=40, temperature=0.7, top_p=0.9, seed=3, logprobs=20, return_token_ids=True)
    told, ids = choice["logprobs"], choice["token_ids"]
    expected = forward(teacher, choice["prompt_token_ids"] + ids)[len(choice["prompt_token_ids"]) - 1 : -1]
    assert told["token_ids"] == ids
    torch.testing.assert_close(torch.tensor(told["token_logprobs"]), expected[range(len(ids)), ids], atol=1e-4, rtol=0)
    best = expected.topk(20)
    torch.testing.assert_close(torch.tensor(told["top_token_logprobs"]), best.values, atol=1e-4, rtol=0)
    assert (torch.tensor(told["top_token_ids"]) == best.indices).float().mean() > 0.99  # ties of float rounding


def test_echo_scores_a_text(teacher: Teacher, ask: Ask) -> None:
    ids = teacher.text.encode(START + " little girl named Lily.")
    choice = ask(prompt=ids, max_tokens=0, echo=True, logprobs=5, return_token_ids=True)
    told, expected = choice["logprobs"], forward(teacher, ids)[:-1]
    assert (choice["text"], choice["token_ids"]) == (f" {START} little girl named Lily.", [])
    assert (told["token_ids"], told["token_logprobs"][0], told["top_token_ids"][0]) == (ids, None, None)
    begun = ask(prompt=[teacher.text.tokenizer.bos_token_id, *ids], max_tokens=0, echo=True, logprobs=0)
    for shown in (choice, begun):  # the text has no special tokens
        words = [w for w in shown["logprobs"]["tokens"] if w != teacher.text.tokenizer.bos_token]
        places = shown["logprobs"]["text_offset"][-len(words) :]
        assert all(shown["text"][at:].startswith(word) for at, word in zip(places, words, strict=True))
    torch.testing.assert_close(
        torch.tensor(told["token_logprobs"][1:]), expected[range(len(ids) - 1), ids[1:]], atol=1e-4, rtol=0
    )
    assert told["top_token_ids"][1:] == expected.topk(5).indices.tolist()


def test_echo_in_slices_of_columns(teacher: Teacher, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"prompt": START, "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 2, "return_token_ids": True}
    whole = ask(**body)
    monkeypatch.setattr("kd.engine.MAX_ELEMENTS", 3 * 512)
    sliced = ask(**body)
    for choice in (whole, sliced):
        values = choice["logprobs"].pop("token_logprobs")
        choice["values"] = torch.tensor(values[1:])
        choice["logprobs"].pop("top_token_logprobs")
    torch.testing.assert_close(sliced.pop("values"), whole.pop("values"), atol=1e-4, rtol=0)
    assert sliced == whole


def test_a_seed_gives_the_same_alone_and_among_others(teacher: Teacher, ask: Ask) -> None:
    """More requests than the batch has rows, of unequal prompts and lengths, sampled in every way: each as if alone."""
    text = "One day, a dog and a cat went to the park to play with the red ball. They were happy."
    bodies: list[dict[str, Any]] = [
        {
            "prompt": text[: 3 + 4 * i], "max_tokens": 5 + 3 * i, "seed": i, "temperature": (0, 0.8, 1.3)[i % 3],
            "top_p": (1, 0.7)[i % 2], "logprobs": i, "echo": i % 4 == 0, "return_token_ids": True,
        }
        for i in range(20)
    ]  # fmt: skip
    together = [answer.json()["choices"][0] for answer in ask_all(teacher, bodies)]
    for body, among_others in zip(bodies, together, strict=True):
        alone = ask(**body)
        assert alone["token_ids"] == among_others["token_ids"]
        assert alone["text"] == among_others["text"]
        for ours, theirs in zip(alone["logprobs"]["token_logprobs"], among_others["logprobs"]["token_logprobs"], strict=True):
            assert ours == theirs or abs(ours - theirs) < 1e-4


def test_n_and_lists_of_prompts(teacher: Teacher) -> None:
    answer = ask_all(teacher, [{"prompt": [START, "The"], "n": 2, "max_tokens": 6, "seed": 1, "logprobs": 0}])[0].json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["choices"][0]["text"] != answer["choices"][1]["text"]
    prompts = [len(teacher.text.encode(text)) for text in (START, "The")]
    assert answer["usage"] == {"prompt_tokens": sum(prompts), "completion_tokens": 24, "total_tokens": sum(prompts) + 24}
    assert answer["choices"][0]["logprobs"]["top_logprobs"] == [{}] * 6


def test_stop_strings_and_ends(teacher: Teacher, ask: Ask) -> None:
    stopped = ask(prompt="", max_tokens=100, temperature=0, stop=["Lily", "zzz"], return_token_ids=True)
    assert stopped["text"] == " Once upon a time, there was a little girl named "
    assert stopped["finish_reason"] == "stop"
    assert teacher.text.joined(stopped["token_ids"]).decode() == stopped["text"] + "Lily"
    ended = ask(prompt="", max_tokens=500, seed=0, logprobs=1, return_token_ids=True)
    assert ended["finish_reason"] == "stop"
    assert ended["token_ids"][-1] in (1, 2)  # a begin of text ends one, too
    assert not {1, 2} & set(ended["token_ids"][:-1])
    assert ended["logprobs"]["tokens"][-1] in ("<s>", "</s>")
    assert ended["text"] == teacher.text.joined(ended["token_ids"][:-1]).decode()


def test_chat_with_a_template(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"messages": [{"role": "user", "content": START}], "max_completion_tokens": 5, "temperature": 0}
    refused = ask_all(teacher, [body], "/v1/chat/completions")[0]
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    monkeypatch.setattr(
        teacher.text.tokenizer, "chat_template", "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    asked = {**body, "logprobs": True, "top_logprobs": 3, "return_token_ids": True}
    choice = ask_all(teacher, [asked], "/v1/chat/completions")[0].json()["choices"][0]
    plain = ask_all(teacher, [{"prompt": START, "max_tokens": 5, "temperature": 0, "return_token_ids": True}])[0].json()
    assert choice["token_ids"] == plain["choices"][0]["token_ids"]
    rows = choice["logprobs"]["content"]
    assert [row["id"] for row in rows] == [row["top_logprobs"][0]["id"] for row in rows] == choice["token_ids"]
    assert b"".join(bytes(row["bytes"]) for row in rows).decode() == choice["message"]["content"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": "a", "model": "gpt-5"}, 404, "model"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[1], []]}, 400, "prompt"),
        ({"prompt": [1, 512]}, 400, "prompt"),
        ({"prompt": [1] * 513}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 511}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "logprobs": 51}, 400, "logprobs"),
        ({"prompt": "a", "n": 129}, 400, "n"),
        ({"prompt": "a", "stop": [""]}, 400, "stop"),
        ({"prompt": "a", "stream": True}, 400, "stream"),
        ({"prompt": "a", "temperature": -1}, 422, "temperature"),
        ({"prompt": "a", "seed": "x"}, 422, "seed"),
        ({}, 422, "prompt"),
    ],
)
def test_errors_in_openais_shape(teacher: Teacher, body: dict[str, Any], status: int, param: str) -> None:
    answer = ask_all(teacher, [body])[0]
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert answer.json()["error"]["message"]


def test_a_failing_batch_fails_its_requests_and_no_others(teacher: Teacher, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(teacher.engine, "_forward", broken)
        answer = ask_all(teacher, [{"prompt": "a"}])[0]
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "generation failed: out of memory"
    assert ask(prompt="a", max_tokens=1)["finish_reason"] == "length"


def test_a_cancelled_request_leaves_the_batch(teacher: Teacher, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher.engine, "ends", frozenset())
    row = Row([1], max_tokens=100_000)  # nothing but the cancellation ends it
    teacher.engine.submit(row)
    deadline = time.monotonic() + 30
    while not row.ids and time.monotonic() < deadline:
        time.sleep(0.01)
    assert row.done.cancel()
    assert ask(prompt="a", max_tokens=30)["finish_reason"] == "length"
    assert row.finish_reason == "cancelled"


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
OTHERS = {
    "qwen3": Qwen3Config(**SIZES, intermediate_size=32, num_key_value_heads=1, head_dim=8, max_position_embeddings=64),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=64),
    "gemma3": Gemma3TextConfig(
        **SIZES, intermediate_size=32, num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_engine_on_other_architectures(name: str) -> None:
    """Grouped heads, learned positions, sliding windows: rows that join and leave have the logprobs of a plain forward."""
    model = AutoModelForCausalLM.from_config(OTHERS[name], dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    engine = Engine(model, frozenset(), [b""] * 40, context=64, max_batch=3)
    rows = [Row([1 + i] * (1 + 4 * i), 20 - i, seed=[i], top=1, score_prompt=i % 2 == 0) for i in range(7)]
    for done in [engine.submit(row) for row in rows]:
        done.result(timeout=60)
    engine.close()
    for row in rows:
        ids = torch.tensor([row.prompt + row.ids])
        with torch.inference_mode():
            expected = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        told = torch.tensor((row.prompt_scores[0] if row.score_prompt else []) + row.logprobs)
        torch.testing.assert_close(told, expected[-len(told) :], atol=1e-3, rtol=0)


def test_choose_draws_from_the_distribution() -> None:
    n = 40_000
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits, keys = probs.log().expand(n, 4), torch.arange(n) * GOLDEN  # one row's successive tokens

    def shares(temperature: float, top_p: float) -> list[float]:
        ids = choose(logits, torch.full((n,), temperature), torch.full((n,), top_p), keys)
        return (ids.bincount(minlength=4) / n).tolist()

    close = 4 * 0.5 / n**0.5  # four standard deviations
    assert shares(1, 1) == pytest.approx(probs.tolist(), abs=close)
    assert shares(0.5, 1) == pytest.approx((probs**2 / probs.square().sum()).tolist(), abs=close)
    assert shares(1, 0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=close)
    assert shares(0, 1) == [1, 0, 0, 0]
    drawn = choose(logits, torch.ones(n), torch.ones(n), keys) == 0
    together = (drawn[1:] & drawn[:-1]).float().mean().item()
    assert together == pytest.approx(0.25, abs=close)  # one token's noise tells nothing of the next one's


@pytest.mark.skipif(not QWEN.is_dir(), reason=f"the tokenizer {QWEN} is not here")
def test_bytes_of_a_byte_level_tokenizer() -> None:
    from transformers import AutoTokenizer

    from kd.local_teacher import Text

    text = Text(AutoTokenizer.from_pretrained(QWEN), 151_936)
    sample = "naïve 🙂 日本語\n\tx"
    ids = text.encode(sample)
    assert text.joined(ids).decode() == sample
    assert text.encode("")  # the end-of-text token, as there is no begin
    assert text.joined(text.encode("")) == b""


def test_what_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--model is missing"):
        load_teacher(ServeConfig())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_teacher(ServeConfig(model=str(tmp_path)))


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"the teacher {STORIES} is not here")
def test_the_program_over_a_socket() -> None:
    """Started as a person would, asked by 16 clients at once, and stopped by a signal."""
    command = [sys.executable, str(ROOT / "kd" / "local_teacher.py"), "--model", str(STORIES), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            line = next(line for line in process.stderr if " at http://" in line)
            url = line.rsplit(" at ", 1)[1].strip()

            async def run() -> list[httpx.Response]:
                as_json = {"Content-Type": "application/json"}
                async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                    models = (await client.get("/models")).json()["data"]
                    assert [model["id"] for model in models] == [NAME]
                    assert models[0]["context_length"] == 512
                    assert models[0]["model_spec"]["capabilities"]["supportsLogProbs"] is True
                    assert (await client.get(url.removesuffix("/v1") + "/health")).json()["status"] == "ok"
                    assert (await client.get("/nothing")).status_code == 404
                    assert (await client.post("/completions", content=b"{", headers=as_json)).status_code == 400
                    bodies = [{"prompt": START, "seed": i, "max_tokens": 20} for i in range(16)]
                    return await asyncio.gather(*(post(client, "/completions", body) for body in bodies))

            answers = asyncio.run(run())
            assert all(len(answer.json()["choices"]) == 1 for answer in answers)
            assert len({answer.json()["choices"][0]["text"] for answer in answers}) > 8
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM
        assert "Traceback" not in process.stderr.read()
