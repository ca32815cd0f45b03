"""The size oracle: exact bytes of every full size in every format, without allocating any.

Counts follow from the shapes of the model and the layout of the format; what cannot be derived
(encoders, a tokenizer inside a file) are constants of the released files, in `planning.layouts`.
Every figure carries its convention, because published ones follow several.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gemmaqat.models.config import ModelConfig
from gemmaqat.models.sizes import model_config
from gemmaqat.planning.layouts import FULL_SIZES, LAYOUTS, Layout, available, kind_of, layout
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.recipes import RECIPES
from gemmaqat.quantization.rules import resolve

RECIPE = "recipe:"
FAMILIES = (
    "linears", "experts", "embeddings", "per_layer_embeddings", "norms", "scales", "unused",
    "encoders", "metadata", "overhead", "kv_cache",
)  # fmt: skip
_FAMILY = {
    "attention": "linears", "mlp": "linears", "shared_mlp": "linears",
    "per_layer_linear": "linears", "per_layer_projection": "linears", "router": "linears",
    "experts": "experts", "embedding": "embeddings", "head": "embeddings",
    "per_layer_table": "per_layer_embeddings", "vector": "norms",
    "unused_kv": "unused", "unused_vector": "unused",
}  # fmt: skip
UNITS = {"GB": 10**9, "GiB": 2**30}

# Bits of one key or value, and whether each token and head has a float32 scale of its own; "static"
# is the mobile scheme's int8 with two scalars per layer that owns keys.
KV_TYPES = {
    "bf16": (16, False),
    "f16": (16, False),
    "f32": (32, False),
    "static": (8, False),
    "int8": (8, True),
    "int4": (4, True),
}


class Stored(NamedTuple):
    """The tensors of one kind and shape, as a format stores them."""

    kind: str  # one of layouts.KINDS
    weights: int
    code_bytes: int  # codes, or floats
    scale_bytes: int
    rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What one size takes in one format.

    Attributes:
        families: bytes by family, absent ones left out; they add up to `bytes`.
        stored: the tensors behind them.
        convention: what the figure counts; `unit` is the one it is published in.
        context: positions of the key/value cache; 0 = without one.
    """

    size: str
    format: str
    families: dict[str, int]
    stored: tuple[Stored, ...]
    convention: str
    unit: str
    deployable: bool
    context: int
    kv_cache: str

    @property
    def bytes(self) -> int:
        """All families together."""
        return sum(self.families.values())

    @property
    def weight_bytes(self) -> int:
        """Without the key/value cache."""
        return self.bytes - self.families.get("kv_cache", 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {
            "size": self.size,
            "format": self.format,
            "bytes": self.bytes,
            "families": self.families,
            "weight_bytes": self.weight_bytes,
            "convention": self.convention,
            "unit": self.unit,
            "context": self.context,
            "kv_cache": self.kv_cache,
        }


def measure(size: str, format: str, *, context: int = 0, kv_cache: str = "") -> Size:
    """The bytes of one size in one format.

    Args:
        size: a name of `models.sizes.SIZES`, for example "e2b".
        format: a name of `planning.layouts.LAYOUTS`, or a recipe's as `recipe:NAME` (or plain,
            where no format has that name).
        context: positions of the key/value cache of one sequence; 0 leaves it out.
        kv_cache: a name of KV_TYPES; "" = that of the format.

    Raises:
        ValueError: an unknown size, format or cache type, a format that does not exist for this
            size, or more positions than the model has.
    """
    config = model_config(size, param_dtype="bfloat16")
    if context > config.max_position:
        raise ValueError(
            f"context={context:,}: {size} has {config.max_position:,} positions; ask for fewer."
        )
    plan, stored = _plan(config, format)
    kv_cache = kv_cache or plan.kv_cache
    families = dict.fromkeys(FAMILIES, 0)
    for item in stored:
        families[_FAMILY[item.kind]] += item.code_bytes
        families["scales"] += item.scale_bytes
    families["encoders"] = plan.encoder_bytes
    families["metadata"] = plan.metadata_bytes
    families["overhead"] = round(plan.overhead * sum(families.values()))
    families["kv_cache"] = kv_bytes(config, context, kv_cache)
    return Size(
        size=size,
        format=format,
        families={name: count for name, count in families.items() if count},
        stored=stored,
        convention=plan.convention,
        unit=plan.unit,
        deployable=plan.deployable,
        context=context,
        kv_cache=kv_cache,
    )


def survey(
    sizes: Sequence[str] = (),
    formats: Sequence[str] = (),
    *,
    default: Sequence[str] = tuple(LAYOUTS),
    contexts: Sequence[int] = (0,),
    kv_cache: str = "",
) -> list[Size]:
    """`measure` of every combination, size by size.

    Args:
        sizes: empty = all full sizes, and of these those that have the formats.
        formats: empty = those of `default` that a size has.
        default: formats to look at where none is named.
        contexts: each gives a figure of its own.
        kv_cache: as in `measure`.

    Raises:
        ValueError: as `measure`.
    """
    measured = []
    for size in sizes or FULL_SIZES:
        known = available(model_config(size))
        for format in formats or [name for name in default if name in known]:
            if not sizes and format in LAYOUTS and format not in known:
                continue
            measured += [measure(size, format, context=n, kv_cache=kv_cache) for n in contexts]
    return measured


def kv_bytes(config: ModelConfig, context: int, kv_cache: str = "bf16") -> int:
    """Keys and values of one sequence; sliding layers keep their window, sharing layers nothing.

    Models whose values are the raw keys still cache both: keys are normed and rotated.
    """
    owners = [i for i in range(config.num_layers) if config.owns_kv(i)]
    count = sum(_layer_kv_bytes(config, layer, context, kv_cache) for layer in owners)
    scalars = 8 * len(owners) if kv_cache == "static" and context else 0
    return count + scalars


def _layer_kv_bytes(config: ModelConfig, layer: int, context: int, kv_cache: str) -> int:
    """What one layer attends to at `context`, its scales per token included."""
    if kv_cache not in KV_TYPES:
        raise ValueError(f"kv_cache={kv_cache!r} is not one of {', '.join(KV_TYPES)}.")
    bits, scaled = KV_TYPES[kv_cache]
    seen = min(context, config.sliding_window) if config.is_sliding(layer) else context
    head = config.layer_head_dim(layer) * bits // 8 + (4 if scaled else 0)
    return 2 * seen * config.layer_kv_heads(layer) * head


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes moved for one generated token of one sequence, at one context length.

    Attributes:
        weights: matrices, norms and scales that every token is multiplied with, its active
            experts, the head, and one row of the embedding.
        kv_cache: keys and values read by every layer that attends (sharing layers read their
            owner's again), and the new ones written.
        storage: the row of the per-layer table, which may come from storage.
    """

    weights: int
    kv_cache: int
    storage: int

    @property
    def bytes(self) -> int:
        """Through the memory's bandwidth; the row from storage ends there too."""
        return self.weights + self.kv_cache + self.storage


def traffic(size: Size, *, context: int) -> Traffic:
    """What one generated token moves when `context` positions are cached.

    Encoders, metadata and unused tensors are not touched; activations are not counted.
    """
    config = model_config(size.size)
    untied = any(item.kind == "head" for item in size.stored)
    weights, storage = 0.0, 0
    for item in size.stored:
        count = item.code_bytes + item.scale_bytes
        if item.kind in ("unused_kv", "unused_vector"):
            continue
        if item.kind == "per_layer_table":
            storage += count // item.rows
        elif item.kind == "embedding":  # the tied table is also the head
            weights += count // item.rows + (0 if untied else count)
        elif item.kind == "experts":
            weights += count * config.num_experts_per_token / config.num_experts
        else:
            weights += count
    read = sum(
        _layer_kv_bytes(config, layer, context, size.kv_cache) for layer in range(config.num_layers)
    )
    written = kv_bytes(config, 1, size.kv_cache) if context else 0
    return Traffic(weights=round(weights), kv_cache=read + written, storage=storage)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether one size and format run in some memory, for text.

    Attributes:
        resident: bytes that must be in memory: all but the per-layer table, encoders, tensors
            nobody reads, and metadata; with the cache at `size.context`.
        on_storage: bytes of the per-layer table, of which a token needs one row.
        largest_context: most positions that fit; 0 = not even the weights and one position.
        traffic: per generated token at `size.context`.
        tokens_per_second: at most, by bandwidth alone; None = no bandwidth given.
    """

    size: Size
    resident: int
    on_storage: int
    fits: bool
    largest_context: int
    traffic: Traffic
    tokens_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        """The size's values and, under `fit`, these."""
        mine = {
            "resident_bytes": self.resident,
            "storage_bytes": self.on_storage,
            "fits": self.fits,
            "largest_context": self.largest_context,
            "bytes_per_token": self.traffic.bytes,
            "bytes_per_token_from_storage": self.traffic.storage,
            "tokens_per_second_at_most": self.tokens_per_second,
        }
        return self.size.to_json() | {"fit": mine}


def fit(size: Size, *, memory: int | float, bandwidth: int | float | None = None) -> Fit:
    """Places a size into `memory` bytes, read at `bandwidth` bytes per second."""
    families = fit_families(size)
    on_storage = families.pop("per_layer_embeddings", 0)
    weights = sum(families.values()) - families.get("kv_cache", 0)
    moved = traffic(size, context=size.context)
    return Fit(
        size=size,
        resident=sum(families.values()),
        on_storage=on_storage,
        fits=sum(families.values()) <= memory,
        largest_context=_largest_context(model_config(size.size), memory - weights, size.kv_cache),
        traffic=moved,
        tokens_per_second=bandwidth / moved.bytes if bandwidth else None,
    )


def fit_families(size: Size) -> dict[str, int]:
    """Bytes by family of what text needs; `per_layer_embeddings`, scales included, may stay away.

    Encoders, metadata and tensors that nobody reads are left out.
    """
    families = dict.fromkeys(FAMILIES, 0)
    for item in size.stored:
        family = _FAMILY[item.kind]
        if family == "unused":
            continue
        families[family] += item.code_bytes
        families[family if item.kind == "per_layer_table" else "scales"] += item.scale_bytes
    families["kv_cache"] = size.families.get("kv_cache", 0)
    last = families.pop("per_layer_embeddings")
    families["per_layer_embeddings"] = last
    return {name: count for name, count in families.items() if count}


def _largest_context(config: ModelConfig, free: int | float, kv_cache: str) -> int:
    """Most positions whose cache fits in `free` bytes; the cache only grows with them."""
    low, high = 0, config.max_position
    while low < high:
        middle = (low + high + 1) // 2
        if kv_bytes(config, middle, kv_cache) <= free:
            low = middle
        else:
            high = middle - 1
    return low


def _plan(config: ModelConfig, format: str) -> tuple[Layout, tuple[Stored, ...]]:
    """The layout of a format or recipe, and every tensor as it stores them."""
    if format.startswith(RECIPE) or (format in RECIPES and format not in LAYOUTS):
        return _of_recipe(config, format.removeprefix(RECIPE))
    plan = layout(config, format)
    return plan, tuple(
        Stored(
            kind,
            rows * length,
            plan.storage[kind].code_bytes(rows, length),
            plan.storage[kind].num_scale_bytes(rows, length),
            rows,
        )
        for kind, rows, length in tensors(config)
        if kind in plan.storage
    )


@functools.lru_cache(maxsize=16)
def tensors(config: ModelConfig) -> tuple[tuple[str, int, int], ...]:
    """Kind, rows and row length of every tensor of a released file, its encoders aside.

    Rows run along the contraction axis. The head is listed as a copy of the embedding, and the
    unread projections of layers that share keys are listed too; a format may store them or not.
    """
    found = []
    for entry in resolve("none", abstract_model(config)).entries:
        length = entry.shape[entry.axis] if len(entry.shape) > 1 else math.prod(entry.shape)
        rows = math.prod(entry.shape) // length
        found.append((kind_of(entry.path, config), rows, length))
    found.append(("head", config.vocab_size, config.embed_dim))
    for layer in range(config.first_shared_layer, config.num_layers):
        heads, head_dim = config.layer_kv_heads(layer), config.layer_head_dim(layer)
        found += [("unused_kv", heads * head_dim, config.embed_dim)] * 2
        found.append(("unused_vector", 1, head_dim))
    return tuple(found)


def _of_recipe(config: ModelConfig, name: str) -> tuple[Layout, tuple[Stored, ...]]:
    """Our own packed weights under a recipe, the kept ones in bfloat16."""
    table = resolve(name, abstract_model(config))
    stored = tuple(
        Stored(
            kind_of(entry.path, config),
            entry.num_weights,
            entry.weight_bytes,
            entry.scale_bytes,
            entry.num_weights // (entry.shape[entry.axis] if len(entry.shape) > 1 else 1),
        )
        for entry in table.entries
    )
    convention = f"packed weights of recipe {name}, text decoder: kept parameters bfloat16"
    return Layout(convention=convention, unit="GB", storage={}), stored
