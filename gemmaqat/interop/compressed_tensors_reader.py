"""Reader of compressed-tensors folders of Gemma 4: pack-quantized and int-quantized integers.

Bits and groups follow from the tensors' shapes and must be ones that `quantization_config` names;
which module a group is meant for is asked for dynamic inputs alone, for the tensors say the rest.
Symmetric integers alone: zero points, reordered groups and float types are refused.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemmaqat.interop import activation_scales, hf
from gemmaqat.interop.bit_packing import unpack_rows
from gemmaqat.interop.compressed_tensors import (
    PACKED,
    PLAIN,
    QUANT_METHOD,
    num_words,
)
from gemmaqat.interop.grid_metadata import contradiction, known_grids, parse_grid
from gemmaqat.interop.quantized_folder import QuantizedFolder
from gemmaqat.interop.safetensors_file import DTYPES, SafetensorsFile
from gemmaqat.interop.shipment import TOKEN_TABLE, VOCABULARY_TABLES, Piece, Shipment
from gemmaqat.interop.source import by_matrix

_FORMATS = (PACKED, PLAIN, "naive-quantized", "dense", "mixed-precision")
_CLAMPS = ("input_scale", "output_scale")


class _Group(NamedTuple):
    """What a group of the configuration says of weights."""

    name: str
    bits: int
    size: int  # weights under one scale; 0 = a whole row


class _Weight(NamedTuple):
    """One stored matrix."""

    group: _Group
    scale_dtype: str
    read: Callable[[int, int], Piece]


class _DynamicInputs:
    """Which linears round each token of their input, by the targets of the configuration.

    As in the library, names go before patterns and those before classes.
    """

    def __init__(self, section: Mapping[str, Any], where: str):
        self._ignored = _targets(section.get("ignore"), f"{where}: ignore")
        self._dynamic: dict[str, bool] = {}
        for name, group in section["config_groups"].items():
            told = _check_activation(
                group.get("input_activations"), f"{where}: config_groups.{name}.input_activations"
            )
            targets = _targets(group.get("targets"), f"{where}: config_groups.{name}.targets")
            self._dynamic |= dict.fromkeys(targets, told)

    def __call__(self, module: str) -> bool:
        if not any(self._dynamic.values()) or self._find(module, self._ignored) is not None:
            return False
        target = self._find(module, self._dynamic)
        return target is not None and self._dynamic[target]

    def _find(self, module: str, targets: Mapping[str, Any]) -> str | None:
        """The target that names a linear best."""
        if module in targets:
            return module
        patterns = (target for target in targets if target.startswith("re:"))
        matching = (t for t in patterns if re.match(t.removeprefix("re:"), module))
        return next(matching, "Linear" if "Linear" in targets else None)


def read_compressed_tensors(path: Path) -> Shipment:
    """A folder that this library, llm-compressor or Google wrote; tensors stay mapped.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a damaged file, tensors and configuration that contradict each other, or a
            scheme that is none of symmetric integers.
    """
    folder = QuantizedFolder(Path(path), QUANT_METHOD)
    groups = _groups(folder)
    known = known_grids(folder.metadata, str(folder.folder))
    is_dynamic = _DynamicInputs(folder.section, folder.where)
    dynamic: dict[str, dict[str, bool]] = defaultdict(dict)  # by hook point and module
    for parameter, shape in folder.parameters.items():
        module = folder.module(parameter)
        if ".experts." in module:
            modules = _expert_modules(folder, module, shape)
        else:
            modules = [module] if _is_quantized(folder, module) else []
        if modules:
            rows = int(np.prod(shape[:-1], dtype=np.int64)) // len(modules)
            _quantize(folder, parameter, modules, rows, groups, known)
        else:
            folder.keep(parameter)
        if len(shape) == 2 and parameter not in VOCABULARY_TABLES:
            _take_clamps(folder, parameter, module)
            modules = [module]
        if parameter not in VOCABULARY_TABLES:
            hook = activation_scales.edges(parameter.removesuffix("/weight")).input
            dynamic[hook] |= {name: is_dynamic(name) for name in modules}
    for hook, told in dynamic.items():
        _take_dynamic(folder, hook, told)
    _take_head(folder)
    rules = tuple(
        f"{g.name}: int{g.bits}, {f'blocks of {g.size}' if g.size else 'channel'}" for g in groups
    )
    return folder.shipment(rules)


def _quantize(
    folder: QuantizedFolder,
    parameter: str,
    modules: Sequence[str],
    rows: int,
    groups: list[_Group],
    known: dict[str, Any],
) -> None:
    """Takes a parameter that is stored as one module, or as several with `rows` outputs each."""
    length = folder.parameters[parameter][-1]
    weights = [_weight(folder, module, rows, length, groups) for module in modules]
    first = weights[0]
    if any(w.group != first.group or w.scale_dtype != first.scale_dtype for w in weights):
        raise ValueError(f"{folder.folder}: {parameter}: its experts are of different grids.")
    where = f"{folder.folder}: {parameter}"
    grid = parse_grid(known.get(parameter) or _default_grid(first), where)
    expected = (first.group.bits, first.group.size, first.scale_dtype)
    if (grid.bits, max(grid.block, 0), grid.scale_dtype) != expected:
        found = f"{expected[0]} bits, blocks of {expected[1] or 'a row'} and {expected[2]} scales"
        raise contradiction(where, grid, found)

    def read(start: int, stop: int) -> Piece:
        parts: dict[tuple[int, int, int], Piece] = {}

        def cut(field: int) -> Callable[[int, int, int], np.ndarray]:
            def of_one(number: int, begin: int, end: int) -> np.ndarray:
                key = (number, begin, end)
                if key not in parts:
                    parts[key] = weights[number].read(begin, end)
                return parts[key][field]

            return of_one

        return Piece(*(by_matrix(start, stop, rows, cut(field)) for field in (0, 1)))

    folder.quantize(parameter, grid, read, rule=groups.index(first.group), name=first.group.name)


def _weight(
    folder: QuantizedFolder, module: str, rows: int, length: int, groups: list[_Group]
) -> _Weight:
    """The tensors of one module."""
    scale = f"{module}.weight_scale"
    if scale not in folder:
        raise ValueError(f"{folder.folder}: tensor {scale!r} of a quantized weight is missing.")
    packed = f"{module}.weight_packed" in folder
    name = f"{module}.weight_packed" if packed else f"{module}.weight"
    width, blocks = folder.columns(name), folder.columns(scale)
    fitting = [
        group
        for group in groups
        if width == (num_words(length, group.bits) if packed else length)
        and (packed or group.bits == 8)
        and blocks * (group.size or length) == length
    ]
    if not fitting:
        told = ", ".join(f"{g.bits} bits in groups of {g.size or 'a row'}" for g in groups)
        raise ValueError(
            f"{folder.folder}: {name!r} has {width} columns and {blocks} scales for rows of "
            f"{length}, which fits no group of {folder.where} ({told}); they do not belong "
            "together."
        )
    group = fitting[0]
    file, stored = folder.take(name, shape=(rows, width), dtypes=("I32" if packed else "I8",))
    _, scales = folder.take(scale, shape=(rows, blocks), dtypes=hf.FLOATS)
    if packed:
        _check_shape(folder, f"{module}.weight_shape", (rows, length))
    read = _reader(file, name, stored, scales, group.bits, length, packed)
    return _Weight(group, DTYPES[folder.dtype(scale)].name, read)


def _reader(
    file: SafetensorsFile,
    name: str,
    stored: np.ndarray,
    scales: np.ndarray,
    bits: int,
    length: int,
    packed: bool,
) -> Callable[[int, int], Piece]:
    def read(start: int, stop: int) -> Piece:
        rows = np.array(stored[start:stop])
        codes = unpack_rows(rows.view(np.uint8), bits, length) if packed else rows
        piece = Piece(codes, np.array(scales[start:stop]))
        if stop == len(stored):
            file.forget(name)
        return piece

    return read


def _check_shape(folder: QuantizedFolder, name: str, expected: tuple[int, int]) -> None:
    _, shape = folder.take(name, shape=(2,), dtypes=("I64", "I32"))
    if tuple(shape.tolist()) != expected:
        raise ValueError(
            f"{folder.folder}: {name!r} says {shape.tolist()}, config.json asks for "
            f"{list(expected)}; they do not belong together."
        )


def _is_quantized(folder: QuantizedFolder, module: str) -> bool:
    if f"{module}.weight_packed" in folder:
        return True
    return f"{module}.weight" in folder and folder.dtype(f"{module}.weight") == "I8"


def _expert_modules(folder: QuantizedFolder, module: str, shape: tuple[int, ...]) -> list[str]:
    """The separate linears of a stack of experts; none where the stack is stored as floats."""
    if module in folder:
        return []
    stack, leaf = module.rsplit(".", 1)
    leaves = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    first = (f"{stack}.0.{leaves[0]}.{name}" for name in ("weight_packed", "weight"))
    if shape[0] * len(leaves) > len(folder) or not any(name in folder for name in first):
        return []  # and the stack is missing
    return [f"{stack}.{expert}.{name}" for expert in range(shape[0]) for name in leaves]


def _take_clamps(folder: QuantizedFolder, parameter: str, module: str) -> None:
    hooks = activation_scales.edges(parameter.removesuffix("/weight"))
    for leaf, hook in zip(_CLAMPS, hooks, strict=True):
        name = f"{module}.{leaf}"
        if name in folder:
            folder.scales.add(hook, folder.number(name), name=name)


def _take_dynamic(folder: QuantizedFolder, hook: str, told: dict[str, bool]) -> None:
    """Takes a dynamic quantizer, about which the modules that share it must agree."""
    if len(set(told.values())) > 1:
        one, other = (next(name for name in told if told[name] is flag) for flag in (True, False))
        raise ValueError(
            f"{folder.where}: the input of {one!r} is dynamic, that of {other!r} is not; they are "
            "one activation, which cannot be both."
        )
    if any(told.values()):
        folder.scales.add_dynamic(hook, name=next(iter(told)))


def _take_head(folder: QuantizedFolder) -> None:
    """A separate head must be a copy of the table."""
    table = folder.module(TOKEN_TABLE)
    for leaf in ("weight_packed", "weight_scale", "weight_shape"):
        if f"lm_head.{leaf}" in folder:
            folder.same(f"lm_head.{leaf}", f"{table}.{leaf}")
    if "lm_head.weight" in folder:
        folder.same("lm_head.weight", f"{table}.weight")
        if not _is_quantized(folder, "lm_head"):
            folder.carry("lm_head.weight")


def _default_grid(weight: _Weight) -> dict[str, Any]:
    """Of a file without our metadata: the rule by which the format's own quantizer rounds."""
    return {
        "bits": weight.group.bits,
        "block": weight.group.size,
        "scale_rule": "absmax_half",
        "scale_dtype": weight.scale_dtype,
    }


