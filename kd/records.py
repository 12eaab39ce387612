"""One record for what any teacher says, parsed from the wire shapes of the servers that this project speaks to.

    OpenAI, llama.cpp        choices[].logprobs.content[] {token, logprob, bytes, id?, top_logprobs[]}
    Venice                   choices[].logprobs is one such object without `content`, or a list of them
    vLLM, OpenAI completions choices[].logprobs {tokens, token_logprobs, top_logprobs: [{string: logprob}], ...}
    our local teacher        both of these, with `id`, and with token_ids, top_token_ids and top_token_logprobs
    vLLM scoring             prompt_logprobs: [null | {id: {logprob, ...}}], in the answer (chat) or in the choice
    SGLang /generate         meta_info {input,output}_token_logprobs: [[logprob, id, text]], *_top_logprobs
    llama.cpp /completion    completion_probabilities[], as OpenAI's content[]
    Ollama /api/chat         logprobs[], as OpenAI's content[]

A token is known by its id, else by its bytes, else by its string, else as the literal string of a special token; never
by `encode(string)[0]`. What is ambiguous - "", U+FFFD, bytes that two ids share - has no id: among the top k it goes
into the tail, as the sampled token it makes the row `Misaligned`. The sampled tokens' bytes must equal the text.

Logprobs are nats. null, NaN, -inf and OpenAI's -9999 ("very unlikely") are missing: no number is made up for them.
Up to 0.001 above zero is rounding and becomes 0; more is no logprob, and the row is dropped. A top list that names an id
twice keeps the first; one that names a string twice names two tokens that cannot be told apart, and both go to the tail.
"""

from __future__ import annotations

import codecs
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

import numpy as np

MISSING = -1  # an id that is not known; its logprob is NaN
NEVER = -9999.0  # OpenAI's "very unlikely", which is no measurement
ROUNDING = 1e-3  # nats above zero that are taken for zero
REPLACEMENT = "\ufffd"
TOKEN_ID = re.compile(r"token_id:(\d+)")  # vLLM's return_tokens_as_token_ids


class Misaligned(ValueError):
    """This answer's tokens cannot be told exactly: drop the row and count it under the message."""


