"""What each deployed format stores of a Gemma 4: which type per kind of tensor, and what besides.

A layout is data for `planning.size`. Its constants are of the released checkpoints and files.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from gemmaqat.models.config import ModelConfig
from gemmaqat.quantization.recipes import RECIPES


class Storage(NamedTuple):
    """A storage type: `bits` per code, and scales of `scale_bytes` for each `block` of a row."""

    bits: int
    block: int = 0  # 0 = one scale for the whole row, if there are scales
    scale_bytes: int = 0

    def code_bytes(self, rows: int, length: int) -> int:
        """Of the codes (or floats); every row fills whole bytes."""
        return rows * -(-length * self.bits // 8)

    def num_scale_bytes(self, rows: int, length: int) -> int:
        """Of the scales of all rows."""
        return rows * (length // self.block if self.block else 1) * self.scale_bytes


F32, BF16, INT8, INT4 = Storage(32), Storage(16), Storage(8), Storage(4)
Q4_0 = Storage(4, 32, 2)
Q6_K = Storage(6, 256, 18)  # sixteen 8-bit scales and one half
W4_G32 = Storage(4, 32, 2)  # codes and bfloat16 scales in two tensors

# Kinds of tensors. `shared_mlp` is that of layers without keys of their own; `head` a second copy
# of the embedding table; `unused_kv` the projections that such layers carry and nobody reads.
TABLES = ("embedding", "per_layer_table")
LINEARS = ("attention", "mlp", "shared_mlp", "per_layer_linear")
KINDS = (
    *LINEARS, "per_layer_projection", "experts", *TABLES, "head", "router", "vector", "unused_kv",
    "unused_vector",
)  # fmt: skip

# Of the released checkpoints, whole file less text decoder: vision and audio.
ENCODER_WEIGHTS = {
    "e2b": 475_729_088,
    "e4b": 478_088_384,
    "12b": 52_379_904,
    "26b_a4b": 572_794_416,
    "31b": 575_743_536,
}
_NUM_TENSORS = {"e2b": 2011, "e4b": 2130, "12b": 677, "26b_a4b": 1013, "31b": 1188}
FULL_SIZES = tuple(ENCODER_WEIGHTS)
# Vision in int8 (0.151 GB), audio in 2 and 4 bits (0.107), the rest in bfloat16 (0.04).
_MOBILE_ENCODER_BYTES = 298_000_000
# Tokenizer, merges, tensor infos and padding: between 15.82 and 15.84 MB in three released files.
_GGUF_METADATA = 15_830_000
_HEADER_BYTES_PER_TENSOR = 131  # of safetensors, as in the released 12B
_TOKENIZER_BYTES = 32_000_000  # tokenizer.json
_DOCUMENTED_OVERHEAD = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How one format stores one size."""

    convention: str  # what the figure counts and in which unit it is published
    unit: str  # "GB" (10^9) | "GiB" (2^30)
    storage: Mapping[str, Storage]  # by kind; an absent kind is not stored
    encoder_bytes: int = 0
    metadata_bytes: int = 0
    overhead: float = 0.0  # added on top of everything
    kv_cache: str = "bf16"  # what the format's runtime keeps keys and values in
    deployable: bool = True  # a file for a runtime, not the accounting of a documentation table


def layout(config: ModelConfig, name: str) -> Layout:
    """The layout of a named format.

    Raises:
        ValueError: no such format, or it does not exist for this size.
    """
    if name not in LAYOUTS:
        known = (*LAYOUTS, *RECIPES)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"format {name!r} is unknown; {hint}Known: {', '.join(LAYOUTS)}; or recipe:NAME with a "
            f"recipe, as in recipe:{next(reversed(RECIPES))}."
        )
    if config.name not in FULL_SIZES:
        raise ValueError(
            f"format {name!r}: known for {', '.join(FULL_SIZES)} alone, not for {config.name!r}; "
            "give one of these, or recipe:NAME."
        )
    return LAYOUTS[name](config)


