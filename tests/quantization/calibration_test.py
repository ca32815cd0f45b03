"""Calibration: each method finds its scale, nothing else is touched, and bad data are refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.activations import activation_scales, prepare, with_scales
from gemmaqat.quantization.calibration import (
    BINS,
    calibrate,
    find_scales,
    least_error_range,
    percentile_range,
)
from gemmaqat.quantization.rules import resolve

HOOK = "layers/1/mlp/input"


def tokens(seed):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 128, (2, 16)), jnp.int32)


BATCHES = [tokens(0), tokens(1), tokens(2)]


@pytest.fixture(scope="module")
def model():
    return Gemma4(model_config("e2b_mini"), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def table(model):
    return resolve("mobile_e2b_mini", model)


def seen(model, batch, path=HOOK):
    """The activation at one hook point, caught by an eager pass."""
    caught = []
    model = nnx.clone(model)
    layer = model.layers[int(path.split("/")[1])]
    layer.mlp.input = lambda x: caught.append(x) or x
    model(batch)
    return np.asarray(caught[0])


def test_absmax_is_the_mean_of_the_largest_magnitudes(model, table):
    scales = find_scales(model, table, BATCHES)
    expected = np.mean([np.abs(seen(model, b)).max() for b in BATCHES]) / 127
    np.testing.assert_allclose(scales[HOOK], expected, rtol=1e-5)  # another compiled program
    half = find_scales(model, table, BATCHES, method="absmax,0.5")
    np.testing.assert_allclose(half[HOOK], expected / 2, rtol=1e-5)


def test_percentile_is_that_of_all_elements(model, table):
    values = np.abs(np.concatenate([seen(model, b).ravel() for b in BATCHES]))
    for percent in (50, 99, 100):
        found = find_scales(model, table, BATCHES, method=f"percentile,{percent}")[HOOK] * 127
        step = values.max() / BINS
        expected = np.percentile(values, percent, method="inverted_cdf")
        assert abs(found - expected) <= 2 * step


def test_mse_leaves_less_error_than_any_other_range(model, table):
    values = np.concatenate([seen(model, b).ravel() for b in BATCHES]).astype(np.float64)

    def error(scale):
        return np.square(values - np.clip(np.rint(values / scale), -128, 127) * scale).sum()

    found = find_scales(model, table, BATCHES, method="mse")[HOOK]
    peak = np.abs(values).max() / 127
    best = min(error(peak * f) for f in np.linspace(0.05, 1, 400))
    assert error(found) <= 1.05 * best  # 100 ranges, and elements moved to their bins' centres
    assert error(found) < error(peak)


def test_outliers_are_clipped_by_mse_and_percentile():
    counts = np.zeros(BINS)
    counts[: BINS // 10] = 1_000_000
    counts[-1] = 1
    assert least_error_range(counts, 10.0) < 2
    assert percentile_range(counts, 10.0, 99.9) == pytest.approx(1.0, rel=0.02)
    assert percentile_range(counts, 10.0, 100.0) == 10.0


def test_every_hook_point_gets_a_scale_and_values_their_constant(model, table):
    calibrated = calibrate(model, table, BATCHES)
    scales = {path: float(scale) for path, scale in activation_scales(calibrated).items()}
    assert set(scales) == table.activation_scales
    assert all(scale > 0 for scale in scales.values())
    assert {s for p, s in scales.items() if p.endswith("self_attn/v/scale")} == {
        float(np.float32(6 / 127))
    }
    assert not activation_scales(model)


def test_scales_that_are_there_play_no_part(model, table):
    expected = find_scales(model, table, BATCHES)
    clamped = with_scales(prepare(model, table), dict.fromkeys(table.activation_scales, 1e-3))
    assert find_scales(clamped, table, BATCHES) == expected
    again = activation_scales(calibrate(clamped, table, BATCHES))
    assert all(again[f"{path}/scale"] == np.float32(scale) for path, scale in expected.items())


def test_rematerialised_blocks_are_observed_alike(model, table):
    config = dataclasses.replace(model.config, remat="full")
    other = nnx.merge(nnx.split(Gemma4(config, rngs=None))[0], nnx.split(model)[1])
    expected, found = (find_scales(m, table, BATCHES[:1], method="mse") for m in (model, other))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def test_batches_may_name_the_arguments(model, table):
    named = [dict(tokens=b, positions=None) for b in BATCHES]
    assert find_scales(model, table, named) == find_scales(model, table, BATCHES)


def test_no_data_and_numbers_that_are_none_are_refused(model, table):
    with pytest.raises(ValueError, match="no batch of data"):
        calibrate(model, table, [])
    with pytest.raises(ValueError, match="calibration method 'max' is not"):
        calibrate(model, table, BATCHES, method="max")
    broken = nnx.clone(model)
    weight = broken.layers[1].mlp.up_proj.weight
    weight.set_value(weight.get_value().at[0, 0].set(jnp.inf))
    with pytest.raises(ValueError, match="layers/1/mlp/.* is not finite"):
        calibrate(broken, table, BATCHES)


def test_an_activation_of_zeros_gets_a_scale_that_is_not_off(model, table):
    silent = nnx.clone(model)
    weight = silent.layers[0].mlp.up_proj.weight
    weight.set_value(jnp.zeros_like(weight.get_value()))
    for method in ("absmax", "mse", "percentile,99"):
        assert find_scales(silent, table, BATCHES, method=method)["layers/0/mlp/up_proj/output"] > 0
