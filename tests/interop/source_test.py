"""Shipments: a model goes through one bit for bit; folders give the codes of `convert`."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from gemmaqat.interop import source
from gemmaqat.interop.hf import load_pretrained
from gemmaqat.interop.packed_folder import save_packed
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.packed import PackedTensor
from gemmaqat.planning.parameters import abstract_model
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve

GOLDEN = Path(__file__).parents[1] / "golden" / "gemma4"
PREFIX = "model.language_model."


def leaves(model) -> dict:
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in flat}


def assert_same_model(left, right):
    left, right = leaves(left), leaves(right)
    assert left.keys() == right.keys()
    for path in left:
        assert jax.tree.structure(left[path]) == jax.tree.structure(right[path]), path
        for a, b in zip(jax.tree.leaves(left[path]), jax.tree.leaves(right[path]), strict=True):
            assert a.dtype == b.dtype, path
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


def converted(size: str, recipe: str):
    layers = ("sliding_attention", "full_attention")
    shared = dict(num_kv_shared_layers=0) if size.startswith("e") else {}
    config = model_config(size, layer_types=layers, **shared)
    model = Gemma4(config, rngs=nnx.Rngs(0))
    table = resolve(recipe, model)
    return convert(model, table), table


@pytest.mark.parametrize("size", ["e2b_mini", "26b_a4b_mini"])
@pytest.mark.parametrize("recipe", ["q4_0_emb", "int2_channel_emb", "int8", "int3_channel"])
def test_a_model_goes_through_a_shipment_bit_for_bit(size, recipe):
    model, table = converted(size, recipe)
    assert_same_model(source.to_model(source.of_model(model, table)), model)


def test_a_scale_per_matrix_goes_through_a_shipment():
    model = Gemma4(model_config("26b_a4b_mini"), rngs=nnx.Rngs(0))
    rule = dict(weight_qtype="int8", disable_channelwise_axes=True)
    table = resolve([rule], model)
    packed = convert(model, table)
    assert_same_model(source.to_model(source.of_model(packed, table)), packed)


@pytest.mark.parametrize("start, stop", [(0, 1), (3, 70), (60, 64), (0, 512), (500, 512)])
def test_any_range_of_rows_is_that_of_the_dequantized_weight(start, stop):
    model, table = converted("26b_a4b_mini", "q4_0")
    path = "layers/1/experts/down_proj/weight"
    tensor = source.of_model(model, table).tensors[path]
    assert tensor.shape == (8, 64, 64) and tensor.num_rows == 512
    whole = np.asarray(leaves(model)[path].dequantize().mT).reshape(512, 64)
    found = source.values(tensor, tensor.read(start, stop))
    np.testing.assert_array_equal(found, whole[start:stop])


def test_pieces_cover_every_row_once():
    model, table = converted("e2b_mini", "q4_0_emb")
    tensor = source.of_model(model, table).tensors["embed_tokens/weight"]
    found = list(source.pieces(tensor, num_bytes=4 * 64 * 50))
    assert [(start, stop) for start, stop, _ in found] == [(0, 50), (50, 100), (100, 128)]
    whole = np.concatenate([piece.codes for _, _, piece in found])
    np.testing.assert_array_equal(whole, leaves(model)["embed_tokens/weight"].codes())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Random miniatures as Hugging Face folders, in bfloat16 as released ones are."""
    found = {}
    for size in ("e2b_mini", "26b_a4b_mini"):
        folder = found[size] = tmp_path_factory.mktemp(size)
        model = Gemma4(
            model_config(size, layer_types=("sliding_attention", "full_attention") * 2),
            rngs=nnx.Rngs(1),
        )
        tensors = {}
        for path, value in leaves(model).items():
            array = np.asarray(value)
            if source.hf.is_transposed(path, array.ndim):
                array = np.swapaxes(array, -1, -2)
            name = PREFIX + source.hf.tensor_name(path)
            tensors[name] = np.ascontiguousarray(array.astype(ml_dtypes.bfloat16))
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    return found


@pytest.mark.parametrize("size", ["e2b_mini", "26b_a4b_mini"])
@pytest.mark.parametrize(
    "recipe",
    ["q4_0_emb", "q4_0_ggml", "w4a16_g32_emb", "int2_channel_emb", "int2_mid_channel", "ternary",
     "int8", "int3_channel"],
)  # fmt: skip
def test_a_folder_gives_the_codes_that_convert_gives(folders, size, recipe):
    model = load_pretrained(folders[size], param_dtype="bfloat16")
    table = resolve(recipe, model)
    shipped = source.to_model(source.of_folder(folders[size], table), param_dtype="bfloat16")
    assert_same_model(shipped, convert(model, table))


