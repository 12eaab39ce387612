"""What goes into a packed folder, what is left out and said, and that memory does not grow with the input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ae.chunks import PackedData
from ae.tokenizer_adapter import TokenizerAdapter
from configs.errors import UserError
from tools import data_packing, train_tokenizer
from tools.data_packing import Corpus, Digests, cut_point, encoded, pack, read_items

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer.train(Corpus([str(ROOT / "ae"), str(ROOT / "tools")]), 512).save(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> TokenizerAdapter:
    return TokenizerAdapter.load(tokenizer_folder)


@pytest.fixture
def run(tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pack as the command line does, into tmp_path/out; returns (train, val)."""

    def run(*inputs: Path | str, **flags: Any) -> tuple[PackedData, PackedData]:
        argv = ["data_packing", "--input", *map(str, inputs), "--output", str(tmp_path / "out")]
        flags = {"tokenizer": tokenizer_folder, "seq_len": 64, **flags}
        for name, value in flags.items():
            argv += [f"--{name}"] + ([] if value is True else [str(value)])
        monkeypatch.setattr(sys, "argv", argv)
        data_packing.main()
        return PackedData(tmp_path / "out/train"), PackedData(tmp_path / "out/val")

    return run


def write_jsonl(path: Path, texts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def documents(split: PackedData) -> list[str]:
    """The texts of a split, cut at docs.bin; each must end with one end-of-text."""
    tokenizer = TokenizerAdapter.load(split.tokenizer)
    ends = [*split.doc_starts[1:], split.n_tokens]
    rows = [split.tokens[start:end].tolist() for start, end in zip(split.doc_starts, ends, strict=True)]
    assert all(row[-1] == tokenizer.eot_id and tokenizer.eot_id not in row[:-1] for row in rows)
    return [tokenizer.decode(row) for row in rows]


TEXTS = [f"document {i}: naïve <|endoftext|> 中🤖\r\n\n" for i in range(200)]


def test_every_document_once_and_whole(run: Any, tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    train, val = run(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    assert sorted(documents(train) + documents(val)) == sorted(TEXTS)
    assert 1 <= val.n_docs <= 30  # 10 expected
    meta = train.meta
    assert meta["tokenizer_fingerprint"] == tokenizer.fingerprint == TokenizerAdapter.load(train.tokenizer).fingerprint
    assert (meta["vocab_size"], meta["eot_id"], meta["pad_id"], meta["seq_len"], meta["k"]) == (512, 0, 1, 64, 8)
    assert meta["n_bytes"] == sum(len(text.encode()) for text in documents(train))
    assert meta["source"] == [str(tmp_path / "a.jsonl")] and meta["dtype"] == "uint16"


def test_validation_does_not_depend_on_order_or_company(run: Any, tmp_path: Path) -> None:
    first = set(documents(run(write_jsonl(tmp_path / "a.jsonl", TEXTS))[1]))
    assert set(documents(run(write_jsonl(tmp_path / "a.jsonl", TEXTS[::-1]))[1])) == first
    both = run(write_jsonl(tmp_path / "a.jsonl", TEXTS), write_jsonl(tmp_path / "b.jsonl", [f"other {i}" for i in range(50)]))
    assert set(documents(both[1])) & set(TEXTS) == first


def test_tiny_corpus_gets_one_validation_document(run: Any, tmp_path: Path) -> None:
    """The lowest hash, whatever the order: 0.001 of five documents would be none."""
    texts = ["alpha", "beta", "gamma", "delta", "epsilon"]
    picks = set()
    for order in texts, texts[::-1], texts[2:] + texts[:2]:
        train, val = run(write_jsonl(tmp_path / "a.jsonl", order), val_split=0.001)
        assert sorted(documents(train) + documents(val)) == sorted(texts)
        picks.add(tuple(documents(val)))
    assert len(picks) == 1 and len(picks.pop()) == 1


def test_one_document_cannot_be_split(run: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["alone"])
    with pytest.raises(UserError, match="--val_split 0"):
        run(path)
    train, val = run(path, val_split=0)
    assert documents(train) == ["alone"] and val.n_docs == val.n_tokens == 0


def test_duplicates_are_dropped(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, val = run(write_jsonl(tmp_path / "a.jsonl", TEXTS[:20] * 3), write_jsonl(tmp_path / "b.jsonl", TEXTS[:20]))
    assert sorted(documents(train) + documents(val)) == sorted(TEXTS[:20])
    assert train.meta["left_out"] == {"duplicates": 60} and "duplicates dropped: 60" in capsys.readouterr().out


def test_digests() -> None:
    rows = [os.urandom(16) for _ in range(2000)]
    seen = Digests()
    assert all(map(seen.add, rows)) and not any(map(seen.add, rows)) and seen.add(bytes(16))


BAD = [  # (line, what is said of it)
    (b"{not json}", "not JSON"),
    (b'"a string"', "got a str"),
    (b'{"other": 1}', "neither"),
    (b'{"text": NaN}', "got a float"),
    (b'{"text": ["x"]}', "got a list"),
    (b'{"text": "lone \\ud800 surrogate"}', "Unicode"),
    (b'{"text": "latin \xe9"}', "Unicode"),
    (b'{"text": "  \\n"}', "empty document"),
    (b'{"messages": []}', "empty document"),
    (b'{"messages": [{"role": "user"}]}', "`messages`"),
    (b'{"messages": "hi"}', "`messages`"),
    (b'{"messages": [{"role": "user", "content": "\\udfff"}]}', "Unicode"),
    (b"[" * 100_000, "not JSON"),
    (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "not JSON"),
]


def test_bad_lines_are_listed_and_counted(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [b"\xef\xbb\xbf" + json.dumps({"text": "first"}).encode(), *(line for line, _ in BAD), b"", b'{"text": "last"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    train, val = run(tmp_path / "a.jsonl")
    assert sorted(documents(train) + documents(val)) == ["first", "last"]
    said = capsys.readouterr().out
    for number, (_, message) in enumerate(BAD, start=2):
        (line,) = [row for row in said.splitlines() if f"a.jsonl:{number}:" in row]
        assert message in line
    assert train.meta["left_out"] == {"bad line": 12, "empty document": 2}


def test_only_the_first_problems_are_listed(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(write_jsonl(tmp_path / "a.jsonl", ["one", "two", *[7] * 50]))
    said = capsys.readouterr().out
    assert "50 bad line" in said and said.count("a.jsonl:") == 20 and "and 30 more" in said


@pytest.mark.parametrize(("line", "message"), BAD[:9])
def test_strict_ends_at_the_first_bad_line(run: Any, tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{message}"):
        run(tmp_path / "a.jsonl", strict=True)
    assert not (tmp_path / "out").exists()


def test_source_tree(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file is a document; hidden ones are not read; binary, non-UTF-8 and empty ones are told apart."""
    tree = tmp_path / "tree"
    for name in "pkg", ".git", "pkg/.cache":
        (tree / name).mkdir(parents=True)
    (tree / "readme.md").write_bytes(b"\xef\xbb\xbf# Title\r\n")
    (tree / "pkg" / "a.py").write_text("x = 1\n\n\ny = 2\n")
    (tree / "pkg" / "data.jsonl").write_text('{"text": "row one"}\n{"text": "row two"}\n')
    (tree / "pkg" / "blob.bin").write_bytes(b"ab\0cd")
    (tree / "pkg" / "latin.txt").write_bytes(b"line\nna\xefve\n")
    (tree / "pkg" / "empty.py").write_text("\n")
    (tree / "pkg" / "dangling").symlink_to(tree / "nowhere")
    for hidden in ".git/config", "pkg/.cache/x", ".env":
        (tree / hidden).write_text("secret")
    train, val = run(tree)
    assert sorted(documents(train) + documents(val)) == ["# Title\r\n", "row one", "row two", "x = 1\n\n\ny = 2\n"]
    said = capsys.readouterr().out
    assert (
        "latin.txt:2: file that is not UTF-8" in said and "blob.bin: binary file" in said and "empty.py: empty document" in said
    )
    assert train.meta["left_out"] == {"file that is not UTF-8": 1, "binary file": 1, "empty document": 1}
    with pytest.raises(UserError, match="pkg/blob"):
        run(tree, strict=True)


def test_glob(run: Any, tmp_path: Path) -> None:
    for name in "a.txt", "b.txt", "c.md":
        (tmp_path / name).write_text(f"text of {name}")
    train, val = run(tmp_path / "*.txt")
    assert sorted(documents(train) + documents(val)) == ["text of a.txt", "text of b.txt"]


def test_format_wins_over_the_suffix(run: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.txt", ["one", "two"])
    train, val = run(path, format="jsonl")
    assert sorted(documents(train) + documents(val)) == ["one", "two"]
    train, _ = run(path, format="text", val_split=0)
    assert documents(train) == [path.read_text()]


def test_a_text_file_by_itself_is_cut_at_blank_lines(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_packing, "MAX_PIECE", 500)
    text = "".join(f"Paragraph {i} über 中🤖.\n" + "\n" * (i % 3 == 0) for i in range(300))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    train, val = run(tmp_path / "book.txt")
    pieces = documents(train) + documents(val)
    assert all(len(piece) <= 500 and (piece.endswith("\n\n") or text.endswith(piece)) for piece in pieces)
    assert sum(map(len, pieces)) == len(text) and set(pieces) <= {text[i : i + len(p)] for p in pieces for i in [text.find(p)]}


def test_text_that_turns_out_not_to_be_utf8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before the broken place is kept, and the report names the line."""
    monkeypatch.setattr(data_packing, "MAX_PIECE", 100)
    (tmp_path / "a.txt").write_bytes(b"0123456789\n" * 50 + b"\xff\n" + b"more\n")
    corpus = Corpus([str(tmp_path / "a.txt")])
    assert "".join(document.text for document in corpus) == "0123456789\n" * 50
    assert "a.txt:51: file that is not UTF-8 (left out from here on)" in corpus.problems.report()
    assert corpus.bytes_read == corpus.bytes_total


def test_cut_point() -> None:
    assert cut_point("short", 0, 10) == 5
    assert cut_point("aaaaaaa\n\nbb\ncc", 0, 12) == 9
    assert cut_point("aaaaaaa\nb cc dd", 0, 12) == 8
    assert cut_point("aaaaaaa b ccccdd", 0, 12) == 10
    assert cut_point("a" * 30, 5, 12) == 17


def test_long_documents_and_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_packing, "MAX_DOCUMENT", 1000)
    monkeypatch.setattr(data_packing, "MAX_LINE", 4000)
    text = "word " * 500
    path = write_jsonl(tmp_path / "a.jsonl", [text, "x" * 9000, "y" * 12_000, "last"])
    chat = {"messages": [{"role": "user", "content": text}]}
    path.write_text(path.read_text() + json.dumps(chat) + "\n")
    corpus = Corpus([str(path)])
    read = list(corpus)
    assert "".join(d.text for d in read[:-1]) == text and max(len(d.text) for d in read) <= 1000 and read[-1].text == "last"
    assert (
        corpus.problems.counts == {"bad line": 3} and read[-1].place.endswith(":4") and corpus.bytes_read == corpus.bytes_total
    )


def test_chats(run: Any, tmp_path: Path) -> None:
    chats = [
        [{"role": "user", "content": f"say {i} <|endoftext|>"}, {"role": "assistant", "content": str(i)}] for i in range(10)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in [*chats, chats[0]]))
    train, val = run(tmp_path / "a.jsonl")
    expected = [f"user: say {i} <|endoftext|>\n\nassistant: {i}\n\n" for i in range(10)]
    assert sorted(documents(train) + documents(val)) == expected
    assert train.meta["n_bytes"] == sum(len(text.encode()) for text in documents(train))


def test_a_chat_that_the_template_refuses_is_a_bad_line(run: Any, tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    tokenizer.save(tmp_path / "t")
    template = (
        "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}[{{ m.content }}]{% endfor %}"
    )
    (tmp_path / "t" / "chat_template.jinja").write_text(template)
    rows = [{"messages": [{"role": role, "content": content}]} for role, content in (("u", "a"), ("x", "b"), ("u", "c"))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, val = run(tmp_path / "a.jsonl", tokenizer=tmp_path / "t")
    assert sorted(documents(train) + documents(val)) == ["[a]", "[c]"] and train.meta["left_out"] == {"bad line": 1}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"seq_len": 0}, "at least 1"),
        ({"k": 0}, "at least 1"),
        ({"val_split": 1.0}, "val_split"),
        ({"val_split": "nan"}, "val_split"),
        ({"tokenizer": "no/such/place"}, "no/such/place"),
    ],
)
def test_bad_flags_leave_what_was_packed(run: Any, tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run(path)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=message):
        run(path, **flags)
    with pytest.raises(UserError, match="matches no file"):
        run(tmp_path / "absent.jsonl")
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', "--format jsonl"),
        ('[\n  {"messages": []}\n]', "jq -c"),
    ],
)
def test_records_in_a_json_file_are_not_packed_as_their_source(run: Any, tmp_path: Path, text: str, advice: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=advice):
        run(path)
    assert documents(run(path, format="text", val_split=0)[0]) == [text]
    path.write_text(source := '{"name": "latentforge", "private": true}')  # of a source tree
    assert documents(run(path, val_split=0)[0]) == [source]


def test_a_tokenizer_of_too_little_text_tells_what_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "import os"}\n' * 3)
    with pytest.raises(UserError, match=r"only 258 tokens[^$]*3 bad lines?[^$]*a.jsonl:1"):
        train_tokenizer.train(Corpus([str(path)]), 300)


def test_a_run_that_dies_midway_destroys_nothing(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run(path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data_packing.Split, "add", fail)
    with pytest.raises(OSError, match="No space"):
        run(path)
    monkeypatch.undo()
    assert PackedData(tmp_path / "out/train").n_docs > 100
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.jsonl", "out"}  # no temporary folder stays


@pytest.mark.parametrize("place", ["thesis.tex", "train/thesis.tex", "tokenizer/thesis.tex", "train/meta.json"])
def test_a_foreign_folder_is_not_replaced(run: Any, tmp_path: Path, place: str) -> None:
    """Also not one whose folders merely have the names of ours: a text collection in train/ and val/."""
    path = tmp_path / "out" / place
    path.parent.mkdir(parents=True)
    path.write_text('{"precious": 1}')
    with pytest.raises(UserError, match="would be replaced"):
        run(write_jsonl(tmp_path / "a.jsonl", TEXTS))
    assert path.read_text() == '{"precious": 1}'


def test_exit_codes_and_default_tokenizer(tmp_path: Path) -> None:
    """The script itself: a missing input and a missing default tokenizer are one line each, and exit code 2."""
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for source, expected in (tmp_path / "absent", "matches no file"), (path, "train_tokenizer.py"):
        command = [
            sys.executable,
            str(ROOT / "tools/data_packing.py"),
            "--input",
            str(source),
            "--output",
            str(tmp_path / "out"),
        ]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and expected in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_the_input(
    tmp_path: Path, tokenizer: TokenizerAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """50 MB through the whole pipeline, less the encoder itself (Rust, and slow), within 24 MB of Python memory."""
    monkeypatch.setattr(data_packing, "BATCH_CHARS", 1 << 19)
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: [np.zeros(len(t) // 4, np.int32) for t in texts])
    (tmp_path / "in").mkdir()
    with open(tmp_path / "in/a.jsonl", "w") as rows, open(tmp_path / "in/b.txt", "w") as text:
        for i in range(600):
            rows.write(json.dumps({"text": f"{i} " + "lorem ipsum " * 4000}) + "\n")
            text.write(f"{i} " + "dolor sit\n\n" * 3000)
    corpus = Corpus([str(tmp_path / "in")])
    assert corpus.bytes_total > 45e6
    tracemalloc.start()
    try:
        pack(corpus, tokenizer, tmp_path / "out", 64, 8, 0.05)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 24e6, f"{peak / 1e6:.0f} MB"


def test_throughput_against_the_bare_encoder(tmp_path: Path, tokenizer: TokenizerAdapter) -> None:
    """A ratio within one run, best of three; loose, as the machine may be busy (0.8 to 0.95 on the whole corpus)."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.parent.glob("a*.py"))]
    corpus = Corpus([str(write_jsonl(tmp_path / "a.jsonl", texts))])
    ours, bare = [], []
    for _ in range(3):
        start = time.perf_counter()
        tokens = sum(len(item.ids) for item in encoded(read_items(corpus, tokenizer, Counter()), tokenizer))
        ours.append(time.perf_counter() - start)
        start = time.perf_counter()
        encodings = tokenizer._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        bare.append(time.perf_counter() - start)
        assert tokens == sum(map(len, encodings)) + len(texts)
    ratio = min(bare) / min(ours)
    print(f"packing runs at {ratio:.2f} of the bare encoder's throughput")
    assert ratio > 0.4
