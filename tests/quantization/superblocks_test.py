"""Block scales split into a half and int8: exactly, or not at all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmaqat.quantization.superblocks import join, split


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(0, 31), spread=st.integers(1, 128))
def test_every_product_of_a_half_and_int8_is_split_and_joined_to_the_bit(seed, exponent, spread):
    rng = np.random.default_rng(seed)
    # Bit patterns of a binade of halves, the subnormal one and the highest finite one included.
    pattern = rng.integers(0, 1024, (8, 3)) + 1024 * np.minimum(exponent, 30)
    d = pattern.astype(np.uint16).view(np.float16) * rng.choice([-1, 1], (8, 3)).astype(np.float16)
    sub = rng.integers(-spread, min(spread, 127) + 1, (8, 3, 16)).astype(np.int8)
    scales = join(d, sub)
    parts = split(scales, 768)
    assert parts.exact.all()
    np.testing.assert_array_equal(join(parts.d, parts.sub), scales)
    assert parts.d.dtype == np.float16 and parts.sub.dtype == np.int8


def test_scales_of_five_bits_within_two_octaves_fit_and_their_d_is_a_power_of_two():
    rng = np.random.default_rng(0)
    mantissa, octave = rng.integers(16, 32, (64, 8)), rng.integers(0, 3, (64, 8))
    scales = (mantissa * 2.0 ** (octave - 14) * rng.choice([-1, 1], (64, 8))).astype(np.float32)
    parts = split(scales, 256)  # 8 blocks of 32
    assert parts.exact.all()
    assert np.all(np.frexp(parts.d.astype(np.float64))[0] == 0.5)
    np.testing.assert_array_equal(join(parts.d, parts.sub), np.repeat(scales, 2, axis=1))


@pytest.mark.parametrize(
    "scales",
    [
        [1.0, 1 + 2.0**-10],  # two scales of 11 bits that share no divisor
        [1.0, 2.0**-8],  # 256 times as large
        [2.0**-25, 0.0],  # below the least half
        [2.0**-24, 129 * 2.0**-24],
        [65536.0 * 129, 0.0],
        [np.inf, 1.0],
        [np.nan, 1.0],
    ],
    ids=str,
)
def test_scales_that_are_no_such_products_are_told_and_spoil_no_neighbour(scales):
    row = np.concatenate([np.repeat(scales, 8), np.full(16, 0.75)]).astype(np.float64)
    parts = split(row[None], 512)
    np.testing.assert_array_equal(parts.exact, [[False, True]])
    assert not parts.d[0, 0] and not parts.sub[0, 0].any()
    np.testing.assert_array_equal(join(parts.d, parts.sub)[0, 16:], 0.75)


@pytest.mark.parametrize("scales", [[128.0, 1.0], [-128.0, 1.0], [65504.0 * 128, 0], [0.0, 0.0]])
def test_extremes_of_the_range_fit(scales):
    row = np.repeat(scales, 8)[None]
    parts = split(row, 256)
    assert parts.exact.all()
    np.testing.assert_array_equal(join(parts.d, parts.sub), row)


def test_a_common_divisor_too_long_for_a_half_is_shared_with_the_integers():
    # 4099 = the product needs 13 bits; 3 x 4099 and 5 x 4099 have no divisor a half can hold but
    # small ones, 3 x 2731 has.
    long_prime = np.repeat([3.0 * 4099, 5.0 * 4099], 8)[None] / 2**13
    assert not split(long_prime, 256).exact.any()
    composite = np.repeat([35.0 * 2047, 7.0 * 2047], 8)[None] / 2**13
    parts = split(composite, 256)
    assert parts.exact.all()
    np.testing.assert_array_equal(join(parts.d, parts.sub), composite)


def test_rows_and_blocks_that_q6_k_cannot_hold_are_refused():
    with pytest.raises(ValueError, match="192 weights is no multiple of 256.*Q8_0 or Q4_0"):
        split(np.ones((2, 12)), 192)
    with pytest.raises(ValueError, match="32 scales for a row of 256 weights are no blocks"):
        split(np.ones((2, 32)), 256)
