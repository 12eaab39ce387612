"""Load a running server and check every answer: same seed, same text, alone and in the crowd.

    python server.py --student_ckpt runs/demo/checkpoints/student.pt &
    python tools/load_test.py --url http://127.0.0.1:7860 --seconds 60 --clients 1 32 64 --disconnect 0.2

First each kind of request is asked alone, for the text to expect. Then, for each number of clients, that many ask one
request after the other; some hang up within their stream. /health is asked all the while: its time is the event loop's,
and what it does not answer with 200 counts as failed.
Prints a table and, last, one JSON line; exit code 1 where an answer was wrong, a request failed, or a place was not freed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from configs.errors import UserError, run_cli
from kd.limits import retry_after_s

PROMPTS = (
    "import os\n",
    "def main():\n    parser = argparse",
    "class Node:\n    def __init__(self, left, ",
    "x",
    '"""Utilities for ' * 8,
)
KINDS = 20  # different requests: mixed prompts, lengths and parameters


@dataclass
class Tally:
    """What a phase of `clients` gave. Seconds, except where the name says otherwise."""

    clients: int
    answers: int = 0
    tokens: int = 0
    wrong: int = 0
    failed: int = 0
    refused: int = 0  # 429: asked again later
    hung_up: int = 0
    first: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """Plain figures."""
        return {
            "clients": self.clients, "answers": self.answers, "tokens_per_s": round(self.tokens / max(1e-9, self.seconds), 1),
            "first_chunk_p50_ms": percentile(self.first, 50), "first_chunk_p95_ms": percentile(self.first, 95),
            "health_p50_ms": percentile(self.health, 50), "health_p95_ms": percentile(self.health, 95),
            "hung_up": self.hung_up, "refused": self.refused, "wrong": self.wrong, "failed": self.failed,
        }  # fmt: skip


def percentile(seconds: Sequence[float], percent: int) -> float | None:
    """In milliseconds; None of nothing."""
    return round(1000 * float(np.percentile(seconds, percent)), 1) if seconds else None


def kinds(max_new_tokens: int) -> list[dict[str, Any]]:
    """The requests: the same every time."""
    draw = random.Random(0)
    return [
        {
            "prompt": PROMPTS[i % len(PROMPTS)], "max_new_tokens": draw.randint(1, max_new_tokens), "seed": i,
            "temperature": draw.choice((0.0, 0.7, 1.0)), "top_p": draw.choice((0.9, 1.0)), "top_k": draw.choice((0, 0, 40)),
            "stream": True,
        }
        for i in range(KINDS)
    ]  # fmt: skip


async def ask(
    client: httpx.AsyncClient, body: dict[str, Any], hang_up_after: int | None = None
) -> tuple[str, int, float, bool]:
    """(text, tokens, seconds to the first chunk, whether the end was reached)."""
    start, first, text, tokens, chunks, done = time.perf_counter(), 0.0, "", 0, 0, False
    async with client.stream("POST", "/generate", json=body) as answer:
        answer.raise_for_status()
        name = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                name = line[7:]
            elif line.startswith("data: "):
                data = json.loads(line[6:])
                if name == "error":
                    raise httpx.RemoteProtocolError(data["error"]["message"])
                done |= name == "done"
                if name == "chunk":
                    first = first or time.perf_counter() - start
                    text, tokens, chunks = text + data["text"], tokens + len(data["token_ids"]), chunks + 1
                    if chunks == hang_up_after:
                        break
    return text, tokens, first, done


