"""Packed data is refused when it is not whole; windows cover an epoch once and depend on (seed, step) alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import World

from ae.chunks import PackedData, PackedWriter, TrainWindows, permuted, tokenizer_record
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError

META = {"tokenizer_fingerprint": "f" * 32, "tokenizer": "../tokenizer", "eot_id": 0, "pad_id": 1}


@pytest.fixture
def data(tmp_path: Path) -> PackedData:
    writer = PackedWriter(tmp_path / "train", 100)
    for n in range(1, 14):  # 91 tokens, 0..90
        writer.add(np.arange(writer.n_tokens, writer.n_tokens + n))
    writer.close(**META)
    return PackedData(tmp_path / "train")


def test_round_trip(data: PackedData) -> None:
    assert data.tokens.tolist() == list(range(91))
    assert data.doc_starts.tolist() == [n * (n + 1) // 2 for n in range(13)]
    assert (data.n_docs, data.tokens.dtype, data.windows(10)) == (13, np.uint16, 9)
    batches = list(data.batches(10, 4))
    assert [len(b) for b in batches] == [4, 4, 1]
    assert torch.cat(batches).flatten().tolist() == list(range(90))
    assert torch.cat(list(data.batches(10, 4, limit=5))).flatten().tolist() == list(range(50))


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    writer = PackedWriter(tmp_path, 151_936)
    writer.add(np.array([151_643, 65_536]))
    writer.close(**META)
    assert PackedData(tmp_path).tokens.tolist() == [151_643, 65_536]


def test_an_epoch_has_every_window_once(data: PackedData) -> None:
    windows = TrainWindows(data, 8, 2, seed=3)
    assert (windows.per_epoch, windows.steps_per_epoch) == (10, 5)
    for epoch in range(3):
        rows = torch.cat([windows.batch(epoch * 5 + i) for i in range(5)])
        assert (rows[:, 1:] == rows[:, :1] + torch.arange(1, 8)).all()  # whole runs of tokens
        starts = sorted(rows[:, 0].tolist())
        assert [s - starts[0] for s in starts] == [8 * i for i in range(10)]  # side by side, at a random phase


@pytest.mark.parametrize("size", [*range(1, 18), 63, 64, 65, 1000])
def test_permuted_is_a_permutation(size: int) -> None:
    orders = [
        [permuted(i, size, keys) for i in range(size)]
        for keys in np.random.default_rng(0).integers(1 << 32, size=(2, 4)).tolist()
    ]
    for order in orders:
        assert sorted(order) == list(range(size))
    if size == 1000:  # and a random-looking one: chance puts about one value in its place, and neighbours far apart
        assert orders[0] != orders[1]
        assert sum(i == to for i, to in enumerate(orders[0])) < 8
        assert np.abs(np.diff(orders[0])).mean() == pytest.approx(1000 / 3, rel=0.15)


def test_a_batch_depends_on_seed_and_step_alone(data: PackedData) -> None:
    batches = [TrainWindows(data, 8, 3, seed=1).batch(step) for step in (7, 2, 7)]
    fresh = TrainWindows(data, 8, 3, seed=1)
    for step, batch in zip((7, 2, 7), batches, strict=True):
        assert torch.equal(fresh.batch(step), batch)
    assert not torch.equal(TrainWindows(data, 8, 3, seed=2).batch(7), batches[0])


def damage(folder: Path, what: str) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    if what == "no meta":
        (folder / "meta.json").unlink()
    elif what == "not json":
        (folder / "meta.json").write_text("{")
    elif what == "short":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1])
    elif what == "docs":
        (folder / "docs.bin").write_bytes(np.arange(12, -1, -1, dtype=np.int64).tobytes())
    elif what == "no docs":
        (folder / "docs.bin").unlink()
    else:
        (folder / "meta.json").write_text(json.dumps({**meta, **json.loads(what)}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no meta", "meta.json is missing"),
        ("not json", "cannot be read"),
        ("short", "has 181 bytes, expected 182"),
        ("no docs", "is missing, expected 104"),
        ("docs", "does not say where documents begin"),
        ('{"format": "x"}', "not packed data of this project"),
        ('{"version": 99}', "format version 99"),
        ('{"dtype": "float64"}', "expected dtype to be uint16, as vocab_size 100 wants it, got 'float64'"),
        ('{"n_tokens": "many"}', "expected n_tokens to be a whole number from 0"),
        ('{"n_tokens": 1152921504606846976}', "has 182 bytes, expected 2305843009213693952"),
        ('{"n_docs": -1}', "expected n_docs to be a whole number from 0"),
        ('{"pad_id": 100}', "expected pad_id to be a whole number from 0 to 99, got 100"),
        ('{"eot_id": null}', "expected eot_id"),
        ('{"tokenizer": ["/"]}', "expected tokenizer to be a text"),
    ],
)
def test_damaged_data_is_refused(data: PackedData, what: str, message: str) -> None:
    damage(data.folder, what)
    with pytest.raises(UserError, match=message):
        PackedData(data.folder)


def test_too_few_tokens(data: PackedData) -> None:
    with pytest.raises(UserError, match="too few for windows of 64"):
        TrainWindows(data, 64, 1, 0)


def test_a_split_of_less_than_one_window(data: PackedData) -> None:
    data.require_window(91)
    for read in (lambda: data.require_window(92), lambda: list(data.batches(92, 4))):
        with pytest.raises(UserError, match="91 tokens, less than one window of 92; pack the data with a higher --val_split"):
            read()


def test_a_token_outside_the_vocabulary_is_told_when_it_is_read(data: PackedData) -> None:
    raw = bytearray((data.folder / "tokens.bin").read_bytes())
    raw[2 * 40 + 1] = 1  # token 40 is 296 now
    (data.folder / "tokens.bin").write_bytes(raw)
    damaged = PackedData(data.folder)
    for read in (lambda: list(damaged.batches(10, 4)), lambda: TrainWindows(damaged, 8, 11, 0).batch(0)):
        with pytest.raises(UserError, match="token id 296, outside the vocabulary of 100"):
            read()


def test_the_tokenizer_travels_with_the_checkpoint(
    data: PackedData, tokenizer: TokenizerAdapter, packed: World, tmp_path: Path
) -> None:
    assert tokenizer_record(data, tmp_path / "ck") == {"fingerprint": "f" * 32, "path": "../tokenizer"}  # a name, no folder
    shutil.copytree(packed.root / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(UserError, match="another tokenizer"):
        tokenizer_record(data, tmp_path / "ck")
    damage(data.folder, json.dumps({"tokenizer_fingerprint": tokenizer.fingerprint}))
    (tmp_path / "tokenizer" / "diary.txt").write_text("private")
    record = tokenizer_record(PackedData(data.folder), tmp_path / "ck")
    shutil.rmtree(tmp_path / "tokenizer")
    assert TokenizerAdapter.load(tmp_path / "ck" / record["path"]).fingerprint == record["fingerprint"]
    names = {path.name for path in (tmp_path / "ck" / record["path"]).iterdir()}
    assert names <= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}  # what is a tokenizer's, no more


def test_every_epoch_has_an_order_of_its_own(data: PackedData) -> None:
    windows = TrainWindows(data, 8, 2, seed=3)
    starts = [[s for i in range(5) for s in windows.starts(5 * epoch + i)] for epoch in range(4)]
    assert len({min(x) for x in starts}) > 1 and len({tuple(s - min(x) for s in x) for x in starts}) == 4
