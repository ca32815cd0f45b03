"""Dense bit streams: against a stream written out as one long integer."""

import numpy as np
import pytest

from gemmaqat.interop.bit_packing import pack_rows, packed_bytes, unpack_rows


def stream(row: np.ndarray, bits: int) -> bytes:
    """A row as one integer with element i at bit i * bits."""
    whole = sum((int(code) + 2 ** (bits - 1)) << (i * bits) for i, code in enumerate(row))
    return whole.to_bytes(packed_bytes(len(row), bits), "little")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("length", [1, 5, 32, 77])
def test_element_i_of_a_row_takes_bits_i_times_b_onwards(bits, length):
    rng = np.random.default_rng(bits * 100 + length)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, length)).astype(np.int8)
    packed = pack_rows(codes, bits)
    assert [row.tobytes() for row in packed] == [stream(row, bits) for row in codes]
    np.testing.assert_array_equal(unpack_rows(packed, bits, length), codes)


def test_padding_behind_a_row_is_not_read():
    codes = np.array([[-2, 1, 0, -1, 1]], np.int8)
    padded = np.concatenate([pack_rows(codes, 2), np.full((1, 6), 255, np.uint8)], axis=1)
    np.testing.assert_array_equal(unpack_rows(padded, 2, 5), codes)
