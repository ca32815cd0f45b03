"""Our own folder of packed weights: words and scales as the kernels read them, and the table.

config.json          the model, in Hugging Face's terms
quantization.json    the resolved table
packed.safetensors   `<path>/words` and `<path>/scales` of packed parameters, `<path>` of others,
                     scales of activations among them
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from gemmaqat.interop.hf import read_config
from gemmaqat.interop.safetensors_file import SafetensorsFile, write_safetensors
from gemmaqat.json_file import parse_json, read_json
from gemmaqat.models.transformer import Gemma4
from gemmaqat.packed import PackedTensor, from_arrays, to_arrays
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.activations import activation_scales, check_scales, prepare
from gemmaqat.quantization.table import Entry, Table

FORMAT = "gemmaqat-packed"
WEIGHTS, TABLE = "packed.safetensors", "quantization.json"


def is_packed_folder(folder: str | Path) -> bool:
    """Whether `save_packed` wrote this folder."""
    return (Path(folder) / WEIGHTS).is_file()


def save_packed(model: Any, folder: str | Path, *, table: Table) -> None:
    """Writes a converted `Gemma4` and the table it was converted by.

    Raises:
        ValueError: the folder holds files already, of which none is touched, the table is not the
            model's, or it quantizes activations that have no scales.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; choose a new folder for the packed weights.")
    arrays: dict[str, Any] = {}
    layouts: dict[str, Any] = {}
    entries = table.by_path
    off = _unused_scales(model, table)
    for keys, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        path = "/".join(map(str, keys))
        value = variable.get_value()
        if path in off:
            continue
        if path not in table.activation_scales:
            _check_entry(path, value, entries.get(path), where=str(folder))
        if isinstance(value, PackedTensor):
            parts, layouts[path] = to_arrays(value)
            arrays |= {f"{path}/{name}": part for name, part in parts.items()}
        else:
            arrays[path] = value
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_hf(), indent=1) + "\n")
    (folder / TABLE).write_text(json.dumps(table.to_json(), indent=1) + "\n")
    write_safetensors(
        folder / WEIGHTS, arrays, metadata={"format": FORMAT, "packed": json.dumps(layouts)}
    )


def load_packed(folder: str | Path, *, dtype: Any = None) -> Gemma4:
    """The converted model of a folder that `save_packed` wrote; its weights stay packed.

    Args:
        folder: the folder.
        dtype: of the computation; None = float32. Parameters keep the dtypes they were saved in.

    Raises:
        FileNotFoundError: the folder, its configuration, table or weights are missing.
        ValueError: a file is damaged, a parameter is missing or unknown, or the weights are not
            stored as the table says.
    """
    folder = Path(folder)
    config, table = read_config(folder), read_table(folder)
    if not is_packed_folder(folder):
        raise FileNotFoundError(f"{folder / WEIGHTS}: missing; give a folder of packed weights.")
    file = SafetensorsFile(folder / WEIGHTS)
    layouts = _read_layouts(file)
    config = dataclasses.replace(
        config,
        dtype=jnp.dtype(dtype or "float32").name,
        param_dtype=next((entry.dtype for entry in table.entries), config.param_dtype),
    )
    graphdef, state = nnx.split(prepare(abstract_model(config), table))
    wanted = {"/".join(map(str, keys)): (keys, leaf) for keys, leaf in nnx.to_flat_state(state)}
    entries = table.by_path
    _check_names(file, layouts, set(wanted), entries.keys() | table.activation_scales)
    flat: dict[Any, Any] = {}
    for path, (keys, variable) in wanted.items():
        value = _read_value(file, path, layouts.get(path))
        if value.shape != variable.shape:
            raise ValueError(
                f"{file.path}: {path!r} has shape {list(value.shape)}, config.json asks for "
                f"{list(variable.shape)}; they do not belong together."
            )
        if path in entries:
            _check_entry(path, value, entries[path], where=str(folder))
        flat[keys] = variable.replace(value)
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def _unused_scales(model: Any, table: Table) -> set[str]:
    """Scales of quantizers that the table does not name, after a look at those it does name."""
    check_scales(model, table)
    scales = activation_scales(model)
    return scales.keys() - table.activation_scales


