"""Reader of mobile checkpoints (quant_method "gemma"), ours and the released ones.

The bits of a weight follow from its packed shape and must be ones that `quantization_config`
names; which pattern is meant for which module is not asked, for the tensors say it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gemmaqat.interop import activation_scales, hf
from gemmaqat.interop.bit_packing import packed_bytes, unpack_rows
from gemmaqat.interop.gemma_mobile import (
    CACHES,
    CLAMPS,
    HEAD,
    QUANT_METHOD,
)
from gemmaqat.interop.grid_metadata import contradiction, known_grids, parse_grid
from gemmaqat.interop.quantized_folder import QuantizedFolder
from gemmaqat.interop.safetensors_file import SafetensorsFile
from gemmaqat.interop.shipment import TOKEN_TABLE, VOCABULARY_TABLES, Piece, Shipment
from gemmaqat.packed import storage_bits

_BITS = (2, 4, 8)


def read_gemma_mobile(path: Path) -> Shipment:
    """A folder for transformers' Gemma quantizer; tensors stay mapped.

    Quantized keys and values of layers that share them are carried, as are quantized towers.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a damaged file, or tensors and configuration that contradict each other.
    """
    folder = QuantizedFolder(Path(path), QUANT_METHOD)
    bits = _known_bits(folder)
    grids = known_grids(folder.metadata, str(folder.folder))
    for parameter, shape in folder.parameters.items():
        module = folder.module(parameter)
        table = parameter in VOCABULARY_TABLES
        codes = f"{module}.embedding_quantized" if table else f"{module}.weight"
        scales = f"{module}.embedding_scale" if table else f"{module}.weight_scale"
        if len(shape) == 2 and codes in folder and folder.dtype(codes) in ("U8", "I8"):
            _quantize(folder, parameter, codes, scales, bits, grids.get(parameter))
        else:
            folder.keep(parameter)
        if len(shape) == 2 and not table:
            hooks = activation_scales.edges(parameter.removesuffix("/weight"))
            for leaf, hook in zip(CLAMPS, hooks, strict=True):
                _take_scale(folder, f"{module}.{leaf}", hook)
    for layer in range(folder.config.num_layers):
        owner = activation_scales.key_value_owner(folder.config, layer)
        for leaf, name in CACHES.items():
            full = f"{folder.prefix}layers.{layer}.self_attn.{name}"
            _take_scale(folder, full, f"layers/{owner}/self_attn/{leaf}")
    _take_head(folder)
    return folder.shipment(tuple(f"gemma: int{number}" for number in bits))


def _quantize(
    folder: QuantizedFolder,
    parameter: str,
    codes: str,
    scales: str,
    known: tuple[int, ...],
    fields: Any,
) -> None:
    """Takes a packed matrix."""
    rows, length = folder.parameters[parameter]
    where = f"{folder.folder}: {parameter}"
    width, plain = folder.columns(codes), folder.dtype(codes) == "I8"
    fitting = [
        bits
        for bits in known
        if plain == (bits == 8) and width == (length if plain else packed_bytes(length, bits))
    ]
    if not fitting:
        raise ValueError(
            f"{where}: {codes!r} is {folder.dtype(codes)} with {width} columns for rows of "
            f"{length}, which fits none of the {', '.join(map(str, known))} bits that "
            f"{folder.where} names; they do not belong together."
        )
    bits = fitting[0]
    blocks = folder.columns(scales) if scales in folder else 1
    if blocks < 1 or length % blocks:
        raise ValueError(f"{where}: {scales!r} has {blocks} scales for rows of {length}.")
    file, stored = folder.take(codes, shape=(rows, width), dtypes=("I8" if plain else "U8",))
    _, factors = folder.take(scales, shape=(rows, blocks), dtypes=hf.FLOATS)
    block = 0 if blocks == 1 else length // blocks
    grid = parse_grid(fields or {"bits": bits, "block": block, "scale_rule": "absmax"}, where)
    if (storage_bits(grid.bits), max(grid.block, 0)) != (bits, block):
        raise contradiction(where, grid, f"{bits} bits and {blocks} scales per row")
    grid = dataclasses.replace(grid, scale_dtype="float32")
    read = _reader(file, codes, stored, factors, bits)
    length_of = lambda start, stop: read(start, stop, length)  # noqa: E731
    number = known.index(bits)
    folder.quantize(parameter, grid, length_of, rule=number, name=f"{bits} bits")


def _reader(
    file: SafetensorsFile, name: str, stored: np.ndarray, scales: np.ndarray, bits: int
) -> Callable[[int, int, int], Piece]:
    def read(start: int, stop: int, length: int) -> Piece:
        rows = np.array(stored[start:stop])
        codes = rows if bits == 8 else unpack_rows(rows, bits, length)
        piece = Piece(codes, np.array(scales[start:stop], np.float32))
        if stop == len(stored):
            file.forget(name)
        return piece

    return read


def _take_scale(folder: QuantizedFolder, name: str, hook: str) -> None:
    if name in folder:
        folder.scales.add(hook, folder.number(name), name=name)


def _take_head(folder: QuantizedFolder) -> None:
    """The head is a copy of the token table and takes float activations."""
    table = folder.module(TOKEN_TABLE)
    if f"{HEAD}.weight" in folder and folder.dtype(f"{HEAD}.weight") not in hf.FLOATS:
        folder.same(f"{HEAD}.weight", f"{table}.embedding_quantized")
        folder.same(f"{HEAD}.weight_scale", f"{table}.embedding_scale")
        for leaf in CLAMPS:
            name = f"{HEAD}.{leaf}"
            if name in folder and folder.number(name) != 0:
                raise ValueError(
                    f"{folder.folder}: {name!r} is not 0; the head of Gemma 4 takes float "
                    "activations, a quantized one is not supported."
                )
    elif f"{HEAD}.weight" in folder:
        folder.same(f"{HEAD}.weight", f"{table}.weight")
        folder.carry(f"{HEAD}.weight")


def _known_bits(folder: QuantizedFolder) -> tuple[int, ...]:
    """The widths that the configuration names, the default one included."""
    modules = folder.section.get("module_quant_configs") or {}
    if not isinstance(modules, dict) or not all(isinstance(m, dict) for m in modules.values()):
        raise ValueError(f"{folder.where}: module_quant_configs is no object of objects.")
    default = folder.section.get("num_bits", 4)
    found = [default, *(module.get("num_bits", default) for module in modules.values())]
    for bits in found:
        if bits not in _BITS:
            raise ValueError(f"{folder.where}: num_bits is {bits!r}, expected 2, 4 or 8.")
    return tuple(sorted({int(bits) for bits in found}))
