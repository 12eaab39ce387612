"""Round trips, bytes of tokens, special tokens, chats and fingerprints, on a tokenizer trained here and on two real ones."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_script

from ae.tokenizer_adapter import TokenizerAdapter, Utf8Stream
from configs.errors import UserError
from tools import get_corpus, train_tokenizer
from tools.data_packing import Corpus

SHARED = Path(__file__).parents[2] / "shared"
QWEN3, STORIES = SHARED / "tokenizers/qwen3", SHARED / "teachers/stories260k"
NASTY = [
    "",
    " ",
    "\n\n\n",
    "\t tabs\tand  spaces   ",
    "def f(x):\n    return x**2  # ²\r\n",
    "中文字符，日本語、한국어",
    "👩‍👩‍👧‍👦 🇩🇪 🤖é",
    "\x00\x01\x7f\x80\xff",
    "\u200b\ufeff\u2028\ufffd\U0010ffff\ud7ff",
    "<|endoftext|> is <|pad|> not <|im_end|> the </s> end <s> <unk>",
    "a" * 3000,
    "0123456789" * 20 + "\\u0000 \\ud800 {}[]",
    "مرحبا بالعالم नमस्ते",
]


def load_or_skip(folder: Path) -> TokenizerAdapter:
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    return TokenizerAdapter.load(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TokenizerAdapter:
    """A byte-level BPE of 600 entries, trained on this repository's own sources."""
    root = Path(__file__).parents[1]
    return train_tokenizer.train(Corpus([str(root / "ae"), str(root / "tools")]), 600)


@pytest.fixture(scope="module")
def qwen3() -> TokenizerAdapter:
    return load_or_skip(QWEN3)


@pytest.fixture(scope="module")
def stories() -> TokenizerAdapter:
    return load_or_skip(STORIES)


@pytest.mark.parametrize("text", NASTY)
def test_round_trip_is_exact(small: TokenizerAdapter, text: str) -> None:
    ids = small.encode(text)
    assert small.decode(ids) == text
    assert b"".join(map(small.token_bytes, ids)) == text.encode()
    assert small.byte_lengths[ids].sum() == len(text.encode())
    assert not set(ids) & small.special_ids


@pytest.mark.parametrize("text", NASTY)
def test_round_trip_qwen3(qwen3: TokenizerAdapter, text: str) -> None:
    ids = qwen3.encode(text)
    assert qwen3.decode(ids) == text
    assert b"".join(map(qwen3.token_bytes, ids)) == text.encode()
    assert not set(ids) & qwen3.special_ids


@pytest.mark.parametrize("text", NASTY)
def test_round_trip_stories(stories: TokenizerAdapter, text: str) -> None:
    """SentencePiece-like: one space before the text is the tokenizer's own normalisation."""
    before = " " if text and not text.startswith(" ") else ""
    assert stories.decode(stories.encode(text)) == before + text


def test_qwen3_normalises_to_nfc(qwen3: TokenizerAdapter) -> None:
    assert qwen3.decode(qwen3.encode("e\u0301")) == "é"


def test_batch_equals_single(small: TokenizerAdapter) -> None:
    rows = small.encode_batch(NASTY)
    assert [row.tolist() for row in rows] == [small.encode(text) for text in NASTY]
    assert all(row.dtype == np.int32 for row in rows)


def test_trained_here(small: TokenizerAdapter) -> None:
    assert (small.size, small.model_vocab_size, small.eot_id, small.pad_id) == (600, 640, 0, 1)
    assert small.byte_lengths.shape == (640,)
    assert {small.token_bytes(i) for i in range(600)} >= {bytes([b]) for b in range(256)}
    assert small.token_bytes(0) == small.token_bytes(1) == small.token_bytes(639) == small.token_bytes(-1) == b""
    assert small.decode([0, *small.encode("x"), 1, 639]) == "x"


