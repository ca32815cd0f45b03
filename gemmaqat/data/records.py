"""Files of records: text, JSONL, Parquet and ArrayRecord behind one random-access interface.

Opening a file reads all of it once: every record is checked then, so that a bad line is named
before training starts and not hours into it, and its content is hashed, which decides whether it
belongs to the hold-out.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

MAX_BLOCK_BYTES = 2**20  # of a text file that goes to the hold-out as a whole
MIN_BLOCK_BYTES = 512
BLOCKS_PER_DATASET = 200  # aimed at when a data set is small


@runtime_checkable
class Records(Protocol):
    """Records of one file.

    Attributes:
        groups: uint64 per record; equal for records that must not be parted by a split.
    """

    groups: np.ndarray

    def __len__(self) -> int:
        """Number of records."""
        ...

    def read(self, index: int) -> tuple[dict[str, Any], str]:
        """The record as a mapping, and where it stands (`file:line`)."""
        ...


class TextRecords:
    """Stretches of a UTF-8 text file that end at line ends.

    The file is cut into blocks for the split and every block into spans for shuffling; only the
    spans depend on the sequence length, so a run with longer rows keeps the same hold-out.
    """

    def __init__(self, path: Path, *, block_bytes: int, span_bytes: int):
        self._path = path
        bounds, groups = [], []
        with _mapped(path) as data:
            for start, stop in _cuts(data, 0, len(data), block_bytes):
                _check_text(data[start:stop], path, start)
                group = hash_bytes(data[start:stop])
                for span in _cuts(data, start, stop, span_bytes):
                    bounds.append(span)
                    groups.append(group)
        self._bounds = np.asarray(bounds, np.int64)
        self.groups = np.asarray(groups, np.uint64)

    def __len__(self) -> int:
        return len(self._bounds)

    def read(self, index: int) -> tuple[dict[str, Any], str]:
        """The span as `{"text": ...}`."""
        start, stop = self._bounds[index]
        text = _read_bytes(self._path, int(start), int(stop)).decode()
        return {"text": text}, f"{self._path} at byte {start}"


class JsonLines:
    """One JSON object per line; blank lines are skipped."""

    def __init__(self, path: Path, *, text_field: str):
        self._path, self._text_field = path, text_field
        bounds, groups = [], []
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._parse(line, f"{path}:{number}")
                    bounds.append((start, start + len(line), number))
                    groups.append(hash_bytes(line.strip()))
                start += len(line)
        self._bounds = np.asarray(bounds, np.int64)
        self.groups = np.asarray(groups, np.uint64)

    def __len__(self) -> int:
        return len(self._bounds)

    def read(self, index: int) -> tuple[dict[str, Any], str]:
        """The object of a line."""
        start, stop, number = self._bounds[index]
        where = f"{self._path}:{number}"
        return self._parse(_read_bytes(self._path, int(start), int(stop)), where), where

    def _parse(self, line: bytes, where: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise ValueError(f"{where}: not UTF-8 text; is this a JSONL file?") from None
        except ValueError as error:
            raise ValueError(
                f"{where}: not valid JSON ({error}); a JSONL file holds one object per line."
            ) from None
        return check_fields(record, where, self._text_field)


class ParquetRecords:
    """Rows of a Parquet file. The columns that are used are held in memory, in Arrow's form."""

    def __init__(self, path: Path, *, text_field: str):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from None
        self._path = path
        wanted = {text_field, "prompt", "response", "messages"}
        try:
            names = pyarrow.parquet.read_schema(path).names
            columns = [name for name in names if name in wanted]
            check_fields(dict.fromkeys(columns, ""), str(path), text_field, found=names)
            table = pyarrow.parquet.read_table(path, columns=columns)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a readable Parquet file ({error}).") from None
        self._table = table.combine_chunks()
        groups = []
        for number, row in enumerate(_rows(self._table)):
            check_fields(row, f"{path} row {number}", text_field)
            groups.append(hash_bytes(json.dumps(row, sort_keys=True, default=str).encode()))
        self.groups = np.asarray(groups, np.uint64)

    def __len__(self) -> int:
        return self._table.num_rows

    def read(self, index: int) -> tuple[dict[str, Any], str]:
        """The row as a mapping of columns."""
        return self._table.slice(index, 1).to_pylist()[0], f"{self._path} row {index}"


