"""One asynchronous client for every OpenAI-like server: Venice, OpenAI, vLLM, SGLang, llama.cpp, Ollama and our own.

What it holds to:

- RPM and TPM as given, corrected from the server's headers; Retry-After; both reset headers (`x-ratelimit-reset-requests`
  is a UNIX timestamp on Venice, `-tokens` seconds, and OpenAI writes "6m0s").
- 408, 429, 5xx, timeouts, lost connections and broken bodies are tried again after a random part of a doubling delay (full
  jitter). 400, 413, 415 and 422 cost one prompt, which is `Dropped`; 401, 402, 403, 404, redirects and a 429 for want of
  money end the run (`Stopped`), and so do a budget used up, an answer of another model, and 20 prompts dropped in a row.
- The budget counts what was sent and brought nothing, too (a timeout, a broken body): the teacher may have written, and
  charged for, all that was asked for. Only what did not leave this machine or got an error status is taken to cost nothing.
- A breaker: 9 failures within 30 s pause everything until 30 s after the last one. Venice blocks a key at more than 20
  in 30 s; with its at most 10 requests in flight there, 19 is the most that can happen.
- The API key is in one header and nowhere else: not in a repr, a message, a request body or an answer that is kept.

tenacity and aiolimiter are not used: the wait depends on the server's headers and is shared by all workers, and the
limits change while the client runs; both come to less code here than as plug-ins there.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from configs.errors import UserError
from kd.limits import LONGEST_WAIT_S, Gate, Patience, retry_after_s
from kd.records import Misaligned, choices_of, wire_top
from kd.settings import Settings
from kd.store import canonical

VENICE_IN_FLIGHT = 10  # requests at once there: with the breaker's 9, fewer than 20 failures in 30 s
DROPPED_IN_A_ROW = 20  # prompts dropped with no answer between: something is wrong with all of them
BYTES_PER_TOKEN, TOKENS_PER_MESSAGE = 4, 4  # an estimate, where no count is known
MOST_PER_MESSAGE = 64  # tokens that a chat template adds to a message, a system prompt of its own included
SECRET = 12  # characters from which a key is told from words like "none" or "ollama"
TRY_AGAIN = {408, 409, 425, 429}  # and 5xx
COSTS_ONE_PROMPT = {400, 413, 415, 422}
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)
GET_ATTEMPTS = 3
LARGEST_NUMBER = 1e9  # of tokens in an answer, or of dollars: more is a mistake, and sums would overflow a store's integers
STEPS_DOWN = (20, 10, 5, 1)  # top_logprobs to try
ADVICE = {
    401: "check VENICE_API_KEY",
    402: "the balance or the spend limit is used up; top it up",
    403: "the key may not use this model",
    404: "check VENICE_BASE_URL (it ends in /v1) and the model's name",
    410: "the model is retired; choose another",
}


class Dropped(Exception):
    """This request will not be answered; the others may. `reason` is short, for counting."""

    def __init__(self, reason: str, detail: str = "", status: int | None = None) -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.status = reason, status


class Stopped(UserError):
    """No further request makes sense. What was answered before is kept. `status`: the HTTP status that says so."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Interrupted(Stopped):
    """The user asked to stop."""


