"""Checkpoints of google-deepmind/gemma: Orbax folders in that library's tree, out and in.

Its trees come plain (`layer_3/...`) or with periods of layers stacked
(`stacked_layers/attention_type_2/...`), under several prefixes; all are read. They hold floats: a
quantized tensor goes out as the values of its grid. Orbax saves a tree as a whole, so a model has
to fit in memory on its way out; on the way in each array is read when it is asked for.
"""

import functools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from gemmaqat.interop import hf
from gemmaqat.interop.base import companions
from gemmaqat.interop.hf_folder import layout_of
from gemmaqat.interop.options import ExportOptions, Kind, Written
from gemmaqat.interop.orbax_save import save_tree
from gemmaqat.interop.orbax_tree import Leaf, canonical, leaves, period, stacked_name
from gemmaqat.interop.rounding import Rounded, to_dtype
from gemmaqat.interop.safetensors_writer import dtype_name
from gemmaqat.interop.shipment import TOKEN_TABLE, CarriedTensor, Shipment, ShippedTensor
from gemmaqat.interop.source import pieces
from gemmaqat.json_file import read_json
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.sizes import SIZES, model_config
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.rules import resolve

_ENCODERS = re.compile(r"(vision_encoder|audio_encoder|embedder/(mm|audio)_\w+)(/|$)")
_ANCHOR = "embedder/input_embedding"
_NO_12B = "google-deepmind/gemma has no 12B: its users need a TransformerConfig of their own"


def write_orbax(
    shipment: Shipment,
    folder: Path,
    options: ExportOptions,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Written]:
    """Writes an Orbax folder that `gemma.gm.ckpts.load_params` takes, and companions beside it.

    Args:
        shipment: what to write; with `options.stacked_layers` periods of layers become one array.
        folder: empty.
        options: `float_dtype`, `stacked_layers`, `text_only`, `allow_requantize`.
        progress: told the number of weights just taken.

    Raises:
        ValueError: the shipment holds what the tree has no place for (activation scales, encoders),
            the float dtype cannot hold a grid's values, or layers of a period differ in shape.
    """
    _check(shipment, options)
    written: list[Written] = []
    arrays = {
        leaf.name: _leaf_array(shipment, leaf, options, written, progress)
        for leaf in leaves(shipment.config)
    }
    if shipment.config.embed_dim == model_config("12b").embed_dim:
        logging.warning("%s", _NO_12B)
        written[0] = written[0]._replace(note=_NO_12B)
    if options.stacked_layers:
        tree = _stacked_tree(arrays, shipment.config)
    else:
        tree = _plain_tree(arrays, moe=shipment.config.num_experts > 0)
    save_tree(tree, folder)
    config = layout_of(shipment, text_only=True).config
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, path in shipment.files.items():
        shutil.copyfile(path, folder / name)
    return written


def read_orbax(path: str | Path, *, config: ModelConfig | None = None) -> Shipment:
    """Reads an Orbax folder; an array is restored as a whole when its first rows are asked for.

    Args:
        path: the folder, or one above it (`params`, `default`).
        config: of the model; None = `config.json` in the folder, or else the size whose shapes
            these are.

    Raises:
        FileNotFoundError: there is no Orbax checkpoint.
        ValueError: it is damaged, no Gemma 4, of an unknown size, or not of this `config`.
    """
    path = Path(path)
    checkpoint = _find_checkpoint(path)
    stored = _text_leaves(checkpoint)
    released = path / "config.json"
    if config is None and released.is_file():
        config = hf.read_config(path)
    if config is None:
        config = _infer(stored, path)
    problem = _mismatch(config, stored)
    if problem:
        raise ValueError(f"{path}: {problem}; config and weights do not belong together.")
    table = resolve("none", abstract_model(config))
    entries, tensors = table.by_path, dict[str, ShippedTensor]()
    carried: dict[str, CarriedTensor] = {}
    restore = _Restorer(checkpoint)
    for leaf in leaves(config):
        found = _find(leaf, stored, config)
        for index, name in enumerate(leaf.paths if found else ()):
            assert found is not None
            if leaf.read:
                shape = hf.stored_shape(name, entries[name].shape)
                part = functools.partial(_part, restore, found, leaf, index, shape[-1])
                tensors[name] = _shipped(name, shape, found, part)
                continue
            array = _part(restore, found, leaf, index, leaf.split[-1])
            if not _is_filler(array):
                carried |= _carry(name, array)
    return Shipment(
        config=config,
        table=table,
        tensors={entry.path: tensors[entry.path] for entry in table.entries},
        carried=carried,
        files=companions(path),
        released_config=read_json(released) if released.is_file() else None,
    )