@pytest.mark.parametrize(
    "rule",
    [dict(scale_rule="mse", tile_size=32), dict(disable_channelwise_axes=True)],
    ids=["searched scale", "scale per matrix"],
)
def test_a_folder_gives_the_codes_of_other_rules_too(folders, rule):
    folder = folders["26b_a4b_mini"]
    model = load_pretrained(folder)
    table = resolve([dict(weight_qtype="int4") | rule], model)
    shipped = source.to_model(source.of_folder(folder, table))
    assert_same_model(shipped, convert(model, table))


def test_batches_of_rows_do_not_change_the_codes(folders, monkeypatch):
    folder = folders["e2b_mini"]
    table = resolve("int2_channel_emb", load_pretrained(folder))
    whole = source.of_folder(folder, table).tensors["embed_tokens/weight"]
    expected = whole.read(0, whole.num_rows)
    monkeypatch.setattr(source, "_BATCH", 7 * whole.row_length)
    for start, stop, piece in source.pieces(whole, num_bytes=4 * whole.row_length * 33):
        np.testing.assert_array_equal(piece.codes, expected.codes[start:stop])
        np.testing.assert_array_equal(piece.scales, expected.scales[start:stop])


def test_what_is_not_ours_is_carried_byte_for_byte(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "e2b", tmp_path / "e2b"))
    tensors = load_file(folder / "model.safetensors")
    tower = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors["model.vision_tower.patch.weight"] = tower
    tensors["lm_head.weight"] = tensors[f"{PREFIX}embed_tokens.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    (folder / "generation_config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")

    config = source.hf.read_config(folder)
    kept = source.of_folder(folder, resolve("int8", abstract_model(config)))
    carried = kept.carried["model.vision_tower.patch.weight"]
    assert bytes(carried.read(0, carried.num_bytes)) == tower.tobytes()
    assert bytes(carried.read(8, 20)) == tower.tobytes()[8:20]
    assert (carried.dtype, carried.shape, carried.num_bytes) == ("F32", (4, 6), 96)
    assert "lm_head.weight" in kept.carried
    unused = [name for name in kept.carried if ".self_attn." in name]
    assert len(unused) == 15 and all(".k_" in name or ".v_" in name for name in unused)
    assert set(kept.files) == {"generation_config.json"}
    assert kept.released_config == json.loads((folder / "config.json").read_text())

    quantized = source.of_folder(folder, resolve("int8_emb", abstract_model(config)))
    assert "lm_head.weight" not in quantized.carried  # it would contradict the codes


def test_a_packed_folder_ships_what_was_saved(tmp_path):
    model, table = converted("e2b_mini", "q4_0_emb")
    save_packed(model, tmp_path / "packed", table=table)
    assert_same_model(source.to_model(source.of_packed_folder(tmp_path / "packed")), model)


def test_a_model_that_was_not_converted_by_the_table_is_refused():
    config = model_config("e2b_mini")
    model = Gemma4(config, rngs=nnx.Rngs(0))
    table = resolve("int8", model)
    with pytest.raises(ValueError, match="stored in float, the table says int8 channel"):
        source.of_model(model, table)
    with pytest.raises(ValueError, match=r"stored packed.*table says float"):
        source.of_model(convert(model, table), resolve("none", model))


def test_infinite_weights_are_refused_by_name(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "e2b", tmp_path / "e2b"))
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{PREFIX}layers.0.mlp.up_proj.weight"][3, 5] = np.inf
    save_file(tensors, folder / "model.safetensors")
    table = resolve("int8", abstract_model(source.hf.read_config(folder)))
    tensor = source.of_folder(folder, table).tensors["layers/0/mlp/up_proj/weight"]
    with pytest.raises(ValueError, match="layers/0/mlp/up_proj/weight: the weight holds NaN"):
        tensor.read(0, tensor.num_rows)


def test_values_of_half_levels_are_those_of_the_packed_weight():
    model, table = converted("e2b_mini", "int2_mid_channel")
    path = "layers/0/mlp/up_proj/weight"
    tensor = source.of_model(model, table).tensors[path]
    packed = leaves(model)[path]
    assert isinstance(packed, PackedTensor) and packed.layout.levels == "half"
    found = source.values(tensor, tensor.read(0, tensor.num_rows))
    np.testing.assert_array_equal(found, jnp.asarray(packed.dequantize()).T)