def read_table(folder: Path) -> Table:
    """The table beside packed weights."""
    path = folder / TABLE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; packed weights have their table beside them.")
    fields = read_json(path, "restore it from a copy")
    try:
        return Table.from_json(fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_layouts(file: SafetensorsFile) -> dict[str, dict[str, Any]]:
    """The metadata of the packed parameters by path."""
    if file.metadata.get("format") != FORMAT:
        raise ValueError(f"{file.path}: not written by gemmaqat (no format {FORMAT!r}).")
    try:
        return parse_json(file.metadata["packed"], str(file.path))
    except (KeyError, ValueError):
        raise ValueError(
            f"{file.path}: the header's metadata holds no 'packed' (a JSON object that says how "
            "each packed parameter is stored); restore the file from a copy."
        ) from None


def _check_names(
    file: SafetensorsFile, layouts: Mapping[str, Any], model: set[str], table: set[str]
) -> None:
    """The model's parameters, those of the table and those of the file must be the same."""
    names = {path: _names(path, path in layouts) for path in model}
    together = "config.json, the table and the weights do not belong together."
    for path in sorted(model):
        for name in names[path]:
            if name not in file.tensors:
                raise ValueError(f"{file.path}: {name!r} is missing; {together}")
    unknown = sorted(file.tensors.keys() - {n for parts in names.values() for n in parts})
    unknown += sorted(layouts.keys() - model)
    if unknown:
        raise ValueError(f"{file.path}: {unknown[0]!r} is no parameter of the model; {together}")
    if model != table:
        raise ValueError(
            f"{file.path.parent / TABLE}: {min(model ^ table)!r} is not in both the table and the "
            f"model; {together}"
        )


def _names(path: str, packed: bool) -> tuple[str, ...]:
    return (f"{path}/words", f"{path}/scales") if packed else (path,)


def _read_value(file: SafetensorsFile, path: str, layout: dict[str, Any] | None) -> Any:
    if layout is None:
        return jnp.array(file.array(path))
    words, scales = (jnp.array(file.array(name)) for name in _names(path, True))
    try:
        return from_arrays({"words": words, "scales": scales}, layout)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file.path}: {path}: the metadata does not describe these arrays ({error}); restore "
            "the file from a copy."
        ) from None


def _check_entry(path: str, value: Any, entry: Entry | None, *, where: str) -> None:
    """Compares how one parameter is stored with what the table says of it."""
    found, expected = _storage(value), "not in the table" if entry is None else _planned(entry)
    if found != expected:
        raise ValueError(
            f"{where}: {path}: {found} -> {expected} ({TABLE}); the weights were not converted by "
            "this table."
        )


def _storage(value: Any) -> str:
    """How a parameter is stored, in the words of `_planned`."""
    if not isinstance(value, PackedTensor):
        return f"kept in {jnp.dtype(value.dtype).name}"
    scales = value.scales if value.order == "contract" else value.scales.mT
    if value.transposed:
        scales = scales.mT
    return _in_words(
        value.layout.code_bits,
        value.layout.levels,
        tuple(scales.shape),
        jnp.dtype(scales.dtype).name,
        value.order,
        -1 if value.transposed else -2,
    )


def _planned(entry: Entry) -> str:
    """How the table wants a parameter stored."""
    if entry.grid is None:
        return f"kept in {entry.dtype}"
    return _in_words(
        entry.grid.bits,
        entry.grid.levels,
        entry.grid.scale_shape(entry.shape, entry.axis),
        entry.grid.scale_dtype,
        entry.order,
        entry.axis,
    )


def _in_words(bits: int, levels: str, scales: tuple[int, ...], dtype: str, order: str, axis: int):
    shape = "x".join(map(str, scales))
    return f"{bits} bits, levels {levels}, {shape} {dtype} scales, axis {axis}, order {order}"
