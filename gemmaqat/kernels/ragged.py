"""Grouped ("ragged") matrix product: consecutive groups of rows, one matrix per group.

On CPU `jax.lax.ragged_dot` multiplies every row by every group's matrix, so here the rows are cut
into tiles that belong to one group each and a scan multiplies tile by tile. The number of tiles
depends on shapes alone: `M / tile` full ones plus at most one partly filled tile per group.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_MAX_TILE = 128


def ragged_matmul(
    x: Float[Array, "M K"], w: Float[Array, "E K N"], group_sizes: Int[Array, " E"]
) -> Float[Array, "M N"]:
    """Multiplies each group of consecutive rows of `x` by its own matrix of `w`.

    Args:
        x: rows, sorted by group.
        w: one matrix per group.
        group_sizes: rows in each group; they sum to M.
    """
    return jax.lax.platform_dependent(
        x, w, group_sizes, cpu=_tiled_matmul, default=jax.lax.ragged_dot
    )


def tile_rows(num_rows: int, num_groups: int) -> int:
    """Rows per tile: near the mean group, a power of two between 1 and 128."""
    mean = max(1, num_rows // num_groups)
    return min(_MAX_TILE, 1 << (mean - 1).bit_length())


def row_tiles(
    group_sizes: Int[Array, " E"], num_rows: int, tile: int
) -> tuple[Int[Array, " C"], Int[Array, "C tile"]]:
    """The schedule: which group each tile belongs to and which rows it holds.

    Args:
        group_sizes: rows in each group.
        num_rows: M, their static sum.
        tile: rows per tile.

    Returns:
        groups: group of each tile; tiles left over repeat the last group.
        rows: row numbers of each tile; unfilled places hold M, one past the end.
    """
    num_groups = group_sizes.shape[0]
    num_tiles = min(num_rows // tile + num_groups, num_rows)
    tiles = -(-group_sizes // tile)
    ends = jnp.cumsum(tiles)
    index = jnp.arange(num_tiles)
    groups = jnp.minimum(jnp.searchsorted(ends, index, side="right"), num_groups - 1)
    row_ends = jnp.cumsum(group_sizes)
    within = (index - (ends - tiles)[groups]) * tile
    first = (row_ends - group_sizes)[groups] + within
    rows = first[:, None] + jnp.arange(tile)[None, :]
    filled = (rows < row_ends[groups][:, None]) & (index < ends[-1])[:, None]
    return groups, jnp.where(filled, rows, num_rows)


@jax.custom_vjp
def _tiled_matmul(x: Array, w: Array, group_sizes: Array) -> Array:
    return _scan_tiles(x, w, group_sizes, w.shape[-1], lambda rows, matrix: rows @ matrix)


def _forward(x: Array, w: Array, group_sizes: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _tiled_matmul(x, w, group_sizes), (x, w, group_sizes)


def _backward(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, Array, None]:
    x, w, group_sizes = saved
    dx = _scan_tiles(g, w, group_sizes, w.shape[-2], lambda rows, matrix: rows @ matrix.T)
    return dx, _weight_gradient(x, g, w, group_sizes), None


_tiled_matmul.defvjp(_forward, _backward)


def _scan_tiles(x: Array, w: Array, group_sizes: Array, width: int, product) -> Array:
    """Applies `product(rows, matrix of their group)` to every tile of rows."""
    num_rows = x.shape[0]
    groups, rows = row_tiles(group_sizes, num_rows, tile_rows(num_rows, w.shape[0]))

    def one_tile(out: Array, schedule: tuple[Array, Array]) -> tuple[Array, None]:
        group, index = schedule
        tile = x.at[index].get(mode="fill", fill_value=0)
        matrix = jax.lax.dynamic_index_in_dim(w, group, keepdims=False)
        return out.at[index].set(product(tile, matrix), mode="drop", unique_indices=False), None

    start = jnp.zeros((num_rows, width), x.dtype)
    return jax.lax.scan(one_tile, start, (groups, rows))[0]


def _weight_gradient(x: Array, g: Array, w: Array, group_sizes: Array) -> Array:
    """Sum over each group's rows of the outer products of `x` and `g`: [E, K, N]."""
    groups, rows = row_tiles(group_sizes, x.shape[0], tile_rows(x.shape[0], w.shape[0]))

    def one_tile(total: Array, schedule: tuple[Array, Array]) -> tuple[Array, None]:
        group, index = schedule
        gather = functools.partial(jnp.take, indices=index, axis=0, mode="fill", fill_value=0)
        return total.at[group].add(gather(x).T @ gather(g)), None

    return jax.lax.scan(one_tile, jnp.zeros_like(w), (groups, rows))[0]
