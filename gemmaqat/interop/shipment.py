"""`Shipment`: a checkpoint as the list of its tensors, each read a few rows at a time.

Every export, import, verification and conversion passes through this one form, so writers take
codes and scales and never floats to be rounded again, and a reader of one format feeds the writer
of any other. Nothing here holds a whole tensor: a piece is a range of rows.

A tensor lies as deployed files have it: `[..., out, in]`, blocks along the last axis, the leading
axes flattened into rows. Our own `[in, out]` matrices are swapped on the way in and out.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemmaqat.models.config import ModelConfig
from gemmaqat.quantization.grids import Grid
from gemmaqat.quantization.table import Table

TOKEN_TABLE, PER_LAYER_TABLE = "embed_tokens/weight", "embed_tokens_per_layer/weight"
VOCABULARY_TABLES = (TOKEN_TABLE, PER_LAYER_TABLE)


class Piece(NamedTuple):
    """Some rows of a quantized tensor: value = level(code) * scale, in float32."""

    codes: np.ndarray  # int8 [R, K]
    scales: np.ndarray  # [R, K / block], [R, 1] for one scale per row; in the grid's scale dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShippedTensor:
    """One parameter of the model, quantized or kept.

    Attributes:
        path: the parameter's path in our model, e.g. `layers/3/self_attn/q_proj/weight`.
        shape: as deployed files have it, `[..., out, in]`; `()` for a scalar.
        grid: the grid of its codes; None = kept in float.
        dtype: of the floats of a kept tensor, of the source's floats of a quantized one.
        read: `(start, stop)` to these rows: a `Piece` where there is a grid, else floats `[R, K]`
            in `dtype`. A tensor of rank 0 or 1 is one row.
    """

    path: str
    shape: tuple[int, ...]
    grid: Grid | None
    dtype: np.dtype
    read: Callable[[int, int], Any]

    @property
    def row_length(self) -> int:
        """K: elements of a row, the contraction axis."""
        return self.shape[-1] if self.shape else 1

    @property
    def num_rows(self) -> int:
        """Rows of the flattened tensor, experts included."""
        return int(np.prod(self.shape[:-1], dtype=np.int64)) if len(self.shape) > 1 else 1

    @property
    def num_weights(self) -> int:
        """Number of elements."""
        return self.num_rows * self.row_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class CarriedTensor:
    """A tensor that is not ours (towers, embedders, unused shared keys): bytes to be passed on."""

    name: str  # the whole name in the source file
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]
    read: Callable[[int, int], memoryview]  # bytes start .. stop
    num_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shipment:
    """A model on its way: what readers give and writers take.

    Attributes:
        config: the text decoder.
        table: what happened to every parameter; its entries and `tensors` have the same paths.
        tensors: by path, in the order of the model.
        carried: by name, what is passed on byte for byte.
        files: by name, companions of the weights (tokenizer.json, generation_config.json, ...).
        released_config: the source's own config.json, multimodal parts and all; None = made anew
            from `config`.
        provenance: what the certificate tells of the source: recipe, hashes, metrics file.
    """

    config: ModelConfig
    table: Table
    tensors: Mapping[str, ShippedTensor]
    carried: Mapping[str, CarriedTensor] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    released_config: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