def _check(shipment: Shipment, options: ExportOptions) -> None:
    if shipment.table.activations:
        raise ValueError(
            f"{shipment.table.activations[0].path}: the google-deepmind tree has no place for "
            "quantized activations; use compressed-tensors, or a recipe without them."
        )
    shared = tuple(
        hf.tensor_name(name)
        for leaf in leaves(shipment.config)
        if not leaf.read
        for name in leaf.paths
    )
    rest = [n for n in shipment.carried if not n.endswith((*shared, "lm_head.weight"))]
    if rest and not options.text_only:
        raise ValueError(
            f"{rest[0]} and {len(rest) - 1} more: tensors of encoders, which are not converted to "
            "the google-deepmind tree; export with text_only."
        )


def _leaf_array(
    shipment: Shipment,
    leaf: Leaf,
    options: ExportOptions,
    written: list[Written],
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    """One array of their tree, from our tensors; what nobody reads is carried or filled."""
    parts = []
    for path in leaf.paths:
        if leaf.read:
            tensor = shipment.tensors[path]
            array, kind, note = _floats(tensor, options, progress)
            where = dtype_name(array.dtype) + ("" if tensor.grid is None else " on the grid")
            written.append(Written(path, kind, where, note))
        else:
            array = _unused(shipment, leaf, path, options, written)
        parts.append(leaf.to_part(array))
    return np.stack(parts) if len(parts) > 1 else np.ascontiguousarray(parts[0])


def _floats(
    tensor: ShippedTensor, options: ExportOptions, progress: Callable[[int], None] | None
) -> Rounded:
    """All values of a tensor, `[R, K]`."""
    dtype = np.dtype(jnp.dtype(options.float_dtype) if options.float_dtype else tensor.dtype)
    out = np.empty((tensor.num_rows, tensor.row_length), dtype)
    kind: Kind = "kept"
    note = ""
    for start, stop, piece in pieces(tensor):
        stored = to_dtype(tensor, piece, dtype, options)
        out[start:stop] = stored.values
        if not note:  # the first rounding stays
            kind, note = stored.kind, stored.note
        if progress:
            progress((stop - start) * tensor.row_length)
    return Rounded(out, kind, note)


def _unused(
    shipment: Shipment, leaf: Leaf, path: str, options: ExportOptions, written: list[Written]
) -> np.ndarray:
    """Keys of a layer that shares: carried from the source, or filler (0, and 1 for the norm)."""
    like = shipment.tensors[TOKEN_TABLE].dtype
    dtype = np.dtype(jnp.dtype(options.float_dtype) if options.float_dtype else like)
    for name, tensor in shipment.carried.items():
        if name.endswith(hf.tensor_name(path)):
            stored = np.frombuffer(tensor.read(0, tensor.num_bytes), _dtype(tensor.dtype))
            written.append(Written(name, "carried", dtype_name(dtype)))
            return stored.astype(dtype)
    fill = np.ones if len(leaf.split) == 1 else np.zeros
    return fill(leaf.split, dtype)


def _plain_tree(arrays: Mapping[str, np.ndarray], *, moe: bool) -> dict[str, Any]:
    """The tree of the library's own module."""
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        if moe and re.search(r"/mlp/(gating_einsum|linear)$", name):
            name += "/w"
        *parents, last = name.split("/")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = array
    return tree


def _stacked_tree(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, Any]:
    """The layout of its released files: one level of whole paths, periods along a first axis."""
    length = period(config)
    if config.num_layers % length:
        raise ValueError(
            f"stacked_layers: {config.num_layers} layers are no multiple of the period of {length}."
        )
    stacks: dict[str, list[np.ndarray]] = {}
    single = set()
    for name, array in arrays.items():
        stacked, place = stacked_name(name, length)
        stacks.setdefault(stacked, []).append(array)
        if place < 0:
            single.add(stacked)
    tree: dict[str, Any] = {}
    for name, stack in stacks.items():
        if len({array.shape for array in stack}) > 1:
            raise ValueError(
                f"stacked_layers: {name} has the shapes {stack[0].shape} and {stack[-1].shape} in "
                "layers of one kind, which cannot be stacked; export plain layers."
            )
        if re.search(r"/mlp2?/(gating_einsum|linear)$", name):
            name += "/w"
        parent, _, last = name.rpartition("/")
        value = stack[0] if name in single else np.stack(stack)
        tree.setdefault(f"transformer/{parent}", {})[last] = value
    return tree


class _Stored(NamedTuple):
    """An array in a checkpoint: its keys in the tree, and what it is."""

    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype


class _Found(NamedTuple):
    """Where a leaf is: in an array of its own, or at a place of a stacked one."""

    stored: _Stored
    place: int  # -1 = not stacked


class _Restorer:
    """Reads single arrays of a checkpoint; the last one is kept, for its next rows."""

    def __init__(self, checkpoint: Path):
        self._checkpoint = checkpoint
        self._keys: tuple[str, ...] = ()
        self._array = np.empty(0)

    def __call__(self, stored: _Stored) -> np.ndarray:
        if self._keys != stored.keys:
            self._array = np.empty(0)  # let the one before go first
            self._array, self._keys = self._restore(stored), stored.keys
        return self._array

    def _restore(self, stored: _Stored) -> np.ndarray:
        item: Any = np.zeros(0)
        arguments: Any = ocp.RestoreArgs(restore_type=np.ndarray)
        for key in reversed(stored.keys):
            item, arguments = {key: item}, {key: arguments}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            try:
                found = checkpointer.restore(
                    self._checkpoint,
                    args=ocp.args.PyTreeRestore(
                        item=item, restore_args=arguments, partial_restore=True
                    ),
                )
            except Exception as error:  # tensorstore raises whatever its storage met
                raise ValueError(
                    f"{self._checkpoint}: {'/'.join(stored.keys)} cannot be read "
                    f"({_first_line(error)}); fetch the checkpoint again."
                ) from error
        for key in stored.keys:
            found = found[key]
        return np.asarray(found)


def _find_checkpoint(path: Path) -> Path:
    """The Orbax folder at or below a path."""
    for folder in (path, path / "params", path / "default"):
        if (folder / "_METADATA").is_file():
            return folder.resolve()
    raise FileNotFoundError(
        f"{path}: no Orbax checkpoint (no _METADATA file); give the folder that holds one."
    )


def _text_leaves(checkpoint: Path) -> dict[str, _Stored]:
    """Arrays of the text decoder by canonical name, prefixes taken off."""
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.metadata(checkpoint).item_metadata.tree
        found = {"/".join(keys): _Stored(keys, *array) for keys, array in _arrays(tree)}
    except Exception as error:  # of the JSON and of tensorstore, of whatever kind
        raise ValueError(
            f"{checkpoint}: no intact Orbax checkpoint ({_first_line(error)}); fetch it again."
        ) from error
    prefixes = [name.removesuffix(_ANCHOR) for name in found if name.endswith(_ANCHOR)]
    if not prefixes:
        raise ValueError(
            f"{checkpoint}: no {_ANCHOR!r} in the tree (found {', '.join(list(found)[:3])}, ...); "
            "this is no checkpoint of google-deepmind/gemma."
        )
    # A trainer's state also holds moments of every array; the parameters are under `params`.
    prefix = min(prefixes, key=lambda p: (not p.startswith("params"), len(p)))
    text, others = {}, 0
    for name, stored in found.items():
        short = name.removeprefix(prefix)
        if not name.startswith(prefix) or _ENCODERS.match(short):
            others += 1
        else:
            text[canonical(short)] = stored
    if others:
        logging.info("%s: %d arrays are no part of the text decoder", checkpoint, others)
    return text


def _arrays(
    tree: Mapping[str, Any], keys: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], tuple[tuple[int, ...], np.dtype]]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _arrays(value, (*keys, key))
        elif getattr(value, "shape", None) is not None:
            yield (*keys, key), (tuple(value.shape), np.dtype(value.dtype))


