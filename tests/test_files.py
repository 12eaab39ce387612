"""Files from anywhere: nothing in them is run, and one that is damaged ends in a UserError, soon and in bounded memory.

FUZZ files of each kind are damaged, each by a seed of its own: a failure names it. `-k store` runs one kind.
"""

from __future__ import annotations

import ast
import io
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, World, make_ae, make_student, make_token_model

from ae.ae_model import load_ae
from ae.chunks import PackedData, PackedWriter, TrainWindows
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from configs.run import Run, load_state, save_checkpoint
from configs.schema import StudentTrainConfig, config_from, read_yaml
from kd.kd_batcher import KDShard, KDWriter
from kd.local_teacher import ServeConfig, load_teacher
from kd.store import COLUMNS, LARGEST, SCHEMA, Store
from student.baseline import load_token_model
from student.sampler import load_sampler
from tools.plot import read_metrics

FUZZ = int(os.environ.get("FUZZ", 400))  # damaged files of each kind
SECONDS, MEMORY = 20, 1 << 30  # that a load may take
PROGRAM = [path for name in (".", "configs", "ae", "kd", "student", "tools", "web") for path in (ROOT / name).glob("*.py")]
META = {"tokenizer_fingerprint": "f" * 32, "tokenizer": "../tokenizer", "eot_id": 0, "pad_id": 1, "teacher": ["m"]}


# ------------------------------------------------------------------------------------------------- what is not run
def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every call a.b.c(...) as ("a.b.c", its constant keyword arguments)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg or "": getattr(k.value, "value", None) for k in node.keywords}


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_reader_of_files_runs_what_they_hold(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "dill", "joblib", "marshal", "shelve"}
    for name, flags in calls(tree):
        if name in ("torch.load", "np.load"):
            assert flags.get("weights_only" if name == "torch.load" else "allow_pickle") is (name == "torch.load"), name
        if name.startswith("yaml.") and "load" in name:
            assert name == "yaml.safe_load"
        if name.endswith(".from_pretrained"):
            assert flags.get("trust_remote_code") is False, name
            assert flags.get("use_safetensors") is True or name.startswith(("AutoTokenizer", "AutoConfig")), name


def test_a_teacher_is_read_from_safetensors_alone(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    """Neither a pickle nor a Python file of the model's own is run."""

    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "sprung"),)

    def refused() -> None:
        with pytest.raises(UserError, match="cannot be loaded"):
            load_teacher(ServeConfig(model=str(folder), device="cpu"))
        assert not (tmp_path / "sprung").exists()

    folder = tmp_path / "model"
    make_token_model().lm.save_pretrained(folder)
    tokenizer.save(folder)
    assert load_teacher(ServeConfig(model=str(folder), device="cpu")).name == "model"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"\xff" * 8 + weights[8:])  # a header of 2^64 bytes
    refused()
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap()}, folder / "pytorch_model.bin")
    refused()
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'sprung')!r})\nclass Own: pass\n")
    refused()


# ------------------------------------------------------------------------------------------------- damage
DEEP, HUGE = "@deep@", "@huge@"  # what json.dumps cannot write: nested 20,000 times, a number of 5,000 digits
ODD: list[Any] = [
    None, True, 0, -1, 1.5, 1 << 60, 1 << 63, 1 << 64, float("nan"), float("inf"), "", "many", "x" * 300, "../../../../etc",
    "/", "~nobody", "a\0b", "\ud800", [], {}, [[1]], {"a": 1}, ["x"] * 3, DEEP, HUGE,
]  # fmt: skip


