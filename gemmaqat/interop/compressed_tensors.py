"""Writer of compressed-tensors folders: codes as int32 bit streams, for vLLM and transformers.

Per quantized linear `weight_packed` int32 `[out, ceil(in * bits / 32)]`, `weight_scale`
`[out, in / group]` in the grid's dtype (negative scales survive) and `weight_shape`. Tables stay
float unless asked for, as in Google's files. Experts of the 26B-A4B stay float values on the grid:
no reader is known to load a packed form.

Static activation scales become `input_scale` and `output_scale`; a scale of 0 is a module without
that quantizer. Dynamic inputs, a scale for each token, are told by the configuration: 8-bit weights
in channels between them are the library's W8A8. What the format has no place for (key/value caches,
inputs of float experts) goes to the header's metadata.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

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
from gemmaqat.interop.options import ExportOptions, Written
from gemmaqat.interop.safetensors_writer import Declared, SafetensorsWriter, dtype_name
from gemmaqat.interop.shipment import (
    TOKEN_TABLE,
    VOCABULARY_TABLES,
    Shipment,
    ShippedTensor,
)
from gemmaqat.interop.source import PIECE_BYTES
from gemmaqat.quantization.grids import Grid

QUANT_METHOD = "compressed-tensors"
PACKED, PLAIN, MIXED, DENSE = "pack-quantized", "int-quantized", "mixed-precision", "dense"


class Scheme(NamedTuple):
    """What one group of the configuration says of its modules."""

    bits: int  # of the weights; 0 = float
    group: int  # weights under one scale; 0 = a whole row
    input: str  # "", "static" or "dynamic": an int8 quantizer
    output: bool  # a static one

    @property
    def format(self) -> str:
        """How the weights are stored."""
        if not self.bits:
            return DENSE
        return PLAIN if self.bits == 8 and self.input else PACKED

    def to_json(self, targets: list[str]) -> dict[str, Any]:
        """The group of the configuration."""
        static = _quantizer(8, "tensor", None)
        dynamic = _quantizer(8, "token", None) | {"dynamic": True}
        weights = _quantizer(self.bits, "group" if self.group else "channel", self.group or None)
        return {
            "targets": targets,
            "weights": weights if self.bits else None,
            "input_activations": {"static": static, "dynamic": dynamic}.get(self.input),
            "output_activations": static if self.output else None,
            "format": self.format,
        }


def _quantizer(bits: int, strategy: str, group: int | None) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
    }


@dataclasses.dataclass
class _Plan:
    """What is known before the first byte is written."""

    shipment: Shipment
    layout: Layout
    options: ExportOptions
    progress: Progress | None
    scales: dict[str, float]  # activation scales, by hook
    clamped: set[str] = dataclasses.field(default_factory=set)  # hooks that the folder tells of
    jobs: list[Job] = dataclasses.field(default_factory=list)
    schemes: dict[str, Scheme] = dataclasses.field(default_factory=dict)  # by module
    ignored: list[str] = dataclasses.field(default_factory=list)
    grids: dict[str, Grid] = dataclasses.field(default_factory=dict)  # by parameter


def write_compressed_tensors(
    shipment: Shipment,
    folder: Path,
    options: ExportOptions,
    *,
    progress: Progress | None = None,
) -> list[Written]:
    """Writes a folder that vLLM, transformers and the compressed-tensors library load.

    A recipe of several grids makes several groups. Transformers reads those on its default path;
    with `dequantize=True` it takes the first group's scheme for every module.

    Args:
        shipment: what to write.
        folder: an empty folder.
        options: `float_dtype`, `packed_experts`, `packed_tables`, `text_only`,
            `allow_requantize` and `shard_bytes` are honoured.
        progress: told the number of weights of each piece written.

    Raises:
        ValueError: a grid without integer levels, a value that the float dtype cannot hold, or
            carried tensors quantized in another format.
    """
    layout = without_foreign(layout_of(shipment, text_only=options.text_only), QUANT_METHOD)
    scales = activation_scales.scales_of(shipment)
    plan = _Plan(shipment, layout, options, progress, scales, ignored=["lm_head"])
    for tensor in shipment.tensors.values():
        if tensor.path not in shipment.table.activation_scales:
            _plan_tensor(plan, tensor)
    plan.ignored += carried_linears(layout)
    layout.config["quantization_config"] = _quantization_config(plan)
    left = {hook: scale for hook, scale in scales.items() if hook not in plan.clamped}
    metadata = activation_scales.metadata_of(left, shipment.table.dynamic)
    metadata |= grids_metadata(plan.grids)
    written = write_folder(shipment, folder, layout, plan.jobs, options, metadata=metadata)
    return written + [_written_scale(plan, hook) for hook in scales]


def _written_scale(plan: _Plan, hook: str) -> Written:
    told = activation_scales.written(hook, plan.scales[hook], hook not in plan.clamped)
    in_config = hook in plan.clamped and hook in plan.shipment.table.dynamic
    return told._replace(stored="int8 per token") if in_config else told


def _plan_tensor(plan: _Plan, tensor: ShippedTensor) -> None:
    module = plan.layout.module(tensor.path)
    if tensor.grid is not None:
        _check_levels(tensor)
    if ".experts." in module:
        _plan_experts(plan, tensor)
    elif tensor.path in VOCABULARY_TABLES:
        _plan_table(plan, tensor)
    elif len(tensor.shape) == 2:
        clamps = _clamps(plan, tensor, module)
        if tensor.grid is None and not any(clamps):
            plan.ignored.append(module)
        elif tensor.grid is None:
            plan.schemes[module] = Scheme(0, 0, *clamps)
        if tensor.grid is None:
            _keep(plan, tensor)
        else:
            _pack(plan, tensor, module, clamps=clamps)
    else:
        _keep(plan, tensor)


def _keep(plan: _Plan, tensor: ShippedTensor) -> None:
    name = plan.layout.tensor(tensor.path)
    plan.jobs.append(keep_float(tensor, name, plan.options, plan.progress))


def _plan_table(plan: _Plan, tensor: ShippedTensor) -> None:
    if tensor.grid is None or not plan.options.packed_tables:
        _keep(plan, tensor)
        return
    module = plan.layout.module(tensor.path)
    modules = [module]
    if tensor.path == TOKEN_TABLE:  # a packed table cannot be tied: the head gets its own copy
        modules.append("lm_head")
        plan.ignored.remove("lm_head")
        plan.layout.untie()
    _pack(plan, tensor, *modules)


def _plan_experts(plan: _Plan, tensor: ShippedTensor) -> None:
    if tensor.grid is None or not plan.options.packed_experts:
        _keep(plan, tensor)
        return
    # As separate linears: gate and up share the rows of one tensor, gate first.
    stack, leaf = plan.layout.module(tensor.path).rsplit(".", 1)
    leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    experts, rows = tensor.shape[0], tensor.shape[1] // len(leaves)
    parts = [f"{stack}.{expert}.{name}" for expert in range(experts) for name in leaves]
    scheme = _scheme(tensor.grid, (_dynamic_input(plan, tensor), False))
    plan.schemes |= dict.fromkeys(parts, scheme)
    plan.grids[tensor.path] = tensor.grid
    declared = [d for part in parts for d in _declared(tensor, part, rows, scheme)]

    def run(writer: SafetensorsWriter) -> Written:
        for number, part in enumerate(parts):
            _write_rows(writer, tensor, number * rows, rows, [part], scheme, plan.progress)
        stored = _stored(tensor.grid, scheme)
        return Written(tensor.path, "exact", stored, "no known reader loads packed experts")

    plan.jobs.append(Job(declared, run))


def _pack(
    plan: _Plan, tensor: ShippedTensor, *modules: str, clamps: tuple[str, bool] = ("", False)
) -> None:
    """Plans a quantized matrix, in as many copies as there are modules."""
    assert tensor.grid is not None
    scheme = _scheme(tensor.grid, clamps)
    plan.schemes |= dict.fromkeys(modules, scheme)
    plan.grids[tensor.path] = tensor.grid
    rows = tensor.num_rows
    declared = [d for module in modules for d in _declared(tensor, module, rows, scheme)]

    def run(writer: SafetensorsWriter) -> Written:
        _write_rows(writer, tensor, 0, rows, list(modules), scheme, plan.progress)
        note = "transformers 5.23 loads it with dequantize=True alone" * (
            tensor.path in VOCABULARY_TABLES
        )
        return Written(tensor.path, "exact", _stored(tensor.grid, scheme), note)

    plan.jobs.append(Job(declared, run))


def _clamps(plan: _Plan, tensor: ShippedTensor, module: str) -> tuple[str, bool]:
    """Plans the activation scales of a linear: `Scheme.input` and `Scheme.output`."""
    hooks = activation_scales.edges(tensor.path.removesuffix("/weight"))
    dynamic = _dynamic_input(plan, tensor)
    static = []
    for name, hook in zip(("input_scale", "output_scale"), hooks, strict=True):
        scale = 0.0 if hook in plan.shipment.table.dynamic else plan.scales.get(hook, 0.0)
        static.append(scale != 0)
        if scale:
            plan.clamped.add(hook)
            plan.jobs.append(scalar(f"{module}.{name}", scale, shape=(1,)))
    return dynamic or "static" * static[0], static[1]


def _dynamic_input(plan: _Plan, tensor: ShippedTensor) -> str:
    """`Scheme.input` of a module as far as it is dynamic; the configuration then tells of it."""
    hook = activation_scales.edges(tensor.path.removesuffix("/weight")).input
    if hook not in plan.shipment.table.dynamic or not plan.scales[hook]:
        return ""
    plan.clamped.add(hook)
    return "dynamic"


def _scheme(grid: Grid, clamps: tuple[str, bool]) -> Scheme:
    return Scheme(grid.bits, max(grid.block, 0), *clamps)


def _stored(grid: Grid | None, scheme: Scheme) -> str:
    assert grid is not None
    where = f"group {scheme.group}" if scheme.group else "channel"
    return f"int{scheme.bits} {where}, {dtype_name(grid.scale_dtype)} scales"


def _check_levels(tensor: ShippedTensor) -> None:
    assert tensor.grid is not None
    if tensor.grid.levels == "half":
        raise ValueError(
            f"{tensor.path}: half-integer levels ({tensor.grid.describe()}), compressed-tensors "
            "holds integers times a scale; use levels='full' or 'ternary' in the recipe."
        )


def _declared(tensor: ShippedTensor, module: str, rows: int, scheme: Scheme) -> list[Declared]:
    """The tensors of one module of `rows` outputs."""
    assert tensor.grid is not None
    length = tensor.row_length
    scales = Declared(
        f"{module}.weight_scale",
        dtype_name(tensor.grid.scale_dtype),
        (rows, tensor.grid.num_blocks(length)),
    )
    if scheme.format == PLAIN:
        return [Declared(f"{module}.weight", "I8", (rows, length)), scales]
    return [
        Declared(f"{module}.weight_packed", "I32", (rows, num_words(length, scheme.bits))),
        scales,
        Declared(f"{module}.weight_shape", "I64", (2,)),
    ]


def num_words(length: int, bits: int) -> int:
    """int32 words of a packed row."""
    return -(-length * bits // 32)


def _write_rows(
    writer: SafetensorsWriter,
    tensor: ShippedTensor,
    first: int,
    rows: int,
    modules: list[str],
    scheme: Scheme,
    progress: Progress | None,
) -> None:
    """Writes `rows` rows of a tensor from `first` on to each of the modules."""
    length = tensor.row_length
    step = max(1, PIECE_BYTES // (4 * length))
    padding = 4 * num_words(length, scheme.bits) - packed_bytes(length, scheme.bits)
    for start in range(first, first + rows, step):
        stop = min(start + step, first + rows)
        piece = tensor.read(start, stop)
        data = piece.codes
        if scheme.format == PACKED:
            data = np.pad(pack_rows(data, scheme.bits), ((0, 0), (0, padding)))
        for module in modules:
            writer.write(f"{module}.weight{'_packed' * (scheme.format == PACKED)}", data)
            writer.write(f"{module}.weight_scale", piece.scales)
        if progress:
            progress((stop - start) * length)
    if scheme.format == PACKED:
        for module in modules:
            writer.write(f"{module}.weight_shape", np.array([rows, length], np.int64))


def _quantization_config(plan: _Plan) -> dict[str, Any]:
    """The configuration: a group per scheme, the commonest one for all linears without a name."""
    counts = Counter(scheme for scheme in plan.schemes.values() if scheme.bits)
    if not counts:
        raise ValueError(
            "compressed-tensors: the recipe quantizes nothing that this format packs; export as "
            "'hf', or choose a recipe that quantizes linears."
        )
    rest = {scheme for scheme in plan.schemes.values() if not scheme.bits}
    groups = {}
    for number, scheme in enumerate([*(s for s, _ in counts.most_common()), *sorted(rest)]):
        names = [module for module, other in plan.schemes.items() if other == scheme]
        if number == 0:  # linears by their class; only tables are none
            tables = {plan.layout.module(path) for path in VOCABULARY_TABLES}
            names = ["Linear", *(name for name in names if name in tables)]
        groups[f"group_{number}"] = scheme.to_json(names)
    formats = {scheme.format for scheme in counts}
    return {
        "quant_method": QUANT_METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "config_groups": groups,
        "ignore": plan.ignored,
    }
