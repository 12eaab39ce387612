"""What a teacher is asked: prompts, in their order, made into request bodies.

Request i is a function of the settings, the prompts and i alone, so that the same harvest asks the same again and finds the
answers that the store has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.schema import opt
from kd.kd_client import STEPS_DOWN
from kd.records import REPLACEMENT, TokenizerLike
from kd.settings import Settings
from kd.shards import Shard

TEMPLATE = 1  # version of what `Prompts` makes of a prompt; part of every key
DOCUMENT_TOKENS = 64  # by which the document of a scored piece is known
FIRST_UNSPACED = 0x2E80  # the scripts of East Asia begin there, which set no spaces between words
CONTINUE = "Continue the text below. Answer with the continuation alone: no comment, and nothing of the text itself.\n\n"


@dataclass
class HarvestConfig:
    """Settings of a harvest; each is a flag."""

    n_tokens: int = opt(1_000_000, "tokens of the teacher's text that the store should hold of this harvest", low=1)
    data: str | None = opt(None, "packed data: prompts are the beginnings of its training documents")
    prompts: str | None = opt(
        None, "JSON lines with `text`, `prompt` or `messages`; append new ones: an answer is found by its line"
    )
    prompt_tokens: int = opt(64, "tokens of a document that are its beginning", low=1)
    tokenizer: str | None = opt(None, "folder, tokenizer.json or hub name; unset: that of --data")
    store: str | None = opt(None, "SQLite file of this teacher; unset: data/teacher/MODEL.sqlite")
    base_url: str | None = opt(None, "server, up to /v1; unset: VENICE_BASE_URL")
    model: str | None = opt(None, "teacher; unset: VENICE_MODEL")
    mode: str = opt(
        "auto", "chat, completions, score, or auto: chat on Venice and OpenAI", choices=("auto", "chat", "completions", "score")
    )
    text_prompts: bool = opt(
        False,
        "completions: prompts as text, for servers that take no token ids or have another tokenizer; always so with "
        "--top_logprobs 0",
    )
    max_new_tokens: int = opt(512, "most tokens of an answer (--mode score: of the text that a request scores)", low=1)
    temperature: float = opt(1.0, "of the teacher's sampling; 0 uses each prompt once", low=0)
    top_logprobs: int = opt(STEPS_DOWN[0], "most probable tokens to ask for at each position; 0: the text alone", low=0)
    seed: int = opt(0, "of the requests' seeds", low=0)
    whole_store: bool = opt(False, "--n_tokens counts all that the store holds, of other settings too")
    shard: str = opt("1/1", "i/n: of n machines, the prompts and tokens of the i-th; kd/shards.py merges their stores")
    concurrency: int = opt(8, "requests at once (Venice: at most 10)", low=1)
    rpm: float | None = opt(None, "most requests a minute; the server's headers may lower it", low=1e-9)
    tpm: float | None = opt(None, "most tokens a minute, prompts included", low=1e-9)
    budget_usd: float | None = opt(None, "most dollars that this store may cost, earlier runs included", low=0)
    timeout_s: float = opt(300.0, "seconds that an answer may take", low=1e-9)
    dry_run: bool = opt(False, "estimate calls, tokens, dollars and time, and ask for no text")
    allow_http: bool = opt(False, "allow plain http to another machine")
    allow_other_model: bool = opt(False, "keep answers of another model than asked for")

    @property
    def as_text(self) -> bool:
        """Whether a completions server is sent text. Ids would be other words to a teacher of another tokenizer, and without
        logprobs nothing would show it."""
        return self.text_prompts or (not self.top_logprobs and bool(self.data or self.prompts))


@dataclass
class Job:
    """A request, and what precedes its answer in the training text (None: not known); of a text that is to be scored, the
    beginning of its document, which decides whether it is trained on or held out."""

    body: dict[str, Any]
    prompt_ids: list[int] | None


def uses_chat(mode: str, settings: Settings) -> bool:
    """What --mode means for a server: Venice has chats only."""
    return mode == "chat" or (mode == "auto" and settings.is_hosted)


class Prompts:
    """The endless (temperature 0: one pass long) sequence of jobs and their request bodies, the same in every run."""

    def __init__(self, cfg: HarvestConfig, settings: Settings, tokenizer: TokenizerLike | None) -> None:
        self.cfg, self.settings, self.tokenizer = cfg, settings, tokenizer
        self.chat, self.shard = uses_chat(cfg.mode, settings), Shard.parse(cfg.shard)
        if cfg.mode == "score":
            if not cfg.data:
                raise UserError("--mode score needs the text to be scored: give --data")
            if not cfg.top_logprobs:
                raise UserError("--mode score asks for logprobs alone: give --top_logprobs of at least 1")
            if settings.is_hosted or cfg.text_prompts:
                raise UserError(
                    "--mode score needs a server that takes token ids and echoes them with logprobs, such as vLLM or "
                    "kd/local_teacher.py; Venice and OpenAI score only what they write: use --mode chat"
                )
        if cfg.data and cfg.prompts:
            raise UserError("give --data or --prompts, not both")
        if self.chat and not (cfg.data or cfg.prompts):
            raise UserError("a chat needs prompts: give --data or --prompts (only --mode completions can start from nothing)")
        if tokenizer is None and (cfg.data or not cfg.prompts or (not self.chat and not cfg.as_text)):
            raise UserError("these prompts are token ids: give --tokenizer, the teacher's own")

    def __iter__(self) -> Iterator[Job]:
        index, source = 0, self.cfg.data or self.cfg.prompts
        while True:
            first, own = index, 0
            for row in self._rows():
                if self.shard.takes(row if source else {"index": index}):
                    yield request_of(self.cfg, self.settings, self.tokenizer, self.chat, index, row)
                    own += 1
                index += 1
            if source and not own:
                of = f" for --shard {self.cfg.shard}" if index > first else ""
                raise UserError(f"{source} holds no prompts{of}")
            if self.one_pass:
                return

    @property
    def one_pass(self) -> bool:
        """Whether asking again would give the same answers."""
        return self.cfg.temperature == 0 or self.cfg.mode == "score"

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.cfg.prompts:
            yield from _json_lines(self.cfg.prompts)
        elif self.cfg.data:
            from ae.chunks import PackedData  # lazy: it takes torch seconds to import

            tokenizer = self.tokenizer
            assert tokenizer is not None  # `__init__` asks for one
            start_id, has_bos = tokenizer.start_id, tokenizer.start_id != tokenizer.eot_id
            data = PackedData(Path(self.cfg.data) / "train")
            starts = data.doc_starts
            for i, start in enumerate(map(int, starts)):
                end = int(starts[i + 1] if i + 1 < len(starts) else data.n_tokens)
                if self.cfg.mode == "score":
                    of = data.tokens[start : min(start + DOCUMENT_TOKENS, end)].tolist()
                    for first in range(start, end, self.cfg.max_new_tokens):
                        piece = data.tokens[first : min(first + self.cfg.max_new_tokens, end)].tolist()
                        begins = first == start or has_bos  # a model that has one is at a loss without it
                        yield {"score": [*([start_id] if begins else []), *piece], "of": of}
                    continue
                ids = data.tokens[start : min(start + self.cfg.prompt_tokens, end - 1)].tolist()  # no end-of-text
                while ids and tokenizer.decode(ids).endswith(REPLACEMENT):
                    ids.pop()  # it must not end within a character: the answer's text would lack the rest
                if self.chat:
                    ids = to_last_space(ids, tokenizer)
                if ids:
                    yield {"ids": ids}
        else:
            yield {"ids": []}


def request_of(
    cfg: HarvestConfig, settings: Settings, tokenizer: TokenizerLike | None, chat: bool, index: int, row: dict[str, Any]
) -> Job:
    """Request number `index`, of a prompt: {"text"}, {"prompt"}, {"messages"}, {"ids"}, or {"score", "of"}: ids
    to be scored, and the first of their document."""
    if "score" in row:
        scoring = {
            "echo": True,
            "max_tokens": 0,
            "temperature": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        return Job({"model": settings.model, "prompt": row["score"], **scoring}, row["of"])
    body: dict[str, Any] = {
        "model": settings.model,
        "temperature": cfg.temperature,
        "top_p": 1,  # servers may have defaults of their own, and logprobs are of the whole distribution
        "seed": 1 + (cfg.seed * 1_000_003 + index) % (2**31 - 1),
        "max_completion_tokens" if settings.is_hosted else "max_tokens": cfg.max_new_tokens,
    }
    if settings.is_venice:
        body["venice_parameters"] = {"include_venice_system_prompt": False, "disable_thinking": True}
    if not settings.is_hosted:  # vLLM's fields, which others ignore
        body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        body |= {"top_k": -1, "min_p": 0, "repetition_penalty": 1}  # where a model's generation_config says otherwise
    messages = row.get("messages")
    if messages is None and "prompt" in row and chat:
        messages = [{"role": "user", "content": row["prompt"]}]
    if messages is not None:
        if not chat:
            raise UserError(f"{cfg.prompts} holds chats; harvest them with --mode chat")
        known = None if tokenizer is None else [int(i) for i in tokenizer.encode_chat(messages, add_generation_prompt=True)]
        return Job({**body, "messages": messages}, known)
    if "ids" in row:
        assert tokenizer is not None
        ids: list[int] | None = row["ids"]
        text = tokenizer.decode(row["ids"])
    else:
        text = row.get("text") or row["prompt"]
        ids = None if tokenizer is None else tokenizer.encode(text)
    if chat:
        return Job({**body, "messages": [{"role": "user", "content": CONTINUE + text}]}, ids)
    if cfg.as_text:
        return Job({**body, "prompt": text}, ids)
    assert tokenizer is not None and ids is not None
    return Job({**body, "prompt": [tokenizer.start_id, *ids]}, ids)


def to_last_space(ids: list[int], tokenizer: TokenizerLike) -> list[int]:
    """A prompt up to its last white space, the space included: a chat's answer begins with a word, not with a space or the rest
    of one. The whole prompt where that leaves nothing."""
    text = tokenizer.decode(ids)
    kept = text[: max((i for i, c in enumerate(text) if c.isspace()), default=-1) + 1]
    return tokenizer.encode(kept) if kept.strip() else ids


def seam(prompt: str, answer: str) -> str:
    """A space, where a chat's answer would run into the last word of the text that it continues."""
    words = prompt[-1:] + answer[:1]
    return " " if len(words) == 2 and all(c.isalnum() and ord(c) < FIRST_UNSPACED for c in words) else ""


