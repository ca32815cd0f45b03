"""Key/value cache: ring buffers whose every slot knows its position.

A slot holds the key, the value and the absolute position of one token; -1 marks an empty slot.
Masks derive from positions alone, so neither order in memory nor padding matters. Keys and values
are stored as floats or as low-bit codes; attention reads codes back as floats, one layer at a time.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from gemmaqat.models.config import ModelConfig
from gemmaqat.models.kv_codes import KVCodes, init_codes, quantize_like
from gemmaqat.typing import Leaf, Positions, SegmentIds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Rotated keys and normed values of some tokens, with what masks need to know of them."""

    k: Leaf  # float [B, S, K, H], or its KVCodes
    v: Leaf  # float [B, S, K, H], or its KVCodes
    positions: Leaf  # int32 [B, S], absolute; -1 = nothing here
    segment_ids: Leaf | None = None  # int32 [B, S]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """One `KeyValues` per layer that owns keys, None for layers that share.

    Invariants: a sliding layer has `min(max_length, window)` slots, a full-attention layer
    `max_length`; the token at position p lives in slot p modulo the number of slots.
    """

    layers: tuple[KeyValues | None, ...]

    @property
    def max_length(self) -> int:
        """Positions that fit: the slots of the full-attention layers."""
        return max(x.positions.shape[1] for x in self.layers if x is not None)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, the scales of codes included."""
        return sum(x.k.nbytes + x.v.nbytes for x in self.layers if x is not None)

    @property
    def position_bytes(self) -> int:
        """Bytes of the slots' positions."""
        return sum(x.positions.nbytes for x in self.layers if x is not None)


def init_cache(
    config: ModelConfig,
    *,
    batch_size: int,
    max_length: int,
    dtype: str,
    quantization: str | None = None,
    static_scales: Sequence[tuple[Any, Any] | None] = (),
) -> KVCache:
    """An empty cache for `batch_size` sequences of at most `max_length` positions.

    Args:
        config: of the model.
        batch_size: sequences.
        max_length: positions that full-attention layers hold.
        dtype: of stored floats; without a meaning for codes.
        quantization: how keys and values are stored; None = as floats.
        static_scales: for "static": the scales of keys and of values of every layer (None for
            layers that share).
    """

    def empty(layer: int) -> KeyValues | None:
        if not config.owns_kv(layer):
            return None
        slots = min(max_length, config.sliding_window) if config.is_sliding(layer) else max_length
        shape = (batch_size, slots, config.layer_kv_heads(layer), config.layer_head_dim(layer))
        scales = static_scales[layer] if quantization == "static" else None
        k, v = (
            jnp.zeros(shape, dtype)
            if quantization is None
            else init_codes(shape, quantization, static_scale=scale)
            for scale in scales or (None, None)
        )
        return KeyValues(k, v, positions=jnp.full((batch_size, slots), -1, jnp.int32))

    return KVCache(tuple(empty(layer) for layer in range(config.num_layers)))


def extend(cache: KeyValues, new: KeyValues, *, window: int | None) -> tuple[KeyValues, KeyValues]:
    """Adds a chunk of tokens to one layer's cache.

    Args:
        cache: the layer's slots.
        new: the chunk's keys and values; positions -1 are padding and are never written.
        window: the sliding window, or None for a full-attention layer.

    Returns:
        What the chunk's queries attend to, and the updated slots. Early queries of a chunk still
        see keys that its late tokens overwrite, so a chunk of a sliding layer attends to the old
        slots and itself side by side; otherwise to the updated slots in place.
    """
    chunk, slots = new.positions.shape[1], cache.positions.shape[1]
    new = KeyValues(_stored(new.k, cache.k), _stored(new.v, cache.v), new.positions)
    # Only the last tokens that fit are written, so that no slot is written twice.
    last = jnp.max(new.positions, axis=1, keepdims=True)
    written = (new.positions >= 0) & (new.positions > last - slots)
    if window is None:  # a full-attention layer forgets nothing, so it never wraps
        written &= new.positions < slots
    index = jnp.where(written, new.positions % slots, slots)

    def write(old: Array, values: Array) -> Array:
        if old.ndim == 0:  # a static scale, that of old and new alike
            return old
        return jax.vmap(lambda o, i, x: o.at[i].set(x, mode="drop"))(old, index, values)

    updated = jax.tree.map(write, cache, new)
    if window is None or chunk == 1:
        return updated, updated
    join = lambda old, x: jnp.concatenate([old, x], axis=1) if old.ndim else old  # noqa: E731
    return jax.tree.map(join, cache, new), updated


def _stored(x: Array, slots: Array | KVCodes) -> Array | KVCodes:
    """Keys or values in the form of the slots they go to."""
    return quantize_like(x, slots) if isinstance(slots, KVCodes) else x.astype(slots.dtype)


def attention_mask(
    positions: Positions,
    keys: KeyValues,
    *,
    segment_ids: SegmentIds | None,
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Which keys each query may attend to: causal, within the window, in its own segment.

    Args:
        positions: of the queries; a query at -1 sees nothing.
        keys: their positions, and segments where `segment_ids` is given.
        segment_ids: of the queries; None where a row is one document.
        window: keys per query of a sliding layer (itself included), None for all earlier ones.
    """
    query, key = positions[:, :, None], keys.positions[:, None, :]
    mask = (key >= 0) & (key <= query)
    if window is not None:
        mask &= key > query - window
    if segment_ids is not None and keys.segment_ids is not None:
        mask &= segment_ids[:, :, None] == keys.segment_ids[:, None, :]
    return mask
