"""`export`: from codes to a folder that other programs load, with the certificate that proves it.

The artefact is made in a hidden folder beside the target, read back, certified and renamed: under
the target's name there is a whole artefact or nothing.
"""

import dataclasses
import mmap
import os
import shutil
from pathlib import Path
from typing import Any

from absl import logging

from gemmaqat.interop import source as sources
from gemmaqat.interop.certificate import Certificate, certify, file_sha256
from gemmaqat.interop.formats import detect, find_format
from gemmaqat.interop.hashes import Observed
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.packed_folder import is_packed_folder
from gemmaqat.interop.progress import Pass, Progress
from gemmaqat.interop.safetensors_writer import CONTENTS_KEY, NO_CONTENTS
from gemmaqat.interop.shipment import Shipment
from gemmaqat.quantization.table import Table


def export(
    model: Any,
    folder: str | Path,
    *,
    format: str,
    table: Table | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Writes codes and scales in a deployed format.

    Args:
        model: a converted model, a `Shipment`, or the path of a checkpoint: a folder of floats
            (rounded to `table` as it is read), of packed weights, or of any format read here.
        folder: made by the export; it may exist if it is empty.
        format: one of `formats.FORMATS`.
        table: of a model and of a folder of floats; the others bring theirs.
        options: choices of the export.
        progress: makes a progress bar (`tqdm.tqdm`); None logs plain lines.

    Returns:
        The certificate, which is also written as certificate.json.

    Raises:
        ValueError: an unknown format, a target that is not empty, or a tensor that the format
            cannot hold.
        OSError: the target cannot be written, or the disk is full.
    """
    folder, options = Path(folder), options or ExportOptions()
    found = find_format(format)
    check_target(folder)
    shipment = shipment_of(model, table)
    draft = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    draft.mkdir(parents=True)
    try:
        total = sum(tensor.num_weights for tensor in shipment.tensors.values())
        with Pass(f"writing {format}", total, progress) as counted:
            observed = Observed(shipment, counted)
            written = found.write()(observed.shipment, draft, options)
        with Pass(f"verifying {format}", total, progress) as counted:
            # By its own reader, from the file's name on.
            artefact = found.read()(detect(draft)[1])
            certificate = certify(
                observed, artefact, written, format=format, options=options, counted=counted
            )
        files = [path for path in sorted(draft.rglob("*")) if path.is_file()]
        for path in files:
            _put_contents_hash(path, certificate.contents_sha256)
        hashes = {str(path.relative_to(draft)): file_sha256(path) for path in files}
        certificate = dataclasses.replace(certificate, files=hashes)
        certificate.save(draft)
        _rename(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    logging.info("%s: %s", folder, certificate.headline)
    return certificate


def shipment_of(model: Any, table: Table | None) -> Shipment:
    """The shipment of whatever `export` takes.

    Raises:
        ValueError: the table is missing, or there is one too many.
    """
    if isinstance(model, Shipment):
        _expect(table is None, "a shipment has its own table; leave `table` out.")
        return model
    if not isinstance(model, (str, Path)):
        _expect(table is not None, "a model needs the table it was converted by: table=...")
        assert table is not None
        return sources.of_model(model, table)
    path = Path(model)
    if is_packed_folder(path):
        _expect(table is None, f"{path}: packed weights have their own table.")
        return sources.of_packed_folder(path)
    name, where = detect(path)
    if name != "hf":
        _expect(table is None, f"{path}: quantized already; leave the table out.")
        return find_format(name).read()(where)
    _expect(table is not None, f"{path}: weights in float; give the table to round them to.")
    assert table is not None
    return sources.of_folder(path, table)


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(f"export: {otherwise}")


def check_target(folder: Path) -> None:
    """Raises ValueError unless an export may appear under this name."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a new folder for the export.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; choose a new folder for the export.")


def _put_contents_hash(path: Path, digest: str) -> None:
    """Fills the place that the writers of GGUF, safetensors and LiteRT leave for it."""
    if path.suffix not in (".gguf", ".safetensors", ".tflite"):
        return
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        key = view.find(CONTENTS_KEY.encode())
        place = view.find(NO_CONTENTS.encode(), key, key + len(CONTENTS_KEY) + 100)
        assert key >= 0 and place >= 0, f"{path.name}: its writer leaves no place for the hash"
        view[place : place + len(NO_CONTENTS)] = digest.encode()
        view.flush()


def _rename(draft: Path, folder: Path) -> None:
    draft.replace(folder)  # onto an empty folder, or none
    directory = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
