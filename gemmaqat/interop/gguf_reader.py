"""Reads a GGUF file of architecture `gemma4` as a shipment: quantized tensors stay quantized.

Q4_0, Q8_0 and Q6_K are grids of ours as they are. Q2_K has a scale and a minimum per 16 weights:
where every minimum is twice (or one and a half times) its scale it is our 2-bit grid, else the
tensor is read as floats. In a file of ours the metadata tells the grid that was trained, with its
wider blocks, its anchor and the bits of its scales.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from gemmaqat.interop import gguf_blocks as blocks
from gemmaqat.interop import gguf_model, hf
from gemmaqat.interop.gguf_blocks import SUB_BLOCK, SUPERBLOCK, AffineSuperblocks
from gemmaqat.interop.gguf_file import GgufFile, Info
from gemmaqat.interop.gguf_tokenizer import SYNTHETIC, ExtractedFiles
from gemmaqat.interop.grid_metadata import contradiction, known_grids, parse_grid
from gemmaqat.interop.seal import FILE_KEY
from gemmaqat.interop.shipment import Piece, Shipment, ShippedTensor
from gemmaqat.models.config import ModelConfig
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.grid import TENSOR, Grid
from gemmaqat.quantization.rules import resolve
from gemmaqat.quantization.table import Entry, Table

_SCAN_BYTES = 1 << 24
_GRIDS = {
    "Q4_0": Grid(bits=4, block=32, scale_rule="ggml", scale_dtype="float16"),
    "Q8_0": Grid(bits=8, block=32, scale_rule="absmax", scale_dtype="float16"),
    "Q6_K": Grid(bits=6, block=SUB_BLOCK, scale_rule="ggml", scale_dtype="float32"),
}


def read_gguf(path: str | Path) -> Shipment:
    """A mapped GGUF file, or the only one of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, of another model family, in several parts, or its metadata
            and tensors contradict each other.
    """
    file = GgufFile(_one_file(Path(path)))
    _check_whole(file)
    config = gguf_model.read_config(file)
    model, known = abstract_model(config), known_grids(file.metadata, str(file.path))
    entries, tensors = [], {}
    for entry in resolve("none", model).entries:
        name = gguf_model.tensor_name(entry.path)
        if name is None:  # an activation scale, which GGUF does not have
            continue
        info = _check_tensor(file, name, hf.stored_shape(entry.path, entry.shape))
        tensor = _tensor(file, name, info, entry, known.get(entry.path))
        tensors[entry.path] = tensor
        entries.append(_entry(entry, tensor, info))
    _account_for_rest(file, config)
    return Shipment(
        config=config,
        table=Table(tuple(entries), (), str(file.metadata.get("gemmaqat.recipe", ""))),
        tensors=tensors,
        files=ExtractedFiles(file),
        provenance=_provenance(file),
    )


def _one_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{path}: holds {len(found)} .gguf files, expected one; give the file itself."
        )
    return found[0]


def _check_whole(file: GgufFile) -> None:
    parts = file.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise ValueError(
            f"{file.path}: one of {parts} parts of a split GGUF; merge them with llama-gguf-split "
            "first."
        )


def _check_tensor(file: GgufFile, name: str, shape: tuple[int, ...]) -> Info:
    info = file.tensors.get(name)
    if info is None:
        raise ValueError(
            f"{file.path}: tensor {name!r} of shape {list(shape)} is missing; metadata and tensors "
            "do not belong together, convert the checkpoint again."
        )
    if info.shape != shape:
        raise ValueError(
            f"{file.path}: tensor {name!r} has shape {list(info.shape)}, the metadata asks for "
            f"{list(shape)}; they do not belong together."
        )
    return info


def _tensor(file: GgufFile, name: str, info: Info, entry: Entry, fields: Any) -> ShippedTensor:
    grid, dtype = _GRIDS.get(info.kind.name), blocks.FLOATS.get(info.kind.name)
    if len(info.shape) < 2 and dtype is None:
        raise ValueError(
            f"{file.path}: tensor {name!r} is a vector of {info.kind.name}, expected floats."
        )
    decode: Callable[[np.ndarray], Any]
    if grid is not None:
        decode = {"Q4_0": _pair_q4_0, "Q8_0": _pair_q8_0, "Q6_K": _pair_q6_k}[info.kind.name]
    elif dtype is not None:
        stored = dtype

        def decode(raw: np.ndarray) -> np.ndarray:
            return raw.view(stored)
    else:
        grid, decode = _read_q2_k(file, name, info)
    if fields is not None:
        where = f"{file.path}: {entry.path}"
        told = parse_grid(fields, where)
        grid, decode = told, _of_grid(told, grid, decode, info, where)
    last = int(np.prod(info.shape[:-1], dtype=np.int64)) if len(info.shape) > 1 else 1

    def read(start: int, stop: int) -> Any:
        result = decode(file.rows(name, start, stop))
        if stop == last and isinstance(result, Piece):  # floats are views of the map
            file.forget(name)
        return result

    return ShippedTensor(
        path=entry.path,
        shape=entry.shape if len(entry.shape) < 2 else info.shape,
        grid=grid,
        dtype=dtype or np.dtype(np.float32),
        read=read,
    )


def _of_grid(
    grid: Grid, stored: Grid | None, decode: Callable[[np.ndarray], Any], info: Info, where: str
) -> Callable[[np.ndarray], Piece]:
    """Pieces of the grid that the metadata tells, from those of the block type.

    Raises:
        ValueError: the type holds no such grid; when a piece is read, these rows do not.
    """
    wrong = contradiction(where, grid, info.kind.name)
    length = info.shape[-1]
    if (
        stored is None
        or grid.bits > stored.bits
        or (grid.levels == "half") != (stored.levels == "half")
        or grid.block == TENSOR
        or length % grid.divisor
        or stored.num_blocks(length) % grid.num_blocks(length)
    ):
        raise wrong
    dtype = jnp.dtype(grid.scale_dtype)

    def read(raw: np.ndarray) -> Piece:
        codes, scales = decode(raw)
        repeated = scales.reshape(len(scales), grid.num_blocks(length), -1)
        with np.errstate(over="ignore"):
            once = repeated[:, :, 0].astype(dtype)
        same = np.array_equal(np.broadcast_to(once[:, :, None], repeated.shape), repeated)
        if not same or codes.min() < grid.lowest or codes.max() > grid.highest:
            raise wrong
        return Piece(codes, once)

    return read


def _pair_q4_0(raw: np.ndarray) -> Piece:
    return Piece(*blocks.decode_q4_0(raw))


def _pair_q8_0(raw: np.ndarray) -> Piece:
    return Piece(*blocks.decode_q8_0(raw))


def _pair_q6_k(raw: np.ndarray) -> Piece:
    rows = blocks.decode_q6_k(raw)
    return Piece(rows.codes, rows.scales)


def _read_q2_k(
    file: GgufFile, name: str, info: Info
) -> tuple[Grid | None, Callable[[np.ndarray], Any]]:
    """The grid and decoder of a Q2_K tensor; its scales are read once to know them."""
    count = int(np.prod(info.shape[:-1], dtype=np.int64))
    step = max(1, _SCAN_BYTES // blocks.row_bytes(info.kind, info.shape[-1]))
    levels, uniform = {"full", "half"}, True
    for start in range(0, count, step):
        rows = blocks.decode_q2_k(file.rows(name, start, min(start + step, count)))
        scales, minima = _q2_k_steps(rows)
        levels -= {"full"} if np.any(minima != 2 * scales) else set()
        levels -= {"half"} if np.any(2 * minima != 3 * scales) else set()
        uniform = uniform and bool(np.all(scales == np.repeat(scales[:, ::16], 16, axis=1)))
    file.forget(name)
    if not levels:
        logging.info("%s: %s: Q2_K off our 2-bit grids is read as floats.", file.path, name)
        return None, lambda raw: blocks.q2_k_values(blocks.decode_q2_k(raw))
    kind = "full" if "full" in levels else "half"
    grid = Grid(
        bits=2, block=SUPERBLOCK if uniform else SUB_BLOCK, levels=kind, scale_rule="absmax"
    )

    def decode(raw: np.ndarray) -> Piece:
        rows = blocks.decode_q2_k(raw)
        scales, _ = _q2_k_steps(rows)
        codes = rows.codes.view(np.int8) - np.int8(2)
        return Piece(codes, np.ascontiguousarray(scales[:, ::16]) if uniform else scales)

    return grid, decode


def _q2_k_steps(rows: AffineSuperblocks) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum per 16 weights, exact in float32."""
    repeat = SUPERBLOCK // SUB_BLOCK
    d, dmin = (np.repeat(part.astype(np.float32), repeat, axis=1) for part in (rows.d, rows.dmin))
    return d * rows.scales, dmin * rows.minima


