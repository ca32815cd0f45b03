"""Anchored and superblock scales: what a block holds, and what foreign quantizers make of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemmaqat.packed import pack
from gemmaqat.quantization.grid import NAMED_GRIDS, Grid
from gemmaqat.quantization.grids import dequantize, fake_quantize_array, quantize
from gemmaqat.quantization.recipes import recipe
from gemmaqat.quantization.rule import Rule
from gemmaqat.quantization.superblocks import join, split

gguf = pytest.importorskip("gguf")

Q4_0, W4A16 = (recipe(name)[-1].grid(32) for name in ("q4_0", "w4a16_g32"))
LEAST_HALF = 2.0**-24


def stock(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scales and values that gguf's Q4_0 quantizer makes of rows."""
    raw = gguf.quantize(rows, gguf.GGMLQuantizationType.Q4_0)
    blocks = raw.reshape(-1, 18)
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    codes = (nibbles.astype(np.int8) - 8).reshape(rows.shape)
    scales = blocks[:, :2].copy().view(np.float16).reshape(len(rows), -1)
    return codes, scales, gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)


def expect_kept_by_the_stock_quantizer(rows: np.ndarray, grid: Grid) -> None:
    codes, scales = (np.asarray(a) for a in quantize(jnp.asarray(rows), grid, -1))
    values = np.asarray(dequantize(codes, scales, grid, -1))
    in_bfloat16 = np.asarray(jnp.asarray(values).astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(in_bfloat16, values)
    their_codes, their_scales, their_values = stock(in_bfloat16)
    np.testing.assert_array_equal(their_codes, codes)
    np.testing.assert_array_equal(their_scales.astype(np.float32), scales.astype(np.float32))
    np.testing.assert_array_equal(their_values, values)


def expect_anchored(blocks: np.ndarray, grid: Grid) -> None:
    """Every block `[B, P]` that is not zero holds the lowest code at an extreme."""
    codes, scales = (np.asarray(a) for a in quantize(jnp.asarray(blocks), grid, -1))
    scales = scales.astype(np.float32)[:, 0]
    magnitude = np.abs(blocks)
    extreme = magnitude == magnitude.max(axis=1, keepdims=True)
    held = np.any(extreme & (codes == grid.lowest), axis=1)
    exact = magnitude.max(axis=1) / -grid.lowest
    assert np.all(held == (scales != 0))
    assert np.all(codes[scales == 0] == 0)
    least = LEAST_HALF if grid.scale_dtype == "float16" else 2.0**-63
    assert np.all(held[exact >= least])
    fraction, _ = np.frexp(scales.astype(np.float64))
    np.testing.assert_array_equal(fraction * 2.0**grid.stored_scale_bits % 1, 0)


every_float = hnp.arrays(
    np.float32, (6, 32), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)
similar_floats = hnp.arrays(np.float32, (6, 32), elements=st.floats(-8, 8, width=32))


@settings(max_examples=150, deadline=None)
@given(
    blocks=st.one_of(every_float, similar_floats),
    grid=st.sampled_from(
        [Q4_0, W4A16]
        + [
            Grid(bits=b, block=32, scale_rule="ggml", scale_dtype=d, scale_bits=p, anchor=True)
            for b, d, p in ((2, "float16", 1), (3, "float32", None), (8, "float16", 3))
        ]
    ),
)
def test_every_nonzero_block_of_any_floats_holds_the_lowest_code_at_an_extreme(blocks, grid):
    expect_anchored(blocks, grid)


EDGES = {
    "all equal": np.full((4, 32), 0.3),
    "all equal, negative": np.full((4, 32), -0.3),
    "equal extremes": np.tile([1.7, -1.7], (4, 16)),
    "one value": np.eye(32)[:4] * -3.3,
    "zero": np.zeros((4, 32)),
    "around the least half": np.linspace(0.5, 3, 64)[:, None] * -8 * LEAST_HALF * np.ones(32),
    "subnormal halves": np.linspace(1, 40, 512)[:, None] * 8 * LEAST_HALF * np.ones(32),
    "beyond half": np.full((4, 32), 1e6),
    "largest float": np.full((4, 32), np.finfo(np.float32).max),
    "least float": np.full((4, 32), np.finfo(np.float32).smallest_subnormal),
    "halfway between scales": (np.arange(32, 96) + 0.5)[:, None] * np.ones(32),
}


@pytest.mark.parametrize("grid", [Q4_0, W4A16], ids=["q4_0", "w4a16_g32"])
@pytest.mark.parametrize("blocks", EDGES.values(), ids=list(EDGES))
def test_edges_are_anchored(blocks, grid):
    expect_anchored(blocks.astype(np.float32), grid)


def test_the_scale_is_the_best_of_all_that_hold_the_anchor_among_the_five_nearest():
    blocks = np.random.default_rng(0).laplace(size=(512, 32)).astype(np.float32)
    found = np.abs(np.asarray(quantize(jnp.asarray(blocks), Q4_0, -1).scales).astype(np.float64))
    known = np.array([m * 2.0**e for e in range(-12, 3) for m in range(16, 32)])
    for block, scale in zip(blocks.astype(np.float64), found[:, 0], strict=True):
        extreme = block[np.argmax(np.abs(block))]
        nearest = known[np.argsort(np.abs(known - abs(extreme) / 8))[:1]][0]
        place = np.searchsorted(known, nearest)
        errors = {}
        for candidate in known[place - 2 : place + 3]:
            step = -np.sign(extreme) * candidate
            codes = np.clip(np.round(block / step), -8, 7)
            if codes[np.argmax(np.abs(block))] == -8:
                errors[candidate] = np.sum((block - codes * step) ** 2)
        assert errors[scale] <= min(errors.values()) * (1 + 1e-5)


@pytest.mark.parametrize("distribution", ["normal", "laplace", "student"])
def test_an_anchored_scale_of_five_bits_has_less_error_than_the_rule_of_ggml(distribution):
    rng = np.random.default_rng(0)
    rows = {
        "normal": rng.standard_normal((2048, 256)),
        "laplace": rng.laplace(size=(2048, 256)),
        "student": rng.standard_t(4, size=(2048, 256)),
    }[distribution].astype(np.float32)
    errors = [
        np.sum((np.asarray(fake_quantize_array(jnp.asarray(rows), grid, -1)) - rows) ** 2)
        for grid in (Q4_0, recipe("q4_0_ggml")[-1].grid(32))
    ]
    saved = 1 - errors[0] / errors[1]
    assert 0.055 < saved < 0.09, f"saved {saved:.2%}"


@settings(max_examples=50, deadline=None)
@given(blocks=st.one_of(every_float, similar_floats))
def test_the_stock_quantizer_keeps_every_code_of_any_block(blocks):
    # Values that reach half precision's infinity have no scale in the file.
    expect_kept_by_the_stock_quantizer(np.clip(blocks, -8 * 63488, 8 * 63488), Q4_0)


def test_the_stock_quantizer_keeps_every_code_also_of_a_scale_kept_in_bfloat16():
    rows = np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32)
    expect_kept_by_the_stock_quantizer(rows, W4A16)


