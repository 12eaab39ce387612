"""What every request passes before it is read: an id, the bearer key, limits of size and time, and a line in the log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from web.metrics import Metrics

log = logging.getLogger("latentforge.server")
OPEN_PATHS = frozenset({"/", "/health", "/ready", "/openapi.json"})  # without a key
POLLED = frozenset({"/health", "/ready", "/metrics"})
BODY_SECONDS = 30.0  # that a client may take to send its body


def dumped(content: Mapping[str, Any]) -> str:
    """ASCII JSON, so that no text can break it."""
    return json.dumps(content, separators=(",", ":"), allow_nan=False)


def json_answer(content: Mapping[str, Any] | str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """content: what is to be dumped, or was."""
    text = content if isinstance(content, str) else dumped(content)
    return Response(text, status, headers=dict(headers or {}), media_type="application/json")


def error_content(
    status: int, message: str, request_id: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    content = {"message": message, "type": kind, "param": param, "code": code, "request_id": request_id}
    return {"error": content}


def request_id(request: Request) -> str:
    return request.scope.get("request_id", "")


class Guard:
    """ASGI middleware; the key, where there is one, is compared in constant time."""

    def __init__(self, app: ASGIApp, *, key: str | None, max_body: int, metrics: Metrics) -> None:
        self.app, self.key, self.max_body, self.metrics = app, key, max_body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, name = time.monotonic(), f"req-{uuid.uuid4().hex}"
        scope["request_id"] = name
        status, started = 499, False  # 499 stays where the client goes before an answer

        async def answer(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        try:
            if (refused := self._refused(scope, name)) is not None:
                await refused(scope, receive, answer)
            else:
                await self.app(scope, self._limited(receive), answer)
        except Exception as error:  # here, as Starlette's handler for the rest would answer outside of this middleware
            if started:
                raise
            log.error("%s failed: %s", name, type(error).__name__, exc_info=error)
            message = f"the server failed on this request; the log has more under {name}"
            await json_answer(error_content(500, message, name), 500)(scope, receive, answer)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            level = logging.DEBUG if path in POLLED and status == 200 else logging.INFO
            log.log(level, "%s %s %s %d %.0f ms", name, scope["method"], path, status, (time.monotonic() - start) * 1000)

    def _refused(self, scope: Scope, name: str) -> Response | None:
        """The answer to a request that needs no look at its body."""
        headers = Headers(scope=scope)
        if self.key is not None and scope["path"] not in OPEN_PATHS:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip(" \t").encode("latin-1"), self.key.encode()):
                message = "a bearer key is needed: Authorization: Bearer KEY"
                content = error_content(401, message, name, code="invalid_api_key")
                return json_answer(content, 401, {"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:18]) > self.max_body:
            return json_answer(error_content(413, self._too_large, name), 413, {"Connection": "close"})
        return None

    @property
    def _too_large(self) -> str:
        return f"the body is larger than {self.max_body} bytes"

    def _limited(self, receive: Receive) -> Receive:
        """receive, while the body comes, with its limits."""
        size, deadline, complete = 0, time.monotonic() + BODY_SECONDS, False

        async def limited() -> Message:
            nonlocal size, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                raise HTTPException(408, f"the body did not come within {BODY_SECONDS:.0f} s") from None
            if message["type"] == "http.disconnect":
                raise HTTPException(499, "the client went away")
            size += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if size > self.max_body:
                raise HTTPException(413, self._too_large)
            return message

        return limited
