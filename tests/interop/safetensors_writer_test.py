"""Streamed safetensors: read back by the safetensors package itself."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from gemmaqat.interop import seal
from gemmaqat.interop.safetensors_file import SafetensorsFolder
from gemmaqat.interop.safetensors_writer import (
    Declared,
    SafetensorsWriter,
    dtype_name,
)

ARRAYS = {
    "codes": np.arange(35, dtype=np.uint8).reshape(7, 5),
    "scales": np.linspace(-1, 1, 7, dtype=np.float32).reshape(7, 1),
    "halves": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "shape": np.array([7, 5], np.int64),
    "scalar": np.array(0.5, np.float32),
    "none": np.zeros((0, 4), np.float16),
}


def declared():
    return [Declared(name, dtype_name(a.dtype), a.shape) for name, a in ARRAYS.items()]


def write_all(writer):
    for i in range(7):  # codes and scales side by side, a row at a time
        writer.write("codes", ARRAYS["codes"][i : i + 1])
        writer.write("scales", ARRAYS["scales"][i : i + 1])
    writer.write("halves", memoryview(ARRAYS["halves"].tobytes())[:6])
    writer.write("halves", memoryview(ARRAYS["halves"].tobytes())[6:])
    for name in ("shape", "scalar"):
        writer.write(name, ARRAYS[name])


def test_tensors_that_grow_side_by_side_read_back(tmp_path):
    with SafetensorsWriter(tmp_path, declared(), shard_bytes=10**9, metadata={"a": "b"}) as writer:
        write_all(writer)
    path = tmp_path / "model.safetensors"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    found = load_file(path)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["a"] == "b" and metadata["format"] == "pt"
    assert all(metadata[key] == blank for key, blank in seal.PLACES.items())


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path):
    with SafetensorsWriter(tmp_path, declared(), shard_bytes=10**9) as writer:
        write_all(writer)
    files = SafetensorsFolder(tmp_path)
    for name, array in ARRAYS.items():
        assert files.entry(name).start % array.dtype.itemsize == 0


@pytest.mark.parametrize("shard_bytes, files", [(63, 2), (1, 6)])
def test_shards_hold_at_most_their_bytes_and_the_index_lists_them(tmp_path, shard_bytes, files):
    with SafetensorsWriter(tmp_path, declared(), shard_bytes=shard_bytes) as writer:
        write_all(writer)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [p.name for p in shards] == [
        f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)
    ]
    found = {}
    for shard in shards:
        tensors = load_file(shard)
        size = sum(a.nbytes for a in tensors.values())
        assert size <= shard_bytes or len(tensors) == 1
        assert all(index["weight_map"][name] == shard.name for name in tensors)
        found |= tensors
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_tensor_left_incomplete_or_overfilled_is_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="shape: 16 bytes were not written"):
        with SafetensorsWriter(tmp_path, declared(), shard_bytes=10**9):
            pass
    with pytest.raises(AssertionError, match="shape: 1 too many"):
        with SafetensorsWriter(tmp_path, declared(), shard_bytes=10**9) as writer:
            writer.write("shape", bytes(17))
