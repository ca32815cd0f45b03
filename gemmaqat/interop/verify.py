"""Checks an artefact against its certificate, or a lone file against the hash in its own header."""

import dataclasses
from pathlib import Path

from gemmaqat.interop import seal
from gemmaqat.interop.base import COMPANIONS
from gemmaqat.interop.certificate import Certificate
from gemmaqat.interop.formats import CERTIFICATE, detect, find_format
from gemmaqat.interop.hashes import carried_sha256, combine, contents, tensor_sha256
from gemmaqat.interop.progress import Pass, Progress
from gemmaqat.interop.safetensors_file import INDEX_NAME
from gemmaqat.interop.shipment import Shipment

_NOT_WHO = "This proves integrity, not authorship: nothing has changed since, whoever exported it."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verified:
    """What has been found intact.

    Attributes:
        path: the artefact.
        files: names of the files whose bytes were compared.
        tensors: how many were read and compared with the certificate; 0 without one.
        certificate: where there is one.
        unchecked: what nothing was said about, in words.
    """

    path: Path
    files: tuple[str, ...]
    tensors: int = 0
    certificate: Certificate | None = None
    unchecked: tuple[str, ...] = ()

    def __str__(self) -> str:
        count = f"{len(self.files)} file{'s' * (len(self.files) != 1)}"
        if self.certificate is None:
            lines = [f"{self.path}: intact: {count} as the hash in the header says"]
        else:
            found = f"{self.tensors} tensors agree with its certificate, so do {count}"
            lines = [f"{self.path}: intact: {found}", self.certificate.headline]
        lines += [f"not checked: {what}" for what in self.unchecked]
        return "\n".join([*lines, _NOT_WHO])


def verify(path: str | Path, *, progress: Progress | None = None) -> Verified:
    """Reads an artefact again and compares every tensor and file with what was certified.

    This proves that nothing has changed since the export, not who made it.

    Args:
        path: an exported folder, or a single GGUF, safetensors or LiteRT file; without a
            certificate beside it each file of weights is compared with the hash in its own header.
        progress: makes a progress bar; None logs plain lines.

    Raises:
        FileNotFoundError: there is no artefact, or a file of it is missing.
        ValueError: a tensor, a file or a statement of the certificate differs; the message names
            it. Or there is nothing to compare with.
    """
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if path.exists() and not (folder / CERTIFICATE).is_file():
        return _verify_alone(path)
    name, where = detect(path)
    certificate = Certificate.load(folder / CERTIFICATE)
    if certificate.format != name:
        raise ValueError(
            f"{folder / CERTIFICATE}: is of a {certificate.format} export, {path} is {name}."
        )
    _check_names(folder, certificate)
    artefact = find_format(name).read()(where)
    total = sum(tensor.num_weights for tensor in artefact.tensors.values())
    with Pass(f"verifying {name}", total, progress) as counted:
        found = {
            parameter: tensor_sha256(tensor, counted=counted)
            for parameter, tensor in artefact.tensors.items()
        }
    _compare(path, artefact, found, certificate)
    for file, digest in certificate.files.items():
        if seal.file_sha256(folder / file) != digest:
            raise ValueError(
                f"{folder / file}: not as it was certified, although its tensors are; copy it "
                "again."
            )
    _check_seals(folder, certificate)
    return Verified(
        path=path,
        files=tuple(certificate.files),
        tensors=len(certificate.tensors),
        certificate=certificate,
        unchecked=_unlisted(folder, certificate),
    )


def _verify_alone(path: Path) -> Verified:
    """Files of weights against the hashes in their own headers."""
    files = [path] if path.is_file() else _files_of_weights(path)
    seals = {file: seal.read_seal(file) for file in files}
    if not all(own for own, _ in seals.values()) or not seals:
        raise ValueError(
            f"{path}: neither a {CERTIFICATE} beside it nor a hash in its header; gemmaqat did not "
            "write it, so there is nothing to compare it with."
        )
    for file, (own, _) in seals.items():
        found = seal.file_sha256(file)
        if found != own:
            raise ValueError(
                f"{file}: its hash is {found[:16]}..., its header says {own[:16]}...; it has "
                "changed since the export, copy it again."
            )
    if len({certificate for _, certificate in seals.values()}) > 1:
        raise ValueError(f"{path}: the files are of different exports; copy the folder again.")
    return Verified(
        path=path,
        files=tuple(file.name for file in files),
        unchecked=(
            f"what became of each tensor, and any other file: there is no {CERTIFICATE} beside it",
        ),
    )


def _files_of_weights(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix in seal.SUFFIXES)


def _check_names(folder: Path, certificate: Certificate) -> None:
    """All files are there, and none that a reader would take for a part of the export."""
    for name in certificate.files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: missing; it is part of the export.")
    known = ("config.json", INDEX_NAME, *COMPANIONS)
    added = [
        file
        for file in (*_files_of_weights(folder), *(folder / name for name in known))
        if file.is_file() and str(file.relative_to(folder)) not in certificate.files
    ]
    if added:
        raise ValueError(
            f"{min(added)}: not in the certificate; it is no part of the export, but readers take "
            "it for one; remove it."
        )


def _compare(
    path: Path, artefact: Shipment, found: dict[str, str], certificate: Certificate
) -> None:
    """Every tensor against the certificate."""
    for tensor in certificate.tensors:
        if tensor.kind == "carried" and tensor.path in artefact.carried:
            found[tensor.path] = carried_sha256(artefact.carried[tensor.path])
    damaged = [t.path for t in certificate.tensors if found.get(t.path) != t.sha256]
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise ValueError(
            f"{path}: tensor {damaged[0]!r}{more} is not as it was certified; copy the artefact "
            "again, or export it anew."
        )
    parameters = contents(artefact)
    unknown = (parameters.keys() | artefact.carried.keys()) - {t.path for t in certificate.tensors}
    if unknown:
        raise ValueError(f"{path}: tensor {min(unknown)!r} is not in the certificate.")
    if certificate.contents_sha256 != combine({name: found[name] for name in parameters}):
        raise ValueError(
            f"{path}: its tensors' common hash is not the certificate's contents_sha256; restore "
            f"{CERTIFICATE} from a copy."
        )


def _check_seals(folder: Path, certificate: Certificate) -> None:
    """The certificate is the one whose hash the files of weights bear."""
    found = seal.file_sha256(folder / CERTIFICATE)
    for name in certificate.files:
        if Path(name).suffix in seal.SUFFIXES and seal.read_seal(folder / name)[1] != found:
            raise ValueError(
                f"{folder / CERTIFICATE}: not the certificate that {name} was exported with (its "
                "header has the hash of another); it was edited or exchanged, restore it."
            )


def _unlisted(folder: Path, certificate: Certificate) -> tuple[str, ...]:
    """What the certificate does not speak of."""
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    unlisted = sorted(names - certificate.files.keys() - {CERTIFICATE})
    said = [f"{name}, which is no part of the export" for name in unlisted]
    if not any(Path(name).suffix in seal.SUFFIXES for name in certificate.files):
        said.append(
            f"whether {CERTIFICATE} was exchanged as a whole: {certificate.format} has no header "
            "that could hold its hash"
        )
    return tuple(said)
