"""Rules: what matches, what is refused, and that nothing is silent."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import qwix
from flax import nnx

from gemmaqat.quantization.grid import NAMED_GRIDS
from gemmaqat.quantization.recipes import RECIPES, recipe
from gemmaqat.quantization.rules import Rule, as_rule, resolve


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def tree():
    """An abstract tree with every kind of parameter."""
    layer = {
        "input_layernorm": {"weight": shape(64)},
        "layer_scalar": shape(1),
        "self_attn": {"q_proj": {"weight": shape(64, 32)}, "o_proj": {"weight": shape(32, 64)}},
        "mlp": {"gate_proj": {"weight": shape(64, 128)}, "down_proj": {"weight": shape(128, 64)}},
        "router": {"proj": {"weight": shape(64, 4)}, "scale": shape(64)},
        "experts": {"down_proj": {"weight": nnx.Param(shape(4, 32, 64), contraction_axis=-2)}},
        "per_layer_input_gate": {"weight": shape(64, 16)},
        "steps": shape(2, 2, dtype=jnp.int32),
        "table": shape(8, 8),
    }
    return {
        "embed_tokens": {"weight": nnx.Param(shape(256, 64), contraction_axis=-1)},
        "embed_tokens_per_layer": {
            "weight": nnx.Param(shape(256, 32), contraction_axis=-1, gather_only=True)
        },
        "layers": [layer, layer],
    }


INT4 = dict(weight_qtype="int4", tile_size=32)


def test_first_match_wins_and_own_rules_come_before_the_recipe():
    rules = (
        dict(module_path=r"layers/0/mlp/.*", weight_qtype="int8"),
        dict(module_path=r"layers/\d+/mlp/down_proj", weight_qtype="int2"),
        dict(module_path=r"layers/1/self_attn/.*", weight_qtype=None, name="first look"),
    )
    table = resolve("int4_channel", tree(), rules=rules)
    bits = {p: e.grid.bits for p, e in table.by_path.items() if e.grid}
    assert bits["layers/0/mlp/down_proj/weight"] == 8
    assert bits["layers/1/mlp/down_proj/weight"] == 2
    assert bits["layers/1/mlp/gate_proj/weight"] == 4
    assert table["layers/1/mlp/down_proj/weight"].rule == 1
    assert table["layers/1/self_attn/q_proj/weight"].reason == "kept by rule 2 (first look)"
    assert bits["layers/0/self_attn/q_proj/weight"] == 4


def test_pattern_must_match_the_whole_module_path():
    with pytest.raises(ValueError, match="matches nothing; nearest paths: layers/0/mlp/gate_proj"):
        resolve([dict(module_path=r"layers/0/mlp/gate", **INT4)], tree())
    table = resolve([dict(module_path=r"layers/0/mlp/gate.*", **INT4)], tree())
    assert [e.path for e in table.quantized] == ["layers/0/mlp/gate_proj/weight"]


def test_every_parameter_is_quantized_or_kept_with_its_reason():
    table = resolve("q4_0", tree())
    assert {e.path for e in table.entries if "layers/1" not in e.path} == {
        "embed_tokens/weight",
        "embed_tokens_per_layer/weight",
        "layers/0/input_layernorm/weight",
        "layers/0/layer_scalar",
        "layers/0/self_attn/q_proj/weight",
        "layers/0/self_attn/o_proj/weight",
        "layers/0/mlp/gate_proj/weight",
        "layers/0/mlp/down_proj/weight",
        "layers/0/router/proj/weight",
        "layers/0/router/scale",
        "layers/0/experts/down_proj/weight",
        "layers/0/per_layer_input_gate/weight",
        "layers/0/steps",
        "layers/0/table",
    }
    reasons = {e.path: e.reason for e in table.kept}
    assert reasons["embed_tokens/weight"] == "kept by rule 1 (embeddings)"
    assert reasons["layers/0/router/proj/weight"] == "kept by rule 0 (router)"
    assert "rank 1" in reasons["layers/0/input_layernorm/weight"]
    assert "int32" in reasons["layers/0/steps"]
    assert "its name is 'table'" in reasons["layers/0/table"]
    assert all(e.reason for e in table.kept) and not any(e.reason for e in table.quantized)


FOR_ALL_SIZES = [n for n in RECIPES if n != "none" and not n.startswith("mobile_")]


# Rules about activations need a model; see activation_rules_test.
FOR_TREES = [n for n in FOR_ALL_SIZES if not n.endswith("_emb") and n != "w8a8"]


@pytest.mark.parametrize("name", FOR_TREES)
def test_recipes_quantize_matrices_and_experts_and_with_emb_the_tables_too(name):
    base, with_tables = resolve(name, tree()), resolve(f"{name}_emb", tree())
    tables = {"embed_tokens/weight", "embed_tokens_per_layer/weight"}
    quantized = {e.path for e in base.quantized}
    assert {e.path for e in with_tables.quantized} == quantized | tables
    assert {p.split("/", 2)[2] for p in quantized} == {
        "self_attn/q_proj/weight",
        "self_attn/o_proj/weight",
        "mlp/gate_proj/weight",
        "mlp/down_proj/weight",
        "experts/down_proj/weight",
        "per_layer_input_gate/weight",
    }
    entry = with_tables["embed_tokens_per_layer/weight"]
    assert (entry.axis, entry.order) == (-1, "rows")
    assert with_tables["embed_tokens/weight"].order == "contract"


def test_recipe_none_keeps_everything():
    assert not resolve("none", tree()).quantized


def test_recipes_are_the_grids_they_are_named_for():
    names = {name: RECIPES[name][-1].grid(64).describe() for name in FOR_ALL_SIZES
             if not name.endswith("_emb")}  # fmt: skip
    assert names == {
        "int8": "int8 channel absmax f32",
        "int4_channel": "int4 channel absmax f32",
        "q4_0": "int4 block 32 ggml f16/5b anchored",
        "q4_0_free": "int4 block 32 ggml f16",
        "q4_0_ggml": "int4 block 32 ggml f16 after",
        "q8_0_ggml": "int8 block 32 absmax f16 after",
        "q8_0": "int8 block 32 absmax f16",
        "q6_k": "q6_k (int6 block 16, scales int8 x f16)",
        "w4a16_g32": "int4 block 32 ggml bf16/5b anchored",
        "w4a16_g32_free": "int4 block 32 absmax_half bf16",
        "int3_channel": "int3 channel absmax f32",
        "int2_channel": "int2 channel mean_abs x1.4 f32",
        "int2_mid_channel": "half-integer channel mean_abs x1.25 f32",
        "int2_block32": "int2 block 32 ggml f16",
        "ternary": "ternary channel mean_abs x1.53 f32",
        "w8a8": "int8 channel absmax f32",
    }


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="'q4_O' is unknown; did you mean 'q4_0'"):
        recipe("q4_O")


REFUSED = {
    "op_names": ("einsum",),
    "act_batch_axes": (0, 1),
    "bwd_qtype": "int8",
    "bwd_weight_grad_tile_size": 32,
    "bwd_stochastic_rounding": "uniform",
    "additional_qt_config": {"use_original_residuals": False},
}


@pytest.mark.parametrize("field, value", REFUSED.items(), ids=list(REFUSED))
def test_qwix_fields_that_cannot_be_honoured_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"quantization.rules\[0\]: {field}=.*cannot be honoured"):
        resolve("int8", tree(), rules=[{**INT4, field: value}])


def test_qwix_rules_with_only_defaults_are_accepted():
    for rule in (qwix.QtRule(weight_qtype=jnp.int8), qwix.QuantizationRule(weight_qtype="int2")):
        assert as_rule(rule, where="rule").weight_qtype in ("int8", "int2")
    with pytest.raises(ValueError, match="bwd_qtype"):
        as_rule(qwix.QtRule(weight_qtype=jnp.int8, bwd_qtype=jnp.int8), where="rule")


BAD = {
    "unknown field": (dict(modul_path="x"), r"no field 'modul_path'; did you mean 'module_path'"),
    "unknown type": (dict(weight_qtype="int44"), "did you mean 'int4'"),
    "float type": (dict(weight_qtype=jnp.float8_e4m3fn), "float8_e4m3fn"),
    "nf4": (dict(weight_qtype="nf4"), "'nf4' is not one of int8"),
    "mxfp4": (dict(weight_qtype="mxfp4"), "'mxfp4' is not one of int8"),
    "asymmetric": (dict(INT4, weight_calibration_method="minmax"), "'minmax' is not supported"),
    "rms": (dict(INT4, weight_calibration_method="rms,2.6"), "'rms,2.6' is not supported"),
    "two scales": (
        dict(INT4, weight_calibration_method="absmax,0.9", scale_rule="ggml"),
        "both set the scale",
    ),
    "regular expression": (dict(INT4, module_path="("), "not a regular expression"),
    "block": (dict(weight_qtype="int4", tile_size=7), "block=7"),
    "indivisible": (dict(INT4, indivisible="skip"), "indivisible='skip'"),
    "tensor blocks": (dict(INT4, disable_channelwise_axes=True), "disable_channelwise_axes"),
    "negative block": (
        dict(weight_qtype="int4", tile_size=-1),
        "tile_size=-1 is negative.*disable_channelwise_axes=True",
    ),
}


@pytest.mark.parametrize("rule, message", BAD.values(), ids=list(BAD))
def test_bad_rule_is_refused_with_its_place(rule, message):
    with pytest.raises(ValueError, match=rf"(?s)quantization.rules\[1\]: .*{message}"):
        resolve("int8", tree(), rules=[dict(module_path=".*/q_proj", weight_qtype="int8"), rule])


WRONG_TYPES = {
    "module_path": 3,
    "tile_size": "32",
    "weight_calibration_method": None,
    "disable_channelwise_axes": "yes",
    "name": 7,
    "levels": None,
    "scale_rule": ["ggml"],
    "scale_factor": "1.4",
    "scale_dtype": jnp.float16,
    "scale_bits": True,
    "anchor": 1,
    "round_scale": None,
    "rounding": 0.5,
    "indivisible": ("keep",),
}


@pytest.mark.parametrize("field, value", WRONG_TYPES.items(), ids=list(WRONG_TYPES))
def test_field_of_a_wrong_type_names_field_found_and_expected(field, value, monkeypatch):
    # Outside tests nothing but our own check stands before a wrong type.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    message = (
        rf"quantization.rules\[0\]: {field}=.* is {type(value).__name__}, expected (str|int|f|b)"
    )
    with pytest.raises(TypeError, match=message):
        resolve("int8", tree(), rules=[{**INT4, field: value}])


def test_something_that_is_no_rule_is_a_type_error():
    with pytest.raises(TypeError, match=r"quantization.rules\[0\]: expected a rule"):
        resolve("int8", tree(), rules=["int4"])


def test_rule_that_decides_nothing_is_an_error():
    with pytest.raises(ValueError, match="nearest paths: layers/0/self_attn/q_proj"):
        resolve("int8", tree(), rules=[dict(module_path=r"layers/\d+/self_atn/q_proj", **INT4)])
    with pytest.raises(ValueError, match="never quantized.*layers/0/input_layernorm"):
        resolve("int8", tree(), rules=[dict(module_path=r".*input_layernorm", **INT4)])
    with pytest.raises(ValueError, match="earlier rules decide.*by rule 0"):
        resolve([dict(**INT4), dict(module_path=".*/q_proj", weight_qtype="int8")], tree())


def test_recipe_rules_may_find_nothing():
    dense = {"layers": [{"mlp": {"up_proj": {"weight": shape(64, 64)}}}]}
    assert len(resolve("q4_0", dense).quantized) == 1


def test_block_that_does_not_divide_names_path_axis_and_choices():
    params = {"a": {"weight": shape(96, 8)}, "b": {"weight": shape(64, 8)}}
    rule = dict(weight_qtype="int4", tile_size=64)
    with pytest.raises(
        ValueError,
        match=r"tile_size=64 does not divide axis -2 \(length 96\) of a/weight.*16, 32, 48, 96",
    ):
        resolve([rule], params)
    kept = resolve([rule | {"indivisible": "keep"}], params)
    assert "block 64 does not divide 96" in kept["a/weight"].reason
    assert kept["b/weight"].grid.block == 64
    channel = resolve([rule | {"indivisible": "channel"}], params)
    assert channel["a/weight"].grid.block == 0 and channel["b/weight"].grid.block == 64


def test_a_fault_of_a_recipes_own_rule_names_the_recipe():
    params = {"a": {"weight": shape(64, 8)}, "b": {"weight": shape(40, 8)}}
    own = [dict(module_path="a", weight_qtype="int8")]
    with pytest.raises(ValueError, match=r"^recipe 'q4_0', rule 'q4_0': tile_size=32 .* b/weight"):
        resolve("q4_0", params, rules=own)
    with pytest.raises(ValueError, match=r"^quantization.rules\[1\]: tile_size=32 .* b/weight"):
        resolve([INT4], params, rules=own)
    with pytest.raises(ValueError, match=r"^recipe 'q4_0', rule 'q4_0': .* b/weight"):
        resolve("q4_0", params)


def test_stacks_are_quantized_only_along_a_declared_axis():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.MultiHeadAttention(4, 64, rngs=rngs, decode=False)
            self.conv = nnx.Conv(16, 16, kernel_size=(3,), rngs=rngs)
            self.experts = nnx.Linear(1, 1, rngs=rngs)
            stack = jnp.zeros((3, 64, 8))
            self.experts.kernel = nnx.Param(stack, contraction_axis=-2)

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    table = resolve("int4_channel", model)
    assert [e.path for e in table.quantized] == ["experts/kernel"]
    for name in ("query", "key", "value", "out"):
        entry = table[f"attention/{name}/kernel"]
        assert len(entry.shape) == 3
        assert entry.reason == "rank 3, no contraction axis declared"
    assert table["conv/kernel"].reason == "rank 3, no contraction axis declared"
    # A pure dict has lost the declaration; the table of the model still fits it.
    state = nnx.state(model, nnx.Param)
    assert resolve("int4_channel", state) == table
    assert not resolve("int4_channel", nnx.to_pure_dict(state)).quantized


def test_models_states_and_dicts_resolve_alike():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(32, 64, rngs=rngs)
            self.layers = nnx.List([nnx.Linear(64, 16, rngs=rngs)])

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    table = resolve("int4_channel_emb", model)
    assert table == resolve("int4_channel_emb", nnx.state(model, nnx.Param))
    assert table == resolve("int4_channel_emb", nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert table["embed/embedding"].axis == -1
    assert table["layers/0/kernel"].axis == -2
    assert [e.path for e in table.quantized] == ["embed/embedding", "layers/0/kernel"]
    assert [e.path for e in table.kept] == ["layers/0/bias"]


def test_rules_survive_as_json():
    rule = Rule(module_path="a", weight_qtype=np.int8, tile_size=32, name="n")
    assert as_rule(rule.to_json(), where="rule") == rule


WIDTHS = {f"{name}/weight": jax.ShapeDtypeStruct((k, 8), jnp.float32) for name, k in
          (("wide", 512), ("narrow", 96), ("odd", 40))}  # fmt: skip


def test_named_grids_are_given_whole_and_fall_back_by_name():
    tree = {k.partition("/")[0]: {"weight": v} for k, v in WIDTHS.items() if "odd" not in k}
    table = resolve(dict(weight_qtype="q6_k", indivisible="q8_0"), tree)
    assert table["wide/weight"].grid == NAMED_GRIDS["q6_k"]
    assert table["narrow/weight"].grid == NAMED_GRIDS["q8_0"]
    assert recipe("q4_0")[-1].grid(32) == NAMED_GRIDS["q4_0"]
    kept = resolve(dict(weight_qtype="q6_k", indivisible="keep"), tree)["narrow/weight"]
    assert kept.grid is None and "block 256 does not divide 96" in kept.reason


@pytest.mark.parametrize("fallback", ["error", "q8_0", "channel"])
def test_a_width_that_q6_k_cannot_hold_names_the_grids_that_may(fallback):
    tree = {"odd": {"weight": WIDTHS["odd/weight"]}}
    with pytest.raises(ValueError, match="multiple of 256 .*length 40.*'q8_0' or 'q4_0'"):
        resolve(dict(weight_qtype="q6_k", indivisible=fallback), tree)


def test_a_whole_grid_takes_no_fields_of_its_own():
    with pytest.raises(ValueError, match="'q8_0' is a whole grid .*scale_bits, tile_size must be"):
        Rule(weight_qtype="q8_0", tile_size=16, scale_bits=4)
