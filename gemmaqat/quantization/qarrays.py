"""To and from `qwix.QArray`, qwix's container of codes and scales."""

import jax.numpy as jnp
import numpy as np
import qwix

from gemmaqat.packed import PackedTensor, pack

_QTYPES = {8: jnp.int8, 4: jnp.int4, 3: "int3", 2: "int2"}


def to_qarray(packed: PackedTensor) -> qwix.QArray:
    """The same codes and scales in the visible shape; its dequantization is equal to the bit.

    Raises:
        ValueError: half-integer levels, which a QArray without a zero point cannot hold.
    """
    if packed.layout.levels == "half":
        raise ValueError(
            f"to_qarray: a packed weight of shape {packed.shape} has half-integer levels; a QArray "
            "holds whole multiples of its scale."
        )
    scales = packed.scales if packed.order == "contract" else packed.scales.mT
    if packed.transposed:
        scales = scales.mT
    qtype = _QTYPES[packed.layout.code_bits]
    stored = jnp.int8 if packed.layout.code_bits == 8 else jnp.int4
    codes = packed.codes().astype(stored)
    # float32 scales: qwix dequantizes in the dtype of the scale.
    return qwix.QArray(codes, scales.astype(jnp.float32), None, qtype)


def from_qarray(array: qwix.QArray, *, axis: int = -2) -> PackedTensor:
    """The packed form of a QArray.

    Args:
        array: integer codes, with scales tiled along the contraction axis alone, or per channel,
            or per tensor.
        axis: the contraction axis: -2 for a matrix, -1 for a table.

    Raises:
        ValueError: a zero point, another type, or scales tiled along another axis.
    """
    name = array.qtype if isinstance(array.qtype, str) else np.dtype(array.qtype).name
    if name not in ("int8", "int4", "int3", "int2"):
        raise ValueError(f"from_qarray: qtype {name!r} is not one of int8, int4, int3, int2.")
    if array.zero_point is not None:
        raise ValueError("from_qarray: the array has a zero point; grids here are symmetric.")
    codes, scales = array.qvalue.astype(jnp.int8), array.scale
    other = -3 - axis
    whole = scales.shape[:-2] == codes.shape[:-2]
    channelwise = scales.shape[other] == codes.shape[other]
    tensorwise = scales.shape[other] == 1 and scales.shape[axis] == 1
    if not (whole and (channelwise or tensorwise)):
        raise ValueError(
            f"from_qarray: scales of shape {scales.shape} for codes of shape {codes.shape}; "
            f"expected one per channel or tiles along axis {axis} alone."
        )
    return pack(codes, scales, bits=int(name[3:]), axis=axis)
