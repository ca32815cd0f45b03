"""Rules about activations: what they reach, what they refuse, and how the table tells them."""

import json

import jax.numpy as jnp
import pytest
import qwix
from flax import nnx

from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.rules import Table, as_rule, resolve

STATIC = dict(act_static_scale=True)
W8A8 = dict(weight_qtype="int8", act_qtype="int8", output_qtype="int8", **STATIC)


@pytest.fixture(scope="module")
def model():
    return Gemma4(model_config("26b_a4b_mini"), rngs=None)


def hooks(rules, model):
    return {e.path.removeprefix("layers/0/") for e in resolve(rules, model).activations
            if e.path.startswith("layers/0/")}  # fmt: skip


def test_the_rule_of_a_linear_decides_its_input_and_output(model):
    assert hooks([dict(module_path=r".*/o_proj", **W8A8)], model) == {
        "self_attn/o_proj/input", "self_attn/o_proj/output"
    }  # fmt: skip
    only_input = dict(module_path=r".*/down_proj", act_qtype="int8", **STATIC)
    assert hooks([only_input], model) == {"mlp/down_proj/input", "experts/down_proj/input"}


def test_modules_that_share_an_input_have_one_hook(model):
    rule = dict(module_path=r".*/(q|k|v|gate|up|gate_up)_proj", act_qtype="int8", **STATIC)
    assert hooks([rule], model) == {"self_attn/input", "mlp/input", "experts/input"}


@pytest.mark.parametrize("second", [{}, dict(act_qtype="int8", act_calibration_method="mse")])
def test_modules_that_share_an_input_must_agree(model, second):
    static = STATIC if second else {}
    rules = [
        dict(module_path=r".*/q_proj", act_qtype="int8", **STATIC),
        dict(module_path=r".*/[kv]_proj", weight_qtype="int4", **second, **static),
    ]
    with pytest.raises(ValueError, match=r"layers/0/self_attn/input: modules that share.*k_proj"):
        resolve(rules, model)


def test_first_match_decides_activations_too(model):
    rules = [dict(module_path=r"layers/0/.*", weight_qtype="int8"), dict(**W8A8)]
    found = resolve(rules, model)
    assert not any(e.path.startswith("layers/0/") for e in found.activations)
    assert any(e.path.startswith("layers/1/") for e in found.activations)
    assert {e.rule for e in found.activations} == {1}


def test_keys_and_values_need_their_own_field(model):
    everything = dict(module_path=".*", **W8A8)
    assert not {p for p in hooks([everything], model) if p in ("self_attn/k", "self_attn/v")}
    rule = dict(module_path=r".*/self_attn", kv_qtype="int8", value_scale=0.05, **STATIC)
    entries = {e.path: e.constant for e in resolve([rule], model).activations}
    assert entries == {
        f"layers/{i}/self_attn/{x}": 0.05 if x == "v" else None for i in range(4) for x in "kv"
    }


REFUSED = {
    "dynamic outputs": (dict(output_qtype="int8"), "output_qtype='int8' without act_static_scale"),
    "calibrated dynamic scales": (
        dict(act_qtype="int8", act_calibration_method="mse"),
        "act_calibration_method='mse' without act_static_scale",
    ),
    "four bits": (dict(act_qtype="int4", **STATIC), "act_qtype='int4' is not one of int8"),
    "nothing under it": (dict(**STATIC), "act_static_scale=True, but nothing"),
    "minmax": (
        dict(act_qtype="int8", act_calibration_method="minmax", **STATIC),
        "calibration method 'minmax' is not absmax",
    ),
    "percentile": (
        dict(act_qtype="int8", act_calibration_method="percentile,101", **STATIC),
        "'percentile,101'",
    ),
    "value scale alone": (dict(value_scale=0.05), "needs kv_qtype"),
    "no hook": (
        dict(module_path="embed_tokens", weight_qtype="int2", act_qtype="int8", **STATIC),
        "act_qtype='int8' finds no hook point",
    ),
    "keys of a linear": (
        dict(module_path=r".*/q_proj", weight_qtype="int4", kv_qtype="int8", **STATIC),
        "kv_qtype='int8' finds no hook point",
    ),
    "nothing": (
        dict(module_path="layers/0/self_atn", kv_qtype="int8", **STATIC),
        "matches nothing",
    ),
}


