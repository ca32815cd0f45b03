"""The formats by name: which function writes one, which reads it, and how one is recognised.

The modules are imported when they are needed: some of them want libraries of their own.
"""

import difflib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gemmaqat.interop.shipment import Shipment
from gemmaqat.json_file import read_json

CERTIFICATE = "certificate.json"


class Format(NamedTuple):
    """Where the functions of a format are, as `module:function` within this package."""

    writer: str
    reader: str
    what: str  # for the help
    options: tuple[str, ...]  # of `ExportOptions`, that its writer heeds

    def write(self) -> Callable[..., Any]:
        """`(shipment, folder, options) -> list[Written]`, into an empty folder."""
        return _find(self.writer)

    def read(self) -> Callable[[Path], Shipment]:
        """`(path) -> Shipment`, memory-mapped."""
        return _find(self.reader)


FORMATS = {
    "hf": Format(
        "hf_writer:write_hf",
        "hf_writer:read_hf",
        "float safetensors on the grid",
        ("float_dtype", "text_only", "shard_bytes"),
    ),
    "gguf": Format(
        "gguf_writer:write_gguf",
        "gguf_reader:read_gguf",
        "llama.cpp",
        ("float_dtype", "tables", "text_only"),  # it is never more than text
    ),
    "compressed-tensors": Format(
        "compressed_tensors:write_compressed_tensors",
        "compressed_tensors_reader:read_compressed_tensors",
        "vLLM, transformers",
        ("float_dtype", "packed_experts", "packed_tables", "text_only", "shard_bytes"),
    ),
    "gemma-mobile": Format(
        "gemma_mobile:write_gemma_mobile",
        "gemma_mobile_reader:read_gemma_mobile",
        "transformers",
        ("float_dtype", "per_layer_scales", "text_only", "shard_bytes"),
    ),
    "litert": Format(
        "litert:write_litert",
        "litert:read_litert",
        "phones",
        ("prefill_lengths", "cache_length", "dynamic_activations", "text_only"),
    ),
    "orbax": Format(
        "orbax_gemma:write_orbax",
        "orbax_gemma:read_orbax",
        "google-deepmind/gemma",
        ("float_dtype", "stacked_layers", "text_only"),
    ),
}


def find_format(name: str) -> Format:
    """The format of this name.

    Raises:
        ValueError: there is none; the message names the nearest.
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"format {name!r} is not one of {', '.join(FORMATS)}{hint}")
    return FORMATS[name]


def detect(path: str | Path) -> tuple[str, Path]:
    """The format of a file or folder, and the path its reader takes.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is of no format known here.
    """
    path = Path(path)
    if path.is_file():
        return _detect_file(path)
    if not path.is_dir():
        raise FileNotFoundError(
            f"{path}: no such file or folder; give a checkpoint folder, a GGUF file or a folder "
            "that `gemmaqat export` wrote."
        )
    for name, pattern in (("gguf", "*.gguf"), ("litert", "*.tflite")):
        if found := sorted(path.glob(pattern)):
            if name == "gguf" and len(found) > 1:
                raise ValueError(
                    f"{path}: holds {found[0].name} and {found[1].name}; name the file itself."
                )
            return name, (found[0] if name == "gguf" else path)
    if any((path / name / "_METADATA").is_file() for name in ("", "params", "default")):
        return "orbax", path
    method = _quant_method(path / "config.json")
    if method == "compressed-tensors":
        return "compressed-tensors", path
    if method == "gemma":
        return "gemma-mobile", path
    if method:
        raise ValueError(
            f"{path / 'config.json'}: quant_method {method!r} cannot be read; known are "
            "'compressed-tensors' and 'gemma'."
        )
    return "hf", path


def _detect_file(path: Path) -> tuple[str, Path]:
    with path.open("rb") as file:
        head = file.read(8)
    if head[:4] == b"GGUF":
        return "gguf", path
    if head[4:8] == b"TFL3":
        return "litert", path
    if path.suffix == ".safetensors":
        return detect(path.parent)
    raise ValueError(
        f"{path}: neither GGUF, safetensors nor LiteRT by its first bytes; give another file, or "
        "fetch it again."
    )


def _quant_method(config: Path) -> str:
    """`quantization_config.quant_method` of a config.json; "" where there is none."""
    try:
        section = read_json(config).get("quantization_config")
    except (OSError, ValueError):  # its own reader will say what is wrong
        return ""
    return str(section.get("quant_method") or "") if isinstance(section, dict) else ""


def _find(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"gemmaqat.interop.{module}"), function)
