"""Mobile checkpoints: every scale explicit, what no reader takes refused, all read back."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from gemmaqat.interop.gemma_mobile import write_gemma_mobile
from gemmaqat.interop.gemma_mobile_reader import read_gemma_mobile
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.source import of_model, values
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.activations import activation_scales, prepare, with_scales
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve

ONE_SCALE_PER_ROW = [
    dict(module_path="embed_tokens_per_layer", weight_qtype="int4", scale_rule="mse")
]
UP = "model.layers.0.mlp.up_proj"


def shipment_of(recipe="mobile_e2b_mini", rules=ONE_SCALE_PER_ROW):
    model = Gemma4(model_config("e2b_mini"), rngs=nnx.Rngs(0))
    table = resolve(recipe, model, rules=rules)
    model = prepare(model, table)
    found = {hook: 0.125 * (i % 5) for i, hook in enumerate(activation_scales(model))}
    return of_model(convert(with_scales(model, found), table), table)


@pytest.fixture(scope="module")
def shipment():
    return shipment_of()


@pytest.fixture(scope="module")
def written(shipment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_gemma_mobile(shipment, folder, ExportOptions())
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy"))


def assert_same(left, right):
    assert left.tensors.keys() == right.tensors.keys()
    for path, tensor in left.tensors.items():
        other = right.tensors[path]
        mine, theirs = (t.read(0, t.num_rows) for t in (tensor, other))
        if tensor.grid is None:
            np.testing.assert_array_equal(mine, theirs, err_msg=path)
        else:
            assert other.grid == tensor.grid, path
            np.testing.assert_array_equal(mine.codes, theirs.codes)
            np.testing.assert_array_equal(mine.scales, theirs.scales)


def test_codes_scales_and_activation_scales_come_back(shipment, written):
    back = read_gemma_mobile(written)
    assert_same(shipment, back)
    assert {e.path for e in back.table.activations} == {e.path for e in shipment.table.activations}


def test_packed_bytes_hold_the_codes_lowest_bits_first(shipment, written):
    stored = load_file(written / "model.safetensors")
    for path, name, bits in (
        ("layers/0/mlp/up_proj/weight", f"{UP}.weight", 4),
        ("layers/2/mlp/up_proj/weight", "model.layers.2.mlp.up_proj.weight", 2),
        ("embed_tokens/weight", "model.embed_tokens.embedding_quantized", 2),
    ):
        tensor = shipment.tensors[path]
        codes = tensor.read(0, 1).codes[0].astype(int)
        whole = sum((c + 2 ** (bits - 1)) << (i * bits) for i, c in enumerate(codes.tolist()))
        assert stored[name][0].tobytes() == whole.to_bytes(len(codes) * bits // 8, "little")
    gate = stored["model.layers.0.per_layer_input_gate.weight"]
    tensor = shipment.tensors["layers/0/per_layer_input_gate/weight"]
    np.testing.assert_array_equal(gate, tensor.read(0, tensor.num_rows).codes)


def test_every_quantized_linear_has_both_its_scales_zeros_included(shipment, written):
    stored = load_file(written / "model.safetensors")
    for entry in shipment.table.quantized:
        if entry.path.startswith("embed_tokens"):
            continue
        module = "model." + entry.path.removesuffix("/weight").replace("/", ".")
        for leaf in ("input_activation_scale", "output_activation_scale"):
            assert stored[f"{module}.{leaf}"].shape == ()
    assert stored["lm_head.input_activation_scale"] == 0
    assert stored["lm_head.output_activation_scale"] == 0
    np.testing.assert_array_equal(
        stored["lm_head.weight"], stored["model.embed_tokens.embedding_quantized"]
    )
    # Layers 2 and 3 share the keys of layers 0 and 1.
    for layer in (0, 1):
        for name in ("k_cache_scale", "v_cache_scale"):
            owner, sharer = (f"model.layers.{i}.self_attn.{name}" for i in (layer, layer + 2))
            assert stored[owner] == stored[sharer]


def test_patterns_give_every_module_its_bits_as_transformers_searches_them(shipment, written):
    config = json.loads((written / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    section = config["quantization_config"]
    assert section["quantize_embeddings"] is True
    assert section["modules_to_not_convert"] == ["model.per_layer_model_projection"]
    patterns = section["module_quant_configs"]
    for entry in shipment.table.quantized:
        module = "model." + entry.path.removesuffix("/weight").replace("/", ".")
        found = [value for pattern, value in patterns.items() if re.search(pattern, module)]
        assert found == [{"num_bits": entry.grid.bits}], module


def test_one_scale_per_row_and_layer_is_refused_written_or_rounded_as_asked(tmp_path):
    shipment = shipment_of(rules=())
    path = "embed_tokens_per_layer/weight"
    with pytest.raises(ValueError, match="4 scales per row.*tile_size=0.*per_layer_scales"):
        write_gemma_mobile(shipment, tmp_path, ExportOptions())
    for name, options, kind in (
        ("per_layer", ExportOptions(per_layer_scales=True), "exact"),
        ("rounded", ExportOptions(allow_requantize=True), "requantized"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        told = {t.path: t for t in write_gemma_mobile(shipment, folder, options)}
        assert told[path].kind == kind
        scale = load_file(folder / "model.safetensors")[
            "model.embed_tokens_per_layer.embedding_scale"
        ]
        back = read_gemma_mobile(folder)
        if kind == "exact":
            assert scale.shape == (128, 4)
            assert_same(shipment, back)
        else:
            assert scale.shape == (128, 1)
            left, right = shipment.tensors[path], back.tensors[path]
            wanted, found = (values(t, t.read(0, 128)) for t in (left, right))
            assert 0 < np.abs(wanted - found).mean() < scale.mean()  # the search may clip


def test_blocks_and_half_integer_levels_are_refused_with_a_way_out(tmp_path):
    with pytest.raises(ValueError, match="one scale per row; use tile_size=0"):
        write_gemma_mobile(shipment_of("q4_0", ()), tmp_path, ExportOptions())
    with pytest.raises(ValueError, match="half-integer levels"):
        write_gemma_mobile(shipment_of("int2_mid_channel", ()), tmp_path, ExportOptions())


@pytest.mark.parametrize(
    "name, value, message",
    [
        (f"{UP}.weight_scale", None, "weight_scale' is missing"),
        (f"{UP}.weight", None, "weight' is missing"),
        (f"{UP}.weight", np.zeros((128, 31), np.uint8), "fits none of the 2, 4, 8 bits"),
        (f"{UP}.weight_scale", np.ones((64, 1), np.float32), "expected F32"),
        (f"{UP}.input_activation_scale", np.float32(-1), "is -1.0, expected 0"),
        (f"{UP}.input_activation_scale", np.float32(7), "they must agree"),
        (f"{UP}.input_activation_scale", np.ones(2, np.float32), "of shape .2., expected"),
        ("lm_head.output_activation_scale", np.float32(1), "takes float activations"),
        ("lm_head.weight", np.zeros((128, 16), np.uint8), "differs from"),
        ("model.layers.9.mlp.up_proj.weight", np.zeros(2, np.float32), "no part of"),
    ],
)
def test_tensors_that_do_not_fit_are_one_sentence(folder, name, value, message):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = np.asarray(value)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=message):
        read_gemma_mobile(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(quant_method="gptq"), "quant_method is 'gptq', expected 'gemma'"),
        (dict(num_bits=5), "num_bits is 5"),
        (dict(num_bits=8, module_quant_configs={}), "fits none of the 8 bits"),
        (dict(module_quant_configs=[2]), "no object of objects"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_sentence(folder, change, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_gemma_mobile(folder)