def damaged_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, overwritten, zeroed, repeated, lost or foreign bytes."""
    data = bytearray(raw)
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice([1, 8, 64, 512, 4096]))
    match rng.randrange(8):
        case 0:
            del data[start:]
        case 1:
            for _ in range(rng.choice([1, 1, 2, 8, 64])):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            data[start:end] = rng.randbytes(end - start)
        case 3:
            data[start:end] = bytes(end - start)
        case 4:
            data[end:end] = data[start:end]
        case 5:
            del data[start:end]
        case 6:
            data[start:start] = rng.randbytes(end - start)
        case 7:
            data[start:end] = b"\xff" * (end - start)
    return bytes(data)


def damaged_value(value: Any, rng: random.Random, odd: list[Any]) -> Any:
    """The value with an entry removed, renamed, repeated or replaced, somewhere within."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        kept = {name: item for name, item in value.items() if name != key}
        match rng.randrange(6):
            case 0:
                return kept
            case 1:
                return {**kept, str(key) + "x": value[key]}
        return {**value, key: damaged_value(value[key], rng, odd)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        match rng.randrange(4):
            case 0:
                return value[:i] + value[i + 1 :]
            case 1:
                return value[: i + 1] + value[i:]
        return [*value[:i], damaged_value(value[i], rng, odd), *value[i + 1 :]]
    if type(value) is int and rng.random() < 0.4:
        return rng.choice([value + 1, value - 1, -value, value * 2, value * 1000, float(value), str(value)])
    return rng.choice(odd)


def damaged_json(raw: bytes, rng: random.Random) -> bytes:
    text = json.dumps(damaged_value(json.loads(raw), rng, ODD))
    return text.replace(f'"{DEEP}"', "[" * 20_000 + "]" * 20_000).replace(f'"{HUGE}"', "9" * 5000).encode()


def damaged_lines(raw: bytes, rng: random.Random) -> bytes:
    lines = raw.splitlines()
    i = rng.randrange(len(lines))
    return b"\n".join([*lines[:i], damaged_json(lines[i], rng), *lines[i + 1 :]])


NASTY = [
    "&a [*a, *a]", "!!python/object/apply:os.mkdir [sprung]", "!!binary 5", "!!bool maybe", "2001-99-99", "0x_", "9" * 5000,
    "[" * 5000, "{a: " * 3000, "? [1]", "'", "1:99:99", "<<: 3", "=", "@", "\t- x", "[1, {a: 2}]", ".nan", "-.inf", "1e999",
    "~", "",
]  # fmt: skip
BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]\n" for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


def damaged_yaml(raw: bytes, rng: random.Random) -> bytes:
    lines = raw.decode().splitlines()
    i = rng.randrange(len(lines))
    key, _, value = lines[i].partition(":")
    wrong = [f"{key}: {rng.choice(NASTY)}", f"{rng.choice(NASTY)}: {value}", f"{key}x:{value}", key, f"{BOMB}{key}: *l"]
    lines[i] = rng.choice(wrong)
    return "\n".join(lines).encode()


def damaged_checkpoint(raw: bytes, rng: random.Random) -> bytes:
    """A sound file of other content."""
    claims = torch.zeros(1).expand(1 << 40)
    content = damaged_value(torch.load(io.BytesIO(raw), weights_only=True), rng, [*ODD, claims, torch.zeros(3), torch.ones(())])
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def damaged_store(path: Path, rng: random.Random) -> None:
    """Values that no column should hold, and other people's schemas."""
    column = rng.choice(COLUMNS.split(", "))
    packed = [zlib.compress(raw) for raw in (b"[" * 100_000, b"9" * 5000, b"null", b"[1, -1]", b"{}", b"{", b"\xff")]
    value = rng.choice([*packed, ZIP_BOMB, b"", b"x", "text", "9" * 30, -1, 1 << 62, 1.5, float("inf")])
    view = f"CREATE VIEW answers AS WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT {'n, ' * 9} n FROM r"
    with sqlite3.connect(path) as database:
        match rng.randrange(8):
            case 0:
                database.execute("DROP TABLE answers")
                database.execute(rng.choice([view, "CREATE TABLE answers (x)", SCHEMA.replace("model TEXT NOT NULL,", "")]))
            case 1:
                database.execute(f"PRAGMA {rng.choice(['user_version', 'application_id'])} = {rng.choice([0, 2, -1])}")
            case 2:
                database.execute("CREATE TRIGGER t AFTER UPDATE ON answers BEGIN DELETE FROM answers; END")
            case _:
                rows = f"UPDATE OR REPLACE answers SET {column} = ? WHERE rowid IN (SELECT rowid FROM answers LIMIT ?)"
                database.execute(rows, (value, rng.choice([1, 30])))
    database.close()


