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
    BLOCKS_PER_DATASET,
    FORMATS,
    MAX_BLOCK_BYTES,
    MIN_BLOCK_BYTES,
    Records,
    first_binary_byte,
    hash_bytes,
    open_records,
)
from gemmaqat.data.tasks import TaskSource

HOLDOUT_MODULUS = 20  # one group of records in twenty is never trained on

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


def make_sources(config: DataConfig, split: str, *, task_seed: int) -> list[WeightedSource]:
    """The parts of the mixture for "train" or "holdout".

    Args:
        config: what to read.
        split: train or holdout.
        task_seed: of the generated tasks.

    Raises:
        FileNotFoundError: a path or glob matches nothing.
        ValueError: a file is empty, binary or malformed, or too small to split.
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
        return _open(entry, config, part, without=without)

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
    entry: _Entry, config: DataConfig, split: str, *, without: Sequence[np.ndarray] = ()
) -> WeightedSource:
    """Opens the files of an entry; `split` is train, holdout or all."""
    if entry.source == "stdlib":
        paths, whole_files = stdlib_files(), True
    else:
        paths, whole_files = matching_files(entry.path, entry.where), False
    total = sum(path.stat().st_size for path in paths)
    block = min(max(total // BLOCKS_PER_DATASET, MIN_BLOCK_BYTES), MAX_BLOCK_BYTES)
    files = [
        open_records(
            path,
            "text" if whole_files else entry.format,
            text_field=entry.text_field,
            block_bytes=2**62 if whole_files else block,
            span_bytes=max(4_096, 8 * config.sequence_length),
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
    make = _document_maker(config, entry.text_field)
    return WeightedSource(RecordSource(files, groups, np.flatnonzero(chosen), make), entry.weight)


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
    """

    def __init__(
        self,
        files: Sequence[Records],
        groups: np.ndarray,
        chosen: np.ndarray,
        make: Callable[[dict[str, Any], str], list[Document]],
    ):
        self._files, self._chosen, self._make = files, chosen, make
        self._starts = np.cumsum([0] + [len(file) for file in files])
        self.groups = groups[chosen]
        self.fingerprint = f"{hash_bytes(groups.tobytes() + chosen.tobytes()):016x}"

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> list[Document]:
        record = self._chosen[index]
        file = int(np.searchsorted(self._starts, record, side="right")) - 1
        fields, where = self._files[file].read(int(record - self._starts[file]))
        return self._make(fields, where)

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


def _document_maker(
    config: DataConfig, text_field: str
) -> Callable[[dict[str, Any], str], list[Document]]:
    """Record to document; the chat template is opened when the first chat is met."""
    template: list[ChatTemplate] = []

    def make(record: dict[str, Any], where: str) -> list[Document]:
        if "messages" in record:
            if not template:
                template.append(ChatTemplate.find(config.chat_template or config.tokenizer))
            return template[0].documents(record, where)
        if "prompt" in record:
            prompt = Piece(record["prompt"], config.prompt_weight)
            return [Document((prompt, Piece(record["response"], 1.0)), where)]
        return [
            Document((Piece(record[text_field if text_field in record else "text"], 1.0),), where)
        ]

    return make
