"""Scale rules: from the float32 values of a block to the scale its codes are chosen with.

Divisions that must round once have a divisor XLA cannot fold into a constant reciprocal. A NaN or
an infinity makes the scale of its block NaN, and so every value under that scale.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gemmaqat.quantization.grid import TENSOR, Grid
from gemmaqat.quantization.rounding import TINY, encode, level, round_scale, total
from gemmaqat.quantization.trials import anchored, superblock

# Trial fractions of the absolute maximum for the searched scale.
_SEARCH = np.linspace(0.25, 1.0, 31, dtype=np.float32)


def block_scales(blocks: Array, grid: Grid, axis: int) -> tuple[Array, Array]:
    """The scale codes are chosen with and the stored one, float32, broadcastable to blocks."""
    axes = _reduced_axes(grid, axis)
    if grid.anchor:
        scale = stored = anchored(blocks, grid, axes)
    elif grid.scale_rule == "q6_k":
        scale = stored = superblock(blocks, grid, axis)
    elif grid.scale_rule == "mse":
        scale, stored = _search(blocks, grid, axes)
    else:
        scale, stored = _stored_pair(_exact_scale(blocks, grid, axes), grid)
    # No rule would keep it otherwise: a comparison with NaN is false, a clip bounds infinity.
    finite = jnp.all(jnp.isfinite(blocks), axis=axes, keepdims=True)
    return scale, jnp.where(finite, stored, jnp.nan)


def _reduced_axes(grid: Grid, axis: int) -> tuple[int, ...]:
    """Axes of `_blocks` under one scale."""
    if grid.block == TENSOR:
        return (-3, -2, -1)
    return (axis,)


def _exact_scale(blocks: Array, grid: Grid, axes: tuple[int, ...]) -> Array:
    """The scale of a rule that needs no search, before it is rounded."""
    if grid.scale_rule == "ggml":
        # Division by a power of two: exact.
        return _signed_extreme(blocks, axes) / grid.lowest
    if grid.scale_rule == "mean_abs":
        count = int(np.prod([blocks.shape[a] for a in axes]))
        return total(jnp.abs(blocks), axes) * np.float32(grid.scale_factor / count)
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
        error = blocks - level(encode(blocks, scale, grid), grid) * stored
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
        return scale, round_scale(scale, grid)
    # No level of the half-integer grid is zero, so there a zero block needs a zero scale.
    zero = 0.0 if grid.levels == "half" else 1.0
    limit = float(jnp.finfo(grid.scale_dtype).max)
    stored = round_scale(jnp.clip(scale, -limit, limit), grid)
    stored = jnp.where((jnp.abs(scale) < TINY) | (stored == 0), zero, stored)
    return stored, stored
