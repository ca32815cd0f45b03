"""Tokenizers in GGUF: a `tokenizer.json` to metadata keys and back, or a synthetic vocabulary.

llama.cpp's `gemma4` tokenizer is byte-pair merging over characters, spaces written as U+2581, with
a byte token for what no character token covers; pieces never span a line feed.
"""

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from gemmaqat.interop.gguf_file import GgufFile
from gemmaqat.json_file import read_json
from gemmaqat.models.config import ModelConfig

SYNTHETIC = "gemmaqat.synthetic_vocabulary"
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# Printed although they are control tokens: parsers of chats look for them.
_VISIBLE = frozenset(
    ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>",
     "<tool_response|>", '<|"|>')
)  # fmt: skip
_PREFIX = "tokenizer.ggml."
_TOKENIZER, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_GENERATION, _TEMPLATE = "generation_config.json", "chat_template.jinja"


class TokenType(IntEnum):
    """Kinds of tokens, by llama.cpp's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def tokenizer_metadata(files: Mapping[str, Path], config: ModelConfig) -> dict[str, Any]:
    """Every tokenizer key for a model.

    Args:
        files: companions of the checkpoint; of them `tokenizer.json`, `tokenizer_config.json`,
            `chat_template.jinja` and `generation_config.json` are read.
        config: its vocabulary and special ids. Rows beyond the tokenizer get unused tokens, so that
            the model stays whole.

    Raises:
        ValueError: the tokenizer is not Gemma's kind, or has more tokens than the model has rows.
    """
    if _TOKENIZER not in files:
        if "tokenizer.model" in files:
            raise ValueError(
                f"{files['tokenizer.model']}: a GGUF needs the merges of a tokenizer.json; "
                "there is none beside it, copy the checkpoint's own there."
            )
        return _synthetic(config)
    path = files[_TOKENIZER]
    definition = read_json(path)
    tokens, types = _vocabulary(definition, path, config.vocab_size)
    merges = [_merge(pair, path) for pair in definition["model"].get("merges", [])]
    if not merges:
        raise ValueError(f"{path}: holds no merges, which llama.cpp requires.")
    metadata = _common(tokens, types, merges, config)
    ids = {token: i for i, token in enumerate(tokens)}
    for role, name in (("unknown", definition["model"].get("unk_token")), ("mask", "<mask>")):
        if name in ids:
            metadata[f"{_PREFIX}{role}_token_id"] = ids[name]
    template = _chat_template(files)
    if template:
        metadata["tokenizer.chat_template"] = template
    if _GENERATION in files:
        suppressed = read_json(files[_GENERATION]).get("suppress_tokens")
        if suppressed:
            metadata[f"{_PREFIX}suppress_tokens"] = [int(i) for i in suppressed]
    return metadata


def _common(
    tokens: list[str], types: list[TokenType], merges: list[str], config: ModelConfig
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        f"{_PREFIX}model": "gemma4",
        f"{_PREFIX}tokens": tokens,
        f"{_PREFIX}scores": [0.0] * len(tokens),
        f"{_PREFIX}token_type": [int(kind) for kind in types],
        f"{_PREFIX}merges": merges,
        f"{_PREFIX}bos_token_id": config.bos_id,
        f"{_PREFIX}eos_token_id": config.eos_id,
        f"{_PREFIX}padding_token_id": config.pad_id,
        f"{_PREFIX}add_bos_token": True,
        f"{_PREFIX}add_space_prefix": False,
    }
    ends = [i for i in config.stop_ids if i != config.eos_id]
    turn = [i for i in ends if i < len(types) and types[i] == TokenType.CONTROL]
    if turn:
        metadata[f"{_PREFIX}eot_token_id"] = turn[0]
    return metadata


def _vocabulary(
    definition: dict[str, Any], path: Path, vocab_size: int
) -> tuple[list[str], list[TokenType]]:
    """Tokens and their types by id, as many as the model has rows."""
    model = definition.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not model.get("byte_fallback"):
        kind = model.get("type") if isinstance(model, dict) else None
        raise ValueError(
            f"{path}: the tokenizer is {kind!r}, expected 'BPE' with byte_fallback as Gemma's; "
            "llama.cpp would split text in another way."
        )
    by_id = {i: token for token, i in model["vocab"].items()}
    added = {item["id"]: item for item in definition.get("added_tokens") or []}
    by_id |= {i: item["content"] for i, item in added.items()}
    largest = max(by_id, default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{path}: ids up to {largest}, the model's table has {vocab_size} rows; the tokenizer "
            "belongs to another model."
        )
    tokens, types = [], []
    for i in range(vocab_size):
        token, item = by_id.get(i), added.get(i)
        tokens.append(f"[PAD{i}]" if token is None else token)
        if token is None:
            types.append(TokenType.UNUSED)
        elif _BYTE.fullmatch(token):
            types.append(TokenType.BYTE)
        elif item is None:
            types.append(TokenType.NORMAL)
        elif item.get("special") and token not in _VISIBLE:
            types.append(TokenType.CONTROL)
        else:
            types.append(TokenType.USER_DEFINED)
    return tokens, types


def _merge(pair: Any, path: Path) -> str:
    """`left right`; older files write merges so, newer ones as a list of two."""
    parts = pair.split(" ") if isinstance(pair, str) else pair
    if len(parts) != 2 or any(" " in part for part in parts):
        raise ValueError(
            f"{path}: the merge {pair!r} is not two pieces without spaces; a Gemma tokenizer "
            f"writes spaces as {_SPACE!r}."
        )
    return " ".join(parts)


def _synthetic(config: ModelConfig) -> dict[str, Any]:
    """A vocabulary for a model that has none: token i is byte i, as our byte tokenizer has it.

    Below 128 a byte is its character, above it is a byte token, beyond 256 nothing.
    """
    names = {config.pad_id: "<pad>", config.eos_id: "<eos>", config.bos_id: "<bos>"}
    tokens, types = [], []
    for i in range(config.vocab_size):
        if i in names:
            tokens.append(names[i])
            types.append(TokenType.CONTROL)
        elif i < 128:
            tokens.append(_SPACE if chr(i) == " " else chr(i))
            types.append(TokenType.NORMAL)
        elif i < 256:
            tokens.append(f"<0x{i:02X}>")
            types.append(TokenType.BYTE)
        else:
            tokens.append(f"[PAD{i}]")
            types.append(TokenType.UNUSED)
    # Required, and of no effect: merging begins with single characters.
    merges = ["<pad> <eos>"]
    return _common(tokens, types, merges, config) | {SYNTHETIC: True}


def _chat_template(files: Mapping[str, Path]) -> str | None:
    if _TEMPLATE in files:
        return files[_TEMPLATE].read_text(encoding="utf-8")
    for name in ("chat_template.json", _SETTINGS):
        template = read_json(files[name]).get("chat_template") if name in files else None
        if isinstance(template, list):  # several, by name
            named = {item.get("name"): item.get("template") for item in template}
            template = named.get("default")
        if template:
            return template
    return None


class ExtractedFiles(Mapping[str, Path]):
    """The tokenizer of a GGUF as the files of a checkpoint, written out when first asked for.

    They lie in a temporary folder that goes when this object goes.
    """

    def __init__(self, file: GgufFile):
        self._file = file
        self._folder: Path | None = None
        tokens = file.metadata.get(f"{_PREFIX}tokens")
        merges = file.metadata.get(f"{_PREFIX}merges")
        self._names: list[str] = []
        real = isinstance(tokens, tuple) and isinstance(merges, tuple)
        if not real or file.metadata.get(SYNTHETIC) or not _is_gemma(file):
            return
        self._names = [_TOKENIZER, _SETTINGS]
        if isinstance(file.metadata.get("tokenizer.chat_template"), str):
            self._names.append(_TEMPLATE)
        if isinstance(file.metadata.get(f"{_PREFIX}suppress_tokens"), np.ndarray):
            self._names.append(_GENERATION)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Path:
        if name not in self._names:
            raise KeyError(name)
        if self._folder is None:
            folder = Path(tempfile.mkdtemp(prefix="gemmaqat-tokenizer-"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self._write(folder)
            self._folder = folder
        return self._folder / name

    def _write(self, folder: Path) -> None:
        metadata = self._file.metadata
        tokens = metadata[f"{_PREFIX}tokens"]
        roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "mask": "mask"}
        ids = {name: metadata.get(f"{_PREFIX}{role}_token_id") for name, role in roles.items()}
        named = {
            f"{name}_token": tokens[i]
            for name, i in ids.items()
            if isinstance(i, int) and 0 <= i < len(tokens)
        }
        files = {
            _TOKENIZER: tokenizer_json(self._file),
            _SETTINGS: {"tokenizer_class": "GemmaTokenizer", **named},
        }
        suppressed = metadata.get(f"{_PREFIX}suppress_tokens")
        if _GENERATION in self._names:
            files[_GENERATION] = {"suppress_tokens": np.asarray(suppressed).tolist()}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        if _TEMPLATE in self._names:
            template = metadata["tokenizer.chat_template"]
            (folder / _TEMPLATE).write_text(template, encoding="utf-8")


def _is_gemma(file: GgufFile) -> bool:
    return file.metadata.get(f"{_PREFIX}model") == "gemma4"


def tokenizer_json(file: GgufFile) -> dict[str, Any]:
    """A `tokenizer.json` that gives the ids llama.cpp gives.

    Raises:
        ValueError: tokens, types and merges of the file do not belong together.
    """
    metadata = file.metadata
    tokens = file.require(f"{_PREFIX}tokens", tuple, "an array of strings")
    merges = file.require(f"{_PREFIX}merges", tuple, "an array of strings")
    types = metadata.get(f"{_PREFIX}token_type", np.full(len(tokens), TokenType.NORMAL))
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise ValueError(
            f"{file.path}: {len(tokens)} tokens, but their types are not as many; the file is "
            "damaged, fetch it again."
        )
    vocabulary = {
        token: i
        for i, token in enumerate(tokens)
        if not (types[i] == TokenType.UNUSED and token == f"[PAD{i}]")
    }
    known = [merge.split(" ", 1) for merge in merges]
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys() for pair in known):
        raise ValueError(
            f"{file.path}: a merge of the tokenizer makes no token of it; the file is damaged, "
            "fetch it again."
        )
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    added = [
        {
            "id": i,
            "content": tokens[i],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": types[i] in special or tokens[i] in _VISIBLE,
        }
        for i in np.flatnonzero(np.isin(types, (*special, TokenType.USER_DEFINED))).tolist()
    ]
    unknown = metadata.get(f"{_PREFIX}unknown_token_id")
    has_unknown = isinstance(unknown, int) and 0 <= unknown < len(tokens)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[unknown] if has_unknown else None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": known,
        },
    }
