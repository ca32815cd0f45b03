"""A damaged safetensors file is refused in one sentence, and nothing it asks for is allocated."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from gemmaqat.interop.safetensors_file import SafetensorsFile, SafetensorsFolder

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header, data: bytes = bytes(24), *, length: int | None = None) -> Path:
    """A file of a header (bytes, or an object to be written as JSON) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_what_the_reference_package_writes_is_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b.c": rng.integers(-128, 127, 7).astype(np.int8),
        "scalar": np.array(2.5, np.float16),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt"} and file.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.array(name), array)
        assert (file.array(name).dtype, file.array(name).shape) == (array.dtype, array.shape)


def two(first, second):
    return {
        "a": GOOD | dict(data_offsets=first),
        "b": GOOD | dict(data_offsets=second),
    }


def duplicated() -> bytes:
    entry = json.dumps(GOOD)
    return f'{{"a": {entry}, "a": {entry}}}'.encode()


CASES = {
    "a length of 2^60": (dict(header={"a": GOOD}, length=2**60), "truncated or not"),
    "a length of 2^64 - 1": (dict(header={"a": GOOD}, length=2**64 - 1), "truncated or not"),
    "no JSON": (dict(header=b"{'a'"), "header is unreadable"),
    "not UTF-8": (dict(header=b'{"\xff\xfe": 1}'), "header is unreadable"),
    "UTF-16": (dict(header=json.dumps({"a": GOOD}).encode("utf-16")), "header is unreadable"),
    "nested too deep": (dict(header=b"[" * 100_000), "header is unreadable"),
    "a number of 5000 digits": (dict(header=b'{"a": ' + b"9" * 5_000 + b"}"), "unreadable"),
    "a name twice": (dict(header=duplicated()), "header is unreadable"),
    "a list": (dict(header=[1, 2]), "holds no tensors"),
    "metadata of numbers": (dict(header={"__metadata__": {"a": 1}, "a": GOOD}), "other than texts"),
    "metadata as text": (dict(header={"__metadata__": "x", "a": GOOD}), "other than texts"),
    "an entry that is a list": (dict(header={"a": [1]}), "'a' is none"),
    "an entry without shape": (dict(header={"a": {"dtype": "F32"}}), "'a' is none"),
    "a negative axis": (dict(header={"a": GOOD | dict(shape=[-2, -3])}), "'a' is none"),
    "an axis of true": (dict(header={"a": GOOD | dict(shape=[True, 6])}), "'a' is none"),
    "an axis of 1.5": (dict(header={"a": GOOD | dict(shape=[1.5, 4])}), "'a' is none"),
    "three offsets": (dict(header={"a": GOOD | dict(data_offsets=[0, 24, 24])}), "'a' is none"),
    "a negative offset": (dict(header={"a": GOOD | dict(data_offsets=[-8, 16])}), "'a' is none"),
    "a dtype that is a list": (dict(header={"a": GOOD | dict(dtype=["F32"])}), "'a' is none"),
    "an unknown dtype": (dict(header={"a": GOOD | dict(dtype="F7")}), "unknown dtype 'F7'"),
    "an end before the start": (
        dict(header={"a": GOOD | dict(data_offsets=[24, 0])}),
        "ends before it starts",
    ),
    "sizes that overflow": (dict(header={"a": GOOD | dict(shape=[2**62, 2**62])}), "2.60 values"),
    "huge beside zero": (
        dict(header={"a": GOOD | dict(shape=[0, 2**62], data_offsets=[0, 0])}, data=b""),
        "2.60 values",
    ),
    "a hundred axes": (dict(header={"a": GOOD | dict(shape=[1] * 100)}), "more than 32 axes"),
    "more bytes than the shape": (dict(header={"a": GOOD | dict(shape=[2, 2])}), "has 24 bytes"),
    "an end out of the file": (dict(header={"a": GOOD}, data=bytes(23)), "ends at byte"),
    "trailing bytes": (dict(header={"a": GOOD}, data=bytes(25)), "1 bytes follow"),
    "an overlap": (dict(header=two([0, 24], [20, 44]), data=bytes(44)), "'b' overlaps"),
    "the same place twice": (dict(header=two([0, 24], [0, 24])), "'b' overlaps"),
    "a gap": (dict(header=two([0, 24], [32, 56]), data=bytes(56)), "'b' follows a gap"),
    "a gap at the start": (
        dict(header={"a": GOOD | dict(data_offsets=[8, 32])}, data=bytes(32)),
        "'a' follows a gap",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_one_sentence_with_the_file_and_the_tensor(tmp_path, case):
    content, message = CASES[case]
    path = write(tmp_path / "x.safetensors", **content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as caught:
            SafetensorsFile(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = str(caught.value)
    assert str(path) in said and "\n" not in said and len(said) < 500 + len(str(path))
    assert peak < 2**24


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path):
    """A sparse file as long as its header claims to be."""
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**33))
        file.truncate(2**33 + 8)
    with pytest.raises(ValueError, match="the format allows 100000000"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "text",
    [
        b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a": 1}}', b'{"weight_map": {"a": "../x.safetensors"}}',
        b'{"weight_map": {"a": "/etc/passwd"}}', b'{"weight_map": {"a": ".."}}',
        b'{"weight_map": {"a": "x\\u0000"}}', b'{"weight_map": {"a": ""}}',
    ],
)  # fmt: skip
def test_an_index_names_only_files_beside_it(tmp_path, text):
    write(tmp_path / "x.safetensors", {"a": GOOD})
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"index\.json: not a safetensors index"):
        SafetensorsFolder(tmp_path)
