"""The arithmetic of quantizers, in an order spelled out so that every program gives the same bits.

Eager, jitted and differentiated programs differ in what XLA fuses, so:

- codes come from multiplication by the reciprocal of the scale. XLA makes that of a division by a
  broadcast scale anyway (so qwix's codes come out so), and ggml's quantizers are written so;
- between a product and a sum stands a clip, or LLVM would contract the two into one rounding;
- sums of floats are written out as trees.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gemmaqat.quantization.grid import Grid

# Blocks whose scale is smaller count as zero: qwix's threshold, the root of the least normal
# float32, below which the reciprocal of a product would leave the range.
TINY = float(np.sqrt(np.finfo(np.float32).tiny))
HUGE = float(np.finfo(np.float32).max)
# Blocks of more places are added up by halves, shorter ones place by place, in one fused pass.
_UNROLLED = 64


def encode(blocks: Array, scale: Array, grid: Grid) -> Array:
    """Integer codes, as float32."""
    return _codes(blocks, _reciprocal(scale), grid)


def _reciprocal(scale: Array) -> Array:
    return jnp.where(scale == 0, 0.0, 1.0 / jnp.where(scale == 0, 1.0, scale))


def _codes(blocks: Array, inverse: Array, grid: Grid) -> Array:
    scaled = blocks * inverse
    if grid.levels != "half" and grid.rounding == "even":
        return jnp.clip(jnp.round(scaled), grid.lowest, grid.highest)
    # One beyond the range on either side: far enough to change no code, and a barrier between
    # the product and the sums below.
    scaled = jnp.clip(scaled, grid.lowest - 1, grid.highest + 1)
    if grid.levels == "half":
        codes = jnp.floor(scaled)
    elif grid.rounding == "up":
        # ggml: truncate(x + 8.5) of a number that is not negative, minus 8.
        codes = jnp.floor(scaled + (0.5 - grid.lowest)) + grid.lowest
    else:
        size = jnp.abs(scaled)
        whole = jnp.floor(size)
        codes = jnp.sign(scaled) * (whole + (size - whole >= 0.5))
    return jnp.clip(codes, grid.lowest, grid.highest)


def level(codes: Array, grid: Grid) -> Array:
    """The levels of codes, as float32."""
    return codes + 0.5 if grid.levels == "half" else codes


def round_scale(scale: Array, grid: Grid) -> Array:
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


def squared_error(blocks: Array, scale: Array, grid: Grid, axes: tuple[int, ...]) -> Array:
    """Squared error of each block under a scale, bounded to the finite."""
    inverse = _reciprocal(scale)

    def error(part: Array) -> Array:
        value = level(_codes(part, inverse, grid), grid) * scale
        if grid.stored_scale_bits > grid.exact_scale_bits("float32"):  # an exact product is safe
            value = jnp.clip(value, -HUGE, HUGE)
        return jnp.minimum(jnp.square(part - value), HUGE)

    if len(axes) > 1 or blocks.shape[axes[0]] > _UNROLLED:
        return jnp.minimum(total(error(blocks), axes), HUGE)
    result = jnp.zeros_like(scale)
    for place in range(blocks.shape[axes[0]]):
        part = jax.lax.slice_in_dim(blocks, place, place + 1, axis=axes[0] + blocks.ndim)
        result = result + error(part)
    return jnp.minimum(result, HUGE)


def total(x: Array, axes: tuple[int, ...]) -> Array:
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
