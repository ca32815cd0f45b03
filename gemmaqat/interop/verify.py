"""Checks an artefact against its certificate, or against the hash in its own header."""

import dataclasses
import re
from pathlib import Path

from gemmaqat.interop.certificate import Certificate, file_sha256
from gemmaqat.interop.formats import CERTIFICATE, detect, find_format
from gemmaqat.interop.gguf_file import GgufFile
from gemmaqat.interop.hashes import carried_sha256, combine, contents, tensor_sha256
from gemmaqat.interop.progress import Pass, Progress
from gemmaqat.interop.safetensors_file import SafetensorsFile
from gemmaqat.interop.safetensors_writer import CONTENTS_KEY
from gemmaqat.interop.shipment import Shipment


@dataclasses.dataclass(frozen=True)
class Verified:
    """What has been found intact.

    Attributes:
        path: the artefact.
        format: its format.
        tensors: how many were read and hashed.
        contents_sha256: of all parameters.
        certificate: where there is one.
    """

    path: Path
    format: str
    tensors: int
    contents_sha256: str
    certificate: Certificate | None

    def __str__(self) -> str:
        against = "its certificate" if self.certificate else "the hash in its header"
        text = f"{self.path}: intact: {self.tensors} tensors agree with {against}"
        return f"{text}\n{self.certificate.headline}" if self.certificate else text


def verify(path: str | Path, *, progress: Progress | None = None) -> Verified:
    """Reads an artefact again and compares every tensor and file with what was certified.

    This proves that nothing has changed since the export, not who made it.

    Args:
        path: an exported folder, or a single GGUF or safetensors file; without a certificate beside
            it the file is compared with the hash in its own header.
        progress: makes a progress bar; None logs plain lines.

    Raises:
        FileNotFoundError: there is no artefact.
        ValueError: a tensor or a file differs, is missing or cannot be read; the message names it.
    """
    path = Path(path)
    name, where = detect(path)
    beside = (path if path.is_dir() else path.parent) / CERTIFICATE
    certificate = Certificate.load(beside) if beside.is_file() else None
    recorded = _recorded(where)
    if certificate is None and not recorded:
        raise ValueError(
            f"{path}: neither a {CERTIFICATE} beside it nor a contents hash in its header; "
            "gemmaqat did not write it, so there is nothing to compare it with."
        )
    if certificate is not None and certificate.format != name:
        raise ValueError(f"{beside}: is of a {certificate.format} export, {path} is {name}.")
    artefact = find_format(name).read()(where)
    total = sum(tensor.num_weights for tensor in artefact.tensors.values())
    with Pass(f"verifying {name}", total, progress) as counted:
        found = {
            parameter: tensor_sha256(tensor, counted=counted)
            for parameter, tensor in artefact.tensors.items()
        }
    contents_sha256 = combine({parameter: found[parameter] for parameter in contents(artefact)})
    if certificate is not None:
        _compare(path, artefact, found, certificate)
        _compare_files(beside.parent, certificate)
        if certificate.contents_sha256 != contents_sha256:
            raise ValueError(
                f"{beside}: its contents hash is not that of the tensors; copy it again."
            )
    if recorded and recorded != contents_sha256:
        raise ValueError(
            f"{path}: the tensors' hash is {contents_sha256[:16]}..., its header says "
            f"{recorded[:16]}...; a tensor has changed since the export, copy the file again."
        )
    return Verified(path, name, len(found), contents_sha256, certificate)


def _recorded(path: Path) -> str:
    """The contents hash in the headers of an artefact; "" where there is none."""
    found = set()
    if path.suffix == ".gguf":
        found.add(str(GgufFile(path).metadata.get(CONTENTS_KEY, "")))
    for model in path.glob("*.tflite") if path.is_dir() else ():
        match = re.search(CONTENTS_KEY.encode() + rb'": "([0-9a-f]{64})"', model.read_bytes())
        found.add(match[1].decode() if match else "")
    for shard in path.glob("*.safetensors") if path.is_dir() else ():
        found.add(SafetensorsFile(shard).metadata.get(CONTENTS_KEY, ""))
    if len(found) > 1:
        raise ValueError(f"{path}: the files are of different exports; copy the folder again.")
    return found.pop() if found else ""


def _compare(
    path: Path, artefact: Shipment, found: dict[str, str], certificate: Certificate
) -> None:
    """Every tensor against the certificate."""
    damaged = []
    for tensor in certificate.tensors:
        if tensor.kind == "carried":
            carried = artefact.carried.get(tensor.path)
            digest = carried_sha256(carried) if carried is not None else ""
        else:
            digest = found.get(tensor.path, "")
        if digest != tensor.sha256:
            damaged.append(tensor.path)
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise ValueError(
            f"{path}: tensor {damaged[0]!r}{more} is not as it was certified; copy the artefact "
            "again, or export it anew."
        )
    unknown = contents(artefact).keys() - {tensor.path for tensor in certificate.tensors}
    if unknown:
        raise ValueError(f"{path}: tensor {min(unknown)!r} is not in the certificate.")


def _compare_files(folder: Path, certificate: Certificate) -> None:
    """Every file against the certificate: headers, tokenizer and configuration included."""
    weights = (*folder.rglob("*.gguf"), *folder.rglob("*.safetensors"), *folder.rglob("*.tflite"))
    unlisted = {str(file.relative_to(folder)) for file in weights} - certificate.files.keys()
    if unlisted:
        raise ValueError(
            f"{folder / min(unlisted)}: not in the certificate; it is no part of the export."
        )
    for name, digest in certificate.files.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing; it is part of the export.")
        if file_sha256(file) != digest:
            raise ValueError(
                f"{file}: not as it was certified, although its tensors are; copy it again."
            )
