"""An OpenAI-like server over any transformers causal language model (folder or hub name), with logprobs.

    python kd/local_teacher.py --model Qwen/Qwen3-0.6B --port 8001

Paths: GET /health, GET /v1/models, POST /v1/completions, POST /v1/chat/completions (with the tokenizer's chat template).

- `prompt`: a text, a list of texts, token ids, or a list of id lists. Ids are taken as they are. A text gets the
  tokenizer's begin-of-text token in front where it has one and the text lacks it; an empty text is that token alone (the
  end-of-text token where there is no other).
- A completion ends at any end or begin-of-text token (a begin starts another document), at a stop string, or at
  max_tokens. The end token is part of `token_ids` and of the logprobs, not of the text; a stop string is cut from the text.
- The space that a SentencePiece tokenizer puts before a text is part of the text that comes back.
- Logprobs are those of the model itself, temperature 1 and no top_p, whatever the sampling is.
- `echo: true` with `max_tokens: 0` scores a given text: logprobs of every prompt token but the first, which is null.

With `return_token_ids: true`, as in vLLM, a choice carries `prompt_token_ids` and `token_ids`. Beyond vLLM, the ids stand
in the logprobs too, so that no token has to be found again by its text:

- completions: `logprobs.token_ids` [n], `logprobs.top_token_ids` [n][k] and `logprobs.top_token_logprobs` [n][k] beside
  OpenAI's `tokens`, `token_logprobs` and `text_offset`, in place of its `top_logprobs` (whose strings may name several
  tokens); with echo the rows begin with the prompt's, and the first entry of the last two is null;
- chat: `id` beside `token`, `logprob` and `bytes`, for each entry of `content` and of its `top_logprobs` (llama.cpp's name).

Concurrent requests run in one batch (`kd/engine.py`); what a seed gives does not depend on its neighbours there.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from starlette.exceptions import HTTPException
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ae.tokenizer_adapter import piece_decoder
from configs.errors import UserError, run_cli
from configs.run import pick_device, tune_process
from configs.schema import opt, parse_config
from kd.engine import Engine, Row

MAX_CHOICES = 128  # completions a request
ONE_THREAD = 20_000_000  # parameters below which a CPU's threads wait for each other longer than they save


# -------------------------------------------------------------------------------------------------------- text
class Text:
    """Text <-> ids of a transformers tokenizer, and the exact bytes of each id (a special token's are its literal string)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self.tokenizer = tokenizer
        self.special = frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
        added = {i: token.content for i, token in tokenizer.added_tokens_decoder.items()}
        bytes_of = piece_decoder(tokenizer.backend_tokenizer)
        self.pieces = [b""] * max(vocab_size, len(tokenizer))  # a model's table is often wider than its tokenizer
        for piece, i in tokenizer.get_vocab().items():
            self.pieces[i] = added[i].encode() if i in added else bytes_of(piece)
        self.strings = [piece.decode("utf-8", errors="replace") for piece in self.pieces]

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt: begins with the begin-of-text token where there is one; an empty text is a start of text."""
        ids, start = self.tokenizer(text).input_ids, self.tokenizer.bos_token_id
        if start is None and not ids:
            start = self.tokenizer.eos_token_id
        return ids if start is None or ids[:1] == [start] else [start, *ids]

    def encode_chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Ids of a chat up to where the assistant answers."""
        if self.tokenizer.chat_template is None:
            raise Refused(400, "this model's tokenizer has no chat template: use /v1/completions", "messages")
        try:
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of the model's author, and raises what it likes
            raise Refused(400, f"the chat template refuses these messages: {error}", "messages") from None
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def joined(self, ids: Sequence[int]) -> bytes:
        """The bytes of ids without special tokens."""
        return b"".join(self.pieces[i] for i in ids if i not in self.special)


# -------------------------------------------------------------------------------------------------------- HTTP
class Refused(Exception):
    """A request that gets an error answer: HTTP status, message, and the parameter at fault."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Sampling(BaseModel):
    """What both kinds of request share. Fields that other servers know and this one does not are refused if they ask
    for anything (`NOT_HERE`); any other extra field is ignored."""

    model_config = ConfigDict(extra="allow")
    model: str
    max_tokens: int | None = Field(None, ge=0)
    max_completion_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0)
    stop: str | list[str] | None = None
    top_logprobs: int | None = Field(None, ge=0)
    return_token_ids: bool = False


class CompletionRequest(Sampling):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0)


class ChatRequest(Sampling):
    messages: list[dict[str, Any]]
    logprobs: bool = False


NOT_HERE = {  # and the value that asks for nothing
    "stream": False, "best_of": 1, "suffix": "", "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0,
    "repetition_penalty": 1, "min_p": 0, "top_k": -1, "stop_token_ids": [], "prompt_logprobs": None, "tools": [],
    "functions": [], "response_format": None,
}  # fmt: skip


class Teacher:
    """What is served: an engine, its text side, and the limits that requests are held to."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str,
        *, context: int, max_batch: int = 64, max_logprobs: int = 50,
    ) -> None:  # fmt: skip
        config = model.config.get_text_config()
        self.text = Text(tokenizer, config.vocab_size)
        ends = text_ends(model, tokenizer)
        self.name, self.context, self.vocab_size = name, context, config.vocab_size
        self.max_logprobs, self.created = min(max_logprobs, config.vocab_size), int(time.time())
        self.engine = Engine(model, ends, self.text.pieces, context, max_batch)

    def card(self) -> dict[str, Any]:
        """The model's entry in /v1/models: OpenAI's fields, vLLM's `max_model_len` and Venice's `model_spec`."""
        spec = {
            "name": self.name,
            "availableContextTokens": self.context,
            "capabilities": {"supportsLogProbs": True},
            "maxLogprobs": self.max_logprobs,
        }
        return {
            "id": self.name, "object": "model", "created": self.created, "owned_by": "latentforge", "type": "text",
            "context_length": self.context, "max_model_len": self.context, "model_spec": spec,
        }  # fmt: skip

    def rows(self, body: Sampling, prompts: list[list[int]], top: int | None, default_max: int | None) -> list[Row]:
        """Rows of a request, the n completions of a prompt side by side. Raises Refused where it asks too much."""
        if body.model != self.name:
            raise Refused(
                404, f"the model {body.model!r} does not exist; this server has {self.name!r}", "model", "model_not_found"
            )
        for key, neutral in NOT_HERE.items():
            if (body.model_extra or {}).get(key) not in (None, neutral):
                raise Refused(400, f"{key} is not supported by this server", key)
        if len(prompts) * body.n > MAX_CHOICES:
            raise Refused(400, f"{len(prompts)} prompts with n = {body.n}: at most {MAX_CHOICES} completions a request", "n")
        if top is not None and top > self.max_logprobs:
            raise Refused(400, f"{top} logprobs asked for, at most {self.max_logprobs} are given (--max_logprobs)", "logprobs")
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if "" in stop:
            raise Refused(400, "a stop string must not be empty", "stop")
        score_prompt = getattr(body, "echo", False) and top is not None
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        rows: list[Row] = []
        for prompt in prompts:
            if not prompt:
                raise Refused(400, "a prompt must hold at least one token", "prompt")
            if not all(0 <= id < self.vocab_size for id in prompt):
                raise Refused(400, f"a token id is outside the vocabulary of {self.vocab_size}", "prompt")
            left = self.context - len(prompt)
            max_tokens = (left if default_max is None else default_max) if asked is None else asked
            if left < max_tokens or left < 0 or (max_tokens == 0 and not getattr(body, "echo", False)):
                raise Refused(
                    400, f"{len(prompt)} tokens of prompt and {max_tokens} to write: the model's context is {self.context}, "
                    "and without echo at least 1 must be written", "max_tokens", "context_length_exceeded",
                )  # fmt: skip
            for _ in range(body.n):
                seed = None if body.seed is None else (body.seed, len(rows))
                rows.append(
                    Row(
                        prompt, max_tokens, body.temperature, body.top_p, seed, top, score_prompt,
                        [text.encode() for text in stop],
                    )
                )  # fmt: skip
        return rows

    async def completed(self, rows: list[Row], request: Request) -> None:
        """Run the rows, or drop them when the client goes away."""
        done = asyncio.gather(*(asyncio.wrap_future(self.engine.submit(row)) for row in rows))
        while not done.done():
            await asyncio.wait({done}, timeout=1.0)
            if not done.done() and await request.is_disconnected():
                done.cancel()
                raise Refused(499, "the client went away")
        try:
            done.result()
        except Exception as error:
            raise Refused(500, f"generation failed: {error}", code="inference_failed") from error

    def _text(self, row: Row, echo: bool = False) -> str:
        """What a row wrote, cut before a stop string, after its prompt with `echo`; broken UTF-8 becomes U+FFFD."""
        written = self.text.joined(row.ids)
        cuts = [at for stop in row.stop if (at := written.find(stop)) >= 0]
        before = self.text.joined(row.prompt) if echo else b""
        return (before + written[: min(cuts, default=None)]).decode("utf-8", errors="replace")

    def _named(self, ids: list[int], logprobs: list[float]) -> dict[str, float]:
        """OpenAI's {string: logprob}, likeliest first; of two tokens with the same string the likelier stays."""
        out: dict[str, float] = {}
        for id, logprob in zip(ids, logprobs, strict=True):
            out.setdefault(self.text.strings[id], logprob)
        return out

    def completion(self, row: Row, index: int, echo: bool, with_ids: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": index,
            "text": self._text(row, echo),
            "logprobs": None,
            "finish_reason": row.finish_reason,
        }
        if with_ids:
            choice |= {"prompt_token_ids": row.prompt, "token_ids": row.ids}
        if row.top is None:
            return choice
        ids, logprobs, top_ids, top_logprobs = row.ids, row.logprobs, row.top_ids, row.top_logprobs
        if echo:
            of_prompt = row.prompt_scores
            ids, logprobs = row.prompt + ids, [None, *of_prompt[0], *logprobs]  # type: ignore[list-item]
            top_ids, top_logprobs = [None, *of_prompt[1], *top_ids], [None, *of_prompt[2], *top_logprobs]  # type: ignore[list-item]
        strings = self.text.strings
        tokens = [strings[i] for i in ids]
        lengths = [0 if i in self.text.special else len(strings[i]) for i in ids]  # the text has no special tokens
        offsets = np.cumsum([0, *lengths])[:-1].tolist()
        shown: dict[str, Any] = {"tokens": tokens, "token_logprobs": logprobs, "text_offset": offsets}
        if with_ids:
            shown |= {"token_ids": ids, "top_token_ids": top_ids, "top_token_logprobs": top_logprobs}
        else:
            pairs = zip(top_ids, top_logprobs, strict=True)
            shown["top_logprobs"] = [None if best is None else self._named(best, values) for best, values in pairs]
        choice["logprobs"] = shown
        return choice

    def answer(self, row: Row, index: int, with_ids: bool) -> dict[str, Any]:
        """A choice of a chat completion."""

        def entry(id: int, logprob: float) -> dict[str, Any]:
            shown = {"token": self.text.strings[id], "logprob": logprob, "bytes": list(self.text.pieces[id])}
            return {**shown, "id": id} if with_ids else shown

        choice: dict[str, Any] = {
            "index": index,
            "message": {"role": "assistant", "content": self._text(row)},
            "logprobs": None,
            "finish_reason": row.finish_reason,
        }
        if with_ids:
            choice["token_ids"] = row.ids
        if row.top is not None:
            choice["logprobs"] = {
                "content": [
                    {**entry(id, logprob), "top_logprobs": [*map(entry, best, values)]}
                    for id, logprob, best, values in zip(row.ids, row.logprobs, row.top_ids, row.top_logprobs, strict=True)
                ]
            }
        return choice


