"""Every wire shape into one record; what is ambiguous never gets an id."""

from __future__ import annotations

import contextlib
import copy
import math
import unicodedata
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from faulty_server import SPECIAL, ByteTokenizer, chat_answer, entry, good, odd

from ae.tokenizer_adapter import TokenizerAdapter
from kd.records import MISSING, Misaligned, Token, TokenTable, parse_answer, spells, told_ids, wire_top

STORIES = ROOT.parent / "shared" / "teachers" / "stories260k"
TOKENIZER = ByteTokenizer()
TABLE = TokenTable(TOKENIZER)
THE, CAT, SAT, E_ACUTE, NEKO, END = range(256, 262)
IDS = [THE, CAT, SAT]


def completions(**logprobs: Any) -> dict[str, Any]:
    """A completions answer "the cat" with vLLM's lists."""
    lists = {"tokens": ["the", " cat"], "token_logprobs": [-0.5, -0.25], "text_offset": [0, 3], **logprobs}
    return {"model": "m", "choices": [{"text": "the cat", "finish_reason": "length", "logprobs": lists}]}


def test_openai_content() -> None:
    record = parse_answer({"messages": []}, good(), TABLE, prompt_ids=[1, 2])
    assert record.sampled_id.tolist() == IDS and record.sampled_logprob.tolist() == [-0.5] * 3
    assert record.top_ids.tolist() == [[THE, CAT], [CAT, SAT], [SAT, CAT]] and record.top_logprobs[0].tolist() == [-0.5, -2.0]
    assert (record.source, record.model, record.finish_reason, record.text) == ("generate", "teacher", "stop", "the cat sat")
    assert record.prompt_ids.tolist() == [1, 2] and record.has_logprobs and wire_top(good()) == 2
    assert record.sampled_id.dtype == record.top_ids.dtype == np.int32 and record.top_logprobs.dtype == np.float32


def test_venice_flat_object_and_list() -> None:
    answer = chat_answer("the", None)
    answer["choices"][0]["logprobs"] = entry("the", top=[entry("the"), entry(" cat", -1.5)])
    assert parse_answer({}, answer, TABLE).top_ids.tolist() == [[THE, CAT]]
    answer["choices"][0]["logprobs"] = [answer["choices"][0]["logprobs"]]
    assert parse_answer({}, answer, TABLE).sampled_id.tolist() == [THE]
    with pytest.raises(Misaligned, match="differ from the text"):  # one flat object does not cover a longer text
        parse_answer({}, {**answer, "choices": [{**answer["choices"][0], "message": {"content": "the cat"}}]}, TABLE)


def test_vllm_completions() -> None:
    answer = completions(top_logprobs=[{"the": -0.5, " cat": -1.0}, None])
    record = parse_answer({"prompt": [7, 8]}, answer, TABLE)
    assert record.sampled_id.tolist() == [THE, CAT] and record.prompt_ids.tolist() == [7, 8]
    assert record.top_ids.tolist() == [[THE, CAT], [MISSING, MISSING]] and np.isnan(record.top_logprobs[1]).all()
    answer = completions(tokens=["token_id:256", "token_id:257"], top_logprobs=[{"token_id:256": -0.5}, {"token_id:65": -1.0}])
    assert parse_answer({}, answer, TABLE).top_ids.tolist() == [[THE], [65]]


def test_vllm_echoes_no_text_beside_ids() -> None:
    """As its completions server answers `return_token_ids`: the logprobs hold the prompt, the text does not."""
    lists = {
        "tokens": ["token_id:256", "token_id:257"], "token_logprobs": [None, -0.25], "text_offset": [0, 0],
        "top_logprobs": [None, {"token_id:257": -0.25, "token_id:65": -2.0}],
    }  # fmt: skip
    choice = {"text": "", "finish_reason": "length", "token_ids": [], "prompt_token_ids": [THE, CAT], "logprobs": lists}
    request = {"prompt": [THE, CAT], "echo": True, "max_tokens": 0}
    record = parse_answer(request, {"model": "m", "choices": [choice]}, TABLE)
    assert (record.source, record.sampled_id.tolist()) == ("score", [THE, CAT]) and np.isnan(record.sampled_logprob[0])
    assert record.top_ids.tolist() == [[MISSING, MISSING], [CAT, 65]]


