"""Float safetensors under the released names: the checkpoint that loads everywhere.

Quantized weights are written as the values of their grid ("unquantized QAT"), so whoever looks for
the lattice finds it. Such a value is exact if the float type holds code x scale without rounding;
bfloat16 does for the 5-bit scales of the default recipes.
"""

import dataclasses
from pathlib import Path

from gemmaqat.interop import activation_scales
from gemmaqat.interop.hf import read_config
from gemmaqat.interop.hf_folder import (
    Progress,
    keep_float,
    layout_of,
    without_foreign,
    write_folder,
)
from gemmaqat.interop.options import ExportOptions, Written
from gemmaqat.interop.safetensors_file import SafetensorsFolder
from gemmaqat.interop.shipment import Shipment
from gemmaqat.interop.source import of_folder
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.rules import resolve

_FLOAT = "float"  # the `quant_method` of a folder that has none


def write_hf(
    shipment: Shipment, folder: Path, options: ExportOptions, *, progress: Progress | None = None
) -> list[Written]:
    """Writes a folder that transformers and everything built on it loads.

    Args:
        shipment: what to write.
        folder: an empty folder.
        options: `float_dtype` ("" = that of the source), `text_only`, `allow_requantize` and
            `shard_bytes` are honoured.
        progress: told the number of weights of each piece written.

    Raises:
        ValueError: the float dtype cannot hold a value of a grid, or carried tensors are quantized
            in another format.
    """
    layout = without_foreign(layout_of(shipment, text_only=options.text_only), _FLOAT)
    scales = activation_scales.scales_of(shipment)
    jobs = [
        keep_float(tensor, layout.tensor(path), options, progress)
        for path, tensor in shipment.tensors.items()
        if path not in shipment.table.activation_scales
    ]
    metadata = activation_scales.metadata_of(scales, shipment.table.dynamic)
    written = write_folder(shipment, folder, layout, jobs, options, metadata=metadata)
    return written + [activation_scales.written(hook, s, True) for hook, s in scales.items()]


def read_hf(path: Path) -> Shipment:
    """A folder of floats as it is: every parameter kept, activation scales from the header.

    Raises:
        FileNotFoundError, ValueError: as `source.of_folder`.
    """
    config, where = read_config(path), str(path)
    table = resolve("none", abstract_model(config))
    shipment = of_folder(path, table)
    metadata: dict[str, str] = {}
    for file in SafetensorsFolder(path).files.values():
        metadata |= file.metadata
    scales = activation_scales.ActivationScales(config, where)
    scales.add_all(activation_scales.from_metadata(metadata, where))
    entries = scales.entries(0, "stored")
    return dataclasses.replace(
        shipment,
        table=dataclasses.replace(table, activations=entries),
        tensors=dict(shipment.tensors) | scales.tensors(entries),
    )