def _groups(folder: QuantizedFolder) -> list[_Group]:
    """The groups of the configuration that quantize weights."""
    section = folder.section
    found = section.get("config_groups")
    if not isinstance(found, dict):
        raise ValueError(f"{folder.where}: quantization_config has no config_groups.")
    groups = []
    for name, group in found.items():
        where = f"{folder.where}: config_groups.{name}"
        if not isinstance(group, dict):
            raise ValueError(f"{where} is no object; preset names are not supported.")
        stored = group.get("format") or section.get("format")
        if stored not in _FORMATS:
            raise ValueError(f"{where}: format {stored!r} is not one of {', '.join(_FORMATS)}.")
        if _check_activation(group.get("output_activations"), f"{where}.output_activations"):
            raise ValueError(
                f"{where}.output_activations: dynamic; only inputs can be, this scheme cannot be "
                "evaluated here."
            )
        if group.get("weights") is not None:
            groups.append(_group(name, group["weights"], where))
    return groups


def _group(name: str, weights: Any, where: str) -> _Group:
    if not isinstance(weights, dict):
        raise ValueError(f"{where}.weights is no object.")
    bits, size = weights.get("num_bits"), weights.get("group_size")
    block = size if isinstance(size, int) and size > 0 else 0
    strategy = weights.get("strategy") or ("group" if block else "channel")
    for field, value, expected in (
        ("num_bits", bits, range(2, 9)),
        ("type", weights.get("type", "int"), ("int",)),
        ("symmetric", weights.get("symmetric", True), (True,)),
        ("strategy", strategy, ("group", "channel")),
        ("actorder", weights.get("actorder"), (None, "weight", "static", False)),
    ):
        if value not in expected:
            raise ValueError(
                f"{where}.weights: {field} is {value!r}, expected one of "
                f"{', '.join(map(str, expected))}; this scheme cannot be read."
            )
    if strategy == "group" and not block:
        raise ValueError(f"{where}.weights: group_size is {size!r}, expected a positive number.")
    return _Group(name, int(weights["num_bits"]), block if strategy == "group" else 0)


def _check_activation(found: Any, where: str) -> bool:
    """Whether a quantizer is dynamic per token; it can also be static per tensor, or none."""
    if found is None:
        return False
    given = found if isinstance(found, dict) else {"type": None}
    dynamic = bool(given.get("dynamic"))
    expected = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": dynamic}
    # Without a word, the library takes the whole tensor.
    right = given.get("strategy", "tensor") == ("token" if dynamic else "tensor")
    if not right or any(given.get(field, value) != value for field, value in expected.items()):
        raise ValueError(
            f"{where}: {found!r} is no symmetric int8 that is static per tensor or dynamic per "
            "token; this scheme cannot be evaluated here."
        )
    return dynamic


def _targets(found: Any, where: str) -> dict[str, None]:
    """A list of names and patterns, in order."""
    try:
        for name in found or ():
            re.compile(name.removeprefix("re:"))
        return dict.fromkeys(found or ())
    except (AttributeError, TypeError, re.error):
        raise ValueError(f"{where} is no list of names and patterns; correct it.") from None