def test_the_stock_quantizer_still_keeps_every_code_after_training_steps():
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((64, 96)), jnp.float32)
    y = jnp.asarray(rng.standard_normal((64, 40)), jnp.float32)
    w = jnp.asarray(rng.standard_normal((96, 40)) * 0.05, jnp.float32)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(w, state):
        loss = lambda w: jnp.mean((x @ fake_quantize_array(w, Q4_0) - y) ** 2)  # noqa: E731
        value, gradient = jax.value_and_grad(loss)(w)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(w, updates), state, value

    state, losses = optimizer.init(w), []
    for _ in range(20):
        w, state, value = step(w, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    expect_kept_by_the_stock_quantizer(np.asarray(w).T, Q4_0)


def test_other_grids_are_not_kept():
    rows = np.random.default_rng(3).standard_normal((64, 128)).astype(np.float32)
    for name in ("q4_0_free", "w4a16_g32_free"):
        with pytest.raises(AssertionError):
            expect_kept_by_the_stock_quantizer(rows, recipe(name)[-1].grid(32))


@pytest.mark.parametrize("name", ["q4_0", "q6_k"])
def test_a_table_sharded_over_its_rows_and_a_batch_of_tables_get_the_same_codes(name):
    w = jnp.asarray(np.random.default_rng(4).standard_normal((8, 512)), jnp.float32)
    grid = NAMED_GRIDS[name]
    mesh = jax.make_mesh((len(jax.devices()),), ("x",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    alone = quantize(w, grid, -1)
    for other in (
        quantize(jax.device_put(w, rows), grid, -1),
        jax.vmap(lambda w: quantize(w, grid, -1))(w.reshape(2, 4, 512)),
        jax.vmap(lambda w: quantize(w, grid, -2))(w.reshape(2, 4, 512).mT),
    ):
        codes = other.codes
        if codes.shape[-1] != 512:
            codes = codes.mT
        np.testing.assert_array_equal(codes.reshape(w.shape), alone.codes)


def test_superblock_scales_are_a_half_times_int8():
    rows = np.random.default_rng(5).standard_normal((64, 512)).astype(np.float32)
    rows[:, :16] *= 1e-3
    rows[0] = 0
    rows[1] *= 1e-6
    codes, scales = quantize(jnp.asarray(rows), NAMED_GRIDS["q6_k"], -1)
    parts = split(np.asarray(scales), 512)
    assert parts.exact.all()
    np.testing.assert_array_equal(join(parts.d, parts.sub), scales)
    value = np.asarray(dequantize(codes, scales, NAMED_GRIDS["q6_k"], -1))
    assert np.abs(value - rows)[2:].max() < 4 / 32
    np.testing.assert_array_equal(value[0], 0)
    # Half has 2^-24 for its least, which a superblock this small must do with.
    assert np.linalg.norm(value[1] - rows[1]) < 0.3 * np.linalg.norm(rows[1])


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(weight_qtype="int8"), "8-bit codes.*leave 1 to the scale.*4-bit codes or fewer"),
        (dict(weight_qtype="q8_0"), "8-bit codes"),
        (dict(weight_qtype="q6_k"), r"more than 3 significant bits; set scale_bits=3"),
        (dict(weight_qtype="int4", tile_size=32), r"more than 5 .*; set scale_bits=5\."),
        (dict(weight_qtype="int2", scale_bits=9), r"set scale_bits=8\."),
        (dict(weight_qtype="int3", scale_dtype="bfloat16"), r"set scale_bits=6\."),
    ],
    ids=str,
)
def test_a_grid_that_bfloat16_rounds_is_refused_where_its_safety_is_asked_for(fields, message):
    with pytest.raises(ValueError, match=f"bf16_safe=True with .*{message}"):
        Rule(bf16_safe=True, **fields)


