"""Reading a LiteRT file without the libraries that wrote it: the flatbuffer, tensor by tensor.

Only what a check of weights needs is understood: shapes, types, scales and bytes of named tensors,
signatures, and metadata. Field numbers are those of the TensorFlow Lite schema, version 3.
"""

import dataclasses
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_TYPES = {0: "FLOAT32", 2: "INT32", 9: "INT8", 17: "INT4", 19: "INT2"}
CODE_BITS = {"INT8": 8, "INT4": 4, "INT2": 2}


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor of one signature's graph.

    Attributes:
        name: its name.
        shape: its shape.
        kind: type in the schema's words, "" for one that is not known here.
        scales: float32, None where it is not quantized.
        start, stop: its bytes in the file; equal where it holds no constant.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    scales: np.ndarray | None
    start: int
    stop: int


class LiteRTFile:
    """A memory-mapped model.

    Attributes:
        path: the file.
        graphs: per subgraph its tensors in order.
        signatures: signature name to number of its subgraph.
        metadata: name to bytes.
    """

    def __init__(self, path: str | Path):
        """Opens a file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a LiteRT model or is damaged.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: no such file.")
        if self.path.stat().st_size < 8:
            raise ValueError(f"{self.path}: too short for a LiteRT model; copy the file again.")
        self.bytes: Any = np.memmap(self.path, np.uint8, "r")
        if self.bytes[4:8].tobytes() != b"TFL3":
            raise ValueError(f"{self.path}: not a LiteRT model (TFL3); give a .tflite file.")
        try:
            self._read()
        except (struct.error, IndexError, ValueError, OverflowError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.path}: the flatbuffer is damaged ({error}); copy the file again."
            ) from error

    def data(self, tensor: FileTensor, first: int, last: int) -> np.ndarray:
        """Bytes `first` to `last` of a constant."""
        return self.bytes[tensor.start + first : min(tensor.start + last, tensor.stop)]

    def _read(self) -> None:
        model = _Table(self.bytes, struct.unpack_from("<I", self.bytes, 0)[0])
        spans = [self._span(buffer) for buffer in model.tables(4)]
        self.graphs = [
            [self._tensor(tensor, spans) for tensor in graph.tables(0)] for graph in model.tables(2)
        ]
        self.metadata = {
            entry.string(0): self.bytes[slice(*spans[entry.number(1, "I")])].tobytes()
            for entry in model.tables(6)
        }
        self.signatures = {
            signature.string(2): signature.number(4, "I") for signature in model.tables(7)
        }
        for name, graph in self.signatures.items():
            if graph >= len(self.graphs):
                raise ValueError(f"signature {name} names subgraph {graph} of {len(self.graphs)}")

    def _span(self, buffer: "_Table") -> tuple[int, int]:
        """First byte and the one after the last, of bytes inside or after the flatbuffer."""
        start, size = buffer.number(1, "Q"), buffer.number(2, "Q")
        if start == 0:
            start, size = buffer.vector(0, 1)
        if start + size > len(self.bytes):
            raise ValueError(f"{size} bytes at {start} reach beyond the file")
        return start, start + size

    def _tensor(self, table: "_Table", spans: list[tuple[int, int]]) -> FileTensor:
        shape = tuple(table.array(0, np.dtype("<i4")).tolist())
        kind = _TYPES.get(table.number(1, "b"), "")
        start, stop = spans[table.number(2, "I")]
        name, quantization, scales = table.string(3), table.table(4), None
        if quantization is not None:
            scales = quantization.array(2, np.dtype("<f4"))
            if quantization.array(3, np.dtype("<i8")).any() or quantization.number(6, "i"):
                raise ValueError(f"{name} has zero points or scales along another axis")
        if scales is not None and not len(scales):
            scales = None
        if stop > start and kind:
            bits = CODE_BITS.get(kind, 32)
            expected = -(-int(np.prod(shape, dtype=np.int64)) * bits // 8)
            if min(shape, default=0) < 0 or stop - start != expected:
                raise ValueError(f"{name}: {stop - start} bytes for shape {shape} of {kind}")
        return FileTensor(name, shape, kind, scales, start, stop)


class _Table:
    """One table of a flatbuffer: fields found through its list of offsets."""

    def __init__(self, data: Any, position: int):
        self.data, self.position = data, position
        self.fields = position - struct.unpack_from("<i", data, position)[0]
        if self.fields < 0:
            raise ValueError("a table's fields lie before the file")
        self.size = struct.unpack_from("<H", data, self.fields)[0]

    def number(self, field: int, code: str) -> int:
        """A scalar in `struct`'s terms; 0 where the field is absent."""
        place = self._place(field)
        return struct.unpack_from(f"<{code}", self.data, place)[0] if place else 0

    def table(self, field: int) -> "_Table | None":
        """A table that a field points to."""
        place = self._place(field)
        return _Table(self.data, self._follow(place)) if place else None

    def tables(self, field: int) -> "Iterator[_Table]":
        """The tables of a vector."""
        start, count = self.vector(field, 4)
        for place in range(start, start + 4 * count, 4):
            yield _Table(self.data, self._follow(place))

    def string(self, field: int) -> str:
        """A string, "" where the field is absent."""
        start, size = self.vector(field, 1)
        return self.data[start : start + size].tobytes().decode()

    def array(self, field: int, dtype: np.dtype) -> np.ndarray:
        """A vector of scalars, as it lies in the file."""
        start, count = self.vector(field, dtype.itemsize)
        return self.data[start : start + count * dtype.itemsize].view(dtype)

    def vector(self, field: int, size: int) -> tuple[int, int]:
        """Start and number of the elements, of `size` bytes each; 0, 0 where it is absent."""
        place = self._place(field)
        if not place:
            return 0, 0
        start = self._follow(place)
        count = struct.unpack_from("<I", self.data, start)[0]
        if start + 4 + count * size > len(self.data):
            raise ValueError(f"a vector of {count} elements reaches beyond the file")
        return start + 4, count

    def _place(self, field: int) -> int:
        """Where a field lies; 0 = absent."""
        entry = 4 + 2 * field
        if entry + 2 > self.size:
            return 0
        offset = struct.unpack_from("<H", self.data, self.fields + entry)[0]
        return self.position + offset if offset else 0

    def _follow(self, place: int) -> int:
        return place + struct.unpack_from("<I", self.data, place)[0]