class TokenizerLike(Protocol):
    """What is needed of a tokenizer (`ae.tokenizer_adapter.TokenizerAdapter` has it all)."""

    size: int
    eot_id: int
    start_id: int
    special_ids: frozenset[int]
    stop_ids: frozenset[int]

    @property
    def fallback_ids(self) -> frozenset[int]:
        """Single bytes, used where no other token has them."""
        ...

    @property
    def fingerprint(self) -> str: ...
    def token_bytes(self, id: int) -> bytes: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> list[int]: ...
    def encode_rendered(self, texts: Sequence[str]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class TeacherRecord:
    """What a teacher said at T positions.

    source: "generate" (it wrote these tokens after the prompt) or "score" (it was given them; the first has no logprob).
    finish_reason: as the server calls it ("stop", "length", ...), None where it says nothing.
    """

    source: str
    model: str
    text: str
    finish_reason: str | None
    prompt_ids: np.ndarray  # (P,) int32; empty for "score", and where the prompt was a chat of which no ids are known
    sampled_id: np.ndarray  # (T,) int32, never MISSING
    sampled_logprob: np.ndarray  # (T,) float32; NaN: missing
    top_ids: np.ndarray  # (T, k) int32, most probable first; MISSING: fewer than k are known
    top_logprobs: np.ndarray  # (T, k) float32; NaN where the id is MISSING

    @property
    def has_logprobs(self) -> bool:
        """Whether any position has a distribution; if none has, the text alone teaches (sequence-level)."""
        return bool((self.top_ids != MISSING).any())


@dataclass(slots=True)  # twenty of them a token
class Token:
    """One entry as a server tells it."""

    logprob: Any = None
    id: int | None = None
    raw: bytes | None = None
    text: str | None = None
    top: Sequence[Token] = ()


class TokenTable:
    """Exact bytes -> id of a tokenizer, built once (about 0.1 s for 150,000 tokens)."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self.tokenizer = tokenizer
        pieces, last = [tokenizer.token_bytes(i) for i in range(tokenizer.size)], tokenizer.fallback_ids
        seen = Counter(piece for i, piece in enumerate(pieces) if i not in last)
        self._ids = {p: i for i, p in enumerate(pieces) if p and seen[p] == (0 if i in last else 1)}
        self._special: dict[str, int | None] = {}

    def find(self, token: Token) -> int | None:
        """The token's id, or None where it is not known for certain."""
        if token.id is not None:
            return token.id if 0 <= token.id < self.tokenizer.size else None
        text = token.text or ""
        if match := TOKEN_ID.fullmatch(text):
            return self.find(Token(id=int(match[1])))
        try:
            raw = token.raw if token.raw is not None else text.encode()
        except UnicodeEncodeError:  # half a surrogate pair
            return None
        if not raw or REPLACEMENT.encode() in raw:
            return None
        found = self._ids.get(raw)
        return self._special_id(text) if found is None else found

    def _special_id(self, text: str) -> int | None:
        """A special token by its literal string."""
        if text not in self._special:
            ids = self.tokenizer.encode_rendered([text])[0].tolist() if text == text.strip() else []
            self._special[text] = ids[0] if len(ids) == 1 and ids[0] in self.tokenizer.special_ids else None
        return self._special[text]


def choices_of(answer: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The answer's choices; a native answer (SGLang, llama.cpp, Ollama) is its own only one. Raises Misaligned."""
    choices = answer.get("choices", [answer])
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise Misaligned("the answer has no choices")
    return choices


def text_of(choice: Mapping[str, Any]) -> str:
    """The text of a choice. Raises Misaligned where there is none."""
    message = choice.get("message")
    places = [message.get("content")] if isinstance(message, dict) else [choice.get(k) for k in ("text", "response", "content")]
    text = next((place for place in places if isinstance(place, str)), None)
    if text is None:
        raise Misaligned("the choice has no text")
    return text


def text_of_answer(answer: Mapping[str, Any]) -> str:
    """All that an answer's choices say; empty where they say nothing."""
    try:
        return "".join(map(text_of, choices_of(answer)))
    except Misaligned:
        return ""


def scored_text(answer: Mapping[str, Any]) -> str:
    """The text of an answer that echoes its prompt, by its tokens where the server tells no other; empty: it tells none."""
    try:
        choice = choices_of(answer)[0]
        return text_of(choice) or "".join(token.text or "" for token in _generated(choice, {}) or [])
    except (Misaligned, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return ""


def parse_answer(
    request: Mapping[str, Any],
    answer: Mapping[str, Any],
    table: TokenTable,
    index: int = 0,
    prompt_ids: Sequence[int] | np.ndarray | None = None,
    text_alone: bool = False,
) -> TeacherRecord:
    """The record of choice `index` of an answer to `request` (the body that was sent).

    `prompt_ids`: the prompt as training text, where it is not what the server was sent (a chat). `text_alone`: leave out
    logprobs and ids that the server tells, as its tokenizer may be another one. Raises Misaligned.
    """
    try:
        return _parse(request, answer, table, index, prompt_ids, text_alone)
    except Misaligned:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise Misaligned(f"a shape that no known server has ({type(error).__name__})") from None


def _parse(
    request: Mapping[str, Any],
    answer: Mapping[str, Any],
    table: TokenTable,
    index: int,
    prompt_ids: Sequence[int] | np.ndarray | None,
    text_alone: bool,
) -> TeacherRecord:
    choice = choices_of(answer)[index]
    text, meta = text_of(choice), choice.get("meta_info") or {}
    sent = request.get("prompt", request.get("input_ids"))
    sent = sent if isinstance(sent, list) and all(isinstance(i, int) for i in sent) else None
    told, written = sent, None
    tokens: list[Token] | None = None
    scored: list[Token] | None = [] if request.get("echo") else None
    if not text_alone:
        told = choice.get("prompt_token_ids") or answer.get("prompt_token_ids") or sent
        written = next((choice[key] for key in ("token_ids", "output_ids") if choice.get(key)), None)
        tokens, scored = _generated(choice, meta), _scored(request, answer, choice, meta, told)
    ours = tokens is None and written is None  # a tokenizer that normalises may spell a text otherwise
    if tokens is None:
        tokens = [Token(id=i) for i in (table.tokenizer.encode(text) if written is None else written)]
    elif request.get("echo"):
        _assign(tokens, None if told is None or written is None else [*told, *written])
    else:
        _assign(tokens, written)
    if scored is not None and not request.get("echo"):
        tokens = scored + tokens
    source = "generate" if scored is None else "score"
    echoed = len(tokens) if not text else 0  # vLLM echoes no text beside ids
    skip = echoed if request.get("echo") else len(scored or [])
    ids, tokens = _identify(tokens, None if ours else text, table, skip=skip)

    if source == "score":
        prompt: Any = []
    else:
        prompt = next((known for known in (prompt_ids, told) if known is not None), [])
        if any(not 0 <= i < table.tokenizer.size for i in prompt):
            raise Misaligned("the prompt is of another tokenizer")
    finish = choice.get("finish_reason") or choice.get("done_reason") or choice.get("stop_type") or meta.get("finish_reason")
    asked = request.get("top_logprobs", request.get("logprobs"))
    top_ids, top_logprobs = _top(tokens, table, asked if type(asked) is int else None)
    return TeacherRecord(
        source=source,
        model=str(answer.get("model") or request.get("model") or ""),
        text=text,
        finish_reason=finish.get("type") if isinstance(finish, dict) else finish,
        prompt_ids=np.array(prompt, dtype=np.int32),
        sampled_id=np.array(ids, dtype=np.int32),
        sampled_logprob=np.array([clean_logprob(token.logprob) for token in tokens], dtype=np.float32),
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )


def told_ids(choice: Mapping[str, Any]) -> list[int] | None:
    """The ids of the text's tokens in the teacher's own tokenizer; None where the server tells no ids."""
    for key in ("token_ids", "output_ids"):
        if isinstance(choice.get(key), list) and choice[key]:
            return choice[key]
    try:
        tokens = _generated(choice, choice.get("meta_info") or {}) or []
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    named = [TOKEN_ID.fullmatch(token.text or "") for token in tokens]
    ids = [token.id if match is None else int(match[1]) for token, match in zip(tokens, named, strict=True)]
    return [i for i in ids if i is not None] if ids and None not in ids else None


def spells(ids: Sequence[Any], text: str, table: TokenTable) -> bool:
    """Whether these ids are of this tokenizer, which the text that they should spell tells."""
    try:
        _identify([Token(id=i) for i in ids], text, table, skip=0)
    except (Misaligned, TypeError):
        return False
    return True


def wire_top(answer: Mapping[str, Any]) -> int | None:
    """How many top logprobs a token of this answer has at most, 0: only the sampled token's own; None: no logprobs."""
    try:
        choice = choices_of(answer)[0]
        tokens = _generated(choice, choice.get("meta_info") or {}) or []
        known = [token for token in tokens if token.logprob is not None]
    except (Misaligned, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return None
    return max((len(token.top) for token in known), default=None)


# ------------------------------------------------------------------------------------------------------ wire shapes
def _generated(choice: Mapping[str, Any], meta: Mapping[str, Any]) -> list[Token] | None:
    """The tokens of the text (with echo: of prompt and text); None where the server sent no logprobs."""
    if meta.get("output_token_logprobs"):
        return _triples(meta["output_token_logprobs"], meta.get("output_top_logprobs"))
    logprobs = choice.get("logprobs") or choice.get("completion_probabilities")
    if not logprobs:
        return None
    if isinstance(logprobs, list):
        return [_entry(entry) for entry in logprobs]
    if "token" in logprobs:
        return [_entry(logprobs)]
    if "tokens" in logprobs:
        return _columns(logprobs)
    return [_entry(entry) for entry in logprobs.get("content") or []] or None


def _columns(logprobs: Mapping[str, Any]) -> list[Token]:
    """The completions shape, a list a field; our own server's ids replace strings that several tokens may share."""
    texts, values = logprobs["tokens"], logprobs["token_logprobs"]
    ids = logprobs.get("token_ids") or [None] * len(texts)
    tops: Sequence[Any]
    if logprobs.get("top_token_ids"):
        pairs = zip(logprobs["top_token_ids"], logprobs["top_token_logprobs"], strict=True)
        tops = [[Token(v, i) for i, v in zip(*pair, strict=True)] if pair[0] else [] for pair in pairs]
    else:
        rows = logprobs.get("top_logprobs") or [None] * len(texts)
        tops = [[Token(v, text=string) for string, v in (row or {}).items()] for row in rows]
    if not len(texts) == len(values) == len(ids) == len(tops):
        raise Misaligned("tokens and logprobs are of different lengths")
    parts = zip(texts, values, ids, tops, strict=True)
    return [Token(value, i, text=text, top=top) for text, value, i, top in parts]


def _scored(
    request: Mapping[str, Any],
    answer: Mapping[str, Any],
    choice: Mapping[str, Any],
    meta: Mapping[str, Any],
    prompt_ids: Sequence[int] | None,
) -> list[Token] | None:
    """The tokens of the prompt where the server scored it; [] where they are part of the echoed text."""
    if request.get("echo"):
        return []
    if meta.get("input_token_logprobs"):
        return _triples(meta["input_token_logprobs"], meta.get("input_top_logprobs"))
    rows = choice.get("prompt_logprobs") or answer.get("prompt_logprobs")
    if not rows:
        return None
    if prompt_ids is None or len(prompt_ids) != len(rows):
        raise Misaligned("the scored prompt's ids are not known (ask for return_token_ids)")
    tokens = []
    for i, row in zip(prompt_ids, rows, strict=True):
        known = {int(key): value["logprob"] for key, value in (row or {}).items()}
        tokens.append(Token(known.get(i), id=i, top=[Token(logprob, id=key) for key, logprob in known.items()]))
    return tokens


def _entry(entry: Mapping[str, Any]) -> Token:
    """OpenAI's object for a token, with llama.cpp's `id`."""
    raw = entry.get("bytes")
    try:
        exact = None if raw is None else bytes(raw)
    except (TypeError, ValueError):
        raise Misaligned("`bytes` is no list of bytes") from None
    top = [_entry(other) for other in entry.get("top_logprobs") or []]
    return Token(entry.get("logprob"), entry.get("id"), exact, entry.get("token"), top)


def _triples(rows: Sequence[Any], tops: Sequence[Any] | None) -> list[Token]:
    """SGLang's (logprob, id, text)."""
    tops = tops or [None] * len(rows)
    if len(tops) != len(rows):
        raise Misaligned("tokens and logprobs are of different lengths")
    return [
        Token(row[0], row[1], top=[Token(other[0], other[1]) for other in top or []])
        for row, top in zip(rows, tops, strict=True)
    ]


# -------------------------------------------------------------------------------------------------------- alignment
def _assign(tokens: list[Token], ids: Sequence[int] | None) -> None:
    """Give tokens the ids that the server listed apart; it may list one more, the stop token."""
    if ids is None:
        return
    if len(ids) not in (len(tokens), len(tokens) + 1):
        raise Misaligned(f"the server lists {len(ids)} ids for {len(tokens)} tokens")
    for token, i in zip(tokens, ids, strict=False):
        token.id = i


def _identify(tokens: list[Token], text: str | None, table: TokenTable, skip: int) -> tuple[list[int], list[Token]]:
    """The tokens' ids, after checking that the bytes of all but the first `skip` make up the text (None: not checked).

    One trailing entry that is no token of ours (a stop token's name, or "") is left out. A space that SentencePiece puts
    before a text, and what stands for a character cut by the length limit (U+FFFD, one or more, or nothing), may differ
    between bytes and text.
    """
    found = [table.find(token) for token in tokens]
    if found and found[-1] is None:
        found, tokens = found[:-1], tokens[:-1]
    ids: list[int] = []
    for i, token in zip(found, tokens, strict=True):
        if i is None:
            fragment = not token.text or REPLACEMENT in token.text
            raise Misaligned(
                "a fragment of a character, sent without id or bytes" if fragment else "not a token of the tokenizer"
            )
        ids.append(i)
    if text is None:
        return ids, tokens
    joined = b"".join(map(table.tokenizer.token_bytes, ids[skip:]))
    for raw in (joined, joined[joined[:1] == b" " :]):
        whole = codecs.getincrementaldecoder("utf-8")(errors="replace").decode(raw)  # without a character that was begun
        if text == (full := raw.decode("utf-8", errors="replace")) or (whole != full and text.rstrip(REPLACEMENT) == whole):
            return ids, tokens
    raise Misaligned("the tokens' bytes differ from the text")


def clean_logprob(value: Any) -> float:
    """A logprob in nats, at most 0; NaN where it is missing. Raises Misaligned for what is no logprob."""
    if type(value) is float and NEVER < value <= 0.0:
        return value
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Misaligned("a logprob is no number")
    if math.isnan(value) or value <= NEVER:
        return math.nan
    if value > ROUNDING:
        raise Misaligned("a logprob is above zero")
    return min(float(value), 0.0)


def _top(tokens: Sequence[Token], table: TokenTable, asked: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The known ones of the top lists, most probable first, (T, k) each; k: the longest list.

    asked: how many the request asked for. vLLM lists the sampled token, too: in completions as one more, in chats in front of
    the others, cut to as many. A row that may hold it for that reason loses its least likely entry, so that what stays are
    the likeliest whatever was drawn, as `kd.losses` takes them to be.
    """
    rows = [_known(token.top, table) for token in tokens]
    if asked:
        limit = asked - any(map(_sampled_in_front, tokens))
        for token, row in zip(tokens, rows, strict=True):
            if len(token.top) > limit and row:
                least = min(other.logprob for other in token.top if type(other.logprob) in (int, float))
                if row[-1][1] <= least:
                    row.pop()
    shape = (len(rows), max(map(len, rows), default=0))
    ids, logprobs = np.full(shape, MISSING, dtype=np.int32), np.full(shape, np.nan, dtype=np.float32)
    for t, row in enumerate(rows):
        if sum([math.exp(logprob) for _, logprob in row]) > 1.01:
            raise Misaligned("the top probabilities of a token add up to more than 1")
        if row:
            ids[t, : len(row)], logprobs[t, : len(row)] = zip(*row, strict=True)
    return ids, logprobs


def _sampled_in_front(token: Token) -> bool:
    """Whether a top list begins with the sampled token though another is likelier."""
    if len(token.top) < 2:
        return False
    first, second = token.top[0].logprob, token.top[1].logprob
    return all(type(x) in (int, float) for x in (first, second)) and first == token.logprob and first < second


def _known(top: Iterable[Token], table: TokenTable) -> list[tuple[int, float]]:
    """(id, logprob) of the entries that are known for certain, most probable first."""
    by_id: dict[int, float] = {}
    twice: AbstractSet[int] = set()
    for token in top:
        i, logprob = table.find(token), clean_logprob(token.logprob)
        if i is None or math.isnan(logprob):
            continue
        if i in by_id:
            twice = twice if token.id is not None else twice | {i}
        else:
            by_id[i] = logprob
    for i in twice:
        del by_id[i]
    return sorted(by_id.items(), key=itemgetter(1), reverse=True)