@pytest.mark.parametrize("rule, message", REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_honoured_is_refused_with_its_place(model, rule, message):
    with pytest.raises(ValueError, match=rf"quantization.rules\[0\].*{message}"):
        resolve("int8", model, rules=[rule])


def test_a_tree_without_modules_is_refused(model):
    with pytest.raises(ValueError, match="resolve the model itself"):
        resolve([dict(**W8A8)], nnx.state(model, nnx.Param))


def test_a_rule_of_qwix_with_static_activations_is_honoured():
    rule = as_rule(
        qwix.QtRule(weight_qtype=jnp.int4, act_qtype=jnp.int8, act_static_scale=True), where="rule"
    )
    assert (rule.act_qtype, rule.act_calibration_method) == ("int8", "absmax")
    assert as_rule(qwix.QtRule(weight_qtype=jnp.int4, act_qtype=jnp.int8), where="rule").dynamic


def test_without_a_static_scale_inputs_are_dynamic_and_nothing_is_calibrated(model):
    table = resolve([dict(module_path=r".*/mlp/.*", act_qtype="int8")], model, calibration="mse")
    assert {e.path for e in table.activations} == table.dynamic != set() == set(table.calibrated)
    assert "layers/*/mlp/input            0     int8 dynamic per token  4" in table.render()
    rules = [dict(module_path=r".*/gate_proj", act_qtype="int8"),
             dict(module_path=r".*/up_proj", act_qtype="int8", **STATIC)]  # fmt: skip
    with pytest.raises(ValueError, match="layers/0/mlp/input: modules that share this input"):
        resolve(rules, model)


@pytest.mark.parametrize("suffix", ["", "_emb"])
def test_w8a8_is_int8_with_dynamic_inputs_of_all_linears_but_router_and_experts(model, suffix):
    table, weights = (resolve(f"{name}{suffix}", model) for name in ("w8a8", "int8"))
    assert [e.grid for e in table.entries] == [e.grid for e in weights.entries]
    inputs = {"self_attn/input", "self_attn/o_proj/input", "mlp/input", "mlp/down_proj/input"}
    assert table.dynamic == {f"layers/{i}/{x}" for i in range(4) for x in inputs}
    assert table.num_bytes == weights.num_bytes


def test_the_table_keeps_shows_and_compares_them(model):
    static, mse = (dict(module_path=r".*/o_proj", **W8A8, act_calibration_method=m)
                   for m in ("absmax", "mse"))  # fmt: skip
    table, other = resolve([static], model), resolve([mse], model)
    assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table
    assert "layers/*/self_attn/o_proj/output  0     int8 static absmax  4" in table.render()
    assert len(table.diff(other)) == 8
    assert table.diff(other)[0] == (
        "layers/0/self_attn/o_proj/input: int8 static absmax -> int8 static mse"
    )


def test_a_table_without_activations_is_written_as_before(model):
    data = resolve("int8", model).to_json()
    assert data["format_version"] == 1 and "activations" not in data
    assert resolve([dict(**W8A8)], model).to_json()["format_version"] == 2


def test_another_calibration_is_told_by_the_table_in_entries_and_words():
    small = Gemma4(model_config("e2b_mini"), rngs=None)
    table = resolve("mobile_e2b_mini", small, calibration="percentile,99")
    assert {e.calibration for e in table.activations} == {"percentile,99"}
    assert "percentile,99" in table.render() and "absmax" not in table.render()
