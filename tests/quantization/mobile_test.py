"""The mobile recipes, tensor by tensor, against the bit table of the released checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.packed import PackedTensor
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.fake import fake_quantize
from gemmaqat.quantization.rules import resolve

# Layers, the first that shares its keys, bits of the MLPs from there on, bits of the PLE table.
SIZES = {
    "e2b": (35, 15, 2, 4),
    "e4b": (42, 24, 4, 2),
    "e2b_mini": (4, 2, 2, 4),
    "e4b_mini": (6, 3, 4, 2),
}


def expected_bits(size):
    layers, shared, wide_bits, table_bits = SIZES[size]
    bits = {"embed_tokens": 2, "embed_tokens_per_layer": table_bits}
    for layer in range(layers):
        own = ("k_proj", "v_proj") if layer < shared else ()
        for name in ("q_proj", "o_proj", *own):
            bits[f"layers/{layer}/self_attn/{name}"] = 4
        for name in ("gate_proj", "up_proj", "down_proj"):
            bits[f"layers/{layer}/mlp/{name}"] = 4 if layer < shared else wide_bits
        for name in ("per_layer_input_gate", "per_layer_projection"):
            bits[f"layers/{layer}/{name}"] = 8
    return {f"{path}/weight": bit for path, bit in bits.items()}


@pytest.mark.parametrize("size", SIZES)
def test_every_tensor_has_its_bits_and_scales(size):
    config = model_config(size)
    table = resolve(f"mobile_{size}", abstract_model(config))
    assert {e.path: e.grid.bits for e in table.quantized} == expected_bits(size)
    for entry in table.quantized:
        grid = entry.grid
        assert (grid.lowest, grid.highest) == (-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1) - 1)
        assert grid.scale_dtype == "float32" and grid.rounding == "even"
        scales = grid.scale_shape(entry.shape, entry.axis)
        if entry.path == "embed_tokens_per_layer/weight":
            assert scales == (config.vocab_size, config.num_layers)
        elif entry.path == "embed_tokens/weight":
            assert scales == (config.vocab_size, 1)
        else:
            assert scales == (1, entry.shape[1])
    kept = {e.path for e in table.kept if len(e.shape) == 2}
    assert kept == {"per_layer_model_projection/weight"}


@pytest.mark.parametrize("size", SIZES)
def test_every_linear_has_both_activations_and_the_head_none(size):
    config = model_config(size)
    table = resolve(f"mobile_{size}", abstract_model(config))
    paths = {e.path for e in table.activations}
    shared_input = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    expected = {"per_layer_model_projection/input", "per_layer_model_projection/output"}
    for path in expected_bits(size):
        if path.startswith("embed"):
            continue
        module = path.removesuffix("/weight")
        parent, _, name = module.rpartition("/")
        expected |= {f"{module}/output"}
        expected |= {f"{parent if name in shared_input else module}/input"}
    owners = range(config.num_layers - config.num_kv_shared_layers)
    expected |= {f"layers/{i}/self_attn/{x}" for i in owners for x in "kv"}
    assert paths == expected
    assert all(e.qtype == "int8" and e.static for e in table.activations)
    constants = {e.path.rpartition("/")[2]: e.constant for e in table.activations}
    assert constants.pop("v") == 6 / 127 and set(constants.values()) == {None}


OTHERS = [(recipe, size) for recipe in SIZES for size in SIZES if recipe != size]


@pytest.mark.parametrize(("recipe", "size"), [*OTHERS, ("e4b", "12b"), ("e2b_mini", "31b_mini")])
def test_another_size_is_refused_and_told_its_recipe(recipe, size):
    model = abstract_model(model_config(size))
    way_out = f"use 'mobile_{size}'" if size in SIZES else "use a recipe for all sizes"
    message = rf"recipe 'mobile_{recipe}' is of another size: its .*; {way_out}, or decide"
    with pytest.raises(ValueError, match=message):
        resolve(f"mobile_{recipe}", model)


def test_what_own_rules_decide_may_be_of_any_size():
    e2b = abstract_model(model_config("e2b_mini"))
    with pytest.raises(ValueError, match="wider MLPs are in no layer, .* model in layers 2 to 3"):
        resolve("mobile_e4b_mini", e2b)
    mlps = dict(module_path=r"layers/[23]/mlp/.*", weight_qtype="int4")
    assert resolve("mobile_e4b_mini", e2b, rules=[mlps])["layers/3/mlp/up_proj/weight"].rule == 0

    wide = abstract_model(model_config("e2b_mini", per_layer_dim=128))
    with pytest.raises(ValueError, match="has 64 values per layer, that of this model 128"):
        resolve("mobile_e2b_mini", wide)
    own = dict(module_path="embed_tokens_per_layer", weight_qtype="int4")
    table = resolve("mobile_e2b_mini", wide, rules=[own])
    assert table["embed_tokens_per_layer/weight"].rule == 0


@pytest.fixture(scope="module")
def converted():
    model = Gemma4(model_config("e2b_mini", vocab_size=1_024), rngs=nnx.Rngs(0))
    table = resolve("mobile_e2b_mini", model)
    return fake_quantize(model, table), convert(model, table)


@pytest.mark.parametrize("name", ["embed_tokens", "embed_tokens_per_layer"])
def test_a_gather_decodes_only_the_rows_it_reads(converted, name):
    quantized, packed = (getattr(model, name) for model in converted)
    assert isinstance(packed.weight.get_value(), PackedTensor)
    ids = jnp.asarray([[3, 1_023, 3], [0, 7, 511]], jnp.int32)
    read = lambda ids: packed(ids, scale=1.5, dtype="float32")  # noqa: E731
    expected = quantized(ids, scale=1.5, dtype="float32")
    np.testing.assert_array_equal(read(ids), expected)
    largest = max(_floats_made(jax.make_jaxpr(read)(ids).jaxpr))
    assert largest <= 2 * expected.size < packed.weight.get_value().size / 50


def _floats_made(jaxpr):
    """The size of every float array that a program computes; its inputs are not counted."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if jnp.issubdtype(variable.aval.dtype, jnp.floating):
                yield variable.aval.size
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from _floats_made(inner)