def available(config: ModelConfig) -> tuple[str, ...]:
    """The formats that exist for a size (all of them for a size that is none of the full ones)."""
    mobile = ("mobile", "mobile-text", "gemma-mobile", "litert")
    return tuple(
        name
        for name in LAYOUTS
        if (config.per_layer_dim or name not in mobile)
        and (config.num_experts or name != "w4a16-packed-experts")
    )


def _same(storage: Storage, *, head: bool = False) -> dict[str, Storage]:
    return {kind: storage for kind in KINDS if head or kind != "head"}


def _documented(config: ModelConfig, storage: Storage) -> Layout:
    """A row of the documentation's memory table."""
    return Layout(
        convention=(
            f"documentation table: every released weight, encoders too, at {storage.bits} bits, "
            "scales not counted, times 1.2; GiB printed as GB"
        ),
        unit="GiB",
        storage=_same(storage),
        encoder_bytes=ENCODER_WEIGHTS[config.name] * storage.bits // 8,
        overhead=_DOCUMENTED_OVERHEAD,
        deployable=False,
    )


def _mobile(
    config: ModelConfig,
    *,
    counts: str,
    unit: str = "GB",
    per_layer_table: bool = True,
    encoders: bool = True,
    unused: bool = False,
    metadata_bytes: int = 0,
    deployable: bool = True,
) -> Layout:
    """The mobile scheme: 4-bit channels, 2 bits for tables and E2B's shared MLPs."""
    if not config.per_layer_dim:
        raise ValueError(
            f"{config.name}: the mobile scheme is defined for e2b and e4b alone; use q4_0-gguf or "
            "w4a16."
        )
    channel = {bits: Storage(bits, 0, 4) for bits in (2, 4, 8)}
    wide = config.use_double_wide_mlp  # E2B: its shared MLPs are the 2-bit ones
    storage = {
        "attention": channel[4],
        "mlp": channel[4],
        "shared_mlp": channel[2 if wide else 4],
        "per_layer_linear": channel[8],
        "per_layer_projection": BF16,
        "embedding": channel[2],
        "head": channel[2],
        "vector": BF16,
    }
    if per_layer_table:  # one scale per row and layer
        storage["per_layer_table"] = Storage(4 if wide else 2, config.per_layer_dim, 4)
    if unused:
        storage |= {"unused_kv": channel[4], "unused_vector": BF16}
    return Layout(
        convention=f"{counts}; the 2-bit vocabulary table twice, embedding and head",
        unit=unit,
        storage=storage,
        encoder_bytes=_MOBILE_ENCODER_BYTES if encoders else 0,
        metadata_bytes=metadata_bytes,
        kv_cache="static",
        deployable=deployable,
    )


def _gguf(
    config: ModelConfig,
    *,
    linears: Storage,
    tables: Storage,
    text: str,
    projection: Storage = BF16,
    unused: bool = False,
) -> Layout:
    """llama.cpp's file: the text decoder, its norms and router in float32."""
    storage = dict.fromkeys((*LINEARS, "experts"), linears) | dict.fromkeys(TABLES, tables)
    storage |= {"per_layer_projection": projection, "router": F32, "vector": F32}
    if unused:
        storage |= {"unused_kv": linears, "unused_vector": F32}
    return Layout(
        convention=f"GGUF file, text decoder: {text}; tokenizer and metadata about 15.83 MB",
        unit="GB",
        storage=storage,
        metadata_bytes=_GGUF_METADATA,
        kv_cache="f16",
    )


def _w4a16(config: ModelConfig, *, experts: Storage) -> Layout:
    """compressed-tensors, group 32; tables, an untied head and encoders in bfloat16."""
    if experts != BF16 and not config.num_experts:
        raise ValueError(f"{config.name}: has no experts to pack; use w4a16.")
    storage = _same(BF16, head=True) | dict.fromkeys(LINEARS, W4_G32) | {"unused_kv": W4_G32}
    text = (
        "compressed-tensors file: linears int4 in groups of 32 with bfloat16 scales; embedding, "
        "separate head, per-layer table and encoders bfloat16"
    )
    if config.num_experts:
        text += "; experts " + ("bfloat16" if experts == BF16 else "packed")
    return Layout(
        convention=text,
        unit="GB",
        storage=storage | {"experts": experts},
        encoder_bytes=2 * ENCODER_WEIGHTS[config.name],
        metadata_bytes=_HEADER_BYTES_PER_TENSOR * _NUM_TENSORS[config.name],
    )


