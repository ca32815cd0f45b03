"""`export`: from codes to a folder that other programs load, with the certificate that proves it.

The artefact is made in a hidden folder beside the target, read back, certified and renamed: under
the target's name there is a whole artefact or nothing.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from absl import logging

from gemmaqat.interop import seal
from gemmaqat.interop import source as sources
from gemmaqat.interop.certificate import Certificate, certify
from gemmaqat.interop.formats import CERTIFICATE, detect, find_format
from gemmaqat.interop.hashes import Observed
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.packed_folder import is_packed_folder
from gemmaqat.interop.progress import Pass, Progress
from gemmaqat.interop.shipment import Shipment
from gemmaqat.quantization.table import Table

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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
        ValueError: an unknown format, an option it does not have, a target that is not empty, or a
            tensor that the format cannot hold.
        OSError: the target cannot be written, or the disk is full.
        SystemExit: SIGTERM came; whatever is raised, nothing is left under the target's name.
    """
    options = options or ExportOptions()
    found = find_format(format)
    options.check_used(format, found.options)
    check_target(Path(folder))
    shipment = shipment_of(model, table)
    with _draft_of(Path(folder)) as draft:
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
        hashes = {str(path.relative_to(draft)): seal.file_sha256(path) for path in files}
        certificate = dataclasses.replace(certificate, files=hashes)
        certificate.save(draft)
        _put_seals(draft, hashes)
    logging.info("%s: %s", folder, certificate.headline)
    return certificate


@contextlib.contextmanager
def _draft_of(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its name when the block ends well, or else vanishes.

    Raises:
        OSError: of the system, for the target, where the disk is full.
        SystemExit: SIGTERM came.
    """
    folder = target.resolve()  # through a link to an empty folder
    draft = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    with _sigterm_raises():
        try:
            draft.mkdir(parents=True)
            yield draft
            _rename(draft, folder)
        except OSError as error:
            if error.errno in _FULL:
                raise OSError(error.errno, error.strerror, str(target)) from error
            raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM unwinds the stack, where nobody else listens to it; only a main thread can."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
    if folder.resolve() == Path.cwd():  # whoever stands in it would go on standing in the old one
        raise ValueError(f"{folder}: is the current directory; name a new folder for the export.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; name a new folder for the export.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder}: not empty; choose a new folder for the export.")


def _put_seals(draft: Path, hashes: Mapping[str, str]) -> None:
    """Fills the places that the writers of GGUF, safetensors and LiteRT leave."""
    of_certificate = seal.file_sha256(draft / CERTIFICATE)
    for name, digest in hashes.items():
        if Path(name).suffix in seal.SUFFIXES:
            seal.put(draft / name, seal.FILE_KEY, digest)
            seal.put(draft / name, seal.CERTIFICATE_KEY, of_certificate)


def _rename(draft: Path, folder: Path) -> None:
    """All of the draft is on the disk before it has the target's name."""
    for path in (*draft.rglob("*"), draft):
        _sync(path)
    draft.replace(folder)  # onto an empty folder, or none
    _sync(folder.parent)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
