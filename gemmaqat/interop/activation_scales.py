"""Static activation scales as files store them: two per linear, two per attention.

Our hook points share one input among q, k and v and one among gate and up; files repeat it beside
each of them. Layers that share keys and values repeat the scales of the layer that owns them.
"""

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from gemmaqat.interop.options import Written
from gemmaqat.interop.shipment import Shipment, ShippedTensor
from gemmaqat.json_file import parse_json
from gemmaqat.models.config import ModelConfig
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization import trees
from gemmaqat.quantization.table import SCALE, ActivationEntry

# Scales that a format has no tensor for, by hook path: in the metadata of its files.
METADATA_KEY = "gemmaqat.activation_scales"

_SHARED_INPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


class Edges(NamedTuple):
    """Hook points at the two sides of a linear."""

    input: str
    output: str


def edges(module: str) -> Edges:
    """The hook points of a linear, by its path."""
    parent, _, leaf = module.rpartition("/")
    return Edges(f"{parent if leaf in _SHARED_INPUT else module}/input", f"{module}/output")


def key_value_owner(config: ModelConfig, layer: int) -> int:
    """The layer whose keys and values a layer attends to."""
    if config.owns_kv(layer):
        return layer
    kind = config.layer_types[layer]
    owned = config.layer_types[: config.first_shared_layer]
    return max(i for i, other in enumerate(owned) if other == kind)


def scales_of(shipment: Shipment) -> dict[str, float]:
    """Hook path to scale; 0 = off."""
    return {
        entry.path: float(np.asarray(shipment.tensors[f"{entry.path}/{SCALE}"].read(0, 1)).item())
        for entry in shipment.table.activations
    }


def metadata_of(scales: Mapping[str, float]) -> dict[str, str]:
    """The metadata that keeps scales a format has no place for; `from_metadata` reads it."""
    return {METADATA_KEY: json.dumps(dict(scales))} if scales else {}


def from_metadata(metadata: Mapping[str, str], where: str) -> dict[str, float]:
    """The scales in a file's metadata.

    Raises:
        ValueError: they are no JSON object of numbers.
    """
    try:
        found = parse_json(metadata.get(METADATA_KEY, "{}"), where)
        return {str(hook): float(scale) for hook, scale in found.items()}
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"{where}: the header's {METADATA_KEY!r} is no JSON object of numbers; restore the "
            "file from a copy."
        ) from None


def written(hook: str, scale: float, in_metadata: bool) -> Written:
    """What a certificate tells of a scale."""
    note = "no reader but this library applies it" if in_metadata and scale else ""
    return Written(f"{hook}/{SCALE}", "kept", "metadata" if in_metadata else "F32", note)


class ActivationScales:
    """Scales found in a file, gathered by hook point."""

    def __init__(self, config: ModelConfig, where: str):
        self._hooks = list(trees.hook_points(abstract_model(config)))
        self._known = set(self._hooks)
        self._where = where
        self._found: dict[str, float] = {}

    def add(self, hook: str, scale: float, *, name: str) -> None:
        """Takes one scale.

        Args:
            hook: path of its hook point.
            scale: its value.
            name: what the file calls it.

        Raises:
            ValueError: there is no such hook point, another tensor gives it another scale, or it
                is no scale.
        """
        if hook not in self._known:
            raise ValueError(f"{self._where}: {name!r} belongs to no activation of the model.")
        if not 0 <= scale < np.inf:
            raise ValueError(
                f"{self._where}: {name!r} is {scale}, expected 0 (off) or a positive number."
            )
        if self._found.setdefault(hook, scale) != scale:
            raise ValueError(
                f"{self._where}: {name!r} is {scale:g}, but the modules that share its input have "
                f"{self._found[hook]:g}; they must agree."
            )

    def add_all(self, scales: Mapping[str, float]) -> None:
        """Takes the scales of `from_metadata`."""
        for hook, scale in scales.items():
            self.add(hook, scale, name=hook)

    def entries(self, rule: int, rule_name: str) -> tuple[ActivationEntry, ...]:
        """Entries of a table, in the order of the model."""
        return tuple(
            ActivationEntry(path=hook, rule=rule, rule_name=rule_name)
            for hook in self._hooks
            if hook in self._found
        )

    def tensors(self, entries: Iterable[ActivationEntry]) -> dict[str, ShippedTensor]:
        """The scales as the kept scalars they are in a prepared model, by parameter path."""
        return {
            f"{entry.path}/{SCALE}": _scalar(f"{entry.path}/{SCALE}", self._found[entry.path])
            for entry in entries
        }


def _scalar(path: str, value: float) -> ShippedTensor:
    array = np.full((1, 1), value, np.float32)
    return ShippedTensor(
        path=path,
        shape=(),
        grid=None,
        dtype=array.dtype,
        read=lambda start, stop: array[start:stop],
    )
