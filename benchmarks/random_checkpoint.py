"""A checkpoint folder of any full size with random weights, under the names of the released files.

    python benchmarks/random_checkpoint.py --size=e2b --folder=/data/random-e2b
    python benchmarks/random_checkpoint.py --size=31b --folder=/data/sparse-31b --sparse

For trying conversions at real scale: 10.2 GB for e2b, written a piece at a time. With --sparse the
files have their full length but are holes, which read as zeros and take no disk: the 31B's 62.5 GB
cost 200 kB. One tensor stands in for the encoders, in their size; there is no tokenizer.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import tqdm
from absl import app, flags

from gemmaqat.interop.hf import stored_shape, tensor_name
from gemmaqat.interop.safetensors_writer import Declared, SafetensorsWriter
from gemmaqat.models.config import ModelConfig
from gemmaqat.models.sizes import model_config
from gemmaqat.planning.layouts import ENCODER_WEIGHTS, FULL_SIZES
from gemmaqat.planning.parameters import abstract_parameters

_SIZE = flags.DEFINE_enum("size", "e2b", FULL_SIZES, "Which size.")
_FOLDER = flags.DEFINE_string("folder", None, "A new folder for the checkpoint.", required=True)
_SPARSE = flags.DEFINE_bool("sparse", False, "Leave holes instead of random weights.")
_TEXT_ONLY = flags.DEFINE_bool("text_only", False, "Leave out the stand-in of the encoders.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the weights.")
_SHARD_BYTES = flags.DEFINE_integer("shard_bytes", 50_000_000_000, "Largest size of one file.")

_PREFIX = "model.language_model."
_PIECE = 1 << 22  # weights made at once


def main(_: list[str]) -> None:
    """Writes the folder that the flags ask for."""
    config, folder = model_config(_SIZE.value), Path(_FOLDER.value)
    if folder.is_dir() and any(folder.iterdir()):
        raise app.UsageError(f"--folder={folder}: not empty; name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    declared = list(tensors(config, encoders=not _TEXT_ONLY.value))
    total = sum(tensor.num_bytes for tensor in declared)
    with (
        tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=config.name) as bar,
        SafetensorsWriter(folder, declared, shard_bytes=_SHARD_BYTES.value) as writer,
    ):
        for tensor in declared:
            if _SPARSE.value:
                writer.skip(tensor.name)
                bar.update(tensor.num_bytes)
                continue
            for part in random_weights(tensor, seed=_SEED.value):
                writer.write(tensor.name, part)
                bar.update(part.nbytes)
    (folder / "config.json").write_text(json.dumps(released_config(config), indent=2) + "\n")


def tensors(config: ModelConfig, *, encoders: bool) -> Iterator[Declared]:
    """Every tensor of the released file, the encoders as one."""
    for path, leaf in abstract_parameters(config).items():
        yield Declared(_PREFIX + tensor_name(path), "BF16", stored_shape(path, leaf.shape))
    for layer in range(config.first_shared_layer, config.num_layers):  # carried, read by nobody
        heads, head_dim = config.layer_kv_heads(layer), config.layer_head_dim(layer)
        name = f"{_PREFIX}layers.{layer}.self_attn"
        yield Declared(f"{name}.k_proj.weight", "BF16", (heads * head_dim, config.embed_dim))
        yield Declared(f"{name}.v_proj.weight", "BF16", (heads * head_dim, config.embed_dim))
        yield Declared(f"{name}.k_norm.weight", "BF16", (head_dim,))
    if encoders:
        yield Declared(
            "model.vision_tower.stand_in.weight", "BF16", (ENCODER_WEIGHTS[config.name],)
        )


def random_weights(tensor: Declared, *, seed: int) -> Iterator[np.ndarray]:
    """The tensor in pieces: matrices of deviation 0.02, vectors near 1."""
    generator = np.random.default_rng((seed, zlib.crc32(tensor.name.encode())))
    count, vector = math.prod(tensor.shape), len(tensor.shape) == 1
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        part = generator.standard_normal(size, dtype=np.float32)
        part *= 0.02
        yield (part + 1 if vector else part).astype(ml_dtypes.bfloat16)


def released_config(config: ModelConfig) -> dict:
    """config.json as released: the decoder's settings inside those of a multimodal model."""
    unified = "_unified" if config.name == "12b" else ""
    text = config.to_hf() | {"model_type": f"gemma4{unified}_text"}
    text.pop("architectures")
    name = "Gemma4Unified" if unified else "Gemma4"
    return {
        "architectures": [f"{name}ForConditionalGeneration"],
        "model_type": f"gemma4{unified}",
        "dtype": "bfloat16",
        "eos_token_id": [1, 106],
        "tie_word_embeddings": True,
        "text_config": text,
    }


if __name__ == "__main__":
    app.run(main)
