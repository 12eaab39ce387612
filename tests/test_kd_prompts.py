"""What a teacher is asked: the bodies of requests, and lines that are no prompts."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from conftest import World
from faulty_server import ByteTokenizer, FaultyServer
from test_kd_faults import KEY, config, quiet

from ae.chunks import PackedWriter
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from kd.harvest import HarvestConfig
from kd.prompts import Prompts, continued, prompt_ids_of, request_of, seam, to_last_space
from kd.settings import Settings


def test_bodies_are_what_each_server_understands() -> None:
    """And nothing else: Venice and OpenAI refuse vLLM's fields. The same index gives the same body."""
    tokenizer, cfg = ByteTokenizer(), HarvestConfig(max_new_tokens=7, seed=2)
    venice, local = Settings("https://api.venice.ai/api/v1", "m", KEY), Settings("http://127.0.0.1:1/v1", "m", KEY)
    job = request_of(cfg, venice, tokenizer, True, 5, {"prompt": "hi"})
    assert job == request_of(cfg, venice, tokenizer, True, 5, {"prompt": "hi"})
    assert job.prompt_ids == [*b"hi", tokenizer.eot_id] and job.body == {
        "model": "m", "temperature": 1.0, "top_p": 1, "seed": 2_000_012, "max_completion_tokens": 7,
        "venice_parameters": {"include_venice_system_prompt": False, "disable_thinking": True},
        "messages": [{"role": "user", "content": "hi"}],
    }  # fmt: skip
    job = request_of(cfg, venice, tokenizer, True, 5, {"text": "Once"})
    assert job.prompt_ids == [*b"Once"] and job.body["messages"][0]["content"].endswith("\n\nOnce")
    job = request_of(cfg, local, tokenizer, False, 5, {"ids": [1, 2]})
    assert job.prompt_ids == [1, 2] and job.body["prompt"] == [tokenizer.eot_id, 1, 2] and job.body["max_tokens"] == 7
    assert job.body["return_token_ids"] and "venice_parameters" not in job.body
    assert (job.body["top_p"], job.body["top_k"], job.body["min_p"]) == (1, -1, 0)  # else a model's own defaults would cut


def test_a_prompt_ends_with_a_whole_character(packed: World, tmp_path: Path) -> None:
    tokenizer = TokenizerAdapter.load(packed.root / "tokenizer")
    ids = [*tokenizer.encode("x = 1"), *tokenizer.encode("\U0001f600")[:-1]]
    assert tokenizer.decode(ids).endswith("\ufffd")
    writer = PackedWriter(tmp_path / "train", tokenizer.model_vocab_size)
    writer.add(np.array([*ids, 5, 6, tokenizer.eot_id]))
    writer.close(tokenizer_fingerprint=tokenizer.fingerprint, tokenizer="t", eot_id=tokenizer.eot_id, pad_id=tokenizer.pad_id)
    local = Settings("http://127.0.0.1:1/v1", "m", KEY)
    for as_text, cut in ((True, "x = 1"), (False, [tokenizer.eot_id, *tokenizer.encode("x = 1")])):
        cfg = HarvestConfig(data=str(tmp_path), prompt_tokens=len(ids), text_prompts=as_text)
        assert next(iter(Prompts(cfg, local, tokenizer))).body["prompt"] == cut


class WithStart(ByteTokenizer):
    """Its begin-of-text token is another than its end-of-text."""

    start_id = 255


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WithStart()])
def test_a_text_begins_as_the_teacher_knows_it(packed: World, tokenizer: ByteTokenizer) -> None:
    """A model with a begin-of-text token is at a loss without it, in every piece; others go on within a document."""
    local = Settings("http://127.0.0.1:1/v1", "m", KEY)
    job = request_of(HarvestConfig(), local, tokenizer, False, 0, {"ids": [*b"Once"]})
    assert job.body["prompt"] == [tokenizer.start_id, *b"Once"] and job.prompt_ids == [*b"Once"]
    cfg = HarvestConfig(data=str(packed.data), mode="score", max_new_tokens=16)
    pieces = [job.body["prompt"] for job in islice(Prompts(cfg, local, tokenizer), 2)]
    begun = [piece[0] == tokenizer.start_id and len(piece) == 17 for piece in pieces]
    assert begun == [True, tokenizer.start_id != tokenizer.eot_id]


