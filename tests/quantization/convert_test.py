"""Conversion: the same tree with packed weights, and the same logits as fake quantization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.packed import PackedTensor
from gemmaqat.quantization import trees
from gemmaqat.quantization.convert import convert_params, dequantize_params
from gemmaqat.quantization.fake import fake_quantize
from gemmaqat.quantization.grids import Codes, quantize
from gemmaqat.quantization.ptq import rtn
from gemmaqat.quantization.rules import resolve


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


PARAMS = {
    "embed": {"embedding": normal(16, 64)},
    "experts": {"weight": nnx.Param(normal(3, 64, 8), contraction_axis=-2)},
    "norm": {"weight": jnp.ones(64)},
}


@pytest.mark.parametrize(
    "recipe", ["int8", "int3_channel", "q4_0_ggml", "int2_mid_channel", "ternary"]
)
def test_dequantized_packed_weights_are_the_fake_quantized_ones_to_the_bit(recipe):
    table = resolve(f"{recipe}_emb", PARAMS)
    packed = convert_params(PARAMS, table)
    assert isinstance(packed["embed"]["embedding"], PackedTensor)
    assert packed["norm"]["weight"] is PARAMS["norm"]["weight"]
    fake = jax.jit(lambda p: fake_quantize(p, table))(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, dequantize_params(packed), fake)


def test_bytes_are_those_the_table_promises():
    table = resolve("q4_0_emb", PARAMS)
    packed = trees.weights(convert_params(PARAMS, table))
    for entry in table.quantized:
        assert packed[entry.path][0].nbytes == entry.weight_bytes + entry.scale_bytes
        assert packed[entry.path][0].shape == entry.shape


def test_codes_of_a_method_are_packed_as_given():
    table = resolve("int4_channel", PARAMS)
    w = PARAMS["experts"]["weight"].get_value()
    found = quantize(w, table["experts/weight"].grid)
    shifted = Codes(jnp.clip(found.codes + 1, -8, 7), found.scales)
    packed = convert_params(PARAMS, table, codes={"experts/weight": shifted})
    np.testing.assert_array_equal(packed["experts"]["weight"].get_value().codes(), shifted.codes)
    with pytest.raises(ValueError, match="codes for norm/weight: the table does not quantize it"):
        convert_params(PARAMS, table, codes={"norm/weight": shifted})
    with pytest.raises(ValueError, match=r"codes for experts/weight.*expected \(3, 64, 8\)"):
        convert_params(PARAMS, table, codes={"experts/weight": Codes(w[0], w[0])})


def test_round_to_nearest_is_conversion():
    table = resolve("int4_channel", PARAMS)
    jax.tree.map(
        np.testing.assert_array_equal, rtn.quantize(PARAMS, table), convert_params(PARAMS, table)
    )


def test_packed_trees_are_not_quantized_twice():
    table = resolve("int4_channel", PARAMS)
    with pytest.raises(ValueError, match="experts/weight: already packed"):
        fake_quantize(convert_params(PARAMS, table), table)


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("recipe", ["int4_channel_emb", "q4_0_ggml_emb", "int2_mid_channel_emb"])
def test_weights_that_are_not_finite_are_refused_by_path(recipe, bad):
    table = resolve(recipe, PARAMS)
    broken = PARAMS | {"embed": {"embedding": normal(16, 64).at[5, 40].set(bad)}}
    with pytest.raises(ValueError, match=r"embed/embedding: 1 of \d+ scales are not finite"):
        convert_params(broken, table)
    codes = quantize(broken["embed"]["embedding"], table["embed/embedding"].grid, -1)
    with pytest.raises(ValueError, match=r"embed/embedding: 1 of \d+ scales are not finite"):
        convert_params(PARAMS, table, codes={"embed/embedding": codes})


def test_fake_and_packed_bfloat16_parameters_give_the_same_products_to_the_bit():
    params = {"layer": {"kernel": normal(64, 8).astype(jnp.bfloat16)}}
    table = resolve("int4_channel", params)
    fake = fake_quantize(params, table)["layer"]["kernel"]
    packed = convert_params(params, table)["layer"]["kernel"]
    identity = jnp.eye(64)  # products with it are the weights themselves
    np.testing.assert_array_equal(identity @ fake, packed.contract(identity))
