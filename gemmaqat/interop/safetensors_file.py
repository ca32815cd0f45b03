"""Memory-mapped safetensors files: the header is checked at once, tensors are views of the map.

The format is an 8-byte little-endian header length, a JSON header (name -> dtype, shape, offsets)
and the data. Reading it here rather than through the package gives views instead of copies, errors
that name the file and the tensor, and a way to drop pages that have been read.
"""

import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
INDEX_NAME = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # the format's own limit
_MOST_AXES = 32  # of a NumPy array before 2.0, and far more than any weight has
SINGLE_NAME = "model.safetensors"


class Tensor(NamedTuple):
    """One header entry. `start` and `stop` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """One mapped file. Arrays stay valid while they are referenced; nothing is copied.

    Raises:
        ValueError: the file is truncated or its header is not one of safetensors.
    """

    def __init__(self, path: Path):
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as file:
            self.tensors, self.metadata = _read_header(path, file.read(8), file.read, size)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def array(self, name: str) -> np.ndarray:
        """A read-only view of one tensor, in the stored dtype and shape."""
        entry = self.tensors[name]
        dtype = DTYPES[entry.dtype]
        flat = np.frombuffer(self._map, dtype, math.prod(entry.shape), entry.start)
        return flat.reshape(entry.shape)

    def data(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes `start` to `stop` of one tensor, as they lie in the file."""
        entry = self.tensors[name]
        return memoryview(self._map)[entry.start + start : min(entry.start + stop, entry.stop)]

    def forget(self, name: str) -> None:
        """Lets the system drop the pages of a tensor; a later read maps them again."""
        if not hasattr(self._map, "madvise"):  # Windows
            return
        entry = self.tensors[name]
        first = entry.start - entry.start % mmap.PAGESIZE
        if entry.stop > first:
            self._map.madvise(mmap.MADV_DONTNEED, first, entry.stop - first)


class SafetensorsFolder:
    """All tensors of a folder, from one file or from the shards that an index file lists.

    Raises:
        FileNotFoundError: no safetensors file, or a shard of the index is missing.
        ValueError: a file is damaged, or the index disagrees with its shards.
    """

    def __init__(self, folder: Path):
        self.files: dict[str, SafetensorsFile] = {}  # tensor name -> its file
        index = folder / INDEX_NAME
        if index.exists():
            self._open_shards(index)
        else:
            file = SafetensorsFile(_single_file(folder))
            self.files = dict.fromkeys(file.tensors, file)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def entry(self, name: str) -> Tensor:
        """Header entry of a tensor."""
        return self.files[name].tensors[name]

    def path(self, name: str) -> Path:
        """File that holds a tensor."""
        return self.files[name].path

    def _open_shards(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, RecursionError):
            weight_map = None
        if not _is_text_map(weight_map) or not all(
            shard == Path(shard).name and shard not in ("", "..") and "\0" not in shard
            for shard in weight_map.values()
        ):
            raise ValueError(
                f"{index}: not a safetensors index (no readable 'weight_map' from tensors to files "
                "beside it); fetch it again."
            )
        shards = {}
        for shard in sorted(set(weight_map.values())):
            path = index.parent / shard
            if not path.is_file():
                raise FileNotFoundError(
                    f"{path}: shard listed in {index.name} is missing; fetch the whole folder."
                )
            shards[shard] = SafetensorsFile(path)
        for name, shard in weight_map.items():
            if name not in shards[shard].tensors:
                raise ValueError(
                    f"{index}: tensor {name!r} is not in {shard}; index and shards are of "
                    "different downloads, fetch the folder again."
                )
            self.files[name] = shards[shard]


def _single_file(folder: Path) -> Path:
    if (folder / SINGLE_NAME).exists():
        return folder / SINGLE_NAME
    found = sorted(path.name for path in folder.iterdir())
    others = [name for name in found if name.endswith(".safetensors")]
    if len(others) == 1:
        return folder / others[0]
    listing = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "nothing"
    raise FileNotFoundError(
        f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is there (found {listing}); "
        "download the safetensors weights of the model into this folder."
    )


