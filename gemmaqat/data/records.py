"""Files of records: text, JSONL, Parquet and ArrayRecord behind one random-access interface.

Opening a file reads all of it once: every record is checked then, by its fields and by what the
caller makes of it, so that a bad line is named before training starts and not hours into it. Its
content is hashed, which decides whether it belongs to the hold-out.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import numpy as np

from gemmaqat.data.chat import check_messages


class Record(NamedTuple):
    """One record of a file."""

    fields: dict[str, Any]
    where: str  # `file:line` or the like, for error messages
    end: bool = True  # False: a stretch of a text that goes on behind it


Check = Callable[[Record], object]  # raises ValueError for a record that cannot be used


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

    def read(self, index: int) -> Record:
        """One of them."""
        ...


class TextRecords:
    """Stretches of a UTF-8 text file that end at line ends.

    The file is cut into blocks for the split and every block into spans for shuffling. Only the
    last span ends a document.
    """

    def __init__(self, path: Path, *, check: Check, block_bytes: int, span_bytes: int):
        self._path = path
        bounds, groups = [], []
        self._size = path.stat().st_size
        with _mapped(path) as data:
            for start, stop in _cuts(data, 0, len(data), block_bytes):
                _check_text(data[start:stop], path, start)
                group = hash_bytes(data[start:stop])
                for span in _cuts(data, start, stop, span_bytes):
                    check(self._record(data[slice(*span)], span[0]))
                    bounds.append(span)
                    groups.append(group)
        self._bounds = np.asarray(bounds, np.int64)
        self.groups = np.asarray(groups, np.uint64)

    def __len__(self) -> int:
        return len(self._bounds)

    def read(self, index: int) -> Record:
        """The span as `{"text": ...}`."""
        start, stop = map(int, self._bounds[index])
        return self._record(_read_bytes(self._path, start, stop), start)

    def _record(self, data: bytes, start: int) -> Record:
        end = start + len(data) == self._size
        return Record({"text": data.decode()}, f"{self._path} at byte {start}", end)


class JsonLines:
    """One JSON object per line; blank lines are skipped."""

    def __init__(self, path: Path, *, text_field: str, check: Check):
        self._path, self._text_field = path, text_field
        bounds, groups = [], []
        start = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    check(self._record(line, f"{path}:{number}"))
                    bounds.append((start, start + len(line), number))
                    groups.append(hash_bytes(line.strip()))
                start += len(line)
        self._bounds = np.asarray(bounds, np.int64)
        self.groups = np.asarray(groups, np.uint64)

    def __len__(self) -> int:
        return len(self._bounds)

    def read(self, index: int) -> Record:
        """The object of a line."""
        start, stop, number = map(int, self._bounds[index])
        return self._record(_read_bytes(self._path, start, stop), f"{self._path}:{number}")

    def _record(self, line: bytes, where: str) -> Record:
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise ValueError(f"{where}: not UTF-8 text; is this a JSONL file?") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: not valid JSON ({error}); a JSONL file holds one object per line."
            ) from None
        return Record(check_fields(record, where, self._text_field), where)


class ParquetRecords:
    """Rows of a Parquet file. The columns that are used are held in memory, in Arrow's form."""

    def __init__(self, path: Path, *, text_field: str, check: Check):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"{path}: Parquet needs pyarrow: pip install pyarrow") from None
        self._path, self._text_field = path, text_field
        wanted = {text_field, "prompt", "response", "messages", "tools"}
        try:
            names = pyarrow.parquet.read_schema(path).names
            check_names(names, str(path), text_field)
            columns = [name for name in names if name in wanted]
            table = pyarrow.parquet.read_table(path, columns=columns)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a readable Parquet file ({error}).") from None
        self._table = table.combine_chunks()
        groups = []
        for number, row in enumerate(_rows(self._table)):
            check(self._record(row, number))
            groups.append(hash_bytes(json.dumps(row, sort_keys=True, default=str).encode()))
        self.groups = np.asarray(groups, np.uint64)

    def __len__(self) -> int:
        return self._table.num_rows

    def read(self, index: int) -> Record:
        """The row as a mapping of columns."""
        return self._record(self._table.slice(index, 1).to_pylist()[0], index)

    def _record(self, row: dict[str, Any], index: int) -> Record:
        where = f"{self._path} row {index}"
        row = {name: _without_nulls(value) for name, value in row.items()}
        return Record(check_fields(row, where, self._text_field), where)


