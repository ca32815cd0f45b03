"""The certificate of an export: what became of each tensor, proved by reading the artefact back.

How the proof hangs together, from the inside out:

- `tensors` has a hash of every tensor as the reader of the format finds it (of the bytes of what is
  carried), so a changed tensor is named;
- `files` has a hash of every file, so a changed tokenizer, configuration or header is named;
- `statements` has a hash of every other field of certificate.json, so an edited field is named;
- the SHA-256 of certificate.json stands in the header of each file of weights, so that a whole
  certificate cannot be exchanged; beside it stands the hash of the file itself, for a lone file
  (see `seal`). Orbax has no such header.

All this proves that nothing has changed since the export (integrity). It is not signed: whoever
rewrites everything can recompute everything, so it says nothing of who wrote it (authorship).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gemmaqat
from gemmaqat.interop.formats import CERTIFICATE
from gemmaqat.interop.hashes import (
    Observed,
    carried_sha256,
    combine,
    contents,
    tensor_sha256,
)
from gemmaqat.interop.options import KINDS, QUANTIZED, ExportOptions, Written
from gemmaqat.interop.progress import Pass
from gemmaqat.interop.shipment import Shipment, ShippedTensor
from gemmaqat.interop.source import pieces, values
from gemmaqat.json_file import read_json

FORMAT_VERSION = 2
STATEMENT = (
    "The hashes are those of the tensors as a reader of the format finds them. They prove that the "
    "artefact is the one this certificate was made for; they do not prove who made it."
)
_STATEMENTS = "statements"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertifiedTensor:
    """One tensor of an artefact.

    Attributes:
        path: the parameter's path, or the name of a carried tensor.
        kind: one of `options.KINDS`.
        stored: the format's name of the storage.
        weights: number of elements.
        sha256: of the tensor in the artefact, as in `hashes`; of the bytes, where it is carried.
        max_difference: the largest difference of its float32 values to the source's.
        note: what else is to be said.
    """

    path: str
    kind: str
    stored: str
    weights: int
    sha256: str
    max_difference: float = 0.0
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What `export` proves; `save` writes it as certificate.json.

    Attributes:
        format: of the artefact.
        tensors: every tensor of it.
        left_out: tensors of the source that the artefact does not hold.
        contents_sha256: one hash of all parameters in the artefact; evaluations record it, too.
        source_sha256: the same of the source.
        recipe, coverage, table: what was quantized, and how.
        options: of the export, where they are not the defaults.
        files: SHA-256 of every file of the artefact, by name; of files of weights as in `seal`.
        version, code_sha256: of the library that wrote it.
        provenance: of the source: hashes of config and data, and the evaluation that was made on
            exactly these parameters.
    """

    format: str
    tensors: tuple[CertifiedTensor, ...]
    left_out: tuple[str, ...] = ()
    contents_sha256: str
    source_sha256: str
    recipe: str = ""
    coverage: Mapping[str, float]
    table: Mapping[str, Any]
    options: Mapping[str, Any]
    files: Mapping[str, str]
    version: str = gemmaqat.__version__
    code_sha256: str
    provenance: Mapping[str, Any]

    @property
    def weights(self) -> dict[str, int]:
        """Number of weights of each kind; kinds that do not occur are left out."""
        count: dict[str, int] = dict.fromkeys(KINDS, 0)
        for tensor in self.tensors:
            count[tensor.kind] += tensor.weights
        return {kind: number for kind, number in count.items() if number}

    @property
    def exact_share(self) -> float:
        """Share of the quantized weights whose codes and scales are those of the source; 1 of 0."""
        count = self.weights
        quantized = sum(count.get(kind, 0) for kind in QUANTIZED)
        return count.get("exact", 0) / quantized if quantized else 1.0

    @property
    def headline(self) -> str:
        """One sentence."""
        parts = ", ".join(f"{number:,} {kind}" for kind, number in self.weights.items())
        kept = [tensor for tensor in self.tensors if tensor.kind == "kept"]
        if rounded := sum(tensor.weights for tensor in kept if tensor.max_difference):
            parts += f"; {rounded:,} of the kept rounded"
        if not self.weights.keys() & set(QUANTIZED):
            return f"{self.format}: no weight is quantized ({parts})"
        return f"{self.format}: {self.exact_share:.2%} of the quantized weights exact ({parts})"

    def save(self, folder: Path) -> None:
        """Writes certificate.json."""
        fields = dataclasses.asdict(self)
        text = {
            "format_version": FORMAT_VERSION,
            "statement": STATEMENT,
            "headline": self.headline,
            "exact_share": self.exact_share,
            "weights": self.weights,
            **fields,
        }
        text |= {_STATEMENTS: _hashes(json.loads(json.dumps(text)))}
        (folder / CERTIFICATE).write_text(json.dumps(text, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Certificate":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is unreadable, of another version, or its statements were edited; the
                message names them.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; only `gemmaqat export` writes certificates.")
        fields = read_json(path, "restore it from a copy")
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version is {version!r}, this version reads {FORMAT_VERSION}; use "
                "the version of gemmaqat that wrote it."
            )
        told = fields.pop(_STATEMENTS, None)
        told, found = told if isinstance(told, dict) else {}, _hashes(fields)
        edited = sorted(name for name in told | found if told.get(name) != found.get(name))
        if edited:
            raise ValueError(
                f"{path}: {', '.join(map(repr, edited))} not as the export wrote it; the "
                "certificate was edited or damaged, restore it from a copy."
            )
        try:
            known = {f.name: fields[f.name] for f in dataclasses.fields(cls)}
            tensors = tuple(CertifiedTensor(**tensor) for tensor in known.pop("tensors"))
            for tensor in tensors:
                _expect(tensor.kind in KINDS, f"{tensor.path!r} is of no known kind")
                _expect(type(tensor.weights) is int, f"{tensor.path!r}: weights is no whole number")
            _expect(isinstance(known["files"], dict), "files is no object")
            return cls(**known | {"tensors": tensors, "left_out": tuple(known["left_out"])})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: no certificate of this version ({error}); restore it from a copy."
            ) from None