def text_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids after which a text is over: the model's and the tokenizer's ends, and the begin of another text."""
    named = [model.generation_config.eos_token_id, model.generation_config.bos_token_id] if model.generation_config else []
    named += [tokenizer.eos_token_id, tokenizer.bos_token_id]
    return frozenset(i for ids in named if ids is not None for i in (ids if isinstance(ids, list) else [ids]))


def json_answer(content: dict[str, Any], status: int = 200) -> Response:
    return Response(json.dumps(content, separators=(",", ":")), status, media_type="application/json")


def error_answer(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return json_answer({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def make_app(teacher: Teacher) -> FastAPI:
    """The server as an ASGI application; its end closes the teacher's engine."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(teacher.engine.close)

    app = FastAPI(title="LatentForge teacher", lifespan=lifespan)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return error_answer(error.status, str(error), error.param, error.code)

    @app.exception_handler(HTTPException)
    async def unknown_path(_: Request, error: HTTPException) -> Response:
        return error_answer(error.status_code, error.detail)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"] if part != "body")
        status = 400 if first["type"] == "json_invalid" else 422
        return error_answer(status, f"{place or 'body'}: {first['msg']}", place or None)

    @app.get("/health")
    async def health() -> Response:
        return json_answer({"status": "ok", "model": teacher.name})

    @app.get("/v1/models")
    async def models() -> Response:
        return json_answer({"object": "list", "data": [teacher.card()]})

    async def reply(
        request: Request, body: Sampling, rows: list[Row], kind: str, choice: Callable[[Row, int], dict[str, Any]]
    ) -> Response:
        """Run the rows and answer with a choice for each."""
        await teacher.completed(rows, request)

        def answer() -> Response:
            read, written = sum(len(row.prompt) for row in rows[:: body.n]), sum(len(row.ids) for row in rows)
            return json_answer(
                {
                    "id": f"cmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": teacher.name,
                    "choices": [choice(row, i) for i, row in enumerate(rows)],
                    "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
                }
            )  # fmt: skip

        return await asyncio.to_thread(answer)  # thousands of scored tokens are megabytes of JSON

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if not prompts:
            raise Refused(400, "prompt: expected a text, texts, token ids or lists of token ids, got an empty list", "prompt")
        if isinstance(prompts[0], int):
            prompts = [prompts]  # type: ignore[list-item]
        ids = [teacher.text.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]  # type: ignore[arg-type]
        top = body.top_logprobs if body.logprobs is None else body.logprobs
        rows = teacher.rows(body, ids, top, default_max=16)
        return await reply(
            request, body, rows, "text_completion",
            lambda row, i: teacher.completion(row, i, body.echo, body.return_token_ids),
        )  # fmt: skip

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        if body.top_logprobs is not None and not body.logprobs:
            raise Refused(400, "top_logprobs needs logprobs: true", "top_logprobs")
        prompt = teacher.text.encode_chat(body.messages)
        rows = teacher.rows(body, [prompt], (body.top_logprobs or 0) if body.logprobs else None, default_max=None)
        return await reply(request, body, rows, "chat.completion", lambda row, i: teacher.answer(row, i, body.return_token_ids))

    return app


