"""Hugging Face folders: safetensors tensors, one at a time, into a Gemma 4 model.

Parameters ask for their tensors, not the other way round: a parameter's path is its Hugging Face
name with slashes, so the file's key follows from it, and whatever no parameter asked for is either
known (towers, unused keys of shared layers, a tied head) and counted, or an error.
"""

import collections
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from gemmaqat.interop.safetensors_file import SafetensorsFolder, Tensor
from gemmaqat.json_file import read_json
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.sharding import default_sharding, parameter_sharding
from gemmaqat.models.sizes import SIZES, model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.planning.devices import format_bytes, free_bytes
from gemmaqat.planning.parameters import abstract_model, abstract_parameters, count_parameters

# Longest first: the text prefix of released files, of older re-saves, of text-only saves, none.
_TEXT_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
_TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder")
_TOWER_PREFIXES = tuple(f"{outer}{tower}." for outer in ("model.", "") for tower in _TOWERS)
_UNUSED_SHARED = ("k_proj", "v_proj", "k_norm")
FLOATS = ("F32", "BF16", "F16")
_STRIP = 64  # source rows transposed at a time: a strip stays in the cache


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of a folder's tensors: `loaded` + the counts in `skipped` = all of them."""

    folder: Path
    loaded: int  # tensors that became parameters
    skipped: dict[
        str, int
    ]  # reason -> tensors: "vision_tower", "unused keys of shared layers", ...
    parameters: int  # elements of the model
    bytes: int  # of the parameters in memory, all devices together

    def __str__(self) -> str:
        skipped = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
        return (
            f"{self.folder}: loaded {self.loaded} tensors, {self.parameters:,} parameters, "
            f"{format_bytes(self.bytes)}; skipped {skipped or 'none'}"
        )


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and the account of how it was read."""

    model: Gemma4
    report: LoadReport


def load_pretrained(folder: str | Path, **options: Any) -> Gemma4:
    """The Gemma 4 model of a Hugging Face folder; see `read_pretrained` for the options."""
    return read_pretrained(folder, **options).model


def read_pretrained(
    folder: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    remat: str = "none",
    mesh: jax.sharding.Mesh | None = None,
    check_memory: bool = True,
) -> Loaded:
    """Reads a Hugging Face folder tensor by tensor into a model.

    Each tensor goes from the memory-mapped file into an array of the target dtype and sharding
    before the next one is touched, so the peak is one model and one tensor.

    Args:
        folder: holds `config.json` and `model.safetensors`, or shards with their index.
        dtype: of the computation.
        param_dtype: of the parameters; None = `dtype`.
        remat: per block, as in `ModelConfig`.
        mesh: parameters are laid out on it as their declarations say; None = the default device.
        check_memory: refuse before allocating when the parameters cannot fit.

    Raises:
        FileNotFoundError: the folder, its configuration or a weight file is missing.
        ValueError: another model family, a damaged file, a missing or unknown tensor, a wrong
            shape or dtype.
        MemoryError: the parameters do not fit; the message says what would.
    """
    folder = Path(folder)
    opened = open_folder(folder)
    tensors, keys = opened.tensors, opened.keys
    config = dataclasses.replace(
        opened.config,
        dtype=jnp.dtype(dtype).name,
        param_dtype=jnp.dtype(param_dtype or dtype).name,
        remat=remat,
    )
    if check_memory:
        _check_memory(config, folder, mesh)

    graphdef, state = nnx.split(abstract_model(config))
    flat: dict[Any, Any] = {}
    for parts, variable in nnx.to_flat_state(state):
        path = "/".join(map(str, parts))
        sharding = parameter_sharding(variable, mesh) if mesh else default_sharding()
        flat[parts] = variable.replace(_read(tensors, keys[path], path, variable, sharding))
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    size = sum(value.size * value.dtype.itemsize for value in jax.tree.leaves(flat))
    skipped = dict(collections.Counter(opened.rest.values()))
    report = LoadReport(folder, len(keys), skipped, count_parameters(config), size)
    logging.info("%s", report)
    return Loaded(model, report)


@dataclasses.dataclass(frozen=True)
class OpenFolder:
    """A Hugging Face folder whose every tensor is accounted for; nothing of it has been read.

    Attributes:
        config: the text decoder.
        tensors: the mapped files.
        prefix: of the text decoder's names.
        keys: parameter path to the name of its tensor.
        rest: every other tensor, with the reason why no parameter asks for it.
    """

    config: ModelConfig
    tensors: SafetensorsFolder
    prefix: str
    keys: dict[str, str]
    rest: dict[str, str]


TIED_HEAD = "tied lm_head"  # the reason in `OpenFolder.rest` of a second copy of the table


def open_folder(folder: str | Path) -> OpenFolder:
    """Maps a folder and finds the tensor of every parameter.

    Raises:
        FileNotFoundError, ValueError: as `read_pretrained`.
    """
    folder = Path(folder)
    config, tensors = read_config(folder), SafetensorsFolder(folder)
    prefix = text_prefix(tensors, folder)
    wanted = abstract_parameters(config)
    keys = {path: prefix + tensor_name(path) for path in wanted}
    for path, leaf in wanted.items():
        check_tensor(tensors, keys[path], stored_shape(path, leaf.shape), folder)
    rest = _account_for_rest(tensors, set(keys.values()), prefix, config, folder)
    return OpenFolder(config, tensors, prefix, keys, rest)


def read_config(folder: str | Path) -> ModelConfig:
    """The model configuration of a Hugging Face folder, named after the folder.

    Where `generation_config.json` names ids that end a text, they are the stop ids.

    Raises:
        FileNotFoundError: there is no folder or no `config.json` in it.
        ValueError: the file is unreadable or of another model family.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; give the folder of a downloaded checkpoint "
            "(config.json and *.safetensors)."
        )
    path, generation = folder / "config.json", folder / "generation_config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: missing; a Hugging Face checkpoint has one beside its safetensors files."
        )
    config = ModelConfig.from_hf(read_json(path), name=folder.resolve().name, where=str(path))
    named = read_json(generation).get("eos_token_id") if generation.is_file() else None
    ids = tuple(i for i in (named if isinstance(named, list) else [named]) if i is not None)
    return dataclasses.replace(config, stop_ids=ids or config.stop_ids)


