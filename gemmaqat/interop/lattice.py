"""Codes and scales from floats that lie on a grid: checkpoints trained for one but shipped without.

A value `x = round(code * scale)` to the checkpoint's dtype tells the scale up to that rounding:
somewhere between the ends of the interval that rounds to `x`, divided by the code. Codes follow
from the largest value once it is known which code that one has, which a few candidates settle; the
intervals of a block then either share a point or they do not. Of the scales they share the one of
fewest significant bits is taken, which is the true one wherever the true one has few: several
scales of many bits round to the very same values.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gemmaqat.interop.shipment import Piece, Shipment, ShippedTensor
from gemmaqat.quantization.grid import CHANNEL, NAMED_GRIDS, Grid
from gemmaqat.quantization.rounding import round_scale
from gemmaqat.quantization.trials import places_first

CHUNK_WEIGHTS = 1 << 22
# Dtypes whose scales are tried, the least of bits first; the last holds any.
_SCALES = (
    Grid(bits=4, scale_dtype="float16", scale_bits=5),
    Grid(bits=4, scale_dtype="bfloat16"),
    Grid(bits=4, scale_dtype="float16"),
    Grid(bits=4),
)
# Bit patterns of float32 between a value and the end of the interval that rounds to it.
_HALF_STEP = {"bfloat16": 1 << 15, "float16": 1 << 12, "float32": 1}


class Recovered(NamedTuple):
    """What `recover` found in rows [R, K], C blocks each.

    Attributes:
        codes: int8 [R, K].
        scales: float32 [R, C]; 0 for a block of zeros.
        kept: int32 [R, C], how many values of the block are `codes * scales` in the rows' dtype.
        precision: int32 [R, C], which of `SCALE_KINDS` the scale needs.
    """

    codes: Array
    scales: Array
    kept: Array
    precision: Array


SCALE_KINDS = ("5 bits", "bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """How one tensor fared.

    Attributes:
        path: the parameter's path.
        values: share of values that codes and scales give again.
        blocks: share of blocks of which they give every value.
        grid: the grid it was given; None where it stays float.
    """

    path: str
    values: float
    blocks: float
    grid: Grid | None

    def __str__(self) -> str:
        what = self.grid.describe() if self.grid else "stays float"
        return f"{self.path}: {self.values:.2%} of values, {self.blocks:.2%} of blocks; {what}"


def recover(
    rows: Float[Any, "R K"], block: int = 32, *, bits: int = 4, dtype: str = "bfloat16"
) -> Recovered:
    """Codes and scales of values on a grid of `2^bits` levels, rounded to a dtype.

    Args:
        rows: the values, float32 or the dtype itself.
        block: weights under one scale, 0 for one scale per row.
        bits: of a code. 8-bit codes are found in float32 alone: other dtypes round their values
            by more than a step of the grid may hold.
        dtype: to which the values were rounded: bfloat16, float16 or float32.
    """
    if bits > 5 and dtype != "float32":
        raise ValueError(
            f"recover: codes of {bits} bits cannot be told from values rounded to {dtype}; "
            "expected float32, or 5 bits at most."
        )
    return _recover(jnp.asarray(rows, jnp.float32), block, bits, dtype)


def recover_shipment(
    shipment: Shipment,
    *,
    block: int = 32,
    bits: int = 4,
    least: float = 1.0,
    wanted: Callable[[str], bool] = lambda path: True,
) -> tuple[Shipment, list[Recovery]]:
    """The same checkpoint with codes for every float matrix that lies on a grid.

    Each tensor is read once to learn its grid, and again, a few rows at a time, when it is used.

    Args:
        shipment: of floats; quantized tensors are passed on.
        block: weights under one scale, 0 for one scale per row.
        bits: of a code.
        least: share of a tensor's values that must be found again; below it, the tensor stays
            float. With less than 1 the remaining values move to the nearest level.
        wanted: which paths to look at.
    """
    tensors, entries, reports = {}, {}, []
    for path, tensor in shipment.tensors.items():
        tensors[path] = tensor
        length = tensor.row_length
        if tensor.grid or len(tensor.shape) < 2 or not wanted(path) or (block and length % block):
            continue
        search = functools.partial(recover, block=block, bits=bits, dtype=tensor.dtype.name)
        report = _survey(tensor, search, block, bits, least)
        reports.append(report)
        if report.grid:
            read = functools.partial(_read_codes, tensor.read, search, report.grid)
            tensors[path] = dataclasses.replace(tensor, grid=report.grid, read=read)
            entries[path] = report.grid
    table = dataclasses.replace(
        shipment.table,
        entries=tuple(
            dataclasses.replace(e, grid=entries[e.path], rule_name="recovered", reason="")
            if e.path in entries
            else e
            for e in shipment.table.entries
        ),
    )
    return dataclasses.replace(shipment, tensors=tensors, table=table), reports


def _survey(
    tensor: ShippedTensor, search: Callable[..., Recovered], block: int, bits: int, least: float
) -> Recovery:
    """Reads a tensor once. A first chunk far from any grid settles it."""
    rows = max(1, CHUNK_WEIGHTS // tensor.row_length)
    size = block or tensor.row_length
    values = blocks = seen = 0
    precision, anchored = 0, True
    for start in range(0, tensor.num_rows, rows):
        stop = min(start + rows, tensor.num_rows)
        found = search(np.asarray(tensor.read(start, stop), np.float32))
        seen += (stop - start) * tensor.row_length
        values += int(jnp.sum(found.kept))
        blocks += int(jnp.sum(found.kept == size))
        precision = max(precision, int(jnp.max(found.precision)))
        lowest = jnp.min(found.codes.reshape(*found.scales.shape, size), axis=-1)
        held = (lowest == -(2 ** (bits - 1))) | (found.scales == 0)
        anchored = anchored and bool(jnp.all(held))
        if values < 0.9 * seen and values < least * seen:
            break
    share = values / seen
    grid = None
    if share >= least:
        grid = _grid(bits, block, precision, anchored)
    return Recovery(path=tensor.path, values=share, blocks=blocks * size / seen, grid=grid)


def _grid(bits: int, block: int, precision: int, anchored: bool) -> Grid:
    """The grid by which these codes would be trained further."""
    kind = _SCALES[precision]
    if anchored and precision == 0 and (bits, block) == (4, 32):
        return NAMED_GRIDS["q4_0"]
    return Grid(
        bits=bits,
        block=block or CHANNEL,
        scale_rule="ggml" if anchored else "absmax",
        scale_dtype=kind.scale_dtype,
        scale_bits=kind.scale_bits,
        anchor=anchored and precision == 0,
    )


def _read_codes(
    read: Callable[[int, int], Any],
    search: Callable[..., Recovered],
    grid: Grid,
    start: int,
    stop: int,
) -> Piece:
    found = search(np.asarray(read(start, stop), np.float32))
    scales = np.asarray(found.scales.astype(grid.scale_dtype))
    return Piece(np.asarray(found.codes), scales)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _recover(rows: Array, block: int, bits: int, dtype: str) -> Recovered:
    block = block or rows.shape[1]
    x = places_first(rows.reshape(len(rows), -1, block))  # [groups, block, lanes]
    low, high = _interval(jnp.abs(x), dtype)
    least, most = jnp.min(x, axis=1), jnp.max(x, axis=1)
    extreme = jnp.where(most > -least, most, least)
    top = 2 ** (bits - 1)

    def trial(i: Array, best: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        # The lowest code has no counterpart above, so it tells the sign of the scale; other codes
        # come in both signs, and a positive scale will do.
        k = jnp.asarray(_extremes(bits), jnp.float32)[i]
        sign = jnp.where(k == top, -jnp.sign(extreme), 1.0)
        step = jnp.where(extreme == 0, 1.0, jnp.abs(extreme) / k * sign)[:, None]
        codes = jnp.clip(jnp.round(x / step), -top, top - 1)
        size = jnp.abs(codes)
        lower = jnp.max(jnp.where(size > 0, low / jnp.maximum(size, 1), 0), axis=1)
        upper = jnp.min(jnp.where(size > 0, high / jnp.maximum(size, 1), jnp.inf), axis=1)
        # At least 1 where the intervals of all values share a point.
        lost = jnp.any((size == 0) & (x != 0), axis=1)
        score = jnp.where(lost, 0, jnp.minimum(upper / lower, 1))
        better = score > best[0]
        middle = jnp.where(better, (lower + upper) / 2 * sign, best[1])
        return jnp.maximum(score, best[0]), middle, jnp.where(better[:, None], codes, best[2])

    worst = (jnp.full_like(extreme, -1), jnp.ones_like(extreme), jnp.zeros_like(x))
    _, middle, codes = jax.lax.fori_loop(0, len(_extremes(bits)), trial, worst)
    scales, kept, precision = _simplest(x, codes, middle, dtype)
    zero = extreme == 0
    shape = (len(rows), rows.shape[1] // block)
    return Recovered(
        codes.transpose(0, 2, 1).reshape(rows.shape).astype(jnp.int8),
        jnp.where(zero, 0.0, scales).reshape(shape),
        jnp.where(zero, block, kept).reshape(shape),
        jnp.where(zero, 0, precision).reshape(shape),
    )


def _simplest(x: Array, codes: Array, middle: Array, dtype: str) -> tuple[Array, Array, Array]:
    """The scale of fewest bits that gives the most values of a block, how many, and its kind."""
    stored = Grid(bits=8, scale_dtype=dtype)
    scales, kept, precision = middle, jnp.full(middle.shape, -1), jnp.zeros(middle.shape, jnp.int32)
    for kind, grid in enumerate(_SCALES):
        scale = round_scale(middle, grid)
        value = round_scale(codes * scale[:, None], stored)
        count = jnp.sum(value == x, axis=1)
        better = count > kept
        scales, kept = jnp.where(better, scale, scales), jnp.maximum(count, kept)
        precision = jnp.where(better, kind, precision)
    return scales, kept, precision


def _interval(size: Array, dtype: str) -> tuple[Array, Array]:
    """The ends of the interval of positive numbers that round to these."""
    pattern = jax.lax.bitcast_convert_type(size, jnp.int32)
    ends = (jnp.maximum(pattern - _HALF_STEP[dtype], 0), pattern + _HALF_STEP[dtype])
    low, high = (jax.lax.bitcast_convert_type(end, jnp.float32) for end in ends)
    return low, high


def _extremes(bits: int) -> Sequence[int]:
    """Codes that the largest value of a block may have, likeliest first."""
    top = 2 ** (bits - 1)
    return (top, top - 1) if bits > 5 else range(top, max(top // 2, 1) - 1, -1)
