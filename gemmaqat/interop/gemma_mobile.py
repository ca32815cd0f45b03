"""Writer of the mobile checkpoints that transformers loads (quant_method "gemma").

Per linear `weight` (uint8 of packed 2- or 4-bit codes, or int8), `weight_scale` float32 `[out, 1]`
and two activation scales, explicit even where they are 0 (off); per table `embedding_quantized` and
`embedding_scale`; per attention `k_cache_scale` and `v_cache_scale`, which transformers accepts and
ignores. The head is a packed copy of the token table. Activation scales beside a float linear have
no tensor and no reader there: they go to the header's metadata.

The per-layer table has one scale per row and layer by its recipe, but transformers 5.23 loads one
per row alone. That form is the default; `per_layer_scales` writes the other one.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemmaqat.interop import activation_scales
from gemmaqat.interop.bit_packing import pack_rows, packed_bytes
from gemmaqat.interop.grid_metadata import grids_metadata
from gemmaqat.interop.hf_folder import (
    Job,
    Layout,
    Progress,
    carried_linears,
    keep_float,
    layout_of,
    scalar,
    without_foreign,
    write_folder,
)
from gemmaqat.interop.options import ExportOptions, Kind, Written
from gemmaqat.interop.safetensors_writer import Declared, SafetensorsWriter
from gemmaqat.interop.shipment import (
    TOKEN_TABLE,
    VOCABULARY_TABLES,
    Piece,
    Shipment,
    ShippedTensor,
)
from gemmaqat.interop.source import pieces, values
from gemmaqat.packed import storage_bits
from gemmaqat.quantization.grid import CHANNEL, Grid
from gemmaqat.quantization.grids import quantize

QUANT_METHOD = "gemma"
HEAD = "lm_head"
CLAMPS = ("input_activation_scale", "output_activation_scale")
CACHES = {"k": "k_cache_scale", "v": "v_cache_scale"}  # by hook point


@dataclasses.dataclass
class _Plan:
    """What is known before the first byte is written."""

    shipment: Shipment
    layout: Layout
    options: ExportOptions
    progress: Progress | None
    scales: dict[str, float]  # activation scales, by hook
    stored: set[str] = dataclasses.field(default_factory=set)  # hooks whose scale has a tensor
    jobs: list[Job] = dataclasses.field(default_factory=list)
    bits: dict[str, int] = dataclasses.field(default_factory=dict)  # of a weight, by module
    grids: dict[str, Grid] = dataclasses.field(default_factory=dict)  # by parameter
    kept: list[str] = dataclasses.field(default_factory=list)  # modules that stay float


def write_gemma_mobile(
    shipment: Shipment, folder: Path, options: ExportOptions, *, progress: Progress | None = None
) -> list[Written]:
    """Writes a folder for transformers' Gemma quantizer.

    Args:
        shipment: what to write; its activation scales are those of a prepared model.
        folder: an empty folder.
        options: `per_layer_scales`, `float_dtype`, `text_only`, `allow_requantize` and
            `shard_bytes` are honoured.
        progress: told the number of weights of each piece written.

    Raises:
        ValueError: dynamic activations; a weight with blocks, half-integer levels or more than one
            scale per row; a value that the float dtype cannot hold; carried tensors quantized in
            another format.
    """
    layout = without_foreign(layout_of(shipment, text_only=options.text_only), QUANT_METHOD)
    if dynamic := sorted(shipment.table.dynamic):
        raise ValueError(
            f"gemma-mobile: {dynamic[0]} is quantized under a scale for each token, this format "
            "has static scales alone; export as 'compressed-tensors', or use a mobile recipe."
        )
    scales = activation_scales.scales_of(shipment)
    plan = _Plan(shipment, layout, options, progress, scales)
    for tensor in shipment.tensors.values():
        if tensor.path not in shipment.table.activation_scales:
            _plan_tensor(plan, tensor)
    _plan_caches(plan)
    if HEAD not in plan.bits:
        plan.kept.append(HEAD)
    plan.kept += carried_linears(layout)
    layout.config["quantization_config"] = _quantization_config(plan)
    left = {hook: scale for hook, scale in scales.items() if hook not in plan.stored}
    metadata = activation_scales.metadata_of(left, ()) | grids_metadata(plan.grids)
    written = write_folder(shipment, folder, layout, plan.jobs, options, metadata=metadata)
    return written + [activation_scales.written(h, scale, h in left) for h, scale in scales.items()]


def _plan_tensor(plan: _Plan, tensor: ShippedTensor) -> None:
    module = plan.layout.module(tensor.path)
    is_table = tensor.path in VOCABULARY_TABLES
    if tensor.grid is None or ".experts." in module:  # experts are parameters, not linears
        if len(tensor.shape) == 2:
            plan.kept.append(module)
        name = plan.layout.tensor(tensor.path)
        plan.jobs.append(keep_float(tensor, name, plan.options, plan.progress))
    elif is_table:
        _check_grid(tensor)
        _plan_table(plan, tensor, module)
    else:
        _check_grid(tensor)
        _check_channel(tensor)
        names = {f"{module}.weight": f"{module}.weight_scale"}
        plan.bits[module] = storage_bits(tensor.grid.bits)
        plan.jobs.append(_pack(plan, tensor, names))
        _plan_clamps(plan, tensor, module)


def _plan_table(plan: _Plan, tensor: ShippedTensor, module: str) -> None:
    assert tensor.grid is not None
    names = {f"{module}.embedding_quantized": f"{module}.embedding_scale"}
    plan.bits[module] = storage_bits(tensor.grid.bits)
    if tensor.path == TOKEN_TABLE:
        _check_channel(tensor)
        names[f"{HEAD}.weight"] = f"{HEAD}.weight_scale"
        plan.bits[HEAD] = plan.bits[module]
        plan.layout.untie()
        plan.jobs += [scalar(f"{HEAD}.{clamp}", 0.0) for clamp in CLAMPS]
        plan.jobs.append(_pack(plan, tensor, names))
        return
    blocks = tensor.grid.num_blocks(tensor.row_length)
    layers = plan.shipment.config.num_layers
    if blocks == 1 or (plan.options.per_layer_scales and blocks == layers):
        plan.jobs.append(_pack(plan, tensor, names))
    elif not plan.options.allow_requantize:
        raise ValueError(
            f"{tensor.path}: {blocks} scales per row, but transformers loads one; give it a rule "
            "of its own with tile_size=0, write one per layer with per_layer_scales (for other "
            "readers), or allow requantizing."
        )
    else:
        plan.jobs.append(_pack(plan, _one_scale_per_row(tensor), names, kind="requantized"))


def _plan_clamps(plan: _Plan, tensor: ShippedTensor, module: str) -> None:
    hooks = activation_scales.edges(tensor.path.removesuffix("/weight"))
    for name, hook in zip(CLAMPS, hooks, strict=True):
        plan.stored.add(hook)
        plan.jobs.append(scalar(f"{module}.{name}", plan.scales.get(hook, 0.0)))


def _plan_caches(plan: _Plan) -> None:
    """Scales of keys and values; layers that share them repeat their owner's."""
    config = plan.shipment.config
    for layer in range(config.num_layers):
        owner = activation_scales.key_value_owner(config, layer)
        for hook, name in CACHES.items():
            path = f"layers/{owner}/self_attn/{hook}"
            if path in plan.scales:
                plan.stored.add(path)
                full = f"{plan.layout.prefix}layers.{layer}.self_attn.{name}"
                plan.jobs.append(scalar(full, plan.scales[path]))