def tensor_name(path: str) -> str:
    """Hugging Face's key, without its prefix, of one of our parameters.

    `layers/3/mlp/up_proj/weight` -> `layers.3.mlp.up_proj.weight`; the stacked experts carry no
    `.weight` there.
    """
    name = path.replace("/", ".")
    return name.removesuffix(".weight") if ".experts." in name else name


def is_transposed(path: str, rank: int) -> bool:
    """Whether the stored tensor is ours with its last two axes swapped ([out, in] -> [in, out])."""
    return rank >= 2 and not path.startswith("embed_tokens")


def stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a parameter as deployed files have it, `[..., out, in]`."""
    if is_transposed(path, len(shape)):
        return (*shape[:-2], shape[-1], shape[-2])
    return tuple(shape)


def text_prefix(tensors: SafetensorsFolder, folder: Path) -> str:
    """The prefix of the text decoder's tensors.

    Raises:
        ValueError: there is no text decoder.
    """
    for prefix in _TEXT_PREFIXES:
        # Of a quantized table other tensors than `weight`.
        if any(name.startswith(f"{prefix}embed_tokens.") for name in tensors):
            return prefix
    names = ", ".join(list(tensors)[:3])
    raise ValueError(
        f"{folder}: no tensor 'model.language_model.embed_tokens.weight' (found {names}, ...); "
        "these are not the weights of a Gemma 4 text decoder."
    )


def check_tensor(
    tensors: SafetensorsFolder, key: str, shape: tuple[int, ...], folder: Path
) -> None:
    """Compares the float tensor of a parameter with what the configuration asks for.

    Raises:
        ValueError: it is missing, of another shape or no float.
    """
    if key not in tensors:
        raise ValueError(
            f"{folder}: tensor {key!r} of shape {list(shape)} is missing; config.json and weights "
            "do not belong together, or a shard was left out."
        )
    entry: Tensor = tensors.entry(key)
    if entry.shape != shape:
        raise ValueError(
            f"{tensors.path(key)}: tensor {key!r} has shape {list(entry.shape)}, config.json asks "
            f"for {list(shape)}; they do not belong together."
        )
    if entry.dtype not in FLOATS:
        raise ValueError(
            f"{tensors.path(key)}: tensor {key!r} has dtype {entry.dtype}, expected one of "
            f"{', '.join(FLOATS)}; load the unquantized checkpoint."
        )


def _account_for_rest(
    tensors: SafetensorsFolder, used: set[str], prefix: str, config: ModelConfig, folder: Path
) -> dict[str, str]:
    """The tensors that no parameter asked for, with the reason; an unknown one is an error."""
    rest: dict[str, str] = {}
    for key in tensors:
        if key in used:
            continue
        reason = why_unused(key, prefix, config)
        if reason is None and key.endswith("lm_head.weight"):
            _check_tied(tensors, key, f"{prefix}embed_tokens.weight")
            reason = TIED_HEAD
        if reason is None:
            raise unknown_tensor(tensors, key, folder)
        rest[key] = reason
    return rest


def why_unused(key: str, prefix: str, config: ModelConfig) -> str | None:
    """Why no parameter asks for a tensor, quantized or not; None where there is no such reason."""
    tower = next((p for p in _TOWER_PREFIXES if key.startswith(p)), None)
    if tower is not None:
        return tower.split(".")[-2]
    parts = key.removeprefix(prefix).split(".")
    shared = (
        len(parts) == 5
        and parts[0] == "layers"
        and parts[1].isdecimal()
        and int(parts[1]) in range(config.first_shared_layer, config.num_layers)
        and parts[2] == "self_attn"
        and parts[3] in _UNUSED_SHARED
    )
    return "unused keys and values of shared layers" if shared else None


def unknown_tensor(tensors: SafetensorsFolder, key: str, folder: Path) -> ValueError:
    """The error of a tensor that nothing accounts for."""
    return ValueError(
        f"{tensors.path(key)}: tensor {key!r} is no part of the Gemma 4 that "
        f"{folder / 'config.json'} describes; they do not belong together."
    )


def _check_tied(tensors: SafetensorsFolder, head: str, table: str) -> None:
    """A stored head must equal the embedding table, in the file's own bytes."""
    left, right = tensors.files[head].array(head), tensors.files[table].array(table)
    same = left.shape == right.shape and left.dtype == right.dtype
    if not same or any(
        not np.array_equal(left[i : i + 4096], right[i : i + 4096])
        for i in range(0, left.shape[0], 4096)
    ):
        raise ValueError(
            f"{tensors.path(head)}: {head!r} differs from {table!r}; Gemma 4 ties its head to the "
            "embedding table, a separate head is not supported."
        )
    tensors.files[head].forget(head)


