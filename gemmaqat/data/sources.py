"""Sources of documents: generated tasks, the standard library, files; split for hold-out."""

import dataclasses
import difflib
import glob
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from absl import logging

from gemmaqat.data.chat import ChatTemplate
from gemmaqat.data.config import DataConfig
from gemmaqat.data.documents import Document, Piece
from gemmaqat.data.records import (
    FORMATS,
    Record,
    Records,
    first_binary_byte,
    hash_bytes,
    open_records,
)
from gemmaqat.data.tasks import TaskSource
from gemmaqat.data.tokenizer import ByteTokenizer, Tokenizer

HOLDOUT_MODULUS = 20  # one group of records in twenty is never trained on

# Text is cut into blocks, each of which is held out or not, and blocks into spans, which are
# shuffled. Both hold several rows, so that most text has its context: 16 bytes per token of a row
# are 16 rows in bytes, about 4 in a BPE. Rows of up to 1,024 tokens share one hold-out.
BYTES_PER_ROW_TOKEN = 16
MIN_SPAN_BYTES = 2**12
MIN_BLOCK_BYTES = 2**14
MAX_BLOCK_BYTES = 2**20
BLOCKS_PER_DATASET = 200  # aimed at
FEWEST_BLOCKS = 8  # of a text too small for blocks of several rows, down to TINY_BLOCK_BYTES
TINY_BLOCK_BYTES = 512

# Directories of the standard library that hold tests, or what was installed beside it.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@runtime_checkable
class Source(Protocol):
    """Documents by index, a few at each.

    Attributes:
        fingerprint: changes with anything that changes its documents or their order.
    """

    fingerprint: str

    def __len__(self) -> int:
        """Number of indices."""
        ...

    def __getitem__(self, index: int) -> list[Document]:
        """Usually one; several for a chat whose turns must be rendered apart."""
        ...


@dataclasses.dataclass(frozen=True)
class WeightedSource:
    """A part of a mixture.

    Attributes:
        weight: share of the packed rows, relative to the other parts.
        endless: drawn independently; there is no epoch to shuffle.
    """

    source: Source
    weight: float
    endless: bool = False


def make_sources(
    config: DataConfig, split: str, *, task_seed: int, tokenizer: Tokenizer | None = None
) -> list[WeightedSource]:
    """The parts of the mixture for "train" or "holdout".

    Args:
        config: what to read.
        split: train or holdout.
        task_seed: of the generated tasks.
        tokenizer: what the texts are for; None while it is still to be trained on them.

    Raises:
        FileNotFoundError: a path or glob matches nothing.
        ValueError: a file is empty, binary or malformed, has text that the tokenizer does not
            cover, or is too small to split.
    """
    if split not in ("train", "holdout"):
        raise ValueError(f"split={split!r} is not one of train, holdout.")
    if config.source != "files":
        entries = [_Entry(source=config.source, where="data.source")]
    else:
        entries = [_entry(e, f"data.files[{i}]") for i, e in enumerate(config.files)]
    held = [_entry(e, f"data.holdout_files[{i}]") for i, e in enumerate(config.holdout_files)]

    def open_(part: str, entry: _Entry, without: Sequence[np.ndarray] = ()) -> WeightedSource:
        if entry.source == "tasks":
            tasks = TaskSource(
                task_seed, holdout=split == "holdout", prompt_weight=config.prompt_weight
            )
            return WeightedSource(tasks, entry.weight, endless=True)
        return _open(entry, config, part, tokenizer, without=without)

    if not held:
        return [open_(split, entry) for entry in entries]
    opened = [open_("all", entry) for entry in held]
    if split == "holdout":
        return opened
    held_groups = [s.source.groups for s in opened if isinstance(s.source, RecordSource)]
    return [open_("all", entry, without=held_groups) for entry in entries]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Entry:
    """A checked entry of `data.files`."""

    where: str
    path: str = ""
    source: str = ""
    weight: float = 1.0
    format: str = "auto"
    text_field: str = "text"


