"""Packed products in plain XLA: decode a cache-sized tile, multiply it, go on to the next.

Written as one expression, XLA decodes the whole float matrix into memory first, which costs about
ten times as much as the product itself; a loop over tiles with a barrier between decoding and
multiplying does not. Temporary memory is one tile, at most about 4 MiB. Products are
differentiable in `x`; words and scales get no gradient.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gemmaqat.kernels import layout as layouts
from gemmaqat.kernels.layout import Layout
from gemmaqat.kernels.ragged import row_tiles, tile_rows

_TILE_ELEMENTS = 2**20  # decoded floats alive at once: 4 MiB
_FEW_ROWS = 8  # up to here a tile spans many columns and few rows, beyond the reverse
_TALL, _WIDE = 64, 2**14  # tile of the few-rows case


def matmul(
    x: Float[Array, "M K"],
    words: UInt32[Array, "A B"],
    scales: Float[Array, "C D"],
    layout: Layout,
) -> Float[Array, "M N"]:
    """`x` times the dequantized matrix, accumulated in float32, in the dtype of `x`."""
    return _differentiable_product(x, words, scales, layout, False)


def matmul_transposed(
    x: Float[Array, "M N"],
    words: UInt32[Array, "A B"],
    scales: Float[Array, "C D"],
    layout: Layout,
) -> Float[Array, "M K"]:
    """`x` times the transpose of the dequantized matrix."""
    return _differentiable_product(x, words, scales, layout, True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _differentiable_product(x, words, scales, layout: Layout, transposed: bool) -> Array:
    return _product(x, words, scales, layout, transposed=transposed)


def _forward(x, words, scales, layout, transposed):
    return _product(x, words, scales, layout, transposed=transposed), (words, scales)


def _backward(layout, transposed, saved, g):
    return _product(g, *saved, layout, transposed=not transposed), None, None


_differentiable_product.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnums=3)
def gather(
    ids: Int[Array, "..."],
    words: UInt32[Array, "A B"],
    scales: Float[Array, "C D"],
    layout: Layout,
) -> Float[Array, "... K"]:
    """Columns `ids` of the dequantized matrix (rows of the table it was packed from), clipped."""
    axis = 1 if layout.order == "contract" else 0
    flat = ids.reshape(-1)
    words = jnp.take(words, flat, axis=axis, mode="clip")
    if scales.shape[axis] > 1:
        scales = jnp.take(scales, flat, axis=axis, mode="clip")
    matrix = _decode_tile(words, scales, layout, layout.rows)
    return matrix.T.reshape(*ids.shape, layout.rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ragged_matmul(
    x: Float[Array, "M K"],
    words: UInt32[Array, "E A B"],
    scales: Float[Array, "E C D"],
    group_sizes: Int[Array, " E"],
    layout: Layout,
) -> Float[Array, "M N"]:
    """Groups of consecutive rows of `x`, each times its own dequantized matrix.

    Only the words of groups that have rows are read.
    """
    return _ragged_product(x, words, scales, group_sizes, layout, transposed=False)


def _ragged_forward(x, words, scales, group_sizes, layout):
    out = ragged_matmul(x, words, scales, group_sizes, layout)
    return out, (words, scales, group_sizes)


def _ragged_backward(layout, saved, g):
    words, scales, group_sizes = saved
    dx = _ragged_product(g, words, scales, group_sizes, layout, transposed=True)
    return dx, None, None, None


ragged_matmul.defvjp(_ragged_forward, _ragged_backward)


@functools.partial(jax.jit, static_argnames=("layout", "transposed"))
def _ragged_product(x, words, scales, group_sizes, layout: Layout, *, transposed: bool) -> Array:
    """Tile after tile of rows, each times the matrix of its group."""
    num_rows = x.shape[0]
    groups, rows = row_tiles(group_sizes, num_rows, tile_rows(num_rows, words.shape[0]))
    width = layout.rows if transposed else _num_columns(words, layout)

    def one_tile(out, schedule):
        group, index = schedule
        tile = x.at[index].get(mode="fill", fill_value=0)
        group_words = jax.lax.dynamic_index_in_dim(words, group, keepdims=False)
        group_scales = jax.lax.dynamic_index_in_dim(scales, group, keepdims=False)
        product = _product(tile, group_words, group_scales, layout, transposed=transposed)
        return out.at[index].set(product, mode="drop"), None

    return jax.lax.scan(one_tile, jnp.zeros((num_rows, width), x.dtype), (groups, rows))[0]


@functools.partial(jax.jit, static_argnames=("layout", "transposed"))
def _product(x, words, scales, layout: Layout, *, transposed: bool) -> Array:
    """`x @ W` or `x @ W.T`: a loop over tiles of the output, inside it one over the contraction."""
    num_columns = _num_columns(words, layout)
    k_tile, n_tile = _tile_shape(x.shape[0], num_columns, layout, transposed=transposed)
    if transposed:
        inner, outer = (num_columns, n_tile), (layout.rows, k_tile)
    else:
        inner, outer = (layout.rows, k_tile), (num_columns, n_tile)

    def one_tile(outer_start, outer_size, inner_start, inner_size) -> Array:
        k, n = (inner_start, inner_size), (outer_start, outer_size)
        if transposed:
            k, n = n, k
        tile_words, tile_scales = _slice(words, scales, layout, k, n)
        matrix = _decode_tile(tile_words, tile_scales, layout, k[1]).astype(x.dtype)
        matrix = jax.lax.optimization_barrier(matrix)
        rows = jax.lax.dynamic_slice_in_dim(x, inner_start, inner_size, axis=1)
        contraction = (((1,), (1 if transposed else 0,)), ((), ()))
        return jax.lax.dot_general(rows, matrix, contraction, preferred_element_type=jnp.float32)

    def output_columns(out: Array, start, size: int) -> Array:
        total = _loop(
            *inner,
            lambda total, inner_start, inner_size: (
                total + one_tile(start, size, inner_start, inner_size)
            ),
            jnp.zeros((x.shape[0], size), jnp.float32),
        )
        return jax.lax.dynamic_update_slice_in_dim(out, total.astype(x.dtype), start, axis=1)

    return _loop(*outer, output_columns, jnp.zeros((x.shape[0], outer[0]), x.dtype))


def _loop(size: int, tile: int, body: Callable[[Array, Array | int, int], Array], state: Array):
    """Folds `body(state, start, size)` over tiles of an axis; the last tile may be smaller."""
    full = size // tile
    if full == 1:
        state = body(state, 0, tile)
    elif full:
        state = jax.lax.fori_loop(0, full, lambda i, state: body(state, i * tile, tile), state)
    if size % tile:
        state = body(state, full * tile, size % tile)
    return state


def _tile_shape(num_rows: int, num_columns: int, layout: Layout, *, transposed: bool):
    """Rows and columns of a decoded tile: aligned along K and within the budget."""
    if num_rows <= _FEW_ROWS or transposed:
        n_tile = min(num_columns, _WIDE)
        wanted = _TALL if num_rows <= _FEW_ROWS and not transposed else _TILE_ELEMENTS // n_tile
        k_tile = max(layout.unit, wanted // layout.unit * layout.unit)
        return min(k_tile, layout.rows), n_tile
    return layout.rows, min(num_columns, max(32, _TILE_ELEMENTS // layout.rows))


def _slice(words, scales, layout: Layout, k, n):
    """The words and scales of a tile; `k` and `n` are (start, size) of the logical matrix."""
    per_word = layout.codes_per_word
    word_slice = (k[0] // per_word, -(-k[1] // per_word))
    scale_slice = (k[0] // layout.block, k[1] // layout.block) if layout.block else (0, 1)
    column_slice = n if _scale_columns(scales, layout) > 1 else (0, 1)
    return (
        _slice_both(words, word_slice, n, layout),
        _slice_both(scales, scale_slice, column_slice, layout),
    )


def _slice_both(array, along_k, along_n, layout: Layout):
    first, second = (along_k, along_n) if layout.order == "contract" else (along_n, along_k)
    return jax.lax.dynamic_slice(array, (first[0], second[0]), (first[1], second[1]))


def _decode_tile(words, scales, layout: Layout, num_rows: int) -> Array:
    """The float32 values `[num_rows, N]` of whole words and their scales."""
    if layout.order == "rows":
        words, scales = words.T, scales.T
    values = layouts.values(layouts.decode(words, layout)[:num_rows], layout)
    blocks = values.reshape(scales.shape[0], -1, values.shape[-1])
    return (blocks * scales.astype(jnp.float32)[:, None, :]).reshape(values.shape)


def _num_columns(words, layout: Layout) -> int:
    return words.shape[-1] if layout.order == "contract" else words.shape[-2]


def _scale_columns(scales, layout: Layout) -> int:
    return scales.shape[-1] if layout.order == "contract" else scales.shape[-2]