class ArrayRecords:
    """Records of an ArrayRecord file: JSON objects as in JSONL, or plain UTF-8 text."""

    def __init__(self, path: Path, *, text_field: str, check: Check):
        self._path, self._text_field = path, text_field
        try:
            self._source = grain.sources.ArrayRecordDataSource([str(path)])
            count = len(self._source)
        except Exception as error:  # the reader raises what its C++ side reports
            raise ValueError(f"{path}: not a readable ArrayRecord file ({error}).") from None
        groups = []
        for index in range(count):
            check(self.read(index))
            groups.append(hash_bytes(self._source[index]))
        self.groups = np.asarray(groups, np.uint64)

    def __len__(self) -> int:
        return len(self.groups)

    def read(self, index: int) -> Record:
        """The record as a mapping; plain text becomes `{"text": ...}`."""
        where = f"{self._path} record {index}"
        try:
            text = self._source[index].decode()
        except UnicodeDecodeError:
            raise ValueError(
                f"{where}: neither JSON nor UTF-8 text; write records as JSON objects with "
                "'text', 'prompt' and 'response', or 'messages'."
            ) from None
        try:
            record = json.loads(text) if text.startswith("{") else None
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            return Record({"text": text}, where)
        return Record(check_fields(record, where, self._text_field), where)


def open_records(
    path: Path,
    file_format: str,
    *,
    text_field: str,
    check: Check,
    block_bytes: int,
    span_bytes: int,
) -> Records:
    """Opens and checks one file.

    Args:
        path: the file.
        file_format: one of FORMATS.
        text_field: the field that holds the text of a record.
        check: called with every record while the file is opened.
        block_bytes: of a text file that go to the hold-out, or not, together.
        span_bytes: of a text file that are read together.

    Raises:
        ValueError: empty, binary, malformed, or without the fields a record needs; or by `check`.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; remove it from data.files or fill it.")
    if file_format == "auto":
        file_format = SUFFIXES.get(path.suffix.lower(), "text")
    records: Records
    match file_format:
        case "text":
            records = TextRecords(path, check=check, block_bytes=block_bytes, span_bytes=span_bytes)
        case "jsonl":
            records = JsonLines(path, text_field=text_field, check=check)
        case "parquet":
            records = ParquetRecords(path, text_field=text_field, check=check)
        case "arrayrecord":
            records = ArrayRecords(path, text_field=text_field, check=check)
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


def check_names(names: Collection[str], where: str, text_field: str) -> tuple[str, ...]:
    """Which fields make the record a chat, a prompt with a response, or a text.

    Raises:
        ValueError: it is none of these; the message lists the fields it has.
    """
    if "messages" in names:
        return ("messages",)
    needed = ("prompt", "response") if "prompt" in names else (text_field,)
    for name in needed:
        if name not in names:
            raise ValueError(
                f"{where}: no field {name!r} (fields: {', '.join(sorted(names)) or 'none'}); a "
                f"record needs {text_field!r}, or 'prompt' and 'response', or 'messages'; "
                "files[].text_field names another field."
            )
    return needed


def check_fields(record: Any, where: str, text_field: str) -> dict[str, Any]:
    """Returns the record if it is a text, a prompt with a response, or a chat.

    Raises:
        ValueError: it is none of these, a field is no text, or the chat has no assistant turn.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected an object with fields, found {type(record).__name__}.")
    for name in check_names(record.keys(), where, text_field):
        if name == "messages":
            check_messages(record[name], where)
        elif not isinstance(record[name], str):
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


def _without_nulls(value: Any) -> Any:
    """A nested value without the fields that Arrow gives a struct because another one has them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _read_bytes(path: Path, start: int, stop: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(stop - start)


def _cuts(data: mmap.mmap, start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """About equal stretches, `size` bytes or less, to a line end or else a whole character."""
    while start < stop:
        count = -(-(stop - start) // size)
        end = start - (start - stop) // count  # rounded up: nothing is left over behind the last
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