def _infer(stored: Mapping[str, _Stored], path: Path) -> ModelConfig:
    """The size whose tree this is."""
    for size in SIZES:
        if not _mismatch(model_config(size), stored):
            return model_config(size)
    vocabulary = stored[_ANCHOR].shape
    raise ValueError(
        f"{path}: a tree of no size known here (embedding {list(vocabulary)}); put the model's "
        "config.json into the folder, or give its config."
    )


def _mismatch(config: ModelConfig, stored: Mapping[str, _Stored]) -> str:
    """What is wrong with these arrays for this model; "" if nothing."""
    used = set()
    for leaf in leaves(config):
        found = _find(leaf, stored, config)
        if found is None:
            if leaf.read:
                return f"array {leaf.name!r} of shape {list(leaf.shape)} is missing"
            continue
        shape = found.stored.shape[1:] if found.place >= 0 else found.stored.shape
        outside = found.place >= 0 and found.place >= found.stored.shape[0]
        if shape != leaf.shape or outside:
            name = "/".join(found.stored.keys)
            return f"array {name!r} has shape {list(found.stored.shape)}, not {list(leaf.shape)}"
        used.add(found.stored.keys)
    for item in stored.values():
        if item.keys not in used:
            return f"array {'/'.join(item.keys)!r} is no part of the Gemma 4 of the config"
    return ""


