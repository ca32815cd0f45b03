"""The tiled products: memory stays one tile, results and gradients equal the plain reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemmaqat.kernels import dispatch, reference, xla
from gemmaqat.kernels.layout import Layout, pack_codes
from gemmaqat.models.layers import take


def random_packed(rows, columns, *, bits=4, block=32, order="contract", seed=0):
    layout = Layout(bits=bits, code_bits=bits, rows=rows, block=block, order=order)
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns))
    scales = rng.uniform(0.5, 2, (layout.num_blocks, columns)).astype(np.float16)
    words = jax.jit(pack_codes, static_argnums=1)(jnp.asarray(codes, jnp.int8), layout)
    scales = jnp.asarray(scales if order == "contract" else scales.T)
    return words, scales, layout


@pytest.mark.parametrize("rows", [1, 64])
def test_float_matrix_is_never_materialised(rows):
    words, scales, layout = random_packed(2048, 4096)
    x = jnp.ones((rows, 2048))
    compiled = jax.jit(xla.matmul, static_argnums=3).lower(x, words, scales, layout).compile()
    found = compiled.memory_analysis().temp_size_in_bytes
    # The float matrix has 32 MiB; a tile 4, and one copy of the output.
    assert found < 6 * 2**20, f"{found / 2**20:.1f} MiB of temporaries"


def test_gradient_does_not_materialise_it_either():
    words, scales, layout = random_packed(2048, 4096)

    def loss(x):
        return jnp.sum(xla.matmul(x, words, scales, layout))

    compiled = jax.jit(jax.grad(loss)).lower(jnp.ones((64, 2048))).compile()
    found = compiled.memory_analysis().temp_size_in_bytes
    assert found < 8 * 2**20, f"{found / 2**20:.1f} MiB of temporaries"


# Small budgets force every loop and every remainder: 5 tiles of columns, 3 of rows, both cut.
TILINGS = {"few rows": (3, 64, 2**7, 2**20), "many rows": (9, 64, 2**7, 2**12)}


@pytest.mark.parametrize("order", ["contract", "rows"])
@pytest.mark.parametrize("tiling", TILINGS)
def test_tiles_and_their_remainders_make_the_whole_product(tiling, order, monkeypatch):
    rows, tall, wide, elements = TILINGS[tiling]
    monkeypatch.setattr(xla, "_TALL", tall)
    monkeypatch.setattr(xla, "_WIDE", wide)
    monkeypatch.setattr(xla, "_TILE_ELEMENTS", elements)
    words, scales, layout = random_packed(160, 300, block=16, order=order)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((rows, 160)), jnp.float32)
    y = jnp.asarray(np.random.default_rng(2).standard_normal((rows, 300)), jnp.float32)
    for product, operand in ((xla.matmul, x), (xla.matmul_transposed, y)):
        expected = getattr(reference, product.__name__)(operand, words, scales, layout)
        found = jax.jit(product, static_argnums=3)(operand, words, scales, layout)
        np.testing.assert_allclose(found, expected, atol=2e-6 * float(jnp.max(jnp.abs(expected))))


def test_gradients_of_both_products_are_those_of_the_reference():
    words, scales, layout = random_packed(64, 48)
    for name, width in (("matmul", 64), ("matmul_transposed", 48)):
        x = jnp.asarray(np.random.default_rng(1).standard_normal((9, width)), jnp.float32)

        def loss(x, module, name=name):
            return jnp.sum(jnp.square(getattr(module, name)(x, words, scales, layout)))

        expected = jax.grad(loss)(x, reference)
        found = jax.grad(loss)(x, xla)
        np.testing.assert_allclose(found, expected, atol=4e-6 * float(jnp.max(jnp.abs(expected))))


def test_bfloat16_activations_meet_weights_rounded_to_bfloat16():
    words, scales, layout = random_packed(64, 48)
    x = jnp.ones((9, 64), jnp.bfloat16)
    found = xla.matmul(x, words, scales, layout)
    assert found.dtype == jnp.bfloat16
    weight = reference.dequantize(words, scales, layout).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(
        found.astype(jnp.float32), x.astype(jnp.float32) @ weight, rtol=2**-8, atol=1e-3
    )


def test_nan_activations_stay_nan():
    words, scales, layout = random_packed(64, 48)
    x = jnp.ones((2, 64)).at[1, 3].set(jnp.nan)
    out = xla.matmul(x, words, scales, layout)
    assert bool(jnp.all(jnp.isfinite(out[0]))) and bool(jnp.all(jnp.isnan(out[1])))


@pytest.mark.parametrize("order", ["contract", "rows"])
@pytest.mark.parametrize("backend", [xla, reference])
def test_ids_out_of_range_give_the_nearest_row_packed_or_float(backend, order):
    words, scales, layout = random_packed(64, 48, order=order)
    ids = jnp.asarray([-1, -48, 48, 99])
    rows = backend.gather(ids, words, scales, layout)
    inside = backend.gather(jnp.asarray([0, 0, 47, 47]), words, scales, layout)
    np.testing.assert_array_equal(rows, inside)
    table = reference.dequantize(words, scales, layout).T
    np.testing.assert_array_equal(rows, take(table, ids))


def test_backend_asked_for_by_name_is_used_or_refused():
    assert dispatch.select("reference") is reference
    assert dispatch.select() is xla
    assert "xla" in dispatch.explain()
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        dispatch.select("referense")
