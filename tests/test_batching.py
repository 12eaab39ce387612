"""A model that cannot go on: rows end, nothing more is taken, and /health says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from served import Served, serve

from ae.tokenizer_adapter import TokenizerAdapter
from web.stream import Events


@pytest.fixture
def served(tokenizer: TokenizerAdapter) -> Iterator[Served]:
    it = serve(tokenizer)
    yield it
    it.close()


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
