"""`PackedTensor`: a weight stored as low-bit codes and scales, multiplied without leaving them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gemmaqat.kernels import dispatch, reference
from gemmaqat.kernels.layout import Layout, pack_codes, unpack_codes
from gemmaqat.kernels.layout import Levels as Levels
from gemmaqat.kernels.layout import Order as Order

FORMAT_VERSION = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A low-bit matrix, a stack of them, or a table of rows.

    Invariants:
        - the logical value is `[..., K, N]` with blocks along K; `shape` is that, or
          `[..., N, K]` when `transposed` (a table `[V, D]` has K = D and N = V);
        - value = (code + 1/2 if levels are "half") * scale, in float32;
        - `words` are uint32 and `scales` float, laid out as `kernels.layout` says;
        - scales are `[..., K / block, N]`, with one row for a channel scale and 1 x 1 for a
          tensor scale (both axes swapped in order "rows");
        - `layout` and `transposed` are static: they sit in the tree structure.
    """

    words: Any
    scales: Any
    layout: Layout = dataclasses.field(metadata=dict(static=True))
    transposed: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float weight this stands for."""
        columns = self.words.shape[-1 if self.layout.order == "contract" else -2]
        matrix = (self.layout.rows, columns)
        return (*self.words.shape[:-2], *(matrix[::-1] if self.transposed else matrix))

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.words.ndim

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the dequantized values."""
        return jnp.dtype(jnp.float32)

    @property
    def bits(self) -> int:
        """Storage bits of one code: 2, 4 or 8."""
        return self.layout.bits

    @property
    def block(self) -> int:
        """Codes of the contraction axis under one scale; 0 = all."""
        return self.layout.block

    @property
    def order(self) -> Order:
        """Memory order."""
        return self.layout.order

    @property
    def nbytes(self) -> int:
        """Bytes of words and scales."""
        return sum(a.size * jnp.dtype(a.dtype).itemsize for a in (self.words, self.scales))

    @property
    def bits_per_weight(self) -> float:
        """Bits of words and scales per weight."""
        return 8 * self.nbytes / self.size

    @property
    def T(self) -> "PackedTensor":  # noqa: N802
        """The transposed view of the same words."""
        return dataclasses.replace(self, transposed=not self.transposed)

    def codes(self) -> Int[Array, "..."]:
        """The int8 codes in the visible shape."""
        codes = unpack_codes(self.words, self.layout)
        return codes.mT if self.transposed else codes

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "..."]:
        """The whole float weight in the visible shape, computed in float32 and cast last."""
        value = reference.dequantize(self.words, self.scales, self.layout)
        return (value.mT if self.transposed else value).astype(dtype)

    def contract(self, x: Float[Array, "... K"], *, backend: str = "auto") -> Float[Array, "... N"]:
        """`x @ self` over the last axis of `x`, in the dtype of `x`."""
        self._expect(x.shape[-1], rank=2, what="contract")
        kernels = dispatch.select(backend)
        product = kernels.matmul_transposed if self.transposed else kernels.matmul
        rows = product(x.reshape(-1, x.shape[-1]), self.words, self.scales, self.layout)
        return rows.reshape(*x.shape[:-1], self.shape[-1])

    def take(self, ids: Int[Array, "..."], *, backend: str = "auto") -> Float[Array, "... D"]:
        """Rows `ids` of a table `[V, D]`, in float32; ids are clipped to 0 .. V - 1."""
        if not self.transposed:
            raise TypeError(
                f"take: a packed weight of shape {self.shape} has its blocks across the rows; only "
                "a table packed with contraction axis -1 can be read by rows."
            )
        return dispatch.select(backend).gather(ids, self.words, self.scales, self.layout)

    def ragged_contract(
        self, x: Float[Array, "M K"], group_sizes: Int[Array, " E"], *, backend: str = "auto"
    ) -> Float[Array, "M N"]:
        """Groups of consecutive rows of `x`, each times its own matrix of this stack."""
        self._expect(x.shape[-1], rank=3, what="ragged_contract")
        kernels = dispatch.select(backend)
        return kernels.ragged_matmul(x, self.words, self.scales, group_sizes, self.layout)

    def _expect(self, width: int, *, rank: int, what: str) -> None:
        if self.ndim != rank or self.shape[-2] != width:
            raise ValueError(
                f"{what}: activations of width {width} do not fit a packed weight of shape "
                f"{self.shape}; expected rank {rank} and axis -2 equal to the width."
            )


