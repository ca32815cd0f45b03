"""LiteRT: one `.tflite` with prefill and decode signatures, our codes and our scales in it.

`prefill_N` reads N tokens, `decode` one; both take `tokens` and `positions` (int32 `[1, N]`, -1 =
padding) and the key/value cache, and return `logits` of the last valid token and the extended
cache. `LiteRTSession` drives them. Batch 1, float32 between the quantized operators, greedy or
other sampling outside.

Every grid whose levels are whole numbers is held exactly: one scale per row as LiteRT's
per-channel quantization; a block's scale as that of a stored row of its own. Static activation
scales become 8-bit quantizers of the runtime, products between two of them integer products, and
static key and value scales an int8 cache. Scales, codes and configuration are read back by
`litert_file`, which shares no code with the libraries that write.
"""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import gemmaqat
from gemmaqat.interop import seal
from gemmaqat.interop.litert_file import CODE_BITS, FileTensor, LiteRTFile
from gemmaqat.interop.litert_graph import StoredWeight, assemble
from gemmaqat.interop.litert_trace import Program
from gemmaqat.interop.options import ExportOptions, Written
from gemmaqat.interop.shipment import Piece, Shipment, ShippedTensor
from gemmaqat.interop.source import pieces
from gemmaqat.json_file import parse_json
from gemmaqat.models.config import ModelConfig
from gemmaqat.packed import storage_bits
from gemmaqat.planning.parameters import abstract_parameters
from gemmaqat.quantization.grids import Grid
from gemmaqat.quantization.table import SCALE, Table

FILE = "model.tflite"
Progress = Callable[[int], Any]


def write_litert(
    shipment: Shipment, folder: Path, options: ExportOptions, *, progress: Progress | None = None
) -> list[Written]:
    """Writes `model.tflite` and the companion files.

    Args:
        shipment: the model.
        folder: exists and is empty.
        options: `prefill_lengths`, `cache_length`, `dynamic_activations` and `text_only` count.
        progress: told the number of weights of each tensor written.

    Raises:
        ValueError: the format cannot hold a tensor, the model has experts, the lengths make no
            sense, or the optional packages are missing.
    """
    _check(shipment, options)
    weights = {
        tensor.path: _stored(tensor)
        for tensor in shipment.tensors.values()
        if tensor.path not in shipment.table.activation_scales
    }
    scales = _activation_scales(shipment)
    hooks = [(path, scale) for path, scale in scales.items() if scale]
    config = dataclasses.replace(
        shipment.config, dtype="float32", param_dtype="float32", remat="none"
    )
    rows = {
        path: ((weight.shape[0], weight.shape[1]), weight.row_length)
        for path, weight in weights.items()
        if len(weight.shape) == 2
    }

    def convert(name: str, length: int) -> bytes:
        program = Program(
            config=config,
            rows=rows,
            hooks=[path for path, _ in hooks],
            kv_scales=_kv_scales(config, scales),
            length=length,
            cache_length=options.cache_length,
        )
        return program.convert(name)

    lengths = {f"prefill_{n}": n for n in sorted(set(options.prefill_lengths))} | {"decode": 1}
    assembled = assemble(
        {name: convert(name, length) for name, length in lengths.items()},
        weights,
        hooks=hooks,
        dynamic=options.dynamic_activations,
        metadata=_metadata(shipment),
    )
    with (folder / FILE).open("wb") as file:
        file.write(assembled.head)
        for path, start in assembled.offsets.items():
            file.write(bytes(start - file.tell()))
            for data in _bytes(shipment.tensors[path], weights[path].bits):
                file.write(data)
            if progress is not None:
                progress(shipment.tensors[path].num_weights)
    for name, source in shipment.files.items():
        shutil.copyfile(source, folder / name)
    return [_written(tensor) for tensor in shipment.tensors.values()]


