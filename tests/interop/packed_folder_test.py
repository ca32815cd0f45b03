"""Packed folders: what was saved comes back bit for bit and computes the same."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemmaqat.generation import generate
from gemmaqat.interop.packed_folder import is_packed_folder, load_packed, save_packed
from gemmaqat.interop.safetensors_file import SafetensorsFile, write_safetensors
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.packed import PackedTensor
from gemmaqat.quantization.activations import activation_scales, prepare, with_scales
from gemmaqat.quantization.calibration import calibrate
from gemmaqat.quantization.convert import convert, dequantize_params
from gemmaqat.quantization.rules import resolve


def small_config(**fields):
    return model_config(
        "e2b_mini",
        layer_types=("sliding_attention", "full_attention"),
        num_kv_shared_layers=0,
        **fields,
    )


def abstract(model):
    return Gemma4(model.config, rngs=None)


@pytest.fixture(scope="module")
def table_and_packed():
    model = Gemma4(small_config(), rngs=nnx.Rngs(0))
    for block in model.layers:  # or a fresh model just repeats its last token
        norm = block.post_feedforward_layernorm.weight
        norm.set_value(16 * norm.get_value())
    table = resolve("int4_channel_emb", model)
    return table, convert(model, table)


@pytest.fixture
def saved(table_and_packed, tmp_path):
    table, packed = table_and_packed
    save_packed(packed, tmp_path / "packed", table=table)
    return tmp_path / "packed"


def is_packed(leaf) -> bool:
    return isinstance(leaf, PackedTensor)


def test_saved_weights_come_back_bit_for_bit_and_stay_packed(table_and_packed, tmp_path):
    table, packed = table_and_packed
    folder = tmp_path / "packed"
    save_packed(packed, folder, table=table)
    assert is_packed_folder(folder) and not is_packed_folder(tmp_path)
    loaded = load_packed(folder)
    before, after = (
        jax.tree_util.tree_leaves_with_path(nnx.state(m, nnx.Param), is_leaf=is_packed)
        for m in (packed, loaded)
    )
    assert len(before) == len(after)
    assert sum(is_packed(leaf) for _, leaf in after) == len(table.quantized)
    for (path, left), (_, right) in zip(before, after, strict=True):
        assert jax.tree.structure(left) == jax.tree.structure(right), path
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_packed_and_dequantized_models_generate_the_same(table_and_packed, tmp_path):
    table, packed = table_and_packed
    save_packed(packed, tmp_path / "packed", table=table)
    graphdef, params = nnx.split(packed)
    plain = nnx.merge(graphdef, dequantize_params(params))
    prompts = [[5, 9, 100], list(range(3, 12))]
    settings = dict(max_new_tokens=12, stop_ids=())
    expected = generate(plain, prompts, **settings).tokens
    assert all(len(set(tokens)) > 3 for tokens in expected)
    assert generate(load_packed(tmp_path / "packed"), prompts, **settings).tokens == expected


def test_a_folder_with_files_is_never_overwritten(table_and_packed, tmp_path):
    table, packed = table_and_packed
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        save_packed(packed, tmp_path, table=table)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_damage_is_named(table_and_packed, tmp_path):
    table, packed = table_and_packed
    folder = tmp_path / "packed"
    save_packed(packed, folder, table=table)
    weights = folder / "packed.safetensors"
    file = SafetensorsFile(weights)
    arrays = {name: np.array(file.array(name)) for name in file.tensors}
    del arrays["layers/0/mlp/up_proj/weight/scales"]
    write_safetensors(weights, arrays, metadata=file.metadata)
    with pytest.raises(ValueError, match=r"'layers/0/mlp/up_proj/weight/scales' is missing"):
        load_packed(folder)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        load_packed(folder)
    write_safetensors(weights, {"a": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="not written by gemmaqat"):
        load_packed(folder)


def changed_table(folder, change):
    """Rewrites quantization.json with `change(entries by path)`."""
    path = folder / "quantization.json"
    data = json.loads(path.read_text())
    change({entry["path"]: entry for entry in data["entries"]})
    path.write_text(json.dumps(data))


def set_grid(path, **fields):
    return lambda entries: entries[path]["grid"].update(fields)


def keep(path):
    return lambda entries: entries[path].update(grid=None, reason="by hand")


UP, NORM = "layers/0/mlp/up_proj/weight", "norm/weight"
OTHER_TABLES = {
    "bits": (set_grid(UP, bits=3), f"{UP}: 4 bits, .* -> 3 bits"),
    "block": (set_grid(UP, block=16), rf"{UP}: .* 1x\d+ float32 scales.* -> .* 4x\d+ float32"),
    "levels": (
        set_grid(UP, bits=2, levels="ternary"),
        f"{UP}: 4 bits, levels full.* -> 2 bits, levels ternary",
    ),
    "scale dtype": (set_grid(UP, scale_dtype="float16"), f"{UP}: .*float32.* -> .*float16 scales"),
    "kept": (keep(UP), f"{UP}: 4 bits, .* -> kept in float32"),
    "dtype": (
        lambda entries: entries[NORM].update(dtype="bfloat16"),
        f"{NORM}: kept in float32 -> kept in bfloat16",
    ),
    "another parameter": (
        lambda entries: entries[UP].update(path="layers/9/mlp/up_proj/weight"),
        f"quantization.json: '{UP}' is not in both",
    ),
    "damaged": (lambda entries: entries[UP].pop("shape"), "quantization.json: .*'shape'"),
}


@pytest.mark.parametrize("change, message", OTHER_TABLES.values(), ids=list(OTHER_TABLES))
def test_weights_that_were_not_converted_by_the_table_are_refused(saved, change, message):
    changed_table(saved, change)
    with pytest.raises(ValueError, match=message):
        load_packed(saved)


def test_another_table_is_refused_before_anything_is_written(table_and_packed, tmp_path):
    _, packed = table_and_packed
    with pytest.raises(ValueError, match=r"embed_tokens/weight: 4 bits.* -> kept in float32"):
        save_packed(packed, tmp_path / "packed", table=resolve("none", abstract(packed)))
    assert not (tmp_path / "packed").exists()


def test_missing_files_and_metadata_and_unknown_tensors_are_named(saved):
    weights = saved / "packed.safetensors"
    file = SafetensorsFile(weights)
    arrays = {name: np.array(file.array(name)) for name in file.tensors}
    write_safetensors(weights, arrays | {"extra": np.zeros(3)}, metadata=file.metadata)
    with pytest.raises(ValueError, match="'extra' is no parameter of the model"):
        load_packed(saved)
    for packed in ({}, {"packed": "{"}, {"packed": "[]"}):
        write_safetensors(weights, arrays, metadata={"format": file.metadata["format"], **packed})
        with pytest.raises(ValueError, match="holds no 'packed'"):
            load_packed(saved)
    layouts = json.loads(file.metadata["packed"])
    del layouts[UP]["transposed"]
    metadata = file.metadata | {"packed": json.dumps(layouts)}
    write_safetensors(weights, arrays, metadata=metadata)
    with pytest.raises(ValueError, match=f"{UP}: the metadata does not describe these arrays"):
        load_packed(saved)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"packed.safetensors: missing"):
        load_packed(saved)
    (saved / "quantization.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"quantization.json: missing"):
        load_packed(saved)


def test_parameters_keep_the_dtype_they_were_saved_in(tmp_path):
    model = Gemma4(small_config(param_dtype="bfloat16"), rngs=nnx.Rngs(0))
    table = resolve("int4_channel_emb", model)
    save_packed(convert(model, table), tmp_path / "packed", table=table)
    loaded = load_packed(tmp_path / "packed", dtype="float32")
    assert loaded.config.param_dtype == "bfloat16" and loaded.config.dtype == "float32"
    assert loaded.norm.weight.get_value().dtype == jnp.bfloat16


def test_written_safetensors_are_read_by_the_safetensors_package(tmp_path):
    from safetensors.numpy import load_file

    arrays = {
        "a": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "b/c": np.arange(5, dtype=np.uint32),
        "d": np.zeros((0, 4), np.float32),
    }
    write_safetensors(tmp_path / "x.safetensors", arrays, metadata={"k": "v"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(loaded[name], np.asarray(value))
    assert SafetensorsFile(Path(tmp_path / "x.safetensors")).metadata == {"k": "v"}


@pytest.fixture(scope="module")
def clamped():
    """A converted model with quantized activations, and its table."""
    model = Gemma4(small_config(), rngs=nnx.Rngs(0))
    table = resolve("mobile_e2b_mini", model)
    batches = [jnp.arange(24, dtype=jnp.int32).reshape(2, 12)]
    return table, convert(calibrate(model, table, batches), table)


def test_activation_scales_come_back_and_clamp(clamped, tmp_path):
    table, packed = clamped
    save_packed(packed, tmp_path / "packed", table=table)
    loaded = load_packed(tmp_path / "packed")
    expected = {path: float(scale) for path, scale in activation_scales(packed).items()}
    assert {path: float(s) for path, s in activation_scales(loaded).items()} == expected
    assert min(expected.values()) > 0
    tokens = jnp.arange(20, dtype=jnp.int32).reshape(1, 20)
    np.testing.assert_array_equal(loaded(tokens).logits, packed(tokens).logits)


def test_quantizers_that_the_table_does_not_name_are_left_out(tmp_path):
    model = Gemma4(small_config(), rngs=nnx.Rngs(0))
    table = resolve("int4_channel", model)
    prepared = prepare(model, resolve("mobile_e2b_mini", model))
    save_packed(convert(prepared, table), tmp_path / "packed", table=table)
    assert not activation_scales(load_packed(tmp_path / "packed"))


@pytest.mark.parametrize("prepared", [True, False])
def test_activations_without_scales_are_refused(prepared, tmp_path):
    model = Gemma4(small_config(), rngs=nnx.Rngs(0))
    table = resolve("mobile_e2b_mini", model)
    model = convert(prepare(model, table) if prepared else model, table)
    with pytest.raises(ValueError, match=r"no scales for \d+ of them; calibrate it"):
        save_packed(model, tmp_path / "packed", table=table)
    assert not (tmp_path / "packed").exists()


def test_one_activation_without_a_scale_is_refused(clamped, tmp_path):
    table, packed = clamped
    one_off = with_scales(packed, {"layers/0/mlp/input/scale": 0.0})
    with pytest.raises(ValueError, match="layers/0/mlp/input: .* no scales for 1 of them"):
        save_packed(one_off, tmp_path / "packed", table=table)


def test_a_lost_scale_is_missed(clamped, tmp_path):
    table, packed = clamped
    save_packed(packed, tmp_path / "packed", table=table)
    file = SafetensorsFile(tmp_path / "packed" / "packed.safetensors")
    arrays = {name: np.array(file.array(name)) for name in file.tensors}
    del arrays["layers/0/mlp/input/scale"]
    write_safetensors(file.path, arrays, metadata=dict(file.metadata))
    with pytest.raises(ValueError, match="'layers/0/mlp/input/scale' is missing"):
        load_packed(tmp_path / "packed")
