"""Integer grids: rounding bounds, zero blocks, idempotence, and the straight-through gradient."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmaqat.quantization.grid import (
    CHANNEL,
    NAMED_GRIDS,
    SCALE_DTYPES,
    SCALE_RULES,
    TENSOR,
    Grid,
)
from gemmaqat.quantization.grids import dequantize, fake_quantize_array, quantize

GRIDS = {
    "int8 channel": Grid(bits=8),
    "int4 tensor": Grid(bits=4, block=TENSOR),
    "int4 block 16 half scale": Grid(bits=4, block=16, scale_rule="absmax_half"),
    "q4_0": Grid(bits=4, block=32, scale_rule="ggml", scale_dtype="float16"),
    "q4_0 after": Grid(
        bits=4,
        block=32,
        scale_rule="ggml",
        scale_dtype="float16",
        round_scale="after",
        rounding="up",
    ),
    "q8_0 after": Grid(
        bits=8, block=32, scale_dtype="float16", round_scale="after", rounding="away"
    ),
    "int3 channel bf16": Grid(bits=3, scale_dtype="bfloat16"),
    "int2 mean": Grid(bits=2, scale_rule="mean_abs", scale_factor=1.4),
    "int4 searched": Grid(bits=4, block=64, scale_rule="mse"),
    "half-integer": Grid(bits=2, levels="half", scale_rule="mean_abs", scale_factor=1.25),
    "ternary": Grid(bits=2, levels="ternary", scale_rule="mean_abs"),
    "5 significant bits": Grid(bits=4, block=32, scale_bits=5),
    "anchored": NAMED_GRIDS["q4_0"],
    "anchored channel int3": Grid(
        bits=3, scale_rule="ggml", scale_dtype="bfloat16", scale_bits=6, anchor=True
    ),
    "anchored tensor int8": Grid(bits=8, block=TENSOR, scale_rule="ggml", anchor=True),
    "q6_k": NAMED_GRIDS["q6_k"],
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))


def weights(shape=(256, 24), seed=0):
    w = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    w[..., 1] *= 1e-4
    w[..., 2] *= 1e4
    w[..., 3] = 0
    w[..., 4] = -0.25
    return jnp.asarray(w)


@every_grid
def test_fake_quantization_is_dequantization_of_the_codes_to_the_bit(grid):
    w = weights()
    codes = quantize(w, grid)
    value = dequantize(codes.codes, codes.scales, grid)
    for fake in (
        fake_quantize_array(w, grid),
        jax.jit(lambda w: fake_quantize_array(w * 1.0, grid) + 0.0)(w),
        jax.vjp(lambda w: fake_quantize_array(w, grid), w)[0],
    ):
        np.testing.assert_array_equal(fake, value)
    assert codes.codes.dtype == jnp.int8
    assert codes.scales.dtype == grid.scale_dtype
    assert codes.scales.shape == grid.scale_shape(w.shape, -2)
    assert int(codes.codes.min()) >= grid.lowest and int(codes.codes.max()) <= grid.highest


# Not of a mean: XLA adds up the two orders of memory differently, which moves its last bit.
@pytest.mark.parametrize("name", [n for n, g in GRIDS.items() if g.scale_rule != "mean_abs"])
def test_a_table_gets_the_codes_of_its_transpose(name):
    grid = GRIDS[name]
    w = weights()
    matrix, table = quantize(w, grid), quantize(w.T, grid, -1)
    np.testing.assert_array_equal(matrix.codes, table.codes.T)
    np.testing.assert_array_equal(matrix.scales, table.scales.T)


@pytest.mark.parametrize(
    "name", ["q4_0", "int8 channel", "int4 searched", "int4 tensor", "anchored", "q6_k"]
)
def test_experts_are_quantized_one_by_one(name):
    grid, w = GRIDS[name], weights((3, 256, 24))
    together = quantize(w, grid)
    for e in range(3):
        alone = quantize(w[e], grid)
        np.testing.assert_array_equal(together.codes[e], alone.codes)
        np.testing.assert_array_equal(together.scales[e], alone.scales)


@every_grid
def test_gradient_passes_straight_through(grid):
    w, upstream = weights(), weights(seed=1)

    def loss(w):
        return jnp.sum(fake_quantize_array(w, grid) * upstream)

    # The textbook estimator: w + stop_gradient(quantized - w).
    def textbook(w):
        codes = quantize(w, grid)
        value = dequantize(codes.codes, codes.scales, grid)
        return jnp.sum((w + jax.lax.stop_gradient(value - w)) * upstream)

    np.testing.assert_array_equal(jax.grad(loss)(w), upstream)
    np.testing.assert_array_equal(jax.grad(loss)(w), jax.grad(textbook)(w))


@every_grid
def test_zero_block_stays_zero(grid):
    codes = quantize(jnp.zeros((256, 2)), grid)
    np.testing.assert_array_equal(dequantize(codes.codes, codes.scales, grid), np.zeros((256, 2)))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    block=st.sampled_from([16, 32, CHANNEL, TENSOR]),
    exponent=st.integers(-12, 6),
    seed=st.integers(0, 2**16),
)
def test_rounding_error_is_at_most_half_a_step(bits, scale_dtype, block, exponent, seed):
    grid = Grid(bits=bits, block=block, scale_dtype=scale_dtype)
    w = np.random.default_rng(seed).standard_normal((32, 4)).astype(np.float32) * 2.0**exponent
    codes = quantize(jnp.asarray(w), grid)
    value = np.asarray(dequantize(codes.codes, codes.scales, grid))
    scales = np.asarray(codes.scales.astype(jnp.float32))
    steps = np.repeat(scales, 32 // scales.shape[0], axis=0)
    # A stored scale rounded down by 2^-8 (bfloat16) puts the extreme up to q * 2^-8 steps outside.
    slack = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-8}[scale_dtype]
    assert np.all(np.abs(value - w) <= steps * (0.5 + grid.highest * slack))


IDEMPOTENT = [
    "int8 channel",
    "int4 tensor",
    "q4_0",
    "q4_0 after",
    "q8_0 after",
    "int3 channel bf16",
    "5 significant bits",
    "anchored",
    "anchored channel int3",
    "anchored tensor int8",
]


@every_grid
def test_quantizing_a_quantized_weight_changes_nothing_where_the_extreme_defines_the_scale(grid):
    name = next(n for n, g in GRIDS.items() if g == grid)
    first = quantize(weights(), grid)
    again = quantize(dequantize(first.codes, first.scales, grid), grid)
    same = bool(jnp.all(dequantize(*again, grid) == dequantize(*first, grid)))
    assert not same or bool(jnp.all(first.codes == again.codes))
    # absmax_half puts the extreme at q + 1/2, where no level is; a mean is not kept by rounding;
    # a searched scale is a fraction of an extreme that has moved.
    assert same == (name in IDEMPOTENT), (
        f"{name}: {int(jnp.sum(first.codes != again.codes))} codes differ"
    )


def test_scale_is_rounded_to_its_dtype_inside_the_quantizer():
    w = weights()
    exact = np.asarray(quantize(w, Grid(bits=4)).scales)
    for dtype in ("float16", "bfloat16"):
        grid = Grid(bits=4, scale_dtype=dtype)
        expected = jnp.asarray(exact).astype(dtype)
        found = jax.jit(lambda w, grid=grid: quantize(w, grid).scales)(w)
        expected = jnp.where(expected == 0, 1, expected)
        np.testing.assert_array_equal(found.astype(jnp.float32), expected.astype(jnp.float32))


def test_half_precision_scales_keep_subnormals_and_saturate():
    magnitudes = np.array([1e-9, 3e-8, 4e-7, 1e-5, 6e-5, 7e-5, 60000.0, 7e5], np.float32)
    grid = Grid(bits=4, scale_dtype="float16", scale_rule="ggml")
    w = jnp.asarray(np.stack([-8 * magnitudes, magnitudes * 0]))
    expected = np.minimum(magnitudes, 65504).astype(np.float16)
    expected[expected == 0] = 1  # nothing left: the block counts as zero
    np.testing.assert_array_equal(quantize(w, grid).scales[0], expected)


def test_scale_bits_limits_the_significant_bits():
    scales = quantize(weights(), Grid(bits=4, scale_bits=3)).scales
    mantissa, _ = np.frexp(np.asarray(scales))
    np.testing.assert_array_equal(mantissa * 8, np.round(mantissa * 8))


def test_codes_come_from_the_stored_scale_or_the_exact_one():
    w = weights()
    before = Grid(bits=8, block=32, scale_dtype="bfloat16")
    after = Grid(bits=8, block=32, scale_dtype="bfloat16", round_scale="after")
    exact = Grid(bits=8, block=32)
    np.testing.assert_array_equal(quantize(w, after).codes, quantize(w, exact).codes)
    assert bool(jnp.any(quantize(w, before).codes != quantize(w, exact).codes))


def test_half_integer_grid_has_four_symmetric_levels():
    grid = Grid(bits=2, levels="half", scale_rule="absmax")
    w = jnp.asarray([[-3.0], [-1.1], [-0.9], [0.1], [1.9], [3.0]])
    np.testing.assert_array_equal(quantize(w, grid).scales, [[2.0]])
    np.testing.assert_array_equal(
        fake_quantize_array(w, grid)[:, 0], [-3.0, -1.0, -1.0, 1.0, 1.0, 3.0]
    )


def test_mean_abs_scale_is_a_multiple_of_the_mean_magnitude():
    w = weights()
    scales = quantize(w, Grid(bits=2, scale_rule="mean_abs", scale_factor=1.4)).scales
    expected = 1.4 * np.abs(np.asarray(w)).mean(axis=0)
    live = expected > 0
    np.testing.assert_allclose(scales[0][live], expected[live], rtol=1e-6)


def test_searched_scale_is_no_worse_than_the_absolute_maximum():
    w = weights()
    for bits in (2, 4):
        errors = [
            jnp.sum(
                jnp.square(fake_quantize_array(w, Grid(bits=bits, scale_rule=rule)) - w), axis=0
            )
            for rule in ("mse", "absmax")
        ]
        assert bool(jnp.all(errors[0] <= errors[1])) and bool(jnp.any(errors[0] < errors[1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("rule", [r for r in SCALE_RULES if r != "q6_k"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_weight_that_is_not_finite_poisons_its_block_and_no_other(rule, bad, when):
    grid = Grid(bits=4, block=32, scale_rule=rule, scale_dtype="float16", round_scale=when)
    w = weights().at[3, 0].set(bad)
    poisoned = np.zeros(w.shape, bool)
    poisoned[:32, 0] = True
    np.testing.assert_array_equal(np.isnan(fake_quantize_array(w, grid)), poisoned)
    codes, scales = quantize(w, grid)
    np.testing.assert_array_equal(np.isnan(dequantize(codes, scales, grid)), poisoned)
    assert int(codes.min()) >= grid.lowest and int(codes.max()) <= grid.highest


@every_grid
def test_every_grid_is_poisoned_by_nan(grid):
    w = weights().at[:, 5].set(jnp.nan)
    values = (fake_quantize_array(w, grid), dequantize(*quantize(w, grid), grid))
    for value in values:
        assert bool(jnp.all(jnp.isnan(value[:, 5])))
        assert grid.block == TENSOR or bool(jnp.all(jnp.isfinite(value[:, :5])))


@every_grid
def test_bfloat16_weights_get_the_float32_values_of_their_codes(grid):
    w = weights().astype(jnp.bfloat16)
    fake, pullback = jax.vjp(lambda w: fake_quantize_array(w, grid), w)
    np.testing.assert_array_equal(fake, dequantize(*quantize(w, grid), grid))
    assert fake.dtype == jnp.float32
    assert pullback(jnp.ones_like(fake))[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
@pytest.mark.parametrize("bits", [1, 3, None])
def test_scale_that_the_dtype_holds_stays_finite_whatever_its_bits(bits, dtype, when):
    grid = Grid(bits=8, scale_dtype=dtype, scale_bits=bits, round_scale=when, scale_rule="ggml")
    info = jnp.finfo(dtype)
    # The quantizer divides by -128, exactly; float32 itself has no room for the product.
    largest = min(float(info.max), float(np.finfo(np.float32).max) / 128)
    scales = quantize(jnp.full((16, 2), -128 * np.float32(largest)), grid).scales
    mantissa = min(info.nmant, bits - 1) if bits else info.nmant
    assert bool(jnp.all(jnp.isfinite(scales)))
    if dtype == "float16":
        np.testing.assert_array_equal(scales, np.float16((2 - 2.0**-mantissa) * 2**15))


BAD = {
    "bits": (dict(bits=9), "bits=9"),
    "block": (dict(bits=4, block=24), "block=24.*multiple of 16"),
    "levels": (dict(bits=4, levels="half"), "needs bits=2"),
    "ggml ternary": (dict(bits=2, levels="ternary", scale_rule="ggml"), "needs the code"),
    "rule": (dict(bits=4, scale_rule="median"), "not one of " + ", ".join(SCALE_RULES)),
    "factor": (dict(bits=4, scale_rule="mse", scale_factor=1.5), "takes no scale_factor"),
    "scale bits": (dict(bits=4, scale_bits=0), "scale_bits=0"),
    "anchor": (dict(bits=4, anchor=True), "needs scale_rule='ggml'"),
    "anchor after": (
        dict(bits=4, anchor=True, scale_rule="ggml", round_scale="after"),
        "round_scale='before', found 'ggml' and 'after'",
    ),
    "q6_k": (dict(bits=6, block=32, scale_rule="q6_k"), "write weight_qtype='q6_k'"),
    "dtype": (dict(bits=4, scale_dtype="float8"), "scale_dtype='float8'"),
}


@pytest.mark.parametrize("fields, message", BAD.values(), ids=list(BAD))
def test_impossible_grid_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        Grid(**fields)


WRONG_TYPES = {
    "bits": (dict(bits="4"), r"grid: bits='4' is str, expected int\."),
    "bool": (dict(bits=True), r"grid: bits=True is bool, expected int\."),
    "block": (dict(bits=4, block=32.0), r"grid: block=32.0 is float, expected int\."),
    "factor": (dict(bits=4, scale_factor="1"), r"scale_factor='1' is str, expected float or int"),
    "scale bits": (dict(bits=4, scale_bits=2.5), r"scale_bits=2.5 is float, expected int or None"),
    "levels": (dict(bits=4, levels=["full"]), r"levels=\['full'\] is list, expected str"),
}


@pytest.mark.parametrize("fields, message", WRONG_TYPES.values(), ids=list(WRONG_TYPES))
def test_field_of_a_wrong_type_is_named_with_what_was_expected(fields, message, monkeypatch):
    # Outside tests nothing but our own check stands before a wrong type.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match=message):
        Grid(**fields)


def test_block_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="block of 32 does not divide an axis of 48"):
        quantize(jnp.ones((48, 2)), GRIDS["q4_0"])