def _read(tensors: SafetensorsFolder, key: str, path: str, leaf: Any, sharding: Any) -> jax.Array:
    """One tensor as a device array; every device's shard is cut from the map by itself."""
    file = tensors.files[key]
    stored = file.array(key)
    transpose = is_transposed(path, stored.ndim)
    view = np.swapaxes(stored, -1, -2) if transpose else stored

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        return _copy(view[index or ()], np.dtype(leaf.dtype), transposed=transpose)

    array = jax.make_array_from_callback(tuple(leaf.shape), sharding, shard)
    file.forget(key)
    return array


def _copy(view: np.ndarray, dtype: np.dtype, *, transposed: bool) -> np.ndarray:
    """A contiguous copy in `dtype`, aligned so that CPU devices adopt it without another copy."""
    size = math.prod(view.shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    out = buffer[start : start + size].view(dtype).reshape(view.shape)
    if not transposed:
        out[...] = view
        return out
    for i in range(0, view.shape[-1], _STRIP):
        out[..., i : i + _STRIP] = view[..., i : i + _STRIP]
    return out


def _check_memory(config: ModelConfig, folder: Path, mesh: jax.sharding.Mesh | None) -> None:
    """Refuses before allocating, and names a dtype or size that would fit."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    free = free_bytes(devices[0])
    if free is None:
        return
    # CPU devices share the host's memory, and what it holds for each of them adds up.
    free //= len(devices) if devices[0].platform == "cpu" else 1
    needed = device_bytes(config, mesh)
    if needed <= free:
        return
    raise MemoryError(
        f"{folder}: needs {format_bytes(needed)} per device for {count_parameters(config):,} "
        f"parameters in {config.param_dtype}, {format_bytes(free)} are free; "
        f"{_what_fits(config, free, mesh)}"
    )


def device_bytes(config: ModelConfig, mesh: jax.sharding.Mesh | None = None) -> int:
    """Bytes of the parameters in `param_dtype` on each device; what is not sharded is copied."""
    size = 0
    for _, variable in nnx.to_flat_state(nnx.state(abstract_model(config), nnx.Param)):
        sharding = parameter_sharding(variable, mesh) if mesh else default_sharding()
        size += math.prod(sharding.shard_shape(tuple(variable.shape))) * variable.dtype.itemsize
    return size


def _what_fits(config: ModelConfig, free: int, mesh: jax.sharding.Mesh | None = None) -> str:
    half = dataclasses.replace(config, param_dtype="bfloat16")
    if config.param_dtype == "float32" and device_bytes(half, mesh) <= free:
        return f"param_dtype=bfloat16 fits ({format_bytes(device_bytes(half, mesh))})."
    sizes = [
        (device_bytes(model_config(name, param_dtype="bfloat16"), mesh), name)
        for name in SIZES
        if not name.endswith("_mini")
    ]
    fitting = [f"{name} ({format_bytes(size)})" for size, name in sorted(sizes) if size <= free]
    if fitting:
        return f"in bfloat16 these sizes fit: {', '.join(fitting)}."
    return "no Gemma 4 size fits in bfloat16; use a larger machine or a mesh of several devices."
