"""Tokenizers: bytes, a Hugging Face `tokenizer.json`, a SentencePiece model, or a BPE trained here.

All of them turn text into ids without adding anything: the beginning and end of text are placed
by packing, so that every one of them appears exactly once.
"""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from gemmaqat.data.config import DataConfig
from gemmaqat.json_file import read_json


@runtime_checkable
class Tokenizer(Protocol):
    """What the pipeline and generation need of a tokenizer.

    Attributes:
        name: for reports, such as `bytes` or the path of its file.
        fingerprint: hash of its definition; equal fingerprints give equal ids.
        vocab_size: one more than the largest id.
    """

    name: str
    fingerprint: str
    vocab_size: int
    pad_id: int
    eos_id: int
    bos_id: int

    def encode(self, text: str, *, after: str = "", where: str = "text") -> list[int]:
        """Ids of `text`, nothing added.

        `after` is the text it continues, whose ids stay what they are: some tokenizers put a space
        before a beginning, which has no place inside. `where` names the origin in errors.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; special tokens are left out."""
        ...


BYTE_VOCABULARIES = {"bytes": 128, "bytes-256": 256}


class ByteTokenizer:
    """One token per byte. 128 entries hold ASCII, 256 every text.

    The control characters 0, 1 and 2 serve as padding, end and beginning of text: the ids that
    Gemma gives them. No text holds them (files with control characters are taken for binary).
    """

    pad_id, eos_id, bos_id = 0, 1, 2

    def __init__(self, vocab_size: int = 128):
        self.vocab_size = vocab_size
        self.name = f"bytes-{vocab_size}"
        self.fingerprint = self.name

    def encode(self, text: str, *, after: str = "", where: str = "text") -> list[int]:
        """Bytes of the UTF-8 text; raises as `check` does."""
        return list(self.check(text, where=where))

    def check(self, text: str, *, where: str) -> bytes:
        """The UTF-8 text as bytes.

        Raises:
            ValueError: a byte lies outside the vocabulary, or is one of the special tokens.
        """
        data = text.encode()
        if data and (max(data) >= self.vocab_size or min(data) <= self.bos_id):
            wrong = next(i for i, b in enumerate(data) if not self.bos_id < b < self.vocab_size)
            raise ValueError(
                f"{where}: byte {data[wrong]} at offset {wrong} is outside the vocabulary of the "
                f"byte tokenizer (3 to {self.vocab_size - 1}); set data.tokenizer='bytes-256' for "
                "text beyond ASCII, or another tokenizer."
            )
        return data

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; a broken UTF-8 sequence shows as replacement characters."""
        return bytes(int(i) for i in ids if self.bos_id < i < 256).decode(errors="replace")


class FileTokenizer:
    """A Hugging Face `tokenizer.json`, read with the `tokenizers` library."""

    def __init__(self, path: Path, *, settings: dict[str, Any] | None = None):
        import tokenizers

        self.name = str(path)
        try:
            content = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
            definition = json.loads(content)
            inside = {name: _without_prefix(definition.get(name)) for name in _PREFIXING}
            self._inside: Any = None  # what stands inside a text, where beginnings differ
            if any(inside[name] != definition.get(name) for name in _PREFIXING):
                self._inside = tokenizers.Tokenizer.from_str(json.dumps(definition | inside))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{path}: not a tokenizer.json of the tokenizers library ({error}); download it "
                "again from where the checkpoint came from."
            ) from None
        for tokenizer in (self._tokenizer, self._inside):
            if tokenizer is not None:  # settings of the one who saved it, for batches of its own
                tokenizer.no_truncation()
                tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        settings = settings or {}
        find = lambda key, names: _special_id(vocabulary, settings.get(key), names, key, path)  # noqa: E731
        self.bos_id = find("bos_token", ("<bos>", "<s>", "<|begin_of_text|>", "<|endoftext|>"))
        self.eos_id = find("eos_token", ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"))
        self.pad_id = find("pad_token", ("<pad>", "<|pad|>", "<|endoftext|>", "</s>", "<eos>"))
        special = f"{self.bos_id} {self.eos_id} {self.pad_id}".encode()
        self.fingerprint = hashlib.sha256(content + special).hexdigest()[:16]

    def encode(self, text: str, *, after: str = "", where: str = "text") -> list[int]:
        """Ids of `text`; special tokens written in it are recognised."""
        if not after or self._inside is None:
            return self._ids(text, self._tokenizer)
        return _continue(
            after,
            text,
            beginning=lambda t: self._ids(t, self._tokenizer),
            inside=lambda t: self._ids(t, self._inside),
        )

    def _ids(self, text: str, tokenizer: Any) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


class SentencePieceTokenizer:
    """A SentencePiece `.model` file. Control pieces written in a text are recognised."""

    def __init__(self, path: Path):
        sentencepiece = _import("sentencepiece", "to read SentencePiece models")
        self.name = str(path)
        content = path.read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        self._model = sentencepiece.SentencePieceProcessor()
        self._inside = sentencepiece.SentencePieceProcessor()  # for what stands inside a text
        try:
            self._model.LoadFromSerializedProto(content)
            self._inside.LoadFromSerializedProto(content + _NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(
                f"{path}: not a SentencePiece model ({error}); download it again."
            ) from None
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        self.pad_id = max(self._model.pad_id(), 0)
        for name, value in (("bos", self.bos_id), ("eos", self.eos_id)):
            if value < 0:
                raise ValueError(
                    f"{path}: the model has no {name} piece, which packing needs; train it with "
                    f"--{name}_id."
                )
        # Control pieces are never found in text by SentencePiece itself; chat templates write them.
        self._control = {
            self._model.id_to_piece(i): i
            for i in range(self.vocab_size)
            if self._model.is_control(i)
        }
        pieces = sorted(self._control, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, pieces)) + ")")
        self._has_prefix = self._model.encode("a") != self._inside.encode("a")

    def encode(self, text: str, *, after: str = "", where: str = "text") -> list[int]:
        """Ids of `text`; control pieces written in it are recognised."""
        if not after or not self._has_prefix:
            return self._ids(text, self._model)
        return _continue(
            after,
            text,
            beginning=lambda t: self._ids(t, self._model),
            inside=lambda t: self._ids(t, self._inside),
        )

    def _ids(self, text: str, model: Any) -> list[int]:
        """Ids of `text`, up to the first control piece by `model`."""
        ids: list[int] = []
        for part in self._pattern.split(text):
            if part in self._control:
                ids.append(self._control[part])
            elif part:
                ids += model.encode(part)
            model = self._inside
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` without control pieces."""
        return self._model.decode([int(i) for i in ids])


