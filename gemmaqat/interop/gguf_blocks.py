"""GGML's block formats: codes and scales to the bytes of a row, and back, without rounding.

Nothing is quantized here: an encoder takes what its block stores and a decoder gives exactly that.
Rows are `[R, K]`, bytes `[R, K / block * bytes]`; the layouts are ggml's (`ggml-common.h`), all
little-endian. `value(name)` of a block is written beside each pair of functions.
"""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

SUPERBLOCK = 256  # weights of a K-quant's block
SUB_BLOCK = 16  # weights under one of its sub-scales


class BlockType(NamedTuple):
    """A tensor type: ggml's number and the bytes of one block of so many weights."""

    name: str
    number: int
    block: int
    num_bytes: int


TYPES: dict[str, BlockType] = {
    entry.name: entry
    for entry in (
        BlockType("F32", 0, 1, 4),
        BlockType("F16", 1, 1, 2),
        BlockType("Q4_0", 2, 32, 18),
        BlockType("Q8_0", 8, 32, 34),
        BlockType("Q2_K", 10, SUPERBLOCK, 84),
        BlockType("Q6_K", 14, SUPERBLOCK, 210),
        BlockType("BF16", 30, 1, 2),
    )
}
BY_NUMBER = {entry.number: entry for entry in TYPES.values()}
FLOATS: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

# A block: the scale, then elements 0 and 16, 1 and 17, ... as nibbles, low ones first.
_Q4_0 = np.dtype([("d", "<f2"), ("first", "<u8"), ("last", "<u8")])
_HIGH_NIBBLES, _EIGHTS = np.uint64(0xF0F0F0F0F0F0F0F0), np.uint64(0x8888888888888888)
_SHIFTS = np.array([0, 2, 4, 6], np.uint8)


def row_bytes(kind: BlockType, length: int) -> int:
    """Bytes of a row of `length` weights, a multiple of the block."""
    return length // kind.block * kind.num_bytes


