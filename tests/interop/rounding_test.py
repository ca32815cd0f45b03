"""One rule for floats in every format: rounding is told, what a grid loses and infinity refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.rounding import to_dtype
from gemmaqat.interop.shipment import Piece, ShippedTensor
from gemmaqat.quantization.grid import Grid

BFLOAT16, FLOAT16, FLOAT32 = (jnp.dtype(name) for name in ("bfloat16", "float16", "float32"))
GRID = Grid(bits=4, block=16)


def tensor(piece, grid=None) -> ShippedTensor:
    return ShippedTensor(
        path="layers/0/mlp/up_proj/weight", shape=(1, 16), grid=grid, dtype=FLOAT32,
        read=lambda start, stop: piece,
    )  # fmt: skip


def codes(scale: float) -> Piece:
    return Piece(np.arange(-8, 8, dtype=np.int8)[None], np.array([[scale]], np.float32))


def test_kept_floats_may_be_rounded_and_are_then_said_to_be():
    piece = np.float32([[1.0, 1 + 2**-20]])
    for dtype, note in ((FLOAT32, ""), (BFLOAT16, "rounded to bfloat16")):
        stored = to_dtype(tensor(piece), piece, dtype, ExportOptions())
        np.testing.assert_array_equal(stored.values, piece.astype(dtype))
        assert (stored.values.dtype, stored.kind, stored.note) == (dtype, "kept", note)


def test_not_a_number_is_passed_on_and_no_rounding():
    piece = np.float32([[np.nan, np.inf]])
    assert to_dtype(tensor(piece), piece, BFLOAT16, ExportOptions()).note == ""


@pytest.mark.parametrize("scale, exact", [(0.5, True), (1 + 2**-20, False)])
def test_values_of_a_grid_are_exact_or_refused_or_requantized(scale, exact):
    piece = codes(scale)
    if exact:
        stored = to_dtype(tensor(piece, GRID), piece, BFLOAT16, ExportOptions())
        assert (stored.kind, stored.note) == ("exact", "")
        return
    with pytest.raises(ValueError, match=r"up_proj.*not exact in bfloat16.*scale_bits=5"):
        to_dtype(tensor(piece, GRID), piece, BFLOAT16, ExportOptions())
    allowed = ExportOptions(allow_requantize=True)
    stored = to_dtype(tensor(piece, GRID), piece, BFLOAT16, allowed)
    assert (stored.kind, stored.note) == ("requantized", "rounded to bfloat16")


@pytest.mark.parametrize("grid", [None, GRID])
def test_no_finite_value_becomes_infinite_whatever_is_allowed(grid):
    piece = codes(1e5) if grid else np.float32([[1e6]])
    with pytest.raises(ValueError, match="beyond float16's 65504; .*bfloat16"):
        to_dtype(tensor(piece, grid), piece, FLOAT16, ExportOptions(allow_requantize=True))
