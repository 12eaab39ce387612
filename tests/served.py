"""A small server for the tests: a student with random weights behind the real app, in this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import uvicorn
from conftest import make_student
from fastapi import FastAPI

import server
from ae.tokenizer_adapter import TokenizerAdapter
from configs.schema import ServeConfig
from student.batching import Batcher
from student.fast import FastSampler
from student.student_model import Student
from web.metrics import Metrics
from web.service import Service


@dataclass
class Served:
    """What a test may look at behind the app."""

    app: FastAPI
    service: Service
    model: Student
    metrics: Metrics

    @property
    def batcher(self) -> Batcher:
        return self.service.batcher

    def close(self) -> None:
        self.batcher.drain(0)
        self.batcher.join(30)


def serve(tokenizer: TokenizerAdapter, key: str | None = None, **settings: Any) -> Served:
    """A server of a student whose context is 256 tokens, 4 a step."""
    torch.manual_seed(0)
    model = make_student(seq_len=64)
    cfg = ServeConfig(**{"slots": 4, "max_queue": 64, "max_choices": 32, "model_name": "tiny", **settings})
    sampler = FastSampler(model, tokenizer, slots=cfg.slots, dtype=torch.float32, compile=False)
    metrics = Metrics()
    batcher = Batcher(sampler, model, max_queue=cfg.max_queue, prefill_rows=cfg.prefill_rows, observer=metrics)
    metrics.watch(batcher)
    wait_for(batcher.ready.is_set)
    service = Service(batcher, cfg, str(cfg.model_name))
    return Served(server.make_app(service, metrics, key), service, model, metrics)


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """The app at a real socket on loopback, in a thread; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    program = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    thread = threading.Thread(target=program.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: program.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        program.should_exit = True
        thread.join(30)
        listener.close()


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


def slow(served: Served, monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """Latent steps that take their time."""
    step = served.batcher.sampler.step
    monkeypatch.setattr(served.batcher.sampler, "step", lambda: time.sleep(seconds) or step())


def broken(*_: Any) -> Any:
    raise RuntimeError("out of memory")