def continued(request: Mapping[str, Any]) -> str | None:
    """The text that a stored request asked a chat to continue; None where it asked something else."""
    messages = request.get("messages")
    if not messages or not _is_chat(messages) or len(messages) > 1 or not messages[0]["content"].startswith(CONTINUE):
        return None
    return messages[0]["content"].removeprefix(CONTINUE)


def prompt_ids_of(request: Mapping[str, Any], ids: list[int] | None, tokenizer: TokenizerLike) -> list[int] | None:
    """The prompt of a stored request as training text in this tokenizer's ids; `ids`: as it was when the answer was stored.

    That may have been another tokenizer, so a chat is encoded again, and so is a text that `ids` do not spell here. Prompts
    that were sent as ids are in the teacher's own, and stay.
    """
    text, messages = continued(request), request.get("messages")
    if text is None and messages and _is_chat(messages):
        try:
            return tokenizer.encode_chat(messages, add_generation_prompt=True)
        except UserError:  # no chat template
            if ids is None:
                return None
            raise
    if text is None:
        text = request.get("prompt")
    if not isinstance(text, str) or (ids is not None and tokenizer.decode(ids) == text):
        return ids
    return tokenizer.encode(text)


def _is_prompt(row: Any) -> bool:
    """Whether a line has a `text`, `prompt` or `messages` that is not empty, and none of another type."""
    if not isinstance(row, dict):
        return False
    texts, messages = [row.get("text") or "", row.get("prompt") or ""], row.get("messages") or []
    return any([*texts, messages]) and all(isinstance(text, str) for text in texts) and _is_chat(messages)


def _is_chat(messages: Any) -> bool:
    """Whether it is a list of objects with strings `role` and `content`."""
    return isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )


def _json_lines(path: str) -> Iterator[dict[str, Any]]:
    """Objects with `text`, `prompt` or `messages`. Raises UserError naming the line that is something else."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not _is_prompt(row):
                    raise UserError(
                        f"{path}:{number}: expected a JSON object with `text` or `prompt`, a string, or with `messages`, a "
                        "list of objects with strings `role` and `content`"
                    )
                yield {key: row[key] for key in ("text", "prompt", "messages") if row.get(key)}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from None
