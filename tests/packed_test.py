"""Codes go into words and come out; products of packed weights equal those of their floats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from gemmaqat.kernels.layout import Layout, pack_codes, unpack_codes
from gemmaqat.packed import PackedTensor, from_arrays, pack, to_arrays


def make(bits=4, shape=(64, 24), block=0, *, axis=-2, order="contract", levels="full", seed=0):
    """A packed tensor and the float64 matrix `[K, N]` it stands for (`[N, K]` for a table)."""
    rng = np.random.default_rng(seed)
    *lead, rows, columns = shape
    codes = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape).astype(np.int8)
    count = rows // block if block > 0 else 1
    scales = rng.uniform(0.5, 2, (*lead, count, 1 if block < 0 else columns)).astype(np.float32)
    scales *= rng.choice([-1, 1], scales.shape)
    half = 0.5 if levels == "half" else 0.0
    value = (codes + half) * np.repeat(scales, rows // count, axis=-2).astype(np.float64)
    if axis == -1:
        codes, scales, value = (np.swapaxes(a, -1, -2) for a in (codes, scales, value))
    packed = pack(
        jnp.asarray(codes), jnp.asarray(scales), bits=bits, axis=axis, order=order, levels=levels
    )
    return packed, value


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    rows=st.sampled_from([5, 16, 41]),
    order=st.sampled_from(["contract", "rows"]),
    seed=st.integers(0, 2**16),
)
def test_unpacking_undoes_packing(bits, rows, order, seed):
    storage = {2: 2, 3: 4, 4: 4, 8: 8}[bits]
    layout = Layout(bits=storage, code_bits=bits, rows=rows, block=0, order=order)
    codes = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, 3))
    words = pack_codes(jnp.asarray(codes, jnp.int8), layout)
    back = unpack_codes(words, layout)
    assert words.shape[-2 if order == "contract" else -1] == -(-rows * storage // 32)
    np.testing.assert_array_equal(back, codes)


def test_first_code_of_a_word_is_in_its_lowest_bits():
    codes = jnp.asarray([[-8], [7], [0], [1], [2], [3], [4], [5]], jnp.int8)
    words = pack_codes(codes, Layout(bits=4, code_bits=4, rows=8, block=0))
    assert words.tolist() == [[0xDCBA98F0]]
    codes = jnp.asarray([[-128], [127], [-1], [0]], jnp.int8)
    words = pack_codes(codes, Layout(bits=8, code_bits=8, rows=4, block=0))
    assert words.tolist() == [[0x00FF7F80]]


CASES = {
    "int4-block": dict(bits=4, shape=(96, 40), block=32),
    "int2-channel-odd-sizes": dict(bits=2, shape=(24, 5), block=0),
    "int3-block16": dict(bits=3, shape=(80, 33), block=16),
    "int8-tensor": dict(bits=8, shape=(64, 48), block=-1),
    "half-integer": dict(bits=2, shape=(64, 16), block=32, levels="half"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [1, 9])
def test_contract_equals_the_float_product(name, rows):
    packed, value = make(**CASES[name])
    x = np.random.default_rng(1).standard_normal((rows, value.shape[0])).astype(np.float32)
    expected = x.astype(np.float64) @ value
    for backend in ("xla", "reference"):
        found = packed.contract(jnp.asarray(x), backend=backend)
        # float32 sums of up to 96 terms: 6e-7 was measured.
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("order", ["contract", "rows"])
def test_table_gives_rows_exactly_and_heads_by_its_transpose(order):
    packed, value = make(4, (64, 40), 32, axis=-1, order=order)
    assert packed.shape == (40, 64) and packed.T.shape == (64, 40)
    ids = jnp.asarray([[0, 39], [7, 7]])
    np.testing.assert_array_equal(packed.take(ids), value.astype(np.float32)[np.asarray(ids)])
    np.testing.assert_array_equal(packed.dequantize(), value.astype(np.float32))
    x = np.random.default_rng(1).standard_normal((2, 3, 64)).astype(np.float32)
    np.testing.assert_allclose(packed.T.contract(jnp.asarray(x)), x @ value.T, rtol=0, atol=2e-4)
    y = np.random.default_rng(2).standard_normal((3, 40)).astype(np.float32)
    np.testing.assert_allclose(packed.contract(jnp.asarray(y)), y @ value, rtol=0, atol=2e-4)


def test_rows_of_a_matrix_cannot_be_taken():
    packed, _ = make()
    with pytest.raises(TypeError, match="contraction axis -1"):
        packed.take(jnp.asarray([0]))


def test_wrong_width_names_both_shapes():
    packed, _ = make()
    with pytest.raises(ValueError, match=r"width 7.*\(64, 24\)"):
        packed.contract(jnp.ones((2, 7)))


@pytest.mark.parametrize("levels", ["full", "half"])
def test_ragged_contract_multiplies_each_group_by_its_own_matrix(levels):
    packed, value = make(2, (4, 64, 24), 32, levels=levels)
    sizes = np.array([3, 0, 5, 1])
    x = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
    groups = np.repeat(np.arange(4), sizes)
    expected = np.einsum("mk,mkn->mn", x, value[groups])
    for backend in ("xla", "reference"):
        found = packed.ragged_contract(jnp.asarray(x), jnp.asarray(sizes), backend=backend)
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max())

    def loss(x):
        return jnp.sum(jnp.square(packed.ragged_contract(x, jnp.asarray(sizes))))

    gradient = np.einsum("mn,mkn->mk", 2 * expected, value[groups])
    found = jax.grad(loss)(jnp.asarray(x))
    np.testing.assert_allclose(found, gradient, atol=4e-6 * np.abs(gradient).max())


def test_bytes_count_words_and_scales():
    packed, _ = make(4, (64, 24), 32)
    assert packed.nbytes == 64 * 24 // 2 + 2 * 24 * 4
    assert packed.bits_per_weight == 4 + 32 / 32
    assert packed.size == 64 * 24 and packed.ndim == 2 and packed.dtype == jnp.float32


def test_lives_in_a_parameter_through_split_merge_and_jit():
    class Layer(nnx.Module):
        def __init__(self, weight):
            self.weight = nnx.Param(weight)

        def __call__(self, x):
            return self.weight.get_value().contract(x)

    packed, value = make()
    graph, state = nnx.split(Layer(packed))
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [jnp.uint32, jnp.float32]
    x = jnp.ones((2, 64))
    out = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)
    np.testing.assert_allclose(out, np.ones((2, 64)) @ value, rtol=1e-5, atol=1e-4)


def test_layout_is_part_of_the_tree_structure():
    first, second = make(4, block=32)[0], make(4, block=0)[0]
    assert jax.tree.structure(first) != jax.tree.structure(second)
    assert jax.tree.structure(first) == jax.tree.structure(make(4, block=32, seed=1)[0])


@pytest.mark.parametrize("order", ["contract", "rows"])
def test_survives_as_plain_arrays_and_metadata(order):
    packed, _ = make(3, (40, 6), 0, axis=-1, order=order)
    arrays, metadata = to_arrays(packed)
    back = from_arrays({k: np.asarray(v) for k, v in arrays.items()}, metadata)
    assert isinstance(back, PackedTensor) and back.layout == packed.layout
    assert back.shape == packed.shape
    np.testing.assert_array_equal(back.dequantize(), packed.dequantize())


def test_arrays_that_do_not_fit_their_metadata_are_refused():
    arrays, metadata = to_arrays(make()[0])
    with pytest.raises(ValueError, match="format_version is 2"):
        from_arrays(arrays, metadata | {"format_version": 2})
    with pytest.raises(ValueError, match="7 words"):
        from_arrays({**arrays, "words": arrays["words"][:7]}, metadata)
