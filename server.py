"""Serve a trained student over HTTP: POST /generate, OpenAI's dialect under /v1, and a page to play with at /.

    python server.py --student_ckpt checkpoints/student.pt --port 7860
    uvicorn server:app --port 7860       # the same, from STUDENT_CHECKPOINT and AE_CHECKPOINT or configs/inference.yaml

docs/serving.md has a line of curl for each path. SERVE_API_KEY in the environment asks clients for a bearer key.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from configs.errors import EXIT_USER_ERROR, UserError, run_cli
from configs.run import pick_device, tune_process, wants_compile
from configs.schema import ServeConfig, parse_config
from student.batching import Batcher
from student.fast import FastSampler
from student.sampler import load_sampler
from web import protocol as api
from web.guard import Guard, dumped, error_content, json_answer, request_id
from web.metrics import Metrics
from web.protocol import Refused
from web.service import Ask, Service
from web.stream import Events, collect, generate_events, openai_events

ROOT = Path(__file__).resolve().parent
CONFIG = ROOT / "configs" / "inference.yaml"
KEY = "SERVE_API_KEY"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
KNOWN = ", ".join(api.GenerateRequest.model_fields)
SLACK = 5.0  # seconds beyond the grace for what has to happen after it
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": api.ErrorAnswer, "description": "an error in OpenAI's shape"} for status in ("4XX", "5XX")
}
STREAMED: dict[int | str, dict[str, Any]] = {**ERRORS, 200: {"content": {"text/event-stream": {}}}}
log = logging.getLogger("latentforge.server")


# -------------------------------------------------------------------------------------------------- from checkpoints
def from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Settings that the environment names."""
    names = {f"SERVE_{field.name.upper()}": field.name for field in dataclasses.fields(ServeConfig)}
    names |= {"STUDENT_CHECKPOINT": "student_ckpt", "AE_CHECKPOINT": "ae_ckpt"}
    return {field: environment[name] for name, field in names.items() if environment.get(name)}


def settings(argv: Sequence[str]) -> ServeConfig:
    """configs/inference.yaml, or --config or SERVE_CONFIG, then the environment, then flags. Raises UserError."""
    config = ["--config", os.environ.get("SERVE_CONFIG") or str(CONFIG)]
    sets = [f"--set={field}={value}" for field, value in from_environment(os.environ).items()]
    return parse_config(ServeConfig, __doc__, [*config, *sets, *argv])


def load_service(cfg: ServeConfig, metrics: Metrics) -> Service:
    """The model behind a batcher, its thread running. Raises UserError for what cannot be served."""
    if cfg.rank is not None and not cfg.words:
        raise UserError("rank belongs to the vocabulary screen; set words, too, or leave it out")
    device = pick_device(cfg.device)
    compiled = wants_compile(cfg.compile, device)
    loaded = load_sampler(cfg.student_ckpt, cfg.ae_ckpt, device)
    sampler = FastSampler(
        loaded.model,
        loaded.tokenizer,
        slots=cfg.slots,
        dtype=DTYPES[cfg.dtype],
        words=cfg.words,
        rank=cfg.rank,
        int8=cfg.int8,
        compile=compiled,
    )
    batcher = Batcher(
        sampler, loaded.model, max_queue=cfg.max_queue, prefill_rows=cfg.prefill_rows, warm_up=compiled, observer=metrics
    )
    metrics.watch(batcher)
    return Service(batcher, cfg, cfg.model_name or Path(cfg.student_ckpt).stem)


