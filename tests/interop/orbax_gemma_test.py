"""Orbax folders in the google-deepmind tree: out and in, plain and stacked, and what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from gemmaqat.interop.export import export
from gemmaqat.interop.formats import detect
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.orbax_gemma import read_orbax, write_orbax
from gemmaqat.interop.orbax_tree import canonical, leaves
from gemmaqat.interop.shipment import CarriedTensor
from gemmaqat.interop.source import of_model, to_model, values
from gemmaqat.interop.verify import verify
from gemmaqat.models.sizes import MINIATURES, model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve

STACKABLE = ("e4b_mini", "12b_mini", "26b_a4b_mini", "31b_mini")
PREFIX = "rlx_networks/policy_network/"


@pytest.fixture(scope="module", params=MINIATURES)
def model(request):
    return Gemma4(model_config(request.param), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def e2b():
    model = Gemma4(model_config("e2b_mini"), rngs=nnx.Rngs(0))
    return of_model(model, resolve("none", model))


def _write(shipment, folder, **options):
    folder.mkdir()
    return write_orbax(shipment, folder, ExportOptions(**options))


def _restore(folder):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder)


def _save(folder, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
        checkpointer.wait_until_finished()


def _params(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(value.get_value()) for path, value in flat}


@pytest.mark.parametrize("stacked", [False, True], ids=["plain", "stacked"])
def test_every_parameter_comes_back_from_either_layout(model, stacked, tmp_path):
    if stacked and model.config.name not in STACKABLE:
        return
    shipment = of_model(model, resolve("none", model))
    written = _write(shipment, tmp_path / "out", stacked_layers=stacked)
    assert {item.path for item in written} == set(shipment.tensors)
    (tmp_path / "out" / "config.json").unlink()  # the size shows in the shapes
    shipment = read_orbax(tmp_path / "out")
    assert shipment.config.name == model.config.name and not shipment.carried
    back = _params(to_model(shipment))
    for path, value in _params(model).items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)


def test_leaves_have_the_shapes_and_the_orientation_of_the_library(e2b, tmp_path):
    _write(e2b, tmp_path / "out")
    tree = _restore(tmp_path / "out")
    source = {path: np.asarray(t.read(0, t.num_rows)) for path, t in e2b.tensors.items()}
    attention, kept = tree["layer_1"]["attn"], "layers/1/self_attn"  # a full-attention layer
    query = source[f"{kept}/q_proj/weight"].reshape(2, 64, 64)  # [heads, head, D]
    np.testing.assert_array_equal(attention["q_einsum"]["w"], query.transpose(0, 2, 1))
    np.testing.assert_array_equal(
        attention["kv_einsum"]["w"][1, 0], source[f"{kept}/v_proj/weight"].T
    )
    out = source[f"{kept}/o_proj/weight"].reshape(64, 2, 64)  # [D, heads, head]
    np.testing.assert_array_equal(attention["attn_vec_einsum"]["w"], out.transpose(1, 2, 0))
    mlp = tree["layer_1"]["mlp"]
    np.testing.assert_array_equal(mlp["gating_einsum"][1], source["layers/1/mlp/up_proj/weight"])
    np.testing.assert_array_equal(mlp["linear"], source["layers/1/mlp/down_proj/weight"].T)
    table = source["embed_tokens_per_layer/weight"].reshape(128, 4, 64)
    np.testing.assert_array_equal(tree["embedder"]["per_layer_embeddings"], table)
    projection = source["per_layer_model_projection/weight"].reshape(4, 64, 64)
    np.testing.assert_array_equal(
        tree["embedder"]["per_layer_model_projection"]["w"], projection.transpose(2, 0, 1)
    )


def test_the_two_branches_of_26b_go_under_their_crossed_names(tmp_path):
    names = {
        leaf.name.partition("/")[2]: leaf.paths[0].partition("/")[2].partition("/")[2]
        for leaf in leaves(model_config("26b_a4b_mini"))
        if leaf.name.startswith("layer_0/") and "ff" in leaf.name or "/mlp" in leaf.name
    }
    assert names["mlp2/linear"] == "mlp/down_proj/weight"
    assert names["mlp/linear"] == "experts/down_proj/weight"
    assert names["pre_ffw2_norm/scale"] == "pre_feedforward_layernorm/weight"
    assert names["pre_ffw_norm/scale"] == "pre_feedforward_layernorm_2/weight"
    assert names["post_ffw2_norm/scale"] == "post_feedforward_layernorm_1/weight"
    assert names["post_ffw1_norm/scale"] == "post_feedforward_layernorm_2/weight"
    assert names["post_ffw_norm/scale"] == "post_feedforward_layernorm/weight"


@pytest.mark.parametrize("where", [PREFIX, "transformer/", f"{PREFIX}transformer/"])
def test_any_prefix_is_read_and_encoders_are_left_aside(e2b, where, tmp_path):
    _write(e2b, tmp_path / "plain")
    flat: dict = {"SigLiPFromPatches_0/head": {"w": np.ones((2, 2), np.float32)}}
    for path, array in jax.tree_util.tree_flatten_with_path(_restore(tmp_path / "plain"))[0]:
        name = where + "/".join(key.key for key in path)
        name += "/w" * (canonical(f"{name}/w") == name)  # as on disk
        parent, _, leaf = name.rpartition("/")
        flat.setdefault(parent, {})[leaf] = array
    flat[f"{where}vision_encoder"] = {"scale": np.ones(3, np.float32)}
    _save(tmp_path / "flat", flat)
    shipment = read_orbax(tmp_path / "flat")
    assert shipment.config.name == "e2b_mini"
    tensor = shipment.tensors["layers/3/mlp/down_proj/weight"]
    expected = e2b.tensors["layers/3/mlp/down_proj/weight"].read(5, 9)
    np.testing.assert_array_equal(tensor.read(5, 9), expected)


def test_a_trainers_state_gives_its_parameters_not_their_moments(e2b, tmp_path):
    _write(e2b, tmp_path / "plain")
    params = _restore(tmp_path / "plain")
    moments = jax.tree.map(jnp.zeros_like, params)
    state = {"params": params, "opt_state": {"mu": moments}, "step": np.int32(3)}
    _save(tmp_path / "run" / "default", state)
    tensor = read_orbax(tmp_path / "run").tensors["norm/weight"]
    np.testing.assert_array_equal(tensor.read(0, 1), e2b.tensors["norm/weight"].read(0, 1))


def test_a_folder_is_recognised_at_and_above_the_checkpoint(e2b, tmp_path):
    (tmp_path / "run").mkdir()
    _write(e2b, tmp_path / "run" / "params")
    assert detect(tmp_path / "run") == ("orbax", tmp_path / "run")
    assert detect(tmp_path / "run" / "params") == ("orbax", tmp_path / "run" / "params")
    assert read_orbax(tmp_path / "run").config.name == "e2b_mini"


def test_quantized_weights_go_out_as_the_exact_values_of_their_grid(tmp_path):
    model = Gemma4(model_config("31b_mini"), rngs=nnx.Rngs(0))
    table = resolve("q4_0", model)
    source = of_model(convert(model, table), table)
    kinds = {w.path: w for w in _write(source, tmp_path / "out", float_dtype="float32")}
    assert all(kinds[e.path].kind == "exact" for e in table.quantized)
    assert all(kinds[e.path].kind == "kept" for e in table.kept)
    back = read_orbax(tmp_path / "out")
    for entry in table.quantized:
        tensor = source.tensors[entry.path]
        expected = values(tensor, tensor.read(0, tensor.num_rows))
        found = back.tensors[entry.path].read(0, tensor.num_rows)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("stacked", [False, True])
def test_an_export_is_certified_exact_and_verifies(stacked, tmp_path):
    model = Gemma4(model_config("31b_mini"), rngs=nnx.Rngs(0))
    table = resolve("q4_0_emb", model)
    options = ExportOptions(float_dtype="bfloat16", stacked_layers=stacked)
    certificate = export(
        convert(model, table), tmp_path / "out", format="orbax", table=table, options=options
    )
    kinds = {tensor.path: tensor.kind for tensor in certificate.tensors}
    assert all((kinds[e.path] == "exact") == (e.grid is not None) for e in table.entries)
    assert verify(tmp_path / "out").tensors == len(table.entries)


def test_a_dtype_that_rounds_the_grid_is_refused_unless_allowed(tmp_path):
    model = Gemma4(model_config("31b_mini"), rngs=nnx.Rngs(0))
    table = resolve("int8", model)
    source = of_model(convert(model, table), table)
    with pytest.raises(ValueError, match="not exact in bfloat16; use scales of fewer"):
        _write(source, tmp_path / "a", float_dtype="bfloat16")
    written = _write(source, tmp_path / "b", float_dtype="bfloat16", allow_requantize=True)
    kinds = {item.kind for item in written if "_proj" in item.path}
    assert kinds == {"requantized"}
    assert read_orbax(tmp_path / "b").tensors["norm/weight"].dtype == ml_dtypes.bfloat16


def test_unread_keys_of_sharing_layers_are_carried_both_ways(e2b, tmp_path):
    keys = np.arange(32 * 64, dtype=np.float32).reshape(32, 64) / 512
    name = "model.language_model.layers.2.self_attn.k_proj.weight"
    data = memoryview(keys.tobytes())
    carried = CarriedTensor(
        name=name, dtype="F32", shape=keys.shape, num_bytes=len(data),
        read=lambda start, stop: data[start:stop],
    )  # fmt: skip
    source = e2b.__class__(**{**vars(e2b), "carried": {name: carried}})
    written = _write(source, tmp_path / "out")
    assert [item.path for item in written if item.kind == "carried"] == [name]
    back = read_orbax(tmp_path / "out").carried
    found = back["model.layers.2.self_attn.k_proj.weight"]
    assert bytes(found.read(0, found.num_bytes)) == bytes(data) and found.shape == (32, 64)


def test_what_the_tree_has_no_place_for_is_refused(e2b, tmp_path):
    data = memoryview(bytes(4))
    tower = CarriedTensor(
        name="model.vision_tower.x", dtype="F32", shape=(1,), num_bytes=4,
        read=lambda start, stop: data[start:stop],
    )  # fmt: skip
    source = e2b.__class__(**{**vars(e2b), "carried": {tower.name: tower}})
    with pytest.raises(ValueError, match=r"model.vision_tower.x.*export with text_only"):
        _write(source, tmp_path / "a")
    _write(source, tmp_path / "b", text_only=True)
    with pytest.raises(ValueError, match="cannot be stacked; export plain layers"):
        _write(e2b, tmp_path / "c", stacked_layers=True)


def test_a_config_beside_the_arrays_is_used_and_must_agree(e2b, tmp_path):
    _write(e2b, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"sliding_window": 7}))
    assert read_orbax(tmp_path / "out").config.sliding_window == 7
    path.write_text(json.dumps(fields | {"intermediate_size": 256}))
    with pytest.raises(ValueError, match=r"gating_einsum.*has shape .*do not belong together"):
        read_orbax(tmp_path / "out")
    with pytest.raises(ValueError, match="do not belong together"):
        read_orbax(tmp_path / "out", config=model_config("31b_mini"))


def test_trees_that_are_none_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="no Orbax checkpoint"):
        read_orbax(tmp_path)
    _save(tmp_path / "other", {"dense": {"kernel": np.ones((2, 2), np.float32)}})
    with pytest.raises(ValueError, match=r"no 'embedder/input_embedding'.*dense/kernel"):
        read_orbax(tmp_path / "other")
    unknown = {"embedder": {"input_embedding": np.ones((7, 3), np.float32)}}
    _save(tmp_path / "unknown", unknown)
    with pytest.raises(ValueError, match=r"of no size known here \(embedding \[7, 3\]\)"):
        read_orbax(tmp_path / "unknown")


# Orbax leaves tasks of a closed loop behind where storage failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_refused_whatever_was_hit(e2b, tmp_path):
    _write(e2b, tmp_path / "good")
    whole = tmp_path / "good"
    victims = [p for p in whole.rglob("*") if p.is_file() and p.name != "config.json"]
    for i, victim in enumerate(victims):
        for cut in (0, 0.5):
            damaged = tmp_path / f"bad{i}_{cut}"
            shutil.copytree(whole, damaged)
            target = damaged / victim.relative_to(whole)
            target.write_bytes(target.read_bytes()[: int(cut * victim.stat().st_size)])
            try:
                to_model(read_orbax(damaged))
            except (ValueError, FileNotFoundError) as error:
                assert len(str(error)) < 500