def read_litert(path: Path) -> Shipment:
    """What `write_litert` wrote, codes and scales from the file's own tensors.

    Kept parameters come back as the float32 they are stored in.

    Args:
        path: the file, or its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, was not written by us, or its tensors and its table disagree.
    """
    file = LiteRTFile(path / FILE if path.is_dir() else path)
    config, table = _read_metadata(file)
    wanted = {e.path for e in table.entries} | {e.path for e in table.activations}
    constants = _named_constants(file, wanted)
    tensors = {}
    for entry in table.entries:
        found = constants.get(entry.path)
        if found is None:
            raise ValueError(f"{file.path}: {entry.path} is in the table, not in the graph.")
        shape = (
            entry.shape
            if entry.axis == -1 or len(entry.shape) < 2
            else (*entry.shape[:-2], *entry.shape[:-3:-1])
        )
        tensors[entry.path] = _shipped(file, found, entry.path, shape, entry.grid)
    for activation in table.activations:
        path_of_scale = f"{activation.path}/{SCALE}"
        scale = np.full((1, 1), constants.get(activation.path, 0.0), np.float32)
        tensors[path_of_scale] = ShippedTensor(
            path=path_of_scale,
            shape=(),
            grid=None,
            dtype=scale.dtype,
            read=functools.partial(_rows, scale),
        )
    return Shipment(config=config, table=table, tensors=tensors)


def _check(shipment: Shipment, options: ExportOptions) -> None:
    """Refuses what the format or the runtime cannot do."""
    if shipment.config.num_experts:
        raise ValueError(
            f"litert: {shipment.config.name} has experts, whose sorting LiteRT has no operators "
            "for; export it to gguf or compressed-tensors."
        )
    if shipment.carried and not options.text_only:
        raise ValueError(
            f"litert: {len(shipment.carried)} tensors beside the text decoder, for example "
            f"{next(iter(shipment.carried))}, cannot be carried in a .tflite; export with "
            "text_only."
        )
    wrong = [n for n in options.prefill_lengths if not 1 <= n <= options.cache_length]
    if wrong or not options.prefill_lengths:
        raise ValueError(
            f"litert: prefill_lengths {options.prefill_lengths} must be one or more numbers "
            f"between 1 and cache_length ({options.cache_length})."
        )
    if dynamic := sorted(shipment.table.dynamic):
        raise ValueError(
            f"litert: {dynamic[0]} is quantized dynamically, LiteRT's quantizers are static; "
            "calibrate static scales, or leave activations float and set dynamic_activations."
        )


