"""Text <-> token ids <-> bytes, the same for every tokenizer: a hub name, a folder, a `tokenizer.json`, or one trained here.

Text is encoded as ordinary text: a document that mentions "<|endoftext|>" does not end there. Only the chat template
and the packer place special tokens. `decode` joins the exact bytes of the tokens, so it is concatenative,
`bytes(a + b) = bytes(a) + bytes(b)`, also where a character is split over two tokens. A round trip is exact up to the
tokenizer's own normalisation (NFC in Qwen's; one space that SentencePiece-like ones put before a text).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from configs.errors import UserError
from configs.files import read_json, read_text

# Parallel here, and not in forked children (data loaders), where the library's threads are gone: it would warn or hang.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"  # what tokenizers trained here use
# What separates documents in pretraining; eos_token may be another one (Qwen's, "<|im_end|>", ends a turn of a chat).
EOT_NAMES = (END_OF_TEXT, "<|end_of_text|>")
EOS_NAMES = ("</s>", "<eos>", "[SEP]")
PAD_NAMES = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>")
# karpathy/tinyllamas' tok512: these models saw "<s> story <s> story", and </s> never.
EOT_OF_FINGERPRINT = {"3a334b1a5e4ff4446d77285d3d89f9a3": "<s>"}
QWEN_SIZES, QWEN_WIDTH = range(151_643, 151_937), 151_936  # entries of Qwen2..Qwen3 tokenizers, width of their models
WIDTH_MULTIPLE = 64
LARGEST_VOCABULARY = 1 << 22  # the largest known ones are a quarter of it; ids beyond would take memory without end
SETTINGS = "latentforge"  # our key in tokenizer_config.json
GUARD = "\ufdd0\ufdd1"  # two noncharacters, put inside special-token strings that a chat message mentions
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
Messages = Sequence[Mapping[str, Any]]
T = TypeVar("T")


class TokenizerAdapter:
    """A tokenizer with its special tokens, the bytes of its tokens, its chat template and a fingerprint.

    Build with `load`. `size` counts the entries, added tokens included; `model_vocab_size` >= size is the width of the
    model's table: that of config.json beside the tokenizer, else of a known family, else size rounded up to a multiple
    of 64. `eot_id` ends every document; `pad_id` may equal it; any of `stop_ids` in generated text ends it. `start_id` is what
    a model with this tokenizer expects before a text: its begin-of-text token, else `eot_id`.
    """

    def __init__(
        self, tokenizer: Tokenizer, config: Mapping[str, Any], chat_template: str | None, width: int | None, source: str
    ) -> None:
        """`config`: as in tokenizer_config.json; `width`: the model's vocabulary size where it is known."""
        tokenizer.no_truncation()  # some tokenizer.json files carry these settings
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        self.source, self.chat_template = source, chat_template
        self._tokenizer, self._config = tokenizer, dict(config)
        self._added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not 0 < self.size <= LARGEST_VOCABULARY:
            raise UserError(f"tokenizer {source} has {self.size} entries, expected 1 to {LARGEST_VOCABULARY}")

        settings = _expect(dict, self._config.get(SETTINGS), f"{source}: {SETTINGS} of tokenizer_config.json") or {}
        eot = self._first(_expect(str, settings.get("eot_token"), f"{source}: {SETTINGS}.eot_token"), *EOT_NAMES)
        if eot is None:
            eot = self._first(EOT_OF_FINGERPRINT.get(self.fingerprint), self._name("eos_token"), *EOS_NAMES)
        if eot is None:
            raise UserError(f"tokenizer {source} names no end-of-text token: set eos_token in its tokenizer_config.json")
        pad = self._first(self._name("pad_token"), *PAD_NAMES)
        self.eot_id, self.pad_id = eot, eot if pad is None else pad
        eos, bos = (self._first(self._name(key)) for key in ("eos_token", "bos_token"))
        self.stop_ids = frozenset({eot, *(i for i in (eos, bos) if i is not None)})  # a BOS begins another document
        self.start_id = eot if bos is None or self._config.get("add_bos_token") is False else bos

        width = _expect(int, settings.get("model_vocab_size") or width, f"{source}: the model's vocabulary size") or 0
        if width > LARGEST_VOCABULARY:
            raise UserError(
                f"tokenizer {source}: the model's vocabulary size is {width}, expected at most {LARGEST_VOCABULARY}"
            )
        if width < self.size:
            width = QWEN_WIDTH if self.size in QWEN_SIZES else -(-self.size // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        self.model_vocab_size = width

    @classmethod
    def load(cls, source: str | Path) -> TokenizerAdapter:
        """From a folder, a tokenizer.json or a name on the Hugging Face hub (whose cache serves offline).

        Raises UserError when it is not there or cannot be read.
        """
        path = os.path.expanduser(source)
        if os.path.isfile(path):
            return _from_file(Path(path), str(source))
        if os.path.isdir(path):
            return _from_folder(Path(path), str(source))
        return _from_hub(str(source))

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text: no special token is added, and none is recognised in it."""
        return self._encode(self._tokenizer, [text])[0].ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel; int32 arrays, (n_tokens,)."""
        return [np.array(e.ids, dtype=np.int32) for e in self._encode(self._tokenizer, texts)]

    def encode_chat(self, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
        """Ids of a chat [{"role", "content"}, ...] in the tokenizer's template.

        Without a template: "role: content" and a blank line for each message, then "assistant:" for a generation prompt.
        Special tokens come from the template alone, never from what a message says. Raises UserError where the template
        refuses the messages.
        """
        return self.encode_rendered([self.render_chat(messages, add_generation_prompt)])[0].tolist()

    def render_chat(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """The chat as text for `encode_rendered`; special-token strings within messages carry a GUARD."""
        if not all(isinstance(m, Mapping) and "role" in m and "content" in m for m in messages):
            raise UserError("a chat must be a list of objects with `role` and `content`")
        guarded = self._guard(list(messages))
        if self.chat_template is None:
            text = "".join(f"{m['role']}: {m['content']}\n\n" for m in guarded)
            return text + "assistant:" if add_generation_prompt else text
        from jinja2 import TemplateError  # lazy, as it takes transformers a second to import
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {key: self._name(key) or "" for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        options |= {"chat_template": self.chat_template, "add_generation_prompt": add_generation_prompt}
        try:
            texts = render_jinja_template([guarded], **options)[0]
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise UserError(f"the chat template of {self.source} refuses these messages: {error}") from None
        return texts[0]

    def encode_rendered(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of texts from `render_chat`, in parallel: special tokens are recognised, guarded ones are ordinary text."""
        plain = [i for i, text in enumerate(texts) if GUARD not in text]
        rows: dict[int, np.ndarray] = {}
        for i, encoding in zip(plain, self._encode(self._special_tokenizer, [texts[i] for i in plain]), strict=True):
            rows[i] = np.array(encoding.ids, dtype=np.int32)
        for i in set(range(len(texts))) - rows.keys():
            ids: list[int] = []
            for piece in self._special_pattern.split(texts[i]):
                special = self._first(piece) if self._special_pattern.fullmatch(piece) else None
                ids += self.encode(piece.replace(GUARD, "")) if special is None else [special]
            rows[i] = np.array(ids, dtype=np.int32)
        return [rows[i] for i in range(len(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens and ids past the tokenizer give nothing, broken UTF-8 gives U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Exact bytes of one token, which need not be whole UTF-8; b"" for special tokens and ids past the tokenizer."""
        return self._bytes[id] if 0 <= id < self.size else b""

    @cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of each id, (model_vocab_size,) int32."""
        lengths = np.zeros(self.model_vocab_size, dtype=np.int32)
        lengths[: self.size] = [len(piece) for piece in self._bytes]
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides how text becomes ids: vocabulary, merges, normaliser, pre-tokenizer, added tokens.

        32 hex digits. Not of the decoder, the chat template or where it came from; fields that are null, false or empty
        are left out, so that a library version that adds one more optional setting changes nothing.
        """
        state = json.loads(self._tokenizer.to_str())
        model = state["model"]
        merges = [m.split(" ") if isinstance(m, str) else m for m in model.pop("merges", None) or []]
        tables = [model.pop("vocab"), merges, sorted(state["added_tokens"], key=lambda token: token["id"])]
        rules = _lean([state.get("normalizer"), state.get("pre_tokenizer"), model])
        return hashlib.blake2b(json.dumps([tables, rules], sort_keys=True).encode(), digest_size=16).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write a folder that `load` (and transformers' AutoTokenizer) reads back as the same tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"eot_token": self._tokenizer.id_to_token(self.eot_id), "model_vocab_size": self.model_vocab_size}
        pad = self._tokenizer.id_to_token(self.pad_id)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self._config, "pad_token": pad, SETTINGS: settings}
        config.setdefault("eos_token", settings["eot_token"])
        config.pop("chat_template", None)
        (folder / "tokenizer.json").write_text(self._tokenizer.to_str(), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
        template = folder / "chat_template.jinja"
        if self.chat_template is None:
            template.unlink(missing_ok=True)
        else:
            template.write_bytes(self.chat_template.encode())

    def _encode(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Any]:
        try:
            return tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            raise UserError("text to encode must be valid Unicode (a lone surrogate cannot be UTF-8)") from None

    def _name(self, role: str) -> str | None:
        """What tokenizer_config.json calls e.g. `eos_token`: a string, or an object with `content`."""
        value = self._config.get(role)
        return _expect(str, value.get("content") if isinstance(value, dict) else value, f"{self.source}: {role}")

    def _first(self, *names: str | None) -> int | None:
        """Id of the first name that is an entry."""
        ids = (self._tokenizer.token_to_id(name) for name in names if name)
        return next((i for i in ids if i is not None), None)

    def _guard(self, value: Any) -> Any:
        """A message, or a part of one, with a GUARD behind the first character of every special token's string."""
        if isinstance(value, str):
            return self._special_pattern.sub(lambda match: match[0][0] + GUARD + match[0][1:], value)
        if isinstance(value, Mapping):
            return {key: self._guard(item) for key, item in value.items()}
        return [self._guard(item) for item in value] if isinstance(value, list) else value

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        """Any special token's string, as a group, so that `split` keeps it; longest first."""
        names = sorted((self._added[i].content for i in self.special_ids), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names)) or '(?!)'})")

    @cached_property
    def fallback_ids(self) -> frozenset[int]:
        """Tokens such as <0x2C> of a tokenizer that falls back to bytes: each stands for its byte where no other token does."""
        return frozenset(i for piece, i in self._tokenizer.get_vocab().items() if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", piece))

    @cached_property
    def _special_tokenizer(self) -> Tokenizer:
        """A copy that recognises special tokens in text."""
        return Tokenizer.from_str(self._tokenizer.to_str())

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Bytes of every entry, `size` of them."""
        table, to_bytes = [b""] * self.size, piece_decoder(self._tokenizer)
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            table[i] = to_bytes(piece)
        for i, token in self._added.items():
            table[i] = b"" if token.special else token.content.encode()
        return table


class Utf8Stream:
    """Token ids in, whole characters out: what is pushed so far, less the bytes of an unfinished character."""

    def __init__(self, tokenizer: TokenizerAdapter) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete."""
        return self._decoder.decode(b"".join(map(self._token_bytes, ids)))

    def flush(self) -> str:
        """U+FFFD if the text ends within a character, else nothing; the stream can be used anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _byte_level_alphabet() -> dict[int, int]:
    """GPT-2's byte alphabet, inverted: the characters that stand for unprintable bytes (256, 257, ...) -> the byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return {256 + n: byte for n, byte in enumerate(b for b in range(256) if b not in printable)}


def piece_decoder(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """A function from a vocabulary entry to the bytes that it stands for inside a text."""
    parts = [part.__getstate__().decode() for part in (tokenizer.decoder, tokenizer.pre_tokenizer) if part is not None]
    kinds = "".join(parts)
    if '"ByteLevel"' in kinds:
        alphabet = _byte_level_alphabet()

        def byte_level(piece: str) -> bytes:
            try:
                return piece.translate(alphabet).encode("latin-1")
            except UnicodeEncodeError:  # an entry outside the alphabet stands for itself
                return piece.encode()

        return byte_level
    if '"ByteFallback"' in kinds or "\u2581" in kinds or "\\u2581" in kinds:

        def sentencepiece(piece: str) -> bytes:
            match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
            return bytes([int(match[1], 16)]) if match else piece.replace("\u2581", " ").encode()

        return sentencepiece
    # WordPiece and the like: what the entry adds behind another one
    anchor = next((piece for piece in tokenizer.get_vocab() if piece.isalnum()), "a")
    decode = tokenizer.decoder.decode if tokenizer.decoder is not None else " ".join
    skip = len(decode([anchor]))
    return lambda piece: decode([anchor, piece])[skip:].encode()


def _lean(value: Any) -> Any:
    """Without the entries of mappings that are null, false, empty, or about offsets, which are no part of the ids."""
    if isinstance(value, dict):
        lean = {key: _lean(item) for key, item in value.items() if key != "trim_offsets"}
        return {key: item for key, item in lean.items() if not (item is None or item is False or item in ("", [], {}))}
    return [_lean(item) for item in value] if isinstance(value, list) else value


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is no such file."""
    return read_json(path) if path.exists() else {}


def _expect(kind: type[T], value: Any, what: str) -> T | None:
    """A setting of a tokenizer's files, which may be left out. Raises UserError for another type."""
    if value is None or (isinstance(value, kind) and not isinstance(value, bool)):
        return value
    raise UserError(f"tokenizer {what}: expected {kind.__name__}, got {reprlib.repr(value)}")


def _from_file(path: Path, source: str) -> TokenizerAdapter:
    """A tokenizer file; where it is called tokenizer.json, with what lies beside it."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path} is not a tokenizer.json of the tokenizers library: {str(error)[:300]}") from None
    if path.name != "tokenizer.json":
        return TokenizerAdapter(tokenizer, {}, None, None, source)
    folder = path.parent
    config = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    if (folder / "chat_template.jinja").is_file():
        template = read_text(folder / "chat_template.jinja")
    model = _read_json(folder / "config.json")
    inner = _expect(dict, model.get("text_config"), f"{source}: text_config of config.json") or {}
    template = _expect(str, template, f"{source}: chat_template")
    return TokenizerAdapter(tokenizer, config, template, model.get("vocab_size") or inner.get("vocab_size"), source)


def _from_folder(folder: Path, source: str) -> TokenizerAdapter:
    """A folder with tokenizer.json, or with an older format that transformers converts."""
    if (folder / "tokenizer.json").is_file():
        return _from_file(folder / "tokenizer.json", source)
    if not any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise UserError(f"{folder} holds no tokenizer (no tokenizer.json); train one with tools/train_tokenizer.py")
    from transformers import AutoTokenizer

    try:
        converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise UserError(f"transformers cannot read the tokenizer in {folder}: {' '.join(str(error).split())}") from None
    with TemporaryDirectory() as temporary:
        converted.save_pretrained(temporary)
        if not (Path(temporary) / "tokenizer.json").is_file():
            raise UserError(f"the tokenizer in {folder} has no fast version (tokenizer.json), which this project needs")
        (Path(temporary) / "config.json").write_text(json.dumps(_read_json(folder / "config.json")), encoding="utf-8")
        return _from_file(Path(temporary) / "tokenizer.json", source)


def _from_hub(name: str) -> TokenizerAdapter:
    """A hub name, through huggingface_hub's cache; a name that can only be a path fails at once."""
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) and not name.endswith(".json")
    first, slash, _ = name.partition("/")
    if not is_name or (slash and Path(first).exists()):
        wanted = "a folder, a tokenizer.json or a hub name"
        raise UserError(f"no tokenizer at {name}: expected {wanted}; tools/train_tokenizer.py trains one")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(name, allow_patterns=HUB_FILES)
    except (OSError, ValueError) as error:  # httpx's and the hub's errors included
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{name} is no local path, and the hub gives no tokenizer of that name ({reason})") from None
    return _from_folder(Path(folder), name)
