"""One hash for what a tensor is, whatever file, block size or float type it is stored in.

A quantized tensor is its int8 codes row by row and a float32 scale for each 16 codes of a row; the
same codes and scales give the same hash in memory, in a GGUF and in compressed-tensors. A kept
tensor is its values in float32.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemmaqat.interop.progress import Pass
from gemmaqat.interop.shipment import Piece, Shipment, ShippedTensor
from gemmaqat.interop.source import pieces
from gemmaqat.quantization.grid import SMALLEST_BLOCK

_CARRIED_BYTES = 1 << 24


class TensorHash:
    """SHA-256 of a tensor that comes a few rows at a time, in order."""

    def __init__(self, tensor: ShippedTensor) -> None:
        half = tensor.grid is not None and tensor.grid.levels == "half"
        kind = "float32" if tensor.grid is None else "half codes" if half else "codes"
        self._head = f"{kind} {tensor.num_rows} x {tensor.row_length}".encode()
        self._codes, self._scales = hashlib.sha256(), hashlib.sha256()

    def update(self, piece: Any) -> None:
        """Takes what `tensor.read` gave for the next rows."""
        if not isinstance(piece, Piece):
            self._codes.update(np.ascontiguousarray(piece, np.float32).data)
            return
        self._codes.update(np.ascontiguousarray(piece.codes, np.int8).data)
        length, blocks = piece.codes.shape[1], piece.scales.shape[1]
        scales = np.asarray(piece.scales, np.float32)
        if length // blocks % SMALLEST_BLOCK == 0:
            scales = np.repeat(scales, length // blocks // SMALLEST_BLOCK, axis=1)
        else:  # one scale for a row that ends in a part of a block
            scales = np.repeat(scales, -(-length // SMALLEST_BLOCK), axis=1)
        self._scales.update(np.ascontiguousarray(scales).data)

    def hexdigest(self) -> str:
        """The hash of all rows."""
        parts = self._head + self._codes.digest() + self._scales.digest()
        return hashlib.sha256(parts).hexdigest()


def tensor_sha256(tensor: ShippedTensor, *, counted: Pass | None = None) -> str:
    """The hash of a whole tensor, read a few rows at a time."""
    found = TensorHash(tensor)
    for start, stop, piece in pieces(tensor):
        found.update(piece)
        if counted is not None:
            counted.update((stop - start) * tensor.row_length)
    return found.hexdigest()


def carried_sha256(carried: Any) -> str:
    """The hash of the bytes of a `CarriedTensor`."""
    found = hashlib.sha256()
    for start in range(0, carried.num_bytes, _CARRIED_BYTES):
        found.update(carried.read(start, min(start + _CARRIED_BYTES, carried.num_bytes)))
    return found.hexdigest()


def combine(hashes: Mapping[str, str]) -> str:
    """One hash of the hashes of all tensors by path."""
    lines = "".join(f"{path} {digest}\n" for path, digest in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def contents_sha256(shipment: Shipment) -> str:
    """The hash of all parameters of a shipment; evaluations record what they were measured on."""
    return combine({path: tensor_sha256(t) for path, t in contents(shipment).items()})


def contents(shipment: Shipment) -> dict[str, ShippedTensor]:
    """The parameters that make the model: without activation scales of 0, which do nothing.

    Some formats store those explicitly, others leave them out.
    """
    scales = shipment.table.activation_scales
    return {
        path: tensor
        for path, tensor in shipment.tensors.items()
        if path not in scales or np.any(tensor.read(0, 1))
    }


class Observed:
    """A shipment whose tensors are hashed while somebody else reads them.

    A reader that takes every row in order pays for no second pass; the hash of a tensor that was
    read otherwise is computed when it is asked for.
    """

    def __init__(self, shipment: Shipment, counted: Pass) -> None:
        self._source = shipment.tensors
        self._counted = counted
        self._states = {path: _Progress(TensorHash(t)) for path, t in shipment.tensors.items()}
        tensors = {path: self._watch(tensor) for path, tensor in shipment.tensors.items()}
        self.shipment = dataclasses.replace(shipment, tensors=tensors)

    def sha256(self, path: str) -> str:
        """The hash of one tensor of the source."""
        state, tensor = self._states[path], self._source[path]
        if state.row != tensor.num_rows:
            return tensor_sha256(tensor)
        return state.hash.hexdigest()

    def _watch(self, tensor: ShippedTensor) -> ShippedTensor:
        def read(start: int, stop: int) -> Any:
            piece, state = tensor.read(start, stop), self._states[tensor.path]
            if state.row != tensor.num_rows:  # not yet complete
                if start == 0:
                    state.hash, state.row = TensorHash(tensor), 0
                if start == state.row:
                    state.hash.update(piece)
                    state.row = stop
                    self._counted.update((stop - start) * tensor.row_length)
            return piece

        return dataclasses.replace(tensor, read=read)


@dataclasses.dataclass
class _Progress:
    hash: TensorHash
    row: int = 0  # the first that has not been seen
