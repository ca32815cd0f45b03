"""How one tensor of a shipment is stored in a GGUF: which block type, and its rows as bytes.

Codes go into the smallest type that holds them unchanged: 2-bit ones into Q2_K, up to 4 bits into
Q4_0, blocks of 16 into Q6_K, the rest into Q8_0. What no type holds is refused with the option of
the recipe that would fix it, unless the export allows other scales or other codes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gemmaqat.interop import gguf_blocks as blocks
from gemmaqat.interop.gguf_blocks import SUB_BLOCK, SUPERBLOCK, TYPES, BlockType
from gemmaqat.interop.options import ExportOptions, Kind
from gemmaqat.interop.rounding import to_dtype
from gemmaqat.interop.shipment import VOCABULARY_TABLES, Piece, ShippedTensor
from gemmaqat.interop.source import values
from gemmaqat.quantization import superblocks
from gemmaqat.quantization.grids import CHANNEL, TENSOR, Grid, quantize
from gemmaqat.quantization.recipes import recipe

MODEL_PROJECTION = "per_layer_model_projection/weight"
_WORSE: dict[Kind, int] = {"exact": 0, "kept": 0, "rescaled": 1, "requantized": 2}
_FLOAT_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FLOAT_OPTIONS = {"f16": "F16", "bf16": "BF16", "f32": "F32"}
_BLOCK_OPTIONS = {"q4_0": "Q4_0", "q8_0": "Q8_0", "q6_k": "Q6_K"}


class Encoded(NamedTuple):
    """Some rows as bytes, and what became of them."""

    raw: np.ndarray  # uint8 [R, bytes of a row]
    kind: Kind
    note: str = ""


@dataclasses.dataclass
class Storage:
    """The type of a tensor and its encoder; `kind` is the worst of the rows encoded so far.

    With `keeps_grid` the codes and scales that are stored are those of the tensor's own grid, or
    the encoder raises; without it, that shows while encoding.
    """

    tensor: ShippedTensor
    type: BlockType
    encoder: Callable[[Any], Encoded]
    note: str = ""
    keeps_grid: bool = False
    kind: Kind = "exact"

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.tensor.num_rows * blocks.row_bytes(self.type, self.tensor.row_length)

    def encode(self, piece: Any) -> np.ndarray:
        """Bytes of what `tensor.read` gave."""
        raw, kind, note = self.encoder(piece)
        if _WORSE[kind] >= _WORSE[self.kind]:
            self.kind = kind
        if note not in self.note:
            self.note = "; ".join(filter(None, (self.note, note)))
        return raw


def choose(tensor: ShippedTensor, options: ExportOptions) -> Storage:
    """The storage of one tensor.

    Raises:
        ValueError: no type holds its grid and the options allow no other.
    """
    if len(tensor.shape) < 2 or tensor.path.endswith("router/proj/weight"):
        return _floats(tensor, TYPES["F32"], options)
    if tensor.path == MODEL_PROJECTION:
        note = "" if tensor.grid is None else "decoded: llama.cpp keeps this matrix in float"
        return _floats(tensor, _float_type(tensor, options), options, note)
    wanted = options.tables if tensor.path in VOCABULARY_TABLES else "as_is"
    if wanted in _FLOAT_OPTIONS:
        note = "" if tensor.grid is None else "decoded from its codes"
        return _floats(tensor, TYPES[_FLOAT_OPTIONS[wanted]], options, note)
    if tensor.grid is None:
        if wanted == "as_is":
            return _floats(tensor, _float_type(tensor, options), options)
        kind, note = _fitting(tensor, TYPES[_BLOCK_OPTIONS[wanted]])
        return _requantized(tensor, kind, options, note)
    if wanted == "as_is":
        return _own_type(tensor, tensor.grid, options)
    return _given_type(tensor, tensor.grid, TYPES[_BLOCK_OPTIONS[wanted]], options)


def _float_type(tensor: ShippedTensor, options: ExportOptions) -> BlockType:
    if options.float_dtype:
        return TYPES[_FLOAT_NAMES[options.float_dtype]]
    grid = tensor.grid
    if grid is None:
        return TYPES[_FLOAT_NAMES.get(tensor.dtype.name, "F32")]
    # Code times scale is exact in the 8 significant bits of bfloat16 up to here.
    safe = grid.scale_bits is not None and grid.bits - 1 + grid.scale_bits <= 8
    return TYPES["BF16" if safe and grid.levels == "full" else "F32"]


def _floats(
    tensor: ShippedTensor, kind: BlockType, options: ExportOptions, note: str = ""
) -> Storage:
    dtype = blocks.FLOATS[kind.name]

    def encode(piece: Any) -> Encoded:
        stored, result, rounded = to_dtype(tensor, piece, dtype, options)
        raw = np.ascontiguousarray(stored).view(np.uint8)
        return Encoded(raw.reshape(len(stored), -1), result, rounded)

    return Storage(tensor, kind, encode, note)


def _own_type(tensor: ShippedTensor, grid: Grid, options: ExportOptions) -> Storage:
    """The smallest type that holds codes of this grid."""
    length = tensor.row_length
    if length % 32:
        raise ValueError(
            f"{tensor.path}: rows of {length} weights, GGUF's quantized types need a multiple of "
            "32; keep this weight in float (weight_qtype=None in a rule for it)."
        )
    wide = _scale_block(tensor, grid)
    if grid.bits == 2 and wide % SUPERBLOCK == 0:
        return _q2_k(tensor, grid, options)
    if wide % 32:
        if length % SUPERBLOCK == 0 and grid.bits <= 6 and grid.levels != "half":
            return _q6_k(tensor, options)
        raise ValueError(
            f"{tensor.path}: {grid.describe()} has a scale per {wide} weights; GGUF holds one per "
            "32 (or per 16 up to 6 bits where rows are a multiple of 256): set tile_size=32 in its "
            "rule."
        )
    if grid.bits > 4:
        return _block_32(tensor, grid, TYPES["Q8_0"], options)
    note = ""
    if grid.bits == 2:
        extra = blocks.row_bytes(TYPES["Q4_0"], length) - length * 84 // SUPERBLOCK
        note = (
            f"Q2_K needs rows of a multiple of 256 under one scale: {extra * tensor.num_rows:,} "
            "bytes more than there"
        )
    return _block_32(tensor, grid, TYPES["Q4_0"], options, note)


def _given_type(
    tensor: ShippedTensor, grid: Grid, kind: BlockType, options: ExportOptions
) -> Storage:
    """Codes of a table in the type that the export names, where they fit."""
    kind, note = _fitting(tensor, kind)
    fits_32 = _scale_block(tensor, grid) % 32 == 0 and grid.levels != "half"
    if kind.name == "Q6_K" and grid.bits <= 6 and grid.levels != "half":
        return _q6_k(tensor, options)
    if kind.name == "Q8_0" and fits_32 or kind.name == "Q4_0" and grid.bits <= 4 and fits_32:
        return _block_32(tensor, grid, kind, options, note)
    if not options.allow_requantize:
        raise ValueError(
            f"{tensor.path}: {grid.describe()} does not fit {kind.name}; leave tables='as_is', "
            "give the table a rule of that grid, or allow requantizing (allow_requantize)."
        )
    return _requantized(tensor, kind, options, note)


def _fitting(tensor: ShippedTensor, kind: BlockType) -> tuple[BlockType, str]:
    """The type, or the nearest one that the row length allows."""
    length = tensor.row_length
    if length % kind.block == 0:
        return kind, ""
    other = "Q8_0" if length % 32 == 0 else "F16"
    if other == "Q8_0" and tensor.grid is not None and tensor.grid.bits <= 4:
        other = "Q4_0"
    return TYPES[other], f"{other}: rows of {length} are no multiple of {kind.block}"


def _scale_block(tensor: ShippedTensor, grid: Grid) -> int:
    """Weights of a row under one scale."""
    return tensor.row_length if grid.block in (CHANNEL, TENSOR) else grid.block


def _block_32(
    tensor: ShippedTensor, grid: Grid, kind: BlockType, options: ExportOptions, note: str = ""
) -> Storage:
    """Q4_0 and Q8_0: the codes as they are, each scale as often as it is needed."""
    function = blocks.encode_q4_0 if kind.name == "Q4_0" else blocks.encode_q8_0
    half = grid.levels == "half"
    if half and not options.allow_rescale:
        raise ValueError(
            f"{tensor.path}: {grid.describe()} has levels between whole codes, which {kind.name} "
            "does not hold; use levels='full' in its rule, or allow_rescale to write 2 x code + 1 "
            "under half the scale (the same values)."
        )

    def encode(piece: Piece) -> Encoded:
        codes, scales = piece
        if half:
            codes, scales = 2 * codes + np.int8(1), scales.astype(np.float32) / 2
        stored, result = _as_halves(tensor, scales, options)
        stored = np.repeat(stored, codes.shape[1] // 32 // stored.shape[1], axis=1)
        return Encoded(function(codes, stored), "rescaled" if half else result)

    halves = grid.scale_dtype == "float16" or not options.allow_rescale
    return Storage(tensor, kind, encode, note, keeps_grid=halves and not half)


def _q2_k(tensor: ShippedTensor, grid: Grid, options: ExportOptions) -> Storage:
    """Levels `(code - 2) * d` (or `(2 code - 3) * d / 2`): small integers for scale and minimum."""
    scale, minimum, divisor = (2, 3, 2) if grid.levels == "half" else (1, 2, 1)

    def encode(piece: Piece) -> Encoded:
        stored, result = _as_halves(tensor, piece.scales.astype(np.float32) / divisor, options)
        count, length = piece.codes.shape
        d = np.repeat(stored, length // SUPERBLOCK // stored.shape[1], axis=1)
        full = lambda value: np.full((count, length // SUB_BLOCK), value, np.uint8)  # noqa: E731
        rows = blocks.AffineSuperblocks(
            (piece.codes + np.int8(2)).view(np.uint8), d, d, full(scale), full(minimum)
        )
        return Encoded(blocks.encode_q2_k(rows), result)

    return Storage(tensor, TYPES["Q2_K"], encode, keeps_grid=not options.allow_rescale)


def _q6_k(tensor: ShippedTensor, options: ExportOptions) -> Storage:
    """Codes as they are, scales split into a half and small integers."""

    def encode(piece: Piece) -> Encoded:
        found = superblocks.split(piece.scales, piece.codes.shape[1])
        if found.exact.all():
            sub = found.sub.reshape(len(found.sub), -1)
            return Encoded(
                blocks.encode_q6_k(blocks.Superblocks(piece.codes, found.d, sub)), "exact"
            )
        if not options.allow_requantize:
            lost = 1 - found.exact.mean()
            raise ValueError(
                f"{tensor.path}: {lost:.2%} of its superblocks have scales that are no small "
                "multiples of one half-precision number, which Q6_K needs; write it as Q4_0 or "
                "Q8_0 (tables='q4_0'), give it a rule with weight_qtype='q6_k', or allow "
                "requantizing (allow_requantize)."
            )
        return Encoded(quantize_rows(values(tensor, piece), TYPES["Q6_K"]), "requantized")

    return Storage(tensor, TYPES["Q6_K"], encode, keeps_grid=not options.allow_requantize)


def _requantized(
    tensor: ShippedTensor, kind: BlockType, options: ExportOptions, note: str = ""
) -> Storage:
    """New codes for a float table, or for one whose grid the type does not hold."""
    if kind.name in blocks.FLOATS:
        return _floats(tensor, kind, options, note)

    def encode(piece: Any) -> Encoded:
        return Encoded(quantize_rows(values(tensor, piece), kind), "requantized")

    return Storage(tensor, kind, encode, note)


def quantize_rows(rows: np.ndarray, kind: BlockType) -> np.ndarray:
    """Float rows to blocks, by the grid of the recipe of that name."""
    name = {"Q4_0": "q4_0", "Q8_0": "q8_0_ggml", "Q6_K": "q6_k"}[kind.name]
    grid = recipe(name)[-1].grid(rows.shape[1])
    codes, scales = (np.asarray(part) for part in quantize(rows, grid, axis=-1))
    if kind.name == "Q6_K":
        found = superblocks.split(scales, rows.shape[1])
        assert found.exact.all(), "the q6_k grid gives scales that Q6_K holds"
        sub = found.sub.reshape(len(rows), -1)
        return blocks.encode_q6_k(blocks.Superblocks(codes, found.d, sub))
    function = blocks.encode_q4_0 if kind.name == "Q4_0" else blocks.encode_q8_0
    return function(codes, scales)


def _as_halves(
    tensor: ShippedTensor, scales: np.ndarray, options: ExportOptions
) -> tuple[np.ndarray, Kind]:
    """Scales in float16, which every block type stores; whether they are still the same."""
    if scales.dtype == np.float16:
        stored, same = scales, bool(np.isfinite(scales).all())
    else:
        wide = scales.astype(np.float32)
        with np.errstate(over="ignore"):
            stored = wide.astype(np.float16)
        same = bool(np.all(stored.astype(np.float32) == wide))
    if same:
        return stored, "exact"
    if not np.all(np.isfinite(stored)):
        raise ValueError(
            f"{tensor.path}: a scale is not finite or beyond float16's 65504; take an earlier "
            "checkpoint."
        )
    if not options.allow_rescale:
        assert tensor.grid is not None
        raise ValueError(
            f"{tensor.path}: {tensor.grid.describe()} has scales that are not float16 numbers, "
            "which every GGUF block stores; train with scale_dtype='float16' in its rule (as the "
            "recipe q4_0 does), or allow rounding them (allow_rescale)."
        )
    return stored, "rescaled"
