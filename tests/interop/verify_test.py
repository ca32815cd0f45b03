"""Verification: whatever changed since an export is named, and what was not checked is said."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from gemmaqat.interop import certificate as certificates
from gemmaqat.interop import source
from gemmaqat.interop.export import export
from gemmaqat.interop.gguf_file import GgufFile
from gemmaqat.interop.shipment import CarriedTensor
from gemmaqat.interop.verify import verify

FORMATS = ("hf", "gguf")


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_one_flipped_bit_of_one_scale_names_the_tensor(copied):
    folder = copied("gguf")
    (path,) = folder.glob("*.gguf")
    info = GgufFile(path).tensors["blk.1.ffn_up.weight"]
    flip(path, info.start + 18 * 7)  # the low byte of a block's half-precision scale
    with pytest.raises(ValueError, match=r"'layers/1/mlp/up_proj/weight' is not as it was cert"):
        verify(folder)
    with pytest.raises(ValueError, match="layers/1/mlp/up_proj/weight"):
        verify(path)
    (folder / "certificate.json").unlink()  # the single file still knows that it has changed
    with pytest.raises(ValueError, match="its header says"):
        verify(path)


def test_one_flipped_bit_of_safetensors_is_found(copied):
    folder = copied("hf")
    path = folder / "model.safetensors"
    flip(path, path.stat().st_size - 100)
    with pytest.raises(ValueError, match="is not as it was certified"):
        verify(folder)
    (folder / "certificate.json").unlink()
    with pytest.raises(ValueError, match="its header says"):
        verify(folder)


def test_a_changed_companion_or_header_is_found(copied):
    folder = copied("hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match=r"config\.json: not as it was certified, although"):
        verify(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        verify(folder)


def test_what_gemmaqat_did_not_write_cannot_be_verified(copied, tmp_path):
    folder = copied("hf")
    (folder / "certificate.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="nothing to compare it with"):
        verify(folder)


def test_a_truncated_artefact_is_one_sentence(copied):
    folder = copied("gguf")
    (path,) = folder.glob("*.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=str(path.name)):
        verify(folder)


def _edit(folder, change, *, with_hashes=False):
    """Edits a certificate, at will with the hashes of its statements."""
    path = folder / "certificate.json"
    fields = json.loads(path.read_text())
    change(fields)
    if with_hashes:
        fields.pop("statements")
        fields["statements"] = certificates._hashes(fields)
    path.write_text(json.dumps(fields))


def _first(fields, **changes):
    fields["tensors"][0] |= changes


EDITS = {
    "tensors": lambda f: _first(f, kind="requantized"),
    "headline": lambda f: f.update(headline="hf: 100 % of everything exact"),
    "recipe": lambda f: f.update(recipe="q8_0"),
    "coverage": lambda f: f["coverage"].update({"kept": 0.0}),
    "table": lambda f: f["table"]["entries"].pop(),
    "provenance": lambda f: f["provenance"].update(evaluation={"metrics": {"perplexity": 1.0}}),
    "files": lambda f: f.update(files={}),
    "contents_sha256": lambda f: f.update(contents_sha256="0" * 64),
    "source_sha256": lambda f: f.pop("source_sha256"),
    "awards": lambda f: f.update(awards=3),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_statement_of_the_certificate_is_named(copied, name):
    folder = copied("hf")
    _edit(folder, EDITS[name])
    with pytest.raises(ValueError, match=rf"certificate\.json: '{name}' not as the export wrote"):
        verify(folder)


@pytest.mark.parametrize("name", ["tensors", "headline", "recipe", "provenance", "coverage"])
@pytest.mark.parametrize("format", FORMATS)
def test_an_edit_with_its_hash_is_no_certificate_of_these_weights(copied, format, name):
    folder = copied(format)
    _edit(folder, EDITS[name], with_hashes=True)
    with pytest.raises(ValueError, match="not the certificate that .* was exported with"):
        verify(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.update(files=[]), "files is no object"),
        (lambda f: _first(f, kind="perfect"), "is of no known kind"),
        (lambda f: _first(f, weights="7"), "no certificate of this version"),
        (lambda f: f.update(contents_sha256="0" * 64), "is not the certificate's contents_sha256"),
        (lambda f: f.update(format_version=1), "format_version is 1, this version reads 2"),
    ],
)
def test_a_certificate_that_makes_no_sense_is_refused(copied, change, message):
    folder = copied("hf")
    _edit(folder, change, with_hashes=True)
    with pytest.raises(ValueError, match=message):
        verify(folder)


@pytest.mark.parametrize("name", FORMATS)
def test_a_lone_file_proves_its_bytes_and_says_what_it_cannot(copied, tmp_path, name):
    folder = copied(name)
    (path,) = (file for file in folder.iterdir() if file.suffix in (".gguf", ".safetensors"))
    alone = Path(shutil.copy(path, tmp_path / path.name))
    found = verify(alone)
    assert found.certificate is None and found.files == (path.name,)
    assert "not checked: what became of each tensor" in str(found)
    assert "integrity, not authorship" in str(found) and "integrity, not" in str(verify(folder))
    data = alone.read_bytes()
    for place in (data.index(b"gemmaqat.version") + 30, len(data) // 2, len(data) - 9):
        flip(alone, place)
        with pytest.raises(ValueError, match="its header says"):
            verify(alone)
        flip(alone, place)
    assert verify(alone) == found


def test_companions_that_came_or_went_are_named(copied):
    folder = copied("hf")
    (folder / "README.md").write_text("of a hub")
    assert "not checked: README.md, which is no part of the export" in str(verify(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not in the certificate; it is no part"):
        verify(folder)


def test_carried_tensors_are_in_the_proof(converted, tmp_path):
    data = bytes(range(64))
    name = "model.vision_tower.patch.weight"
    tower = CarriedTensor(
        name=name, dtype="F32", shape=(4, 4), num_bytes=64, read=lambda a, b: data[a:b]
    )
    shipment = source.dataclasses.replace(source.of_model(*converted), carried={name: tower})
    released = shipment.config.to_hf()
    released = {"model_type": "gemma4", "text_config": released}
    shipment = source.dataclasses.replace(shipment, released_config=released)
    found = export(shipment, tmp_path / "out", format="hf")
    assert found.weights["carried"] == 16
    path = tmp_path / "out" / "model.safetensors"
    flip(path, path.read_bytes().index(data) + 5)
    with pytest.raises(ValueError, match=f"tensor '{name}' is not as it was certified"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("name", ["certificate.json", "config.json"])
def test_endless_nesting_is_one_sentence(copied, name):
    folder = copied("hf")
    (folder / name).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=name):
        verify(folder)


def test_a_second_file_of_weights_is_refused(copied):
    folder = copied("gguf")
    (path,) = folder.glob("*.gguf")
    shutil.copy(path, folder / "other.gguf")
    with pytest.raises(ValueError, match="name the file itself"):
        verify(folder)
