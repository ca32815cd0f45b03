"""Encoding for GGUF beside ggml's own quantizer, per tensor type, in turns in one process.

    taskset -c 0 python benchmarks/export_speed.py [--rows=4096] [--columns=1536]

`codes`: our writer, from codes and scales. `quantize`: ours from floats, codes included. Both and
ggml's see the same rows; ggml's function uses one thread, so pin the process to one core. Needs the
extra `foreign`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import llama_cpp_reader as reader

from gemmaqat.interop import gguf_blocks as blocks
from gemmaqat.interop.gguf_storage import choose, quantize_rows
from gemmaqat.interop.options import ExportOptions
from gemmaqat.interop.shipment import Piece, ShippedTensor
from gemmaqat.quantization.grids import quantize
from gemmaqat.quantization.recipes import recipe

RECIPES = {"Q4_0": "q4_0", "Q8_0": "q8_0_ggml", "Q6_K": "q6_k"}


def main() -> None:
    """Prints one row per type: million weights a second of each, and the ratios of the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=1536)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    shape = (chosen.rows, chosen.columns)
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    print("| type | ggml | ours, from codes | ours, from floats | codes / ggml | floats / ggml |")
    print("|---|---|---|---|---|---|")
    for name, ours in RECIPES.items():
        kind = blocks.TYPES[name]
        grid = recipe(ours)[-1].grid(chosen.columns)
        found = quantize(rows, grid, axis=-1)
        piece = Piece(*(np.asarray(part) for part in found))
        tensor = ShippedTensor(
            path="layers/0/mlp/up_proj/weight", shape=shape, grid=grid, dtype=rows.dtype,
            read=lambda start, stop, piece=piece: piece,
        )  # fmt: skip
        storage = choose(tensor, ExportOptions())
        assert storage.type == kind, (storage.type, kind)
        width = blocks.row_bytes(kind, chosen.columns)
        seconds = alternate(
            (
                lambda kind=kind, width=width: reader.quantize(rows, kind.number, width),
                lambda storage=storage, piece=piece: storage.encode(piece),
                lambda kind=kind: quantize_rows(rows, kind),
            ),
            chosen.rounds,
        )
        speeds = [rows.size / s / 1e6 for s in seconds]
        ratios = [speed / speeds[0] for speed in speeds[1:]]
        cells = [f"{speed:,.0f}" for speed in speeds] + [f"{ratio:.2f}" for ratio in ratios]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def alternate(functions: tuple[Callable[[], object], ...], rounds: int) -> list[float]:
    """Median seconds of each, run in turns after one round that is not counted."""
    seconds = np.empty((rounds + 1, len(functions)))
    for i in range(rounds + 1):
        for j, function in enumerate(functions):
            start = time.perf_counter()
            function()
            seconds[i, j] = time.perf_counter() - start
    return np.median(seconds[1:], axis=0).tolist()


if __name__ == "__main__":
    main()
