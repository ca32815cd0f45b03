"""Integer grids: how a float weight becomes codes and scales, and back.

`value = level(code) * scale`, the scale shared by a block of the contraction axis, a channel or a
matrix. Codes and scales are computed from float32, in an order of operations spelled out so that
eager, jitted and differentiated programs give the same bits:

- codes come from multiplication by the reciprocal of the scale. XLA makes that of a division by a
  broadcast scale anyway (so qwix's codes come out so), and ggml's quantizers are written so;
- between a product and a sum stands a clip, or LLVM would contract the two into one rounding;
- divisions that must round once have a divisor XLA cannot fold into a constant reciprocal.

A NaN or an infinity makes the scale of its block NaN, and so every value under that scale.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

SCALE_RULES = ("ggml", "absmax", "absmax_half", "mean_abs", "mse")
SCALE_DTYPES = ("float32", "bfloat16", "float16")
LEVELS = ("full", "half", "ternary")
ROUNDINGS = ("even", "up", "away")
CHANNEL, TENSOR = 0, -1
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256

# Blocks whose scale is smaller count as zero: qwix's threshold, the root of the least normal
# float32, below which the reciprocal of a product would leave the range.
_TINY = float(np.sqrt(np.finfo(np.float32).tiny))
# Trial fractions of the absolute maximum for the searched scale.
_SEARCH = np.linspace(0.25, 1.0, 31, dtype=np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What values a weight may take. Hashable: grids select compiled programs."""

    bits: int  # nominal, 2 to 8; ternary is 2
    block: int = CHANNEL  # weights under one scale: 16 to 256, CHANNEL (0) or TENSOR (-1)
    # full: codes -2^(b-1) .. 2^(b-1)-1; ternary: -1, 0, 1; half: 2-bit codes with the levels
    # -1.5, -0.5, 0.5, 1.5 (code + 1/2).
    levels: str = "full"
    # ggml: the value of largest magnitude, with its sign, gets the lowest code; absmax: the
    # largest magnitude gets the highest level q; absmax_half: it gets q + 1/2 (qwix);
    # mean_abs: scale_factor times the mean magnitude; mse: least squared error of 31 trials.
    scale_rule: str = "absmax"
    scale_factor: float = 1.0  # multiplies the absolute maximum or the mean magnitude
    scale_dtype: str = "float32"  # of the stored scale
    scale_bits: int | None = None  # significant bits of the stored scale; None = all of its dtype
    anchor: bool = False  # keep the extreme code in every block (not implemented)
    round_scale: str = "before"  # codes from the stored scale, or float32's
    rounding: str = "even"  # ties: to even, up (ggml Q4_0), away from zero (ggml Q8_0)

    def __post_init__(self) -> None:
        check_types(self, "grid: ")
        for field, known in (
            ("levels", LEVELS),
            ("scale_rule", SCALE_RULES),
            ("scale_dtype", SCALE_DTYPES),
            ("round_scale", ("before", "after")),
            ("rounding", ROUNDINGS),
        ):
            if getattr(self, field) not in known:
                found = getattr(self, field)
                raise ValueError(f"grid: {field}={found!r} is not one of {', '.join(known)}.")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"grid: bits={self.bits} is not between 2 and 8.")
        if self.levels != "full" and self.bits != 2:
            raise ValueError(f"grid: levels={self.levels!r} needs bits=2, found {self.bits}.")
        if self.levels != "full" and self.scale_rule == "ggml":
            raise ValueError(
                f"grid: scale_rule='ggml' needs the code -2^(bits-1), which levels={self.levels!r} "
                "does not have; use 'absmax', 'mean_abs' or 'mse'."
            )
        _check_block(self.block)
        if not 0 < self.scale_factor < np.inf:
            raise ValueError(f"grid: scale_factor={self.scale_factor} is not a positive number.")
        if self.scale_factor != 1.0 and self.scale_rule in ("ggml", "mse"):
            raise ValueError(f"grid: scale_rule={self.scale_rule!r} takes no scale_factor.")
        if self.scale_bits is not None and not 1 <= self.scale_bits <= 24:
            raise ValueError(f"grid: scale_bits={self.scale_bits} is not between 1 and 24.")
        if self.anchor:
            raise ValueError("grid: anchor=True is not implemented yet; leave it out.")

    @property
    def lowest(self) -> int:
        """Lowest code."""
        return -1 if self.levels == "ternary" else -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """Highest code."""
        return 1 if self.levels == "ternary" else 2 ** (self.bits - 1) - 1

    @property
    def highest_level(self) -> float:
        """The level of the highest code: q of the scale rules."""
        return self.highest + (0.5 if self.levels == "half" else 0.0)

    @property
    def nominal_bits(self) -> float:
        """Information in one code: log2 3 for ternary."""
        return float(np.log2(3)) if self.levels == "ternary" else float(self.bits)

    def num_blocks(self, length: int) -> int:
        """Scales along a contraction axis of `length`.

        Raises:
            ValueError: the block does not divide it.
        """
        if self.block <= 0:
            return 1
        if length % self.block:
            raise ValueError(f"a block of {self.block} does not divide an axis of {length}.")
        return length // self.block

    def scale_shape(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """Shape of the scales of a weight: its own, with the contraction axis divided."""
        scales = list(shape)
        scales[axis] = self.num_blocks(shape[axis])
        if self.block == TENSOR:
            scales[_other(axis)] = 1
        return tuple(scales)

    def describe(self) -> str:
        """A short name for tables, e.g. `int4 block 32 ggml f16`."""
        kind = {"half": "half-integer", "ternary": "ternary"}.get(self.levels, "int")
        name = f"{kind}{self.bits}" if self.levels == "full" else kind
        where = {CHANNEL: "channel", TENSOR: "tensor"}.get(self.block, f"block {self.block}")
        factor = f" x{self.scale_factor:g}" if self.scale_factor != 1.0 else ""
        dtype = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[self.scale_dtype]
        after = " after" if self.round_scale == "after" else ""
        bits = f"/{self.scale_bits}b" if self.scale_bits else ""
        return f"{name} {where} {self.scale_rule}{factor} {dtype}{bits}{after}"


def check_types(owner: Any, where: str) -> None:
    """Compares the fields of a dataclass with their annotations.

    Raises:
        TypeError: a field of another type; the message starts with `where`.
    """
    for field in dataclasses.fields(owner):
        if field.type is Any:
            continue
        found, kinds = getattr(owner, field.name), get_args(field.type) or (field.type,)
        if float in kinds:
            kinds = (*kinds, int)
        # bool is an int to Python; a flag in the place of a number is a mistake.
        if not isinstance(found, kinds) or (isinstance(found, bool) and bool not in kinds):
            expected = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
            raise TypeError(
                f"{where}{field.name}={found!r} is {type(found).__name__}, expected {expected}."
            )


class Codes(NamedTuple):
    """Codes (int8, the weight's shape) and stored scales (see `Grid.scale_shape`)."""

    codes: Array
    scales: Array


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize(w: Float[Array, "..."], grid: Grid, axis: int = -2) -> Codes:
    """Codes and scales of a weight.

    Args:
        w: a matrix `[..., K, N]` or a table `[V, D]`; leading axes are separate matrices.
        grid: the grid.
        axis: the contraction axis, -2 for a matrix and -1 for a table.
    """
    blocks = _blocks(w.astype(jnp.float32), grid, axis)
    scale, stored = _scales(blocks, grid, axis)
    codes = _encode(blocks, scale, grid)
    scales = stored.reshape(grid.scale_shape(w.shape, axis)).astype(grid.scale_dtype)
    return Codes(codes.reshape(w.shape).astype(jnp.int8), scales)


@functools.partial(jax.jit, static_argnums=(2, 3))
def dequantize(
    codes: Int[Array, "..."], scales: Float[Array, "..."], grid: Grid, axis: int = -2
) -> Float[Array, "..."]:
    """The float32 weight that codes and scales stand for."""
    blocks = _blocks(codes.astype(jnp.float32), grid, axis)
    stored = jnp.expand_dims(scales.astype(jnp.float32), codes.ndim + axis + 1)
    return (_level(blocks, grid) * stored).reshape(codes.shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def fake_quantize_array(w: Float[Array, "..."], grid: Grid, axis: int = -2) -> Float[Array, "..."]:
    """`dequantize(quantize(w))` with the gradient of the identity.

    The result is float32 whatever the dtype of `w`, because that is what packed codes decode to: a
    model casts either to its compute dtype when it meets an activation, and there alone.

    The straight-through estimator (Bengio et al., 2013, arXiv 1308.3432) without a clip: the scale
    is a constant of the gradient, and weights beyond the range keep theirs.
    """
    return _nearest(w, grid, axis)


@fake_quantize_array.defjvp
def _straight_through(grid, axis, primals, tangents):
    return fake_quantize_array(primals[0], grid, axis), tangents[0].astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _nearest(w: Array, grid: Grid, axis: int) -> Array:
    blocks = _blocks(w.astype(jnp.float32), grid, axis)
    scale, stored = _scales(blocks, grid, axis)
    value = _level(_encode(blocks, scale, grid), grid) * stored
    return value.reshape(w.shape)


def _blocks(w: Array, grid: Grid, axis: int) -> Array:
    """Splits the contraction axis into blocks and places in them."""
    if axis not in (-1, -2) or w.ndim < 2:
        raise ValueError(
            f"quantize: a weight of shape {w.shape} with contraction axis {axis}; expected rank 2 "
            "or more and axis -2 (matrix) or -1 (table)."
        )
    place = w.ndim + axis
    count = grid.num_blocks(w.shape[place])
    return w.reshape(*w.shape[:place], count, w.shape[place] // count, *w.shape[place + 1 :])


def _reduced_axes(grid: Grid, axis: int) -> tuple[int, ...]:
    """Axes of `_blocks` under one scale."""
    if grid.block == TENSOR:
        return (-3, -2, -1)
    return (axis,)


def _scales(blocks: Array, grid: Grid, axis: int) -> tuple[Array, Array]:
    """The scale codes are chosen with and the stored one, float32, broadcastable to blocks."""
    axes = _reduced_axes(grid, axis)
    if grid.scale_rule == "mse":
        scale, stored = _search(blocks, grid, axes)
    else:
        scale, stored = _stored_pair(_exact_scale(blocks, grid, axes), grid)
    # No rule would keep it otherwise: a comparison with NaN is false, a clip bounds infinity.
    finite = jnp.all(jnp.isfinite(blocks), axis=axes, keepdims=True)
    return scale, jnp.where(finite, stored, jnp.nan)


def _exact_scale(blocks: Array, grid: Grid, axes: tuple[int, ...]) -> Array:
    """The scale of a rule that needs no search, before it is rounded."""
    if grid.scale_rule == "ggml":
        # Division by a power of two: exact.
        return _signed_extreme(blocks, axes) / grid.lowest
    if grid.scale_rule == "mean_abs":
        count = int(np.prod([blocks.shape[a] for a in axes]))
        return _sum(jnp.abs(blocks), axes) * np.float32(grid.scale_factor / count)
    return _absmax(blocks, grid, axes)


def _absmax(blocks: Array, grid: Grid, axes: tuple[int, ...]) -> Array:
    absmax = jnp.max(jnp.abs(blocks), axis=axes, keepdims=True)
    if grid.scale_factor != 1.0:
        absmax = absmax * grid.scale_factor
    # The select keeps XLA from merging the constant before it with the one after it.
    absmax = jnp.where(absmax > 0, absmax, 0.0)
    divisor = grid.highest_level + (0.5 if grid.scale_rule == "absmax_half" else 0.0)
    if grid.scale_rule == "absmax_half" and grid.block != TENSOR:
        # What XLA makes of qwix's division of many scales by one constant, written out.
        return absmax * np.float32(1 / divisor)
    return absmax / jnp.where(absmax > 0, np.float32(divisor), np.float32(1.0))


def _sum(x: Array, axes: tuple[int, ...]) -> Array:
    """Sums by halves, so that no memory layout changes the order and with it a last bit."""
    for a in axes:
        axis = x.ndim + a
        size = 1 << (x.shape[axis] - 1).bit_length()
        x = jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
        while size > 1:
            size //= 2
            first = jax.lax.slice_in_dim(x, 0, size, axis=axis)
            x = first + jax.lax.slice_in_dim(x, size, 2 * size, axis=axis)
    return x


def _signed_extreme(blocks: Array, axes: tuple[int, ...]) -> Array:
    """The element of largest magnitude with its sign; of several, the first."""
    magnitude = jnp.abs(blocks)
    absmax = jnp.max(magnitude, axis=axes, keepdims=True)
    length = int(np.prod([blocks.shape[a] for a in axes]))
    # Earlier places score higher; the lowest bit carries the sign.
    score = 2 * (length - _places(blocks, axes)) + (blocks >= 0)
    first = jnp.max(jnp.where(magnitude == absmax, score, 0), axis=axes, keepdims=True)
    return jnp.where(first % 2 == 1, absmax, -absmax)


def _places(blocks: Array, axes: tuple[int, ...]) -> Array:
    """Row-major number of each element within its block."""
    place = jnp.zeros(blocks.shape, jnp.int32)
    for a in axes:
        place = place * blocks.shape[a] + jax.lax.broadcasted_iota(
            jnp.int32, blocks.shape, blocks.ndim + a
        )
    return place


def _search(blocks: Array, grid: Grid, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The fraction of the absolute maximum with the least squared error, block by block."""
    absmax = _absmax(blocks, grid, axes)

    def trial(i, best):
        scale, stored = _stored_pair(absmax * jnp.asarray(_SEARCH)[i], grid)
        error = blocks - _level(_encode(blocks, scale, grid), grid) * stored
        error = jnp.sum(jnp.square(error), axis=axes, keepdims=True)
        better = error < best[0]
        return tuple(
            jnp.where(better, new, old)
            for new, old in zip((error, scale, stored), best, strict=True)
        )

    worst = (jnp.full_like(absmax, jnp.inf), absmax, absmax)
    _, scale, stored = jax.lax.fori_loop(0, len(_SEARCH), trial, worst)
    return scale, stored


def _stored_pair(scale: Array, grid: Grid) -> tuple[Array, Array]:
    """The scale to encode with and the one to store, zero blocks made harmless."""
    if grid.round_scale == "after":
        return scale, _round_scale(scale, grid)
    # No level of the half-integer grid is zero, so there a zero block needs a zero scale.
    zero = 0.0 if grid.levels == "half" else 1.0
    limit = float(jnp.finfo(grid.scale_dtype).max)
    stored = _round_scale(jnp.clip(scale, -limit, limit), grid)
    stored = jnp.where((jnp.abs(scale) < _TINY) | (stored == 0), zero, stored)
    return stored, stored


def _round_scale(scale: Array, grid: Grid) -> Array:
    """Rounds to the stored dtype and its significant bits, in float32 arithmetic.

    Not by a cast there and back, which XLA may remove as excess precision. A scale that the dtype
    can hold stays finite; one beyond the dtype becomes infinite, as in ggml.
    """
    info = jnp.finfo(grid.scale_dtype)
    mantissa = info.nmant
    if grid.scale_bits is not None:
        mantissa = min(mantissa, grid.scale_bits - 1)
    rounded = jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=mantissa)
    largest = np.float32((2 - 2.0**-mantissa) * 2.0 ** (info.maxexp - 1))
    bounded = jnp.clip(rounded, -largest, largest)
    rounded = jnp.where(jnp.abs(scale) <= np.float32(info.max), bounded, rounded)
    if grid.scale_dtype != "float16":
        return rounded
    subnormal = jnp.round(scale * np.float32(2**24)) * np.float32(2**-24)
    rounded = jnp.where(jnp.abs(scale) < np.float32(2**-14), subnormal, rounded)
    return jnp.where(jnp.abs(rounded) > 65504, jnp.sign(rounded) * jnp.inf, rounded)


def _encode(blocks: Array, scale: Array, grid: Grid) -> Array:
    """Integer codes, as float32."""
    inverse = jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))
    # One beyond the range on either side: far enough to change no code, and a barrier between
    # the product and the sums below.
    scaled = jnp.clip(blocks * inverse, grid.lowest - 1, grid.highest + 1)
    if grid.levels == "half":
        codes = jnp.floor(scaled)
    elif grid.rounding == "even":
        codes = jnp.round(scaled)
    elif grid.rounding == "up":
        # ggml: truncate(x + 8.5) of a number that is not negative, minus 8.
        codes = jnp.floor(scaled + (0.5 - grid.lowest)) + grid.lowest
    else:
        size = jnp.abs(scaled)
        whole = jnp.floor(size)
        codes = jnp.sign(scaled) * (whole + (size - whole >= 0.5))
    return jnp.clip(codes, grid.lowest, grid.highest)


def _level(codes: Array, grid: Grid) -> Array:
    return codes + 0.5 if grid.levels == "half" else codes


def _other(axis: int) -> int:
    """The matrix axis that is not contracted."""
    return -3 - axis


def _check_block(block: int) -> None:
    if block in (CHANNEL, TENSOR):
        return
    if not SMALLEST_BLOCK <= block <= LARGEST_BLOCK or block % SMALLEST_BLOCK:
        raise ValueError(
            f"grid: block={block} is not a multiple of {SMALLEST_BLOCK} between {SMALLEST_BLOCK} "
            f"and {LARGEST_BLOCK}; 0 means one scale per channel, -1 one per tensor."
        )
