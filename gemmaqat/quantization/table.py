"""`Table`: what happens to every parameter of a model, resolved once and saved with the run."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from gemmaqat.packed import Order, storage_bits
from gemmaqat.quantization.grids import Grid

FORMAT_VERSION = 2
WITHOUT_ACTIVATIONS = 1  # version of a table that has none: as earlier ones wrote it

SCALE = "scale"  # name of a quantizer's scale under its hook point
ON = 1.0  # the "scale" of a dynamic quantizer, which is a switch

FAMILIES = (
    "attention",
    "mlp",
    "experts",
    "router",
    "embeddings",
    "per_layer_embeddings",
    "other",
)
# First match in this order; the names are those of module paths.
_FAMILY_PATTERNS = (
    ("per_layer_embeddings", r"(.*/)?(embed_tokens_per_layer|per_layer_[^/]*)(/.*)?"),
    ("embeddings", r"(.*/)?embed[^/]*(/.*)?"),
    ("router", r"(.*/)?router(/.*)?"),
    ("experts", r"(.*/)?experts(/.*)?"),
    ("attention", r"(.*/)?(self_attn|attention)(/.*)?"),
    ("mlp", r"(.*/)?mlp(/.*)?"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One parameter: its grid, or the reason why it stays float."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    axis: int = -2  # the contraction axis
    order: Order = "contract"  # memory order once packed
    rule: int | None = None  # number of the rule that decided; None = not a candidate
    rule_name: str = ""
    grid: Grid | None = None
    reason: str = ""  # why it stays float; "" if quantized

    @property
    def family(self) -> str:
        """Part of the model, one of FAMILIES."""
        module = self.path.rpartition("/")[0]
        for family, pattern in _FAMILY_PATTERNS:
            if re.fullmatch(pattern, module):
                return family
        return "other"

    @property
    def num_weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def storage_bits(self) -> int:
        """Bits in which one code is stored, or those of the float dtype."""
        if self.grid is None:
            return 8 * jnp.dtype(self.dtype).itemsize
        return storage_bits(self.grid.bits)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the codes in whole words, or of the float array."""
        if self.grid is None:
            return self.num_weights * self.storage_bits // 8
        length = self.shape[self.axis]
        return self.num_weights // length * 4 * -(-length * self.storage_bits // 32)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the stored scales."""
        if self.grid is None:
            return 0
        scales = math.prod(self.grid.scale_shape(self.shape, self.axis))
        return scales * jnp.dtype(self.grid.scale_dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationEntry:
    """One hook point whose activation is quantized; a hook point without an entry stays float."""

    path: str
    qtype: str = "int8"
    static: bool = True  # one scale for the tensor, found before and stored with the weights;
    #                      False: each token has its own, from itself
    calibration: str = "absmax"  # absmax[,factor] | percentile,percent | mse
    constant: float | None = None  # the scale, where it is not calibrated; ON of a dynamic one
    rule: int
    rule_name: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Every parameter's entry, in the order of the tree. Hashable."""

    entries: tuple[Entry, ...]
    rules: tuple[str, ...] = ()  # each rule in words, by number
    recipe: str = ""
    activations: tuple[ActivationEntry, ...] = ()

    def __getitem__(self, path: str) -> Entry:
        for entry in self.entries:
            if entry.path == path:
                return entry
        raise KeyError(path)

    @property
    def by_path(self) -> dict[str, Entry]:
        """The entries by parameter path."""
        return {entry.path: entry for entry in self.entries}

    @property
    def quantized(self) -> tuple[Entry, ...]:
        """Entries with a grid."""
        return tuple(entry for entry in self.entries if entry.grid is not None)

    @property
    def kept(self) -> tuple[Entry, ...]:
        """Entries that stay float, each with its reason."""
        return tuple(entry for entry in self.entries if entry.grid is None)

    @property
    def activation_scales(self) -> frozenset[str]:
        """Paths of the activations' scales among the parameters of a prepared model."""
        return frozenset(f"{entry.path}/{SCALE}" for entry in self.activations)

    @property
    def dynamic(self) -> frozenset[str]:
        """Hook points where every token has its own scale."""
        return frozenset(entry.path for entry in self.activations if not entry.static)

    @property
    def calibrated(self) -> tuple[ActivationEntry, ...]:
        """Activations whose scale is found from data."""
        return tuple(entry for entry in self.activations if entry.constant is None)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the static scales of activations; dynamic quantizers store nothing."""
        return 4 * sum(entry.static for entry in self.activations)

    @property
    def num_bytes(self) -> int:
        """Bytes of all parameters, packed where they are quantized, all scales included."""
        return sum(e.weight_bytes + e.scale_bytes for e in self.entries) + self.activation_bytes

    def bits_per_weight(self, *, quantized_only: bool = False) -> float:
        """Stored bits per parameter; floats count with their own dtype.

        Of all parameters: `num_bytes` over their number, so scales of activations count as bits but
        not as parameters. Of the quantized ones: their codes and scales alone.
        """
        entries = self.quantized if quantized_only else self.entries
        weights = sum(entry.num_weights for entry in entries)
        of_entries = sum(entry.weight_bytes + entry.scale_bytes for entry in entries)
        total = of_entries if quantized_only else self.num_bytes
        return 8 * total / weights if weights else 0.0

    def coverage(self) -> dict[str, float]:
        """Share of each family's parameters that is quantized; absent families are left out."""
        shares = {}
        for family in FAMILIES:
            members = [entry for entry in self.entries if entry.family == family]
            total = sum(entry.num_weights for entry in members)
            if total:
                done = sum(entry.num_weights for entry in members if entry.grid is not None)
                shares[family] = done / total
        return shares

    def diff(self, other: "Table") -> list[str]:
        """What differs in `other`, one line per parameter or hook point; empty if nothing does."""
        mine, theirs = self.by_path, other.by_path
        lines = []
        for path in sorted(mine.keys() | theirs.keys()):
            left, right = mine.get(path), theirs.get(path)
            if left is None or right is None:
                lines.append(f"{path}: only in the {'second' if left is None else 'first'} table")
            elif _decision(left) != _decision(right):
                lines.append(f"{path}: {_in_words(left)} -> {_in_words(right)}")
        here, there = ({e.path: _activation(e) for e in t.activations} for t in (self, other))
        for path in sorted(here.keys() | there.keys()):
            before, after = here.get(path, "float"), there.get(path, "float")
            if before != after:
                lines.append(f"{path}: {before} -> {after}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with a `format_version`; `from_json` reads them."""
        found = {
            "format_version": FORMAT_VERSION if self.activations else WITHOUT_ACTIVATIONS,
            "recipe": self.recipe,
            "rules": list(self.rules),
            "bits_per_weight": self.bits_per_weight(),
            "entries": [dataclasses.asdict(entry) for entry in self.entries],
        }
        if self.activations:
            found["activations"] = [dataclasses.asdict(entry) for entry in self.activations]
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Table":
        """The inverse of `to_json`.

        Raises:
            ValueError: written by another version, or not a table.
        """
        version = data.get("format_version") if isinstance(data, Mapping) else None
        if version not in (WITHOUT_ACTIVATIONS, FORMAT_VERSION):
            raise ValueError(
                f"quantization table: format_version is {version!r}, this version reads up to "
                f"{FORMAT_VERSION}; use the version of gemmaqat that wrote it."
            )
        try:
            entries = tuple(_entry_from_json(entry) for entry in data["entries"])
            activations = tuple(ActivationEntry(**entry) for entry in data.get("activations", ()))
            return cls(entries, tuple(data["rules"]), data["recipe"], activations)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"quantization table: a field is missing or unknown ({error}); restore the file "
                "from a copy or resolve the rules again."
            ) from None

    def render(self, *, every_layer: bool = False) -> str:
        """A table for people. Layers that fare alike share a row unless `every_layer`."""
        rows: dict[tuple[str, ...], tuple[int, int]] = {}
        for entry in self.entries:
            path = entry.path if every_layer else re.sub(r"(^|/)\d+(?=/)", r"\1*", entry.path)
            rule = "-" if entry.rule is None else f"{entry.rule} {entry.rule_name}".strip()
            shape = "x".join(map(str, entry.shape))
            bits = f"{entry.grid.nominal_bits:g}/{entry.storage_bits}" if entry.grid else ""
            key = (path, shape, rule, _in_words(entry), bits)
            count, scale_bytes = rows.get(key, (0, 0))
            rows[key] = (count + 1, scale_bytes + entry.scale_bytes)
        header = ("parameter", "shape", "rule", "grid or reason", "bits", "count", "scale bytes")
        body = [(*key, str(count), f"{size:,}") for key, (count, size) in rows.items()]
        lines = [*_columns([header, *body]), ""]
        if self.activations:
            lines += [*self._render_activations(every_layer), ""]
        return "\n".join([*lines, *self._summary()])

    def _render_activations(self, every_layer: bool) -> list[str]:
        rows: dict[tuple[str, ...], int] = {}
        for entry in self.activations:
            path = entry.path if every_layer else re.sub(r"(^|/)\d+(?=/)", r"\1*", entry.path)
            key = (path, f"{entry.rule} {entry.rule_name}".strip(), _activation(entry))
            rows[key] = rows.get(key, 0) + 1
        header = ("activation", "rule", "quantizer", "count")
        return _columns([header, *((*key, str(count)) for key, count in rows.items())])

    def _summary(self) -> list[str]:
        weights = sum(entry.num_weights for entry in self.entries)
        share = sum(entry.num_weights for entry in self.quantized) / max(weights, 1)
        lines = [
            f"recipe {self.recipe or '-'}: {share:.1%} of {weights:,} parameters quantized, "
            f"{self.bits_per_weight(quantized_only=True):.3f} bits each with scales; "
            f"{self.bits_per_weight():.3f} bits per parameter in all, {self.num_bytes:,} bytes",
            "quantized by family: "
            + ", ".join(f"{name} {part:.1%}" for name, part in self.coverage().items()),
        ]
        return lines + [f"rule {i}: {text}" for i, text in enumerate(self.rules)]


def _decision(entry: Entry) -> tuple[Any, ...]:
    return (entry.shape, entry.axis, entry.grid)


def _in_words(entry: Entry) -> str:
    return entry.grid.describe() if entry.grid else f"float: {entry.reason}"


def _activation(entry: ActivationEntry) -> str:
    if not entry.static:
        return f"{entry.qtype} dynamic per token"
    found = entry.calibration if entry.constant is None else f"scale {entry.constant:g}"
    return f"{entry.qtype} static {found}"


def _entry_from_json(data: Mapping[str, Any]) -> Entry:
    grid, shape = None if data["grid"] is None else Grid(**data["grid"]), tuple(data["shape"])
    if not all(isinstance(length, int) for length in shape):
        raise TypeError(f"shape {list(shape)} of {data['path']!r}")
    return Entry(**{**data, "shape": shape, "grid": grid})


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
