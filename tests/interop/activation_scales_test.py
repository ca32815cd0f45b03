"""Formats without a place for dynamic activations: kept in the header, told of, or refused."""

import pytest
from flax import nnx

from gemmaqat.interop.formats import find_format
from gemmaqat.interop.gguf_writer import NO_CLAMPS
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.packed_folder import save_packed
from gemmaqat.interop.source import of_model, of_packed_folder
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.calibration import calibrate
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve


@pytest.fixture(scope="module")
def packed():
    config = model_config("31b_mini", layer_types=("full_attention",) * 2)
    model = Gemma4(config, rngs=nnx.Rngs(0))
    table = resolve("w8a8", model, rules=[dict(module_path="layers/1/.*")])
    return convert(calibrate(model, table, []), table), table


@pytest.fixture(scope="module")
def shipment(packed):
    return of_model(*packed)


def inputs(table):
    return {e.path: (e.static, e.constant) for e in table.activations}


@pytest.mark.parametrize("format, told", [
    ("gemma-mobile", "a scale for each token.*compressed-tensors"),
    ("litert", "quantized dynamically"),
    ("orbax", "no place for quantized activations.*compressed-tensors"),
])  # fmt: skip
def test_what_cannot_be_evaluated_as_it_was_is_refused(shipment, format, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        find_format(format).write()(shipment, tmp_path, ExportOptions())


def test_a_gguf_says_of_each_linear_that_its_input_is_not_rounded(shipment, tmp_path):
    options = ExportOptions(allow_rescale=True)
    told = find_format("gguf").write()(shipment, tmp_path, options)
    noted = {t.path for t in told if NO_CLAMPS in t.note}
    assert noted == {e.path for e in shipment.table.quantized}


def test_floats_and_packed_folders_bring_dynamic_inputs_back(packed, shipment, tmp_path):
    find_format("hf").write()(shipment, tmp_path, ExportOptions())
    assert inputs(find_format("hf").read()(tmp_path).table) == inputs(shipment.table)
    save_packed(packed[0], tmp_path / "packed", table=packed[1])
    assert of_packed_folder(tmp_path / "packed").table == shipment.table
