"""Following an ask to its end: all at once, or as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.types import Receive, Scope, Send

from student.batching import Finished, Job
from student.scoring import Scores
from web.guard import dumped, error_content, log
from web.protocol import OpenAIRequest, Refused
from web.service import Ask, Service, refusal

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
DONE = format_sse_event(data_str="[DONE]")


class Events(EventSourceResponse):
    """A stream of server-sent events that gives its rows up when it ends, however it ends.

    patience: seconds after which it is broken off, for a client that keeps the connection and reads no more.
    """

    def __init__(self, ask: Ask, content: AsyncIterator[bytes], patience: float) -> None:
        super().__init__(content, headers=HEADERS)
        self.ask, self.patience = ask, patience

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asyncio.wait_for(super().__call__(scope, receive, send), self.patience)
        except asyncio.TimeoutError:
            log.info("a stream was broken off: its client had not read it after %.0f s", self.patience)
        finally:
            self.ask.cancel()


async def collect(request: Request, ask: Ask) -> list[Scores | None]:
    """Each row's scores once all are finished; the rows are given up as soon as the client goes away."""
    scores: list[Scores | None] = [None] * len(ask.jobs)

    async def follow() -> None:
        async for item in ask.events():
            if item and isinstance(item[1], Finished):
                scores[item[0].index] = item[1].scores

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    following, going = asyncio.ensure_future(follow()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([following, going], return_when=asyncio.FIRST_COMPLETED)
        if not following.done():
            raise Refused(499, "the client went away")
        following.result()
    except Exception as error:
        raise refusal(error) from None
    finally:
        ask.cancel()
        following.cancel()
        going.cancel()
    return scores


def event(content: Mapping[str, Any], name: str | None = None) -> bytes:
    return format_sse_event(data_str=dumped(content), event=name)


def failure(error: Exception, request_id: str) -> bytes:
    """An error where the status line is already sent."""
    told = refusal(error)
    log.info("%s ended in its stream: %s", request_id, told)
    return event(error_content(told.status, str(told), request_id, told.param, told.code), "error")


async def generate_events(service: Service, ask: Ask, request_id: str) -> AsyncIterator[bytes]:
    """/generate's stream: a `chunk` for each latent step, then `done` with what is known of the whole; or `error`."""
    try:
        async for item in ask.events():
            if item is None:
                yield KEEPALIVE_COMMENT
            elif isinstance(item[1], Finished):
                yield event(service.generated(ask), "done")
            else:
                chunk = item[1]
                yield event({"text": chunk.text, "token_ids": chunk.token_ids, "finish_reason": chunk.finish_reason}, "chunk")
    except Exception as error:
        yield failure(error, request_id)


async def openai_events(
    service: Service, ask: Ask, body: OpenAIRequest, head: Mapping[str, Any], request_id: str
) -> AsyncIterator[bytes]:
    """OpenAI's stream: a part for each chunk, one with the reason at each row's end, the usage if asked for, [DONE]."""
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    extra = {"usage": None} if with_usage else {}
    begun: set[int] = set()
    try:
        async for item in ask.events():
            if item is None:
                yield KEEPALIVE_COMMENT
                continue
            job, what = item
            if job.index not in begun or not isinstance(what, Finished):
                text = "" if isinstance(what, Finished) else what.text
                yield event({**head, **extra, "choices": [service.part(job, text, body, job.index not in begun)]})
                begun.add(job.index)
            if isinstance(what, Finished):

                def ending(job: Job = job, scores: Scores | None = what.scores) -> bytes:
                    choice = service.last_part(job, ask.texts[job.index], scores, body)
                    return event({**head, **extra, "choices": [choice]})

                # thousands of scores are megabytes of JSON, for which nobody else should have to wait
                yield await asyncio.to_thread(ending) if what.scores else ending()
        if with_usage:
            yield event({**head, "choices": [], "usage": ask.usage})
        yield DONE
    except Exception as error:
        yield failure(error, request_id)