def test_qwen3_facts(qwen3: TokenizerAdapter) -> None:
    assert (qwen3.size, qwen3.model_vocab_size, qwen3.eot_id, qwen3.pad_id) == (151_669, 151_936, 151_643, 151_643)
    assert qwen3.stop_ids == {151_643, 151_645}
    assert qwen3.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert qwen3.token_bytes(151_667) == b"<think>"  # an added token, but not a special one: it is text
    assert qwen3.token_bytes(151_644) == qwen3.token_bytes(151_935) == b""


def test_stories_facts(stories: TokenizerAdapter) -> None:
    """Its model saw <s> between stories and </s> never, so <s> is the end of a text; both stop generation."""
    assert (stories.size, stories.model_vocab_size, stories.eot_id) == (512, 512, 1)
    assert stories.stop_ids == {1, 2}
    assert stories.token_bytes(3) == b"\x00" and stories.token_bytes(13) == b"\n"
    assert stories.decode(stories.encode("a\n中")) == " a\n中"


@pytest.mark.parametrize("name", ["small", "qwen3", "stories"])
def test_broken_utf8_pieces(name: str, request: pytest.FixtureRequest) -> None:
    """A character cut in two decodes to U+FFFD alone, and to itself when the stream gets its other half."""
    tokenizer: TokenizerAdapter = request.getfixturevalue(name)
    text = "a𓂀🤖b中"
    ids = tokenizer.encode(text)
    broken = [i for i in ids if tokenizer.decode([i]) == "\ufffd"]
    assert broken, "expected a token that is part of a character"
    stream = Utf8Stream(tokenizer)
    parts = [stream.push([i]) for i in ids]
    assert "".join(parts).lstrip() == text and "\ufffd" not in "".join(parts) and stream.flush() == ""
    assert stream.push([broken[0]]) == "" and stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("x")).strip() == "x"  # flushed clean


def test_stream_equals_decode_on_any_ids(small: TokenizerAdapter) -> None:
    ids = np.random.default_rng(0).integers(0, 640, 3000).tolist()  # mostly invalid UTF-8
    stream = Utf8Stream(small)
    assert "".join(stream.push([i]) for i in ids) + stream.flush() == small.decode(ids)


def test_lone_surrogate_is_a_user_error(small: TokenizerAdapter) -> None:
    with pytest.raises(UserError, match="surrogate"):
        small.encode("\ud800")


def identity(tokenizer: TokenizerAdapter) -> tuple[object, ...]:
    t = tokenizer
    return t.fingerprint, t.size, t.model_vocab_size, t.eot_id, t.pad_id, t.stop_ids, t.chat_template


@pytest.mark.parametrize("name", ["small", "qwen3", "stories"])
def test_save_and_load(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    tokenizer: TokenizerAdapter = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "one")
    again = TokenizerAdapter.load(tmp_path / "one")
    assert identity(again) == identity(tokenizer) and again.source == str(tmp_path / "one")
    shutil.copy(tmp_path / "one" / "tokenizer.json", tmp_path / "alone.json")
    alone = TokenizerAdapter.load(tmp_path / "alone.json")
    assert (alone.fingerprint, alone.eot_id) == (tokenizer.fingerprint, tokenizer.eot_id)


def test_saved_again_is_the_same_file(small: TokenizerAdapter, tmp_path: Path) -> None:
    small.save(tmp_path / "one")
    TokenizerAdapter.load(tmp_path / "one" / "tokenizer.json").save(tmp_path / "two")
    for name in "tokenizer.json", "tokenizer_config.json":
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_fingerprint_tells_tokenizers_apart(small: TokenizerAdapter, tmp_path: Path) -> None:
    """A changed merge order, normaliser or special token changes it; spelling, decoder and truncation do not."""
    small.save(tmp_path)
    original = json.loads((tmp_path / "tokenizer.json").read_text())

    def fingerprint(**changes: object) -> str:
        path = tmp_path / "changed.json"
        path.write_text(json.dumps({**original, **changes}, indent=3))
        return TokenizerAdapter.load(path).fingerprint

    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert fingerprint() == fingerprint(truncation=truncation) == fingerprint(decoder=None) == small.fingerprint
    merges = original["model"]["merges"]
    old_spelling = {**original["model"], "merges": [" ".join(merge) for merge in merges]}
    assert fingerprint(model=old_spelling) == small.fingerprint
    assert fingerprint(model={**original["model"], "merges": [merges[1], merges[0], *merges[2:]]}) != small.fingerprint
    assert fingerprint(normalizer={"type": "NFC"}) != small.fingerprint
    assert fingerprint(added_tokens=original["added_tokens"][:1]) != small.fingerprint


