"""Keys and values as a quantized cache stores them: symmetric integer codes and their scales."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gemmaqat.typing import Leaf

# static: int8 codes under one calibrated scale per layer, for keys and for values;
# int8, int4: one scale per token and head, from its largest magnitude.
KV_QUANTIZATIONS = ("static", "int8", "int4")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCodes:
    """Keys or values of some tokens in 8 or 4 bits.

    Invariants:
        - value = code * scale, in float32;
        - 8-bit codes are int8; 4-bit ones lie two in a byte of uint8, entry j of a head in the low
          half and entry j + H / 2 in the high half;
        - a static scale is one number, else every token and head has its own.
    """

    codes: Leaf  # int8 [B, S, K, H] or uint8 [B, S, K, H / 2]
    scales: Leaf  # float32 [] (static) or [B, S, K, 1]
    bits: int = dataclasses.field(metadata=dict(static=True))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def astype(self, dtype: Any) -> Float[Array, "B S K H"]:
        """The values these stand for, computed in float32 and cast last."""
        codes = _unpack(self.codes) if self.bits == 4 else self.codes
        return (codes.astype(jnp.float32) * _broadcast(self.scales)).astype(dtype)


def init_codes(
    shape: tuple[int, int, int, int], quantization: str, *, static_scale: Any = None
) -> KVCodes:
    """Zeros of the shape [B, S, K, H]; `static_scale` is that of "static"."""
    *outer, head_dim = shape
    if quantization == "static":
        # A copy: caches are donated, parameters are not.
        return KVCodes(jnp.zeros(shape, jnp.int8), jnp.array(static_scale, jnp.float32), bits=8)
    scales = jnp.zeros((*outer, 1), jnp.float32)
    if quantization == "int8":
        return KVCodes(jnp.zeros(shape, jnp.int8), scales, bits=8)
    return KVCodes(jnp.zeros((*outer, head_dim // 2), jnp.uint8), scales, bits=4)


def quantize_like(x: Float[Array, "B T K H"], stored: KVCodes) -> KVCodes:
    """Codes of `x` in the form of `stored`, under its scale where that is static.

    Static codes use the whole range, -128 to 127; dynamic ones the symmetric part of theirs,
    because their scale is the largest magnitude over 127 (or 7). A value that is no number makes
    its token's dynamic scale none either, so that it is not read back as one.
    """
    x = x.astype(jnp.float32)
    most = 2 ** (stored.bits - 1) - 1
    if stored.scales.ndim == 0:
        scales, least = stored.scales, -most - 1
        # A divisor that depends on x: XLA makes a product with the rounded reciprocal of a division
        # by one number, and a tie would fall to the other side than in the fake quantizer.
        ratio = x / jnp.where(x != 0, _broadcast(scales), 1)
    else:
        scales, least = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / most, -most
        ratio = x / jnp.where(scales > 0, scales, 1)
    codes = jnp.clip(jnp.round(ratio), least, most).astype(jnp.int8)
    return KVCodes(_pack(codes) if stored.bits == 4 else codes, scales, stored.bits)


def _broadcast(scales: Array) -> Array:
    return scales if scales.ndim else scales.reshape(1, 1, 1, 1)


def _pack(codes: Array) -> Array:
    low, high = jnp.split(codes.astype(jnp.uint8) & jnp.uint8(15), 2, axis=-1)
    return low | (high << jnp.uint8(4))


def _unpack(packed: Array) -> Array:
    """int8 codes; an arithmetic shift brings back the signs."""
    four = jnp.int8(4)
    low, high = (packed << jnp.uint8(4)).astype(jnp.int8) >> four, packed.astype(jnp.int8) >> four
    return jnp.concatenate([low, high], axis=-1)
