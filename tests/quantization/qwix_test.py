"""Where qwix can express a grid our codes and scales are qwix's; QArrays convert both ways."""

import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from gemmaqat.quantization.convert import convert_params
from gemmaqat.quantization.grids import quantize
from gemmaqat.quantization.qarrays import from_qarray, to_qarray
from gemmaqat.quantization.rules import as_rule, resolve

QTYPES = {"int8": jnp.int8, "int4": jnp.int4, "int3": "int3", "int2": "int2"}


def weights(shape=(64, 24)):
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    w[..., 1] *= 1e-6
    w[..., 2] *= 1e4
    w[..., 3] = 0
    w[..., 4] = -0.25
    w[..., 5] = 1e-22  # qwix takes this for zero
    return jnp.asarray(w)


def by_qwix(w, qtype, *, tile=None, method="absmax", per_tensor=False):
    """Qwix's own arrays, with the axes its rules would choose for `x @ w`."""
    return qwix.quantize(
        w,
        QTYPES[qtype],
        channelwise_axes=() if per_tensor else (1,),
        tiled_axes={0: tile} if tile else {},
        calibration_method=method,
    )


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(tile_size=32),
        dict(tile_size=1 / 4),
        dict(weight_calibration_method="absmax,0.9"),
        dict(disable_channelwise_axes=True),
    ],
    ids=["channel", "tile", "fraction", "factor", "tensor"],
)
def test_a_qwix_rule_gives_qwix_codes(qtype, fields):
    w = weights()
    rule = as_rule(dict(weight_qtype=qtype, **fields), where="rule")
    ours = quantize(w, rule.grid(64))
    theirs = by_qwix(
        w,
        qtype,
        tile=fields.get("tile_size"),
        method=fields.get("weight_calibration_method", "absmax"),
        per_tensor=fields.get("disable_channelwise_axes", False),
    )
    np.testing.assert_array_equal(ours.codes, theirs.qvalue.astype(jnp.int8))
    np.testing.assert_array_equal(ours.scales, theirs.scale)


def test_a_qwix_rule_object_is_a_rule():
    rule = qwix.QuantizationRule(module_path="mlp/.*", weight_qtype=jnp.int4, tile_size=32)
    found = as_rule(rule, where="rule")
    assert (found.module_path, found.weight_qtype, found.tile_size) == ("mlp/.*", "int4", 32)
    grid = found.grid(64)
    assert (grid.bits, grid.block, grid.scale_rule) == (4, 32, "absmax_half")


def packed_by_rule(w, axis=-2, **fields):
    name = "embedding" if axis == -1 else "kernel"
    params = {"layer": {name: w}}
    return convert_params(params, resolve([fields], params))["layer"][name]


@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("tile", [0, 32])
def test_packed_weights_become_equal_qarrays_and_return(qtype, tile):
    w = weights()
    packed = packed_by_rule(w, weight_qtype=qtype, tile_size=tile)
    array = to_qarray(packed)
    expected = by_qwix(w, qtype, tile=tile or None)
    np.testing.assert_array_equal(array.qvalue.astype(jnp.int8), expected.qvalue.astype(jnp.int8))
    np.testing.assert_array_equal(qwix.dequantize(array), packed.dequantize())
    back = from_qarray(array)
    assert back.layout == packed.layout
    np.testing.assert_array_equal(back.words, packed.words)
    np.testing.assert_array_equal(back.scales, packed.scales)


def test_tables_and_negative_scales_survive_the_way_through_qwix():
    packed = packed_by_rule(
        weights((24, 64)), -1, weight_qtype="int4", tile_size=32, scale_rule="ggml"
    )
    array = to_qarray(packed)
    assert array.shape == (24, 64) and array.scale.shape == (24, 2)
    assert bool(jnp.any(array.scale < 0))
    np.testing.assert_array_equal(qwix.dequantize(array), packed.dequantize())
    np.testing.assert_array_equal(from_qarray(array, axis=-1).words, packed.words)


def test_qarrays_without_a_counterpart_are_refused():
    w = weights()
    half = packed_by_rule(w, weight_qtype="int2", levels="half")
    with pytest.raises(ValueError, match="half-integer levels"):
        to_qarray(half)
    asymmetric = qwix.quantize(w, jnp.int4, channelwise_axes=(1,), calibration_method="minmax")
    with pytest.raises(ValueError, match="zero point"):
        from_qarray(asymmetric)
    with pytest.raises(ValueError, match="tiles along axis -2 alone"):
        from_qarray(qwix.quantize(w, jnp.int4, tiled_axes={0: 32, 1: 12}))
    with pytest.raises(ValueError, match="nf4"):
        from_qarray(qwix.quantize(w, "nf4", channelwise_axes=(1,)))
