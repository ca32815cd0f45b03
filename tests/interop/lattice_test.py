"""Codes and scales found again in floats that lie on a grid."""

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gemmaqat as gq
from gemmaqat.interop import lattice
from gemmaqat.interop.lattice import recover, recover_shipment
from gemmaqat.interop.shipment import Shipment, ShippedTensor
from gemmaqat.quantization.grid import NAMED_GRIDS, Grid
from gemmaqat.quantization.grids import dequantize, quantize
from gemmaqat.quantization.table import Entry, Table

LATTICES = {
    f"{rule} {dtype}": Grid(bits=4, block=32, scale_rule=rule, scale_dtype=dtype)
    for rule in ("absmax", "absmax_half", "ggml", "mse")
    for dtype in ("float32", "float16", "bfloat16")
} | {
    "absmax/8 bfloat16": Grid(bits=4, block=32, scale_factor=7 / 8, scale_dtype="bfloat16"),
    "q4_0": NAMED_GRIDS["q4_0"],
}
WEIGHTS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "student": lambda rng, shape: rng.standard_t(4, size=shape),
}


def on_grid(grid, distribution="normal", shape=(256, 512), dtype=ml_dtypes.bfloat16):
    """Codes, float32 scales and values in a dtype."""
    w = 0.02 * WEIGHTS[distribution](np.random.default_rng(0), shape)
    codes, scales = quantize(jnp.asarray(w, jnp.float32), grid, -1)
    values = np.asarray(dequantize(codes, scales, grid, -1)).astype(dtype)
    return np.asarray(codes), np.asarray(scales).astype(np.float32), values


@pytest.mark.parametrize("distribution", WEIGHTS)
@pytest.mark.parametrize("grid", LATTICES.values(), ids=list(LATTICES))
def test_every_value_of_a_lattice_is_given_again_by_codes_and_scales(grid, distribution):
    codes, scales, x = on_grid(grid, distribution)
    found = recover(x)
    share = np.sum(found.kept) / x.size
    # Recomputed apart from the search, in the arithmetic of a reader.
    again = np.asarray(found.codes).astype(np.float32) * np.repeat(found.scales, 32, axis=1)
    assert np.mean(again.astype(ml_dtypes.bfloat16) == x) == share
    assert share >= 0.998 and np.mean(np.asarray(found.codes) == codes) >= 0.998
    relative = np.abs(np.asarray(found.scales) / scales - 1)
    assert np.mean(relative <= 2.0**-8) >= 0.998
    if grid.scale_dtype == "bfloat16" or grid.anchor:  # no more bits than the values show
        assert np.mean(np.asarray(found.scales) == scales) >= 0.998
    if grid.anchor:
        np.testing.assert_array_equal(found.codes, codes)
        np.testing.assert_array_equal(found.scales, scales)
        assert not np.any(found.precision)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_lattices_are_found_in_values_of_other_dtypes(dtype):
    for grid in (LATTICES["absmax bfloat16"], NAMED_GRIDS["q4_0"]):
        codes, scales, x = on_grid(grid, dtype=np.dtype(dtype))
        found = recover(x, dtype=dtype)
        assert np.mean(np.asarray(found.codes) == codes) >= 0.998
        assert np.mean(np.asarray(found.scales) == scales) >= 0.998


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_channel_lattices_are_found(bits):
    grid = Grid(bits=bits, scale_rule="ggml" if bits < 8 else "absmax", scale_dtype="bfloat16")
    dtype = "bfloat16" if bits < 8 else "float32"
    codes, scales, x = on_grid(grid, dtype=np.dtype(getattr(ml_dtypes, dtype, dtype)))
    found = recover(x, 0, bits=bits, dtype=dtype)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scales, scales)
    assert np.all(np.asarray(found.kept) == x.shape[1])


def test_values_off_any_lattice_are_told():
    x = np.random.default_rng(0).standard_normal((64, 256)).astype(ml_dtypes.bfloat16)
    found = recover(x)
    assert np.sum(found.kept) < 0.3 * x.size
    assert not np.any(np.asarray(found.kept) == 32)


def test_zero_blocks_and_one_value_alone_are_on_a_lattice():
    x = np.zeros((2, 64), np.float32)
    x[1, 40] = -0.75
    found = recover(x)
    assert np.all(np.asarray(found.kept) == 32)
    np.testing.assert_array_equal(np.asarray(found.scales)[0], 0)
    assert found.codes[1, 40] * found.scales[1, 1] == -0.75


def test_eight_bits_in_bfloat16_are_refused():
    with pytest.raises(ValueError, match="codes of 8 bits cannot be told from .* bfloat16"):
        recover(np.ones((2, 32)), bits=8)


def shipment_on_grid():
    """Floats of which two matrices are on the grid of q4_0, and the codes and scales of these."""
    codes, tensors, entries = {}, {}, []
    for path, shape in (
        ("embed_tokens/weight", (96, 64)),
        ("layers/0/mlp/up_proj/weight", (128, 64)),
        ("layers/0/mlp/down_proj/weight", (64, 128)),
        ("norm/weight", (64,)),
    ):
        if "layers" in path:
            *codes[path], x = on_grid(NAMED_GRIDS["q4_0"], shape=shape)
        else:
            x = np.random.default_rng(1).standard_normal(shape).astype(ml_dtypes.bfloat16)
        tensors[path] = ShippedTensor(
            path=path,
            shape=shape,
            grid=None,
            dtype=x.dtype,
            read=lambda start, stop, x=x: x.reshape(-1, x.shape[-1])[start:stop],
        )
        entries.append(Entry(path=path, shape=shape[::-1], dtype="bfloat16", reason="float"))
    config = gq.model_config("e2b_mini")
    return Shipment(config=config, table=Table(tuple(entries)), tensors=tensors), codes


def test_a_shipment_gets_codes_where_its_floats_are_on_a_grid(monkeypatch):
    shipped, codes = shipment_on_grid()
    monkeypatch.setattr(lattice, "CHUNK_WEIGHTS", 4096)  # several pieces per tensor
    found, reports = recover_shipment(shipped)
    quantized = {path for path, tensor in found.tensors.items() if tensor.grid}
    assert quantized == set(codes)
    assert {r.path for r in reports if r.grid is None} == {"embed_tokens/weight"}
    assert {e.path for e in found.table.quantized} == quantized
    for path, (expected_codes, expected_scales) in codes.items():
        tensor = found.tensors[path]
        assert tensor.grid == NAMED_GRIDS["q4_0"]
        piece = tensor.read(3, tensor.num_rows)
        np.testing.assert_array_equal(piece.codes, expected_codes[3:])
        np.testing.assert_array_equal(piece.scales, expected_scales[3:])
    assert "100.00% of values" in str(next(r for r in reports if r.grid))


def test_a_tensor_that_is_partly_off_the_grid_stays_float_unless_less_will_do():
    shipped, codes = shipment_on_grid()
    path = next(iter(codes))
    tensor = shipped.tensors[path]
    rows = tensor.read(0, tensor.num_rows).copy()
    rows[0, :3] *= 1.05
    spoiled = dataclasses.replace(tensor, read=lambda a, b: rows[a:b])
    shipped = dataclasses.replace(shipped, tensors={path: spoiled})
    found, (report,) = recover_shipment(shipped)
    assert found.tensors[path].grid is None and 0.99 < report.values < 1
    found, _ = recover_shipment(shipped, least=0.99)
    assert found.tensors[path].grid is not None
