"""`load_pretrained`: a model from a checkpoint of any format that is read here.

Floats come through `hf`, tensor by tensor onto the devices. Whatever is quantized comes as a
shipment and stays packed, with the table that its codes make.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from absl import logging
from flax import nnx

from gemmaqat.interop import hf
from gemmaqat.interop.formats import detect, find_format
from gemmaqat.interop.hf import LoadReport
from gemmaqat.interop.packed_folder import is_packed_folder
from gemmaqat.interop.shipment import Shipment
from gemmaqat.interop.source import of_packed_folder, to_model
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.transformer import Gemma4
from gemmaqat.planning.parameters import count_parameters
from gemmaqat.quantization import trees
from gemmaqat.quantization.convert import dequantize_params
from gemmaqat.quantization.table import Table


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model, how it was read, and how it is quantized.

    Attributes:
        model: quantized parameters are `PackedTensor`s.
        report: what became of every tensor.
        table: None where all parameters are floats.
    """

    model: Gemma4
    report: LoadReport
    table: Table | None = None


def load_pretrained(path: str | Path, **options: Any) -> Gemma4:
    """The Gemma 4 model of a checkpoint; see `read_pretrained` for formats and options."""
    return read_pretrained(path, **options).model


def read_pretrained(
    path: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = None, **options: Any
) -> Loaded:
    """Reads a checkpoint; what is quantized in it stays packed.

    Args:
        path: a Hugging Face folder in float, in compressed-tensors or in the Gemma mobile form; a
            GGUF file; an Orbax folder; a folder that `gemmaqat quantize` or `export` wrote.
        dtype: of the computation.
        param_dtype: of the float parameters; None = `dtype`.
        options: `remat`, `mesh` and `check_memory` of `hf.read_pretrained`; the last two for floats
            in safetensors alone.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: it is damaged, of another model family, or of a format not read here.
        MemoryError: the parameters do not fit.
    """
    path = Path(path)
    if is_float_folder(path):
        floats = hf.read_pretrained(path, dtype=dtype, param_dtype=param_dtype, **options)
        return Loaded(floats.model, floats.report)
    if options.get("mesh") is not None:
        raise ValueError(f"{path}: only floats in safetensors are read onto a mesh; leave it out.")
    shipment = read_shipment(path)
    remat = options.get("remat", shipment.config.remat)
    shipment = dataclasses.replace(
        shipment, config=dataclasses.replace(shipment.config, remat=remat)
    )
    model = to_model(shipment, dtype=dtype, param_dtype=param_dtype)
    leaves = [leaf for leaf, _ in trees.weights(model).values()]
    report = LoadReport(
        folder=path,
        loaded=len(shipment.tensors),
        skipped={"carried": len(shipment.carried)} if shipment.carried else {},
        parameters=count_parameters(shipment.config),
        bytes=sum(leaf.nbytes for leaf in leaves),
    )
    logging.info("%s", report)
    quantized = shipment.table.quantized or shipment.table.activations
    return Loaded(model, report, shipment.table if quantized else None)


def read_float(path: str | Path, *, param_dtype: Any = jnp.float32, **options: Any) -> Loaded:
    """As `read_pretrained`, with the values of quantized parameters as floats, to train further."""
    loaded = read_pretrained(path, param_dtype=param_dtype, **options)
    if loaded.table is None:
        return loaded
    graphdef, params = nnx.split(loaded.model)
    model = nnx.merge(graphdef, dequantize_params(params, jnp.dtype(param_dtype)))
    return dataclasses.replace(loaded, model=model)


def read_config(path: str | Path) -> ModelConfig:
    """The configuration of a checkpoint of any format, without its weights."""
    path = Path(path)
    return hf.read_config(path) if is_float_folder(path) else read_shipment(path).config


def read_shipment(path: str | Path) -> Shipment:
    """A checkpoint of any format, mapped; floats are kept as they are."""
    path = Path(path)
    if is_packed_folder(path):
        return of_packed_folder(path)
    name, where = detect(path)
    return find_format(name).read()(where)


def is_float_folder(path: Path) -> bool:
    """Whether this is a Hugging Face folder of floats, or nothing (which its reader explains)."""
    if is_packed_folder(path) or path.is_file():
        return False
    return not path.is_dir() or detect(path)[0] == "hf"
