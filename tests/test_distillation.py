"""`--use_kd` end to end: a token-level model exported, served over HTTP, harvested, packed, and distilled from."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_LM, World, make_student, run_script
from faulty_server import FaultyServer

from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from configs.schema import LMTrainConfig, StudentTrainConfig
from kd import harvest as harvest_script
from kd import kd_batcher
from kd.kd_batcher import KDShard, KDWriter
from kd.losses import bucket_kl, mean_kl
from kd.prompts import CONTINUE
from kd.records import MISSING
from kd.store import Store
from student import baseline, train_student
from student.baseline import load_token_model
from student.distillation import Teacher, open_teacher, shift_right
from student.losses import student_loss
from student.train_student import pad_left
from tools import data_packing, export_hf, train_tokenizer


@pytest.fixture(scope="module")
def teacher_url(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the small world's token-level model, served by kd/local_teacher.py under the name `tiny`."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    assert run_script(export_hf, "--baseline", world.token_model, "--output", folder) == 0
    command = [sys.executable, str(ROOT / "kd" / "local_teacher.py"), "--model", str(folder), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            yield next(line for line in process.stderr if " at http://" in line).rsplit(" at ", 1)[1].strip()
        finally:
            process.send_signal(signal.SIGTERM)
            process.stderr.read()


@pytest.fixture
def at_teacher(teacher_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty working directory whose environment names the teacher."""
    for name, value in (("BASE_URL", teacher_url), ("MODEL", "tiny"), ("API_KEY", "none")):
        monkeypatch.setenv(f"VENICE_{name}", value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


KD = ("--use_kd", "--kd_tokens", 1200, "--kd_k", 5)


def test_an_empty_store_is_harvested_first(world: World, at_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And only then: the second training asks for nothing. The run and the checkpoint say what kind it was."""
    flags = [*world.train_flags(at_teacher), *SMALL_LM, *KD]
    assert run_script(train_student, *flags, "--ae_ckpt", world.ae, "--max_steps", 2) == 0
    captured = capsys.readouterr()
    assert "harvesting the rest" in captured.err and "token-level from tiny" in captured.err
    assert json.loads(captured.out.splitlines()[-1])["kl_to_teacher"] > 0
    assert any("kl" in json.loads(line) for line in (at_teacher / "run" / "metrics.jsonl").read_text().splitlines())
    os.environ["VENICE_BASE_URL"] = "http://127.0.0.1:1/v1"  # nobody there
    assert run_script(baseline, *flags, "--k", 4, "--max_steps", 2) == 0
    captured = capsys.readouterr()
    assert "harvesting" not in captured.err and "packing" not in captured.err
    assert json.loads(captured.out.splitlines()[-1])["kl_to_teacher"] > 0
    content = torch.load(at_teacher / "checkpoints" / "student.pt", weights_only=True)
    assert content["distillation"]["kind"] == "token-level" and content["distillation"]["k"] == 5


def test_two_trainings_started_together_harvest_and_pack_once(
    world: World, at_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = StudentTrainConfig(data=str(world.data), use_kd=True, kd_tokens=600, kd_k=5)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(open_teacher(cfg, 32).folder)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = capsys.readouterr().err
    assert said.count("harvesting the rest") == said.count("packing ") == 1
    assert folders == [Path("data/teacher/tiny-packed")] * 2
    path = Path("data/teacher/tiny.sqlite")
    with Store(path, must_exist=True) as store:
        assert 600 <= store.totals().completion_tokens < 600 + 9 * 32
        held = list(store)
    path.unlink()
    with Store(path) as store:  # another harvest of as many answers is packed anew
        for row in held:
            told = {"model": row.model, "template": row.template, "completion_tokens": row.completion_tokens}
            store.put(row.request, json.dumps(row.answer).encode(), prompt_ids=row.prompt_ids, **told)
        assert len(store) == len(held)
    open_teacher(cfg, 32)
    assert "packing " in capsys.readouterr().err


def test_what_the_store_holds_of_other_settings_counts(world: World, at_teacher: Path) -> None:
    """Answers of another length were paid for, too: only the rest is asked for."""
    store = at_teacher / "t.sqlite"
    flags = ["--data", world.data, "--store", store, "--max_new_tokens", 10, "--prompt_tokens", 5, "--concurrency", 1]
    assert run_script(harvest_script, *flags, "--n_tokens", 1000) == 0
    flags = [*world.train_flags(at_teacher), *SMALL_LM, *KD, "--kd_store", store, "--ae_ckpt", world.ae, "--max_steps", 1]
    assert run_script(train_student, *flags) == 0
    with Store(store) as opened:
        assert 1200 <= opened.totals().completion_tokens < 1200 + 9 * 32  # up to 8 answers at once, and the probe


def test_the_text_alone_is_asked_for_as_text(world: World, at_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--kd_k 0: no ids go to the teacher, whose tokenizer may be another one, and no logprobs come back."""
    flags = [*world.train_flags(at_teacher), *SMALL_LM, "--k", 4, "--max_steps", 1, "--use_kd", "--kd_tokens", 1500]
    assert run_script(baseline, *flags, "--kd_k", 0) == 0
    assert "sequence-level from tiny" in capsys.readouterr().err
    with Store("data/teacher/tiny.sqlite", must_exist=True) as store:
        assert all(isinstance(row.request["prompt"], str) and "logprobs" not in row.request for row in store)


def test_a_text_teacher_s_answers_serve_another_tokenizer(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its prompts are stored as ids, too, of the tokenizer of the harvest: they are packed again, as the same text."""
    store, data, begins = tmp_path / "t.sqlite", tmp_path / "packed", "import os\nfor i in "
    flags = ["--input", ROOT / "configs", "--output"]
    assert run_script(train_tokenizer, *flags, tmp_path / "tokenizer", "--vocab_size", 300) == 0
    assert run_script(data_packing, *flags, data, "--tokenizer", tmp_path / "tokenizer", "--seq_len", 32, "--k", 4) == 0
    before, after = (TokenizerAdapter.load(folder / "tokenizer") for folder in (world.root, tmp_path))
    assert after.decode(before.encode(begins)) != begins
    texts = [f"range({i}): pass" for i in range(40)]
    with Store(store) as opened:
        for i, text in enumerate(texts):
            chat = [{"role": "user", "content": begins}]
            asked = [{"prompt": begins}, {"messages": [{"role": "user", "content": CONTINUE + begins}]}, {"messages": chat}][
                i % 3
            ]
            ids = before.encode_chat(chat, add_generation_prompt=True) if i % 3 == 2 else before.encode(begins)
            answer = json.dumps({"model": "m", "choices": [{"text": text}]}).encode()
            opened.put({**asked, "seed": i}, answer, model="m", template=1, prompt_ids=ids, completion_tokens=9)
    for folder, tokenizer in ((world.data, before), (data, after), (data, after)):
        cfg = StudentTrainConfig(data=str(folder), use_kd=True, kd_store=str(store), kd_tokens=1)
        teacher = open_teacher(cfg, 32)
        documents = [
            tokenizer.decode(doc)
            for split in (teacher.train, teacher.val)
            for doc in np.split(split.tokens, split.doc_starts[1:])
        ]
        chat_text = tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": begins}], add_generation_prompt=True))
        assert sorted(documents) == sorted((chat_text if i % 3 == 2 else begins) + text for i, text in enumerate(texts))
    assert capsys.readouterr().err.count("packing ") == 2  # the third finds what the second packed
    (tmp_path / "t-packed" / "train" / "meta.json").write_text("{")
    with pytest.raises(UserError, match=r"meta\.json cannot be read"):
        open_teacher(cfg, 32)
    shutil.rmtree(tmp_path / "t-packed")
    kd = [*world.train_flags(tmp_path), *SMALL_LM, "--data", data, "--ae_ckpt", world.ae, "--use_kd", "--kd_store", store]
    assert run_script(train_student, *kd, "--kd_tokens", 1) == 2
    assert f"another tokenizer ({before.fingerprint[:12]}) than {data} (" in capsys.readouterr().err


def test_resume_is_exact(world: World, at_teacher: Path) -> None:
    for folder, chunks in ((at_teacher / "a", (4,)), (at_teacher / "b", (2, 4))):
        flags = [*world.train_flags(folder), *SMALL_LM, *KD, "--kd_store", at_teacher / "t.sqlite", "--ae_ckpt", world.ae]
        for steps in chunks:
            resume = ["--resume"] if steps != chunks[0] else []
            assert run_script(train_student, *flags, "--max_steps", steps, *resume) == 0
    a, b = (torch.load(at_teacher / x / "checkpoints" / "student.pt", weights_only=True)["state"] for x in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_scored_text_has_the_model_s_own_logprobs(world: World, at_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--mode score: rows stand at the tokens that they predict, all of a corpus is scored once, and that is no error."""
    store, shard = at_teacher / "s.sqlite", at_teacher / "shard"
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x + {i}\n\n\nprint(f{i}({i}))\n"}) for i in range(16)]
    (at_teacher / "texts.jsonl").write_text("\n".join(lines))  # many documents, so that each split gets some
    packing = ["--input", at_teacher / "texts.jsonl", "--output", at_teacher / "data", "--tokenizer", world.root / "tokenizer"]
    assert run_script(data_packing, *packing) == 0
    flags = ["--data", at_teacher / "data", "--mode", "score", "--store", store, "--max_new_tokens", 24, "--top_logprobs", 4]
    assert run_script(harvest_script, *flags, "--n_tokens", 5000) == 0
    before = capsys.readouterr().err
    assert run_script(harvest_script, *flags, "--n_tokens", 5000) == 0
    assert "all of" in before and "(0 from earlier runs)" in before and "(0 from earlier runs)" not in capsys.readouterr().err
    tokenizer = world.root / "tokenizer"
    pack = ["--store", store, "--tokenizer", tokenizer, "--output", shard, "--k", 4, "--val_split", 0.3]
    assert run_script(kd_batcher, *pack) == 0
    splits, eot = [KDShard(shard / name) for name in ("train", "val")], TokenizerAdapter.load(tokenizer).eot_id
    model, _ = load_token_model(world.token_model)
    scored = 0
    pieces = [(s, *ends) for s in splits for ends in zip(s.doc_starts, [*s.doc_starts[1:], s.n_tokens], strict=True)]
    for rows, start, end in pieces:
        ids, top_ids, top_logprobs = (x[0] for x in rows.windows([int(start)], int(end - start)))
        known = top_ids[:, 0] != MISSING
        if not known[0]:
            continue  # a piece from the middle of a document: nothing stood before its first token
        with torch.inference_mode():
            expected = model.lm(torch.cat([torch.tensor([eot]), ids])[None]).logits[0, :-1].log_softmax(-1)
        best = expected.topk(4)
        torch.testing.assert_close(top_logprobs[known], best.values[known], atol=5e-3, rtol=0)
        scored += int(known.sum())
    assert scored > 20


def test_a_teacher_without_logprobs(world: World, at_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its text teaches, with kd_w on top of ce_w, and everybody hears of it."""
    folder = at_teacher / "shard"
    tokenizer = TokenizerAdapter.load(world.root / "tokenizer")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        writer = KDWriter(folder / split, tokenizer.model_vocab_size, 3)
        for _ in range(9):
            ids = rng.integers(2, 300, 40)
            writer.add(ids, np.full((40, 3), MISSING), np.full((40, 3), np.nan))
        place = {"tokenizer_fingerprint": tokenizer.fingerprint, "tokenizer": str(world.root / "tokenizer")}
        writer.close(**place, eot_id=tokenizer.eot_id, pad_id=tokenizer.pad_id, teacher=["silent"])
    out = {}
    for name, kd in (("plain", ()), ("kd", ("--use_kd", "--kd_w", 0.5)), ("twice", ("--ce_w", 1.5))):
        flags = [*world.train_flags(at_teacher / name), "--data", folder, *SMALL_LM, "--ae_ckpt", world.ae, "--max_steps", 2]
        assert run_script(train_student, *flags, *kd) == 0
        out[name] = torch.load(at_teacher / name / "checkpoints" / "student.pt", weights_only=True)
        said = capsys.readouterr().err
        assert ("sequence-level from silent" in said and "--kd_w 0.5 is added to --ce_w" in said) == (name == "kd")
    assert out["kd"]["distillation"]["kind"] == "sequence-level"
    assert all(torch.equal(out["kd"]["state"][key], out["twice"]["state"][key]) for key in out["kd"]["state"])


def make_world_of_another_tokenizer(folder: Path) -> Path:
    """Packed data whose tokenizer has as many words as the small world's, but other ones."""
    data, tokenizer = folder / "foreign", folder / "foreign-tokenizer"
    assert run_script(train_tokenizer, "--input", ROOT / "kd", "--output", tokenizer, "--vocab_size", 320) == 0
    assert run_script(data_packing, "--input", ROOT / "kd", "--output", data, "--tokenizer", tokenizer, "--k", 4) == 0
    return data


def test_a_harvest_that_fails_ends_the_training_in_one_line(
    world: World, at_teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*world.train_flags(at_teacher), *SMALL_LM, "--ae_ckpt", world.ae, "--max_steps", 2, "--use_kd"]
    with FaultyServer() as server:
        monkeypatch.setenv("VENICE_BASE_URL", server.url)
        assert run_script(train_student, *flags, "--kd_budget_usd", 1) == 2
        assert "no budget can be held" in capsys.readouterr().err and not server.log
    with FaultyServer() as server:  # what can be told before it costs anything, is
        monkeypatch.setenv("VENICE_BASE_URL", server.url)
        monkeypatch.setenv("VENICE_MODEL", "teacher")
        foreign = make_world_of_another_tokenizer(at_teacher)
        for more, told in (
            (("--data", foreign), "was made with another tokenizer"), (("--device", "cuda:99"), "cannot be used"),
            (("--checkpoint_dir", at_teacher / "file" / "below"), "Not a directory"), (("--num_heads", 3), "num_heads"),
        ):  # fmt: skip
            (at_teacher / "file").touch()
            assert run_script(train_student, *flags, *more) == 2
            assert told in capsys.readouterr().err and not server.log
    assert run_script(train_student, *flags, "--kd_data", world.data) == 2
    assert "without a teacher's rows" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ the loss
def test_rows_move_with_their_tokens() -> None:
    """A teacher whose best word is always the true token still says so after windows were shifted behind pads."""
    tokens = torch.randint(2, 50, (16, 12))
    moved, pads = pad_left(tokens, 4, pad_id=1, share=0.7, seed=0, step=3)
    ids = shift_right(tokens[..., None].expand(-1, -1, 3), pads, MISSING)
    assert (pads > 0).any() and (pads == 0).any()
    real = torch.arange(12) >= pads[:, None]
    assert torch.equal(ids[..., 0][real], moved[real]) and (ids[~real] == MISSING).all()


def test_the_student_s_loss_has_the_kl_at_all_positions_but_pads() -> None:
    model = make_student()
    tokens, pads = torch.randint(2, 320, (2, 12)), torch.tensor([3, 0])
    teacher = torch.randn(2, 12, 320).log_softmax(-1)
    logprobs, ids = teacher.topk(6)
    ids[0, :3] = MISSING
    total, parts = student_loss(
        model, None, tokens, pads, ce_w=0.5, kd_w=2.0, kd=lambda states: mean_kl(states, model.table, ids, logprobs)
    )
    states = model.hidden(tokens)
    by_hand = [bucket_kl(states[b, t][None], model.table, ids[b, t][None], logprobs[b, t][None]).item()
               for b in range(2) for t in range(12) if t >= pads[b]]  # fmt: skip
    assert parts["kl"].item() == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert total.item() == pytest.approx(0.5 * parts["ce"].item() + 2 * parts["kl"].item(), rel=1e-5)


def test_where_the_teacher_told_its_logprobs_the_drawn_token_teaches_nothing() -> None:
    """--ce_w unset: cross-entropy at positions without a row alone; given: everywhere; never where a cut is no end."""
    model = make_student()
    tokens, pads = torch.randint(2, 320, (2, 12)), torch.tensor([3, 0])
    ids = torch.randint(0, 320, (2, 12, 1))
    ids[:, 8:] = MISSING
    logprobs, cut = torch.zeros(2, 12, 1), torch.zeros(2, 12, dtype=torch.bool)
    cut[1, 11] = True
    rows = [cut, ids, logprobs, torch.tensor(16)]
    shards: list[Any] = [SimpleNamespace(drawn=drawn, kind="logprobs") for drawn in (True, False)]
    drawn, told = (Teacher(Path(), shard, shard, 1.0) for shard in shards)
    expected = torch.arange(12).expand(2, -1) >= 8
    assert torch.equal(drawn.hard(LMTrainConfig(), rows), expected & ~cut)
    silent = Teacher(Path(), *[SimpleNamespace(drawn=True, kind="sequence")] * 2, 1.0)  # type: ignore[list-item]
    # no KL to do it; what was not drawn; a teacher without logprobs
    for everywhere in (drawn.hard(LMTrainConfig(ce_w=1), rows), drawn.hard(LMTrainConfig(kd_w=0), rows),
                       told.hard(LMTrainConfig(), rows), silent.hard(LMTrainConfig(), [cut])):  # fmt: skip
        assert torch.equal(everywhere, ~cut)
    assert silent.divergence(LMTrainConfig(), model.table, [cut], tokens) is None
    for teacher, left_out in ((drawn, True), (told, False)):
        kl = teacher.divergence(LMTrainConfig(), model.table, rows, tokens)
        assert (kl.keywords["drawn"] is tokens) == left_out  # type: ignore[attr-defined]
    unset = expected
    part, whole = (student_loss(model, None, tokens, pads, ce_w=1.0, ce_at=at) for at in (unset, None))
    with torch.no_grad():
        nll = model.nll(tokens)
    assert part[0].item() == pytest.approx(nll[:, 8:].sum().item() / 21, rel=1e-4)  # of 24 positions 3 are pads
    assert part[1]["ce"].item() == pytest.approx(whole[0].item(), rel=1e-5)


def test_validation_counts_scored_positions_after_the_first_chunk(world: World, at_teacher: Path) -> None:
    """Against the same KL, position by position."""
    tokenizer = TokenizerAdapter.load(world.root / "tokenizer")
    model, _ = load_token_model(world.token_model)
    context, rng = model.cfg.context, np.random.default_rng(0)
    for split in ("train", "val"):
        writer = KDWriter(at_teacher / split, tokenizer.model_vocab_size, 3)
        for _ in range(5):
            ids, top = rng.integers(2, 300, context), np.stack([rng.permutation(300)[:3] for _ in range(context)])
            top[: rng.integers(context)] = MISSING
            writer.add(ids, top, np.where(top == MISSING, np.nan, np.log([[0.5, 0.3, 0.1]])))
        writer.close(tokenizer_fingerprint=tokenizer.fingerprint, tokenizer="x", eot_id=0, pad_id=1, teacher=["t"])
    teacher = open_teacher(StudentTrainConfig(data=str(at_teacher), use_kd=True), context)
    from configs.loop import Setup
    from configs.run import Run

    setup = Setup(Run(at_teacher / "run"), torch.device("cpu"), bf16=False, compile=False)
    found = teacher.validate(model, setup, limit=4, batch_size=3)["kl_to_teacher"]
    tokens, ids, logprobs = teacher.val.windows([i * context for i in range(4)], context)
    with torch.no_grad():
        kl = bucket_kl(model.hidden(tokens).flatten(0, 1), model.table, ids.flatten(0, 1), logprobs.flatten(0, 1)).view(4, -1)
    counted = (ids >= 0).any(-1)
    counted[:, : model.cfg.k] = False
    assert found == pytest.approx(kl[counted].mean().item(), rel=1e-5)
