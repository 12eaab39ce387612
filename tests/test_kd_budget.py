"""What requests may cost and have cost: reserved before they go out, counted where nothing came back."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from conftest import World
from faulty_server import ByteTokenizer, FaultyServer, good
from test_kd_client import BODY, KEY, LOCAL, PRICED, VENICE, _ignore, call
from test_kd_faults import config, quiet

from configs.errors import UserError
from kd.harvest import Harvest
from kd.kd_client import Answer, Dropped, Stopped, TeacherClient, request_tokens
from kd.limits import Patience
from kd.prompts import Job, Prompts
from kd.settings import Settings
from kd.store import Store


def billed(asked: list[int], prompt_tokens: int) -> Any:
    """A server with a price, which notes in `asked` what it is asked for."""

    async def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=PRICED)
        asked.append(1)
        await asyncio.sleep(0.01)
        return httpx.Response(200, json={**good(), "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 9}})

    return handler


def test_scoring_ends_where_no_logprobs_come(packed: World, tmp_path: Path) -> None:
    """After the first call, not after the whole corpus."""
    cfg = config(tmp_path, 1, data=str(packed.data), prompts=None, mode="score", top_logprobs=2)
    with FaultyServer(lambda n, prompt: "odd null") as server:
        with pytest.raises(UserError, match="tells no logprobs of a text that it is given: --mode score needs"):
            quiet(cfg, server.url)
        assert len(server.log) == 1


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ({"text": "<|end|>the cat, 1"}, None),
        ({"text": "", "logprobs": {"tokens": ["the", " c", "at", ", ", "1"], "token_logprobs": [None, -1, -1, -1, -1]}}, None),
        ({"text": ""}, None),  # nothing to tell by
        ({"text": "of another tokenizer"}, "reads the ids of d as other text"),
    ],
)
def test_ids_that_are_other_words_to_the_teacher_are_not_scored(tmp_path: Path, told: Any, problem: str | None) -> None:
    """vLLM tells no text beside ids, so it is asked once more, without its own fields; the dollars are counted."""
    bodies: list[Any] = []

    async def ask(body: Any) -> Answer:
        bodies.append(body)
        return Answer(b"", {"choices": [told]}, 1, 0, 0.25, 0.0)

    cfg, tokenizer = config(tmp_path, 1, data="d", mode="score"), ByteTokenizer()
    job = Job({"prompt": [tokenizer.eot_id, *b"the cat, 1"], "echo": True, "return_token_ids": True}, None)
    with Store(tmp_path / "t.sqlite") as store:
        client: Any = SimpleNamespace(ask=ask, settings=LOCAL, errors=Counter())
        work = Harvest(cfg, client, store, Prompts(config(tmp_path, 1), LOCAL, None), log=lambda line: None)
        if problem is None:
            asyncio.run(work._check_words(job, tokenizer))
        else:
            with pytest.raises(UserError, match=problem):
                asyncio.run(work._check_words(job, tokenizer))
        assert "return_token_ids" not in bodies[0] and bodies[0]["echo"] and store.totals().cost == 0.25


def test_answers_that_are_mostly_of_no_use_stop_the_run(tmp_path: Path) -> None:
    """One that could be used does not switch the watch off."""
    with FaultyServer(lambda n, prompt: "good" if n == 0 else "odd empty") as server:
        with pytest.raises(Stopped, match=r"90 of the last 9\d answers cannot be used \(the teacher wrote no text\)"):
            quiet(config(tmp_path, 500, concurrency=2), server.url)
        assert 91 <= len(server.log) <= 100


def test_budget_is_never_passed() -> None:
    asked: list[int] = []

    async def run(client: TeacherClient) -> float:
        await client.models()
        with pytest.raises(Stopped, match=r"the budget is used up.*--budget_usd is 0.05"):
            await client.run(((n, BODY) for n in range(50)), _ignore)
        return client.spent

    spent = call(billed(asked, 14), run, budget_usd=0.05)  # type: ignore[arg-type]
    assert len(asked) == 5 and spent == pytest.approx(5 * (14 * 10 + 9 * 1000) / 1e6) and spent <= 0.05
    assert request_tokens(BODY) == (14, 10) and request_tokens({"prompt": [1, 2, 3]}) == (3, 0)


@pytest.mark.parametrize(
    ("models", "answer", "said"),
    [
        (PRICED, None, "$0.0000"),
        ({"data": []}, good(), "price not known"),
        ({"data": []}, {**good(), "cost": {"usd": 0.25}}, "$0.2500"),
    ],
)
def test_what_is_not_known_is_not_called_nothing(models: dict[str, Any], answer: dict[str, Any] | None, said: str) -> None:
    async def run(client: TeacherClient) -> str:
        await client.models()
        if answer is not None:
            await client.ask(BODY)
        return client.dollars

    assert call(lambda request: httpx.Response(200, json=models if request.method == "GET" else answer), run) == said


@pytest.mark.parametrize("settings", [VENICE, LOCAL])
def test_no_budget_without_a_price(settings: Settings) -> None:
    """Not even where answers tell their cost: before the first of them came, nothing would hold the others."""

    async def run(client: TeacherClient) -> None:
        assert await client.models() == []
        with pytest.raises(Stopped, match=r"/v1 lists no price for teacher, so no budget can be held; leave --budget_usd out"):
            await client.ask(BODY)

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.method == "GET"
        return httpx.Response(200, json={"data": []})

    call(handler, run, settings, budget_usd=0.0001)


def test_a_mistyped_model_is_no_reason_to_give_the_budget_up() -> None:
    async def run(client: TeacherClient) -> None:
        await client.models()
        with pytest.raises(
            Stopped, match=r"teacher is not among the models that .*/v1 lists, so no budget can be held; check VENICE_MODEL$"
        ):
            await client.ask(BODY)

    call(lambda request: httpx.Response(200, json={"data": [{"id": "teechar"}]}), run, budget_usd=1.0)


def test_the_reservation_is_an_upper_bound() -> None:
    """A prompt of digits is a token a digit: three requests at once would pass a budget that holds one of them."""
    asked: list[int] = []
    digits = {**BODY, "messages": [{"role": "user", "content": "7" * 30_000}]}

    async def run(client: TeacherClient) -> float:
        await client.models()
        with pytest.raises(Stopped, match="the budget is used up"):
            await client.run(((n, digits) for n in range(3)), _ignore)
        return client.spent

    spent = call(billed(asked, 30_010), run, budget_usd=0.35)  # type: ignore[arg-type]
    assert len(asked) == 1 and spent == pytest.approx((30_010 * 10 + 9 * 1000) / 1e6)


@pytest.mark.parametrize(
    ("outcome", "sent"),
    [
        (httpx.ReadTimeout("slow"), True),
        (httpx.ReadError("lost"), True),
        (httpx.RemoteProtocolError("lost"), True),
        (httpx.Response(200, content=b"{"), True),
        (httpx.Response(200, json={**good(), "model": "smaller"}), True),
        (httpx.Response(200, json={**good(), "echo": KEY}), True),
        (httpx.ConnectError("nobody"), False),
        (httpx.ConnectTimeout("nobody"), False),
        (httpx.Response(503), False),
        (httpx.Response(400), False),
    ],
)
def test_what_was_sent_and_brought_nothing_counts_against_the_budget(
    outcome: httpx.Response | httpx.RequestError, sent: bool
) -> None:
    """The teacher may have written all of it, and charged for it."""

    def handler(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(200, json=PRICED)
        if isinstance(outcome, httpx.RequestError):
            raise outcome
        return outcome

    async def run(client: TeacherClient) -> tuple[float, list[float]]:
        lost: list[float] = []
        client.on_lost = lost.append
        await client.models()
        with pytest.raises((Stopped, Dropped)):
            await client.ask(BODY)
        return client.spent, lost

    patience = Patience(timeout_s=2.0, attempts=2, backoff_s=0.001, longest_s=0.01, window_s=0.05)
    spent, lost = call(handler, run, patience=patience, budget_usd=1.0)
    assert (spent >= 10 * 1000 / 1e6) == sent and spent == sum(lost)
    if isinstance(outcome, httpx.RequestError) and sent:
        assert len(lost) == 2