def test_a_byte_that_a_tokenizer_falls_back_to_stands_for_what_no_other_token_has() -> None:
    class Falling(ByteTokenizer):
        fallback_ids = frozenset(range(256))

        def token_bytes(self, id: int) -> bytes:
            return b"," if id == THE else super().token_bytes(id)

    table = TokenTable(Falling())
    assert table.find(Token(text=",")) == table.find(Token(raw=b",")) == THE
    assert table.find(Token(raw=b"\xc3")) == 0xC3 and table.find(Token(text=" cat")) == CAT
    Falling.fallback_ids = frozenset()
    assert TokenTable(Falling()).find(Token(text=",")) is None  # two tokens that are alike


@pytest.mark.skipif(not STORIES.exists(), reason=f"no tokenizer with byte pieces at {STORIES}")
def test_every_word_of_a_tokenizer_with_byte_pieces_is_found() -> None:
    tokenizer = TokenizerAdapter.load(str(STORIES))
    table = TokenTable(tokenizer)
    assert len(tokenizer.fallback_ids) == 256
    for i in set(range(tokenizer.size)) - tokenizer.fallback_ids - tokenizer.special_ids:
        assert table.find(Token(raw=tokenizer.token_bytes(i))) == i, i


def test_prompts_of_a_larger_vocabulary_are_misaligned() -> None:
    with pytest.raises(Misaligned, match="the prompt is of another tokenizer"):
        parse_answer({"messages": []}, good(), TABLE, prompt_ids=[1, TOKENIZER.size])
    with pytest.raises(Misaligned, match="the prompt is of another tokenizer"):
        parse_answer({"prompt": [TOKENIZER.size]}, completions(), TABLE)


def test_ids_given_apart_win_over_strings() -> None:
    """A token whose string is a broken character is known by its id."""
    answer = completions(tokens=["the", " c", "\ufffd"], token_logprobs=[-1, -1, -1])
    answer["choices"][0] |= {"text": "the cat", "token_ids": [THE, *b" cat"], "prompt_token_ids": [5]}
    with pytest.raises(Misaligned, match="lists 5 ids for 3 tokens"):
        parse_answer({}, answer, TABLE)
    answer["choices"][0] |= {"text": "the\u732b"}
    answer["choices"][0]["logprobs"] |= {"tokens": ["the", "\ufffd", "\ufffd", "\ufffd"], "token_logprobs": [-1] * 4}
    answer["choices"][0]["token_ids"] = [THE, *"\u732b".encode(), END]  # and the stop token, which has no logprob
    record = parse_answer({}, answer, TABLE)
    assert record.sampled_id.tolist() == [THE, 0xE7, 0x8C, 0xAB] and record.prompt_ids.tolist() == [5]


def test_our_local_teachers_ids() -> None:
    lists = {"token_ids": [THE, CAT], "top_token_ids": [[THE, 65], [CAT, 66]], "top_token_logprobs": [[-0.5, -2], [-0.25, -3]]}
    record = parse_answer({}, completions(tokens=["?", "?"], **lists), TABLE)
    assert record.sampled_id.tolist() == [THE, CAT] and record.top_ids.tolist() == [[THE, 65], [CAT, 66]]


def test_the_text_alone_of_another_tokenizer() -> None:
    """Neither what the server's ids mean nor what its tokens are matters: the text is encoded here."""
    answer = good()
    answer["choices"][0] |= {"token_ids": [7, 8], "prompt_token_ids": [9]}
    with pytest.raises(Misaligned):
        parse_answer({}, answer, TABLE)
    record = parse_answer({"messages": []}, answer, TABLE, prompt_ids=[1], text_alone=True)
    assert record.sampled_id.tolist() == TOKENIZER.encode("the cat sat") and record.prompt_ids.tolist() == [1]
    assert not record.has_logprobs and record.finish_reason == "stop"
    assert not len(parse_answer({"messages": []}, answer, TABLE, text_alone=True).prompt_ids)
    echoed = parse_answer({"prompt": [THE], "echo": True}, completions(), TABLE, text_alone=True)
    assert TOKENIZER.decode(echoed.sampled_id) == "the cat" and not len(echoed.prompt_ids)


