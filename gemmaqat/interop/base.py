"""What a checkpoint holds beside the text decoder, kept with whatever is made of it.

Vision and audio tensors, keys that no layer reads, the released config.json and the tokenizer are
not trained and not quantized, yet an export must hand them on. A work directory and a packed folder
therefore take copies, and stand alone:

base/base.json           where they come from, and what there must be
base/config.json         the checkpoint's own, where it had one
base/model.safetensors   the carried tensors byte for byte, where there are any
tokenizer.json, ...      the companions, in the folder itself
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemmaqat.interop.safetensors_file import SafetensorsFile, SafetensorsFolder
from gemmaqat.interop.safetensors_writer import Declared, SafetensorsWriter
from gemmaqat.interop.shipment import CarriedTensor, Shipment
from gemmaqat.json_file import read_json

FOLDER = "base"
# What a checkpoint needs beside its weights; a file of another name is not passed on.
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
)  # fmt: skip

_ABOUT, _CONFIG = "base.json", "config.json"
_HEAD = "lm_head.weight"  # a second copy of the token table, which may since have changed
_PIECE_BYTES = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """What is handed on of a checkpoint; attributes as those of `Shipment`."""

    source: str = ""  # the checkpoint, for people
    carried: Mapping[str, CarriedTensor] = dataclasses.field(default_factory=dict)
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    released_config: Mapping[str, Any] | None = None

    def added_to(self, shipment: Shipment) -> Shipment:
        """The shipment with all of this."""
        return dataclasses.replace(
            shipment,
            carried=self.carried,
            files={**shipment.files, **self.files},
            released_config=self.released_config,
        )


def base_of(shipment: Shipment, source: str | Path) -> Base:
    """What a checkpoint hands on, without a second copy of its token table."""
    carried = {
        name: tensor
        for name, tensor in shipment.carried.items()
        if name != _HEAD and not name.endswith(f".{_HEAD}")
    }
    return Base(
        source=str(source),
        carried=carried,
        files=shipment.files,
        released_config=shipment.released_config,
    )


def save_base(base: Base, folder: Path) -> None:
    """Writes it into a folder; what an interrupted call left there is replaced."""
    draft = folder / FOLDER
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, path in base.files.items():
        shutil.copyfile(path, folder / name)
    if base.released_config is not None:
        _write_json(draft / _CONFIG, base.released_config)
    if base.carried:
        declared = [Declared(t.name, t.dtype, t.shape) for t in base.carried.values()]
        total = sum(tensor.num_bytes for tensor in base.carried.values())
        with SafetensorsWriter(draft, declared, shard_bytes=max(total, 1)) as writer:
            for tensor in base.carried.values():
                for start in range(0, tensor.num_bytes, _PIECE_BYTES):
                    stop = min(start + _PIECE_BYTES, tensor.num_bytes)
                    writer.write(tensor.name, tensor.read(start, stop))
    about = {
        "source": base.source,
        "released_config": base.released_config is not None,
        "carried": sorted(base.carried),
        "files": sorted(base.files),
    }
    _write_json(draft / _ABOUT, about)  # last: with it the folder is whole


def read_base(folder: Path) -> Base | None:
    """What `save_base` wrote into this folder; None if it wrote nothing.

    Raises:
        FileNotFoundError, ValueError: something of it is missing or damaged.
    """
    draft = folder / FOLDER
    if not draft.is_dir():
        return None
    about = read_json(draft / _ABOUT, "restore it from a copy")
    missing = [name for name in about.get("files", ()) if not (folder / name).is_file()]
    tensors = SafetensorsFolder(draft).files if about.get("carried") else {}
    if set(tensors) != set(about.get("carried", ())):
        missing.append(f"{FOLDER}: a carried tensor")
    if missing:
        raise FileNotFoundError(
            f"{folder}: {missing[0]} of the checkpoint {about.get('source')!r} is missing; restore "
            "the folder from a copy."
        )
    return Base(
        source=str(about.get("source", "")),
        carried={name: of_carried(file, name) for name, file in tensors.items()},
        files={name: folder / name for name in about.get("files", ())},
        released_config=read_json(draft / _CONFIG) if about.get("released_config") else None,
    )


def companions(folder: Path) -> dict[str, Path]:
    """The companion files of a checkpoint, by name."""
    return {name: folder / name for name in COMPANIONS if (folder / name).is_file()}


def of_carried(file: SafetensorsFile, name: str) -> CarriedTensor:
    """A tensor of a mapped file, to be passed on."""
    entry = file.tensors[name]
    return CarriedTensor(
        name=name,
        dtype=entry.dtype,
        shape=tuple(entry.shape),
        read=lambda start, stop: file.data(name, start, stop),
        num_bytes=entry.stop - entry.start,
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
