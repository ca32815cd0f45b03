"""Our own folder of packed weights: words and scales as the kernels read them, and the table.

config.json          the model, in Hugging Face's terms
quantization.json    the resolved table
packed.safetensors   `<path>/words` and `<path>/scales` of packed parameters, `<path>` of others
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from gemmaqat.interop.hf import read_config
from gemmaqat.interop.safetensors_file import SafetensorsFile, write_safetensors
from gemmaqat.models.transformer import Gemma4
from gemmaqat.packed import PackedTensor, from_arrays, to_arrays
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.rules import Table

FORMAT = "gemmaqat-packed"
WEIGHTS = "packed.safetensors"


def is_packed_folder(folder: str | Path) -> bool:
    """Whether `save_packed` wrote this folder."""
    return (Path(folder) / WEIGHTS).is_file()


def save_packed(model: Any, folder: str | Path, *, table: Table) -> None:
    """Writes a converted `Gemma4` and the table it was converted by.

    Raises:
        ValueError: the folder holds files already; none of them is touched.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; choose a new folder for the packed weights.")
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    layouts: dict[str, Any] = {}
    for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = "/".join(map(str, keys))
        value = variable.get_value()
        if isinstance(value, PackedTensor):
            parts, layouts[path] = to_arrays(value)
            arrays |= {f"{path}/{name}": part for name, part in parts.items()}
        else:
            arrays[path] = value
    (folder / "config.json").write_text(json.dumps(model.config.to_hf(), indent=1) + "\n")
    (folder / "quantization.json").write_text(json.dumps(table.to_json(), indent=1) + "\n")
    write_safetensors(
        folder / WEIGHTS, arrays, metadata={"format": FORMAT, "packed": json.dumps(layouts)}
    )


def load_packed(folder: str | Path, *, dtype: Any = None) -> Gemma4:
    """The converted model of a folder that `save_packed` wrote; its weights stay packed.

    Args:
        folder: the folder.
        dtype: of the computation; None = float32.

    Raises:
        FileNotFoundError: the folder or its configuration is missing.
        ValueError: the file is damaged, or a parameter is missing.
    """
    folder = Path(folder)
    config = dataclasses.replace(read_config(folder), dtype=jnp.dtype(dtype or "float32").name)
    file = SafetensorsFile(folder / WEIGHTS)
    if file.metadata.get("format") != FORMAT:
        raise ValueError(f"{file.path}: not written by gemmaqat (no format {FORMAT!r}).")
    layouts = json.loads(file.metadata["packed"])
    graphdef, state = nnx.split(abstract_model(config))
    flat: dict[Any, Any] = {}
    for keys, variable in nnx.to_flat_state(state):
        path = "/".join(map(str, keys))
        names = [f"{path}/words", f"{path}/scales"] if path in layouts else [path]
        for name in names:
            if name not in file.tensors:
                raise ValueError(
                    f"{file.path}: {name!r} is missing; config.json and the weights do not belong "
                    "together."
                )
        arrays = {name.rpartition("/")[2]: jnp.array(file.array(name)) for name in names}
        value: Any = from_arrays(arrays, layouts[path]) if path in layouts else arrays.popitem()[1]
        if value.shape != variable.shape:
            raise ValueError(
                f"{file.path}: {path!r} has shape {list(value.shape)}, config.json asks for "
                f"{list(variable.shape)}; they do not belong together."
            )
        flat[keys] = variable.replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
