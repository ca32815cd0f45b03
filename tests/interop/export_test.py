"""Exports: certified, renamed when whole, and nothing under the name where anything went wrong."""

import errno
import json
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from gemmaqat.interop import certificate as certificates
from gemmaqat.interop import export as exports
from gemmaqat.interop import formats, source
from gemmaqat.interop.certificate import Certificate
from gemmaqat.interop.export import export
from gemmaqat.interop.hashes import contents_sha256, tensor_sha256
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.packed_folder import save_packed
from gemmaqat.interop.verify import verify
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve

FORMATS = ("hf", "gguf")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_verifies_and_tells_of_every_tensor(exported, converted, name):
    found = verify(exported[name])
    certificate = found.certificate
    assert {tensor.path for tensor in certificate.tensors} == {e.path for e in converted[1].entries}
    assert certificate.left_out == ()
    assert all(tensor.max_difference == 0 for tensor in certificate.tensors)
    assert certificate.table == json.loads(json.dumps(converted[1].to_json()))
    assert not [path for path in exported[name].parent.iterdir() if path.name.startswith(".")]


def test_the_same_codes_have_one_hash_in_memory_and_in_files(exported, converted):
    certificate = verify(exported["gguf"]).certificate
    assert certificate.exact_share == 1
    in_memory = source.of_model(*converted)
    assert certificate.source_sha256 == contents_sha256(in_memory)
    # llama.cpp takes this one in float alone: the same values, other contents.
    others = [t for t in certificate.tensors if t.path != "per_layer_model_projection/weight"]
    assert len(others) == len(in_memory.tensors) - 1
    for tensor in others:
        assert tensor.sha256 == tensor_sha256(in_memory.tensors[tensor.path]), tensor.path


def test_the_hash_tells_codes_scales_and_order_apart(converted):
    model, table = converted
    path = "layers/0/mlp/up_proj/weight"
    tensor = source.of_model(model, table).tensors[path]
    piece = tensor.read(0, tensor.num_rows)

    def hash_of(codes, scales):
        changed = source.dataclasses.replace(
            tensor, read=lambda a, b: source.Piece(codes[a:b], scales[a:b])
        )
        return tensor_sha256(changed)

    codes, scales = piece.codes.copy(), piece.scales.copy()
    hashes = {hash_of(codes, scales), hash_of(codes[::-1], scales), hash_of(codes, scales[::-1])}
    codes[3, 5] ^= 1
    hashes.add(hash_of(codes, scales))
    assert len(hashes) == 4
    # The same scales per half block are the same scales.
    assert hash_of(piece.codes, np.repeat(scales, 2, axis=1)) == hash_of(piece.codes, scales)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_whatever_fails_leaves_nothing_behind(converted, tmp_path, monkeypatch, error):
    def broken(shipment, folder, options):
        (folder / "half.bin").write_bytes(b"half")
        raise error

    monkeypatch.setattr(formats.Format, "write", lambda self: broken)
    with pytest.raises(type(error)):
        export(converted[0], tmp_path / "out", format="gguf", table=converted[1])
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_changes_a_code_is_caught(converted, tmp_path, monkeypatch):
    write = formats.FORMATS["gguf"].write()

    def wrong(shipment, folder, options):
        path = "layers/1/mlp/down_proj/weight"
        tensor = shipment.tensors[path]

        def read(start, stop):
            codes, scales = tensor.read(start, stop)
            codes = codes.copy()
            codes[0, 0] = -8 if codes[0, 0] >= 0 else 7
            return source.Piece(codes, scales)

        tensors = dict(shipment.tensors) | {path: source.dataclasses.replace(tensor, read=read)}
        return write(source.dataclasses.replace(shipment, tensors=tensors), folder, options)

    monkeypatch.setattr(formats.Format, "write", lambda self: wrong)
    with pytest.raises(
        ValueError, match=r"layers/1/mlp/down_proj/weight: the Q4_0 in the artefact"
    ):
        export(converted[0], tmp_path / "out", format="gguf", table=converted[1])
    assert not (tmp_path / "out").exists()


def test_a_target_with_files_is_never_touched(converted, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        export(converted[0], tmp_path, format="gguf", table=converted[1])
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"notes\.txt: is a file"):
        export(converted[0], tmp_path / "notes.txt", format="gguf", table=converted[1])


def test_an_empty_target_is_taken(converted, tmp_path):
    (tmp_path / "out").mkdir()
    export(converted[0], tmp_path / "out", format="gguf", table=converted[1])
    assert verify(tmp_path / "out").certificate.format == "gguf"


