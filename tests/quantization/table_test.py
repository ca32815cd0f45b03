"""The table: counts, coverage, JSON, differences, and text."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.rules import Table, resolve
from gemmaqat.quantization.table import ActivationEntry


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


PARAMS = {
    "embed_tokens": {"weight": shape(256, 64)},
    "layers": [
        {
            "norm": {"weight": shape(64)},
            "mlp": {"up_proj": {"weight": shape(64, 128)}},
            "self_attn": {"q_proj": {"weight": shape(64, 64)}},
            "router": {"proj": {"weight": shape(64, 8)}},
            "experts": {"down_proj": {"weight": nnx.Param(shape(8, 64, 64), contraction_axis=-2)}},
            "per_layer_projection": {"weight": shape(64, 64)},
        }
    ]
    * 2,
}


def test_bits_and_bytes_count_codes_scales_and_floats():
    params = {"a": {"weight": shape(64, 32)}, "b": {"weight": shape(32)}}
    table = resolve("q4_0", params)
    entry = table["a/weight"]
    assert (entry.weight_bytes, entry.scale_bytes) == (64 * 32 // 2, 2 * 32 * 2)
    assert table.bits_per_weight(quantized_only=True) == 4.5
    assert table.num_bytes == 64 * 32 // 2 + 128 + 128
    assert table.bits_per_weight() == 8 * table.num_bytes / (64 * 32 + 32)


def test_static_scales_of_activations_are_bytes_and_bits_dynamic_ones_are_nothing():
    entry = dict(rule=0, path="x/input")
    weights = resolve("q4_0", {"a": {"weight": shape(64, 32)}})
    static, dynamic = (
        dataclasses.replace(weights, activations=(ActivationEntry(**entry, static=flag),) * 3)
        for flag in (True, False)
    )
    assert static.num_bytes == weights.num_bytes + 12
    assert static.bits_per_weight() == 8 * static.num_bytes / (64 * 32)
    assert static.bits_per_weight(quantized_only=True) == 4.5
    assert dynamic.num_bytes == weights.num_bytes
    assert dynamic.bits_per_weight() == weights.bits_per_weight()


def test_nominal_and_stored_bits_are_both_known():
    params = {"a": {"weight": shape(64, 32)}}
    found = {
        name: (resolve(name, params)["a/weight"].grid.nominal_bits,
               resolve(name, params)["a/weight"].storage_bits)
        for name in ("int3_channel", "ternary", "int2_channel")
    }  # fmt: skip
    assert found["int3_channel"] == (3, 4)
    assert found["int2_channel"] == (2, 2)
    assert found["ternary"] == (pytest.approx(1.585, abs=1e-3), 2)


def test_padding_to_whole_words_is_counted():
    entry = resolve("int2_channel", {"a": {"weight": shape(24, 5)}})["a/weight"]
    assert entry.weight_bytes == 2 * 4 * 5


def test_coverage_is_by_family():
    table = resolve("int8", PARAMS, rules=[dict(module_path="layers/0/mlp/.*")])
    assert table.coverage() == {
        "attention": 1.0,
        "mlp": 0.5,
        "experts": 1.0,
        "router": 0.0,
        "embeddings": 0.0,
        "per_layer_embeddings": 1.0,
        "other": 0.0,
    }


@pytest.mark.parametrize("recipe", ["q4_0_ggml", "int2_mid_channel_emb", "none"])
def test_json_brings_the_table_back(recipe):
    table = resolve(recipe, PARAMS)
    again = Table.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table and hash(again) == hash(table) and not again.diff(table)


def test_another_version_and_a_broken_file_are_refused():
    data = resolve("int8", PARAMS).to_json()
    with pytest.raises(ValueError, match="format_version is 3"):
        Table.from_json({**data, "format_version": 3})
    del data["entries"][0]["shape"]
    with pytest.raises(ValueError, match="'shape'.*resolve the rules again"):
        Table.from_json(data)


def test_diff_names_each_parameter_that_differs():
    left = resolve("int8", PARAMS)
    right = resolve("int8", PARAMS, rules=[dict(module_path="layers/1/mlp/.*", weight_qtype=None)])
    assert left.diff(right) == [
        "layers/1/mlp/up_proj/weight: int8 channel absmax f32 -> float: kept by rule 0"
    ]
    fewer = resolve("int8", {"embed_tokens": PARAMS["embed_tokens"]})
    assert len(left.diff(fewer)) == 12
    assert "layers/0/norm/weight: only in the first table" in left.diff(fewer)


def test_text_merges_equal_layers_and_names_what_stays_float():
    text = resolve("q4_0", PARAMS).render()
    line = next(line for line in text.splitlines() if line.startswith("layers/*/mlp/up_proj"))
    grid = "int4 block 32 ggml f16/5b anchored"
    assert line.split() == f"layers/*/mlp/up_proj/weight 64x128 2 q4_0 {grid} 4/4 2 1,024".split()
    assert "float: kept by rule 0 (router)" in text
    assert "4.500 bits each with scales" in text
    assert len(resolve("q4_0", PARAMS).render(every_layer=True)) > len(text)


@pytest.mark.parametrize("size", ["e2b", "e4b", "12b", "26b_a4b", "31b"])
def test_full_sizes_resolve_from_shapes_alone(size):
    model = Gemma4(model_config(size), rngs=None)
    base, tables = resolve("q4_0", model), resolve("q4_0_emb", model)
    assert base.coverage()["attention"] > 0.99
    assert base.coverage()["embeddings"] == 0.0 and tables.coverage()["embeddings"] == 1.0
    assert tables.bits_per_weight(quantized_only=True) == 4.5
    if size == "26b_a4b":
        assert base.coverage()["experts"] == 1.0 and base.coverage()["router"] == 0.0