def _read_header(
    path: Path, prefix: bytes, read: Callable[[int], bytes], size: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Parses and checks a header before anything is allocated that it asks for.

    The tensors fill the data after the header without a gap or an overlap, as the format says.
    """
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or 8 + length > size:
        raise ValueError(
            f"{path}: truncated or not a safetensors file ({size} bytes, header needs "
            f"{8 + length}); fetch it again."
        )
    if length > _LONGEST_HEADER:
        raise ValueError(
            f"{path}: a header of {length} bytes, the format allows {_LONGEST_HEADER}; the file is "
            "damaged, fetch it again."
        )
    try:
        header = json.loads(read(length).decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        raise ValueError(
            f"{path}: not a safetensors file (its header is unreadable); fetch it again."
        ) from None
    metadata: dict[str, str] = header.pop("__metadata__", {}) if isinstance(header, dict) else {}
    if not isinstance(header, dict) or not _is_text_map(metadata):
        raise ValueError(
            f"{path}: not a safetensors file (its header holds no tensors, or metadata other than "
            "texts); fetch it again."
        )
    tensors = {name: _entry(path, name, item, 8 + length) for name, item in header.items()}
    for name, entry in tensors.items():
        if entry.stop > size:
            raise ValueError(
                f"{path}: truncated: tensor {name!r} ends at byte {entry.stop}, the file has "
                f"{size}; fetch it again."
            )
        if entry.stop - entry.start != math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
            raise ValueError(
                f"{path}: tensor {name!r} of shape {list(entry.shape)} and dtype {entry.dtype} has "
                f"{entry.stop - entry.start} bytes; the header is damaged, fetch it again."
            )
    end = 8 + length
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            fault = "overlaps the tensor before it" if entry.start < end else "follows a gap"
            raise ValueError(
                f"{path}: tensor {name!r} {fault} (it starts at byte {entry.start}, expected "
                f"{end}); the header is damaged, fetch it again."
            )
        end = entry.stop
    if end != size:
        raise ValueError(
            f"{path}: {size - end} bytes follow the last tensor, which belong to none; the file is "
            "damaged, fetch it again."
        )
    return tensors, metadata


def _entry(path: Path, name: str, item: Any, base: int) -> Tensor:
    """One header entry whose fields have the types and signs of the format."""
    item = item if isinstance(item, dict) else {}
    dtype, shape, offsets = (item.get(field) for field in ("dtype", "shape", "data_offsets"))
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has unknown dtype {dtype!r}.")
    counts = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    # A true or false is an int to Python.
    if not (isinstance(dtype, str) and counts) or not all(
        type(number) is int and number >= 0 for number in (*shape, *offsets)
    ):
        raise ValueError(
            f"{path}: the entry of tensor {name!r} is none (expected a dtype, a shape and two "
            "data_offsets, counts from 0); the header is damaged, fetch it again."
        )
    # Sizes that NumPy cannot count are refused even where an axis of 0 leaves nothing to hold.
    if (
        offsets[0] > offsets[1]
        or len(shape) > _MOST_AXES
        or math.prod(max(axis, 1) for axis in shape) >= 2**60
    ):
        raise ValueError(
            f"{path}: tensor {name!r} ends before it starts, has more than {_MOST_AXES} axes, or "
            "2^60 values and more; the header is damaged, fetch it again."
        )
    return Tensor(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _is_text_map(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def write_safetensors(
    path: Path, arrays: Mapping[str, Any], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes arrays (NumPy or JAX) one at a time; the file appears under its name when complete."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, array in arrays.items():
        size = math.prod(array.shape) * np.dtype(array.dtype).itemsize
        header[name] = {
            "dtype": names[np.dtype(array.dtype)],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    draft = path.with_name(f".{path.name}.partial")
    with draft.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
