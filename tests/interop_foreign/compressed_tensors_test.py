"""The compressed-tensors library itself unpacks our folders to our values, bit for bit."""

import json

import numpy as np
import pytest
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from flax import nnx
from safetensors.torch import load_file

from gemmaqat.interop.compressed_tensors import write_compressed_tensors
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.source import of_model, values
from gemmaqat.models.sizes import MINIATURES, model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("size", MINIATURES)
@pytest.mark.parametrize(
    "rule",
    [
        *(dict(weight_qtype=f"int{bits}", tile_size=0) for bits in (2, 3, 4, 8)),
        *(dict(weight_qtype="int4", tile_size=tile, scale_bits=5) for tile in (16, 32, 64)),
        dict(weight_qtype="int3", tile_size=32, scale_bits=6, scale_rule="ggml"),
    ],
    ids=str,
)
def test_every_packed_weight_decompresses_to_our_values(size, rule, tmp_path):
    rules = [dict(module_path=".*(router|embed|per_layer).*"), dict(**rule)]
    model = Gemma4(model_config(size), rngs=nnx.Rngs(0))
    table = resolve(rules, model)
    shipment = of_model(convert(model, table), table)
    write_compressed_tensors(shipment, tmp_path, ExportOptions(packed_experts=True))
    stored = load_file(tmp_path / "model.safetensors")
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(section).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    checked = 0
    for path, tensor in shipment.tensors.items():
        if tensor.grid is None or "/experts/" in path:
            continue
        module = "model." + path.removesuffix("/weight").replace("/", ".")
        parts = {
            name.removeprefix(f"{module}."): value
            for name, value in stored.items()
            if name.startswith(f"{module}.")
        }
        found = compressor.decompress(parts, scheme)["weight"]
        assert found.dtype == parts["weight_scale"].dtype
        np.testing.assert_array_equal(
            found.float().numpy(), values(tensor, tensor.read(0, tensor.num_rows)), err_msg=path
        )
        checked += 1
    assert checked == sum("/experts/" not in entry.path for entry in table.quantized) > 0
