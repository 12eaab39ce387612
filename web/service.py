"""One model being served: turns requests into jobs, follows them, and writes their answers."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ae.tokenizer_adapter import TokenizerAdapter, Utf8Stream
from configs.errors import UserError
from configs.schema import ServeConfig
from student.batching import Batcher, Busy, Closing, Event, Expired, Finished, Job
from student.sampler import Chunk, SamplingParams
from student.scoring import Scores
from web.protocol import ChatRequest, CompletionRequest, OpenAIRequest, Refused, Sampling

LONG_TEXT = 4096  # characters, of all of a request's prompts, beyond which they are encoded off the event loop
IDLE_SECONDS = 10.0  # after which a stream says that it is alive
DIGITS = 6  # of a log probability


def refusal(error: Exception) -> Refused:
    """What a client is told of an error while its rows ran."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(429, str(error), code="queue_full", retry_after=error.retry_after)
    if isinstance(error, Closing):
        return Refused(503, str(error), code="closing")
    if isinstance(error, Expired):
        return Refused(504, str(error), code="timeout")
    return Refused(500, f"the model failed on this request ({type(error).__name__}); the log has more", code="inference_failed")


class Ask:
    """The rows of one request, and their events as an async iterator on the asker's event loop."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs, self.texts = list(jobs), [""] * len(jobs)
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[tuple[Job, Event]]()
        for i, job in enumerate(self.jobs):
            job.index, job.emit = i, self._emit

    def _emit(self, job: Job, event: Event) -> None:
        """In the batcher's thread."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, (job, event))

    async def events(self) -> AsyncIterator[tuple[Job, Chunk | Finished] | None]:
        """Each row's chunks and end, as they come; None after some idle seconds. Raises what ended a row."""
        left = len(self.jobs)
        while left:
            try:
                job, event = await asyncio.wait_for(self._events.get(), IDLE_SECONDS)
            except asyncio.TimeoutError:
                if all(job.cancelled for job in self.jobs):
                    return  # before Python 3.12 wait_for may swallow the cancelling of who asks, and no event comes any more
                yield None
                continue
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Chunk):
                self.texts[job.index] += event.text
            left -= isinstance(event, Finished)
            yield job, event

    def cancel(self) -> None:
        for job in self.jobs:
            job.cancel()

    @property
    def usage(self) -> dict[str, int]:
        """A prompt is counted once, however many rows continue it."""
        read = sum(len(prompt) for prompt in {id(job.prompt): job.prompt for job in self.jobs}.values())
        written = sum(len(job.token_ids) for job in self.jobs)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


