"""JSON that is damaged, hostile or none: one clear error that names the file, whoever reads it."""

import pytest

from gemmaqat import config as configs
from gemmaqat.data.tokenizer import read_tokenizer_config
from gemmaqat.evaluation.evaluate import Scores
from gemmaqat.interop.certificate import Certificate
from gemmaqat.interop.hf import read_config
from gemmaqat.interop.packed_folder import read_table
from gemmaqat.interop.safetensors_file import SafetensorsFolder
from gemmaqat.json_file import parse_json, read_json

BAD = {
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "not text": b'{"a": "\xff\xfe"}',
    "cut": b'{"a": 1',
    "list": b"[1, 2]",
    "empty": b"",
}
READERS = {
    "config.json": read_config,
    "tokenizer_config.json": read_tokenizer_config,
    "quantization.json": read_table,
    "certificate.json": lambda folder: Certificate.load(folder / "certificate.json"),
    "model.safetensors.index.json": SafetensorsFolder,
    "metrics.json": Scores.load,
    "run.json": lambda folder: configs.load(folder / "run.json"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_the_file(name, bad, tmp_path):
    (tmp_path / name).write_bytes(BAD[bad])
    with pytest.raises(ValueError, match=name) as caught:
        READERS[name](tmp_path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("bad", BAD)
def test_what_is_wrong_is_said(bad, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(BAD[bad])
    said = {"deep": "nested too deeply", "deep object": "nested too deeply", "list": "no JSON obj"}
    with pytest.raises(ValueError, match=said.get(bad, "not valid JSON")):
        read_json(path)
    with pytest.raises(ValueError, match="here: .*; ask again"):
        parse_json(BAD[bad], "here", "ask again")


def test_an_object_is_read(tmp_path):
    (tmp_path / "file.json").write_bytes('{"é": [1]}'.encode())
    assert read_json(tmp_path / "file.json") == {"é": [1]}
