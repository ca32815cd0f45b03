"""Coverage-guided fuzzing of every reader of checkpoint files, under an address-space limit.

    python tests/fuzz/fuzz_readers.py gguf --seconds=120 --seed=1

A target makes a small valid folder; its files are damaged again and again, headers first, and read
whole. Damage that reaches a new line of the reader is kept and damaged further. A reader may refuse
with a ValueError or FileNotFoundError of one line that names the file; anything else (another
exception, no end, no memory) is a finding, saved as a short list of edits in `corpus/<target>/`,
which the suite replays.
"""

import argparse
import dataclasses
import hashlib
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemmaqat.interop import compressed_tensors, gemma_mobile, gguf_writer, packed_folder
from gemmaqat.interop.compressed_tensors_reader import read_compressed_tensors
from gemmaqat.interop.gemma_mobile_reader import read_gemma_mobile
from gemmaqat.interop.gguf_reader import read_gguf
from gemmaqat.interop.hf_writer import read_hf, write_hf
from gemmaqat.interop.litert import FILE, read_litert
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.orbax_gemma import read_orbax, write_orbax
from gemmaqat.interop.safetensors_file import SafetensorsFile, write_safetensors
from gemmaqat.interop.shipment import Shipment
from gemmaqat.interop.source import of_model
from gemmaqat.models.sizes import model_config
from gemmaqat.models.transformer import Gemma4
from gemmaqat.quantization.activations import activation_scales, prepare, with_scales
from gemmaqat.quantization.convert import convert
from gemmaqat.quantization.rules import resolve

CORPUS = Path(__file__).parent / "corpus"
MEMORY = 2**30  # bytes of address space beyond what is mapped before the first damage
SECONDS_PER_FILE = 30
_HEADER = 16_384  # most damage is done to the first bytes: the rest is weights
_NUMBERS = (0, 1, 2**7, 2**8 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
_WORDS = (
    b"-1",
    b"0",
    b"1e9",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"18446744073709551616",
    b"\xff",
    b"[[",
)

Edit = tuple[
    str, int, str
]  # "set" | "insert" (offset, hex), "cut" (length, ""), "drop" (offset, n)


@dataclasses.dataclass(frozen=True)
class Target:
    """How to make a good folder, and how to read one whole."""

    make: Callable[[Path], None]
    read: Callable[[Path], None]
    modules: tuple[str, ...]  # files whose lines guide the search


class Wrong(Exception):
    """A reader did what it must not."""


def _shipment(recipe: str) -> Shipment:
    """Two narrow layers; a reader's checks do not depend on the width."""
    size = "e2b_mini" if recipe.startswith("mobile") else "12b_mini"
    small: dict[str, Any] = dict(vocab_size=128)
    if size == "12b_mini":
        small["layer_types"] = ("sliding_attention", "full_attention")
    model = Gemma4(model_config(size, **small), rngs=nnx.Rngs(0))
    table = resolve(recipe, model)
    model = prepare(model, table)
    scales = dict.fromkeys(activation_scales(model), 0.05)
    return of_model(convert(with_scales(model, scales), table), table)


def _read_all(shipment: Shipment) -> None:
    for tensor in shipment.tensors.values():
        tensor.read(0, tensor.num_rows)
    for carried in shipment.carried.values():
        carried.read(0, carried.num_bytes)


def _make_safetensors(folder: Path) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.int8)}
    arrays |= {"c": np.float16(1).reshape(1), "d": np.zeros((0, 4), jnp.bfloat16)}
    write_safetensors(folder / "x.safetensors", arrays, metadata={"format": "pt"})


def _read_safetensors(folder: Path) -> None:
    file = SafetensorsFile(folder / "x.safetensors")
    for name in file.tensors:
        file.array(name).sum()
        file.data(name, 0, 8)
        file.forget(name)


def _make_packed(folder: Path) -> None:
    model = Gemma4(
        model_config("12b_mini", vocab_size=128, layer_types=("full_attention",)),
        rngs=nnx.Rngs(0),
    )
    table = resolve("int4_channel", model)
    packed_folder.save_packed(convert(model, table), folder, table=table)