def _pack(
    plan: _Plan, tensor: ShippedTensor, names: dict[str, str], *, kind: Kind = "exact"
) -> Job:
    """Writes a quantized matrix; `names` of its copies: codes to scales."""
    grid = tensor.grid
    assert grid is not None
    plan.grids[tensor.path] = grid
    bits, rows, length = storage_bits(grid.bits), tensor.num_rows, tensor.row_length
    blocks = grid.num_blocks(length)
    width = length if bits == 8 else packed_bytes(length, bits)
    declared = [
        tensor
        for codes, scales in names.items()
        for tensor in (
            Declared(codes, "I8" if bits == 8 else "U8", (rows, width)),
            Declared(scales, "F32", (rows, blocks)),
        )
    ]

    def run(writer: SafetensorsWriter) -> Written:
        for start, stop, piece in pieces(tensor):
            packed = piece.codes if bits == 8 else pack_rows(piece.codes, bits)
            for codes, scales in names.items():
                writer.write(codes, packed)
                writer.write(scales, piece.scales.astype(np.float32))
            if plan.progress:
                plan.progress((stop - start) * length)
        where = "channel" if blocks == 1 else f"{blocks} scales per row"
        note = "one scale per row: other codes" if kind == "requantized" else ""
        if blocks > 1:
            note = "transformers 5.23 loads one scale per row alone"
        return Written(tensor.path, kind, f"int{bits} {where}", note)

    return Job(declared, run)


