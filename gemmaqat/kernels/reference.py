"""Packed products the obvious way: the whole float matrix, then one dot. The plain reference."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gemmaqat.kernels import layout as layouts
from gemmaqat.kernels.layout import Layout
from gemmaqat.kernels.ragged import ragged_matmul as float_ragged_matmul


@functools.partial(jax.jit, static_argnums=2)
def dequantize(
    words: UInt32[Array, "... A B"], scales: Float[Array, "... C D"], layout: Layout
) -> Float[Array, "... K N"]:
    """The float32 matrix `[..., K, N]`."""
    values = layouts.values(layouts.unpack_codes(words, layout), layout)
    scales = (scales if layout.order == "contract" else scales.mT).astype(jnp.float32)
    blocks = values.reshape(*values.shape[:-2], layout.num_blocks, -1, values.shape[-1])
    return (blocks * scales[..., :, None, :]).reshape(values.shape)


def matmul(
    x: Float[Array, "M K"],
    words: UInt32[Array, "A B"],
    scales: Float[Array, "C D"],
    layout: Layout,
) -> Float[Array, "M N"]:
    """`x` times the dequantized matrix, accumulated in float32, in the dtype of `x`."""
    matrix = dequantize(words, scales, layout).astype(x.dtype)
    return jnp.dot(x, matrix, preferred_element_type=jnp.float32).astype(x.dtype)


def matmul_transposed(
    x: Float[Array, "M N"],
    words: UInt32[Array, "A B"],
    scales: Float[Array, "C D"],
    layout: Layout,
) -> Float[Array, "M K"]:
    """`x` times the transpose of the dequantized matrix."""
    matrix = dequantize(words, scales, layout).astype(x.dtype)
    return jnp.dot(x, matrix.T, preferred_element_type=jnp.float32).astype(x.dtype)


def gather(
    ids: Int[Array, "..."],
    words: UInt32[Array, "A B"],
    scales: Float[Array, "C D"],
    layout: Layout,
) -> Float[Array, "... K"]:
    """Columns `ids` of the dequantized matrix (rows of the table it was packed from), clipped."""
    return jnp.take(dequantize(words, scales, layout).T, ids, axis=0, mode="clip")


def ragged_matmul(
    x: Float[Array, "M K"],
    words: UInt32[Array, "E A B"],
    scales: Float[Array, "E C D"],
    group_sizes: Int[Array, " E"],
    layout: Layout,
) -> Float[Array, "M N"]:
    """Groups of consecutive rows of `x`, each times its own dequantized matrix."""
    matrices = dequantize(words, scales, layout).astype(x.dtype)
    return float_ragged_matmul(x, jax.lax.stop_gradient(matrices), group_sizes)