def _entry(entry: Mapping[str, Any], where: str) -> _Entry:
    known = [f.name for f in dataclasses.fields(_Entry) if f.name != "where"]
    for key in entry:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1) or known
            raise ValueError(f"{where}: no key {key!r}; did you mean {' or '.join(near)}?")
        expected = (int, float) if key == "weight" else str
        if not isinstance(entry[key], expected) or isinstance(entry[key], bool):
            what = "a number" if key == "weight" else "text"
            raise TypeError(f"{where}.{key}: expected {what}, found {entry[key]!r}.")
    checked = _Entry(where=where, **(dict(entry) | {"weight": float(entry.get("weight", 1.0))}))
    if bool(checked.path) == bool(checked.source):
        raise ValueError(f"{where}: give either path='corpus/*.txt' or source='tasks' | 'stdlib'.")
    if checked.source not in ("", "tasks", "stdlib"):
        raise ValueError(f"{where}.source: {checked.source!r} is not one of tasks, stdlib.")
    if checked.format not in FORMATS:
        near = difflib.get_close_matches(checked.format, FORMATS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(
            f"{where}.format: {checked.format!r} is not one of {', '.join(FORMATS)}{hint}"
        )
    if not checked.weight > 0:
        raise ValueError(f"{where}.weight: {checked.weight} is not above 0; leave the entry out.")
    return checked


def _open(
    entry: _Entry,
    config: DataConfig,
    split: str,
    tokenizer: Tokenizer | None,
    *,
    without: Sequence[np.ndarray] = (),
) -> WeightedSource:
    """Opens the files of an entry; `split` is train, holdout or all."""
    if entry.source == "stdlib":
        paths, whole_files = stdlib_files(), True
    else:
        paths, whole_files = matching_files(entry.path, entry.where), False
    total = sum(path.stat().st_size for path in paths)
    make = _DocumentMaker(config, entry.text_field, tokenizer)
    files = [
        open_records(
            path,
            "text" if whole_files else entry.format,
            text_field=entry.text_field,
            check=make.check,
            block_bytes=2**62 if whole_files else block_bytes(total, config.sequence_length),
            span_bytes=max(MIN_SPAN_BYTES, BYTES_PER_ROW_TOKEN * config.sequence_length),
        )
        for path in paths
    ]
    groups = np.concatenate([file.groups for file in files])
    if split == "all":
        chosen = np.ones(len(groups), bool)
        for other in without:
            chosen &= ~np.isin(groups, other)
        if not chosen.all():
            logging.info(
                "%s: %d records also stand in data.holdout_files and are not trained on.",
                entry.where, int((~chosen).sum()),
            )  # fmt: skip
    else:
        held = held_out(groups, entry.path or entry.source)
        chosen = held if split == "holdout" else ~held
    if not chosen.any():
        raise ValueError(
            f"{entry.path}: every record also stands in data.holdout_files; nothing is left to "
            "train on."
        )
    definition = f"{entry.format} {entry.text_field} {make.template_fingerprint}"
    source = RecordSource(files, groups, np.flatnonzero(chosen), make, definition)
    return WeightedSource(source, entry.weight)


def block_bytes(total: int, sequence_length: int) -> int:
    """Bytes of a text that are held out together, or not, where the files hold `total`."""
    rows = max(MIN_BLOCK_BYTES, BYTES_PER_ROW_TOKEN * sequence_length)
    usual = max(rows, min(total // BLOCKS_PER_DATASET, MAX_BLOCK_BYTES))
    return min(usual, max(total // FEWEST_BLOCKS, TINY_BLOCK_BYTES))


def held_out(groups: np.ndarray, name: str) -> np.ndarray:
    """Which records are kept from training, by the hash of their content.

    Raises:
        ValueError: all records are alike, so none can be kept without keeping all.
    """
    held = groups % np.uint64(HOLDOUT_MODULUS) == 0
    if not held.any() or held.all():  # few records: keep the one with the smallest hash
        held = groups == groups.min()
    if held.all():
        raise ValueError(
            f"{name}: holds a single record, which cannot be split into training and hold-out; "
            "add more data or name other files in data.holdout_files."
        )
    return held


class RecordSource:
    """Chosen records of several files as documents.

    Attributes:
        groups: uint64 hash of the content of every chosen record.
        fingerprint: of the records, which are chosen, and `definition`: how they become documents.
    """

    def __init__(
        self,
        files: Sequence[Records],
        groups: np.ndarray,
        chosen: np.ndarray,
        make: Callable[[Record], list[Document]],
        definition: str,
    ):
        self._files, self._chosen, self._make = files, chosen, make
        self._starts = np.cumsum([0] + [len(file) for file in files])
        self.groups = groups[chosen]
        facts = groups.tobytes() + chosen.tobytes() + self._starts.tobytes() + definition.encode()
        self.fingerprint = f"{hash_bytes(facts):016x}"

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> list[Document]:
        record = self._chosen[index]
        file = int(np.searchsorted(self._starts, record, side="right")) - 1
        return self._make(self._files[file].read(int(record - self._starts[file])))

    def __repr__(self) -> str:
        return f"RecordSource({len(self._files)} files, {len(self)} records)"


def matching_files(pattern: str, where: str) -> list[Path]:
    """Files of a path or glob, sorted by name.

    Raises:
        FileNotFoundError: nothing is there; a folder is not a file.
    """
    expanded = str(Path(pattern).expanduser())
    if Path(expanded).is_dir():
        raise FileNotFoundError(
            f"{where}: {pattern} is a folder; name its files, such as "
            f"'{pattern.rstrip('/')}/*.txt'."
        )
    found = sorted(Path(name) for name in glob.glob(expanded, recursive=True))
    found = [path for path in found if path.is_file()]
    if not found:
        what = "no file matches this pattern" if glob.has_magic(expanded) else "no such file"
        raise FileNotFoundError(
            f"{where}: {pattern}: {what}; relative paths start at {Path.cwd()}."
        )
    return found


def stdlib_files() -> list[Path]:
    """Source files of the running Python's standard library, without tests, sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in sorted(root.rglob("*.py")):
        if _NOT_STDLIB.intersection(path.relative_to(root).parts[:-1]):
            continue
        data = path.read_bytes()
        if data and first_binary_byte(data) is None:  # a few modules are empty or not in UTF-8
            files.append(path)
    return files


class _DocumentMaker:
    """Record to documents; the chat template is opened when the first chat is met."""

    def __init__(self, config: DataConfig, text_field: str, tokenizer: Tokenizer | None):
        self._config, self._text_field, self._tokenizer = config, text_field, tokenizer
        self._template: ChatTemplate | None = None

    @property
    def template_fingerprint(self) -> str:
        """Of the chat template, empty if no chat has been met."""
        return self._template.fingerprint if self._template else ""

    def __call__(self, record: Record) -> list[Document]:
        fields, where, end = record
        if "messages" in fields:
            if self._template is None:
                place = self._config.chat_template or self._config.tokenizer
                self._template = ChatTemplate.find(place)
            return self._template.documents(fields, where)
        if "prompt" in fields:
            prompt = Piece(fields["prompt"], self._config.prompt_weight)
            return [Document((prompt, Piece(fields["response"], 1.0)), where)]
        text = fields[self._text_field if self._text_field in fields else "text"]
        return [Document((Piece(text, 1.0),), where, end)]

    def check(self, record: Record) -> None:
        """Raises ValueError for what would be refused in the middle of training."""
        for document in self(record):
            if isinstance(self._tokenizer, ByteTokenizer):  # any other one reads every text
                for piece in document.pieces:
                    self._tokenizer.check(piece.text, where=document.where)