# ------------------------------------------------------------------------------------------------------------ the app
@contextmanager
def draining(batcher: Batcher, grace: float) -> Iterator[None]:
    """From the first SIGINT or SIGTERM on, take no more rows; uvicorn, whose handlers go on, waits for those that answer."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def chained(number: signal.Signals, before: Any) -> None:
        def handle(*args: Any) -> None:
            log.info("shutting down: %d rows run, %d wait, %.0f s for them", batcher.running, batcher.waiting, grace)
            threading.Thread(target=batcher.drain, args=(grace,)).start()  # a handler may not wait for a lock
            if callable(before):
                before(*args)

        signal.signal(number, handle)

    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, before in found.items():
        chained(number, before)
    try:
        yield
    finally:
        for number, before in found.items():
            signal.signal(number, before)


def make_app(service: Service, metrics: Metrics, key: str | None = None) -> FastAPI:
    """The server as an ASGI application; its end drains the batcher."""
    batcher, cfg = service.batcher, service.cfg

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with draining(batcher, cfg.grace_s):
            yield
        batcher.drain(cfg.grace_s)
        # Before it is ready the batcher has no rows, and its thread may still compile for minutes.
        dropped = await asyncio.to_thread(batcher.join, cfg.grace_s + SLACK) if batcher.ready.is_set() else 0
        log.info("shut down; %s", f"{dropped} rows were dropped unfinished" if dropped else "every row was finished")

    app = FastAPI(title="LatentForge", version=own_version(), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, key=key, max_body=cfg.max_body_bytes, metrics=metrics)
    locked = [Depends(HTTPBearer(auto_error=False))] if key else []  # for the document; Guard has checked it

    def state() -> tuple[str, int]:
        if batcher.closing:
            return ("closing", 503) if batcher.ready.is_set() and not batcher.failed else ("failed", 503)
        return ("ok", 200) if batcher.ready.is_set() else ("starting", 503)

    def health_answer(status: int) -> Response:
        return json_answer({"status": state()[0], "running": batcher.running, "waiting": batcher.waiting}, status)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(page_bytes, media_type="text/html", headers=PAGE_HEADERS)

    @app.get("/health", response_model=api.Health, responses=ERRORS)
    async def health() -> Response:
        """The process answers; 503 only where its model never will."""
        return health_answer(503 if state()[0] == "failed" else 200)

    @app.get("/ready", response_model=api.Health, responses={503: {"model": api.Health}})
    async def ready() -> Response:
        """200 once requests are answered: the step is compiled, and nobody has asked the server to stop."""
        return health_answer(state()[1])

    @app.get("/version", response_model=api.Version, responses=ERRORS, dependencies=locked)
    async def versions() -> Response:
        return json_answer(about)

    @app.get(
        "/metrics", dependencies=locked, responses={**ERRORS, 200: {"content": {"text/plain": {}}}}, response_class=Response
    )
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @app.get("/v1/models", response_model=api.ModelList, responses=ERRORS, dependencies=locked)
    async def models() -> Response:
        return json_answer({"object": "list", "data": [card]})

    @app.get("/v1/models/{name:path}", response_model=api.ModelCard, responses=ERRORS, dependencies=locked)
    async def model(name: str) -> Response:
        service.check_name(name)
        return json_answer(card)

    @app.post("/generate", response_model=api.GenerateAnswer, responses=STREAMED, dependencies=locked)
    async def generate(request: Request, body: api.GenerateRequest) -> Response:
        """Continue a prompt. With `stream`, server-sent events: `chunk` each latent step, then `done`, or `error`."""
        ask = service.ask(body, await service.prompts(body.prompt), body.max_new_tokens)
        if body.stream:
            return Events(ask, generate_events(service, ask, request_id(request)), 2 * cfg.timeout_s)
        await collect(request, ask)
        return json_answer({"text": ask.texts[0], "token_ids": ask.jobs[0].token_ids, **service.generated(ask)})

    async def reply(request: Request, body: api.OpenAIRequest, ask: Ask, prefix: str, kind: str) -> Response:
        """OpenAI's answer to an ask, streamed or whole."""
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": service.name}
        if body.stream:
            head["object"] = kind.replace("chat.completion", "chat.completion.chunk")
            return Events(ask, openai_events(service, ask, body, head, request_id(request)), 2 * cfg.timeout_s)
        scores = await collect(request, ask)

        def answer() -> Response:
            rows = zip(ask.jobs, ask.texts, scores, strict=True)
            # one by one: while json works, no other thread does, and thousands of scores are megabytes
            choices = ",".join([dumped(service.choice(job, text, scored, body)) for job, text, scored in rows])
            return json_answer(f'{dumped(head)[:-1]},"choices":[{choices}],"usage":{dumped(ask.usage)}}}')

        return await asyncio.to_thread(answer) if any(scores) else answer()

    @app.post("/v1/completions", response_model=api.Completion, responses=STREAMED, dependencies=locked)
    async def completions(request: Request, body: api.CompletionRequest) -> Response:
        new = 16 if body.max_tokens is None else body.max_tokens
        if not new and not body.echo:
            raise Refused(400, "max_tokens 0 needs echo: true", "max_tokens")
        prompts = await service.prompts(body.prompt)
        ask = service.ask(body, prompts, new, n=body.n or 1, top=body.logprobs, echo=bool(body.echo))
        return await reply(request, body, ask, "cmpl", "text_completion")

    @app.post("/v1/chat/completions", response_model=api.ChatCompletion, responses=STREAMED, dependencies=locked)
    async def chat(request: Request, body: api.ChatRequest) -> Response:
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
        prompt = await asyncio.to_thread(service.encode_chat, body)
        new = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        ask = service.ask(body, [prompt], new, n=body.n or 1, top=(body.top_logprobs or 0) if body.logprobs else None)
        return await reply(request, body, ask, "chatcmpl", "chat.completion")

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        content = error_content(error.status, str(error), request_id(request), error.param, error.code)
        return json_answer(content, error.status, headers)

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        return json_answer(
            error_content(error.status_code, error.detail, request_id(request)), error.status_code, error.headers
        )

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        if isinstance(error.body, bytes):
            message = "the body is not declared as JSON: send the header Content-Type: application/json"
            return json_answer(error_content(415, message, request_id(request)), 415)
        # where there are alternatives, what came closest to fit
        found = max(error.errors(), key=lambda one: (one["type"] == "too_long", len(one["loc"])))
        if found["type"] == "json_invalid":
            return json_answer(error_content(400, "the body is not JSON", request_id(request)), 400)
        field = str(found["loc"][1]) if len(found["loc"]) > 1 else None
        said = f"no such field; there are {KNOWN}" if found["type"] == "extra_forbidden" else found["msg"]
        return json_answer(error_content(422, f"{field or 'body'}: {said}", request_id(request), field), 422)

    page_bytes = (ROOT / "web" / "index.html").read_bytes()
    card = {
        "id": service.name, "object": "model", "created": service.created, "owned_by": "latentforge",
        "max_model_len": service.context,
    }  # fmt: skip
    about = {
        "name": "latentforge", "version": own_version(), "model": service.name, "k": service.k, "context": service.context,
        "parameters": sum(p.numel() for p in batcher.model.parameters()), "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    return app


def own_version() -> str:
    """pyproject.toml's: the server runs from its folder, installed or not."""
    return re.findall(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[0]


# ------------------------------------------------------------------------------------------------------------ program
def start(cfg: ServeConfig) -> FastAPI:
    """Load what `cfg` names and make the app. Raises UserError."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    threads, metrics = tune_process(), Metrics()
    service = load_service(cfg, metrics)
    sampler = service.batcher.sampler
    log.info(
        "%s from %s: context %d, %d slots, %s on %s, %d threads", service.name, cfg.student_ckpt, service.context, cfg.slots,
        sampler.model.table.dtype, sampler.never.device, threads,
    )  # fmt: skip
    return make_app(service, metrics, os.environ.get(KEY, "").strip() or None)


def __getattr__(name: str) -> Any:
    """`app` for `uvicorn server:app`, made when it is asked for: importing this module loads no model."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        app = globals()["app"] = start(settings([]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(EXIT_USER_ERROR) from None
    return app


def main() -> None:
    cfg = settings(sys.argv[1:])
    try:
        listener = socket.create_server((cfg.host, cfg.port), family=socket.AF_INET6 if ":" in cfg.host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {cfg.host} port {cfg.port}: {error}. Choose another --port or --host") from None
    app = start(cfg)
    log.info("listening at http://%s:%d", f"[{cfg.host}]" if ":" in cfg.host else cfg.host, listener.getsockname()[1])
    patience = math.ceil(cfg.grace_s + SLACK)  # for clients that do not read their answers
    settled = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=patience)
    uvicorn.Server(settled).run(sockets=[listener])


if __name__ == "__main__":
    run_cli(main)
