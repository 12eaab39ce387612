"""What evaluation tells of tokens by their place and against a teacher: hand-made windows with known answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_LM, World, make_student, make_token_model, run_script

from ae.ae_model import load_ae
from ae.chunks import PackedData, PackedWriter
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from kd.kd_batcher import KDWriter
from student import train_student
from student.brier import brier_lm, collisions, ngram_probabilities
from student.losses import student_energy_loss
from student.student_model import load_student
from tools import evaluate
from tools.metrics import BUCKETS, MeanBy, bucket, gaps, places, word_of

META = {"tokenizer_fingerprint": "f", "tokenizer": "t", "eot_id": 0, "pad_id": 1, "teacher": ["t"]}


def split(folder: Path, *documents: list[int]) -> PackedData:
    writer = PackedWriter(folder, 320)
    for ids in documents:
        writer.add(np.array(ids))
    writer.close(**META)
    return PackedData(folder)


def test_buckets() -> None:
    assert BUCKETS == ("0-15", "16-31", "32-63", "64-127", "128-255", "256-511", "512+")
    assert bucket(np.array([0, 15, 16, 31, 32, 255, 256, 511, 512, 9999])).tolist() == [0, 0, 1, 1, 2, 4, 5, 5, 6, 6]


def test_distance_from_the_documents_start(tmp_path: Path) -> None:
    data = split(tmp_path / "s", [5] * 10, [6] * 70)  # the second document begins at token 10
    none = np.full(320, -1)
    first, second = (places(data, none, np.array([start]), 40) for start in (0, 40))
    assert first.by_distance[0].tolist() == [0] * 10 + [0] * 16 + [1] * 14 == first.by_seen[0].tolist()
    # The second window's tokens stand 30..69 into a document that the window shows from 0 on: only where both lengths are
    # in one bucket, 32-63, is it clear what to call them: from 32 seen tokens to 63 in the document.
    assert second.by_seen[0].tolist() == [0] * 16 + [1] * 16 + [2] * 8
    assert second.by_distance[0].tolist() == [-1] * 32 + [2 if 30 + t < 64 else -1 for t in range(32, 40)]
    both = places(data, none, np.array([0, 40]), 40)
    assert torch.equal(both.by_distance, torch.cat([first.by_distance, second.by_distance]))
    near = places(data, none, np.array([15]), 40)  # 5 tokens into its document: the first 11 are in 0-15 either way
    assert near.by_distance[0, :20].tolist() == [0] * 11 + [-1] * 5 + [1] * 4


def test_gaps() -> None:
    rows = np.array([[7, 8, 7, 7, 9, 8], [1, 1, 1, 2, 3, 2]])
    assert gaps(rows).tolist() == [[6, 6, 2, 1, 6, 4], [6, 1, 1, 6, 6, 2]]


def test_words_repeated_from_far_away(tmp_path: Path) -> None:
    words = np.full(320, -1)
    words[[10, 11, 12]] = [0, 0, 1]  # 10 and 11 are one word, with and without a space in front
    filler = [99]
    document = [10, *filler * 16, 11, 12, *filler * 3, 12, *filler * 20, 12, 10]  # a second document has none of it before
    data = split(tmp_path / "s", document, [10, *filler * 40, 12])
    window = places(data, words, np.array([0]), data.n_tokens).far_copy[0]
    at = (window == 0).nonzero()[:, 0].tolist()
    assert at == [17, 43, 44]  # 11 after 10, 17 back; not 12 at 22, 4 back; 12 at 43, 21 back; 10 at 44, after 11 at 17
    assert set(window.tolist()) == {0, -1}
    # seen from token 20 on, the words before are not there to copy: only 12, at 22 and 43
    assert (places(data, words, np.array([20]), 25).far_copy[0] == 0).nonzero()[:, 0].tolist() == [23]


def test_word_of() -> None:
    pieces = [b"abc", b" abc", b"ab", b"a b", b"_x1\n", b"\xc3\xa9t\xc3\xa9", b"a.bc", b"\xff\xfe\xfd", b"123", b""]
    tokenizer: Any = SimpleNamespace(size=len(pieces), model_vocab_size=12, token_bytes=lambda i: pieces[i])
    assert word_of(tokenizer).tolist() == [0, 0, -1, -1, 1, 2, -1, -1, 3, -1, -1, -1]


def test_means() -> None:
    mean = MeanBy(3)
    for values, classes in (([1.0, 2.0, 4.0], [0, -1, 2]), ([3.0, 5.0, 6.0], [0, 2, 2])):
        mean.add(torch.tensor([values]), torch.tensor([classes]))
    assert mean.means() == [2.0, None, 5.0] and mean.count.tolist() == [2, 0, 3]


def test_figures_by_place_and_against_the_teacher(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    """Against loops over tokens, on a shard whose teacher told three words at two of three positions."""
    rng, writer = np.random.default_rng(0), KDWriter(tmp_path / "val", 320, k=3)
    for length in (50, 90, 61):
        top = np.stack([rng.permutation(320)[:3] for _ in range(length)])
        top[::3] = -1
        logprobs = np.log(np.full((length, 3), [0.5, 0.2, 0.1]))
        writer.add(rng.integers(2, 300, length), top, logprobs)
    writer.close(**META)
    data, models = PackedData(tmp_path / "val"), {"token_model": make_token_model(), "student": make_student()}
    result = evaluate.evaluate(models, data, tokenizer, None, torch.device("cpu"), first=8)  # type: ignore[arg-type]
    ids, rows, starts = data.tokens.astype(int), np.memmap(tmp_path / "val" / "top_ids.bin", np.uint16, "r"), [0, 50, 140]
    rows, words = rows.reshape(-1, 3).astype(int), word_of(tokenizer)
    for name, model in models.items():
        by_distance: dict[str, list[float]] = {}
        kls, far = [], []
        for w in range(3):  # windows of 64 of 201 tokens
            tokens = torch.from_numpy(ids[w * 64 : w * 64 + 64])[None]
            logp = (model.hidden(tokens)[0] @ model.table.T).log_softmax(-1).detach()
            for t in range(8, 64):
                at, nll = w * 64 + t, -logp[t, tokens[0, t]].item()
                begin = max(s for s in starts if s <= at)
                distance, seen = at - begin, min(at - begin, t)
                if bucket(np.array(distance)) == bucket(np.array(seen)):
                    by_distance.setdefault(BUCKETS[int(bucket(np.array(seen)))], []).append(nll)
                before = [at - s for s in range(at - seen, at) if words[ids[s]] == words[ids[at]]]
                if words[ids[at]] >= 0 and before and min(before) > 16:
                    far.append(nll)
                if (at - begin) % 3:
                    q = logp[t, rows[at]].exp()
                    p = torch.tensor([0.5, 0.2, 0.1])
                    kls.append((p * (p / q).log()).sum().item() + 0.2 * np.log(0.2 / (1 - q.sum().item())))
        figures = result[name]
        means = {key: value for key, value in figures["nll_by_distance"].items() if value is not None}
        assert means == pytest.approx({key: np.mean(values) for key, values in by_distance.items()}, rel=0.02)  # bfloat16
        assert {key: figures["tokens_by_distance"][key] for key in means} == {k: len(v) for k, v in by_distance.items()}
        assert sum(figures["tokens_by_seen"].values()) == figures["tokens"] == 3 * 56
        assert (figures["kl_to_teacher"], figures["kl_scored"]) == (pytest.approx(np.mean(kls), rel=0.02), len(kls))
        assert figures["far_copy_tokens"] == len(far)
        assert figures["nll_far_copy"] == (pytest.approx(np.mean(far), rel=0.02) if far else None)


def test_one_first_for_models_of_different_k(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    data = split(tmp_path / "s", list(range(2, 202)))
    model = make_token_model(seq_len=16, k=4)
    two = [evaluate.evaluate({"m": model}, data, tokenizer, None, torch.device("cpu"), first)["m"] for first in (None, 8)]
    assert [figures["tokens"] for figures in two] == [3 * 60, 3 * 56]
    for first in (6, 0, 64):
        with pytest.raises(UserError, match="multiple of k = 4"):
            evaluate.evaluate({"m": model}, data, tokenizer, None, torch.device("cpu"), first)


def test_ngrams_are_drawn_in_windows_spread_over_all(
    tmp_path: Path, tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a document or two would tell how often a model repeats itself, and all the others how often it is right."""
    drawn: list[torch.Tensor] = []

    def kept(model: Any, tokens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        drawn.extend(tokens)
        return collisions(model, tokens, starts)

    monkeypatch.setattr(evaluate, "collisions", kept)
    monkeypatch.setattr(evaluate, "DRAWN_IN", 3)
    data = split(tmp_path / "s", [2 + i % 300 for i in range(9 * 64)])
    figures = evaluate.evaluate({"m": make_token_model()}, data, tokenizer, None, torch.device("cpu"))["m"]
    assert figures["windows"] == 9 and figures["brier_windows"] == 3
    assert {int(row[0]) for row in drawn} == {int(data.tokens[i * 64]) for i in (0, 4, 8)}


def test_the_energy_head_is_held_to_the_same(tmp_path: Path) -> None:
    data, model, cpu = split(tmp_path / "s", list(range(2, 202))), make_student(head="energy"), torch.device("cpu")
    assert evaluate.evaluate_energy(model, data, None, cpu) == evaluate.evaluate_energy(model, data, None, cpu, 4)
    for first in (6, 0, 64):
        with pytest.raises(UserError, match="multiple of k = 4"):
            evaluate.evaluate_energy(model, data, None, cpu, first)
    with pytest.raises(UserError, match="63 tokens, less than one window of 64"):
        evaluate.evaluate_energy(model, split(tmp_path / "short", [5] * 63), None, cpu)


def test_the_trainers_energy_is_a_mean_over_windows(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of 9 windows in batches of 8 and 1, each counts alike."""
    flags = [*world.train_flags(tmp_path), *SMALL_LM, "--ae_ckpt", world.ae, "--head", "energy", "--no-local_memory"]
    flags += ["--no-latent_bypass", "--max_steps", "1", "--eval_windows", "9", "--no-bf16", "--no-compile"]
    assert run_script(train_student, *flags) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["energy"]
    model, frozen = load_student(tmp_path / "checkpoints" / "student.pt")[0].eval(), load_ae(world.ae)[0]
    torch.manual_seed(0)
    energies = []
    for tokens in PackedData(world.data / "val").batches(32, 8, 9):
        energies += [student_energy_loss(model, frozen, tokens, torch.zeros(len(tokens)))[0].item()] * len(tokens)
    assert told == pytest.approx(np.mean(energies), rel=1e-4) and len(energies) == 9
    assert abs(energies[0] - energies[8]) > 0.001 * told  # else a mean over batches would be the same


def test_a_token_outside_the_vocabulary(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    folder = split(tmp_path / "s", list(range(2, 202))).folder
    raw = np.fromfile(folder / "tokens.bin", np.uint16)
    raw[100] = 999
    raw.tofile(folder / "tokens.bin")
    with pytest.raises(UserError, match="token id 999, outside the vocabulary of 320"):
        evaluate.evaluate({"m": make_token_model()}, PackedData(folder), tokenizer, None, torch.device("cpu"))


def test_where_the_figures_go_is_checked_before_they_are_made(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--student", world.student, "--data", world.data, "--output", tmp_path / "missing" / "evaluate.json"]
    assert run_script(evaluate, *flags) == 2
    captured = capsys.readouterr()
    assert "there is no folder" in captured.err and not captured.out
    assert run_script(evaluate, *flags[:-1], tmp_path) == 2
    captured = capsys.readouterr()
    assert "is a folder; name a file" in captured.err and not captured.out


def test_the_table_shows_them(world: World, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--student", world.student, "--data", world.data, "--max_windows", 20, "--first", 8]
    assert run_script(evaluate, *flags, "--output", tmp_path / "e.json") == 0
    out = capsys.readouterr().out
    assert "NLL at document's token 16-31" in out and "KL to the teacher" not in out
    figures = json.loads((tmp_path / "e.json").read_text())["student"]
    assert figures["tokens"] == 20 * 24 == sum(figures["tokens_by_seen"].values()) and "kl_to_teacher" not in figures


def test_the_figures_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On three windows of 64 tokens; no n-grams drawn, so that Brier-n is 2 p."""
    rng = np.random.default_rng(0)
    ids = rng.integers(6, 300, 200)
    ids[10::30] = 5  # a word, 30 tokens apart: in the three windows it repeats itself from far away 4 times
    data = split(tmp_path / "s", ids.tolist())
    lengths = rng.integers(0, 6, 320)
    tokenizer = SimpleNamespace(
        byte_lengths=lengths, size=320, model_vocab_size=320, token_bytes=lambda i: b"word" if i == 5 else b"."
    )
    monkeypatch.setattr(evaluate, "collisions", lambda model, tokens, starts: torch.zeros(4, len(tokens), len(starts)))
    monkeypatch.setattr(evaluate, "has_fast_bf16", lambda device: False)
    model = make_student()
    found = evaluate.evaluate({"m": model}, data, tokenizer, None, torch.device("cpu"), 8)["m"]
    windows = torch.from_numpy(data.tokens[:192].astype(int)).view(3, 64)
    with torch.no_grad():
        nll, swapped = model.nll(windows, 8), model.nll(windows, 8, latents_of=windows.roll(-1, 0))
        right = (model.hidden(windows) @ model.table.T).argmax(-1)[:, 8:] == windows[:, 8:]
    assert found["nats_per_token"] == pytest.approx(nll.mean().item(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nll.sum().item() / math.log(2) / lengths[windows[:, 8:]].sum(), rel=1e-5)
    assert found["latent_swap_cost"] == pytest.approx((swapped - nll).mean().item(), rel=1e-3)
    assert found["accuracy"] == pytest.approx(right.float().mean().item())
    p, zero = ngram_probabilities(nll), torch.zeros(4)
    assert found["brier_lm_all"] == pytest.approx(brier_lm(p.mean((1, 2)), zero), rel=1e-4)
    assert found["brier_lm"] == pytest.approx(brier_lm(p[..., ::4].mean((1, 2)), zero), rel=1e-4)
    far = [nll[at // 64, at % 64 - 8].item() for at in (40, 100, 160, 190)]
    assert (found["far_copy_tokens"], found["nll_far_copy"]) == (4, pytest.approx(np.mean(far), rel=1e-5))
