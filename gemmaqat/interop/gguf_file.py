"""Memory-mapped GGUF files, version 2 and 3: the header is checked whole before it is believed.

The container is a magic number, counts, key-values, tensor descriptions and aligned data. A count
or length is compared with the bytes that are left before anything is allocated for it, so damaged
files and hostile ones end in a `ValueError` that names the file and the place.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from gemmaqat.interop.gguf_blocks import BY_NUMBER, TYPES, BlockType, as_rows, row_bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_ALIGNMENT = 32
_LARGEST_ALIGNMENT = 1 << 20
_MAX_RANK = 4

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
# Types that ggml has and we do not read, for the error.
_OTHERS = {
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}


class Info(NamedTuple):
    """One tensor. `start` and `stop` are byte offsets from the start of the file."""

    kind: BlockType
    shape: tuple[int, ...]  # outermost first, blocks along the last
    start: int
    stop: int


class GgufFile:
    """One mapped file.

    Attributes:
        metadata: key-values; arrays are NumPy arrays, or tuples of strings.
        tensors: by name, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: truncated, damaged, another version, or of a tensor type not read here.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give a .gguf file.")
        self.size = path.stat().st_size
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(
                    f"{path}: not a GGUF file (it does not begin with 'GGUF'); give the .gguf of a "
                    "Gemma 4 model."
                )
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        cursor = _Cursor(path, self._map)
        version = cursor.number("<u4", "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            big = " (it is big-endian)" if swapped in VERSIONS else ""
            raise ValueError(
                f"{path}: GGUF version {version}{big}, versions 2 and 3 of little-endian files are "
                "read; convert the file again."
            )
        num_tensors = cursor.count("<u8", 24, "tensors")
        num_pairs = cursor.count("<u8", 13, "key-values")
        self.metadata = _read_metadata(cursor, num_pairs)
        self.tensors = _read_tensors(cursor, num_tensors, self._alignment(), self.size)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Bytes of rows `start .. stop` of the flattened tensor, a view `[R, bytes of a row]`."""
        info = self.tensors[name]
        width = row_bytes(info.kind, info.shape[-1])
        first, last = info.start + start * width, info.start + stop * width
        if not info.start <= first <= last <= info.stop:
            raise IndexError(f"{name}: rows {start} to {stop} of {math.prod(info.shape[:-1])}")
        view = memoryview(self._map)[first:last]
        return as_rows(view, info.kind, info.shape[-1])

    def forget(self, name: str) -> None:
        """Lets the system drop the pages of a tensor; a later read maps them again."""
        info = self.tensors[name]
        first = info.start - info.start % mmap.PAGESIZE
        if hasattr(self._map, "madvise") and info.stop > first:  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED, first, info.stop - first)

    def require(self, key: str, kinds: type | tuple[type, ...], words: str) -> Any:
        """The value of a key.

        Raises:
            ValueError: it is missing, or of another type than `words` say.
        """
        if key not in self.metadata:
            raise ValueError(
                f"{self.path}: metadata key {key!r} ({words}) is missing; the file was written by "
                "another converter or is damaged, convert the checkpoint again."
            )
        value = self.metadata[key]
        # bool is an int to Python; a flag in the place of a number is a mistake.
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise ValueError(f"{self.path}: metadata key {key!r} is {value!r}, expected {words}.")
        return value

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", _ALIGNMENT)
        power = isinstance(value, int) and 0 < value <= _LARGEST_ALIGNMENT
        if not power or value & (value - 1):
            raise ValueError(
                f"{self.path}: general.alignment is {value!r}, expected a power of two; the header "
                "is damaged, fetch the file again."
            )
        return value


class _Cursor:
    """A place in the mapped header; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.offset = path, data, len(MAGIC)

    def number(self, dtype: Any, what: str) -> int:
        return int(self.numbers(np.dtype(dtype), 1, what)[0])

    def numbers(self, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        raw = self.take(count * dtype.itemsize, what)
        return np.frombuffer(raw, dtype)

    def count(self, dtype: str, least: int, what: str) -> int:
        """A number of things that take at least `least` bytes each."""
        count = self.number(dtype, f"the number of {what}")
        if count * least > len(self.data) - self.offset:
            self.fail(f"it announces {count} {what}, more than its {len(self.data)} bytes can hold")
        return count

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.offset:
            self.fail(f"it ends inside {what} (byte {self.offset} of {len(self.data)})")
        raw = self.data[self.offset : self.offset + size]
        self.offset += size
        return raw

    def string(self, what: str) -> str:
        try:
            return self.take(self.number("<u8", what), what).decode()
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8")

    def strings(self, count: int, what: str) -> tuple[str, ...]:
        """Many strings: tokens and merges are hundreds of thousands."""
        data, offset, end = self.data, self.offset, len(self.data)
        unpack, found = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            if end - offset < 8:
                self.fail(f"it ends inside {what} (byte {offset} of {end})")
            (length,) = unpack(data, offset)
            offset += 8
            if length > end - offset:
                self.fail(f"it ends inside {what} (byte {offset} of {end})")
            found.append(data[offset : offset + length])
            offset += length
        self.offset = offset
        try:
            return tuple(raw.decode() for raw in found)
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8")

    def fail(self, what: str) -> NoReturn:
        raise ValueError(f"{self.path}: truncated or damaged GGUF: {what}; fetch it again.")


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for number in range(count):
        key = cursor.string(f"the name of key-value {number}")
        if key in metadata:
            cursor.fail(f"metadata key {key!r} is there twice")
        kind = cursor.number("<u4", f"the type of {key!r}")
        metadata[key] = _read_value(cursor, kind, key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    what = f"the value of {key!r}"
    if kind == _STRING:
        return cursor.string(what)
    if kind in _SCALARS:
        return cursor.numbers(_SCALARS[kind], 1, what)[0].item()
    if kind != _ARRAY:
        cursor.fail(f"{what} has type {kind}, which GGUF does not have")
    element = cursor.number("<u4", what)
    if element == _STRING:
        return cursor.strings(cursor.count("<u8", 8, f"strings in {key!r}"), what)
    if element not in _SCALARS:
        cursor.fail(f"{what} is an array of type {element}, neither numbers nor strings")
    dtype = _SCALARS[element]
    return cursor.numbers(dtype, cursor.count("<u8", dtype.itemsize, f"items in {key!r}"), what)


def _read_tensors(cursor: _Cursor, count: int, alignment: int, size: int) -> dict[str, Info]:
    described: dict[str, tuple[BlockType, tuple[int, ...], int]] = {}
    for number in range(count):
        name = cursor.string(f"the name of tensor {number}")
        if name in described:
            cursor.fail(f"tensor {name!r} is there twice")
        described[name] = _read_description(cursor, name)
    base = -(-cursor.offset // alignment) * alignment
    tensors = {}
    for name, (kind, shape, offset) in described.items():
        rows = math.prod(shape[:-1])
        start = base + offset
        stop = start + rows * row_bytes(kind, shape[-1])
        if offset % alignment:
            cursor.fail(f"tensor {name!r} begins at {offset}, not a multiple of {alignment}")
        if stop > size:
            cursor.fail(f"tensor {name!r} ends at byte {stop}, the file has {size}")
        tensors[name] = Info(kind, shape, start, stop)
    _check_apart(cursor, tensors)
    return tensors


def _read_description(cursor: _Cursor, name: str) -> tuple[BlockType, tuple[int, ...], int]:
    what = f"the description of tensor {name!r}"
    rank = cursor.number("<u4", what)
    if not 1 <= rank <= _MAX_RANK:
        cursor.fail(f"tensor {name!r} has rank {rank}, expected 1 to {_MAX_RANK}")
    # Innermost first in the file.
    shape = tuple(int(n) for n in cursor.numbers(np.dtype("<u8"), rank, what))[::-1]
    number, offset = cursor.number("<u4", what), cursor.number("<u8", what)
    if not all(shape):
        cursor.fail(f"tensor {name!r} has the empty shape {list(shape)}")
    if number not in BY_NUMBER:
        known = ", ".join(TYPES)
        raise ValueError(
            f"{cursor.path}: tensor {name!r} has the type {_OTHERS.get(number, number)}, which is "
            f"not one of {known}; convert the checkpoint to one of these."
        )
    kind = BY_NUMBER[number]
    if shape[-1] % kind.block:
        cursor.fail(
            f"tensor {name!r} has rows of {shape[-1]} weights, {kind.name} needs a multiple of "
            f"{kind.block}"
        )
    return kind, shape, offset


def _check_apart(cursor: _Cursor, tensors: dict[str, Info]) -> None:
    """No byte belongs to two tensors."""
    for (left, before), (right, after) in _neighbours(tensors):
        if after.start < before.stop:
            cursor.fail(f"tensors {left!r} and {right!r} overlap at byte {after.start}")


def _neighbours(tensors: dict[str, Info]) -> Iterator[tuple[tuple[str, Info], tuple[str, Info]]]:
    ordered = sorted(tensors.items(), key=lambda item: item[1].start)
    return zip(ordered, ordered[1:], strict=False)
