"""Safetensors files written some rows at a time, in one file or in shards with their index.

All names, dtypes and shapes are declared before the first byte, so every tensor has its place in
its file from the start and several of them (codes and their scales) can grow side by side.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

import gemmaqat
from gemmaqat.interop import seal
from gemmaqat.interop.safetensors_file import DTYPES, INDEX_NAME, SINGLE_NAME


class Declared(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def dtype_name(dtype: Any) -> str:
    """Safetensors' name of a NumPy dtype, "BF16" for bfloat16."""
    return next(name for name, known in DTYPES.items() if known == np.dtype(dtype))


class SafetensorsWriter:
    """The safetensors of one folder, open for writing; a context manager.

    Args:
        folder: where `model.safetensors`, or shards and `model.safetensors.index.json`, appear.
        declared: every tensor, in the order in which shards are filled.
        shard_bytes: largest size of the tensors of one file; a larger tensor has a file to itself.
        metadata: of every file, beside the version and the places of a seal.
    """

    def __init__(
        self,
        folder: Path,
        declared: Sequence[Declared],
        *,
        shard_bytes: int,
        metadata: Mapping[str, str] | None = None,
    ):
        self._files: list[Any] = []
        self._places: dict[str, tuple[Any, int, int]] = {}  # name: file, next byte, end
        text = {"format": "pt", **seal.PLACES, "gemmaqat.version": gemmaqat.__version__}
        shards = _shards(declared, shard_bytes)
        names = _file_names(len(shards))
        try:
            for name, shard in zip(names, shards, strict=True):
                self._open(folder / name, shard, {**text, **(metadata or {})})
        except BaseException:
            self._close()
            raise
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.num_bytes for tensor in declared)},
                "weight_map": {
                    tensor.name: name
                    for name, shard in zip(names, shards, strict=True)
                    for tensor in shard
                },
            }
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, data: Any) -> None:
        """Appends an array or bytes to a tensor; its rows come in order."""
        file, position, end = self._places[name]
        if isinstance(data, np.ndarray):
            data = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        view = memoryview(data)
        assert view.nbytes <= end - position, f"{name}: {view.nbytes - (end - position)} too many"
        file.seek(position)
        file.write(view)
        self._places[name] = (file, position + view.nbytes, end)

    def skip(self, name: str) -> None:
        """Leaves the rest of a tensor as a hole: it reads as zeros and takes no disk."""
        file, _, end = self._places[name]
        file.truncate(max(end, os.fstat(file.fileno()).st_size))
        self._places[name] = (file, end, end)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._close()

    def _finish(self) -> None:
        for name, (_, position, end) in self._places.items():
            assert position == end, f"{name}: {end - position} bytes were not written"
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())

    def _close(self) -> None:
        for file in self._files:
            file.close()

    def _open(self, path: Path, shard: Sequence[Declared], metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        offset = 0
        # Wide types first: every tensor starts at a multiple of its item size.
        shard = sorted(shard, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
        for tensor in shard:
            stop = offset + tensor.num_bytes
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [offset, stop],
            }
            offset = stop
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb")
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        start = 8 + len(text)
        for tensor in shard:
            self._places[tensor.name] = (file, start, start + tensor.num_bytes)
            start += tensor.num_bytes


def _shards(declared: Sequence[Declared], shard_bytes: int) -> list[list[Declared]]:
    shards: list[list[Declared]] = [[]]
    size = 0
    for tensor in declared:
        if shards[-1] and size + tensor.num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