class Service:
    """The model's text side, and the limits that requests are held to."""

    def __init__(self, batcher: Batcher, cfg: ServeConfig, name: str) -> None:
        self.batcher, self.cfg, self.name = batcher, cfg, name
        self.tokenizer: TokenizerAdapter = batcher.sampler.tokenizer
        self.k, self.context, self.created = batcher.sampler.cfg.k, batcher.sampler.room(0), int(time.time())

    # --------------------------------------------------------------------------------------------- requests
    async def prompts(self, prompt: Any) -> list[list[int]]:
        """The ids of a prompt in any of its forms: text, ids, or a list of either. Raises Refused for what is surely too long.

        An empty text is the end of the text before.
        """
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            prompt = [prompt]
        if len(prompt) > self.cfg.max_choices:
            raise Refused(400, f"{len(prompt)} prompts: at most {self.cfg.max_choices} a request", "prompt")
        lengths = [len(one) for one in prompt if isinstance(one, str)]
        self._hold(max(lengths, default=0), "prompt")

        def encoded() -> list[list[int]]:
            encode, end = self.tokenizer.encode, self.tokenizer.eot_id  # a list for each: `Ask.usage` tells prompts apart by it
            return [(encode(one) or [end]) if isinstance(one, str) else list(one) for one in prompt]

        try:
            return await asyncio.to_thread(encoded) if sum(lengths) > LONG_TEXT else encoded()
        except UserError as error:
            raise Refused(400, str(error), "prompt") from None

    def _hold(self, characters: int, field: str) -> None:
        """Raises Refused for a text that is surely too long, before it is encoded."""
        if characters > self.context * max(1, int(self.tokenizer.byte_lengths.max())):
            raise Refused(
                400, f"{field}: {characters} characters; the context of {self.context} tokens holds less", field,
                "context_length_exceeded",
            )  # fmt: skip

    def check_name(self, model: str) -> None:
        """Raises Refused for a model that is not served here."""
        if model != self.name:
            message = f"the model {model!r} does not exist; this server has {self.name!r}"
            raise Refused(404, message, "model", "model_not_found")

    def encode_chat(self, body: ChatRequest) -> list[int]:
        """Ids of a chat up to where the assistant answers."""
        if not self.tokenizer.has_chat_template:
            raise Refused(400, "this model's tokenizer has no chat template: use /v1/completions", "messages")
        chat = [message.plain() for message in body.messages]
        self._hold(sum(len(message["content"]) for message in chat), "messages")
        try:
            return self.tokenizer.encode_chat(chat, add_generation_prompt=True)
        except UserError as error:
            raise Refused(400, str(error), "messages") from None

    def ask(
        self, body: Sampling, prompts: Sequence[list[int]], new: int | None,
        *, n: int = 1, top: int | None = None, echo: bool = False,
    ) -> Ask:  # fmt: skip
        """Hand the rows of a request to the batcher, a prompt's n side by side. Raises Refused where it asks too much.

        new: tokens to write; None: as many as there is room for. Nothing is taken while the step is being compiled: the
        batcher's thread, which holds rows to their deadlines, is busy with it.
        """
        if not self.batcher.ready.is_set() and not self.batcher.closing:
            raise Refused(503, "the model is starting", code="starting", retry_after=5)
        if isinstance(body, OpenAIRequest) and body.model is not None:
            self.check_name(body.model)
        if len(prompts) * n > (most := min(self.cfg.max_choices, self.cfg.max_queue)):
            raise Refused(400, f"{len(prompts)} prompts with n = {n}: at most {most} completions a request", "n")
        if top is not None and top > self.cfg.max_logprobs:
            raise Refused(400, f"{top} logprobs asked for, at most {self.cfg.max_logprobs} are given", body.field("logprobs"))
        seed = secrets.randbits(48) if body.seed is None else body.seed
        deadline = time.monotonic() + self.cfg.timeout_s
        jobs: list[Job] = []
        for prompt in prompts:
            params = self._params(body, prompt, new, seed)
            for _ in range(n):
                own = params.for_row(len(jobs)) if params else None
                jobs.append(Job(prompt, own, lambda *_: None, top, echo and top is not None, deadline))
        ask = Ask(jobs)
        try:
            self.batcher.submit(jobs)
        except (Busy, Closing) as error:
            raise refusal(error) from None
        return ask

    def _params(self, body: Sampling, prompt: list[int], new: int | None, seed: int) -> SamplingParams | None:
        """A row's parameters, or None where nothing is to be written. Raises Refused for what does not fit."""
        sampler, table = self.batcher.sampler, self.batcher.sampler.cfg.vocab_size
        if not all(id < table for id in prompt):
            raise Refused(400, f"a token id is outside the vocabulary of {table}", body.field("prompt"))
        if new is None:
            new = min(self.cfg.max_new_tokens, max(1, self.context - -(-len(prompt) // self.k) * self.k))
        if new > self.cfg.max_new_tokens:
            most = self.cfg.max_new_tokens
            raise Refused(400, f"{new} tokens asked for, at most {most} are written", body.field("max_tokens"))
        try:
            sampler.check(prompt, new)
            return body.params(new, seed) if new else None
        except UserError as error:
            message = str(error).replace(" (infer.py --truncate_prompt)", "")
            raise Refused(400, message, body.field("prompt"), "context_length_exceeded" if prompt else None) from None

    # ---------------------------------------------------------------------------------------------- answers
    def generated(self, ask: Ask) -> dict[str, Any]:
        """What /generate says of a finished row, less its text."""
        job = ask.jobs[0]
        writing = max(1e-9, job.last_chunk - job.joined)
        timing = {
            "queued_s": job.taken - job.submitted, "first_chunk_s": job.first_chunk - job.submitted,
            "total_s": job.last_chunk - job.submitted, "tokens_per_s": len(job.token_ids) / writing,
        }  # fmt: skip
        return {
            "usage": ask.usage, "latent_steps": job.latent_steps, "finish_reason": job.finish_reason,
            "timing": {key: round(value, 4) for key, value in timing.items()},
        }  # fmt: skip

    def _shown(self, job: Job, text: str) -> tuple[list[int], list[str], list[int]]:
        """Ids, strings and text offsets of the tokens that were scored, but for those that a stop string cut away."""
        ids = [*job.prompt, *job.written] if job.score_prompt else job.written
        stream, of_prompt, at, prompt_end = Utf8Stream(self.tokenizer), len(job.prompt) if job.score_prompt else 0, 0, 0
        strings: list[str] = []
        offsets: list[int] = []
        for i, id in enumerate(ids):
            if i == of_prompt:
                at += len(stream.flush())
                prompt_end = at
            if i >= of_prompt and at - prompt_end >= len(text) and job.cut:
                return ids[:i], strings, offsets
            strings.append(self.tokenizer.token_bytes(id).decode("utf-8", errors="replace"))
            offsets.append(at)
            at += len(stream.push([id]))
        return ids, strings, offsets

    def completion_logprobs(self, job: Job, scores: Scores | None, text: str) -> dict[str, Any] | None:
        if scores is None:
            return None
        ids, strings, offsets = self._shown(job, text)
        own: list[float | None] = [round(x, DIGITS) for x in scores.logprobs[: len(ids)]]
        tops: list[dict[str, float] | None] = [
            self._named(*pair) for pair in zip(scores.top_ids[: len(ids)], scores.top_logprobs[: len(ids)], strict=True)
        ]
        if job.score_prompt and ids:  # nothing stands before the first token
            own[0], tops[0] = None, None
        return {"tokens": strings, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}

    def _named(self, ids: list[int], logprobs: list[float]) -> dict[str, float]:
        """OpenAI's {string: logprob}, likeliest first; of two tokens with the same string the likelier stays."""
        out: dict[str, float] = {}
        for id, logprob in zip(ids, logprobs, strict=True):
            out.setdefault(self.tokenizer.token_bytes(id).decode("utf-8", errors="replace"), round(logprob, DIGITS))
        return out

    def chat_logprobs(self, job: Job, scores: Scores | None, text: str) -> dict[str, Any] | None:
        if scores is None:
            return None

        def entry(id: int, logprob: float) -> dict[str, Any]:
            piece = self.tokenizer.token_bytes(id)
            return {"token": piece.decode("utf-8", errors="replace"), "logprob": round(logprob, DIGITS), "bytes": list(piece)}

        rows = zip(self._shown(job, text)[0], scores.logprobs, scores.top_ids, scores.top_logprobs, strict=False)
        return {"content": [{**entry(id, own), "top_logprobs": [*map(entry, ids, tops)]} for id, own, ids, tops in rows]}

    def echoed(self, job: Job, body: Sampling) -> str:
        """The prompt's text where it was asked for."""
        wanted = isinstance(body, CompletionRequest) and body.echo
        return self.tokenizer.decode(job.prompt) if wanted else ""

    def choice(self, job: Job, text: str, scores: Scores | None, body: Sampling) -> dict[str, Any]:
        """A finished row as a choice of a completion or a chat."""
        ending = {"index": job.index, "finish_reason": job.finish_reason or "length"}
        if isinstance(body, ChatRequest):
            message = {"role": "assistant", "content": text}
            return {**ending, "message": message, "logprobs": self.chat_logprobs(job, scores, text)}
        return {**ending, "text": self.echoed(job, body) + text, "logprobs": self.completion_logprobs(job, scores, text)}

    def part(self, job: Job, text: str, body: Sampling, first: bool) -> dict[str, Any]:
        """A chunk of a row as a choice of a streamed answer."""
        base = {"index": job.index, "logprobs": None, "finish_reason": None}
        if isinstance(body, ChatRequest):
            return {**base, "delta": {**({"role": "assistant"} if first else {}), "content": text}}
        return {**base, "text": (self.echoed(job, body) if first else "") + text}

    def last_part(self, job: Job, text: str, scores: Scores | None, body: Sampling) -> dict[str, Any]:
        """The end of a row: its reason, and the logprobs of all its tokens where they were asked for."""
        choice = self.choice(job, text, scores, body)
        if isinstance(body, ChatRequest):
            del choice["message"]
            return {**choice, "delta": {}}
        return {**choice, "text": ""}
