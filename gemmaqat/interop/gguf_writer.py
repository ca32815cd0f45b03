"""Writes a shipment as one GGUF file of architecture `gemma4`, row chunk by row chunk.

The `gguf` package writes the container; tensors are encoded from the shipment's own codes and
scales (see `gguf_storage`) and never held whole.
"""

import logging as standard_logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from absl import logging
from gguf.gguf_writer import WriterState

import gemmaqat
from gemmaqat.interop import activation_scales, gguf_model, seal
from gemmaqat.interop.gguf_storage import Storage, choose
from gemmaqat.interop.gguf_tokenizer import tokenizer_metadata
from gemmaqat.interop.grid_metadata import grids_metadata
from gemmaqat.interop.options import ExportOptions, Written
from gemmaqat.interop.shipment import VOCABULARY_TABLES, Shipment, ShippedTensor
from gemmaqat.interop.source import pieces
from gemmaqat.quantization.grid import TENSOR, Grid
from gemmaqat.quantization.table import SCALE

NO_CLAMPS = "without the activation clamps it was evaluated with"
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q2_K": 10, "Q6_K": 18, "BF16": 32}


def _create(path: Path) -> BinaryIO:
    return path.open("wb")


def write_gguf(
    shipment: Shipment,
    folder: Path,
    options: ExportOptions,
    *,
    create: Callable[[Path], BinaryIO] = _create,
) -> list[Written]:
    """Writes `<name>-<type>.gguf` into an empty folder.

    Args:
        shipment: the model.
        folder: exists and is empty.
        options: `float_dtype`, `tables`, `allow_rescale` and `allow_requantize` are heeded.
        create: opens the file; what it gives need not be seekable nor store anything.

    Raises:
        ValueError: a tensor that no GGUF type holds, or a tokenizer that does not fit.
    """
    clamps, weights = _apart(shipment)
    storages = {_name(path): choose(tensor, options) for path, tensor in weights.items()}
    _say(shipment, storages, clamps=bool(clamps))
    metadata = _general(shipment, storages, clamps=bool(clamps))
    metadata |= gguf_model.config_metadata(shipment.config)
    metadata |= tokenizer_metadata(shipment.files, shipment.config)

    standard_logging.getLogger("gguf").setLevel(standard_logging.WARNING)
    writer = gguf.GGUFWriter(None, gguf_model.ARCHITECTURE)
    for key, value in metadata.items():
        _add(writer, key, value)
    factors = gguf_model.rope_factors(shipment.config)
    kind = gguf.GGMLQuantizationType
    writer.add_tensor_info(
        gguf_model.ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes, kind.F32
    )
    for name, storage in storages.items():
        shape = storage.tensor.shape or (1,)
        # Any dtype but uint8, for which the package takes the shape to be one of bytes.
        writer.add_tensor_info(
            name, shape, np.dtype(np.int8), storage.num_bytes, kind(storage.type.number)
        )
    path = folder / f"{_file_name(shipment.config.name)}-{_main_type(storages)}.gguf"
    with create(path) as file:
        writer.fout, writer.state = [file], WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(file, file.tell())
        file.write(factors.tobytes())
        writer.write_padding(file, factors.nbytes)
        for storage in storages.values():
            for _, _, piece in pieces(storage.tensor):
                file.write(storage.encode(piece).data)
            writer.write_padding(file, storage.num_bytes)
        file.flush()
    return [_written(storage, clamps) for storage in storages.values()]


def _apart(shipment: Shipment) -> tuple[dict[str, ShippedTensor], dict[str, ShippedTensor]]:
    """Activation and cache scales, which GGUF does not have, and all other tensors."""
    clamps: dict[str, ShippedTensor] = {}
    weights: dict[str, ShippedTensor] = {}
    for path, tensor in shipment.tensors.items():
        known = gguf_model.tensor_name(path) is not None
        (weights if known or tensor.shape else clamps)[path] = tensor
    return clamps, weights


