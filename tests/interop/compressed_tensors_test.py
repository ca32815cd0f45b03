"""compressed-tensors folders: what is written where, what is refused, what comes back."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from gemmaqat.interop.compressed_tensors import write_compressed_tensors
from gemmaqat.interop.compressed_tensors_reader import read_compressed_tensors
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.shipment import CarriedTensor
from gemmaqat.interop.source import of_model, values
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.activations import activation_scales, prepare, with_scales
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve
from gemmaqat.quantization.table import ON

TWO_LAYERS = ("sliding_attention", "full_attention")
Q_PROJ = "model.layers.0.self_attn.q_proj"
DYNAMIC = {"num_bits": 8, "strategy": "token", "dynamic": True}


def shipment_of(size, recipe, rules=(), clamps=None):
    sizes = {"num_kv_shared_layers": 0} if size == "e2b_mini" else {}
    model = Gemma4(model_config(size, layer_types=TWO_LAYERS, **sizes), rngs=nnx.Rngs(0))
    table = resolve(recipe, model, rules=rules)
    model = prepare(model, table)
    if clamps is not None:
        on = {f"{hook}/scale" for hook in table.dynamic}
        found = {h: clamps * (i % 3) for i, h in enumerate(activation_scales(model))}
        model = with_scales(model, found | dict.fromkeys(on, ON))
    return of_model(convert(model, table), table)


@pytest.fixture(scope="module")
def blocks():
    return shipment_of("e2b_mini", "w4a16_g32")


@pytest.fixture(scope="module")
def written(blocks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    write_compressed_tensors(blocks, folder, ExportOptions())
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "copy"))


def section(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def assert_same(left, right, *, floats=()):
    """Codes and scales bit-equal; of the paths in `floats`, the values."""
    assert left.tensors.keys() == right.tensors.keys()
    for path, tensor in left.tensors.items():
        other = right.tensors[path]
        assert other.shape == tensor.shape, path
        mine, theirs = (t.read(0, t.num_rows) for t in (tensor, other))
        if tensor.grid is None or path in floats:
            np.testing.assert_array_equal(values(tensor, mine), values(other, theirs))
            continue
        assert other.grid == tensor.grid, path
        np.testing.assert_array_equal(mine.codes, theirs.codes)
        np.testing.assert_array_equal(mine.scales, theirs.scales)
        assert mine.scales.dtype == theirs.scales.dtype


@pytest.mark.parametrize(
    "size, recipe, options",
    [
        ("e2b_mini", "q4_0", ExportOptions(shard_bytes=50_000)),
        ("e2b_mini", "int2_channel_emb", ExportOptions(packed_tables=True)),
        ("12b_mini", "int3_channel", ExportOptions()),
        ("12b_mini", "ternary", ExportOptions()),
        ("26b_a4b_mini", "w4a16_g32", ExportOptions(packed_experts=True)),
        ("31b_mini", "int8", ExportOptions()),
    ],
)
def test_codes_scales_and_grids_come_back(size, recipe, options, tmp_path):
    shipment = shipment_of(size, recipe)
    told = write_compressed_tensors(shipment, tmp_path, options)
    assert {t.path for t in told} == set(shipment.tensors)
    assert {t.path for t in told if t.kind == "exact"} == {e.path for e in shipment.table.quantized}
    back = read_compressed_tensors(tmp_path)
    assert_same(shipment, back)
    assert {e.path: e.shape for e in back.table.entries} == {
        e.path: e.shape for e in shipment.table.entries
    }


def test_experts_and_tables_are_floats_of_the_same_values_by_default(tmp_path):
    shipment = shipment_of("26b_a4b_mini", "w4a16_g32_emb")
    told = {t.path: t for t in write_compressed_tensors(shipment, tmp_path, ExportOptions())}
    floats = [p for p in shipment.tensors if "/experts/" in p] + ["embed_tokens/weight"]
    assert {told[path].stored for path in floats} == {"F32 on the grid"}
    back = read_compressed_tensors(tmp_path)
    assert_same(shipment, back, floats=floats)
    assert all(back.tensors[path].grid is None for path in floats)


def test_a_value_that_the_float_type_cannot_hold_is_refused_or_told_of(tmp_path):
    shipment = shipment_of("26b_a4b_mini", "int4_channel")
    options = ExportOptions(float_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"experts.*not exact in bfloat16; use .*scale_bits=5"):
        write_compressed_tensors(shipment, tmp_path, options)
    options = dataclasses.replace(options, allow_requantize=True)
    told = write_compressed_tensors(shipment, tmp_path, options)
    changed = {t.path for t in told if t.kind == "requantized"}
    assert changed == {path for path in shipment.tensors if "/experts/" in path}


def test_what_stays_float_is_ignored_by_its_whole_name(tmp_path):
    rules = [dict(module_path="layers/1/mlp/up_proj", weight_qtype=None)]
    write_compressed_tensors(shipment_of("26b_a4b_mini", "q4_0", rules), tmp_path, ExportOptions())
    assert section(tmp_path)["ignore"] == [
        "lm_head",
        "model.layers.0.router.proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.router.proj",
    ]


def test_a_linear_that_is_carried_is_ignored_under_both_of_its_names(blocks, tmp_path):
    name = "model.vision_embedder.patch_dense.weight"
    data = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = CarriedTensor(
        name=name, dtype="F32", shape=(2, 3), num_bytes=24,
        read=lambda start, stop: memoryview(data.tobytes())[start:stop],
    )  # fmt: skip
    config = blocks.config.to_hf()
    released = {"model_type": "gemma4_unified", "text_config": config, "vision_config": {}}
    shipment = dataclasses.replace(blocks, carried={name: tensor}, released_config=released)
    write_compressed_tensors(shipment, tmp_path, ExportOptions())
    ignored = section(tmp_path)["ignore"]
    assert {"model.vision_embedder.patch_dense", "model.embed_vision.patch_dense"} <= set(ignored)
    assert "model.language_model.layers.0.self_attn.q_proj.weight_packed" in load_file(
        tmp_path / "model.safetensors"
    )
    back = read_compressed_tensors(tmp_path)
    assert bytes(back.carried[name].read(0, 24)) == data.tobytes()


def test_every_grid_has_a_group_and_the_commonest_stands_for_all_linears(tmp_path):
    rules = [dict(module_path=r"layers/0/mlp/.*", weight_qtype="int8", scale_rule="absmax")]
    write_compressed_tensors(shipment_of("e2b_mini", "w4a16_g32", rules), tmp_path, ExportOptions())
    groups = section(tmp_path)["config_groups"]
    assert groups["group_0"]["targets"] == ["Linear"]
    assert groups["group_0"]["weights"]["group_size"] == 32
    assert groups["group_1"]["targets"] == [
        f"model.layers.0.mlp.{leaf}_proj" for leaf in ("down", "gate", "up")
    ]
    assert groups["group_1"]["weights"]["strategy"] == "channel"


def test_static_activation_scales_come_back_those_without_a_tensor_too(tmp_path):
    shipment = shipment_of("e2b_mini", "mobile_e2b_mini", clamps=0.25)
    write_compressed_tensors(shipment, tmp_path, ExportOptions(packed_tables=True))
    assert section(tmp_path)["format"] == "mixed-precision"
    back = read_compressed_tensors(tmp_path)
    assert_same(shipment, back)
    assert {e.path for e in back.table.activations} == {e.path for e in shipment.table.activations}


@pytest.mark.parametrize(
    "size, options, left",
    [
        ("e2b_mini", ExportOptions(), set()),
        # Float experts have no reader of their inputs; the rules of the recipe leave them alone.
        ("26b_a4b_mini", ExportOptions(), {"experts/input", "experts/down_proj/input"}),
        ("26b_a4b_mini", ExportOptions(packed_experts=True), set()),
    ],
)
def test_dynamic_inputs_come_back_those_of_float_experts_by_the_header(
    size, options, left, tmp_path
):
    rules = [dict(module_path=".*/o_proj", weight_qtype=None, act_qtype="int8"),
             dict(module_path=".*/experts/.*", weight_qtype="int8", act_qtype="int8"),
             dict(module_path="layers/1/mlp/(gate|up)_proj", weight_qtype="int8"),
             dict(module_path="layers/1/mlp/down_proj", weight_qtype="int8",
                  act_qtype="int8", act_static_scale=True)]  # fmt: skip
    if size == "e2b_mini":
        del rules[1]
    shipment = shipment_of(size, "w8a8", rules, clamps=ON)
    told = write_compressed_tensors(shipment, tmp_path, options)
    assert {t.path for t in told} == set(shipment.tensors)
    assert {t.path.split("/", 2)[2] for t in told if t.note.startswith("no reader")} == {
        f"{hook}/scale" for hook in left
    }
    back = read_compressed_tensors(tmp_path)
    assert back.table.dynamic == shipment.table.dynamic and len(back.table.dynamic) > 5
    assert {e.path for e in back.table.calibrated} == {"layers/1/mlp/down_proj/input"}
    experts = [path for path in shipment.tensors if "/experts/" in path]
    assert_same(shipment, back, floats=experts if left else ())


def test_w8a8_is_the_preset_of_the_format(tmp_path):
    write_compressed_tensors(shipment_of("e2b_mini", "w8a8", clamps=ON), tmp_path, ExportOptions())
    found = section(tmp_path)
    (group,) = found["config_groups"].values()
    assert (found["format"], group["format"], group["targets"]) == (
        "int-quantized", "int-quantized", ["Linear"],
    )  # fmt: skip
    expected = dict(num_bits=8, type="int", symmetric=True, group_size=None)
    assert group["weights"] == expected | dict(strategy="channel", dynamic=False)
    assert group["input_activations"] == expected | dict(strategy="token", dynamic=True)
    assert load_file(tmp_path / "model.safetensors")[f"{Q_PROJ}.weight"].dtype == np.int8


def test_targets_decide_by_name_then_pattern_then_class(tmp_path):
    """As others write them, who name few modules and ignore by pattern."""
    write_compressed_tensors(shipment_of("e2b_mini", "w8a8", clamps=ON), tmp_path, ExportOptions())
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    told = config["quantization_config"]
    (group,) = told["config_groups"].values()
    silent = group | {"input_activations": None}
    o_proj, down = (f"model.layers.1.{m}" for m in ("self_attn.o_proj", "mlp.down_proj"))
    told["config_groups"] |= {
        "by pattern": silent | {"targets": ["re:.*layers.1.(self_attn.o|mlp.down)_proj"]},
        "by name": group | {"targets": [down]},
    }
    told["ignore"].append("re:.*per_layer_input_gate")
    path.write_text(json.dumps(config))
    found = read_compressed_tensors(tmp_path).table.dynamic
    assert "layers/1/mlp/down_proj/input" in found and "layers/0/self_attn/o_proj/input" in found
    assert "layers/1/self_attn/o_proj/input" not in found, o_proj
    assert not any("per_layer_input_gate" in hook for hook in found)


def test_half_integer_levels_and_nothing_quantized_are_refused(tmp_path):
    with pytest.raises(ValueError, match="half-integer levels.*levels='full'"):
        write_compressed_tensors(
            shipment_of("e2b_mini", "int2_mid_channel"), tmp_path, ExportOptions()
        )
    with pytest.raises(ValueError, match="quantizes nothing"):
        write_compressed_tensors(shipment_of("e2b_mini", "none"), tmp_path, ExportOptions())


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_group(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"]["config_groups"]["group_0"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{Q_PROJ}.weight_scale"), "weight_scale' of a quantized"),
        (lambda t: t.pop(f"{Q_PROJ}.weight_shape"), "weight_shape' is missing"),
        (lambda t: t.pop(f"{Q_PROJ}.weight_packed"), "q_proj.weight' is missing"),
        (lambda t: t.update({f"{Q_PROJ}.weight_shape": np.array([64, 63])}), "says .64, 63."),
        (
            lambda t: t.update({f"{Q_PROJ}.weight_packed": t[f"{Q_PROJ}.weight_packed"][:, :-1]
                                .copy()}),
            "fits no group",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.weight_packed": t[f"{Q_PROJ}.weight_packed"]
                                .astype(np.float32)}),
            "is F32 of shape",
        ),
        (lambda t: t.update({f"{Q_PROJ}.weight_zero_point": np.zeros(2, np.int32)}), "no part of"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_one_sentence(folder, change, message):
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=message):
        read_compressed_tensors(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda g: g["weights"].update(num_bits=3), "fits no group.*3 bits"),
        (lambda g: g["weights"].update(num_bits=9), "num_bits is 9"),
        (lambda g: g["weights"].update(group_size="x"), "group_size is 'x'"),
        (lambda g: g["weights"].update(symmetric=False), "symmetric is False"),
        (lambda g: g["weights"].update(type="float"), "type is 'float'"),
        (lambda g: g.update(format="marlin-24"), "format 'marlin-24'"),
        (lambda g: g.update(weights=[4]), "weights is no object"),
        (lambda g: g.update(input_activations={"dynamic": True}), "input.*no symmetric int8 that"),
        (lambda g: g.update(input_activations=DYNAMIC | {"num_bits": 4}), "no symmetric int8 that"),
        (lambda g: g.update(output_activations=DYNAMIC), "only inputs can be"),
        (lambda g: g.update(targets=["re:("]), "group_0.targets is no list"),
        (lambda g: g.update(targets=[3]), "group_0.targets is no list"),
        (
            lambda g: g.update(input_activations=DYNAMIC, targets=[Q_PROJ]),
            "q_proj' is dynamic",
        ),
    ],
)
def test_a_configuration_that_cannot_be_is_one_sentence(folder, change, message):
    edit_group(folder, change)
    with pytest.raises(ValueError, match=message):
        read_compressed_tensors(folder)


def test_a_scale_that_is_not_finite_is_refused_when_it_is_read(folder):
    def change(tensors):
        tensors[f"{Q_PROJ}.weight_scale"][3, 1] = np.nan

    edit_tensors(folder, change)
    tensor = read_compressed_tensors(folder).tensors["layers/0/self_attn/q_proj/weight"]
    with pytest.raises(ValueError, match="layers/0/self_attn/q_proj/weight.*not finite"):
        tensor.read(0, 8)
