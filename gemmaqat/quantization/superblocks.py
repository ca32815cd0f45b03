"""Block scales as products of a superblock's half-precision scale and small integers, exactly.

Q6_K stores no scale per block of 16 but a half `d` per 256 weights and an int8 `sub` per 16, the
block's scale being `d * sub`. A product of 11 and 8 bits is exact in float32, so scales that are
such products can be stored and read back to the bit, whatever quantizer chose them. That includes
the lattice of an anchored 4-bit grid: among neighbours, scales of 5 significant bits are small
multiples of one power of two.
"""

from typing import NamedTuple

import numpy as np

SUPERBLOCK = 256  # weights under one `d`
SUBBLOCK = 16  # weights under one `sub`
_SUBS = SUPERBLOCK // SUBBLOCK
# Every float16 is an integer in this unit, its least subnormal.
_UNIT = 2.0**24


class SuperScales(NamedTuple):
    """Scales of rows of K weights, C = K / 256 superblocks each.

    Attributes:
        d: float16 [R, C].
        sub: int8 [R, C, 16].
        exact: bool [R, C]; where it is False, no pair gives these scales and `d` and `sub` are 0.
    """

    d: np.ndarray
    sub: np.ndarray
    exact: np.ndarray


def split(scales: np.ndarray, row_length: int) -> SuperScales:
    """Finds `d` and `sub` with `d * sub` equal to every scale, where there are such.

    Args:
        scales: [R, S], any float dtype; S scales share a row evenly, so blocks are of
            `row_length / S` weights: 16 or a multiple of it.
        row_length: weights of a row, a multiple of 256.

    Raises:
        ValueError: the row is no multiple of 256, or its blocks none of 16.
    """
    if row_length % SUPERBLOCK:
        raise ValueError(
            f"superblocks: a row of {row_length} weights is no multiple of {SUPERBLOCK}, which "
            "Q6_K needs; use Q8_0 or Q4_0 for this tensor."
        )
    rows, count = scales.shape
    if row_length % count or (row_length // count) % SUBBLOCK:
        raise ValueError(
            f"superblocks: {count} scales for a row of {row_length} weights are no blocks of a "
            f"multiple of {SUBBLOCK}."
        )
    repeats = row_length // count // SUBBLOCK
    wide = np.repeat(scales.astype(np.float64), repeats, axis=1).reshape(rows, -1, _SUBS)
    with np.errstate(invalid="ignore"):
        # Beyond the largest product there is no fit, and int64 would overflow.
        fits = np.all(np.isfinite(wide) & (np.abs(wide) <= 65504.0 * 128), axis=-1)
        units = np.where(fits[..., None], wide, 0.0) * _UNIT
    whole = units.astype(np.int64)
    fits &= np.all(whole == units, axis=-1)
    d, sub, exact = _divide(whole.reshape(-1, _SUBS))
    exact &= fits.reshape(-1)
    d, sub = np.where(exact, d, 0), np.where(exact[:, None], sub, 0)
    shape = (rows, row_length // SUPERBLOCK)
    return SuperScales(
        (d / _UNIT).astype(np.float16).reshape(shape),
        sub.astype(np.int8).reshape(*shape, _SUBS),
        exact.reshape(shape),
    )


def join(d: np.ndarray, sub: np.ndarray) -> np.ndarray:
    """The block scales, float32 [R, 16 C], of `d` [R, C] and `sub` [R, C, 16]."""
    return (d.astype(np.float32)[..., None] * sub.astype(np.float32)).reshape(len(d), -1)


def _divide(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers `[B, 16]` as `d [B] * sub [B, 16]`, all in units of the least subnormal half."""
    # The highest power of two that divides all: the lowest bit of their union. Enough for scales
    # of few bits, and cheap.
    union = np.bitwise_or.reduce(np.abs(scales), axis=-1)
    d = union & -union
    d, sub, exact = _signed(scales, np.maximum(d, 1))
    rest = np.flatnonzero(~exact)
    if rest.size:
        # Any `d` divides the greatest common divisor; of its parts the largest makes the smallest
        # integers, but a half holds only 11 bits of it.
        common = np.gcd.reduce(scales[rest], axis=-1)
        for parts in range(1, 129):
            some_d, some_sub, some_exact = _signed(scales[rest], np.maximum(common // parts, 1))
            d[rest], sub[rest], exact[rest] = some_d, some_sub, some_exact
            left = ~some_exact & (np.abs(scales[rest]).max(axis=-1) * parts <= 128 * common)
            rest, common = rest[left], common[left]
            if not rest.size:
                break
    return d, sub, exact


def _signed(scales: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The quotients by `d`, which turns negative where that brings 128 into the range of int8."""
    sub = scales // d[:, None]
    negate = sub.max(axis=-1) == 128
    d, sub = np.where(negate, -d, d), np.where(negate[:, None], -sub, sub)
    inside = (sub.min(axis=-1) >= -128) & (sub.max(axis=-1) <= 127)
    with np.errstate(over="ignore"):
        half = (d / _UNIT).astype(np.float16).astype(np.float64) * _UNIT == d
    return d, sub, inside & half & np.all(sub * d[:, None] == scales, axis=-1)