def _name(path: str) -> str:
    name = gguf_model.tensor_name(path)
    if name is None:
        raise ValueError(
            f"{path}: llama.cpp's gemma4 has no such tensor; export the model in the format 'hf'."
        )
    return name


def _say(shipment: Shipment, storages: Mapping[str, Storage], *, clamps: bool) -> None:
    """Everything about the file that its reader could overlook, once."""
    if clamps:
        logging.warning(
            "GGUF holds no quantized activations: the file is the model %s, not the evaluated one.",
            NO_CLAMPS,
        )
    if shipment.carried:
        logging.info(
            "GGUF: %d tensors of other parts (vision, audio) belong in a projector file, not "
            "in this one.",
            len(shipment.carried),
        )
    notes: dict[str, list[str]] = {}
    for storage in storages.values():
        if storage.note:
            short = storage.note.partition(":")[0]
            notes.setdefault(short, []).append(f"{storage.tensor.path}: {storage.note}")
    for found in notes.values():
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        logging.info("GGUF: %s%s", found[0], more)


def _general(
    shipment: Shipment, storages: Mapping[str, Storage], *, clamps: bool
) -> dict[str, Any]:
    quantized = any(storage.type.block > 1 for storage in storages.values())
    metadata: dict[str, Any] = {
        "general.type": "model",
        "general.name": shipment.config.name,
        "general.size_label": _size_label(shipment),
        "general.file_type": _FILE_TYPES[_main_type(storages)],
        "gemmaqat.version": gemmaqat.__version__,
        **seal.PLACES,
        gguf_model.STOP_IDS: list(shipment.config.stop_ids),
        **grids_metadata(_grids(storages)),
    }
    if shipment.table.recipe:
        metadata["gemmaqat.recipe"] = shipment.table.recipe
    if clamps:
        metadata["gemmaqat.note"] = f"the model {NO_CLAMPS}"
    if quantized:
        metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    return metadata


def _grids(storages: Mapping[str, Storage]) -> dict[str, Grid]:
    """The grids that block types keep; blocks of one scale per tensor are read as blocks."""
    tensors = [storage.tensor for storage in storages.values() if storage.keeps_grid]
    return {t.path: t.grid for t in tensors if t.grid is not None and t.grid.block != TENSOR}


def _size_label(shipment: Shipment) -> str:
    """`4.6B`, or `128x...` for experts, as the package writes it."""
    tensors = shipment.tensors.items()
    total = sum(tensor.num_weights for _, tensor in tensors)
    expert = sum(tensor.num_weights for path, tensor in tensors if "/experts/" in path)
    count = shipment.config.num_experts
    each = expert // count if count else 0
    return gguf.size_label(total, total - expert, each, count)


def _main_type(storages: Mapping[str, Storage]) -> str:
    """The type of most weights in the matrices of layers, which names the file."""
    count: Counter[str] = Counter()
    for storage in storages.values():
        tensor = storage.tensor
        if len(tensor.shape) > 1 and tensor.path not in VOCABULARY_TABLES:
            count[storage.type.name] += tensor.num_weights
    return count.most_common(1)[0][0]


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def _add(writer: Any, key: str, value: Any) -> None:
    """One key-value, its type chosen by Python's."""
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        # int32 as llama.cpp's converter writes arrays; strings and flags are what they are.
        element = {int: kinds.INT32, float: kinds.FLOAT32, bool: kinds.BOOL, str: kinds.STRING}
        writer.add_key_value(key, value, kinds.ARRAY, element[type(value[0])])
    else:
        single = {int: kinds.UINT32, float: kinds.FLOAT32, bool: kinds.BOOL, str: kinds.STRING}
        writer.add_key_value(key, value, single[type(value)])


def _written(storage: Storage, clamps: Mapping[str, ShippedTensor]) -> Written:
    tensor = storage.tensor
    notes = [storage.note] if storage.note else []
    hooks = activation_scales.edges(tensor.path.rpartition("/")[0])
    if any(f"{hook}/{SCALE}" in clamps for hook in hooks):
        notes.append(NO_CLAMPS)
    return Written(tensor.path, storage.kind, storage.type.name, "; ".join(notes))
