"""Teacher's answers as packed shards: alignment, missing rows, sizes and versions, and that `PackedData` reads them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ae.chunks import PackedData
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from kd.kd_batcher import KDShard, KDWriter, document, pack_answers
from kd.prompts import CONTINUE
from kd.records import MISSING, TeacherRecord, TokenTable, parse_answer
from kd.store import Store, StoredAnswer

META = {"tokenizer_fingerprint": "f", "tokenizer": "t", "eot_id": 0, "pad_id": 1, "teacher": ["m"]}


def tops(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Top ids, and logprobs -1, -2, ... for those that are known."""
    ids = np.array(rows)
    return ids, np.where(ids == MISSING, np.nan, -np.arange(1.0, ids.shape[1] + 1)).astype(np.float32)


def write(folder: Path, vocab_size: int = 100, k: int = 2) -> None:
    writer = KDWriter(folder, vocab_size, k)
    writer.add(np.array([5, 6, 0]), *tops([MISSING, MISSING, MISSING], [6, 7, 8], [0, 9, MISSING]))
    writer.add(np.array([7, 0]), *tops([7], [MISSING]))
    writer.close(**META)


@pytest.mark.parametrize(("vocab_size", "bytes_a_token"), [(100, 2 + 4 * 2), (65_536, 2 + 6 * 2), (151_936, 4 + 6 * 2)])
def test_windows_are_aligned_with_packed_data(tmp_path: Path, vocab_size: int, bytes_a_token: int) -> None:
    write(tmp_path, vocab_size)
    shard, data = KDShard(tmp_path), PackedData(tmp_path)
    assert (data.tokens == shard.tokens).all()
    assert shard.doc_starts.tolist() == data.doc_starts.tolist() == [0, 3]
    tokens, ids, logprobs = shard.windows([0, 1], 4)
    assert tokens.tolist() == [[5, 6, 0, 7], [6, 0, 7, 0]]
    assert ids.tolist()[1] == [[6, 7], [0, 9], [7, -1], [-1, -1]]
    assert ids[0, 0].tolist() == [-1, -1]
    assert logprobs[1][ids[1] >= 0].tolist() == [-1, -2, -1, -2, -1]
    assert shard.meta["kd_scored"] == 3
    assert shard.kind == "logprobs"
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("to*.bin"))  # tokens, top_ids, top_logprobs
    assert on_disk == shard.n_tokens * bytes_a_token


def test_float16_keeps_what_it_says(tmp_path: Path) -> None:
    logprobs = -np.geomspace(1e-4, 12, 50, dtype=np.float32)[:, None]
    writer = KDWriter(tmp_path, 100, 1)
    writer.add(np.zeros(50, dtype=np.int64), np.zeros((50, 1), dtype=np.int64), logprobs)
    writer.close(**META)
    kept = KDShard(tmp_path).windows([0], 50)[2][0].numpy()
    assert np.abs(kept - logprobs)[(logprobs > -1) & (logprobs < -0.5)].max() < 2.5e-4
    assert np.abs(kept - logprobs).max() < 0.004


def test_a_teacher_without_logprobs_gives_a_sequence_shard(tmp_path: Path) -> None:
    writer = KDWriter(tmp_path, 100)
    writer.add(np.array([5, 0]), *tops([], []))
    writer.close(**META)
    shard = KDShard(tmp_path)
    assert (shard.kind, shard.k) == ("sequence", 0)
    assert shard.windows([0], 2)[1].shape == (1, 2, 0)
    assert not (tmp_path / "top_ids.bin").exists()


def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    writer = KDWriter(tmp_path, 100)
    with pytest.raises(ValueError, match="id 100 is outside"):
        writer.add(np.array([5]), *tops([100]))


def damage(folder: Path, **changes: Any) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changes}))