@pytest.mark.parametrize("dtype, limits", [("bfloat16", (8, 6, 5, 1)), ("float16", (11, 9, 8, 4))])
def test_products_are_exact_up_to_the_stated_bits_and_not_beyond(dtype, limits):
    for bits, limit in zip((2, 3, 4, 8), limits, strict=True):
        grid = Grid(bits=bits)
        assert grid.exact_scale_bits(dtype) == limit
        codes = np.arange(grid.lowest, grid.highest + 1, dtype=np.float32)
        for extra in (0, 1):
            scales = np.arange(2 ** (limit + extra), dtype=np.float32) / 64
            values = codes[:, None] * scales
            kept = np.asarray(jnp.asarray(values).astype(dtype).astype(jnp.float32)) == values
            assert kept.all() == (extra == 0)


def test_a_packed_q6_k_weight_multiplies_as_its_fake_quantized_one():
    grid = NAMED_GRIDS["q6_k"]
    w = jnp.asarray(np.random.default_rng(6).standard_normal((512, 24)), jnp.float32)
    codes = quantize(w, grid)
    packed = pack(codes.codes, codes.scales, bits=grid.bits)
    value = fake_quantize_array(w, grid)
    np.testing.assert_array_equal(packed.dequantize(), value)
    x = jnp.asarray(np.random.default_rng(7).standard_normal((5, 512)), jnp.float32)
    np.testing.assert_allclose(packed.contract(x), x @ value, rtol=1e-5, atol=1e-4)
