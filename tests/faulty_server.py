"""An OpenAI-like chat server on loopback that misbehaves on purpose, and a tokenizer small enough to see through.

As a program it prints its address and answers at once, until its standard input closes:  python tests/faulty_server.py
"""

from __future__ import annotations

import asyncio
import io
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

WORDS = ["the", " cat", " sat", "\u00e9", " \u732b"]
SPECIAL = "<|end|>"


class ByteTokenizer:
    """Ids 0..255 are the bytes, then WORDS, then one special token."""

    size = 256 + len(WORDS) + 1
    eot_id = start_id = size - 1
    special_ids = stop_ids = frozenset({eot_id})
    fallback_ids: frozenset[int] = frozenset()
    fingerprint = "bytes"

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if id < 256 else WORDS[id - 256].encode() if id < self.eot_id else b""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> list[int]:
        return [i for message in messages for i in [*self.encode(message["content"]), self.eot_id]]

    def encode_rendered(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([self.eot_id] if text == SPECIAL else self.encode(text)) for text in texts]


def entry(text: str, logprob: Any = -0.5, top: Sequence[Any] = (), **more: Any) -> dict[str, Any]:
    """OpenAI's object for one token."""
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": list(top), **more}


def chat_answer(text: str, tokens: Sequence[dict[str, Any]] | None, model: str = "teacher", **more: Any) -> dict[str, Any]:
    """A whole chat completion."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": None if tokens is None else {"content": tokens, "refusal": None},
    }
    usage = {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    return {"id": "x", "object": "chat.completion", "model": model, "choices": [choice], "usage": usage, **more}


def good(text: str = "the cat sat") -> dict[str, Any]:
    """An answer of three tokens with two top logprobs each."""
    return chat_answer(
        text, [entry(w, top=[entry(w), entry(" cat" if w != " cat" else " sat", -2.0)]) for w in ("the", " cat", " sat")]
    )


def odd(kind: str) -> dict[str, Any]:
    """Answers that are whole, but whose logprobs are not as they should be."""
    answer = good()
    tokens = answer["choices"][0]["logprobs"]["content"]
    if kind == "null":
        answer["choices"][0]["logprobs"] = None
    elif kind == "nan":
        tokens[1]["logprob"] = tokens[0]["top_logprobs"][1]["logprob"] = math.nan
    elif kind == "-9999":
        tokens[1]["logprob"] = tokens[0]["top_logprobs"][1]["logprob"] = -9999.0
    elif kind == "duplicate":
        tokens[0]["top_logprobs"].append(entry(" cat", -3.0))
    elif kind == "empty":  # as of a model that has spent its tokens on thoughts
        answer["choices"][0] = chat_answer("", None)["choices"][0]
    elif kind == "fragment":
        tokens[2] = entry("\ufffd")
    return answer


class FaultyServer:
    """Use it in `with`. `behave(n, prompt)` names what request number n gets; `log` holds (prompt, name, seconds) of each.

    Names: "good", a status ("500", "429 after", ...), "slow" (0.1 s), "hung" (8 s), "drip" (a byte now and then, for 4 s),
    "reset", "truncated", "shape", "swapped", "echo key", "odd KIND".
    """

    def __init__(self, behave: Callable[[int, str], str] = lambda n, prompt: "good", latency_s: float = 0.0) -> None:
        self.behave, self.latency_s = behave, latency_s
        self.log: list[tuple[str, str, float]] = []
        self.headers: dict[str, str] = {}
        self.models: list[dict[str, Any]] = [{"id": "teacher", "object": "model"}]
        self.url = ""
        self.in_flight = self.most_in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> FaultyServer:
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self.url = f"http://127.0.0.1:{started.result().sockets[0].getsockname()[1]}/v1"
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._hang_up(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _hang_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def asked(self, what: str | None = None) -> list[str]:
        """The prompts of all requests, or of those that got `what`."""
        return [prompt for prompt, name, _ in self.log if what in (None, name)]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read and answer one request; False when the connection is over."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in head.split("\r\n")[1:])}
        content = await reader.readexactly(int(fields.get("content-length", 0)))
        if head.startswith("GET"):
            found = "/models" in head.split()[1]
            self._send(writer, 200 if found else 404, {"data": self.models} if found else {"error": "no such path"})
            return True
        body = json.loads(content)
        prompt = body["messages"][-1]["content"] if "messages" in body else str(body["prompt"])
        what = self.behave(len(self.log), prompt)
        self.log.append((prompt, what, time.monotonic()))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self._answer(writer, what, fields)
        finally:
            self.in_flight -= 1

    async def _answer(self, writer: asyncio.StreamWriter, what: str, fields: Mapping[str, str]) -> bool:
        kind, _, detail = what.partition(" ")
        key = fields.get("authorization", "")
        if self.latency_s or kind in ("slow", "hung"):
            await asyncio.sleep({"slow": 0.1, "hung": 8.0}.get(kind, self.latency_s))
        if kind.isdigit():
            more = {"Retry-After": "0.05"} if detail == "after" else {}
            self._send(writer, int(kind), {"error": {"message": f"{what} for {key}"}}, more)
            return True
        answer = odd(detail) if kind == "odd" else good()
        if what == "swapped":
            answer["model"] = "another-teacher"
        elif what == "echo key":
            answer["echo"] = key
        elif what == "shape":
            answer = {"result": "fine", "choices": "none"}
        raw = json.dumps(answer).encode()
        if what == "truncated":
            raw = raw[: len(raw) // 2]
        if what in ("reset", "drip"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(raw))
            if what == "reset":
                writer.write(raw[:100])
                await writer.drain()
                writer.transport.abort()
                return False
            for i in range(40):
                writer.write(raw[i : i + 1])
                await writer.drain()
                await asyncio.sleep(0.1)
            writer.write(raw[40:])
            return True
        self._send(writer, 200, raw)
        return True

    def _send(self, writer: asyncio.StreamWriter, status: int, body: Any, more: Mapping[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(raw)}"]
        lines += [f"{key}: {value}" for key, value in {**self.headers, **(more or {})}.items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + raw)


def harvest_in_a_child(prompts: str, store: str, url: str) -> None:
    """One pass over the prompts; here, as a child process must be able to import it without torch."""
    from kd.harvest import HarvestConfig, harvest
    from kd.settings import Settings

    sys.stderr = sys.stdout = io.StringIO()
    cfg = HarvestConfig(prompts=prompts, store=store, mode="chat", temperature=0.0, n_tokens=10**9, concurrency=8)
    harvest(cfg, Settings(url, "teacher"))


if __name__ == "__main__":
    with FaultyServer() as server:
        print(server.url, flush=True)
        sys.stdin.read()