class Superblocks(NamedTuple):
    """Q6_K rows: value = code * (d * sub), the product exact in float32."""

    codes: np.ndarray  # int8 [R, K], -32 .. 31
    d: np.ndarray  # float16 [R, K / 256]
    sub: np.ndarray  # int8 [R, K / 16]

    @property
    def scales(self) -> np.ndarray:
        """float32 `[R, K / 16]`: a half times 8 bits has at most 19 significant ones."""
        return np.repeat(self.d.astype(np.float32), SUPERBLOCK // SUB_BLOCK, axis=-1) * self.sub


class AffineSuperblocks(NamedTuple):
    """Q2_K rows: value = code * (d * scale) - dmin * minimum."""

    codes: np.ndarray  # uint8 [R, K], 0 .. 3
    d: np.ndarray  # float16 [R, K / 256]
    dmin: np.ndarray  # float16 [R, K / 256]
    scales: np.ndarray  # uint8 [R, K / 16], 0 .. 15
    minima: np.ndarray  # uint8 [R, K / 16], 0 .. 15


def encode_q4_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes -8 .. 7 and half scales per 32 weights; value = code * scale."""
    raw = np.empty(codes.size // 32, _Q4_0)
    raw["d"] = np.asarray(scales, np.float16).reshape(-1)
    # Eight codes to a word: NumPy is slow along axes of 16.
    words = np.ascontiguousarray(codes).view("<u8").reshape(-1, 4)
    for i, field in enumerate(("first", "last")):
        packed = words[:, i + 2] << np.uint64(4)
        packed &= _HIGH_NIBBLES
        packed |= words[:, i] & ~_HIGH_NIBBLES
        packed ^= _EIGHTS  # two's complement plus 8 is the code with its bit 3 flipped
        raw[field] = packed
    return raw.view(np.uint8).reshape(codes.shape[0], -1)


def decode_q4_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes `[R, K]` and float16 scales `[R, K / 32]`."""
    blocks = np.ascontiguousarray(raw).reshape(-1).view(_Q4_0)
    words = np.empty((len(blocks), 4), "<u8")
    for i, field in enumerate(("first", "last")):
        packed = blocks[field]
        words[:, i] = packed & ~_HIGH_NIBBLES
        words[:, i + 2] = packed >> np.uint64(4) & ~_HIGH_NIBBLES
    codes = words.view(np.int8).reshape(raw.shape[0], -1)
    codes -= 8
    return codes, blocks["d"].copy().reshape(raw.shape[0], -1)


def encode_q8_0(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Codes -128 .. 127 and half scales per 32 weights; value = code * scale."""
    blocks = codes.reshape(codes.shape[0], -1, 32)
    raw = np.empty((*blocks.shape[:2], 34), np.uint8)
    raw[..., :2] = _half_bytes(scales)
    raw[..., 2:] = blocks.view(np.uint8)
    return raw.reshape(codes.shape[0], -1)


def decode_q8_0(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes `[R, K]` and float16 scales `[R, K / 32]`."""
    blocks = raw.reshape(raw.shape[0], -1, 34)
    codes = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
    return codes.reshape(raw.shape[0], -1), _halves(blocks[..., :2])


def encode_q6_k(rows: Superblocks) -> np.ndarray:
    """Low nibbles, high bit pairs, sub-scales, scale; codes are stored plus 32."""
    count = rows.codes.shape[0]
    codes = (rows.codes.view(np.uint8) + np.uint8(32)).reshape(count, -1, 2, 4, 32)
    raw = np.empty((*codes.shape[:2], 210), np.uint8)
    low = raw[..., :128].reshape(*codes.shape[:3], 64)
    # Of each half: the first 64 codes in low nibbles, the other 64 in high ones.
    nibbles = (codes & 15).reshape(*codes.shape[:3], 2, 64)
    np.bitwise_or(nibbles[..., 0, :], nibbles[..., 1, :] << 4, out=low)
    raw[..., :128] = low.reshape(*codes.shape[:2], 128)
    high = codes >> 4
    pairs = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    raw[..., 128:192] = pairs.reshape(*codes.shape[:2], 64)
    raw[..., 192:208] = rows.sub.view(np.uint8).reshape(count, -1, 16)
    raw[..., 208:] = _half_bytes(rows.d)
    return raw.reshape(count, -1)


def decode_q6_k(raw: np.ndarray) -> Superblocks:
    """The inverse of `encode_q6_k`."""
    count = raw.shape[0]
    blocks = raw.reshape(count, -1, 210)
    low = blocks[..., :128].reshape(count, -1, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(count, -1, 2, 4, 32)
    high = blocks[..., 128:192].reshape(count, -1, 2, 1, 32) >> _SHIFTS[:, None]
    codes = (low | (high & 3) << 4).view(np.int8)
    codes -= 32
    sub = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return Superblocks(codes.reshape(count, -1), _halves(blocks[..., 208:]), sub.reshape(count, -1))


def encode_q2_k(rows: AffineSuperblocks) -> np.ndarray:
    """Scales and minima in nibbles, codes in bit pairs, then the two half scales."""
    count = rows.codes.shape[0]
    codes = rows.codes.reshape(count, -1, 2, 4, 32)
    raw = np.empty((*codes.shape[:2], 84), np.uint8)
    raw[..., :16] = (rows.scales | rows.minima << 4).reshape(count, -1, 16)
    pairs = codes[..., 0, :] | codes[..., 1, :] << 2 | codes[..., 2, :] << 4 | codes[..., 3, :] << 6
    raw[..., 16:80] = pairs.reshape(*codes.shape[:2], 64)
    raw[..., 80:82] = _half_bytes(rows.d)
    raw[..., 82:] = _half_bytes(rows.dmin)
    return raw.reshape(count, -1)


def decode_q2_k(raw: np.ndarray) -> AffineSuperblocks:
    """The inverse of `encode_q2_k`."""
    count = raw.shape[0]
    blocks = raw.reshape(count, -1, 84)
    nibbles = blocks[..., :16].reshape(count, -1)
    pairs = blocks[..., 16:80].reshape(count, -1, 2, 1, 32) >> _SHIFTS[:, None]
    return AffineSuperblocks(
        (pairs & 3).reshape(count, -1),
        _halves(blocks[..., 80:82]),
        _halves(blocks[..., 82:]),
        nibbles & 15,
        nibbles >> 4,
    )


def q2_k_values(rows: AffineSuperblocks) -> np.ndarray:
    """float32 `[R, K]`, in ggml's order of operations."""
    per_block = SUPERBLOCK // SUB_BLOCK
    step = np.repeat(rows.d.astype(np.float32), per_block, axis=-1) * rows.scales
    low = np.repeat(rows.dmin.astype(np.float32), per_block, axis=-1) * rows.minima
    codes = rows.codes.astype(np.float32)
    return np.repeat(step, SUB_BLOCK, axis=-1) * codes - np.repeat(low, SUB_BLOCK, axis=-1)


def _half_bytes(scales: np.ndarray) -> np.ndarray:
    """`[R, B]` float16 as bytes `[R, B, 2]`."""
    return np.ascontiguousarray(scales, "<f2").view(np.uint8).reshape(*scales.shape, 2)


def _halves(raw: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(raw).view("<f2")[..., 0]


def as_rows(raw: Any, kind: BlockType, length: int) -> np.ndarray:
    """Bytes of whole rows as `[R, bytes of a row]`."""
    return np.frombuffer(raw, np.uint8).reshape(-1, row_bytes(kind, length))