def _hashes(fields: Mapping[str, Any]) -> dict[str, str]:
    """A hash of every field, of its JSON with sorted keys."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in fields.items()}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


def _expect(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def certify(
    observed: Observed,
    artefact: Shipment,
    written: Sequence[Written],
    *,
    format: str,
    options: ExportOptions,
    counted: Pass,
) -> Certificate:
    """Reads an artefact back and compares it with the source, tensor by tensor.

    `files` is empty: the caller hashes them.

    Raises:
        ValueError: a tensor is not what its writer says, which is a mistake of ours.
    """
    source = observed.shipment
    tensors, hashes, sources = [], {}, {path: observed.sha256(path) for path in source.tensors}
    for told in written:
        if told.path in source.tensors:
            if told.path not in artefact.tensors:
                raise ValueError(f"{told.path}: written as {told.stored}, but not in the artefact.")
            found = _compare(source, artefact, told, sources[told.path], counted)
            hashes[told.path] = found.sha256
        else:
            found = _compare_carried(source, artefact, told)
        tensors.append(found)
    told_of = {told.path for told in written}
    parameters = contents(artefact)
    rest = parameters.keys() - told_of
    if rest:
        raise ValueError(f"{min(rest)}: in the artefact, but its writer does not tell of it.")
    of_artefact = combine({path: hashes[path] for path in parameters})
    of_source = combine({path: sources[path] for path in contents(source)})
    left_out = [path for path in (*source.tensors, *source.carried) if path not in told_of]
    defaults = ExportOptions()
    return Certificate(
        format=format,
        tensors=tuple(tensors),
        left_out=tuple(left_out),
        contents_sha256=of_artefact,
        source_sha256=of_source,
        recipe=source.table.recipe,
        coverage=source.table.coverage(),
        table=source.table.to_json(),
        options={
            name: value
            for name, value in dataclasses.asdict(options).items()
            if value != getattr(defaults, name)
        },
        files={},
        code_sha256=code_sha256(),
        provenance=_provenance(source, tensors, of_artefact, of_source),
    )


def _provenance(
    source: Shipment, tensors: Sequence[CertifiedTensor], of_artefact: str, of_source: str
) -> dict[str, Any]:
    """What is known of the source, with the evaluation of exactly what is in the artefact."""
    known = dict(source.provenance)
    evaluations = known.pop("evaluations", ())
    certified = {tensor.path for tensor in tensors}
    same = certified >= source.tensors.keys() and not any(t.max_difference for t in tensors)
    judged = {of_artefact, of_source} if same else {of_artefact}
    matching = [found for found in evaluations if found.get("contents_sha256") in judged]
    return known | {"evaluation": matching[-1] if matching else None}


def _compare(
    source: Shipment, artefact: Shipment, told: Written, sha256: str, counted: Pass
) -> CertifiedTensor:
    """One parameter: its hash in the artefact, and how far its values are from the source's."""
    left, right = source.tensors[told.path], artefact.tensors[told.path]
    if (left.num_rows, left.row_length) != (right.num_rows, right.row_length):
        raise ValueError(
            f"{told.path}: shape {list(right.shape)} in the artefact, {list(left.shape)} in the "
            "source."
        )
    found = tensor_sha256(right, counted=counted)
    difference = 0.0 if found == sha256 else _difference(left, right)
    # Where the format has floats for codes, the values stand for both.
    if told.kind == "exact" and found != sha256 and (right.grid is not None or difference):
        raise ValueError(
            f"{told.path}: the {told.stored} in the artefact does not hold the codes and scales of "
            f"the source (largest difference {difference:g})."
        )
    return CertifiedTensor(
        path=told.path,
        kind=told.kind,
        stored=told.stored,
        weights=left.num_weights,
        sha256=found,
        max_difference=difference,
        note=told.note,
    )


def _difference(left: ShippedTensor, right: ShippedTensor) -> float:
    largest = 0.0
    for start, stop, piece in pieces(left):
        with np.errstate(invalid="ignore"):  # infinities less themselves
            apart = values(left, piece) - values(right, right.read(start, stop))
        found = float(np.max(np.abs(apart), initial=0.0))
        if np.isnan(found):  # max() would pass over it
            return float("inf")
        largest = max(largest, found)
    return largest


def _compare_carried(source: Shipment, artefact: Shipment, told: Written) -> CertifiedTensor:
    if told.path not in source.carried or told.path not in artefact.carried:
        raise ValueError(f"{told.path}: written, but not in both the source and the artefact.")
    left, right = source.carried[told.path], artefact.carried[told.path]
    digest = carried_sha256(right)
    if digest != carried_sha256(left):
        raise ValueError(f"{told.path}: its bytes are not those of the source.")
    return CertifiedTensor(
        path=told.path,
        kind="carried",
        stored=told.stored,
        weights=int(np.prod(right.shape, dtype=np.int64)),
        sha256=digest,
        note=told.note,
    )


def code_sha256() -> str:
    """The hash of the source files of this library."""
    package = Path(gemmaqat.__file__).parent
    hashes = {
        str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in package.rglob("*.py")
    }
    return combine(hashes)
