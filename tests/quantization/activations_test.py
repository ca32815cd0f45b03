"""Activation quantizers: the formula to the bit, its gradients, and prepared models."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.activations import (
    StaticQuantizer,
    activation_scales,
    prepare,
    quantize_by_token,
    quantize_statically,
    with_scales,
    without_activations,
)
from gemmaqat.quantization.calibration import calibrate
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.fake import fake_quantize
from gemmaqat.quantization.rules import resolve
from gemmaqat.quantization.table import ON

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 24)), jnp.int32)

# Per layer; layers that share their keys have neither k_proj, v_proj, k nor v.
OF_EVERY_LAYER = {
    "self_attn/input", "self_attn/q_proj/output", "self_attn/o_proj/input",
    "self_attn/o_proj/output", "mlp/input", "mlp/gate_proj/output", "mlp/up_proj/output",
    "mlp/down_proj/input", "mlp/down_proj/output", "per_layer_input_gate/input",
    "per_layer_input_gate/output", "per_layer_projection/input", "per_layer_projection/output",
}  # fmt: skip
OF_OWNERS = {"self_attn/k_proj/output", "self_attn/v_proj/output", "self_attn/k", "self_attn/v"}


@pytest.fixture(scope="module")
def model():
    return Gemma4(model_config("e2b_mini"), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def table(model):
    return resolve("mobile_e2b_mini", model)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, params, tokens):
    return nnx.merge(graph, params)(tokens).logits


def logits(model):
    return _logits(*nnx.split(model), TOKENS)


@pytest.mark.parametrize("scale", [0.1, 0.037, 3e-5, 1.7])
def test_values_are_the_definition_in_numpy_to_the_bit(scale):
    s, rng = np.float32(scale), np.random.default_rng(0)
    ties = (np.arange(-140, 140, dtype=np.float32) + np.float32(0.5)) * s
    x = np.concatenate([rng.normal(0, 60 * s, 10_000).astype(np.float32), ties, [0, -0.0]])
    x = x.astype(np.float32)
    expected = np.clip(np.rint(x / s), -128, 127).astype(np.float32) * s
    for call in (quantize_statically, jax.jit(quantize_statically)):
        np.testing.assert_array_equal(call(jnp.asarray(x), jnp.asarray(s)), expected)
    assert {-128, 127} <= set(np.rint(expected / s).astype(int))


def test_scale_is_cast_to_the_dtype_of_the_activation_first():
    scale = jnp.float32(0.1001)
    x = jnp.linspace(-15, 15, 999).astype(jnp.bfloat16)
    rounded = scale.astype(jnp.bfloat16)
    expected = jnp.clip(jnp.round(x / rounded), -128, 127) * rounded
    found = quantize_statically(x, scale)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(found, np.float32), np.asarray(expected.astype(jnp.bfloat16), np.float32)
    )


def test_scale_zero_is_the_identity_and_learns_nothing():
    x = jnp.asarray([1e-30, -0.0, 1e30, 0.3, -jnp.inf])
    np.testing.assert_array_equal(quantize_statically(x, jnp.float32(0)), x)
    to_x, to_scale = jax.grad(lambda x, s: jnp.sum(3 * quantize_statically(x, s)), (0, 1))(
        x, jnp.float32(0)
    )
    np.testing.assert_array_equal(to_x, np.full(5, 3.0))
    assert to_scale == 0


def test_gradient_passes_inside_the_range_and_stops_outside():
    s = jnp.float32(0.5)
    x = jnp.asarray([-64.1, -64.0, -1.1, 0.0, 63.5, 63.6, 1e9])
    gradient = jax.grad(lambda x: jnp.sum(2 * quantize_statically(x, s)))(x)
    np.testing.assert_array_equal(gradient, [0, 2, 2, 2, 2, 0, 0])


def test_gradient_of_the_scale_is_that_of_lsq():
    s, rng = 0.25, np.random.default_rng(0)
    x, g = rng.normal(0, 20, 400), rng.normal(size=400)
    ratio = x / s
    slope = np.where(ratio < -128, -128, np.where(ratio > 127, 127, np.rint(ratio) - ratio))
    assert np.any(slope == 127) and np.any(slope == -128)
    expected = np.sum(slope * g) / np.sqrt(127 * 400)
    found = jax.grad(lambda s: jnp.sum(g * quantize_statically(jnp.asarray(x, jnp.float32), s)))(
        jnp.float32(s)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_gradient_of_the_scale_in_bfloat16_is_that_of_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0, 12, 4_096), jnp.bfloat16)
    g = jnp.asarray(rng.normal(size=4_096), jnp.bfloat16)
    slope = jax.grad(lambda s, x, g: jnp.sum((g * quantize_statically(x, s)).astype(jnp.float32)))
    wide = (x.astype(jnp.float32), g.astype(jnp.float32))
    scale = jnp.float32(0.1).astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(slope(scale, x, g), slope(scale, *wide), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_each_token_is_rounded_as_in_numpy_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, (7, 5, 64)) * 10.0 ** rng.integers(-6, 6, (7, 5, 1))
    x[2, 3] = 0
    x = np.asarray(jnp.asarray(x, dtype), np.float32)
    scale = np.abs(x).max(-1, keepdims=True) / np.float32(127.5)
    codes = np.clip(np.rint(x / np.where(scale == 0, np.float32(1), scale)), -128, 127)
    expected = jnp.asarray(codes * scale, dtype)
    for call in (quantize_by_token, jax.jit(quantize_by_token)):
        found = call(jnp.asarray(x, dtype), jnp.float32(ON))
        np.testing.assert_array_equal(found, expected)
    assert codes.min() == -128 and codes.max() == 127


def test_a_token_does_not_see_the_others():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 32)), jnp.float32)
    louder = x.at[1, 4].multiply(1e4)
    one, other = (quantize_by_token(x, jnp.float32(ON)) for x in (x, louder))
    apart = jnp.any(one != other, axis=-1)
    assert apart.sum() == 1 and apart[1, 4]


def test_a_dynamic_quantizer_passes_the_gradient_and_its_switch_has_none():
    x = jnp.asarray([[-1.0, 0.004, 0.5, 1.0]])
    g = jnp.asarray([[3.0, -2.0, 0.5, 7.0]])
    for switch in (0.0, ON):
        to_x, to_switch = jax.grad(lambda x, s: jnp.sum(g * quantize_by_token(x, s)), (0, 1))(
            x, jnp.float32(switch)
        )
        np.testing.assert_array_equal(to_x, g)
        assert to_switch == 0
    np.testing.assert_array_equal(quantize_by_token(x, jnp.float32(0)), x)


def test_dynamic_inputs_need_no_data_and_are_turned_off_like_any(model):
    on = calibrate(model, resolve("w8a8", model), [])
    assert set(map(float, activation_scales(on).values())) == {ON}
    assert jnp.max(jnp.abs(logits(on) - logits(model))) > 1e-3
    np.testing.assert_array_equal(logits(without_activations(on)), logits(model))


def test_static_and_dynamic_at_one_hook_are_refused(model, table):
    with pytest.raises(ValueError, match="has a StaticQuantizer here.* asks for a Dynamic"):
        prepare(prepare(model, table), resolve("w8a8", model))


def test_prepare_fills_the_hook_points_and_these_alone(model, table):
    prepared = prepare(model, table)
    expected = {f"layers/{i}/{path}" for i in range(4) for path in OF_EVERY_LAYER}
    expected |= {f"layers/{i}/{path}" for i in range(2) for path in OF_OWNERS}
    expected |= {f"per_layer_model_projection/{side}" for side in ("input", "output")}
    scales = activation_scales(prepared)
    assert set(scales) == {f"{path}/scale" for path in expected}
    assert all(v.shape == () and v.dtype == jnp.float32 and v == 0 for v in scales.values())
    assert not activation_scales(model)  # left as it was
    assert isinstance(prepared.layers[0].self_attn.input, StaticQuantizer)
    assert not isinstance(prepared.layers[0].self_attn.q_proj.input, StaticQuantizer)


def test_with_scales_zero_the_float_model_is_computed_to_the_bit(model, table):
    np.testing.assert_array_equal(logits(prepare(model, table)), logits(model))


def test_each_hook_matters_and_without_activations_turns_them_off(model, table):
    prepared = prepare(model, table)
    expected = logits(prepared)
    scales = activation_scales(prepared)
    for path in scales:
        assert jnp.any(logits(with_scales(prepared, {path: 0.3})) != expected), path
    on = with_scales(prepared, dict.fromkeys(scales, 0.1))
    np.testing.assert_array_equal(logits(without_activations(on)), expected)


def test_prepare_again_keeps_scales_and_resolves_alike(model, table):
    on = with_scales(prepare(model, table), {"layers/0/mlp/input/scale": 0.1})
    again = prepare(on, resolve("mobile_e2b_mini", on))
    assert activation_scales(again)["layers/0/mlp/input/scale"] == np.float32(0.1)
    assert nnx.split(again)[0] == nnx.split(on)[0]
    assert resolve("mobile_e2b_mini", on) == table


def test_an_abstract_model_is_prepared_without_storage(table):
    prepared = prepare(Gemma4(model_config("e2b_mini"), rngs=None), table)
    values = activation_scales(prepared).values()
    assert values and all(isinstance(v, jax.ShapeDtypeStruct) for v in values)


def test_weights_are_quantized_alike_with_and_without_scales_in_the_tree(model, table):
    prepared = with_scales(prepare(model, table), {"layers/0/mlp/input/scale": 0.1})
    plain, other = fake_quantize(model, table), resolve("int4_channel", model)
    for tree in (fake_quantize(prepared, table), convert(prepared, table)):
        assert activation_scales(tree)["layers/0/mlp/input/scale"] == np.float32(0.1)
    np.testing.assert_array_equal(
        fake_quantize(prepared, table).layers[3].mlp.up_proj.weight.get_value(),
        plain.layers[3].mlp.up_proj.weight.get_value(),
    )
    # A table without activations, on the same prepared tree: arms share one structure.
    assert len(activation_scales(fake_quantize(prepared, other))) == len(table.activations)


def test_a_table_of_another_model_is_refused(model, table):
    other = Gemma4(model_config("e4b_mini"), rngs=None)
    with pytest.raises(ValueError, match="no such hook point"):
        prepare(model, resolve("mobile_e4b_mini", other))
