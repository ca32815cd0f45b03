"""Fake quantization as one map over the parameter tree, once per optimizer step.

    weights, pullback = jax.vjp(lambda p: fake_quantize(p, table), params)
    gradients = pullback(gradients_at_the_quantized_weights)

The gradient program takes the quantized weights as plain floats, so it is the same for all tables.
"""

from typing import Any

from gemmaqat.packed import PackedTensor
from gemmaqat.quantization import trees
from gemmaqat.quantization.grids import fake_quantize_array
from gemmaqat.quantization.table import Entry, Table
from gemmaqat.typing import Params


def fake_quantize(params: Params, table: Table) -> Params:
    """The same tree with every weight moved to its grid; gradients pass straight through.

    Args:
        params: the tree the table was resolved for, or its values as nested dicts.
        table: which grid each parameter gets; the others are returned untouched. Quantized ones
            come back in float32, as packed ones decode, and their gradients in their own dtype.

    Raises:
        ValueError: the tree and the table do not hold the same parameters.
    """
    entries = matching_entries(params, table)

    def one(path: str, value: Any) -> Any:
        entry = entries.get(path)
        if entry is None or entry.grid is None:
            return value
        return fake_quantize_array(value, entry.grid, entry.axis)

    return trees.map_weights(one, params)


def matching_entries(params: Params, table: Table) -> dict[str, Entry]:
    """The table's entries by path, after checking that the tree has these parameters.

    Scales of activations are no weights: the tree may have them or not.

    Raises:
        ValueError: a parameter that only one of them has, of another shape, or packed already.
    """
    entries, scales = table.by_path, table.activation_scales
    weights = {
        path: value
        for path, (value, metadata) in trees.weights(params).items()
        if path not in scales and not trees.is_activation_scale(metadata)
    }
    for path in sorted(entries.keys() | weights.keys()):
        if path not in entries or path not in weights:
            where = "the table" if path not in entries else "the parameters"
            raise ValueError(
                f"{path}: not in {where}; resolve the rules for this model and use that table."
            )
        value = weights[path]
        if isinstance(value, PackedTensor):
            raise ValueError(f"{path}: already packed; use dequantize_params first.")
        if tuple(value.shape) != entries[path].shape:
            raise ValueError(
                f"{path}: shape {tuple(value.shape)}, the table was resolved for "
                f"{entries[path].shape}; resolve the rules for this model."
            )
    return entries
