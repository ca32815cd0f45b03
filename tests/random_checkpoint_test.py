"""The script that makes random checkpoints of full size: names, sizes, holes."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from gemmaqat.interop import hf
from gemmaqat.interop.safetensors_writer import Declared, SafetensorsWriter
from gemmaqat.models.sizes import model_config

PATH = Path(__file__).parents[1] / "benchmarks" / "random_checkpoint.py"
# tensors of the text decoder in the released file, and bytes of the whole
RELEASED = {
    "e2b": (600, 10_246_357_958),
    "e4b": (719, 15_992_314_836),
    "12b": (666, 23_919_460_448),
    "26b_a4b": (657, 51_611_872_412),
    "31b": (832, 62_546_177_752),
}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("random_checkpoint", PATH)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    before = set(flags.FLAGS)
    spec.loader.exec_module(module)
    yield module
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.mark.parametrize("size", RELEASED)
def test_the_tensors_are_those_of_the_released_file(script, size):
    count, payload = RELEASED[size]
    declared = list(script.tensors(model_config(size), encoders=True))
    assert len(declared) == count + 1
    assert sum(tensor.num_bytes for tensor in declared) == payload


def test_a_sparse_checkpoint_has_its_length_but_takes_no_disk(script, tmp_path):
    config = model_config("12b")
    declared = list(script.tensors(config, encoders=True))
    with SafetensorsWriter(tmp_path, declared, shard_bytes=10**10) as writer:
        for tensor in declared:
            writer.skip(tensor.name)
    (tmp_path / "config.json").write_text(script.json.dumps(script.released_config(config)))
    files = list(tmp_path.glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > RELEASED["12b"][1]
    assert sum(file.stat().st_blocks * 512 for file in files) < 1_000_000
    opened = hf.open_folder(tmp_path)
    assert len(opened.keys) == 666 and opened.config.embed_dim == config.embed_dim
    file = opened.tensors.files[opened.keys["layers/47/mlp/down_proj/weight"]]
    assert not file.array(opened.keys["layers/47/mlp/down_proj/weight"])[-3:].any()


def test_random_weights_are_the_same_again_and_come_in_pieces(script):
    matrix = Declared("model.language_model.layers.0.mlp.up_proj.weight", "BF16", (3_000, 2_000))
    first = list(script.random_weights(matrix, seed=0))
    again = list(script.random_weights(matrix, seed=0))
    assert len(first) == 2 and sum(part.size for part in first) == 6_000_000
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert abs(float(first[0].astype(np.float32).std()) - 0.02) < 1e-3
    norm = Declared("model.language_model.norm.weight", "BF16", (1_000,))
    assert (
        abs(float(next(script.random_weights(norm, seed=0)).astype(np.float32).mean()) - 1) < 0.01
    )