def _make_litert(folder: Path) -> None:
    """A file that is kept: its writer needs libraries of its own."""
    shutil.copyfile(CORPUS.parents[1] / "golden" / "litert_tiny.tflite", folder / FILE)


def _format(
    recipe: str, write: Callable[..., Any], read: Callable[[Path], Shipment], *modules: str
) -> Target:
    options = ExportOptions(per_layer_scales=True)  # the form that our recipes have
    return Target(
        lambda folder: write(_shipment(recipe), folder, options) and None,
        lambda folder: _read_all(read(folder)),
        (*modules, "safetensors_file.py"),
    )


TARGETS = {
    "safetensors": Target(_make_safetensors, _read_safetensors, ("safetensors_file.py",)),
    "gguf": _format(
        "q4_0", gguf_writer.write_gguf, read_gguf,
        "gguf_file.py", "gguf_reader.py", "gguf_model.py", "gguf_blocks.py", "gguf_storage.py",
    ),
    "compressed-tensors": _format(
        "w4a16_g32", compressed_tensors.write_compressed_tensors, read_compressed_tensors,
        "compressed_tensors_reader.py", "quantized_folder.py", "hf.py", "hf_folder.py",
    ),
    "gemma-mobile": _format(
        "mobile_e2b_mini", gemma_mobile.write_gemma_mobile, read_gemma_mobile,
        "gemma_mobile_reader.py", "quantized_folder.py", "hf.py", "hf_folder.py",
    ),
    "hf": _format("none", write_hf, read_hf, "hf.py", "hf_writer.py", "hf_folder.py"),
    "orbax": _format(
        "none", write_orbax, read_orbax, "orbax_gemma.py", "orbax_tree.py", "hf.py",
    ),
    "litert": Target(
        _make_litert,
        lambda folder: _read_all(read_litert(folder)),
        ("litert.py", "litert_file.py", "table.py"),
    ),
    "packed": Target(
        _make_packed,
        lambda folder: packed_folder.load_packed(folder) and None,
        ("packed_folder.py", "safetensors_file.py", "table.py"),
    ),
}  # fmt: skip


def files_of(folder: Path) -> list[str]:
    """What is damaged: every file that the target made."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def apply(data: bytes, edits: list[Edit]) -> bytes:
    """The damaged bytes."""
    for kind, place, content in edits:
        if kind == "cut":
            data = data[:place]
        elif kind == "drop":
            data = data[:place] + data[place + int(content) :]
        else:
            new = bytes.fromhex(content)
            data = data[:place] + new + data[place + (len(new) if kind == "set" else 0) :]
    return data


def check(target: Target, folder: Path) -> None:
    """Reads a folder; `Wrong` where the reader does other than read or refuse in one line."""
    previous = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS_PER_FILE)
    try:
        target.read(folder)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        if "\n" in said.strip() or folder.name not in said or len(said) > 1_500:
            raise Wrong(f"unclear {type(error).__name__}: {said[:500]!r}") from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise Wrong(f"{type(error).__name__}: {str(error)[:500]}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def limit_memory() -> None:
    """Caps the address space a little above what is mapped now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def fuzz(name: str, *, seconds: float, seed: int, rounds: int = 0, folder: Path) -> list[Path]:
    """Looks for findings for a time, or a number of rounds; returns the files saved."""
    target, rng = TARGETS[name], random.Random(seed)
    target.make(folder)
    good = {file: (folder / file).read_bytes() for file in files_of(folder)}
    target.read(folder)
    limit_memory()
    known: set[tuple[str, int]] = set()
    _lines(target, folder, known)
    pool: list[tuple[str, list[Edit]]] = [(file, []) for file in good]
    found: dict[str, Path] = {}
    began, done = time.monotonic(), 0
    while time.monotonic() - began < seconds and (not rounds or done < rounds):
        file, edits = rng.choice(pool)
        edits = list(edits)
        for _ in range(rng.randint(1, 3)):
            edits += _damage(apply(good[file], edits), rng)
        (folder / file).write_bytes(apply(good[file], edits))
        done += 1
        try:
            if _lines(target, folder, known):
                pool.append((file, edits))
        except Wrong as wrong:
            kind = f"{wrong}"[:60].replace(str(folder), "")
            if kind not in found:
                edits = _shortened(target, folder, file, good[file], edits)
                found[kind] = _save(name, file, edits, str(wrong).replace(str(folder), ""))
                print(f"{found[kind].name}: {wrong}", flush=True)
        (folder / file).write_bytes(good[file])
    print(f"{name}: {done} files, {len(known)} lines, {len(pool)} kept, {len(found)} findings")
    return list(found.values())