def test_damage_is_told(tmp_path: Path) -> None:
    def expect(message: str) -> None:
        with pytest.raises(UserError, match=message):
            KDShard(tmp_path)

    expect("meta.json is missing")
    write(tmp_path)
    (tmp_path / "top_logprobs.bin").write_bytes(b"x" * 7)
    expect("top_logprobs.bin has 7 bytes, expected 20")
    (tmp_path / "top_ids.bin").unlink()
    expect("top_ids.bin is missing")
    damage(tmp_path, kd_dtype="int8")
    expect("expected kd_dtype to be uint16")
    damage(tmp_path, kd_k=1 << 62)  # 2^62 times 5 tokens times 2 bytes overflow 64 bits
    expect("expected kd_k")
    damage(tmp_path, kd_k=2, teacher="m")
    expect("expected teacher to be a list of names")
    damage(tmp_path, kd_kind=None)
    expect("without a teacher's rows")
    damage(tmp_path, version=2)
    expect("format version 2")
    (tmp_path / "meta.json").write_text("[]")
    expect("expected a JSON object, got a list")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokens.bin", np.full(5, 100, np.uint16), "token id 100, outside the vocabulary of 100"),
        ("top_ids.bin", np.full((5, 2), 65_534, np.uint16), "token id 65534, outside"),
        ("top_logprobs.bin", np.full((5, 2), np.nan, np.float16), "no logprob"),
        ("top_logprobs.bin", np.full((5, 2), 0.5, np.float16), "no logprob"),
    ],
)
def test_damaged_rows_are_told_when_they_are_read(tmp_path: Path, name: str, content: np.ndarray, message: str) -> None:
    write(tmp_path)
    (tmp_path / name).write_bytes(content.tobytes())
    shard = KDShard(tmp_path)
    with pytest.raises(UserError, match=message):
        shard.windows([0], 5)


def record(prompt: list[int], sampled: list[int], rows: np.ndarray, logprobs: np.ndarray) -> TeacherRecord:
    return TeacherRecord(
        "generate", "m", "", "stop", np.array(prompt, np.int32), np.array(sampled, np.int32),
        np.zeros(len(sampled), np.float32), rows.astype(np.int32), logprobs,
    )  # fmt: skip


def test_documents() -> None:
    """Row t speaks of token t; the start-of-text goes, the end-of-text comes unless the teacher wrote it."""
    ids, top_ids, _, cut = document(record([1, 5], [6, 7], *tops([6, 8], [7, 9])), eot_id=1)
    assert ids.tolist() == [5, 6, 7, 1] and not cut
    assert top_ids.tolist() == [[-1, -1], [6, 8], [7, 9], [-1, -1]]
    ids, top_ids, _, _ = document(record([1], [6, 1], *tops([6], [1])), eot_id=1)
    assert ids.tolist() == [6, 1]
    assert top_ids.tolist() == [[6], [1]]
    answer = record([1, 5], [6, 7], *tops([6, 8], [7, 9]))
    reasons = {"length": True, "max_tokens": True, "abort": True, "stop": False, "STOP": False, "eos_token": False, None: False}
    assert {r: document(dataclasses.replace(answer, finish_reason=r), 1)[3] for r in reasons} == reasons
    assert document(dataclasses.replace(answer, source="score"), 1)[3]


def test_the_end_of_a_cut_answer_is_marked(tmp_path: Path) -> None:
    writer = KDWriter(tmp_path, 20, 2)
    for cut in (True, False):
        writer.add(np.array([5, 6, 1]), *tops([-1, -1], [6, 8], [-1, -1]), cut)
    writer.close(**META)
    shard = KDShard(tmp_path)
    assert shard.cut([0, 1], 5).tolist() == [[False, False, True, False, False], [False, True, False, False, False]]


def answers(tokenizer: TokenizerAdapter, texts: list[str]) -> list[StoredAnswer]:
    """Answers in the shape of our own server, the second-best word always the end of text."""
    out = []
    for i, text in enumerate(texts):
        ids = tokenizer.encode(text)
        logprobs = {
            "tokens": [tokenizer.decode([t]) for t in ids], "token_logprobs": [-0.5] * len(ids), "token_ids": ids,
            "top_token_ids": [[t, tokenizer.eot_id] for t in ids], "top_token_logprobs": [[-0.5, -2.0]] * len(ids),
        }  # fmt: skip
        choice = {"text": text, "finish_reason": "length", "token_ids": ids, "logprobs": logprobs}
        request = {"model": "m", "prompt": [tokenizer.eot_id], "logprobs": 2}
        out.append(StoredAnswer(b"%d" % i, "m", 1, request, None, {"model": "m", "choices": [choice]}, 1, len(ids), 0.0, 0.0))
    return out