def make_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that `config.tokenizer` names; a BPE is trained on the data once and cached.

    Raises:
        FileNotFoundError: it names a file or folder that does not hold a tokenizer.
        ValueError: the file cannot be read, or the data to train a BPE on cannot.
    """
    if config.tokenizer in BYTE_VOCABULARIES:
        return ByteTokenizer(BYTE_VOCABULARIES[config.tokenizer])
    if config.tokenizer == "bpe":
        from gemmaqat.data.bpe import trained_bpe  # reads the data, which needs this module

        return FileTokenizer(trained_bpe(config))
    return load_tokenizer(config.tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer from a `tokenizer.json`, a SentencePiece `.model`, or a folder holding either.

    Raises:
        FileNotFoundError: there is none at `path`.
        ValueError: the file cannot be read as what its name says.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model")]
        existing = [file for file in found if file.is_file()]
        if not existing:
            raise FileNotFoundError(
                f"{path}: holds neither tokenizer.json nor tokenizer.model; copy the checkpoint's "
                "tokenizer there or name another folder in data.tokenizer."
            )
        path = existing[0]
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such tokenizer file; data.tokenizer is 'bytes', 'bytes-256', 'bpe', a "
            "tokenizer.json, a SentencePiece .model, or a folder with one of them."
        )
    if path.suffix == ".model":
        return SentencePieceTokenizer(path)
    return FileTokenizer(path, settings=read_tokenizer_config(path.parent))


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json` of a checkpoint folder, or nothing."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    return read_json(path)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raises ValueError unless a model of `vocab_size` entries can read every id."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer {tokenizer.name} has ids up to {tokenizer.vocab_size - 1}, the model's "
            f"vocabulary ends at {vocab_size - 1}; set data.tokenizer to the model's own."
        )


def _special_id(
    vocabulary: dict[str, int], named: Any, names: Sequence[str], key: str, path: Path
) -> int:
    """Id of the token that tokenizer_config.json names, or of the first usual one."""
    if isinstance(named, dict):
        named = named.get("content")
    for name in ([named] if named else []) + list(names):
        if name in vocabulary:
            return vocabulary[name]
    raise ValueError(
        f"{path}: cannot tell which entry is the {key}; put {key!r} into tokenizer_config.json "
        "beside it."
    )


# Parts of a tokenizer.json that may put a space before the text.
_PREFIXING = ("normalizer", "pre_tokenizer")

# Appended to a serialized ModelProto, sets normalizer_spec (field 3) .add_dummy_prefix (field 3) to
# false: the parser merges a message field that comes twice.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def _continue(
    after: str,
    text: str,
    *,
    beginning: Callable[[str], list[int]],
    inside: Callable[[str], list[int]],
) -> list[int]:
    """Ids of `text` behind `after`: those of the joined text, unless a token of it spans both."""
    before, joined = beginning(after), beginning(after + text)
    if joined[: len(before)] == before:
        return joined[len(before) :]
    return inside(text)


def _without_prefix(part: Any) -> Any:
    """A normalizer or pre-tokenizer (JSON) that puts no space before the text."""
    match part:
        case {"type": "Prepend"}:
            return {"type": "Sequence", "normalizers": []}
        case {"type": "Metaspace" | "ByteLevel"}:
            unset = {"prepend_scheme": "never", "add_prefix_space": False}
            return part | {key: value for key, value in unset.items() if key in part}
        case {"type": "Sequence"}:
            return {
                key: [_without_prefix(each) for each in value] if isinstance(value, list) else value
                for key, value in part.items()
            }
    return part


def _import(module: str, purpose: str) -> Any:
    """Imports an optional library, or says what to install."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{module} is needed {purpose}: pip install {module}") from None