def replay(path: Path, folder: Path) -> None:
    """Reads a good folder with the edits of one saved finding."""
    saved = json.loads(path.read_text())
    target = TARGETS[path.parent.name]
    file = folder / saved["file"]
    good = file.read_bytes()
    file.write_bytes(apply(good, [tuple(edit) for edit in saved["edits"]]))
    try:
        check(target, folder)
    finally:
        file.write_bytes(good)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"no end after {SECONDS_PER_FILE} seconds")


def _lines(target: Target, folder: Path, known: set[tuple[str, int]]) -> bool:
    """`check` with the target's lines recorded; whether any was new."""
    before = len(known)

    def local(frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            known.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def enter(frame: Any, event: str, _: Any) -> Any:
        return local if frame.f_code.co_filename.endswith(target.modules) else None

    sys.settrace(enter)
    try:
        check(target, folder)
    finally:
        sys.settrace(None)
    return len(known) > before


def _damage(data: bytes, rng: random.Random) -> list[Edit]:
    """One random change."""
    size = len(data)
    reach = min(size, _HEADER) if rng.random() < 0.8 else size
    place = rng.randrange(reach) if reach else 0
    kind = rng.randrange(7)
    if kind == 0:
        flipped = (data[place] if size else 0) ^ (1 << rng.randrange(8))
        return [("set", place, bytes([flipped]).hex())]
    if kind == 1:
        return [("set", place, rng.randbytes(rng.choice((1, 2, 4, 8))).hex())]
    if kind == 2:
        width = rng.choice((1, 2, 4, 8))
        number = rng.choice(_NUMBERS) % 2 ** (8 * width)
        aligned = place - place % rng.choice((1, width))
        return [("set", aligned, number.to_bytes(width, "little").hex())]
    if kind == 3:
        return [("insert", place, rng.choice((*_WORDS, rng.randbytes(rng.randint(1, 8)))).hex())]
    if kind == 4:
        return [("drop", place, str(rng.choice((1, 2, 4, 8, 64))))]
    if kind == 5:  # a number of a text becomes another or none, and the text keeps its length
        number = re.compile(rb"[0-9]+[ ,\]}]").search(data, place)
        if number is None:
            return [("cut", place, "")]
        word = rng.choice(_WORDS)[: len(number[0]) - 1] or b"9"
        return [("set", number.start(), word.rjust(len(number[0]) - 1).hex())]
    return [("cut", place, "")]


def _shortened(
    target: Target, folder: Path, file: str, good: bytes, edits: list[Edit]
) -> list[Edit]:
    """Without the edits that are not needed for the finding."""
    for edit in list(edits):
        fewer = [other for other in edits if other is not edit]
        (folder / file).write_bytes(apply(good, fewer))
        try:
            check(target, folder)
        except Wrong:
            edits = fewer
    return edits


def _save(name: str, file: str, edits: list[Edit], what: str) -> Path:
    text = json.dumps(dict(file=file, found=what, edits=edits), indent=1) + "\n"
    path = CORPUS / name / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def main() -> int:
    """The command line; 1 where anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rounds", type=int, default=0, help="stop after so many files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        found = fuzz(
            options.target,
            seconds=options.seconds,
            seed=options.seed,
            rounds=options.rounds,
            folder=folder,
        )
    finally:
        shutil.rmtree(folder)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