class ArrayRecords:
    """Records of an ArrayRecord file: JSON objects as in JSONL, or plain UTF-8 text."""

    def __init__(self, path: Path, *, text_field: str):
        self._path, self._text_field = path, text_field
        try:
            self._source = grain.sources.ArrayRecordDataSource([str(path)])
            count = len(self._source)
        except Exception as error:  # the reader raises what its C++ side reports
            raise ValueError(f"{path}: not a readable ArrayRecord file ({error}).") from None
        groups = []
        for index in range(count):
            self._parse(self._source[index], index)
            groups.append(hash_bytes(self._source[index]))
        self.groups = np.asarray(groups, np.uint64)

    def __len__(self) -> int:
        return len(self.groups)

    def read(self, index: int) -> tuple[dict[str, Any], str]:
        """The record as a mapping; plain text becomes `{"text": ...}`."""
        return self._parse(self._source[index], index), f"{self._path} record {index}"

    def _parse(self, data: bytes, index: int) -> dict[str, Any]:
        where = f"{self._path} record {index}"
        try:
            text = data.decode()
        except UnicodeDecodeError:
            raise ValueError(
                f"{where}: neither JSON nor UTF-8 text; write records as JSON objects with "
                "'text', 'prompt' and 'response', or 'messages'."
            ) from None
        try:
            record = json.loads(text) if text.startswith("{") else None
        except ValueError:
            record = None
        if not isinstance(record, dict):
            return {"text": text}
        return check_fields(record, where, self._text_field)


def open_records(
    path: Path, file_format: str, *, text_field: str, block_bytes: int, span_bytes: int
) -> Records:
    """Opens and checks one file.

    Raises:
        ValueError: empty, binary, malformed, or without the fields a record needs.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; remove it from data.files or fill it.")
    if file_format == "auto":
        file_format = SUFFIXES.get(path.suffix.lower(), "text")
    records: Records
    match file_format:
        case "text":
            records = TextRecords(path, block_bytes=block_bytes, span_bytes=span_bytes)
        case "jsonl":
            records = JsonLines(path, text_field=text_field)
        case "parquet":
            records = ParquetRecords(path, text_field=text_field)
        case "arrayrecord":
            records = ArrayRecords(path, text_field=text_field)
        case _:
            raise ValueError(f"format={file_format!r} is not one of {', '.join(FORMATS)}.")
    if not len(records):
        raise ValueError(f"{path}: holds no records; remove it from data.files or fill it.")
    return records


FORMATS = ("auto", "text", "jsonl", "parquet", "arrayrecord")
SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
}


def check_fields(
    record: Any, where: str, text_field: str, *, found: list[str] | None = None
) -> dict[str, Any]:
    """Returns the record if it is a text, a prompt with a response, or a chat.

    Raises:
        ValueError: it is none of these; the message lists the fields it has.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object with fields, found {type(record).__name__}.")
    if "messages" in record:
        return dict(record)
    needed = ("prompt", "response") if "prompt" in record else (text_field,)
    for name in needed:
        if name not in record:
            names = ", ".join(sorted(found or record)) or "none"
            raise ValueError(
                f"{where}: no field {name!r} (fields: {names}); a record needs {text_field!r}, or "
                "'prompt' and 'response', or 'messages'; files[].text_field names another field."
            )
        if not isinstance(record[name], str):
            raise ValueError(
                f"{where}: field {name!r} is {type(record[name]).__name__}, expected text."
            )
    return dict(record)


def hash_bytes(data: bytes) -> int:
    """64 bits of BLAKE2: equal content, equal hash, on every machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _rows(table: Any) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=1_024):
        yield from batch.to_pylist()


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_bytes(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _cuts(data: mmap.mmap, start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Stretches of about `size` bytes: to the last line end inside, else to a whole character."""
    while start < stop:
        end = min(start + size, stop)
        if end < stop:
            newline = data.rfind(b"\n", start, end)
            if newline >= 0:
                end = newline + 1
            else:
                while end > start + 1 and data[end] & 0xC0 == 0x80:  # inside a UTF-8 character
                    end -= 1
        yield start, end
        start = end


def first_binary_byte(data: bytes) -> int | None:
    """Offset of the first byte that UTF-8 text does not hold (control characters below 8 too)."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.start
    found = re.search(rb"[\x00-\x07]", data)
    return found.start() if found else None


def _check_text(data: bytes, path: Path, offset: int) -> None:
    wrong = first_binary_byte(data)
    if wrong is not None:
        raise ValueError(
            f"{path}: binary data (byte {data[wrong]:#04x} at offset {offset + wrong}), expected "
            "UTF-8 text; unpack or convert it, or give files[].format for another kind of file."
        )