def _one_scale_per_row(tensor: ShippedTensor) -> ShippedTensor:
    """The same table rounded again, under one scale for each row."""
    assert tensor.grid is not None
    grid = dataclasses.replace(tensor.grid, block=CHANNEL)

    def read(start: int, stop: int) -> Piece:
        rows = values(tensor, tensor.read(start, stop))
        codes, scales = quantize(jnp.asarray(rows), grid, axis=-1)
        return Piece(np.asarray(codes), np.asarray(scales))

    return dataclasses.replace(tensor, grid=grid, read=read)


def _check_grid(tensor: ShippedTensor) -> None:
    assert tensor.grid is not None
    if tensor.grid.levels == "half":
        raise ValueError(
            f"{tensor.path}: half-integer levels ({tensor.grid.describe()}), the mobile format "
            "holds integers times a scale; use levels='full' or 'ternary' in the recipe."
        )


def _check_channel(tensor: ShippedTensor) -> None:
    assert tensor.grid is not None
    if tensor.grid.block > 0:
        raise ValueError(
            f"{tensor.path}: {tensor.grid.describe()}, but the mobile format has one scale per "
            "row; use tile_size=0 in the recipe (mobile_e2b, int4_channel, ...), or export as "
            "'compressed-tensors', which holds blocks."
        )


def _quantization_config(plan: _Plan) -> dict[str, Any]:
    """Patterns are searched for in the names of modules, so ours hold a whole name each."""
    if not plan.bits:
        raise ValueError(
            "gemma-mobile: the recipe quantizes nothing; export as 'hf', or choose a recipe such "
            "as mobile_e2b."
        )
    modules: dict[str, dict[str, int]] = {}
    for bits in sorted(set(plan.bits.values())):
        names = [re.escape(module) for module, other in plan.bits.items() if other == bits]
        modules |= {rf"^{pattern}$": {"num_bits": bits} for pattern in _by_layer(names)}
    source = plan.layout.quantization_config  # of towers that are carried in this format
    tables = {plan.layout.module(path) for path in VOCABULARY_TABLES}
    return {
        "quant_method": QUANT_METHOD,
        "num_bits": source.get("num_bits", 4),
        "quantize_embeddings": bool(tables & plan.bits.keys()),
        "module_quant_configs": modules | source.get("module_quant_configs", {}),
        "modules_to_not_convert": plan.kept + list(source.get("modules_to_not_convert") or []),
    }


def _by_layer(names: list[str]) -> list[str]:
    """The same names with the numbers of alike layers gathered in one pattern."""
    layers: dict[str, list[str]] = {}
    for name in names:
        parts = re.split(r"(?<=layers\\\.)(\d+)(?=\\\.)", name, maxsplit=1)
        if len(parts) == 1:
            layers[name] = []
        else:
            layers.setdefault("\0".join((parts[0], parts[2])), []).append(parts[1])
    return [
        pattern.replace("\0", f"({'|'.join(numbers)})") if numbers else pattern
        for pattern, numbers in layers.items()
    ]