def _stored(tensor: ShippedTensor) -> StoredWeight:
    """How a tensor will lie in the file; reads its scales.

    Raises:
        ValueError: its levels are no integers, or its rows no whole bytes.
    """
    grid = tensor.grid
    if grid is None:
        return StoredWeight(shape=tensor.shape, row_length=tensor.row_length)
    if grid.levels == "half":
        raise ValueError(
            f"litert: {tensor.path} lies on half-integer levels ({grid.describe()}), LiteRT has "
            "whole ones with zero point 0; use a recipe such as int2_channel."
        )
    width = grid.block if grid.block > 0 else tensor.row_length
    bits = storage_bits(grid.bits)
    if width * bits % 8:
        raise ValueError(
            f"litert: rows of {width} {bits}-bit codes in {tensor.path} are no whole bytes; use "
            "int8 for it."
        )
    scales = [np.asarray(piece.scales, np.float32).reshape(-1) for _, _, piece in pieces(tensor)]
    return StoredWeight(
        shape=(tensor.num_weights // width, width),
        row_length=tensor.row_length,
        bits=bits,
        scales=np.concatenate(scales),
    )


def _activation_scales(shipment: Shipment) -> dict[str, float]:
    """Hook path to scale, 0 = off."""
    return {
        entry.path: float(
            np.asarray(shipment.tensors[f"{entry.path}/{SCALE}"].read(0, 1)).reshape(())
        )
        for entry in shipment.table.activations
    }


def _kv_scales(
    config: ModelConfig, scales: Mapping[str, float]
) -> tuple[tuple[float, float] | None, ...]:
    """Static scales of the cache by layer; empty unless every layer that owns keys has both."""
    found: list[tuple[float, float] | None] = []
    for layer in range(config.num_layers):
        if not config.owns_kv(layer):
            found.append(None)
            continue
        k, v = (scales.get(f"layers/{layer}/self_attn/{part}", 0.0) for part in "kv")
        if not (k and v):
            return ()
        found.append((k, v))
    return tuple(found)


def _bytes(tensor: ShippedTensor, bits: int) -> Iterator[bytes]:
    """The stored bytes, some rows at a time: low bits first, neighbours side by side."""
    for _, _, piece in pieces(tensor):
        if not bits:
            yield np.ascontiguousarray(piece, np.dtype("<f4")).tobytes()
            continue
        codes = piece.codes.reshape(-1, 8 // bits).view(np.uint8) & (2**bits - 1)
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        yield np.bitwise_or.reduce(codes << shifts, axis=1, dtype=np.uint8).tobytes()


def _codes(data: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `_bytes`: int8, sign extended."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    high = (data[:, None] >> shifts << (8 - bits)).astype(np.uint8)
    return (high.view(np.int8) >> (8 - bits)).reshape(-1)


def _written(tensor: ShippedTensor) -> Written:
    if tensor.grid is None:
        note = "" if tensor.dtype == np.float32 else f"{tensor.dtype} widened"
        return Written(tensor.path, "kept", "FLOAT32", note)
    block = tensor.grid.block
    where = f"rows of {block}" if block > 0 else "per channel"
    return Written(tensor.path, "exact", f"INT{storage_bits(tensor.grid.bits)} {where}")


def _metadata(shipment: Shipment) -> bytes:
    """What the graph does not say: the model and the grids by name."""
    return json.dumps(
        {
            "gemmaqat.version": gemmaqat.__version__,
            **seal.PLACES,
            "config": shipment.config.to_hf(),
            "name": shipment.config.name,
            "table": shipment.table.to_json(),
        }
    ).encode()


def _read_metadata(file: LiteRTFile) -> tuple[ModelConfig, Table]:
    if "gemmaqat" not in file.metadata:
        raise ValueError(f"{file.path}: holds no gemmaqat metadata; only our own files are read.")
    try:
        found = parse_json(file.metadata["gemmaqat"], "gemmaqat")
        config = ModelConfig.from_hf(found["config"], name=found["name"], where=str(file.path))
        table = Table.from_json(found["table"])
        parameters = {path: like.shape for path, like in abstract_parameters(config).items()}
        if {entry.path: entry.shape for entry in table.entries} != parameters:
            raise ValueError("its model and its table do not belong together")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file.path}: its metadata is damaged ({error}); copy the file again."
        ) from error
    return config, table


def _named_constants(file: LiteRTFile, wanted: Collection[str]) -> dict[str, Any]:
    """By name: the constant tensor, or the scale of a quantized activation, in every signature.

    Raises:
        ValueError: two signatures disagree.
    """
    found: dict[str, Any] = {}
    for tensor in (tensor for graph in file.graphs for tensor in graph if tensor.name in wanted):
        if tensor.stop > tensor.start:
            value: Any = tensor
        elif tensor.scales is not None:
            value = float(tensor.scales[0])
        else:
            continue
        if not _same(found.setdefault(tensor.name, value), value):
            raise ValueError(f"{file.path}: two signatures hold different {tensor.name}.")
    return found


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, FileTensor) or not isinstance(other, FileTensor):
        return type(one) is type(other) and one == other
    parts = lambda tensor: (tensor.shape, tensor.kind, tensor.start, tensor.stop)  # noqa: E731
    return parts(one) == parts(other) and np.array_equal(_scales(one), _scales(other))


def _scales(tensor: FileTensor) -> np.ndarray:
    return np.zeros(0, np.float32) if tensor.scales is None else tensor.scales


def _rows(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    return array[start:stop]


def _shipped(
    file: LiteRTFile, found: Any, path: str, shape: tuple[int, ...], grid: Grid | None
) -> ShippedTensor:
    """A named constant as a shipped tensor.

    Raises:
        ValueError: it is not stored as its grid asks for.
    """
    kind = "FLOAT32" if grid is None else f"INT{storage_bits(grid.bits)}"
    count = int(np.prod(shape, dtype=np.int64))
    length = shape[-1] if shape else 1
    blocks = grid.num_blocks(length) if grid is not None else 0
    num_scales = count // length * blocks
    if (
        not isinstance(found, FileTensor)
        or found.kind != kind
        or int(np.prod(found.shape, dtype=np.int64)) != count
        or len(_scales(found)) != num_scales
    ):
        raise ValueError(
            f"{file.path}: {path} is not the {kind} of shape {list(shape)} with {num_scales} "
            "scales that the table asks for."
        )

    def read(start: int, stop: int) -> Any:
        if grid is None:
            data = file.data(found, 4 * length * start, 4 * length * stop)
            return data.view(np.dtype("<f4")).reshape(-1, length)
        bits, rows = CODE_BITS[kind], slice(start * blocks, stop * blocks)
        data = file.data(found, start * length * bits // 8, stop * length * bits // 8)
        return Piece(
            _codes(data, bits).reshape(-1, length),
            _scales(found)[rows].reshape(-1, blocks).astype(jnp.dtype(grid.scale_dtype)),
        )

    return ShippedTensor(path=path, shape=shape, grid=grid, dtype=np.dtype(np.float32), read=read)