# ----------------------------------------------------------------------------------------------------- program
@dataclass
class ServeConfig:
    """The server's settings."""

    model: str | None = opt(None, "a causal language model: a folder or a name on the Hugging Face hub")
    served_model_name: str | None = opt(None, "what clients call it; unset: the folder's name, or the hub name")
    host: str = opt("127.0.0.1", "address to listen on; there is no password, so leave it on this machine or a trusted network")
    port: int = opt(8001, "port to listen on; 0: any free one", low=0, high=65535)
    device: str = opt("auto", "cpu, cuda, cuda:N or auto")
    dtype: str = opt("auto", "of the weights; auto: as they are stored", choices=("auto", "float32", "bfloat16", "float16"))
    max_batch: int = opt(64, "completions that run together", low=1)
    max_model_len: int | None = opt(None, "longest prompt and completion together, tokens; unset: the model's", low=2)
    max_logprobs: int = opt(50, "most top_logprobs a request may ask for", low=0)


def load_teacher(cfg: ServeConfig) -> Teacher:
    """The model and tokenizer behind an engine. Raises UserError for what cannot be loaded or served."""
    if cfg.model is None:
        raise UserError("--model is missing: a folder or hub name of a transformers causal language model")
    device = pick_device(cfg.device)
    try:
        # safetensors alone, and none of the model's own code: neither pickles nor programs of strangers run here
        tokenizer = AutoTokenizer.from_pretrained(cfg.model, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            cfg.model, dtype=cfg.dtype, use_safetensors=True, trust_remote_code=False
        ).to(device)  # type: ignore[arg-type]
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"--model {cfg.model} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if not tokenizer.is_fast:
        raise UserError(f"--model {cfg.model}: its tokenizer has no fast version (tokenizer.json), which this server needs")
    config = model.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if other or getattr(model, "_is_stateful", False):
        what = ", ".join(sorted(other)) or "a recurrent state"
        raise UserError(f"--model {cfg.model} has {what}: only models with plain attention caches can be batched here")
    context = cfg.max_model_len or getattr(config, "max_position_embeddings", None)
    if context is None:
        raise UserError(f"--model {cfg.model} does not say how long its context is: give --max_model_len")
    path = Path(cfg.model)
    name = cfg.served_model_name or (path.resolve().name if path.is_dir() else cfg.model)
    return Teacher(model, tokenizer, name, context=context, max_batch=cfg.max_batch, max_logprobs=cfg.max_logprobs)


def main() -> None:
    cfg = parse_config(ServeConfig, __doc__)
    tune_process()
    try:
        listener = socket.create_server((cfg.host, cfg.port))
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {cfg.host} port {cfg.port}: {error}. Choose another --port or --host") from None
    teacher = load_teacher(cfg)
    parameters = sum(p.numel() for p in teacher.engine.model.parameters())
    if teacher.engine.model.device.type == "cpu" and parameters < ONE_THREAD:
        torch.set_num_threads(1)
    address = f"http://{cfg.host}:{listener.getsockname()[1]}/v1"
    print(
        f"{teacher.name} ({parameters:,} parameters, context {teacher.context}, {teacher.engine.model.device}) at {address}",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    app = make_app(teacher)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10))
    server.run(sockets=[listener])


if __name__ == "__main__":
    run_cli(main)