@pytest.mark.parametrize("text", ["the", "the\ufffd", "the\ufffd\ufffd"])
def test_a_character_that_the_length_limit_cut(text: str) -> None:
    """vLLM leaves what was begun of it out; others put one U+FFFD for it, or one for each byte."""
    ids = [THE, *"\u732b".encode()[:2]]
    answer = {"model": "m", "choices": [{"text": text, "finish_reason": "length", "token_ids": ids}]}
    assert parse_answer({}, answer, TABLE).sampled_id.tolist() == ids
    answer["choices"][0]["token_ids"] = [THE]  # type: ignore[index]
    if text != "the":
        with pytest.raises(Misaligned, match="differ from the text"):
            parse_answer({}, answer, TABLE)


def test_a_text_that_the_tokenizer_spells_otherwise_is_kept_where_it_is_encoded_here() -> None:
    """As one that normalises does."""

    class Normalising(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(unicodedata.normalize("NFC", text))

    record = parse_answer({}, chat_answer("10 k\u2126", None), TokenTable(Normalising()))
    assert TOKENIZER.decode(record.sampled_id.tolist()) == "10 k\u03a9"


def test_half_a_surrogate_pair_is_no_token() -> None:
    assert TABLE.find(Token(text="\ud83d")) is None and TABLE.find(Token(text="?")) == ord("?")


def test_rows_are_the_likeliest_whatever_was_drawn() -> None:
    """vLLM lists the sampled token, too: in chats in front, in place of the last; in completions as one more."""
    drawn = [entry("the", -3.0, top=[entry("the", -3.0), entry(" cat", -0.5)])]
    likeliest = [entry(" cat", -0.5, top=[entry(" cat", -0.5), entry(" sat", -1.5)])]
    chat = {"messages": [], "top_logprobs": 2}
    record = parse_answer(chat, chat_answer("the cat", drawn + likeliest), TABLE)
    assert record.top_ids.tolist() == [[CAT], [CAT]] and record.sampled_id.tolist() == [THE, CAT]
    record = parse_answer(chat, chat_answer(" cat", likeliest), TABLE)  # nothing tells that it is vLLM
    assert record.top_ids.tolist() == [[CAT, SAT]]
    rows = [{" cat": -0.5, " sat": -1.5, "the": -3.0}, {" cat": -0.25, " sat": -2.0}]
    record = parse_answer({"prompt": "x", "logprobs": 2}, completions(token_logprobs=[-3.0, -0.25], top_logprobs=rows), TABLE)
    assert record.top_ids.tolist() == [[CAT, SAT], [CAT, SAT]]


def test_whose_ids_an_answer_tells() -> None:
    def choice(**more: Any) -> dict[str, Any]:
        return completions(tokens=["token_id:256", "token_id:257"])["choices"][0] | more

    assert told_ids(choice()) == [THE, CAT] and told_ids(choice(token_ids=[1, 2])) == [1, 2]
    assert told_ids(completions()["choices"][0]) is None and told_ids(good()["choices"][0]) is None
    assert spells([THE, CAT], "the cat", TABLE) and not spells([1, 2], "the cat", TABLE) and not spells([], "the", TABLE)


def test_echo_scores_prompt_and_text() -> None:
    answer = completions(token_logprobs=[None, -0.25], top_logprobs=[None, {" cat": -0.25, " sat": -2.0}])
    record = parse_answer({"prompt": "the", "echo": True, "max_tokens": 1}, answer, TABLE)
    assert record.source == "score" and record.sampled_id.tolist() == [THE, CAT] and len(record.prompt_ids) == 0
    assert math.isnan(record.sampled_logprob[0]) and record.top_ids.tolist() == [[MISSING, MISSING], [CAT, SAT]]
    answer["choices"][0] |= {"prompt_token_ids": [THE], "token_ids": [CAT]}
    assert parse_answer({"prompt": [THE], "echo": True}, answer, TABLE).sampled_id.tolist() == [THE, CAT]


@pytest.mark.parametrize("place", ["choice", "answer"])
def test_prompt_logprobs(place: str) -> None:
    rows = [None, {"257": {"logprob": -0.1, "rank": 1, "decoded_token": " cat"}, "258": {"logprob": -3.0, "rank": 2}}]
    answer = chat_answer("the", [entry("the")])
    (answer if place == "answer" else answer["choices"][0])["prompt_logprobs"] = rows
    record = parse_answer({"prompt": [THE, CAT]}, answer, TABLE)
    assert record.source == "score" and record.sampled_id.tolist() == [THE, CAT, THE]
    assert record.top_ids[1].tolist() == [CAT, SAT] and record.sampled_logprob[1] == np.float32(-0.1)
    with pytest.raises(Misaligned, match="ids are not known"):
        parse_answer({"prompt": "the cat"}, answer, TABLE)


def test_sglang_triples() -> None:
    meta = {
        "output_token_logprobs": [[-0.5, THE, "the"], [-0.6, NEKO, " \u00e7\u008c"]],
        "output_top_logprobs": [[[-0.5, THE, "the"], [-1.5, CAT, " cat"]], [[-0.6, NEKO, "?"]]],
        "finish_reason": {"type": "length", "length": 2},
    }
    record = parse_answer({"input_ids": [1, 2]}, {"text": "the \u732b", "meta_info": meta}, TABLE)
    assert record.sampled_id.tolist() == [THE, NEKO] and record.finish_reason == "length"
    assert record.top_ids.tolist() == [[THE, CAT], [NEKO, MISSING]] and record.prompt_ids.tolist() == [1, 2]
    meta |= {"input_token_logprobs": [[None, CAT, None], [-1.0, SAT, None]], "input_top_logprobs": [None, [[-1.0, SAT, None]]]}
    record = parse_answer({"input_ids": [CAT, SAT]}, {"text": "the \u732b", "meta_info": meta}, TABLE)
    assert record.source == "score" and record.sampled_id.tolist() == [CAT, SAT, THE, NEKO]


def test_llama_cpp() -> None:
    """Its strings are cut to valid UTF-8, its ids and bytes are whole."""
    pieces = [(0xE7, ""), (0x8C, ""), (0xAB, "\u732b")]
    tokens = [entry(text, id=i, bytes=[i], top=[entry("", -0.5, id=i)]) for i, text in pieces]
    assert parse_answer({}, chat_answer("\u732b", tokens), TABLE).top_ids.tolist() == [[0xE7], [0x8C], [0xAB]]
    for token in tokens:
        token.pop("id")
    assert parse_answer({}, chat_answer("\u732b", tokens), TABLE).sampled_id.tolist() == [0xE7, 0x8C, 0xAB]
    native = {"content": "the", "completion_probabilities": [entry("the", id=THE)], "stop_type": "limit"}
    assert parse_answer({}, native, TABLE).finish_reason == "limit"


def test_ollama_native_and_fragments() -> None:
    native = {"model": "m", "message": {"content": "the cat"}, "done_reason": "stop", "logprobs": [entry("the"), entry(" cat")]}
    assert parse_answer({}, native, TABLE).sampled_id.tolist() == [THE, CAT]
    native["logprobs"][1]["top_logprobs"] = [entry("\ufffd", -1.0), entry("", -1.1), entry(" sat", -2.0)]
    assert parse_answer({}, native, TABLE).top_ids[1].tolist() == [SAT]  # fragments are left to the tail


def test_no_logprobs_is_sequence_level() -> None:
    for answer in (odd("null"), chat_answer("the cat sat", [])):
        record = parse_answer({}, answer, TABLE)
        assert not record.has_logprobs and record.sampled_id.tolist() == TOKENIZER.encode("the cat sat")
        assert record.top_ids.shape == (11, 0) and np.isnan(record.sampled_logprob).all() and wire_top(answer) is None


def test_values_that_are_no_measurement() -> None:
    for kind in ("nan", "-9999"):
        record = parse_answer({}, odd(kind), TABLE)
        assert math.isnan(record.sampled_logprob[1]) and record.top_ids[0].tolist() == [THE, MISSING]
    record = parse_answer({}, chat_answer("the", [entry("the", -math.inf, [entry("the", 5e-4)])]), TABLE)
    assert math.isnan(record.sampled_logprob[0]) and record.top_logprobs.tolist() == [[0.0]]
    for value, reason in ((0.5, "above zero"), ("-1", "no number"), (True, "no number")):
        with pytest.raises(Misaligned, match=reason):
            parse_answer({}, chat_answer("the", [entry("the", value)]), TABLE)
    with pytest.raises(Misaligned, match="more than 1"):
        parse_answer({}, chat_answer("the", [entry("the", -0.1, [entry("the", -0.1), entry(" cat", -0.1)])]), TABLE)


def test_duplicates() -> None:
    assert parse_answer({}, odd("duplicate"), TABLE).top_ids[0].tolist() == [THE, MISSING]  # by string: both to the tail
    top = [entry("the", -0.5, id=THE), entry("the", -3.0, id=THE), entry("the", -4.0, id=CAT)]
    record = parse_answer({}, chat_answer("the", [entry("the", top=top, id=THE)]), TABLE)
    assert record.top_ids.tolist() == [[THE, CAT]] and record.top_logprobs.tolist() == [[-0.5, -4.0]]


def test_the_stop_token_may_show_up_or_not() -> None:
    known = parse_answer({}, chat_answer("the", [entry("the"), entry(SPECIAL)]), TABLE)
    assert known.sampled_id.tolist() == [THE, END]
    for foreign in ("<|im_end|>", ""):
        assert parse_answer({}, chat_answer("the", [entry("the"), entry(foreign)]), TABLE).sampled_id.tolist() == [THE]
    with pytest.raises(Misaligned, match="not a token"):
        parse_answer({}, chat_answer("the", [entry("<|im_end|>"), entry("the")]), TABLE)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([entry("the"), entry("\ufffd"), entry(" cat")], "fragment of a character"),
        ([entry("the"), entry(" dog"), entry(" cat")], "not a token of the tokenizer"),
        ([entry("the"), entry(" sat")], "differ from the text"),
        ([entry("the"), {"token": " cat", "bytes": [999]}], "no list of bytes"),
        ([entry("the", id=10**6), entry(" cat")], "not a token"),
        (["the", " cat"], "shape"),
        ({"a": 1}, "shape"),
    ],
)
def test_rows_that_cannot_be_aligned(tokens: Any, reason: str) -> None:
    with pytest.raises(Misaligned, match=reason):
        parse_answer({}, chat_answer("the cat", tokens), TABLE)


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": None}, {"choices": [3]}, {"choices": [{"message": {}}]}])
def test_shapes_that_are_none(answer: dict[str, Any]) -> None:
    with pytest.raises(Misaligned):
        parse_answer({}, answer, TABLE)


