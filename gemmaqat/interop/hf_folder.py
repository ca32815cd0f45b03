"""What all formats in a Hugging Face folder share: names, config.json, companions, float tensors.

A format adds its own tensors and its `quantization_config`. The layout is that of the source: a
released multimodal checkpoint stays one, a text-only one stays flat.
"""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from gemmaqat.interop import hf
from gemmaqat.interop.options import ExportOptions, Kind, Written
from gemmaqat.interop.rounding import to_dtype
from gemmaqat.interop.safetensors_writer import Declared, SafetensorsWriter, dtype_name
from gemmaqat.interop.shipment import CarriedTensor, Shipment, ShippedTensor
from gemmaqat.interop.source import PIECE_BYTES, pieces

Progress = Callable[[int], None]  # told the number of weights just written

# Modules of the unified 12B whose tensors have other names than transformers' modules.
_RENAMED = {
    "model.vision_embedder.": "model.embed_vision.",
    "model.embed_vision.embedding_projection": (
        "model.embed_vision.multimodal_embedder.embedding_projection"
    ),
}
_CAUSAL = {"gemma4_text": "Gemma4ForCausalLM", "gemma4_unified_text": "Gemma4UnifiedForCausalLM"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names and configuration of a folder to be written.

    Attributes:
        prefix: of the text decoder's tensors.
        config: config.json without a `quantization_config`.
        carried: the tensors to pass on.
        quantization_config: of the source, where it had one.
    """

    prefix: str
    config: dict[str, Any]
    carried: Mapping[str, CarriedTensor]
    quantization_config: dict[str, Any]

    def tensor(self, path: str) -> str:
        """The whole name of the float tensor of a parameter."""
        return self.prefix + hf.tensor_name(path)

    def module(self, path: str) -> str:
        """The whole name of the module that holds a parameter `<module>/weight`."""
        return self.tensor(path).removesuffix(".weight")

    def untie(self) -> None:
        """States that the head has a tensor of its own, at both levels of the configuration."""
        self.config["tie_word_embeddings"] = False
        if "text_config" in self.config:
            self.config["text_config"]["tie_word_embeddings"] = False


def layout_of(shipment: Shipment, *, text_only: bool) -> Layout:
    """The layout of the source, or of its text decoder alone."""
    if shipment.released_config is None:
        config = shipment.config.to_hf() | {"dtype": shipment.config.param_dtype}
        return Layout("model.", config, {} if text_only else shipment.carried, {})
    config = copy.deepcopy(dict(shipment.released_config))
    quantization_config = config.pop("quantization_config", {})
    nested = isinstance(config.get("text_config"), dict)
    if nested and text_only:
        text = config["text_config"]
        ids = {key: config[key] for key in ("eos_token_id", "dtype") if key in config}
        config = text | ids | {"architectures": [_CAUSAL[text["model_type"]]]}
        nested = False
    return Layout(
        "model.language_model." if nested else "model.",
        config,
        {} if text_only else shipment.carried,
        quantization_config,
    )


class Job(NamedTuple):
    """One tensor of the source: what it becomes in the folder, and how that is written."""

    declared: Sequence[Declared]
    run: Callable[[SafetensorsWriter], Written | None]


def write_folder(
    shipment: Shipment,
    folder: Path,
    layout: Layout,
    jobs: Sequence[Job],
    options: ExportOptions,
    *,
    metadata: Mapping[str, str],
) -> list[Written]:
    """Writes the tensors of all jobs and of `layout.carried`, config.json and the companions."""
    jobs = [*jobs, *(_carry(tensor) for tensor in layout.carried.values())]
    declared = [tensor for job in jobs for tensor in job.declared]
    with SafetensorsWriter(
        folder, declared, shard_bytes=options.shard_bytes, metadata=metadata
    ) as writer:
        written = [told for job in jobs if (told := job.run(writer)) is not None]
    for name, path in shipment.files.items():
        shutil.copyfile(path, folder / name)
    (folder / "config.json").write_text(json.dumps(layout.config, indent=2) + "\n")
    return written


def keep_float(
    tensor: ShippedTensor, name: str, options: ExportOptions, progress: Progress | None
) -> Job:
    """Writes a tensor as floats; a quantized one as the values of its grid.

    Raises, when run:
        ValueError: as `rounding.to_dtype`.
    """
    dtype = np.dtype(tensor.dtype)
    if options.float_dtype and len(tensor.shape) >= 2:
        dtype = jnp.dtype(options.float_dtype)
    declared = Declared(name, dtype_name(dtype), tensor.shape)

    def run(writer: SafetensorsWriter) -> Written:
        kind: Kind = "kept"
        note = ""
        for start, stop, piece in pieces(tensor):
            stored = to_dtype(tensor, piece, dtype, options)
            writer.write(name, stored.values)
            if not note:  # the first rounding stays
                kind, note = stored.kind, stored.note
            if progress:
                progress((stop - start) * tensor.row_length)
        where = "" if tensor.grid is None else " on the grid"
        return Written(tensor.path, kind, declared.dtype + where, note)

    return Job([declared], run)


def _carry(tensor: CarriedTensor) -> Job:
    def run(writer: SafetensorsWriter) -> Written:
        for start in range(0, tensor.num_bytes, PIECE_BYTES):
            writer.write(
                tensor.name, tensor.read(start, min(start + PIECE_BYTES, tensor.num_bytes))
            )
        return Written(tensor.name, "carried", tensor.dtype)

    declared = Declared(tensor.name, tensor.dtype, tensor.shape)
    assert declared.num_bytes == tensor.num_bytes, tensor.name
    return Job([declared], run)


def scalar(name: str, value: float, *, shape: tuple[int, ...] = ()) -> Job:
    """Writes one float32 number, which is no parameter of its own."""

    def run(writer: SafetensorsWriter) -> None:
        writer.write(name, np.full(shape, value, np.float32))

    return Job([Declared(name, "F32", shape)], run)


def carried_linears(layout: Layout) -> list[str]:
    """Modules among the carried float tensors that a reader may take for quantized linears."""
    modules = [
        name.removesuffix(".weight")
        for name, tensor in layout.carried.items()
        if name.endswith(".weight")
        and len(tensor.shape) == 2
        and tensor.dtype in hf.FLOATS
        and not name.startswith(f"{layout.prefix}layers.")  # unused keys and values
    ]
    return modules + [
        new + module.removeprefix(old)
        for module in modules
        for old, new in _RENAMED.items()
        if module.startswith(old)
    ]


def without_foreign(layout: Layout, quant_method: str) -> Layout:
    """The layout without unused keys and values that are quantized in another format.

    Raises:
        ValueError: a tower is quantized in another format than the one to be written.
    """
    found = layout.quantization_config.get("quant_method", quant_method)
    if found == quant_method:
        return layout
    quantized = {
        name.rpartition(".")[0]
        for name, tensor in layout.carried.items()
        if tensor.dtype not in hf.FLOATS
    }
    for module in quantized:
        if not module.startswith(f"{layout.prefix}layers."):
            raise ValueError(
                f"{module}: not of the text decoder and quantized by {found!r}, which "
                f"{quant_method!r} cannot hold; export with text_only."
            )
    kept = {
        name: tensor
        for name, tensor in layout.carried.items()
        if name.rpartition(".")[0] not in quantized
    }
    return dataclasses.replace(layout, carried=kept)