def test_begin_of_text_as_the_tokenizers_files_tell_it(tokenizer: TokenizerAdapter, tmp_path: Path) -> None:
    assert tokenizer.start_id == tokenizer.eot_id  # it has none
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    for more, start in (({}, tokenizer.pad_id), ({"add_bos_token": False}, tokenizer.eot_id)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "bos_token": "<|pad|>", **more}))
        assert TokenizerAdapter.load(tmp_path).start_id == start


def test_a_chat_goes_on_where_a_word_begins(tmp_path: Path, packed: World) -> None:
    tokenizer = ByteTokenizer()
    for text, kept in (("The cat sa", "The cat "), ("    def f", "    def "), ("\u732b\u304c", "\u732b\u304c"), ("  x", "  x")):
        assert tokenizer.decode(to_last_space(tokenizer.encode(text), tokenizer)) == kept
    venice = Settings("https://api.venice.ai/api/v1", "m", KEY)
    ours = TokenizerAdapter.load(packed.root / "tokenizer")
    for job in islice(Prompts(HarvestConfig(data=str(packed.data)), venice, ours), 20):
        assert job.body["messages"][0]["content"].endswith((" ", "\n")) and job.prompt_ids


@pytest.mark.parametrize(
    ("text", "answer", "whole"),
    [
        ("The cat sat", "on the mat.", "The cat sat on the mat."),
        ("The cat sat", ", and", "The cat sat, and"),
        ("The cat sat ", "on", "The cat sat on"),
        ("The cat sat", " on", "The cat sat on"),
        ("\u732b\u304c", "\u5ea7\u308b", "\u732b\u304c\u5ea7\u308b"),
    ],
)
def test_a_chats_answer_does_not_run_into_its_prompt(text: str, answer: str, whole: str) -> None:
    tokenizer, venice = ByteTokenizer(), Settings("https://api.venice.ai/api/v1", "m", KEY)
    job = request_of(HarvestConfig(), venice, tokenizer, True, 0, {"text": text})
    assert continued(job.body) == text and text + seam(text, answer) + answer == whole
    assert prompt_ids_of(job.body, job.prompt_ids, tokenizer) == tokenizer.encode(text)


def test_a_prompt_for_a_teachers_text_alone_is_no_ids_of_another_tokenizer() -> None:
    """Only ids would be other words there; from nothing there are none of ours, and --tokenizer is the teacher's."""
    tokenizer, local = ByteTokenizer(), Settings("http://127.0.0.1:1/v1", "m", KEY)
    for source, prompt in (({"data": "packed"}, "Once"), ({"prompts": "p.jsonl"}, "Once"), ({}, [tokenizer.eot_id, *b"Once"])):
        cfg = HarvestConfig(top_logprobs=0, **source)
        job = request_of(cfg, local, tokenizer, False, 0, {"ids": [*b"Once"]})
        assert job.body["prompt"] == prompt and job.prompt_ids == [*b"Once"]


@pytest.mark.parametrize(
    "line",
    [
        '{"other": 1}',
        '{"text": 5}',
        '{"prompt": ["a"]}',
        '{"messages": "hi"}',
        '{"messages": ["hi"]}',
        '{"messages": [{"content": "hi"}]}',
        '{"messages": [{"role": "user", "content": 5}]}',
        '{"messages": []}',
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_lines_that_are_no_prompts(tmp_path: Path, line: str) -> None:
    cfg = config(tmp_path, 2)
    Path(str(cfg.prompts)).write_text(f'{{"prompt": "a", "text": null}}\n\n{line}\n')
    with FaultyServer() as server, pytest.raises(UserError, match=r"p\.jsonl:3: expected a JSON object"):
        quiet(cfg, server.url)
