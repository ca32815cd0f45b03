"""Scales chosen among those that can be stored, by the squared error of their block."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array

from gemmaqat.quantization.grid import LARGEST_BLOCK, SUPERBLOCK, Grid
from gemmaqat.quantization.rounding import TINY, encode, squared_error

# Trial places around the nearest, which comes first and so wins a tie.
_ANCHORED = np.array([0, -1, 1, -2, 2], np.int32)
_SUPERBLOCK = np.array([0, -1, 1, -2, 2, -3, 3, -4, 4], np.int32)
# Blocks of a row that are searched side by side, the width of a vector register or two.
_LANES = 16


def anchored(blocks: Array, grid: Grid, axes: tuple[int, ...]) -> Array:
    """The best of five scales under which the extreme of each block gets the lowest code.

    There is one unless the block counts as zero: any stored scale between zero and the exact one
    takes the extreme to the lowest code or beyond, where the clip brings it back, and the largest
    such is among the five. Of two extremes alike but for the sign the negative one is held.
    """
    if axes == (-1,) and blocks.shape[-1] <= LARGEST_BLOCK:
        places = places_first(blocks)
        return anchored(places, grid, (-2,)).reshape(*blocks.shape[:-1], 1)
    extreme = _extreme(blocks, axes)
    exact = jnp.abs(extreme) / -grid.lowest  # a power of two
    sign = jnp.where(extreme > 0, -1.0, 1.0)

    def candidate(offset: Array) -> tuple[Array, Array]:
        scale = _near(exact, offset, grid) * sign
        return scale, encode(extreme, scale, grid) == grid.lowest

    scale = _best(candidate, _ANCHORED, blocks, grid, axes)
    return jnp.where(exact < TINY, 0.0, scale)


def superblock(blocks: Array, grid: Grid, axis: int) -> Array:
    """Q6_K's scales: of each superblock a float16 `d`, of each block the best of nine int8.

    `d` gives the block of the largest magnitude the sub-scale -128, as ggml does. There the
    sub-scales are rounded from a search that weights large values; here each is chosen by the
    squared error of the codes that it will decode.
    """
    place = blocks.ndim + axis
    extreme = jnp.squeeze(_extreme(blocks, (axis,)), place)
    shape = extreme.shape
    grouped = (*shape[: place - 1], -1, SUPERBLOCK // grid.block, *shape[place:])
    exact = extreme.reshape(grouped) / grid.lowest
    d = _half_up(_extreme(exact, (place - len(grouped),)) / -128)
    d = jnp.broadcast_to(d, exact.shape)
    nearest = jnp.round(exact / jnp.where(d == 0, 1.0, d))
    d, nearest = (jnp.expand_dims(a.reshape(shape), place) for a in (d, nearest))
    if axis == -1:
        blocks, one = places_first(blocks), blocks.shape[:-1]
        lanes = (len(blocks), 1, blocks.shape[-1])
        d, nearest = d.reshape(lanes), nearest.reshape(lanes)

    def candidate(offset: Array) -> tuple[Array, Array]:
        sub = jnp.clip(nearest + offset, -128, 127)
        return sub * d, jnp.isfinite(d)

    scale = _best(candidate, _SUPERBLOCK, blocks, grid, (-2,))
    # One value that is not finite spoils all the blocks that share its `d`.
    scale = jnp.where(jnp.isfinite(d), scale, jnp.nan)
    return scale.reshape(*one, 1) if axis == -1 else scale


def places_first(blocks: Array) -> Array:
    """`[..., P]` as groups `[G, P, lanes]`, so that neighbours in memory are worked on at once."""
    lanes = math.gcd(math.prod(blocks.shape[:-1]), _LANES)
    groups = blocks.reshape(-1, lanes, blocks.shape[-1]).transpose(0, 2, 1)
    return with_layout_constraint(groups, Layout((0, 1, 2)))


def _best(
    candidate: Callable[[Array], tuple[Array, Array]],
    offsets: np.ndarray,
    blocks: Array,
    grid: Grid,
    axes: tuple[int, ...],
) -> Array:
    """The eligible candidate of least error, block by block; zero where none is eligible."""
    start = candidate(jnp.int32(0))[0]

    def trial(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scale, eligible = candidate(jnp.asarray(offsets)[i])
        error = squared_error(blocks, scale, grid, axes)
        better = eligible & (error < best[0])
        return jnp.where(better, error, best[0]), jnp.where(better, scale, best[1])

    # A loop and no list of trials: what a loop gives is computed once, where XLA would repeat the
    # search for every code of the block.
    worst = (jnp.full_like(start, jnp.inf), jnp.zeros_like(start))
    return jax.lax.fori_loop(0, len(offsets), trial, worst)[1]


def _extreme(blocks: Array, axes: tuple[int, ...]) -> Array:
    """The element of largest magnitude with its sign; of two alike the negative one."""
    high = jnp.max(blocks, axis=axes, keepdims=True)
    low = jnp.min(blocks, axis=axes, keepdims=True)
    return jnp.where(high > -low, high, low)


def _near(exact: Array, offset: Array, grid: Grid) -> Array:
    """The stored scale `offset` places above the nearest to a positive one."""
    # Numbers of p bits are every 2^(24-p)-th bit pattern, from one binade to the next.
    bits = grid.stored_scale_bits
    shift = 24 - bits
    pattern = jax.lax.bitcast_convert_type(exact, jnp.int32)
    place = jnp.maximum(((pattern + ((1 << shift) >> 1)) >> shift) + offset, 0)
    scale = jax.lax.bitcast_convert_type(place << shift, jnp.float32)
    # Above 2^126 reciprocals would be subnormal, and taken for zero.
    largest = min(
        2.0**126, (2 - 2.0 ** (1 - bits)) * 2.0 ** (jnp.finfo(grid.scale_dtype).maxexp - 1)
    )
    scale = jnp.minimum(scale, np.float32(largest))
    if grid.scale_dtype == "float16":
        # Down, never up: one of the five is then below the exact scale, or nothing is.
        subnormal = jnp.floor(scale * np.float32(2**24)) * np.float32(2**-24)
        scale = jnp.where(scale < np.float32(2**-14), subnormal, scale)
    return scale


def _half_up(d: Array) -> Array:
    """Rounds to float16; subnormals away from zero, so that 128 of them reach the extreme."""
    size = jnp.minimum(jnp.abs(d), np.float32(65504))
    normal = jax.lax.reduce_precision(size, exponent_bits=8, mantissa_bits=10)
    subnormal = jnp.ceil(size * np.float32(2**24)) * np.float32(2**-24)
    half = jnp.where(size < np.float32(2**-14), subnormal, normal)
    return jnp.where(jnp.isfinite(d), jnp.sign(d) * half, jnp.nan)