ZIP_BOMB = zlib.compress(bytes(LARGEST + 1))


# ------------------------------------------------------------------------------------------------- the loads
def load_packed(folder: Path) -> None:
    data = PackedData(folder / "train")
    assert isinstance(data.tokenizer, str) and len(data.doc_starts) == data.n_docs
    list(data.batches(8, 4))
    windows = TrainWindows(data, 8, 4, seed=0)
    for step in range(windows.steps_per_epoch):
        windows.batch(step)


def load_shard(folder: Path) -> None:
    shard = KDShard(folder / "train")
    assert all(isinstance(name, str) for name in shard.teacher) and shard.scored <= shard.n_tokens
    shard.windows(range(0, shard.n_tokens - 8, 8), 8)


def load_store(folder: Path) -> None:
    with Store(folder / "t.sqlite", must_exist=True) as store:
        totals, keys = store.totals(), [answer.key for answer in store]
        assert len(keys) <= totals.answers + 64 and store.models() is not None
        assert all(isinstance(store.tokens_of(key), int | None) for key in keys)  # None: SQLite's index may be damaged


def load_tokenizer(folder: Path) -> None:
    tokenizer = TokenizerAdapter.load(folder)
    assert len(tokenizer.fingerprint) == 32 and len(tokenizer.byte_lengths) == tokenizer.model_vocab_size
    assert 0 <= tokenizer.eot_id < tokenizer.size


def load_config(folder: Path) -> None:
    config_from(StudentTrainConfig, read_yaml(folder / "c.yaml"), "c.yaml")


def load_metrics(folder: Path) -> None:
    assert all(line["step"] is not None for line in read_metrics(folder))


def load_student_and_tokenizer(folder: Path) -> None:
    sampler = load_sampler(folder / "student.pt")
    assert sampler.model.cfg.vocab_size >= sampler.tokenizer.size


Damage = Callable[[bytes, random.Random], bytes]
# the files that are damaged, how beside their bytes, and how they are loaded
KINDS: dict[str, tuple[list[str], Damage | None, Callable[[Path], object]]] = {
    "packed_header": (["train/meta.json"], damaged_json, load_packed),
    "packed_tokens": (["train/tokens.bin", "train/docs.bin"], None, load_packed),
    "teacher_header": (["train/meta.json"], damaged_json, load_shard),
    "teacher_rows": ([f"train/{name}.bin" for name in ("tokens", "docs", "top_ids", "top_logprobs")], None, load_shard),
    "store": (["t.sqlite"], None, load_store),
    "tokenizer": (["tokenizer.json", "tokenizer_config.json", "config.json"], damaged_json, load_tokenizer),
    "config": (["c.yaml"], damaged_yaml, load_config),
    "ae": (["ae.pt"], damaged_checkpoint, lambda folder: load_ae(folder / "ae.pt")),
    "student": (["student.pt"], damaged_checkpoint, load_student_and_tokenizer),
    "token_model": (["token_model.pt"], damaged_checkpoint, lambda folder: load_token_model(folder / "token_model.pt")),
    "state": (["ae.state.pt"], None, lambda folder: load_state(folder / "ae.state.pt", "ae.state", lambda line: None)),
    "metrics": (["metrics.jsonl"], damaged_lines, load_metrics),
}


MODELS: dict[str, Callable[[], Any]] = {"ae": make_ae, "student": make_student, "token_model": make_token_model}


