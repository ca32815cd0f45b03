"""One function reads every format: packed stays packed, and a run can go on from it."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from gemmaqat.compare import evaluate
from gemmaqat.config import base, parse, tiny
from gemmaqat.interop.export import export
from gemmaqat.interop.load import read_config, read_float, read_pretrained
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.packed_folder import save_packed
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.packed import PackedTensor
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve
from gemmaqat.training.start import initial_config, initial_model

FORMATS = ("hf", "gguf", "compressed-tensors", "gemma-mobile", "orbax")


def experiment(checkpoint: Path):
    config = tiny(base("31b_mini"))
    config.model.checkpoint = str(checkpoint)
    return parse(config)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("shipped")
    layers = ("sliding_attention", "full_attention")
    model = Gemma4(model_config("31b_mini", layer_types=layers), rngs=nnx.Rngs(0))
    folders = {}
    for name in FORMATS:
        recipe = "int4_channel" if name == "gemma-mobile" else "q4_0"
        table = resolve(recipe, model)
        options = ExportOptions(allow_requantize=True)
        export(convert(model, table), root / name, format=name, table=table, options=options)
        folders[name] = root / name
    table = resolve("q4_0", model)
    save_packed(convert(model, table), root / "packed", table=table)
    return folders | {"packed": root / "packed"}


def leaves(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): leaf.get_value() for path, leaf in flat}


@pytest.mark.parametrize("name", [*FORMATS, "packed"])
def test_every_format_is_read_and_what_is_quantized_stays_packed(shipped, name):
    loaded = read_pretrained(shipped[name])
    packed = {p for p, leaf in leaves(loaded.model).items() if isinstance(leaf, PackedTensor)}
    expected = {entry.path for entry in loaded.table.quantized} if loaded.table else set()
    assert packed == expected
    assert bool(packed) == (name not in ("hf", "orbax"))
    weights = [leaf for path, leaf in leaves(loaded.model).items() if not path.endswith("/scale")]
    assert loaded.report.parameters == sum(leaf.size for leaf in weights)
    assert read_config(shipped[name]).layer_types == loaded.model.config.layer_types


@pytest.mark.parametrize("name", ["hf", "gguf", "compressed-tensors", "orbax"])
def test_every_format_gives_the_same_values(shipped, name):
    found, expected = (leaves(read_float(shipped[n]).model) for n in (name, "packed"))
    assert found.keys() == expected.keys()
    for path in found:
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(expected[path]), path)


@pytest.mark.parametrize("name", ["gguf", "packed"])
def test_training_starts_from_the_values_of_codes(shipped, name):
    chosen = experiment(shipped[name])
    model = initial_model(chosen)
    assert not any(isinstance(leaf, PackedTensor) for leaf in leaves(model).values())
    assert initial_config(chosen).embed_dim == model.config.embed_dim
    path = "layers/0/mlp/up_proj/weight"
    packed = leaves(read_pretrained(shipped[name]).model)[path]
    np.testing.assert_array_equal(np.asarray(leaves(model)[path]), packed.dequantize())


def test_a_mesh_is_refused_for_packed_weights(shipped):
    with pytest.raises(ValueError, match="onto a mesh"):
        read_pretrained(shipped["gguf"], mesh=object())


def test_an_evaluation_of_a_file_is_of_its_codes(shipped, tmp_path):
    loaded = read_pretrained(shipped["gguf"])
    chosen = experiment(shipped["gguf"])
    found = evaluate(chosen, tmp_path, model=loaded.model, table=loaded.table)
    (name,) = set(found) - {"float"}
    scores = found[name]
    assert scores.metrics["all_kl_to_float"] == pytest.approx(0, abs=1e-7)
    assert scores.layer_errors == {}
    certificate = export(shipped["gguf"], tmp_path / "again", format="gguf")
    assert scores.contents_sha256 == certificate.contents_sha256
