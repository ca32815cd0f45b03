"""What a user may choose about an export, and what a writer tells of each tensor."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

Kind = Literal["exact", "rescaled", "requantized", "kept", "carried"]
KINDS: tuple[Kind, ...] = ("exact", "rescaled", "requantized", "kept", "carried")
QUANTIZED = ("exact", "rescaled", "requantized")
TableType = Literal["as_is", "q4_0", "q8_0", "q6_k", "f16", "bf16", "f32"]


class Written(NamedTuple):
    """One tensor of an artefact.

    Attributes:
        path: the parameter's path, or the file's own name of a carried tensor.
        kind: `exact`: the codes and scales of the source; `rescaled`: its codes under other
            scales; `requantized`: other codes; `kept`: floats; `carried`: bytes passed on.
        stored: the format's name of the storage, e.g. `Q4_0`.
        note: why it is neither exact nor carried, where that needs a word.
    """

    path: str
    kind: Kind
    stored: str
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Choices of an export; a format refuses those that it does not have.

    The two permissions, `allow_rescale` and `allow_requantize`, may be given to any.

    Attributes:
        float_dtype: of kept matrices, "bfloat16" | "float16" | "float32"; "" = the format's own.
        tables: how float vocabulary tables are stored in a GGUF; "as_is" = in `float_dtype`.
        packed_experts: pack the experts of 26B-A4B in compressed-tensors although no reader is
            known to load them.
        packed_tables: compressed-tensors: vocabulary tables on their grid instead of bfloat16.
        per_layer_scales: gemma-mobile: the per-layer embedding's scales as `[V, L]` instead of the
            `[V, 1]` that transformers loads.
        text_only: leave out what is not the text decoder.
        allow_rescale: round scales that the format cannot hold.
        allow_requantize: choose new codes where the format cannot hold the grid.
        shard_bytes: largest size of one safetensors file.
        stacked_layers: orbax: one array per kind of layer instead of one per layer.
        prefill_lengths: litert: tokens of each prefill signature.
        cache_length: litert: positions that the key/value cache holds.
        dynamic_activations: litert: have the runtime quantize float activations to 8 bits as it
            goes, which is faster and no longer what was evaluated.
    """

    float_dtype: str = ""
    tables: TableType = "as_is"
    packed_experts: bool = False
    packed_tables: bool = False
    per_layer_scales: bool = False
    text_only: bool = False
    allow_rescale: bool = False
    allow_requantize: bool = False
    shard_bytes: int = 5_000_000_000
    stacked_layers: bool = False
    prefill_lengths: tuple[int, ...] = (128,)
    cache_length: int = 1024
    dynamic_activations: bool = False

    def __post_init__(self) -> None:
        _expect("float_dtype", self.float_dtype, ("", "bfloat16", "float16", "float32"))
        _expect("tables", self.tables, get_args(TableType))
        if self.shard_bytes <= 0:
            raise ValueError(f"shard_bytes={self.shard_bytes}: expected a number from 1 up.")

    def check_used(self, format: str, known: Sequence[str]) -> None:
        """Raises ValueError where a choice was made that this format would ignore."""
        for field in dataclasses.fields(self):
            heeded = field.name in known or field.name.startswith("allow_")
            if not heeded and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name}={getattr(self, field.name)!r}: {format!r} has no such "
                    f"option; leave it out. It has {', '.join(known)}."
                )


def _expect(name: str, found: str, known: tuple[str, ...]) -> None:
    if found not in known:
        near = difflib.get_close_matches(found, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{name}={found!r} is not one of {', '.join(filter(None, known))}{hint}")
