"""From a float weight to codes and scales, and back: `value = level(code) * scale`.

The scale is shared by a block of the contraction axis, a channel or a matrix. Codes and scales are
computed from float32, to the same bits in eager, jitted and differentiated programs.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gemmaqat.quantization.grid import CHANNEL as CHANNEL
from gemmaqat.quantization.grid import TENSOR as TENSOR
from gemmaqat.quantization.grid import Grid as Grid
from gemmaqat.quantization.rounding import encode, level
from gemmaqat.quantization.scales import block_scales


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
    scale, stored = block_scales(blocks, grid, axis)
    codes = encode(blocks, scale, grid)
    scales = stored.reshape(grid.scale_shape(w.shape, axis)).astype(grid.scale_dtype)
    return Codes(codes.reshape(w.shape).astype(jnp.int8), scales)


@functools.partial(jax.jit, static_argnums=(2, 3))
def dequantize(
    codes: Int[Array, "..."], scales: Float[Array, "..."], grid: Grid, axis: int = -2
) -> Float[Array, "..."]:
    """The float32 weight that codes and scales stand for."""
    blocks = _blocks(codes.astype(jnp.float32), grid, axis)
    stored = jnp.expand_dims(scales.astype(jnp.float32), codes.ndim + axis + 1)
    return (level(blocks, grid) * stored).reshape(codes.shape)


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
    scale, stored = block_scales(blocks, grid, axis)
    value = level(encode(blocks, scale, grid), grid) * stored
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