def _entry(entry: Entry, tensor: ShippedTensor, info: Info) -> Entry:
    name = info.kind.name
    if tensor.grid is None:
        reason = entry.reason if len(entry.shape) < 2 else f"stored as {name}"
        return dataclasses.replace(
            entry, dtype=tensor.dtype.name, rule=None, rule_name="", reason=reason
        )
    return dataclasses.replace(
        entry, grid=tensor.grid, dtype="float32", rule=None, rule_name=name, reason=""
    )


def _account_for_rest(file: GgufFile, config: ModelConfig) -> None:
    """Whatever is no parameter is known by name, or an error."""
    known = {gguf_model.ROPE_FACTORS}
    for entry in resolve("none", abstract_model(config)).entries:
        known.add(gguf_model.tensor_name(entry.path) or "")
    for name in file.tensors:
        if name in known or gguf_model.is_unused(name, config):
            continue
        if name == gguf_model.HEAD:
            _check_tied(file)
            continue
        raise ValueError(
            f"{file.path}: tensor {name!r} is no part of the Gemma 4 that the metadata describes; "
            "they do not belong together."
        )


def _check_tied(file: GgufFile) -> None:
    head, table = file.tensors[gguf_model.HEAD], file.tensors["token_embd.weight"]
    same = head.shape == table.shape and head.kind == table.kind
    if not same or any(
        not np.array_equal(
            file.rows(gguf_model.HEAD, i, min(i + 4096, head.shape[0])),
            file.rows("token_embd.weight", i, min(i + 4096, head.shape[0])),
        )
        for i in range(0, head.shape[0], 4096)
    ):
        raise ValueError(
            f"{file.path}: {gguf_model.HEAD!r} differs from 'token_embd.weight'; Gemma 4 ties its "
            "head to the embedding table, a separate head is not supported."
        )


def _provenance(file: GgufFile) -> dict[str, Any]:
    fields = {
        key: file.metadata[key]
        for key in ("gemmaqat.version", "gemmaqat.recipe", "gemmaqat.note", FILE_KEY)
        if isinstance(file.metadata.get(key), str)
    }
    if file.metadata.get(SYNTHETIC):
        fields["tokenizer"] = "synthetic"
    return {"file": str(file.path), **fields}