def pack(
    codes: Int[Array, "..."],
    scales: Float[Array, "..."],
    *,
    bits: int,
    axis: int = -2,
    order: Order = "contract",
    levels: Levels = "full",
) -> PackedTensor:
    """Packs codes and scales as a quantizer gives them.

    Args:
        codes: integers of the weight's shape, within the range of `bits`.
        scales: the same shape, with the contraction axis divided by the block; size 1 for a
            channel scale; both matrix axes 1 for a tensor scale.
        bits: nominal width of a code, 2 to 8; stored in 2, 4 or 8.
        axis: the contraction axis, -2 or -1. With -1 the result is a table (`transposed`).
        order: memory order.
        levels: "half" where the value is (code + 1/2) * scale.
    """
    if axis not in (-1, -2):
        raise ValueError(f"pack: contraction axis {axis} must be -2 (matrix) or -1 (table).")
    if axis == -1:
        codes, scales = codes.mT, scales.mT
    rows, num_blocks = codes.shape[-2], scales.shape[-2]
    if rows % num_blocks:
        raise ValueError(f"pack: {num_blocks} scales do not divide a contraction axis of {rows}.")
    layout = Layout(
        bits=storage_bits(bits),
        code_bits=bits,
        rows=rows,
        block=rows // num_blocks if num_blocks > 1 else 0,
        levels=levels,
        order=order,
    )
    words = pack_codes(codes, layout)
    return PackedTensor(words, scales if order == "contract" else scales.mT, layout, axis == -1)


def storage_bits(bits: int) -> int:
    """Bits in which a code of nominal width `bits` is stored."""
    if not 2 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be stored; expected 2 to 8.")
    return 2 if bits == 2 else 4 if bits <= 4 else 8


def to_arrays(packed: PackedTensor) -> tuple[dict[str, Array], dict[str, Any]]:
    """Plain arrays and JSON-able metadata, for checkpoint writers; `from_arrays` reads them."""
    metadata = dataclasses.asdict(packed.layout) | {"transposed": packed.transposed}
    arrays = {"words": packed.words, "scales": packed.scales}
    return arrays, {"format_version": FORMAT_VERSION} | metadata


def from_arrays(arrays: dict[str, Any], metadata: dict[str, Any]) -> PackedTensor:
    """The inverse of `to_arrays`.

    Raises:
        ValueError: metadata of a newer version, or arrays that do not fit it.
    """
    fields = dict(metadata)
    version = fields.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"packed tensor: format_version is {version!r}, this version reads {FORMAT_VERSION}; "
            "use the version of gemmaqat that wrote it."
        )
    transposed = bool(fields.pop("transposed"))
    words, scales = (
        jnp.asarray(a) if isinstance(a, np.ndarray) else a
        for a in (arrays["words"], arrays["scales"])
    )
    packed = PackedTensor(words, scales, Layout(**fields), transposed)
    axis = -2 if packed.order == "contract" else -1
    found = (packed.words.shape[axis], packed.scales.shape[axis])
    expected = (packed.layout.num_words, packed.layout.num_blocks)
    if found != expected or np.dtype(packed.words.dtype) != np.uint32:
        raise ValueError(
            f"packed tensor: {found[0]} words ({packed.words.dtype}) and {found[1]} scales along "
            f"the contraction axis, expected {expected[0]} (uint32) and {expected[1]}."
        )
    return packed
