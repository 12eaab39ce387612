"""The check of a teacher: what it prints, and its three exit codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import World, run_script
from faulty_server import FaultyServer

from tools import verify_api

PRICES = {"pricing": {"input": {"usd": 0.35}, "output": {"usd": 1.9}}, "capabilities": {"supportsLogProbs": True}}
TEACHER = {"id": "teacher", "context_length": 4096, "model_spec": PRICES}


@pytest.fixture(autouse=True)
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No .env of the developer's, no key."""
    monkeypatch.chdir(tmp_path)
    for name in ("VENICE_BASE_URL", "VENICE_API_KEY", "VENICE_MODEL"):
        monkeypatch.delenv(name, raising=False)


def check(server: FaultyServer, *flags: Any) -> int:
    return run_script(verify_api, "--base_url", server.url, "--model", "teacher", "--mode", "chat", *flags)


def test_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    with FaultyServer() as server:
        server.models = [TEACHER]
        server.headers = {"x-ratelimit-limit-requests": "50", "x-venice-balance-usd": "12.5"}
        assert check(server, "--top_logprobs", 2) == 0
        assert len(server.log) == 1
    out = capsys.readouterr().out
    for part in (
        "1 models listed",
        "$0.35 in, $1.9 out",
        f"s, ${(3 * 0.35 + 3 * 1.9) / 1e6:.6f}\n",
        "4096 tokens",
        "limit-requests 50",
        "usd 12.5",
        "2 a token",
        "not compared",
    ):
        assert part in out
    assert out.endswith("\nusable\n")


def test_restrictions_are_stated(packed: World, capsys: pytest.CaptureFixture[str]) -> None:
    with FaultyServer(lambda n, prompt: "odd null") as server:
        server.models = [{**TEACHER, "id": "better"}]
        assert check(server, "--tokenizer", packed.root / "tokenizer") == 1
    out = capsys.readouterr().out
    assert "not among the models listed (better)" in out and "that give logprobs: better" in out
    with FaultyServer() as server:  # words that the small tokenizer has not
        server.models = [TEACHER]
        assert check(server, "--tokenizer", packed.root / "tokenizer") == 1
    out = capsys.readouterr().out
    assert (
        "do not align with" in out
        and "use its text alone (kd/harvest.py --top_logprobs 0" in out
        and "2 top logprobs a token, not 20" in out
    )


def test_an_answer_without_text_is_a_restriction(capsys: pytest.CaptureFixture[str]) -> None:
    with FaultyServer(lambda n, prompt: "odd empty") as server:
        server.models = [TEACHER]
        assert check(server) == 1
    assert "the teacher wrote no text in 3 tokens: one that thinks first needs more --max_new_tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "advice"),
    [("401", "check VENICE_API_KEY"), ("402", "top it up"), ("500", "gave up after 3"), ("swapped", "--allow_other_model")],
)
def test_not_usable(what: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    with FaultyServer(lambda n, prompt: what) as server:
        assert check(server) == 2
    out = capsys.readouterr().out
    assert advice in out and out.endswith("not usable\n")


def test_another_model_that_is_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    with FaultyServer(lambda n, prompt: "swapped") as server:
        assert check(server, "--allow_other_model", "--top_logprobs", 2) == 1
    assert "the answers are those of 'another-teacher'" in capsys.readouterr().out


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(verify_api, "--base_url", "http://127.0.0.1:1/v1", "--model", "m") == 2
    assert "that the server runs" in capsys.readouterr().out
    assert run_script(verify_api) == 2
    assert "VENICE_BASE_URL" in capsys.readouterr().err