async def phase(
    client: httpx.AsyncClient,
    clients: int,
    seconds: float,
    disconnect: float,
    bodies: list[dict[str, Any]],
    expected: list[str],
) -> Tally:
    """`clients` that ask one request after the other for some seconds."""
    tally, end = Tally(clients), time.perf_counter() + seconds

    async def one(number: int) -> None:
        draw = random.Random(number)
        while time.perf_counter() < end:
            i, hang_up = draw.randrange(len(bodies)), draw.randint(1, 2) if draw.random() < disconnect else None
            try:
                text, tokens, first, done = await ask(client, bodies[i], hang_up)
            except httpx.HTTPStatusError as error:
                tally.refused += error.response.status_code == 429
                tally.failed += error.response.status_code != 429
                wait = retry_after_s(error.response.headers.get("retry-after")) or 1.0
                await asyncio.sleep(max(0.0, min(wait, end - time.perf_counter())))
                continue
            except httpx.HTTPError:
                tally.failed += 1
                continue
            tally.first.append(first)
            tally.tokens += tokens
            if done:
                tally.answers += 1
                tally.wrong += text != expected[i]
            else:
                tally.hung_up += 1
                tally.failed += hang_up is None
                tally.wrong += not expected[i].startswith(text)

    async def health() -> None:
        while True:
            start = time.perf_counter()
            try:
                (await client.get("/health")).raise_for_status()
            except httpx.HTTPError:
                tally.failed += 1
            finally:  # one that hangs until the phase ends counts, too
                tally.health.append(time.perf_counter() - start)
            await asyncio.sleep(0.05)

    start, watching = time.perf_counter(), asyncio.ensure_future(health())
    await asyncio.gather(*(one(i) for i in range(clients)))
    tally.seconds = time.perf_counter() - start
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching
    return tally


async def resident(client: httpx.AsyncClient) -> int:
    """The server's memory, bytes; 0 where its system does not tell. Raises UserError where /metrics is refused."""
    answer = await client.get("/metrics")
    if answer.status_code != 200:
        raise UserError(f"{answer.url}: expected 200, got {answer.status_code}; see the server's log for why")
    found = re.search(r"^process_resident_memory_bytes (\S+)", answer.text, re.M)
    return int(float(found[1])) if found else 0


async def load(url: str, clients: Sequence[int], seconds: float, disconnect: float, max_new_tokens: int) -> dict[str, Any]:
    """The whole test. Raises UserError where no server is ready at `url`."""
    key = os.environ.get("SERVE_API_KEY")
    limits = httpx.Limits(max_connections=max(clients) + 8)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, headers=headers) as client:
        try:
            if (await client.get("/ready")).status_code != 200:
                raise UserError(f"the server at {url} is not ready yet; ask again when {url}/ready says 200")
        except httpx.TransportError as error:
            raise UserError(f"no server at {url}: {error}. Start one with `make serve`") from None
        bodies = kinds(max_new_tokens)
        try:
            expected = [(await ask(client, body))[0] for body in bodies]
        except httpx.HTTPStatusError as error:
            told = dict.fromkeys((401, 403), "set SERVE_API_KEY to the server's key")
            told[400] = "its context may be too small: lower --max_new_tokens"
            advice = told.get(error.response.status_code, "see the server's log for why")
            raise UserError(f"{error.request.url}: expected 200, got {error.response.status_code}; {advice}") from None
        except httpx.TransportError as error:
            raise UserError(f"the server at {url} went away ({type(error).__name__}); see its log for why") from None
        memory = [await resident(client)]
        rows: list[dict[str, Any]] = []
        left: int | None = None  # where the server goes away under the load, what was measured is still told
        with suppress(httpx.TransportError):
            for count in clients:
                rows.append((await phase(client, count, seconds, disconnect, bodies, expected)).row())
                memory.append(await resident(client))
            for _ in range(50):  # a place is free within a step
                state = (await client.get("/health")).json()
                left = state["running"] + state["waiting"]
                if not left:
                    break
                await asyncio.sleep(0.1)
    return {"phases": rows, "memory_mb": [round(m / 1e6) for m in memory], "left": left}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 32, 64], help="a phase for each [1 32 64]")
    parser.add_argument("--seconds", type=float, default=60, help="of each phase [60]")
    parser.add_argument(
        "--disconnect", type=float, default=0.2, help="share of requests that hang up within their stream [0.2]"
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="most tokens a request asks for [128]")
    args = parser.parse_args()
    result = asyncio.run(load(args.url, args.clients, args.seconds, args.disconnect, args.max_new_tokens))
    names = list(result["phases"][0])
    print("  ".join(names))
    for row in result["phases"]:
        print("  ".join(f"{row[name]!s:>{len(name)}}" for name in names))
    left = "not known, the server went away" if result["left"] is None else result["left"]
    print(f"server's memory before and after each phase, MB: {result['memory_mb']}; places not freed: {left}")
    print(json.dumps(result))
    return int(any(row["wrong"] or row["failed"] for row in result["phases"]) or result["left"] != 0)


if __name__ == "__main__":
    run_cli(main)
