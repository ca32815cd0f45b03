"""Activation scales as files store them: two static ones per linear, two per attention.

Of a dynamic quantizer there is nothing to store but that it is there.

Our hook points share one input among q, k and v and one among gate and up; files repeat it beside
each of them. Layers that share keys and values repeat the scales of the layer that owns them.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from gemmaqat.interop.options import Written
from gemmaqat.interop.shipment import Shipment, ShippedTensor
from gemmaqat.json_file import parse_json
from gemmaqat.models.config import ModelConfig
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization import trees
from gemmaqat.quantization.table import ON, SCALE, ActivationEntry

# Scales that a format has no tensor for, by hook path: in the metadata of its files.
METADATA_KEY = "gemmaqat.activation_scales"
_DYNAMIC = "dynamic"  # what stands there for a scale

_SHARED_INPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "gate_up_proj")


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
    """Hook path to scale; 0 = off, and a dynamic quantizer has `ON`."""
    return {
        entry.path: float(np.asarray(shipment.tensors[f"{entry.path}/{SCALE}"].read(0, 1)).item())
        for entry in shipment.table.activations
    }


def metadata_of(scales: Mapping[str, float], dynamic: Collection[str]) -> dict[str, str]:
    """The metadata that keeps scales a format has no place for; `from_metadata` reads it.

    Args:
        scales: by hook path.
        dynamic: hook paths of dynamic quantizers.
    """
    told = {hook: _DYNAMIC if hook in dynamic and s else s for hook, s in scales.items()}
    return {METADATA_KEY: json.dumps(told)} if scales else {}


def from_metadata(metadata: Mapping[str, str], where: str) -> dict[str, float | None]:
    """The scales in a file's metadata; None of a dynamic quantizer.

    Raises:
        ValueError: they are no JSON object of numbers.
    """
    try:
        found = parse_json(metadata.get(METADATA_KEY, "{}"), where)
        return {str(h): None if scale == _DYNAMIC else float(scale) for h, scale in found.items()}
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
        self._dynamic: set[str] = set()

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
        self._check(hook, name)
        if not 0 <= scale < np.inf:
            raise ValueError(
                f"{self._where}: {name!r} is {scale}, expected 0 (off) or a positive number."
            )
        if self._found.setdefault(hook, scale) != scale or hook in self._dynamic:
            raise ValueError(
                f"{self._where}: {name!r} is {scale:g}, but the modules that share its input have "
                f"{self._found[hook]:g}; they must agree."
            )

    def add_dynamic(self, hook: str, *, name: str) -> None:
        """Takes a dynamic quantizer; arguments and errors as of `add`."""
        self._check(hook, name)
        if hook in self._found and hook not in self._dynamic:
            raise ValueError(
                f"{self._where}: {name!r} has both a static and a dynamic input; it can have one."
            )
        self._dynamic.add(hook)
        self._found[hook] = ON

    def add_all(self, scales: Mapping[str, float | None]) -> None:
        """Takes the scales of `from_metadata`."""
        for hook, scale in scales.items():
            if scale is None:
                self.add_dynamic(hook, name=hook)
            else:
                self.add(hook, scale, name=hook)

    def _check(self, hook: str, name: str) -> None:
        if hook not in self._known:
            raise ValueError(f"{self._where}: {name!r} belongs to no activation of the model.")

    def entries(self, rule: int, rule_name: str) -> tuple[ActivationEntry, ...]:
        """Entries of a table, in the order of the model."""
        return tuple(
            ActivationEntry(
                path=hook,
                static=hook not in self._dynamic,
                constant=ON if hook in self._dynamic else None,
                rule=rule,
                rule_name=rule_name,
            )
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
