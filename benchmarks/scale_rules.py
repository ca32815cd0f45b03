"""What a scale rule costs, and what converting a bfloat16 checkpoint on its grid leaves of it.

    python benchmarks/scale_rules.py [--rows=2048] [--run=runs/anchor_e2b_mini/.../q4_0/qat]

Blocks of 32 weights of three distributions, or of the linears of a trained run, are quantized by
each rule, the values are rounded to bfloat16 as a checkpoint holds them, and three routes lead
from there to Q4_0: the stock quantizer
of llama.cpp (that of the gguf package, the same to the bit), the one with a uniform importance
matrix (where llama-cpp-python is installed), and our lattice recovery.
"""

import argparse
import sys
from pathlib import Path

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from gemmaqat.interop.lattice import recover
from gemmaqat.quantization import trees
from gemmaqat.quantization.grid import Grid
from gemmaqat.quantization.grids import dequantize, quantize
from gemmaqat.quantization.recipes import recipe
from gemmaqat.training.start import load_run

sys.path.insert(0, str(Path(__file__).parent))
try:
    import llama_cpp_reader
except ImportError:
    llama_cpp_reader = None  # type: ignore[assignment]

LENGTH = 1024
RULES = {
    "ggml's own, `q4_0_ggml`": recipe("q4_0_ggml")[-1].grid(LENGTH),
    "signed max / -8, f16, `q4_0_free`": recipe("q4_0_free")[-1].grid(LENGTH),
    "signed max / -8, bf16": Grid(bits=4, block=32, scale_rule="ggml", scale_dtype="bfloat16"),
    "absmax / 7, f32": Grid(bits=4, block=32),
    "absmax / 7, bf16": Grid(bits=4, block=32, scale_dtype="bfloat16"),
    "absmax / 7.5, f32": Grid(bits=4, block=32, scale_rule="absmax_half"),
    "absmax / 7.5, bf16, `w4a16_g32_free`": recipe("w4a16_g32_free")[-1].grid(LENGTH),
    "absmax / 7.5, 5 bits": Grid(bits=4, block=32, scale_rule="absmax_half", scale_bits=5),
    "absmax / 8, bf16": Grid(bits=4, block=32, scale_dtype="bfloat16", scale_factor=7 / 8),
    "least squares, bf16": Grid(bits=4, block=32, scale_dtype="bfloat16", scale_rule="mse"),
    "**anchored, 5 bits, f16, `q4_0`**": recipe("q4_0")[-1].grid(LENGTH),
    "**anchored, 5 bits, bf16, `w4a16_g32`**": recipe("w4a16_g32")[-1].grid(LENGTH),
}


def main() -> None:
    """Prints one row per rule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--run", default="", help="work directory of a run whose linears to take")
    arguments = parser.parse_args()
    weights = _trained(arguments.run) if arguments.run else _random(arguments.rows)
    routes = [_stock, _lattice] if llama_cpp_reader is None else [_stock, _importance, _lattice]
    titles = {_stock: "stock", _importance: "importance matrix", _lattice: "lattice recovery"}
    print("| rule | squared error | " + " | ".join(titles[route] for route in routes) + " |")
    print("|---|---" + "|---" * len(routes) + "|")
    base = None
    for name, grid in RULES.items():
        errors, kept = [], np.zeros((len(routes), 3))
        for w in weights:
            codes, scales = quantize(jnp.asarray(w), grid, -1)
            value = np.asarray(dequantize(codes, scales, grid, -1))
            errors.append(np.sum(np.square(value - w, dtype=np.float64)))
            stored = value.astype(ml_dtypes.bfloat16)
            kept += [_kept(np.asarray(codes), stored, *route(stored)) for route in routes]
        base = base or errors
        ratios = ", ".join(
            f"{error / first:.3f}" for error, first in zip(errors, base, strict=True)
        )
        cells = [" / ".join(_percent(share) for share in row) for row in kept / len(weights)]
        print(f"| {name} | {ratios} | " + " | ".join(cells) + " |", flush=True)
    kinds = "the run's" if arguments.run else "normal, Laplace and Student (5)"
    print(f"\nSquared error relative to ggml's rule for {kinds} weights;")
    print("per cent of codes / whole blocks / bfloat16 values kept, in the mean of these.")


def _random(rows: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (rows, LENGTH)
    samples = [rng.standard_normal(shape), rng.laplace(size=shape), rng.standard_t(5, size=shape)]
    return [(0.02 * sample).astype(np.float32) for sample in samples]


def _trained(workdir: str) -> list[np.ndarray]:
    """All blocks of the float master weights that a run trained under its recipe, as one array."""
    run = load_run(workdir)
    if run.table is None:
        raise SystemExit(f"{workdir}: a run in float; name one that trained with a recipe")
    arrays = trees.weights(run.model)
    blocks = [
        np.moveaxis(np.asarray(arrays[entry.path][0], np.float32), entry.axis, -1).reshape(-1, 32)
        for entry in run.table.quantized
    ]
    return [np.concatenate(blocks)]


def _kept(codes, stored, found_codes, found_values) -> tuple[float, float, float]:
    """Shares of codes, of blocks with all values, and of values that a route kept."""
    same = found_values.astype(ml_dtypes.bfloat16) == stored
    return np.mean(found_codes == codes), np.mean(same.reshape(-1, 32).all(axis=1)), np.mean(same)


def _stock(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    raw = gguf.quantize(stored.astype(np.float32), gguf.GGMLQuantizationType.Q4_0)
    return _read(raw, stored.shape)


def _importance(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ones = np.ones(stored.shape[1], np.float32)
    raw = llama_cpp_reader.quantize(stored.astype(np.float32), 2, stored.shape[1] // 32 * 18, ones)
    return _read(raw, stored.shape)


def _lattice(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = recover(stored)
    codes = np.asarray(found.codes)
    return codes, codes * np.repeat(np.asarray(found.scales), 32, axis=1)


def _read(raw: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Codes and values of Q4_0 blocks."""
    nibbles = raw.reshape(-1, 18)[:, 2:]
    codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.int8) - 8
    return codes.reshape(shape), gguf.dequantize(raw, gguf.GGMLQuantizationType.Q4_0)


def _percent(share: float) -> str:
    """Whole per cents, and 100 only where it is all."""
    return "100" if share == 1 else f"{min(100 * share, 99.99):.4g}"


if __name__ == "__main__":
    main()
