"""Foreign readers on our exports: one row per format and shape, as a Markdown table.

    python benchmarks/interop_table.py [--readers=llama.cpp,transformers] [--shapes=e2b,12b]

Needs the extra `foreign`. Models are trained for some steps on the built-in tasks (see
`interop_models`). Columns: weights that the foreign library dequantizes to our values, of all;
mean KL and largest logit difference to ours; the same most likely token; the reader's complaints.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import interop_models as models

from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.source import values


class Row(NamedTuple):
    """What one reader makes of one export."""

    format: str
    shape: str
    equal: str  # share of weights whose values are ours
    distance: models.Distance
    complaints: int
    note: str = ""


def llama_cpp(shape: str, folder: Path) -> Iterator[Row]:
    """A float32 file of the decoded values, then the Q4_0 file with three kinds of tables."""
    import llama_cpp_reader as reader

    from gemmaqat.interop.gguf_writer import write_gguf

    ids = models.texts(models.SEQUENCES, holdout=True)
    shipment = models.quantized(shape, "q4_0_emb")
    ours = models.our_logits(shipment, ids)
    floats = None
    for name, made, tables in (
        ("gguf F32", models.decoded(shipment), "as_is"),
        ("gguf Q4_0", shipment, "as_is"),
        ("gguf Q4_0, tables Q8_0", shipment, "q8_0"),
        ("gguf Q4_0, tables Q6_K", shipment, "q6_k"),
    ):
        target = folder / f"{shape}-{name.replace(' ', '-')}"
        target.mkdir()
        write_gguf(made, target, ExportOptions(tables=tables))
        path = models.only_file(target, "*.gguf")
        with reader.Model(path) as model:
            found = np.stack([model.logits(row) for row in ids])
            complaints = len(model.complaints)
        note = ""
        if floats is None:
            floats = found
        else:
            noise, sure = models.distance(floats, found), models.decided(ours)
            ratio = models.distance(ours, found).mean_kl / noise.mean_kl
            note = (
                f"{ratio:.3f} x llama.cpp's F32 against its own, whose top-1 is {noise.top_1:.1%}; "
                f"{models.distance(ours[sure], found[sure]).top_1:.1%} of the {sure.mean():.0%} of "
                f"positions where a token leads by {models.LEAD:.0%}"
            )
        yield Row(name, shape, _equal_gguf(made, path), models.distance(ours, found),
                  complaints, note)  # fmt: skip


def _equal_gguf(shipment: models.Shipment, path: Path) -> str:
    """Share of weights that the `gguf` package dequantizes to ours."""
    import gguf

    from gemmaqat.interop.gguf_model import tensor_name

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    equal = total = 0
    for name, tensor in shipment.tensors.items():
        theirs = stored[tensor_name(name) or ""]
        ours = values(tensor, tensor.read(0, tensor.num_rows))
        found = gguf.dequantize(theirs.data, theirs.tensor_type).reshape(ours.shape)
        equal += int(np.sum(found == ours))
        total += tensor.num_weights
    return f"{equal / total:.2%}"


def transformers(shape: str, folder: Path) -> Iterator[Row]:
    """Floats on the grid, compressed-tensors on both of its paths, the mobile format of E sizes."""
    from transformers import CompressedTensorsConfig
    from transformers_reader import Model

    from gemmaqat.interop.compressed_tensors import write_compressed_tensors
    from gemmaqat.interop.gemma_mobile import write_gemma_mobile
    from gemmaqat.interop.hf_writer import read_hf, write_hf

    ids = models.texts(models.SEQUENCES, holdout=True)
    dequantize = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    blocks = models.quantized(shape, "q4_0_emb")
    rows = [
        ("hf, bfloat16 on the grid", blocks, write_hf, ExportOptions(float_dtype="bfloat16"), {}),
        ("compressed-tensors", blocks, write_compressed_tensors, ExportOptions(), {}),
        ("compressed-tensors, dequantize", blocks, write_compressed_tensors, ExportOptions(),
         dequantize),
        ("compressed-tensors int2 channel", models.quantized(shape, "int2_channel"),
         write_compressed_tensors, ExportOptions(), {}),
    ]  # fmt: skip
    if models.SHAPES[shape].per_layer_dim:
        mobile = models.mobile(shape)
        rows.append(("gemma-mobile, clamped", mobile, write_gemma_mobile, ExportOptions(), {}))
    for number, (name, shipment, write, options, loading) in enumerate(rows):
        target = folder / str(number)
        target.mkdir()
        write(shipment, target, options)
        model = Model(target, **loading)
        found = model.logits(ids)
        # Of a float file what it holds: kept weights may have been rounded.
        ours = models.our_logits(read_hf(target) if write is write_hf else shipment, ids)
        note = ""
        if shipment.table.activations:
            # A value on the border of two steps may fall to either side, between two attention
            # kernels of transformers itself, too.
            other = Model(target, attn_implementation="sdpa").logits(ids)
            near, own = (
                np.mean(np.max(np.abs(logits - found), axis=-1) <= 5e-4) for logits in (ours, other)
            )
            note = f"{near:.1%} of positions within 5e-4, {own:.1%} of its own other attention"
        far = models.distance(ours, found)
        yield Row(name, shape, model.equal(shipment), far, len(model.complaints), note)


READERS: dict[str, Callable[[str, Path], Iterator[Row]]] = {
    "llama.cpp": llama_cpp,
    "transformers": transformers,
}

HEADER = (
    "| format | shape | weights equal | mean KL | largest difference | top-1 | complaints | |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Prints the table, row by row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--shapes", default=",".join(models.SHAPES))
    chosen = parser.parse_args()
    print(HEADER)
    for shape in chosen.shapes.split(","):
        for name in chosen.readers.split(","):
            with tempfile.TemporaryDirectory() as folder:
                for row in READERS[name](shape, Path(folder)):
                    kl, largest, top = row.distance
                    print(
                        f"| {row.format} | `{row.shape}` | {row.equal} | {kl:.1e} | {largest:.1e} "
                        f"| {top:.1%} | {row.complaints} | {row.note} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