# ------------------------------------------------------------------------------------------------ what comes back
@dataclass(frozen=True)
class ModelInfo:
    """A model as the server lists it; prices in dollars per million tokens, None: not said."""

    name: str
    context: int | None = None
    max_output: int | None = None
    logprobs: bool | None = None
    input_usd: float | None = None
    output_usd: float | None = None
    note: str = ""

    @classmethod
    def parse(cls, row: Mapping[str, Any]) -> ModelInfo:
        """From a row of GET /models: OpenAI's, vLLM's (`max_model_len`) or Venice's (`model_spec`)."""
        spec = _dict(row.get("model_spec"))
        prices = [_dict(_dict(spec.get("pricing")).get(way)).get("usd") for way in ("input", "output")]
        retired = _dict(spec.get("deprecation")).get("date")
        return cls(
            name=str(row.get("id")),
            context=row.get("context_length") or spec.get("availableContextTokens") or row.get("max_model_len"),
            max_output=spec.get("maxCompletionTokens"),
            logprobs=_dict(spec.get("capabilities")).get("supportsLogProbs"),
            input_usd=_number(prices[0]),
            output_usd=_number(prices[1]),
            note="offline" if spec.get("offline") else f"retires on {retired}" if retired else "",
        )

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Dollars; None where the price is not known."""
        if self.input_usd is None or self.output_usd is None:
            return None
        return (prompt_tokens * self.input_usd + completion_tokens * self.output_usd) / 1e6


@dataclass(frozen=True)
class Answer:
    """A good answer: `raw` as received (JSON), tokens as counted by the server, cost in dollars."""

    raw: bytes
    body: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int
    cost: float
    seconds: float


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    """A count or a price as a server tells it; None for what cannot be one: NaN, less than nothing, no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= LARGEST_NUMBER else None


def same_model(asked: str, told: str) -> bool:
    """Whether an answer comes from the model asked for: the same name, or a dated snapshot of it (gpt-4o-2024-08-06)."""
    return told == asked or re.fullmatch(re.escape(asked) + r"-\d{4}(-?\d{2}){0,2}", told) is not None