def test_answers_to_one_prompt_alone_make_no_two_splits(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    asked = {"model": "m", "prompt": "the same"}
    stored = [dataclasses.replace(answer, request=asked) for answer in answers(tokenizer, ["one", "two", "three"])]
    with pytest.raises(UserError, match=r"3 usable answers leave nothing for train \(all to one prompt, and a prompt"):
        pack_answers(stored, tokenizer, tmp_path / "kd", k=2)


def test_answers_become_two_splits(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    texts = [f"def f{i}(): return {i}" for i in range(60)]
    broken = answers(tokenizer, ["abc"])[0]
    broken.answer["choices"][0]["text"] = "something else"
    stored = [*answers(tokenizer, [*texts, texts[0]]), broken]
    counts = pack_answers(stored, tokenizer, tmp_path / "kd", k=3, val_split=0.3, seq_len=32)
    assert counts["train documents"] + counts["val documents"] == 60
    assert counts["duplicates"] == 1
    assert counts["left out: the tokens' bytes differ from the text"] == 1
    train, val = PackedData.pair(tmp_path / "kd")
    assert TokenizerAdapter.load(train.tokenizer).fingerprint == train.fingerprint == tokenizer.fingerprint
    found = {tokenizer.decode(doc) for data in (train, val) for doc in np.split(data.tokens, data.doc_starts[1:])}
    assert found == set(texts)
    shard = KDShard(tmp_path / "kd" / "train")
    tokens, top_ids, _ = shard.windows([0], shard.n_tokens)
    told = tokens[0] != tokenizer.eot_id
    assert (top_ids[0, told, 0] == tokens[0, told]).all()
    assert (top_ids[0, told, 1] == tokenizer.eot_id).all()
    assert (top_ids[0, ~told] == MISSING).all()
    assert shard.meta["teacher"] == ["m"]

    again = pack_answers(reversed(stored), tokenizer, tmp_path / "kd", k=3, val_split=0.3)
    assert again["val documents"] == counts["val documents"]  # the split does not depend on the order


def test_prompts_of_another_tokenizer_are_left_out_of_its_text_alone(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    """They were sent as ids, which are other words here; the answer's own ids tell whose they are."""
    prompts = [f"import os{i}\n" for i in range(40)]
    for ours in (True, False):
        made = []
        for i, answer in enumerate(answers(tokenizer, [f"x = {i}" for i in range(40)])):
            choice = answer.answer["choices"][0]
            if not ours:
                choice["token_ids"] = choice["logprobs"]["token_ids"] = [t + 1 for t in choice["token_ids"]]
            ids = tokenizer.encode(prompts[i])
            request = {"model": "m", "prompt": [tokenizer.eot_id, *ids]}
            made.append(dataclasses.replace(answer, request=request, prompt_ids=ids if i % 2 else None))
        counts = pack_answers(made, tokenizer, tmp_path / "kd", k=0, val_split=0.3)
        left_out = counts.get("prompts left out: ids of a tokenizer that may be another", 0)
        texts = [
            tokenizer.decode(doc)
            for data in PackedData.pair(tmp_path / "kd") if data.n_tokens
            for doc in np.split(data.tokens, data.doc_starts[1:])
        ]  # fmt: skip
        assert sorted(texts) == sorted((prompts[i] if ours else "") + f"x = {i}" for i in range(40))
        assert (left_out > 0) is not ours


def test_what_an_answer_begins_with_does_not_move_its_prompt_to_the_other_split(
    tmp_path: Path, tokenizer: TokenizerAdapter
) -> None:
    made = []
    for i in range(40):
        request = {"model": "m", "messages": [{"role": "user", "content": f"{CONTINUE}go on {i} now"}]}
        for text in (f"then {i}", f", and {i}"):  # the first is set off by a space
            made.append(dataclasses.replace(answers(tokenizer, [text])[0], request=request))
    pack_answers(made, tokenizer, tmp_path / "kd", k=2, val_split=0.3)
    train, val = (
        sorted(tokenizer.decode(doc) for doc in np.split(data.tokens, data.doc_starts[1:]))
        for data in PackedData.pair(tmp_path / "kd")
    )
    assert sorted(train + val) == sorted(f"go on {i} now{more} {i}" for i in range(40) for more in (" then", ", and"))
    asked = [{int(text.split()[2]) for text in split} for split in (train, val)]
    assert len(asked[1]) > 5 and not asked[0] & asked[1]


def test_begin_of_text_is_no_part_of_a_document() -> None:
    scored = dataclasses.replace(record([], [9, 5, 6], *tops([6, 8], [7, 9], [8, 9])), source="score")
    ids, top_ids, _, _ = document(scored, eot_id=1, start_id=9)
    assert ids.tolist() == [5, 6, 1] and top_ids[:2].tolist() == [[7, 9], [8, 9]]


def test_what_is_written_to_a_prompt_lies_in_one_split_whatever_is_known_of_it(
    tmp_path: Path, tokenizer: TokenizerAdapter
) -> None:
    """Ids or not, a chat or a text; and the pieces of a document that was scored."""
    made: list[StoredAnswer] = []
    for i in range(40):
        for asked in ({"prompt": f"prompt {i}"}, {"messages": [{"role": "user", "content": f"say {i}"}]}):
            for answer in answers(tokenizer, [f"answer {i} {j}" for j in range(3)]):
                made.append(dataclasses.replace(answer, request={"model": "m", **asked}))
    ids = [tokenizer.encode(f"document {i}") for i in range(40)]
    for i in range(40):
        for piece in answers(tokenizer, [f"piece {i} {j}" for j in range(3)]):
            own = piece.answer["choices"][0].pop("token_ids")
            request = {"model": "m", "prompt": own, "echo": True, "max_tokens": 0}
            made.append(dataclasses.replace(piece, request=request, prompt_ids=ids[i]))
    pack_answers(made, tokenizer, tmp_path / "kd", k=2, val_split=0.3)
    texts = {}
    for data in PackedData.pair(tmp_path / "kd"):
        texts[data.folder.name] = [tokenizer.decode(doc) for doc in np.split(data.tokens, data.doc_starts[1:])]
    assert sum(map(len, texts.values())) == len(made)
    of = {name: {re.sub(r" \d+(<.*>)?$", "", text) for text in own} for name, own in texts.items()}
    assert len(of["val"]) > 10 and not of["train"] & of["val"]
    assert any(text.startswith("prompt 1") for name in of for text in of[name])  # the prompt is part of the text
    assert KDShard(tmp_path / "kd" / "train").drawn is False  # what was scored is no draw


def test_draws_are_told_from_other_text(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    for temperature, drawn in ((1.0, True), (0.7, False)):
        stored = [
            dataclasses.replace(answer, request={**answer.request, "temperature": temperature})
            for answer in answers(tokenizer, [f"x = {i}" for i in range(40)])
        ]
        pack_answers(stored, tokenizer, tmp_path / "kd", k=2, val_split=0.3)
        assert KDShard(tmp_path / "kd" / "train").drawn is drawn


def test_an_answer_that_a_filter_cut_has_no_end(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    record = parse_answer({}, answers(tokenizer, ["x = 1"])[0].answer, TokenTable(tokenizer))
    ends = {reason: document(dataclasses.replace(record, finish_reason=reason), 0)[3] for reason in ("stop", "content_filter")}
    assert ends == {"stop": False, "content_filter": True}


def test_nothing_usable_and_foreign_folders(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    with Store(tmp_path / "s.sqlite") as store, pytest.raises(UserError, match="the store is empty"):
        pack_answers(store, tokenizer, tmp_path / "kd")
    assert not (tmp_path / "kd").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    stored = answers(tokenizer, [f"x = {i}" for i in range(40)])
    with pytest.raises(UserError, match="no shard"):
        pack_answers(stored, tokenizer, tmp_path / "mine", val_split=0.3)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["mine"]