def _find(leaf: Leaf, stored: Mapping[str, _Stored], config: ModelConfig) -> _Found | None:
    if leaf.name in stored:
        return _Found(stored[leaf.name], -1)
    name, place = stacked_name(leaf.name, period(config))
    return _Found(stored[name], place) if place >= 0 and name in stored else None


def _part(restore: _Restorer, found: _Found, leaf: Leaf, index: int, row_length: int) -> np.ndarray:
    """One of our tensors, `[R, K]`."""
    array = restore(found.stored)
    if found.place >= 0:
        array = array[found.place]
    part = leaf.from_part(array[index] if len(leaf.paths) > 1 else array)
    return part.reshape(-1, row_length)


def _shipped(
    path: str, shape: tuple[int, ...], found: _Found, part: Callable[[], np.ndarray]
) -> ShippedTensor:
    return ShippedTensor(
        path=path,
        shape=shape,
        grid=None,
        dtype=found.stored.dtype,
        read=lambda start, stop: np.ascontiguousarray(part()[start:stop]),
    )


def _is_filler(array: np.ndarray) -> bool:
    """Whether a tensor that nobody reads holds nothing: what `write_orbax` fills in."""
    return not array.any() or (len(array) == 1 and bool((array == 1).all()))


def _carry(path: str, array: np.ndarray) -> dict[str, CarriedTensor]:
    name = f"model.{hf.tensor_name(path)}"
    data = memoryview(array.tobytes())
    shape = array.shape[1:] if len(array) == 1 else array.shape
    tensor = CarriedTensor(
        name=name,
        dtype=dtype_name(array.dtype),
        shape=shape,
        read=lambda start, stop: data[start:stop],
        num_bytes=len(data),
    )
    return {name: tensor}


def _dtype(name: str) -> np.dtype:
    """The NumPy dtype of a safetensors name."""
    known = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
    return np.dtype(jnp.dtype(known[name]))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
