"""Two hashes inside each file of weights: of the file itself, and of the certificate beside it.

A writer leaves two places of 64 zeros in the metadata of its container (`PLACES`). A file's hash is
taken with zeros in both, so it may stand in the file; the certificate lists it, and then the
certificate can be hashed in its turn. So a lone file proves all of its own bytes, and a folder its
certificate.
"""

import hashlib
import mmap
import re
from pathlib import Path
from typing import BinaryIO

FILE_KEY, CERTIFICATE_KEY = "gemmaqat.file_sha256", "gemmaqat.certificate_sha256"
BLANK = "0" * 64
PLACES = {FILE_KEY: BLANK, CERTIFICATE_KEY: BLANK}
SUFFIXES = (".gguf", ".safetensors", ".tflite")

_READ_BYTES = 1 << 24
_HEAD_BYTES = 1 << 27  # where metadata lie: more than the longest header of safetensors
# Between a key and its value: JSON's punctuation, or the type and the length of a GGUF string.
_PLACE = re.compile(
    rb"(gemmaqat\.(?:file|certificate)_sha256)"
    rb'(?:": ?"|\x08\x00{3}\x40\x00{7})([0-9a-f]{64})'
)


def file_sha256(path: Path) -> str:
    """The hash of a file, with zeros in the places of a seal."""
    blanks = sorted(_places(path).values())
    found = hashlib.sha256()
    with path.open("rb") as file:
        for place in blanks:
            _take(found, file, place - file.tell())
            file.seek(len(BLANK), 1)
            found.update(BLANK.encode())
        _take(found, file, -1)
    return found.hexdigest()


def read_seal(path: Path) -> tuple[str, str]:
    """The hashes of the file and of its certificate that stand in a file; "" where none does."""
    with path.open("rb") as file:
        found = {}
        for key, place in _places(path).items():
            file.seek(place)
            found[key] = file.read(len(BLANK)).decode()
    return found.get(FILE_KEY, ""), found.get(CERTIFICATE_KEY, "")


def put(path: Path, key: str, digest: str) -> None:
    """Writes a hash into its place."""
    place = _places(path).get(key)
    assert place is not None, f"{path.name}: its writer leaves no place for {key}"
    with path.open("r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def _places(path: Path) -> dict[str, int]:
    """Offset of each hash in a file of weights; the first of a key counts."""
    if path.suffix not in SUFFIXES or not path.stat().st_size:
        return {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        found: dict[str, int] = {}
        for match in _PLACE.finditer(view, 0, _HEAD_BYTES):
            found.setdefault(match[1].decode(), match.start(2))
            if len(found) == len(PLACES):
                break
        return found


def _take(found: "hashlib._Hash", file: BinaryIO, count: int) -> None:
    """Hashes this many bytes; -1 = to the end."""
    while count and (block := file.read(_READ_BYTES if count < 0 else min(count, _READ_BYTES))):
        found.update(block)
        count -= len(block) if count > 0 else 0