def test_unknown_formats_name_the_nearest(converted, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'gguf'"):
        export(converted[0], tmp_path / "out", format="ggfu", table=converted[1])


def test_a_table_is_asked_for_or_refused(converted, exported, tmp_path):
    model, table = converted
    with pytest.raises(ValueError, match="needs the table"):
        export(model, tmp_path / "out", format="gguf")
    with pytest.raises(ValueError, match="weights in float"):
        export(exported["hf"], tmp_path / "out", format="gguf")
    with pytest.raises(ValueError, match="quantized already"):
        export(exported["gguf"], tmp_path / "out", format="hf", table=table)


def test_values_that_a_float_type_rounds_are_refused_unless_allowed(tmp_path):
    layers = ("sliding_attention", "full_attention")
    model = Gemma4(
        model_config("e2b_mini", layer_types=layers, num_kv_shared_layers=0), rngs=nnx.Rngs(0)
    )
    table = resolve("int8", model)
    packed = convert(model, table)
    options = ExportOptions(float_dtype="bfloat16")
    with pytest.raises(ValueError, match="is not exact in bfloat16"):
        export(packed, tmp_path / "out", format="hf", table=table, options=options)
    options = ExportOptions(float_dtype="bfloat16", allow_requantize=True)
    found = export(packed, tmp_path / "out", format="hf", table=table, options=options)
    assert found.exact_share < 1
    worst = max(found.tensors, key=lambda tensor: tensor.max_difference)
    assert worst.kind == "requantized" and 0 < worst.max_difference < 0.01
    assert verify(tmp_path / "out").certificate == Certificate.load(
        tmp_path / "out" / "certificate.json"
    )


def test_one_export_is_the_source_of_the_next(exported, converted, tmp_path):
    first = verify(exported["gguf"]).certificate
    found = export(exported["gguf"], tmp_path / "again", format="gguf")
    assert found.exact_share == 1
    assert found.source_sha256 == first.contents_sha256


def test_packed_folders_are_exported_as_they_are(converted, exported, tmp_path):
    save_packed(converted[0], tmp_path / "packed", table=converted[1])
    found = export(tmp_path / "packed", tmp_path / "out", format="gguf")
    assert found.contents_sha256 == verify(exported["gguf"]).certificate.contents_sha256


def test_a_reader_out_of_order_is_hashed_all_the_same(converted):
    observed = exports.Observed(source.of_model(*converted), exports.Pass("test", 1, None))
    path = "embed_tokens/weight"
    tensor = observed.shipment.tensors[path]
    plain = source.of_model(*converted).tensors[path]
    tensor.read(5, 20)
    tensor.read(0, 3)
    tensor.read(1, 3)
    assert observed.sha256(path) == tensor_sha256(plain)
    for start, stop in ((0, 100), (100, 128), (3, 9)):
        tensor.read(start, stop)
    assert observed.sha256(path) == tensor_sha256(plain)


def test_values_that_are_no_numbers_are_different(converted):
    tensor = source.of_model(*converted).tensors["norm/weight"]
    broken = source.dataclasses.replace(
        tensor, read=lambda a, b: np.full((b - a, tensor.row_length), np.nan, np.float32)
    )
    assert certificates._difference(tensor, broken) == float("inf")
    assert certificates._difference(tensor, tensor) == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"float_dtype": "bf16"}, "did you mean 'bfloat16'"),
        ({"float_dtype": "int8"}, "is not one of bfloat16, float16, float32"),
        ({"shard_bytes": 0}, "shard_bytes=0: expected a number from 1 up"),
    ],
)
def test_options_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ExportOptions(**options)


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_of_floats_says_that_nothing_is_quantized(converted, tmp_path, format):
    model = Gemma4(converted[0].config, rngs=nnx.Rngs(0))
    options = ExportOptions(float_dtype="bfloat16")
    table = resolve("none", model)
    found = export(model, tmp_path / "out", format=format, table=table, options=options)
    assert "no weight is quantized" in found.headline and "of the kept rounded" in found.headline


@pytest.mark.parametrize(
    "format, options, message",
    [
        ("hf", {"tables": "q6_k"}, "tables='q6_k': 'hf' has no such option"),
        ("gguf", {"shard_bytes": 10}, "shard_bytes=10: 'gguf' has no such option"),
        ("orbax", {"prefill_lengths": (1,)}, "It has float_dtype, stacked_layers, text_only"),
    ],
)
def test_options_of_other_formats_are_refused(converted, tmp_path, format, options, message):
    model, table = converted
    options = ExportOptions(**options)
    with pytest.raises(ValueError, match=re.escape(message)):
        export(model, tmp_path / "out", format=format, table=table, options=options)
    assert list(tmp_path.iterdir()) == []


def test_the_target_is_what_its_name_leads_to(converted, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    export(converted[0], str(tmp_path / "link") + "/", format="gguf", table=converted[1])
    assert verify(tmp_path / "here").certificate.format == "gguf"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="is the current directory; name a new folder"):
        export(converted[0], ".", format="gguf", table=converted[1])
    export(converted[0], "new", format="gguf", table=converted[1])
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["new"]


@pytest.mark.parametrize("format", ["hf", "gguf", "orbax"])
def test_a_full_disk_is_one_sentence_about_the_target(converted, tmp_path, format):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            export(converted[0], tmp_path / "out", format=format, table=converted[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(tmp_path / "out")
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from flax import nnx
from gemmaqat.interop import formats
from gemmaqat.interop.export import export
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.rules import resolve

write = formats.FORMATS["hf"].write()

def killed(shipment, folder, options):
    write(shipment, folder, options)
    print(*(path.name for path in folder.parent.iterdir()), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

formats.Format.write = lambda self: killed
model = Gemma4(model_config("31b_mini", layer_types=("full_attention",)), rngs=nnx.Rngs(0))
export(model, sys.argv[1], format="hf", table=resolve("none", model))
"""


def test_sigterm_in_the_middle_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith(".out.partial-"), done.stderr  # it was there
    assert done.returncode == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


def test_gguf_rounds_codes_to_floats_only_where_it_may(converted, tmp_path):
    table = resolve("int8", model := Gemma4(converted[0].config, rngs=nnx.Rngs(0)))
    packed = convert(model, table)
    options = ExportOptions(float_dtype="bfloat16", allow_rescale=True)
    with pytest.raises(ValueError, match=r"per_layer_model_projection/weight: code x scale"):
        export(packed, tmp_path / "out", format="gguf", table=table, options=options)