def _hf(config: ModelConfig) -> Layout:
    return Layout(
        convention="bfloat16 safetensors as released: every tensor, encoders and unused keys too",
        unit="GB",
        storage=_same(BF16),
        encoder_bytes=2 * ENCODER_WEIGHTS[config.name],
        metadata_bytes=_HEADER_BYTES_PER_TENSOR * _NUM_TENSORS[config.name],
    )


LAYOUTS: dict[str, Callable[[ModelConfig], Layout]] = {
    "bf16": lambda c: _documented(c, BF16),
    "sfp8": lambda c: _documented(c, INT8),
    "q4_0": lambda c: _documented(c, INT4),
    "mobile": lambda c: _mobile(
        c,
        counts="documentation table, mobile: GiB printed as GB, no factor; encoders (estimate), "
        "but NOT the per-layer table",
        unit="GiB",
        per_layer_table=False,
        deployable=False,
    ),
    "mobile-text": lambda c: _mobile(
        c,
        counts="documentation table, mobile text only: GiB printed as GB, no factor; neither "
        "encoders nor the per-layer table",
        unit="GiB",
        per_layer_table=False,
        encoders=False,
        deployable=False,
    ),
    "gemma-mobile": lambda c: _mobile(
        c,
        counts="mobile checkpoint folder: per-layer table, encoders (estimate), unused keys and "
        "tokenizer too",
        unused=True,
        metadata_bytes=_TOKENIZER_BYTES,
    ),
    "litert": lambda c: _mobile(
        c,
        counts="mobile bundle for phones: per-layer table, encoders (estimate) and tokenizer too; "
        "the released bundle's own parts are not published",
        metadata_bytes=_TOKENIZER_BYTES,
    ),
    "hf": _hf,
    "q4_0-gguf": lambda c: _gguf(
        c, linears=Q4_0, tables=Q6_K, text="linears Q4_0, tables Q6_K as in Google's files"
    ),
    "q4_0-gguf-tables": lambda c: _gguf(
        c, linears=Q4_0, tables=Q4_0, text="linears and tables Q4_0, per-layer projection 16 bits"
    ),
    "q4_0-gguf-all": lambda c: _gguf(
        c,
        linears=Q4_0,
        tables=Q4_0,
        projection=Q4_0,
        text="every matrix but the router Q4_0, as in public re-conversions",
    ),
    "bf16-gguf": lambda c: _gguf(
        c, linears=BF16, tables=BF16, text="bfloat16, unused keys too", unused=True
    ),
    "bf16-gguf-used": lambda c: _gguf(
        c, linears=BF16, tables=BF16, text="bfloat16, without the unused keys of shared layers"
    ),
    "w4a16": lambda c: _w4a16(c, experts=BF16),
    "w4a16-packed-experts": lambda c: _w4a16(c, experts=W4_G32),
}  # fmt: skip

# What an answer for a device looks at where no format is named.
DEVICE_FORMATS = ("q4_0-gguf", "w4a16", "gemma-mobile", "hf")


def kind_of(path: str, config: ModelConfig) -> str:
    """The kind of one of our parameters, one of KINDS."""
    if path.startswith("embed_tokens_per_layer/"):
        return "per_layer_table"
    if path.startswith("embed_tokens/"):
        return "embedding"
    if path.startswith("per_layer_model_projection/"):
        return "per_layer_projection"
    layer = re.match(r"layers/(\d+)/(.*)", path)
    name = layer[2] if layer else path
    if name.startswith("experts/"):
        return "experts"
    if name == "router/proj/weight":
        return "router"
    if layer and name.startswith("mlp/"):
        return "mlp" if config.owns_kv(int(layer[1])) else "shared_mlp"
    if name.startswith(("per_layer_input_gate/", "per_layer_projection/")):
        return "per_layer_linear"
    if re.fullmatch(r"self_attn/[qkvo]_proj/weight", name):
        return "attention"
    return "vector"  # norms and scalars
