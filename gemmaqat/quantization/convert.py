"""From float parameters to packed ones and back: the same tree, the same table."""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gemmaqat.packed import PackedTensor, pack
from gemmaqat.quantization import trees
from gemmaqat.quantization.fake import matching_entries
from gemmaqat.quantization.grids import Codes, Grid, quantize
from gemmaqat.quantization.table import Entry, Table
from gemmaqat.typing import Params

Model = TypeVar("Model", bound=nnx.Module)


def convert(model: Model, table: Table, *, codes: Mapping[str, Codes] | None = None) -> Model:
    """A new model of the same graph whose quantized parameters hold `PackedTensor`s.

    Args:
        model: a float model that meets its weights by `contract`, `take` and `ragged_contract`.
        table: resolved for this model.
        codes: by path, codes and scales that a method found; the others are rounded to nearest.
    """
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, convert_params(params, table, codes=codes), *rest)


def convert_params(
    params: Params, table: Table, *, codes: Mapping[str, Codes] | None = None
) -> Params:
    """The same tree with quantized arrays packed; arguments as in `convert`.

    Raises:
        ValueError: the tree, the table and the codes do not fit each other, or a weight to be
            quantized holds NaN or infinity.
    """
    entries, codes = matching_entries(params, table), codes or {}
    for path in codes:
        if path not in entries or entries[path].grid is None:
            raise ValueError(f"codes for {path}: the table does not quantize it.")

    def one(path: str, value: Any) -> Any:
        entry = entries.get(path)
        if entry is None or entry.grid is None:
            return value
        if path in codes:
            packed = pack_entry(codes[path], entry)
        else:
            packed = _quantize_and_pack(value, entry.grid, entry.axis, entry.order)
        _check_finite(path, packed.scales, entry.grid)
        return packed

    return trees.map_weights(one, params)


def pack_entry(codes: Codes, entry: Entry) -> PackedTensor:
    """Packs the codes and scales of one entry of a table.

    Raises:
        ValueError: their shapes are not those of the entry.
    """
    assert entry.grid is not None
    expected = (entry.shape, entry.grid.scale_shape(entry.shape, entry.axis))
    found = (tuple(codes.codes.shape), tuple(codes.scales.shape))
    if found != expected:
        raise ValueError(
            f"codes for {entry.path}: codes and scales of shapes {found[0]} and {found[1]}, "
            f"expected {expected[0]} and {expected[1]}."
        )
    return _pack(codes, entry.grid, entry.axis, entry.order)


def is_packed(params: Params) -> bool:
    """Whether any parameter is held as codes."""
    return any(isinstance(leaf, PackedTensor) for leaf, _ in trees.weights(params).values())


def dequantize_params(params: Params, dtype: Any = jnp.float32) -> Params:
    """The float tree that a packed one stands for; other leaves are returned untouched."""

    def one(path: str, value: Any) -> Any:
        return _dequantize(value, dtype) if isinstance(value, PackedTensor) else value

    return trees.map_weights(one, params)


def _check_finite(path: str, scales: jax.Array, grid: Grid) -> None:
    """A weight that is not finite shows in its scales, which are few."""
    if isinstance(scales, jax.core.Tracer):  # its values are not known yet
        return
    wrong = int(jnp.sum(~jnp.isfinite(scales)))
    if wrong:
        raise ValueError(
            f"{path}: {wrong} of {scales.size} scales are not finite; the weight holds NaN or "
            f"infinity, or is too large for {grid.scale_dtype} scales. Take an earlier checkpoint."
        )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize_and_pack(value: jax.Array, grid: Grid, axis: int, order: str) -> PackedTensor:
    return _pack(quantize(value, grid, axis), grid, axis, order)


def _pack(codes: Codes, grid: Grid, axis: int, order: str) -> PackedTensor:
    return pack(
        jnp.asarray(codes.codes),
        jnp.asarray(codes.scales),
        bits=grid.bits,
        axis=axis,
        order=order,  # type: ignore[arg-type]
        levels=grid.levels,  # type: ignore[arg-type]
    )


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(packed: PackedTensor, dtype: Any) -> jax.Array:
    return packed.dequantize(dtype)