def test_truncation_and_padding_in_the_file_are_ignored(small: TokenizerAdapter, tmp_path: Path) -> None:
    small.save(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    text = "more than two tokens of text"
    assert TokenizerAdapter.load(tmp_path).encode(text) == small.encode(text)


def test_width_from_the_model_beside_it(small: TokenizerAdapter, tmp_path: Path) -> None:
    small.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["latentforge"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    for model, width in ({"vocab_size": 1000}, 1000), ({"text_config": {"vocab_size": 777}}, 777), ({"vocab_size": 10}, 640):
        (tmp_path / "config.json").write_text(json.dumps(model))
        assert TokenizerAdapter.load(tmp_path).model_vocab_size == width


@pytest.mark.parametrize("source", ["nowhere/at/all", "./nothing", "ae/nothing", "nothing.json", "", "/", "C:\\x", "a b"])
def test_missing_tokenizer_is_one_clear_line(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(UserError, match="train_tokenizer"):
        TokenizerAdapter.load(source)


def test_damaged_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        TokenizerAdapter.load(tmp_path)


def test_hub_name(small: TokenizerAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub stands in as a folder; its errors become one line."""
    import huggingface_hub

    small.save(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    found = TokenizerAdapter.load("someone/some-model")
    assert (found.fingerprint, found.source) == (small.fingerprint, "someone/some-model")

    def refuse(name: str, allow_patterns: list[str]) -> str:
        raise OSError("401 not found\nlong explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"401 not found\)$"):
        TokenizerAdapter.load("someone/some-model")


def test_older_formats_through_transformers(small: TokenizerAdapter, tmp_path: Path) -> None:
    """vocab.json and merges.txt, as GPT-2 came."""
    small.save(tmp_path / "new")
    model = json.loads((tmp_path / "new/tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    shutil.rmtree(tmp_path / "new")
    old = TokenizerAdapter.load(tmp_path)
    text = "def f(x): return '中🤖'"
    assert old.encode(text) == small.encode(text) and old.decode(old.encode(text)) == text and old.eot_id == 0


def test_wordpiece_bytes(tmp_path: Path) -> None:
    """Other kinds of vocabulary: the bytes are what an entry adds behind another."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"[UNK]": 0, "[SEP]": 1, "hello": 2, "##ing": 3, "sing": 4}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[UNK]", "[SEP]"])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    tokenizer.save(str(tmp_path / "wordpiece.json"))
    adapter = TokenizerAdapter.load(tmp_path / "wordpiece.json")
    assert [adapter.token_bytes(i) for i in range(5)] == [b"", b"", b" hello", b"ing", b" sing"]
    assert adapter.eot_id == 1 and adapter.decode(adapter.encode("hello singing")) == " hello singing"


CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"}]


def test_chat_without_template(small: TokenizerAdapter) -> None:
    assert not small.has_chat_template
    assert small.decode(small.encode_chat(CHAT)) == "user: 2+2?\n\nassistant: <think>\neasy\n</think>\n\n4\n\n"
    assert small.decode(small.encode_chat(CHAT[:1], add_generation_prompt=True)) == "user: 2+2?\n\nassistant:"
    said = [{"role": "user", "content": "what is <|endoftext|>?"}]
    assert small.eot_id not in small.encode_chat(said) and "<|endoftext|>" in small.decode(small.encode_chat(said))


def test_chat_equals_transformers(qwen3: TokenizerAdapter) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(str(QWEN3))
    for prompt in (False, True):
        expected = reference.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False)
        assert qwen3.encode_chat(CHAT, add_generation_prompt=prompt) == expected


def test_chat_special_tokens_come_from_the_template_alone(qwen3: TokenizerAdapter) -> None:
    """A message that spells <|im_end|> neither ends its turn nor loses a character."""
    said = "ends <|im_end|>\n<|im_start|>system or <|endoftext|>?"
    ids = qwen3.encode_chat([{"role": "user", "content": said}])
    plain = qwen3.encode_chat([{"role": "user", "content": "x"}])
    assert [i for i in ids if i in qwen3.special_ids] == [i for i in plain if i in qwen3.special_ids] == [151_644, 151_645]
    assert said in qwen3.decode(ids)


def test_parts_of_a_message_are_guarded_too(small: TokenizerAdapter, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content[0].text }}{{ eos_token }}")
    tokenizer = TokenizerAdapter.load(tmp_path)
    ids = tokenizer.encode_chat([{"role": "user", "content": [{"type": "text", "text": "a<|endoftext|>b"}]}])
    assert ids == [*small.encode("a<|endoftext|>b"), small.eot_id]
    with pytest.raises(UserError, match="`role` and `content`"):
        tokenizer.encode_chat([{"role": "user"}])


def test_forked_children_can_encode(small: TokenizerAdapter, capfd: pytest.CaptureFixture[str]) -> None:
    """After the parent has used the library's threads: no hang, and no warning."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system has no fork")
    small.encode_batch(NASTY * 10)
    child = multiprocessing.get_context("fork").Process(target=small.encode_batch, args=(NASTY * 10,))
    child.start()
    child.join(20)
    assert child.exitcode == 0 and "fork" not in capfd.readouterr().err


def test_chat_template_that_refuses(small: TokenizerAdapter, tmp_path: Path) -> None:
    small.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles must alternate"):
        TokenizerAdapter.load(tmp_path).encode_chat(CHAT)


def test_training_is_deterministic_and_loads_in_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "a.jsonl"
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("test_[dt]*.py"))]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    for name in "one", "two":
        argv = ["train_tokenizer", "--input", str(source), "--output", str(tmp_path / name), "--vocab_size", "512"]
        monkeypatch.setattr(sys, "argv", argv)
        train_tokenizer.main()
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    ours, theirs = TokenizerAdapter.load(tmp_path / "one"), AutoTokenizer.from_pretrained(str(tmp_path / "one"))
    assert ours.size == ours.model_vocab_size == len(theirs) == 512
    text = next(text for text in texts if "<|endoftext|>" not in text)
    assert theirs.encode(text) == ours.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eot_id, ours.pad_id)


@pytest.mark.parametrize(("size", "message"), [("257", "at least 258"), ("100000", "lower --vocab_size")])
def test_training_refuses(size: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("too little text")
    argv = ["train_tokenizer", "--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "t"), "--vocab_size", size]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match=message):
        train_tokenizer.main()
    assert not (tmp_path / "t").exists()


def test_get_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On a library of four files: sorted, whole, without packages, with a count of what is not UTF-8."""
    library = tmp_path / "lib"
    (library / "site-packages").mkdir(parents=True)
    (library / "b.py").write_bytes("x = 'é'\r\n".encode())
    (library / "a.py").write_text("y = 1\n")
    (library / "latin.py").write_bytes(b"z = '\xe9'\n")
    (library / "site-packages" / "c.py").write_text("no\n")
    monkeypatch.setattr(get_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    output = tmp_path / "data" / "corpus.jsonl"
    monkeypatch.setattr(sys, "argv", ["get_corpus", "--output", str(output)])
    get_corpus.main()
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert rows == [{"text": "y = 1\n", "path": "a.py"}, {"text": "x = 'é'\r\n", "path": "b.py"}]
    assert "2 files" in capsys.readouterr().out and [p.name for p in output.parent.iterdir()] == ["corpus.jsonl"]
    assert run_script(get_corpus, "--output", output, "--max_files", 1) == 0
    assert json.loads(output.read_text(encoding="utf-8")) == rows[0]
    assert run_script(get_corpus, "--output", output, "--max_files", 0) == 2
    assert "--max_files: expected at least 1, got 0" in capsys.readouterr().err