def request_tokens(body: Mapping[str, Any], most: bool = False) -> tuple[int, int]:
    """(prompt tokens, an estimate unless the prompt is ids; most tokens that may be written).

    most: as many prompt tokens as it can be, which is one a byte (of digits and rare scripts, say).
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        n_prompt = len(prompt)
    else:
        texts = [prompt] if isinstance(prompt, str) else [str(m.get("content")) for m in body.get("messages", [])]
        width, more = (1, MOST_PER_MESSAGE) if most else (BYTES_PER_TOKEN, TOKENS_PER_MESSAGE)
        n_prompt = sum(len(text.encode("utf-8", "replace")) // width + more for text in texts)
    return n_prompt, int(body.get("max_completion_tokens") or body.get("max_tokens") or 0)


# ----------------------------------------------------------------------------------------------------------- client
class TeacherClient:
    """Use it in `async with`. `errors` counts what was tried again, `spent` the dollars (start it at what a store holds).

    `on_lost` is told the dollars that a request without an answer to keep may have cost; `spent` has them already.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        concurrency: int = 8,
        rpm: float | None = None,
        tpm: float | None = None,
        budget_usd: float | None = None,
        allow_other_model: bool = False,
        patience: Patience | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.settings, self.patience, self.allow_other_model = settings, patience or Patience(), allow_other_model
        self.concurrency = min(concurrency, VENICE_IN_FLIGHT) if settings.is_venice else concurrency
        self.gate = Gate(rpm, tpm, self.patience)
        self.budget_usd, self.spent, self._reserved = budget_usd, 0.0, 0.0
        self.model = ModelInfo(settings.model)  # with its price once `models` was asked
        self.listed: set[str] = set()  # the models' names, once `models` was asked
        self.errors: Counter[str] = Counter()
        self.on_lost: Callable[[float], None] = lambda dollars: None
        self.headers: httpx.Headers = httpx.Headers()  # of the last response
        self.stopped: Exception | None = None
        self._stop = asyncio.Event()
        key = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        try:
            self._http = httpx.AsyncClient(
                headers={"Content-Type": "application/json", **key},
                timeout=httpx.Timeout(self.patience.timeout_s, connect=min(10.0, self.patience.timeout_s), pool=None),
                limits=httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
                trust_env=not settings.is_local,  # no proxy on the way to this machine
                transport=transport,
            )
        except (ImportError, ValueError, httpx.InvalidURL):  # their texts may quote a password
            wanted = "expected http://host:port (socks5:// needs `pip install httpx[socks]`)"
            raise UserError(f"the proxy in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY cannot be used: {wanted}") from None

    def __repr__(self) -> str:
        return f"TeacherClient({self.settings!r})"

    @property
    def dollars(self) -> str:
        """`spent`, for people: of a server that tells neither prices nor costs nothing is known, which is not nothing."""
        return f"${self.spent:.4f}" if self.spent or self.model.cost(0, 0) is not None else "price not known"

    async def __aenter__(self) -> TeacherClient:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    def stop(self, reason: Exception) -> None:
        """Send nothing more. What is in flight is paid for: it is waited for and handled."""
        if self.stopped is None:
            self.stopped = reason
            self._stop.set()

    async def models(self) -> list[ModelInfo]:
        """The models that the server lists, [] where it has no such path; `self.model` becomes the one asked for, if listed."""
        try:
            body = await self.get("/models?type=text" if self.settings.is_venice else "/models")
        except Stopped as error:
            if error.status != 404:
                raise
            return []
        rows = body["data"] if isinstance(body.get("data"), list) else []
        found = [ModelInfo.parse(row) for row in rows if isinstance(row, dict)]
        self.model = next((model for model in found if model.name == self.settings.model), self.model)
        self.listed = {model.name for model in found}
        return found

    async def get(self, path: str) -> dict[str, Any]:
        """A JSON object from another path of the server. Raises Stopped."""
        try:
            return await self._exchange("GET", path, {}, lambda response: _json(response.content), GET_ATTEMPTS)
        except Dropped as error:
            url = self.settings.base_url
            raise Stopped(f"{url}{path}: {error}. Check VENICE_BASE_URL, and that the server runs", error.status) from None

    async def ask(self, body: Mapping[str, Any]) -> Answer:
        """One completion: a body with `messages` goes to /chat/completions, one with `prompt` to /completions.

        Raises Dropped or Stopped.
        """
        path = "/chat/completions" if "messages" in body else "/completions"
        start = time.monotonic()
        return await self._exchange("POST", path, body, lambda response: self._read(body, response, start))

    async def probe(self, body: Mapping[str, Any], wanted: int = STEPS_DOWN[0]) -> tuple[Answer, dict[str, Any], int | None]:
        """One real call that asks for `wanted` top logprobs, for fewer where that is refused, at last (or for 0) for none.

        Returns the answer, the fields that were added to the body, and how many top logprobs came: None for no logprobs.
        """
        for k in [wanted, *(step for step in STEPS_DOWN if step < wanted)] if wanted else []:
            try:
                fields = logprob_fields(body, k)
                answer = await self.ask({**body, **fields})
            except Dropped as error:
                if error.status not in (400, 422):
                    raise
                continue
            except Stopped as error:
                if error.status != 403:  # OpenAI's, of models that are not to tell logprobs; else the plain call gets it, too
                    raise
                break
            return answer, fields, wire_top(answer.body)
        return await self.ask(body), {}, None

    async def run(
        self, jobs: Iterable[tuple[Any, Mapping[str, Any]]], handle: Callable[[Any, Answer | Dropped], Awaitable[None]]
    ) -> None:
        """Ask for every (job, body) with `concurrency` workers; `handle` gets (job, outcome), in the order they come.

        The workers draw from one iterator, so nothing queues up. Raises what stopped it early, once all in flight is done.
        """
        queue, in_a_row = iter(jobs), 0

        async def work() -> None:
            nonlocal in_a_row
            try:
                for job, body in queue:
                    if self.stopped is not None:
                        return
                    outcome: Answer | Dropped
                    try:
                        outcome = await self.ask(body)
                        in_a_row = 0
                    except Dropped as error:
                        outcome, in_a_row = error, in_a_row + 1
                    await handle(job, outcome)
                    if in_a_row >= DROPPED_IN_A_ROW:
                        raise Stopped(f"{in_a_row} requests in a row got no answer; the last: {outcome}")
            except Exception as error:  # whatever it is, the others finish what they paid for, then `run` raises it
                self.stop(error)

        await asyncio.gather(*(work() for _ in range(self.concurrency)))
        if self.stopped is not None:
            raise self.stopped

    # ---- one exchange, with all its attempts
    async def _exchange(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any],
        read: Callable[[httpx.Response], Any],
        attempts: int | None = None,
    ) -> Any:
        problem, said, attempts, content = "", "", attempts or self.patience.attempts, canonical(body) if body else None
        for attempt in range(attempts):
            reserved = lost = await self._enter(body)
            asked_to_wait = 0.0
            try:
                response = await asyncio.wait_for(
                    self._http.request(method, self.settings.base_url + path, content=content), self.patience.timeout_s
                )
                self.headers = response.headers
                self.gate.note(response.headers)
                status = response.status_code
                if status == 200:
                    found, lost = read(response), 0.0
                    return found
                lost = 0.0
                problem, said = f"HTTP {status}", _error_text(response, self.settings.api_key)
                if (status not in TRY_AGAIN and status < 500) or _out_of_quota(response):
                    self.gate.failed()
                    self._refuse(status, said)
                asked_to_wait = retry_after_s(response.headers.get("retry-after"))
                if asked_to_wait > LONGEST_WAIT_S:
                    raise Stopped(
                        f"{problem} ({said}): the server asks to wait for {asked_to_wait:.0f} s. The same command goes on then"
                    )
            except _Broken as error:
                problem, said = f"broken answer: {error}", ""
            except _Failed as error:
                problem, said, lost = "HTTP 200 with an error", str(error), 0.0
            except (httpx.RequestError, asyncio.TimeoutError) as error:
                timeout = isinstance(error, (httpx.TimeoutException, asyncio.TimeoutError))
                problem, said = "timeout" if timeout else f"connection: {type(error).__name__}", ""
                lost = 0.0 if isinstance(error, NOT_SENT) else lost
            finally:
                self._reserved -= reserved
                if lost:
                    self.spent += lost
                    self.on_lost(lost)
            self.errors[problem] += 1
            self.gate.failed()
            if asked_to_wait:  # the limit is the key's, so all workers wait
                self.gate.pause(asked_to_wait)
            if attempt + 1 < attempts:
                delay = random.uniform(0, min(self.patience.longest_s, self.patience.backoff_s * 2**attempt))
                await self._sleep(asked_to_wait + delay)
        raise Dropped(f"gave up after {attempts} attempts", f"{problem}: {said}" if said else problem)

    async def _enter(self, body: Mapping[str, Any]) -> float:
        """Wait until a request may go out; returns the most dollars that it can cost, now reserved.

        Raises what stopped the client, and Stopped where the budget does not hold the request, or no price is known to tell.
        """
        cost = self.model.cost(*request_tokens(body, most=True)) or 0.0
        budget = float("inf") if self.budget_usd is None else self.budget_usd
        if body and self.budget_usd is not None and self.model.cost(0, 0) is None:
            url, name = self.settings.base_url, self.settings.model
            if self.listed and name not in self.listed:
                raise Stopped(f"{name} is not among the models that {url} lists, so no budget can be held; check VENICE_MODEL")
            raise Stopped(f"{url} lists no price for {name}, so no budget can be held; leave --budget_usd out")
        while True:
            if self.stopped is not None:
                raise self.stopped
            if self.spent + cost > budget:
                raise Stopped(
                    f"the budget is used up: ${self.spent:.4f} spent, the next request may cost ${cost:.4f}, --budget_usd is "
                    f"{budget:g}. Raise it to go on with the same command"
                )
            wait = self.gate.wait_s()
            if self.spent + self._reserved + cost > budget:  # what is in flight may turn out cheaper
                wait = max(wait, 0.05)
            if wait <= 0:
                self.gate.take(sum(request_tokens(body)))
                self._reserved += cost
                return cost
            await self._sleep(wait)

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except asyncio.TimeoutError:
            return
        assert self.stopped is not None
        raise self.stopped

    def _refuse(self, status: int, said: str) -> None:
        if status in COSTS_ONE_PROMPT:
            raise Dropped(f"HTTP {status}", said, status)
        advice = ADVICE.get(402 if status in TRY_AGAIN else status, "check VENICE_BASE_URL")
        raise Stopped(f"the teacher refused with HTTP {status} ({said}): {advice}", status)

    def _read(self, body: Mapping[str, Any], response: httpx.Response, start: float) -> Answer:
        """The answer of a response with status 200. Raises _Broken for one to try again, Stopped, Dropped."""
        raw = response.content
        answer = _json(raw)
        try:
            choices = choices_of(answer) if "choices" in answer else []
        except Misaligned:
            choices = []
        if not choices and answer.get("error"):
            raise _Failed(_error_text(response, self.settings.api_key))
        if not choices or not all(isinstance(c.get("message"), dict) or isinstance(c.get("text"), str) for c in choices):
            raise _Broken("no choices")
        if any(choice.get("finish_reason") == "error" for choice in choices):
            raise _Broken("it broke off with an error")
        if len(self.settings.api_key) >= SECRET and self.settings.api_key.encode() in raw:
            raise Dropped("the answer repeats the API key")
        told = answer.get("model")
        if isinstance(told, str) and not same_model(self.settings.model, told) and not self.allow_other_model:
            raise Stopped(
                f"asked for the model {self.settings.model!r}, answered by {told!r}: its answer was not kept. Ask for that "
                "model by name, or allow it with --allow_other_model"
            )
        usage, expected = _dict(answer.get("usage")), request_tokens(body)
        n_prompt = int(_number(usage.get("prompt_tokens")) or expected[0])
        texts = (_dict(c.get("message")).get("content") or c.get("text") or "" for c in choices)
        n_written = _number(usage.get("completion_tokens"))
        if n_written is None:
            n_written = sum(-(-len(str(text).encode(errors="replace")) // BYTES_PER_TOKEN) for text in texts)
        self.gate.correct(sum(expected) - n_prompt - n_written)
        cost = _number(_dict(answer.get("cost")).get("usd"))
        cost = (self.model.cost(n_prompt, n_written) or 0.0) if cost is None else cost
        self.spent += cost
        return Answer(raw, answer, n_prompt, int(n_written), cost, time.monotonic() - start)


class _Broken(Exception):
    """A body with status 200 that is no answer."""


class _Failed(Exception):
    """A body with status 200 that says what went wrong, as gateways pass on an error of the server behind them."""


def logprob_fields(body: Mapping[str, Any], k: int) -> dict[str, Any]:
    """What asks for `k` top logprobs in a request of that kind."""
    return {"logprobs": True, "top_logprobs": k} if "messages" in body else {"logprobs": k}


def _json(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise _Broken("not JSON") from None
    if not isinstance(body, dict):
        raise _Broken("no JSON object")
    return body


def _out_of_quota(response: httpx.Response) -> bool:
    """Whether a 429 says that waiting will not help: OpenAI's, for a balance that is used up."""
    try:
        error = _dict(_json(response.content).get("error"))
    except _Broken:
        return False
    return response.status_code == 429 and "insufficient_quota" in (error.get("code"), error.get("type"))


def _error_text(response: httpx.Response, key: str) -> str:
    """What the server says went wrong, one line, cut once the key is out of it."""
    try:
        body = _json(response.content)
    except _Broken:
        body = {}
    said = body.get("error") or body.get("detail") or body.get("message")
    said = said.get("message") if isinstance(said, dict) else said
    text = " ".join(str(said or response.reason_phrase).split())
    return (text.replace(key, "[key]") if key else text)[:300]
