"""Codes of keys and values: what NumPy gives in float64, packed as said, and bad numbers shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmaqat.models.kv_codes import init_codes, quantize_like

SHAPE = (2, 5, 3, 16)


def numbers(scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(0).standard_normal(SHAPE)).astype(np.float32)


def quantize(x, quantization, static_scale=None):
    like = init_codes((1, 1, 1, x.shape[-1]), quantization, static_scale=static_scale)
    return quantize_like(jnp.asarray(x), like)


def test_static_codes_use_the_whole_range_and_clip_beyond():
    scale = np.float32(0.037)
    x = numbers(3.0)
    got = quantize(x, "static", scale)
    wanted = np.clip(np.rint(x.astype(np.float64) / scale), -128, 127)
    assert wanted.min() == -128 and wanted.max() == 127
    np.testing.assert_array_equal(got.codes, wanted)
    np.testing.assert_array_equal(got.astype(jnp.float32), wanted.astype(np.float32) * scale)


def test_ties_go_to_the_even_code():
    x = np.array([0.5, 1.5, -0.5, -2.5, 126.5, 127.5, -128.5, -129.0]).reshape(1, 1, 1, 8)
    got = quantize(x.astype(np.float32), "static", 1.0)
    assert got.codes.ravel().tolist() == [0, 2, 0, -2, 126, 127, -128, -128]


def test_compiled_ties_of_a_static_scale_fall_as_in_numpy():
    scale = np.float32(0.037)
    x = ((np.arange(-130, 130, dtype=np.float32) + np.float32(0.5)) * scale).reshape(1, 1, 1, -1)
    like = init_codes((1, 1, 1, x.shape[-1]), "static", static_scale=scale)
    got = jax.jit(quantize_like)(jnp.asarray(x), like)
    np.testing.assert_array_equal(got.codes, np.clip(np.rint(x / scale), -128, 127))


@pytest.mark.parametrize("quantization, most", [("int8", 127), ("int4", 7)])
def test_dynamic_values_lie_within_half_a_step_of_the_number(quantization, most):
    x = numbers(4.0)
    step = np.abs(x.astype(np.float64)).max(axis=-1, keepdims=True) / most
    got = quantize(x, quantization)
    np.testing.assert_allclose(got.scales, step, rtol=2e-7)
    error = np.abs(np.asarray(got.astype(jnp.float32), np.float64) - x)
    assert (error <= 0.5 * step * (1 + 1e-6)).all() and error.max() > 0.4 * step.min()
    largest = np.take_along_axis(x, np.abs(x).argmax(-1)[..., None], -1)
    kept = np.take_along_axis(
        np.asarray(got.astype(jnp.float32)), np.abs(x).argmax(-1)[..., None], -1
    )
    np.testing.assert_allclose(kept, largest, rtol=2e-7)


def test_four_bit_codes_lie_two_in_a_byte_halves_of_the_head_apart():
    x = np.array([7, -7, 3, 0, -1, 5, -4, 2], np.float32).reshape(1, 1, 1, 8)
    got = quantize(x, "int4")
    low, high = x[..., :4].astype(np.int8), x[..., 4:].astype(np.int8)
    np.testing.assert_array_equal(got.codes, ((low & 15) | ((high & 15) << 4)).astype(np.uint8))
    np.testing.assert_array_equal(got.astype(jnp.float32), x)  # the scale is 1: exact


@pytest.mark.parametrize("quantization", ["static", "int8", "int4"])
def test_quantizing_twice_changes_nothing(quantization):
    """So that a model whose hooks have rounded its keys stores just the codes they chose."""
    for dtype in (jnp.float32, jnp.bfloat16):
        once = quantize(numbers(), quantization, 0.0173)
        values = once.astype(dtype)
        twice = quantize(values, quantization, 0.0173)
        np.testing.assert_array_equal(once.codes, twice.codes)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_zeros_stay_zeros_and_what_is_no_number_stays_none(quantization):
    x = numbers()
    x[0, 0, 0] = 0
    x[0, 1, 0, 3] = np.nan
    x[0, 2, 0, 3] = np.inf
    x[0, 3, 0] = 1e-45  # the step rounds to zero
    back = np.asarray(quantize(x, quantization).astype(jnp.float32))
    assert (back[0, 0, 0] == 0).all() and np.isfinite(back[0, 3, 0]).all()
    assert np.isnan(back[0, 1, 0]).all() and np.isnan(back[0, 2, 0]).all()
    assert np.isfinite(back[1]).all() and np.isfinite(back[0, :, 1:]).all()


@pytest.mark.parametrize(
    "quantization, nbytes",
    [("static", 4 * 6 * 2 * 16 + 4), ("int8", 4 * 6 * 2 * (16 + 4)), ("int4", 4 * 6 * 2 * (8 + 4))],
)
def test_bytes_are_those_of_codes_and_scales(quantization, nbytes):
    assert init_codes((4, 6, 2, 16), quantization, static_scale=1.0).nbytes == nbytes
