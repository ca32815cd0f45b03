"""How integer codes lie in 32-bit words: the one layout of checkpoints and of every kernel.

The logical matrix is `[K, N]` with blocks of `K` that share a scale. A word holds `32 / bits`
codes of consecutive `K`, little end first: code j in bits `[j * bits, (j + 1) * bits)`, biased by
`2^(bits - 1)` for 2 and 4 bits, two's complement for 8. Words are padded at the end of `K`.

    order "contract"   words [..., W, N], scales [..., S, N]: for everything that is multiplied
    order "rows"       words [..., N, W], scales [..., N, S]: for tables of which rows are read
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

Order = Literal["contract", "rows"]
Levels = Literal["full", "half", "ternary"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Static description of packed codes. Equal layouts share compiled programs."""

    bits: int  # of storage: 2, 4 or 8
    code_bits: int  # nominal: 3-bit codes are stored in 4
    rows: int  # K, without the padding
    block: int  # codes of K under one scale; 0 = all of them
    levels: Levels = "full"  # "half": the value is (code + 1/2) * scale
    order: Order = "contract"

    @property
    def codes_per_word(self) -> int:
        """Consecutive codes in one word."""
        return 32 // self.bits

    @property
    def num_words(self) -> int:
        """Words along K, the padded last one included."""
        return -(-self.rows // self.codes_per_word)

    @property
    def num_blocks(self) -> int:
        """Scales along K."""
        return self.rows // self.block if self.block else 1

    @property
    def unit(self) -> int:
        """Smallest step along K at which neither a word nor a block is cut."""
        return int(np.lcm(self.codes_per_word, self.block or 1))


@functools.partial(jax.jit, static_argnums=1)
def pack_codes(codes: Int[Array, "... K N"], layout: Layout) -> UInt32[Array, "... A B"]:
    """Packs codes into words in the order of the layout."""
    per_word = layout.codes_per_word
    padding = layout.num_words * per_word - layout.rows
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, padding), (0, 0)])
    biased = codes.astype(jnp.int32) + (0 if layout.bits == 8 else 1 << (layout.bits - 1))
    fields = biased.astype(jnp.uint32) & np.uint32(2**layout.bits - 1)
    fields = fields.reshape(*codes.shape[:-2], layout.num_words, per_word, codes.shape[-1])
    # The fields do not overlap, so the sum is their union.
    words = jnp.sum(_along_k(jnp.left_shift, fields, layout), axis=-2, dtype=jnp.uint32)
    return words if layout.order == "contract" else words.mT


@functools.partial(jax.jit, static_argnums=1)
def unpack_codes(words: UInt32[Array, "... A B"], layout: Layout) -> Int[Array, "... K N"]:
    """The int8 codes, padding removed, as `[..., K, N]` whatever the order."""
    if layout.order == "rows":
        words = words.mT
    return decode(words, layout)[..., : layout.rows, :].astype(jnp.int8)


def decode(words: UInt32[Array, "... W N"], layout: Layout) -> Int[Array, "... C N"]:
    """Codes of whole words in contract order, as int32, the padding included."""
    bias = 1 << (layout.bits - 1)
    if layout.bits == 8:  # two's complement to biased
        words = words ^ np.uint32(0x80808080)
    fields = jnp.broadcast_to(
        words[..., :, None, :],
        (*words.shape[:-1], layout.codes_per_word, words.shape[-1]),
    )
    fields = _along_k(jnp.right_shift, fields, layout) & np.uint32(2**layout.bits - 1)
    codes = fields.reshape(*words.shape[:-2], -1, words.shape[-1]).astype(jnp.int32)
    return codes - bias


def values(codes: Int[Array, "... K N"], layout: Layout) -> Float[Array, "... K N"]:
    """What the codes stand for before the scale is applied, in float32."""
    half = 0.5 if layout.levels == "half" else 0.0
    return codes.astype(jnp.float32) + half


def _along_k(shift, fields: Array, layout: Layout) -> Array:
    """Shifts code j of every word by `j * bits`; fields are `[..., W, codes per word, N]`."""
    amounts = np.arange(layout.codes_per_word, dtype=np.uint32) * np.uint32(layout.bits)
    amounts = amounts.reshape((1,) * (fields.ndim - 2) + (-1, 1))
    return shift(fields, jax.lax.broadcast_in_dim(amounts, fields.shape, range(fields.ndim)))