def test_bytes_that_two_ids_share_are_ambiguous() -> None:
    class Twice(ByteTokenizer):
        def token_bytes(self, id: int) -> bytes:
            return b"the" if id == CAT else super().token_bytes(id)

    table = TokenTable(Twice())
    assert table.find(Token(text="the")) is None and table.find(Token(text="the", id=CAT)) == CAT
    assert table.find(Token(text=" sat")) == SAT


def test_any_cut_of_an_answer_is_a_record_or_misaligned() -> None:
    """No JSON value in place of another makes the parser fail in another way."""
    for junk in (None, 0, -1.5, "x", [], {}, [[]], {"token": None}, True, math.nan):
        for key in good()["choices"][0]:
            answer = copy.deepcopy(good())
            answer["choices"][0][key] = junk
            _try(answer)
        for key in entry("x"):
            answer = copy.deepcopy(good())
            answer["choices"][0]["logprobs"]["content"][1][key] = junk
            _try(answer)
        _try(completions(top_logprobs=junk))
        _try(completions(token_logprobs=junk))


def _try(answer: dict[str, Any]) -> None:
    wire_top(answer)
    with contextlib.suppress(Misaligned):
        parse_answer({}, answer, TABLE)


def test_with_a_real_tokenizer(tokenizer: TokenizerAdapter) -> None:
    """Byte-level BPE: every token's bytes lead back to it, the special ones by their name."""
    table = TokenTable(tokenizer)
    ids = tokenizer.encode("def f(x):\n    return '\u732b \U0001f408'\n")
    tokens = [
        entry("?", bytes=list(tokenizer.token_bytes(i)), top=[entry("?", bytes=list(tokenizer.token_bytes(i)))]) for i in ids
    ]
    tokens.append(entry("<|endoftext|>"))
    record = parse_answer({}, chat_answer(tokenizer.decode(ids), tokens), table)
    assert record.sampled_id.tolist() == [*ids, tokenizer.eot_id] and record.top_ids[:-1, 0].tolist() == ids