def make_files(kind: str, folder: Path, packed: World) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(2, 300, n) for n in (40, 3, 70, 25)]
    if kind.startswith("packed"):
        writer = PackedWriter(folder / "train", 320)
        for ids in documents:
            writer.add(ids)
        writer.close(**META)
    elif kind.startswith("teacher"):
        shard = KDWriter(folder / "train", 320, 3)
        for ids in documents:
            top_ids = np.stack([rng.permutation(320)[:3] for _ in ids])
            shard.add(ids, top_ids, np.log(np.full((len(ids), 3), [0.5, 0.2, 0.1])))
        shard.close(**META)
    elif kind == "store":
        with Store(folder / "t.sqlite") as store:
            for seed in range(100):
                answer = json.dumps({"choices": [{"text": rng.bytes(40).hex()}]}).encode()
                store.put({"seed": seed}, answer, model="m", template=1, prompt_ids=[1, seed], completion_tokens=3, cost=0.5)
    elif kind == "tokenizer":
        shutil.copytree(packed.root / "tokenizer", folder, dirs_exist_ok=True)
        (folder / "config.json").write_text('{"vocab_size": 384, "text_config": {"vocab_size": 384}}')
    elif kind == "config":
        shutil.copy(ROOT / "configs" / "demo_student.yaml", folder / "c.yaml")
    elif kind == "state":
        model = make_ae()
        optimizer = torch.optim.AdamW(model.parameters())
        torch.stack([x.sum() for x in model.parameters()]).sum().backward()
        optimizer.step()
        about = {"config": asdict(model.cfg), "train_config": {"lr": 1e-3}, "step": 1}
        content = {**about, "state": model.state_dict(), "optimizers": [optimizer.state_dict()]}
        save_checkpoint(folder / "ae.state.pt", "ae.state", content)
    elif kind in MODELS:
        model = MODELS[kind]()
        shutil.copytree(packed.root / "tokenizer", folder / "tokenizer")
        record = {"fingerprint": TokenizerAdapter.load(folder / "tokenizer").fingerprint, "path": "tokenizer"}
        content = {
            "config": asdict(model.cfg),
            "tokenizer": record,
            "state": model.state_dict(),
            "step": 3,
            "figures": {"a": 1},
        }
        save_checkpoint(folder / f"{kind}.pt", kind, content)
    else:
        lines = [{"time": 0.5 * n, "step": n, "tokens": 64 * n, "loss": 6.0 - n, "ce": 5.0, "lr": 1e-3} for n in range(1, 4)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(request: pytest.FixtureRequest, packed: World) -> Iterator[Path]:
    """A folder with sound files of the kind; in memory where that can be, as thousands are written."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with TemporaryDirectory(dir=memory) as name:
        make_files(request.param, Path(name), packed)
        yield Path(name)


class TooLong(BaseException):
    """A load that does not end."""


@contextmanager
def bounded() -> Iterator[None]:
    """At most MEMORY bytes more than there are now; a load that takes longer than `alarm(SECONDS)` raises TooLong."""

    def ring(*_: object) -> None:
        raise TooLong

    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, ring)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("folder", "kind"), [(kind, kind) for kind in KINDS], indirect=["folder"], ids=list(KINDS))
def test_damaged_files(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each load succeeds or raises UserError, and writes nothing."""
    import huggingface_hub

    def offline(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(folder)
    names, damage, load = KINDS[kind]
    sound, outcomes = {name: (folder / name).read_bytes() for name in names}, Counter[str]()
    load(folder)
    with bounded():
        for seed in range(FUZZ):
            rng = random.Random(f"{kind} {seed}")
            name = rng.choice(names)
            if kind == "store" and seed % 2:
                damaged_store(folder / name, rng)
            else:
                (folder / name).write_bytes((damage if damage and seed % 2 else damaged_bytes)(sound[name], rng))
            before = contents(folder)
            signal.alarm(SECONDS)
            try:
                load(folder)
                outcomes["read"] += 1
            except UserError as error:
                assert len(str(error)) < 2000, f"{kind} {seed}: a message of {len(str(error))} characters"
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"{kind} {seed}, {name}: {type(error).__name__}: {error}") from error
            signal.alarm(0)
            assert contents(folder) == before, f"{kind} {seed}: loading wrote"
            (folder / name).write_bytes(sound[name])
    print(kind, dict(outcomes))
    assert outcomes["refused"] > FUZZ / 3


@pytest.mark.parametrize("line", ["[1]", "3", '{"step": "1", "time": 0}', '{"step": 1}', '{"loss": 5.0}'])
def test_a_run_with_damaged_metrics_is_not_resumed(tmp_path: Path, line: str) -> None:
    run, sound = Run(tmp_path), '{"step": 1, "time": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(sound + line + "\n")
    with pytest.raises(UserError, match="is damaged"):
        run.go_on_from(1)
    assert (tmp_path / "metrics.jsonl").read_text() == sound + line + "\n"
