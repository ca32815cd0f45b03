"""Floats on their way into a file, whatever its format: what their rounding is called, or refused.

A quantized tensor goes out as the values of its grid, which the file's type must hold; a kept one
may be rounded, but not to infinity.
"""

from typing import Any, NamedTuple

import numpy as np

from gemmaqat.interop.options import ExportOptions, Kind
from gemmaqat.interop.shipment import ShippedTensor
from gemmaqat.interop.source import values


class Rounded(NamedTuple):
    """Some rows in the dtype of the file, and what became of them."""

    values: np.ndarray  # [R, K]
    kind: Kind  # kept, where there is no grid; else exact or requantized
    note: str  # "" where every value is what it was


def to_dtype(tensor: ShippedTensor, piece: Any, dtype: np.dtype, options: ExportOptions) -> Rounded:
    """What `tensor.read` gave, as floats of a dtype.

    Raises:
        ValueError: a value would become infinite; or the dtype does not hold the values of the
            grid, and requantizing is not allowed.
    """
    kept = tensor.grid is None
    if kept and piece.dtype == dtype:
        return Rounded(piece, "kept", "")
    found = values(tensor, piece)
    with np.errstate(over="ignore"):
        stored = found.astype(dtype)
    if np.array_equal(stored.astype(np.float32), found, equal_nan=True):
        return Rounded(stored, "kept" if kept else "exact", "")
    if np.any(np.isinf(stored) & np.isfinite(found)):
        raise ValueError(
            f"{tensor.path}: holds values beyond {dtype.name}'s "
            f"{65504 if dtype == np.float16 else 'largest'}; export it in another type, bfloat16 "
            "or float32 (float_dtype)."
        )
    if tensor.grid is not None and not options.allow_requantize:
        raise ValueError(
            f"{tensor.path}: code x scale of {tensor.grid.describe()} is not exact in "
            f"{dtype.name}; use scales of fewer significant bits (scale_bits=5 for 4-bit codes), "
            "store it in float32 (float_dtype), or allow requantizing (allow_requantize)."
        )
    return Rounded(stored, "kept" if kept else "requantized", f"rounded to {dtype.name}")
